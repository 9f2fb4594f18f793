// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestATagIsConfirmedByOneHeadAndServedFromDisk(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 200_000))
	path := manifestPath("app", "v1")

	d.head(path).must(t, 200).
		mustSay(t, "Docker-Content-Digest", img.Manifest.String()).
		mustSay(t, "Content-Length", fmt.Sprint(len(img.Body))).
		mustSay(t, "Content-Type", v1.MediaTypeImageManifest).
		mustSay(t, "ETag", `"`+img.Manifest.String()+`"`).
		mustSay(t, "Cache-Status", "tarn; fwd=uri-miss; fwd-status=200").
		mustSay(t, "OCI-Namespace", lab).
		mustSay(t, "Docker-Distribution-Api-Version", "registry/2.0")
	if h, g := r.Count("HEAD", ""), r.Count("GET", ""); h != 1 || g != 0 {
		t.Fatalf("a HEAD of an uncached tag cost %d HEAD and %d GET", h, g)
	}

	r.Reset()
	d.get(path).mustBe(t, img.Body).mustSay(t, "Cache-Status", "tarn; fwd=uri-miss; fwd-status=200; stored")
	if h, g := r.Count("HEAD", "/manifests/v1"), r.Count("GET", "/manifests/"+img.Manifest.String()); h != 1 || g != 1 || len(r.Exchanges()) != 2 {
		t.Fatalf("the first GET cost %v", r.Exchanges())
	}
	d.stored(cache.ListedDomain, img.Manifest)

	r.Reset()
	d.get(path).mustBe(t, img.Body).mustSay(t, "Cache-Status", "tarn; fwd=stale; fwd-status=200; detail=confirmed")
	d.head(path).must(t, 200).mustSay(t, "Content-Length", fmt.Sprint(len(img.Body)))
	if h := r.Count("HEAD", "/manifests/v1"); h != 2 || len(r.Exchanges()) != 2 {
		t.Fatalf("a cached tag cost %v", r.Exchanges())
	}
}

func TestAMovedTagIsSeenAtOnce(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	first := r.Image("app", "v1", random(1, 10))
	path := manifestPath("app", "v1")
	d.get(path).mustBe(t, first.Body)
	second := r.Image("app", "v1", random(2, 10))
	d.get(path).mustBe(t, second.Body)
	d.head(path).must(t, 200).mustSay(t, "Docker-Content-Digest", second.Manifest.String())
	r.Tag("app", "v1", first.Manifest)
	d.get(path).mustBe(t, first.Body).mustSay(t, "Cache-Status", "tarn; fwd=stale; fwd-status=200; detail=confirmed")
}

func TestAllFormsOfAURLAreOneObject(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 100_000))
	for _, form := range []string{
		"/v2/app/manifests/%s?ns=lab.test",
		"/v2/app/manifests/%s?ns=LAB.test.",
		"/v2/app/manifests/%s?ns=lab.test%%3A443",
		"/v2/lab.test/app/manifests/%s",
		"/v2/lab.test/app/manifests/%s?ns=lab.test",
		"/lab.test/v2/app/manifests/%s",
		"/lab.test/v2/app/manifests/%s?ns=lab.test",
	} {
		d.get(fmt.Sprintf(form, "v1")).mustBe(t, img.Body)
		d.get(fmt.Sprintf(form, img.Manifest)).mustBe(t, img.Body)
		d.get(fmt.Sprintf(form, strings.Replace(img.Manifest.String(), ":", "%3A", 1))).mustBe(t, img.Body)
	}
	if n := r.Count("GET", ""); n != 1 {
		t.Fatalf("%d GETs for one object", n)
	}
}

