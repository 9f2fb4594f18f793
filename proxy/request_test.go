// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"unsafe"

	"tarn/blobstore"
	"tarn/upstream"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

var testNames = names{
	listed:          func(n upstream.Name) bool { return n == "lab.test" || n == "corp:5000" || n == "docker.io" },
	defaultUpstream: upstream.DockerHub,
}

var sum = digest.FromString("x").String()

func TestWhichUpstream(t *testing.T) {
	for target, want := range map[string]string{
		"/v2/hello/manifests/latest":                             "docker.io library/hello",
		"/v2/org/app/manifests/latest":                           "docker.io org/app",
		"/v2/my.app/manifests/latest":                            "docker.io library/my.app",
		"/v2/app/manifests/v1?ns=ghcr.io":                        "ghcr.io app",
		"/v2/ghcr.io/app/manifests/v1?ns=ghcr.io":                "ghcr.io app",
		"/v2/ghcr.io/manifests/v1?ns=ghcr.io":                    "ghcr.io ghcr.io",
		"/v2/quay.io/app/manifests/v1?ns=ghcr.io":                "ghcr.io quay.io/app",
		"/v2/ghcr.io/org/app/manifests/v1":                       "ghcr.io org/app",
		"/v2/corp__5000/app/manifests/v1":                        "corp:5000 app",
		"/v2/corp_5000_/app/blobs/" + sum:                        "corp:5000 app",
		"/v2/app/blobs/" + sum + "?ns=corp%3A5000":               "corp:5000 app",
		"/v2/corp__5000/app/blobs/" + sum + "?ns=corp:5000":      "corp:5000 app",
		"/ghcr.io/v2/org/app/manifests/v1":                       "ghcr.io org/app",
		"/ghcr.io/v2/org/app/manifests/v1?ns=GHCR.io.":           "ghcr.io org/app",
		"/corp:5000/v2/app/tags/list":                            "corp:5000 app",
		"/v2/a/manifests/b/manifests/v1?ns=lab.test":             "lab.test a/manifests/b",
		"/v2/a/tags/list/manifests/v1?ns=lab.test":               "lab.test a/tags/list",
		"/v2/app/referrers/" + sum + "?ns=lab.test":              "lab.test app",
		"/v2/app/blobs/sha256%3a" + sum[7:] + "?ns=lab.test":     "lab.test app",
		"/v2/v2/app/manifests/v1?ns=lab.test":                    "lab.test v2/app",
		"/v2/registry-1.docker.io/hello/manifests/latest":        "docker.io library/hello",
		"/v2/app/manifests/v1?ns=%5B2001%3Adb8%3A%3A1%5D%3A5000": "[2001:db8::1]:5000 app",
	} {
		q, err := testNames.parse(mustRequest(t, target))
		if err != nil {
			t.Errorf("%s: %v", target, err)
			continue
		}
		if got := string(q.upstream) + " " + q.repository; got != want {
			t.Errorf("%s: %s, want %s", target, got, want)
		}
	}
}

func mustRequest(t testing.TB, target string) *http.Request {
	t.Helper()
	u, err := url.ParseRequestURI(target)
	if err != nil {
		t.Fatalf("%s: %v", target, err)
	}
	return &http.Request{Method: "GET", URL: u, Header: make(http.Header)}
}