func TestDockerHubHasOneName(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{"docker.io": r}})
	img := r.Image("library/hello", "latest", random(1, 1000))
	for _, path := range []string{
		"/v2/hello/manifests/latest?ns=docker.io",
		"/v2/hello/manifests/latest?ns=index.docker.io",
		"/v2/library/hello/manifests/latest?ns=registry-1.docker.io",
		"/v2/hello/manifests/latest?ns=DOCKER.IO",
		"/v2/hello/manifests/latest?ns=docker.io.",
		"/v2/hello/manifests/latest?ns=docker.io:443",
		"/v2/docker.io/hello/manifests/latest",
		"/v2/docker.io/library/hello/manifests/latest?ns=docker.io",
		"/v2/library/hello/manifests/latest",
		"/v2/hello/manifests/latest",
		"/docker.io/v2/hello/manifests/latest",
	} {
		d.get(path).mustBe(t, img.Body)
	}
	if n := r.Count("GET", ""); n != 1 {
		t.Fatalf("%d GETs for one repository", n)
	}
}

func TestBlobsAreServedWithRangesColdAndWarm(t *testing.T) {
	t.Parallel()
	blob := random(1, 300_000)
	cases := []struct {
		name, header  string
		status        int
		first, length int
		contentRange  string
		gets          int
	}{
		{"all", "", 200, 0, 300_000, "", 1},
		{"from the start on", "bytes=0-", 206, 0, 300_000, "bytes 0-299999/300000", 1},
		{"the middle", "bytes=100000-100099", 206, 100_000, 100, "bytes 100000-100099/300000", 2}, // from there on, and what is before
		{"into the tail", "bytes=299990-", 206, 299_990, 10, "bytes 299990-299999/300000", 2},
		{"the last hundred", "bytes=-100", 206, 299_900, 100, "bytes 299900-299999/300000", 1},
		{"past the end", "bytes=300000-", 416, 0, 0, "bytes */300000", 2}, // which the registry knew
		{"two ranges", "bytes=0-1,5-6", 200, 0, 300_000, "", 1},
		{"another unit", "lines=1-2", 416, 0, 0, "", 1},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r, d := one(t)
			dgst := r.Blob("app", blob)
			for _, state := range []string{"cold", "warm"} {
				var headers []string
				if c.header != "" {
					headers = []string{"Range", c.header}
				}
				a := d.get(blobPath("app", dgst), headers...).must(t, c.status)
				if c.status < 300 && !bytes.Equal(a.body, blob[c.first:c.first+c.length]) {
					t.Fatalf("%s: %d wrong bytes", state, len(a.body))
				}
				if c.contentRange != "" {
					a.mustSay(t, "Content-Range", c.contentRange)
				}
				if c.status < 300 {
					a.mustSay(t, "Content-Length", fmt.Sprint(c.length)).mustSay(t, "Docker-Content-Digest", dgst.String())
				}
				d.stored(cache.ListedDomain, dgst)
			}
			if n := r.Count("GET", "/blobs/"); n != c.gets {
				t.Fatalf("%d GETs, not %d", n, c.gets)
			}
		})
	}
}

func TestConditionsHoldAfterAuthorisation(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 1000))
	d.get(manifestPath("app", "v1")).must(t, 200)
	d.stored(cache.ListedDomain, img.Manifest)
	etag := `"` + img.Manifest.String() + `"`
	for _, inm := range []string{etag, img.Manifest.String(), `"x", ` + etag} {
		d.get(manifestPath("app", "v1"), "If-None-Match", inm).must(t, 304)
		d.head(manifestPath("app", "v1"), "If-None-Match", inm).must(t, 304)
	}
	d.get(manifestPath("app", "v1"), "If-None-Match", `"sha256:other"`).must(t, 200)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool { w.WriteHeader(403); return true }
	d.get(manifestPath("app", "v1"), "If-None-Match", etag).must(t, 403)
	d.get(manifestPath("app", img.Manifest.String()), "If-None-Match", etag).must(t, 403)
}

func TestFiftyClientsCostOneGetAnObject(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	var layers [][]byte
	for i := range 10 {
		layers = append(layers, random(uint64(i), 100_000+i*10_000))
	}
	img := r.Image("app", "v1", layers...)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if a := d.get(manifestPath("app", "v1")); !bytes.Equal(a.body, img.Body) {
				t.Errorf("manifest: %d, %v", a.status, a.err)
			}
			var layersWG sync.WaitGroup
			for i, l := range img.Layers {
				layersWG.Go(func() {
					if a := d.get(blobPath("app", l)); !bytes.Equal(a.body, layers[i]) {
						t.Errorf("layer %d: %d, %d bytes, %v", i, a.status, len(a.body), a.err)
					}
				})
			}
			layersWG.Wait()
		})
	}
	wg.Wait()
	seen := make(map[string]int)
	for _, e := range r.Exchanges() {
		if e.Method == "GET" {
			seen[e.Path]++
		}
	}
	if len(seen) != 11 {
		t.Errorf("GETs of %d objects, want 11", len(seen))
	}
	for path, n := range seen {
		if n != 1 {
			t.Errorf("%d GETs of %s", n, path)
		}
	}
	t.Logf("50 clients, 550 GETs: upstream %d GET, %d HEAD", r.Count("GET", ""), r.Count("HEAD", ""))
}

func TestAClientThatLeavesDoesNotEndTheDownload(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	blob := random(1, 2_000_000)
	dgst := r.Blob("app", blob)
	gate := make(chan struct{})
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		w.Write(blob[:1_000_000])
		w.(http.Flusher).Flush()
		<-gate
		w.Write(blob[1_000_000:])
		return true
	}
	resp, err := http.Get(d.URL + blobPath("app", dgst))
	if err != nil {
		t.Fatal(err)
	}
	some := make([]byte, 1000)
	if _, err := resp.Body.Read(some); err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	close(gate)
	d.stored(cache.ListedDomain, dgst)
	d.get(blobPath("app", dgst)).mustBe(t, blob).mustSay(t, "Cache-Status", "tarn; hit")
	if n := r.Count("GET", ""); n != 1 {
		t.Fatalf("%d GETs", n)
	}
}

func TestWhatIsCachedIsServedAfterTheAuthoritysYesOnly(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("private/app", "v1", random(1, 100_000))
	allowed := func(req *http.Request) bool { return req.Header.Get("Authorization") == "Basic YTphCg==" }
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if allowed(req) {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="lab",error="insufficient_scope"`)
		w.WriteHeader(401)
		return true
	}
	auth := []string{"Authorization", "Basic YTphCg=="}
	paths := []string{
		manifestPath("private/app", "v1"),
		manifestPath("private/app", img.Manifest.String()),
		blobPath("private/app", img.Layers[0]),
		blobPath("private/app", img.Config),
	}
	refusals := make(map[string]string)
	note := func(path, method string, a answer) {
		a.must(t, 401).mustSay(t, "WWW-Authenticate", `Basic realm="lab"`)
		a.header.Del("Date")
		words := fmt.Sprint(a.header, string(a.body))
		if before, ok := refusals[method+path]; ok && before != words {
			t.Errorf("%s %s: the refusal tells what is cached:\n%s\n%s", method, path, before, words)
		}
		refusals[method+path] = words
	}
	for _, state := range []string{"cold", "warm"} {
		for _, path := range paths {
			for _, headers := range [][]string{{}, {"Authorization", "Basic YjpiCg=="}, {"Range", "bytes=5-"}, {"If-None-Match", `"` + img.Manifest.String() + `"`}} {
				note(path, "GET", d.get(path, headers...))
				note(path, "HEAD", d.head(path, headers...))
			}
		}
		if state == "cold" {
			for _, path := range paths {
				d.get(path, auth...).must(t, 200)
			}
			for _, dgst := range []digest.Digest{img.Manifest, img.Layers[0], img.Config} {
				d.stored(cache.ListedDomain, dgst)
			}
		}
	}
}

func TestACachedDigestCostsANewCredentialOneByte(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	r.Access = registrytest.NewAccess(t, "Basic")
	r.Access.Allow("app", "a")
	r.Access.Allow("app", "b")
	dgst := r.Blob("app", random(1, 100_000))
	d.get(blobPath("app", dgst), r.Access.Login("app", "a")...).must(t, 200)
	d.stored(cache.ListedDomain, dgst)
	r.Reset()
	b := r.Access.Login("app", "b")
	for range 3 {
		d.get(blobPath("app", dgst), b...).must(t, 200).mustSay(t, "Cache-Status", "tarn; hit")
		d.head(blobPath("app", dgst), b...).must(t, 200).mustSay(t, "Cache-Status", "tarn; hit")
	}
	want := []registrytest.Exchange{{Method: "GET", Path: "/v2/app/blobs/" + dgst.String(), Range: "bytes=0-0", Authorization: b[1]}}
	if got := r.Exchanges(); len(got) != 1 || got[0] != want[0] {
		t.Fatalf("upstream saw %v, want %v", got, want)
	}
}

func TestAnonymousTokensAreFetchedByTarn(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 100_000))
	issued := 0
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path == "/token" {
			if got := req.URL.Query().Get("scope"); got != "repository:app:pull" {
				t.Errorf("scope %q", got)
			}
			issued++
			fmt.Fprintf(w, `{"token":"anon","expires_in":300}`)
			return true
		}
		if req.Header.Get("Authorization") != "Bearer anon" {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="lab",scope="repository:app:pull"`, r.URL))
			w.WriteHeader(401)
			return true
		}
		return false
	}
	d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
	d.get(blobPath("app", img.Layers[0])).must(t, 200)
	if issued != 1 {
		t.Errorf("%d tokens for one repository", issued)
	}
}