// FuzzParse: whatever the request, what the parser lets through is canonical
// and can do no harm as a part of a URL or a path.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"/v2/", "/v2/app/manifests/v1", "/v2/ghcr.io/app/blobs/" + sum, "/corp__5000/v2/a/tags/list?n=1",
		"/v2/a/../b/manifests/v1?ns=x", "/v2/a%2Fb/manifests/v1", "/v2/a/blobs/sha256:..", "/v2/a/referrers/" + sum + "?ns=h:1&artifactType=x",
	} {
		f.Add(seed)
	}
	name := regexp.MustCompile(`^(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]+)?$`)
	f.Fuzz(func(t *testing.T, target string) {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			return
		}
		q, err := testNames.parse(&http.Request{Method: "GET", URL: u, Header: make(http.Header)})
		if err != nil {
			status, _ := answerFor(&request{}, err)
			if status != 400 && status != 404 {
				t.Fatalf("%q: %d", target, status)
			}
			return
		}
		if q.upstream == "" && q.base {
			return
		}
		if !name.MatchString(string(q.upstream)) {
			t.Fatalf("%q: upstream %q", target, q.upstream)
		}
		if again, err := upstream.ParseName(string(q.upstream)); err != nil || again != q.upstream {
			t.Fatalf("%q: %q is not canonical: %q, %v", target, q.upstream, again, err)
		}
		if q.base {
			return
		}
		if !reference.NameRegexp.MatchString(q.repository) || strings.Contains(q.repository, "..") || len(q.repository) > 255 {
			t.Fatalf("%q: repository %q", target, q.repository)
		}
		if (q.tag == "") == (q.digest == "") && q.kind != upstream.Tags {
			t.Fatalf("%q: tag %q, digest %q", target, q.tag, q.digest)
		}
		if q.digest != "" && blobstore.CheckDigest(q.digest) != nil {
			t.Fatalf("%q: digest %q", target, q.digest)
		}
	})
}

// FuzzRepository holds the hand-written check to the reference grammar.
func FuzzRepository(f *testing.F) {
	for _, seed := range []string{"a", "a/b", "a__b", "a___b", "a.b", "a..b", "a-_b", "a--b", "-a", "a-", "A", "a//b", "ä"} {
		f.Add(seed)
	}
	component := `[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*`
	grammar := regexp.MustCompile(`^` + component + `(?:/` + component + `)*$`)
	f.Fuzz(func(t *testing.T, name string) {
		want := len(name) <= 255 && grammar.MatchString(name)
		if got := checkRepository(name) == nil; got != want {
			t.Fatalf("%q: %v, the grammar says %v", name, got, want)
		}
	})
}

// FuzzManifest: a manifest's type is never one that its body denies.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`), "text/plain")
	f.Add([]byte(`{"layers":[],"config":{}}`), "application/vnd.oci.image.manifest.v1+json")
	f.Add([]byte(`{"layers":[],"manifests":null}`), "")
	f.Fuzz(func(t *testing.T, body []byte, contentType string) {
		info, err := parseManifest(body)
		if err != nil {
			return
		}
		got, err := info.typeAs(contentType)
		if err == nil && (!manifestLike(got) || info.own != "" && got != info.own) {
			t.Fatalf("%q as %q: %q", body, contentType, got)
		}
	})
}

// TestWhatIsKeptOfARequestKeepsNoMoreOfIt: names live in tables that are bounded by
// their own length, and a query may be as long as all headers.
func TestWhatIsKeptOfARequestKeepsNoMoreOfIt(t *testing.T) {
	t.Parallel()
	line := "GET /v2/ghcr.io/org/app/manifests/v1?ns=ghcr.io&f=" + strings.Repeat("x", 30_000) + " HTTP/1.1\r\nHost: tarn\r\n\r\n"
	for _, line := range []string{line, strings.Replace(line, "ns=", "n=", 1), strings.Replace(line, "manifests/v1", "blobs/"+sum, 1)} {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(line)))
		if err != nil {
			t.Fatal(err)
		}
		q, err := testNames.parse(r)
		if err != nil {
			t.Fatal(err)
		}
		begin := uintptr(unsafe.Pointer(unsafe.StringData(r.RequestURI)))
		for _, kept := range []string{string(q.upstream), q.repository, q.tag, string(q.digest), q.ns, q.prefix, q.named} {
			if at := uintptr(unsafe.Pointer(unsafe.StringData(kept))); kept != "" && begin <= at && at < begin+uintptr(len(r.RequestURI)) {
				t.Errorf("%q is a part of the request line", kept)
			}
		}
	}
}