func TestARefusedAnonymousTokenRelaysTheChallengeUntouched(t *testing.T) {
	t.Parallel()
	for _, tokenStatus := range []int{401, 403, 200} {
		r, d := one(t)
		r.Image("app", "v1")
		challenge := fmt.Sprintf(`Bearer realm="%s/token",service="lab",scope="repository:app:pull"`, r.URL)
		r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			if req.URL.Path == "/token" {
				w.WriteHeader(tokenStatus)
				fmt.Fprint(w, `{"token":"useless"}`)
				return true
			}
			w.Header().Set("WWW-Authenticate", challenge+`,error="invalid_token"`)
			w.WriteHeader(401)
			return true
		}
		d.head(manifestPath("app", "v1")).must(t, 401).mustSay(t, "WWW-Authenticate", challenge)
	}
}

func TestUpstreamsWithHabits(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		habit func(r *registrytest.Registry, w http.ResponseWriter, req *http.Request) bool
	}{
		{"refuses HEAD", func(_ *registrytest.Registry, w http.ResponseWriter, req *http.Request) bool {
			if req.Method == "HEAD" {
				w.WriteHeader(405)
				return true
			}
			return false
		}},
		{"omits the digest", omit("Docker-Content-Digest")},
		{"omits the length", func(r *registrytest.Registry, w http.ResponseWriter, req *http.Request) bool {
			r.Answer(unsized{w}, req)
			return true
		}},
		{"omits the type", omit("Content-Type")},
		{"calls it text/plain", func(r *registrytest.Registry, w http.ResponseWriter, req *http.Request) bool {
			r.Answer(retyped{w, "text/plain; charset=utf-8"}, req)
			return true
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r, d := one(t)
			blob := random(1, 200_000)
			img := r.Image("app", "v1", blob)
			r.Hook = func(w http.ResponseWriter, req *http.Request) bool { return c.habit(r, w, req) }
			for range 3 {
				for _, ref := range []string{"v1", img.Manifest.String()} {
					d.head(manifestPath("app", ref)).must(t, 200).
						mustSay(t, "Docker-Content-Digest", img.Manifest.String()).
						mustSay(t, "Content-Length", fmt.Sprint(len(img.Body))).
						mustSay(t, "Content-Type", v1.MediaTypeImageManifest)
					d.get(manifestPath("app", ref)).mustBe(t, img.Body).mustSay(t, "Content-Type", v1.MediaTypeImageManifest)
				}
				d.get(blobPath("app", img.Layers[0])).mustBe(t, blob)
				d.stored(cache.ListedDomain, img.Layers[0])
			}
		})
	}
}

func omit(header string) func(*registrytest.Registry, http.ResponseWriter, *http.Request) bool {
	return func(r *registrytest.Registry, w http.ResponseWriter, req *http.Request) bool {
		r.Answer(omitting{w, header}, req)
		return true
	}
}

// omitting leaves a header out.
type omitting struct {
	http.ResponseWriter
	header string
}

func (o omitting) WriteHeader(status int) {
	o.Header()[o.header] = nil
	o.ResponseWriter.WriteHeader(status)
}

// retyped sends another Content-Type.
type retyped struct {
	http.ResponseWriter
	mediaType string
}

func (o retyped) WriteHeader(status int) {
	o.Header().Set("Content-Type", o.mediaType)
	o.ResponseWriter.WriteHeader(status)
}

// unsized sends no length, but chunks.
type unsized struct{ http.ResponseWriter }

func (o unsized) WriteHeader(status int) {
	o.Header().Del("Content-Length")
	o.ResponseWriter.WriteHeader(status)
	o.ResponseWriter.(http.Flusher).Flush()
}

func TestAManifestThatIsTwoThingsIsRefusedAndNotStored(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	for name, m := range map[string]struct{ body, mediaType string }{
		"index and image":     {`{"schemaVersion":2,"manifests":[],"layers":[]}`, v1.MediaTypeImageIndex},
		"another mediaType":   {`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`, v1.MediaTypeImageManifest},
		"a portal's web page": {`<html>log in</html>`, "text/html"},
		"no JSON":             {`hello`, v1.MediaTypeImageManifest},
	} {
		dgst := r.Manifest("app", "bad", m.mediaType, []byte(m.body))
		if a := d.get(manifestPath("app", dgst.String())); a.status != 502 {
			t.Errorf("%s by digest: %d %s", name, a.status, a.body)
		}
		if a := d.get(manifestPath("app", "bad")); a.status != 502 {
			t.Errorf("%s by tag: %d %s", name, a.status, a.body)
		}
		if d.has(cache.ListedDomain, dgst) {
			t.Errorf("%s: stored", name)
		}
	}
}

func TestSchema1AndUnwantedTypesAreRelayedUncached(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	const prettyjws = "application/vnd.docker.distribution.manifest.v1+prettyjws"
	body := []byte(`{"schemaVersion":1,"name":"app","fsLayers":[]}`)
	dgst := r.Manifest("app", "old", prettyjws, body)
	d.get(manifestPath("app", "old")).mustBe(t, body).mustSay(t, "Content-Type", prettyjws).
		mustSay(t, "Cache-Status", "tarn; fwd=bypass; fwd-status=200; detail=schema1")
	d.head(manifestPath("app", "old")).must(t, 200).mustSay(t, "Content-Type", prettyjws)
	d.get(manifestPath("app", dgst.String())).mustBe(t, body).mustSay(t, "Content-Type", prettyjws)
	d.head(manifestPath("app", dgst.String())).must(t, 200).mustSay(t, "Content-Type", prettyjws)
	img := r.Image("app", "new")
	d.get(manifestPath("app", "new"), "Accept", "application/vnd.docker.distribution.manifest.v2+json").mustBe(t, img.Body).
		mustSay(t, "Cache-Status", "tarn; fwd=bypass; fwd-status=200; detail=type-not-accepted")
	if d.has(cache.ListedDomain, dgst) || d.has(cache.ListedDomain, img.Manifest) {
		t.Error("stored")
	}
}

func TestListsAreRelayedAndTheirLinksLeadBack(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		switch {
		case strings.HasSuffix(req.URL.Path, "/tags/list"):
			if req.URL.RawQuery != "n=2" {
				t.Errorf("upstream saw query %q", req.URL.RawQuery)
			}
			w.Header().Set("Link", `</v2/app/tags/list?last=b&n=2>; rel="next"`)
			fmt.Fprint(w, `{"name":"app","tags":["a","b"]}`)
		default:
			w.Header().Set("Content-Type", v1.MediaTypeImageIndex)
			w.Header().Set("OCI-Filters-Applied", "artifactType")
			fmt.Fprint(w, `{"manifests":[]}`)
		}
		return true
	}
	for path, link := range map[string]string{
		"/v2/app/tags/list?n=2&ns=lab.test":          `</v2/app/tags/list?last=b&n=2&ns=lab.test>; rel="next"`,
		"/v2/lab.test/app/tags/list?n=2":             `</v2/lab.test/app/tags/list?last=b&n=2>; rel="next"`,
		"/lab.test/v2/app/tags/list?n=2":             `</lab.test/v2/app/tags/list?last=b&n=2>; rel="next"`,
		"/v2/lab.test/app/tags/list?n=2&ns=lab.test": `</v2/lab.test/app/tags/list?last=b&n=2&ns=lab.test>; rel="next"`,
	} {
		d.get(path).must(t, 200).mustSay(t, "Link", link)
	}
	d.get("/v2/app/referrers/"+digest.FromString("x").String()+"?ns=lab.test&artifactType=a%2Fb").must(t, 200).
		mustSay(t, "OCI-Filters-Applied", "artifactType").mustSay(t, "Content-Type", v1.MediaTypeImageIndex)
}

func TestALinkIsOneToTheNextPage(t *testing.T) {
	t.Parallel()
	q := &request{kind: upstream.Tags, repository: "app", spelling: spelling{named: "lab.test/app", prefix: "/v2/"}}
	for lines, want := range map[string]string{
		`</v2/app/tags/list?last=b&n=2>; rel="next"`:                     `</v2/lab.test/app/tags/list?last=b&n=2>; rel="next"`,
		`</v2/app/tags/list?next_page=x%2Cy>; rel=next`:                  `</v2/lab.test/app/tags/list?next_page=x%2Cy>; rel="next"`,
		`<?n=1>; rel="prev", <http://169.254.169.254/x?n=2>; rel="next"`: `</v2/lab.test/app/tags/list?n=2>; rel="next"`,
		`<?n=2,3&ns=evil>; title="a, b"; rel="next"`:                     `</v2/lab.test/app/tags/list?n=2%2C3>; rel="next"`,
		`<http://169.254.169.254/x>; rel="prev"`:                         "",
		`http://169.254.169.254/x; rel="next"`:                           "",
		`<%zz>; rel="next"`:                                              "",
		"":                                                               "",
	} {
		if got := q.rewriteLink([]string{lines}); got != want {
			t.Errorf("%s: %q, want %q", lines, got, want)
		}
	}
}

// TestAListIsServedAsJSON, whatever the registry calls it: clients read it as that,
// and a browser must read it as nothing else.
func TestAListIsServedAsJSON(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	var mediaType atomic.Value
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("Content-Type", mediaType.Load().(string))
		fmt.Fprint(w, `{"name":"app","tags":[]}`)
		return true
	}
	for sent, want := range map[string]string{
		"application/json; charset=utf-8": "application/json", "text/plain": "application/json", v1.MediaTypeImageIndex: v1.MediaTypeImageIndex,
		"text/html": "application/json", "application/javascript": "application/json", "image/svg+xml": "application/json",
	} {
		mediaType.Store(sent)
		d.get("/v2/app/tags/list?ns=lab.test").must(t, 200).mustSay(t, "Content-Type", want).mustSay(t, "X-Content-Type-Options", "nosniff")
	}
}

// TestWhatIsRelayedIsWhatWasAskedFor: a registry says schema 1 first, and then
// sends something else.
func TestWhatIsRelayedIsWhatWasAskedFor(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	var answers atomic.Int32
	other := []byte(`{"schemaVersion":2,"config":{},"layers":[],"other":"bytes"}`)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("Content-Type", schema1Type)
		if answers.Add(1) > 1 {
			w.Header().Set("Content-Type", v1.MediaTypeImageManifest)
		}
		w.Write(other)
		return true
	}
	for _, dgst := range []digest.Digest{digest.FromString("x"), digest.SHA512.FromString("x")} {
		answers.Store(0)
		d.get(manifestPath("app", dgst.String())).must(t, 502)
	}
	// One that ends early without a length.
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return true
		}
		fmt.Fprintf(conn, "HTTP/1.0 200 OK\r\nContent-Type: %s\r\n\r\n{\"schemaVersion\":1", schema1Type)
		conn.Close()
		return true
	}
	d.get(manifestPath("app", "v1")).must(t, 502)
}

func TestALengthBeyondAllDisksPassesThrough(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("Content-Length", "9223372036854775807")
		w.Write([]byte("a few bytes"))
		return true
	}
	if a := d.get(blobPath("app", digest.FromString("x"))); a.status == 200 && a.err == nil {
		t.Errorf("%d bytes as a whole", len(a.body))
	}
	if s := d.cache.Stats(); s.PendingBytes < 0 || s.UsedBytes < 0 {
		t.Errorf("%+v", s)
	}
}

func TestAnswersOfAnUpstreamInTrouble(t *testing.T) {
	t.Parallel()
	for upstreamStatus, want := range map[int]int{401: 401, 403: 403, 404: 404, 429: 503, 400: 502, 410: 502, 500: 502, 502: 502, 503: 502} {
		r, d := one(t)
		r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(upstreamStatus)
			fmt.Fprint(w, "secret words of the upstream")
			return true
		}
		for _, path := range []string{manifestPath("app", "v1"), blobPath("app", digest.FromString("x")), "/v2/app/tags/list?ns=lab.test"} {
			a := d.get(path).must(t, want)
			var e struct {
				Errors []struct{ Code, Message string }
			}
			if err := json.Unmarshal(a.body, &e); err != nil || len(e.Errors) != 1 || e.Errors[0].Code == "" || e.Errors[0].Message == "" {
				t.Errorf("%d: %s is no OCI error", upstreamStatus, a.body)
			}
			if strings.Contains(string(a.body), "secret") {
				t.Errorf("%d: the upstream's body came through", upstreamStatus)
			}
			if upstreamStatus == 429 {
				a.mustSay(t, "Retry-After", "7")
			}
		}
	}
}

func TestADeadUpstreamIsAnErrorAtOnce(t *testing.T) {
	t.Parallel()
	d := start(t, setup{urls: map[string]string{lab: "http://127.0.0.1:1"}})
	d.get(manifestPath("app", "v1")).must(t, 502)
	d.get("/v2/app/manifests/v1?ns=nowhere.example").must(t, 502)
}

func TestAnUpstreamThatHangsIsAnErrorInTime(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, headTimeout: 50 * time.Millisecond, rules: &Rules{}})
	img := r.Image("app", "v1", random(1, 100_000))
	d.get(blobPath("app", img.Layers[0])).must(t, 200)
	d.stored(cache.ListedDomain, img.Layers[0])
	r.Hook = func(_ http.ResponseWriter, req *http.Request) bool {
		<-req.Context().Done() // it is tarn that gives up
		return true
	}
	for _, path := range []string{
		manifestPath("app", "v1"), manifestPath("app", img.Manifest.String()),
		blobPath("app", img.Layers[0]), blobPath("app", img.Config), "/v2/app/tags/list?ns=lab.test",
	} {
		d.get(path).must(t, 504)
		d.head(path).must(t, 504)
	}
}

func TestWhatIsNoPullIsRefused(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	for _, method := range []string{"PUT", "POST", "PATCH", "DELETE", "OPTIONS"} {
		d.do(method, manifestPath("app", "v1")).must(t, 405)
		d.do(method, "/v2/app/blobs/uploads/").must(t, 405)
	}
	d.get("/v2/").must(t, 200)
	d.get("/v2").must(t, 200)
	d.get("/lab.test/v2/").must(t, 200)
	d.get("/").must(t, 404)
	d.get("/v2/_catalog").must(t, 404)
	if n := len(r.Exchanges()); n != 0 {
		t.Errorf("upstream saw %d requests", n)
	}
}

func TestListedOnlyServesNobodyElse(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, listedOnly: true})
	img := r.Image("app", "v1")
	d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
	for _, path := range []string{
		"/v2/app/manifests/v1?ns=other.example",
		"/v2/other.example/app/manifests/v1",
		"/other.example/v2/app/manifests/v1",
		"/v2/lab.test/app/manifests/v1?ns=other.example",
	} {
		d.get(path).must(t, 404)
	}
}

func TestTheRealDistributionRegistry(t *testing.T) {
	t.Parallel()
	reg := registrytest.NewDistribution(t)
	d := start(t, setup{urls: map[string]string{lab: reg.URL}})
	layer := random(1, 500_000)
	dgst, blob := reg.PushImage(t, "team/app", "v1", layer)
	reg.Take()
	a := d.get(manifestPath("team/app", "v1")).must(t, 200)
	if digest.FromBytes(a.body) != dgst {
		t.Fatal("wrong manifest")
	}
	d.get(blobPath("team/app", blob)).mustBe(t, layer)
	d.stored(cache.ListedDomain, blob)
	d.stored(cache.ListedDomain, dgst)
	if got := reg.Take(); len(got) != 3 {
		t.Errorf("cold: %v", got)
	}
	d.get(manifestPath("team/app", "v1")).must(t, 200)
	d.get(blobPath("team/app", blob), "Range", "bytes=1000-1999").must(t, 206)
	for _, e := range reg.Take() {
		if e.Method != "HEAD" {
			t.Errorf("warm: %v", e)
		}
	}
	d.get("/v2/team/app/tags/list?ns=lab.test").must(t, 200)
	d.get(manifestPath("team/app", "v2")).must(t, 404)
	d.get(manifestPath("team/none", "v2")).must(t, 404)
}

func TestUnusualObjects(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	for range 2 {
		empty := r.Blob("app", nil)
		d.get(blobPath("app", empty)).mustBe(t, nil).mustSay(t, "Content-Length", "0")
		d.head(blobPath("app", empty)).must(t, 200).mustSay(t, "Content-Length", "0")
		d.stored(cache.ListedDomain, empty)

		body := random(3, 100_000)
		long := digest.SHA512.FromBytes(body)
		r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			w.Write(body)
			return true
		}
		d.get(blobPath("app", long)).mustBe(t, body).mustSay(t, "Docker-Content-Digest", long.String())
		d.stored(cache.ListedDomain, long)
		r.Hook = nil
	}
}

func TestABodyWithoutALengthIsNotSentToHTTP10(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	blob := random(1, 1<<20)
	dgst := r.Blob("app", blob)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		r.Answer(unsized{w}, req)
		return true
	}
	conn, err := net.Dial("tcp", d.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET %s HTTP/1.0\r\n\r\n", blobPath("app", dgst))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	// Complete by now, or refused: never a body whose end nobody can tell.
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != 502 && !bytes.Equal(body, blob) {
		t.Fatalf("%s, %d bytes", resp.Status, len(body))
	}
}

// TestAClientThatStallsIsCut, and one that is slow is not.
func TestAClientThatStallsIsCut(t *testing.T) {
	t.Parallel()
	const timeout = time.Second
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, writeTimeout: timeout})
	var layer []byte
	var path string
	for n, stored := range []bool{false, true} {
		layer = random(uint64(n), 30<<20)
		path = blobPath("app", r.Blob("app", layer))
		before := 0
		if stored {
			d.get(path).mustBe(t, layer)
			d.stored(cache.ListedDomain, digest.FromBytes(layer))
			eventually(t, "the first is logged", func() bool { before = d.finished(path); return before == 1 })
		}
		c, err := net.Dial("tcp", d.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		c.(*net.TCPConn).SetReadBuffer(64 << 10)
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: tarn\r\nConnection: close\r\n\r\n", path)
		eventually(t, "the stalled client is cut", func() bool { return d.finished(path) > before })
		n, err := io.Copy(io.Discard, c)
		if n >= int64(len(layer)) {
			t.Errorf("stored %v: it got all %d bytes: %v", stored, n, err)
		}
		d.get(path).mustBe(t, layer)
	}
	// Slow, but never for the time that a piece may take.
	resp, err := http.Get(d.URL + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	tick := time.NewTicker(timeout / 24)
	defer tick.Stop()
	begun := time.Now()
	got := 0
	for buf := make([]byte, 1<<20); ; <-tick.C {
		n, err := io.ReadFull(resp.Body, buf)
		if got += n; err != nil {
			break
		}
	}
	if got != len(layer) || time.Since(begun) < timeout {
		t.Errorf("%d bytes in %v", got, time.Since(begun))
	}
}

// finished is how many requests there were for this object that are
// over.
func (d *tarnd) finished(path string) int {
	d.log.mu.Lock()
	defer d.log.mu.Unlock()
	reference := path[strings.LastIndexByte(path, '/')+1:]
	reference, _, _ = strings.Cut(reference, "?")
	return bytes.Count(d.log.text.Bytes(), []byte(`"reference":"`+reference))
}
