// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"tarn/cache"
	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// publicAddress is where evil.example "lives"; connections go to loopback.
const publicAddress = "93.184.215.14"

// withEvil starts a listed registry, an unlisted one with TLS, and tarn.
func withEvil(t *testing.T) (good, evil *registrytest.Registry, d *tarnd) {
	good, evil = registrytest.New(t), registrytest.NewTLS(t)
	roots := x509.NewCertPool()
	roots.AddCert(evil.Certificate())
	d = start(t, setup{
		listed: map[string]*registrytest.Registry{lab: good},
		hosts:  map[string]string{"example.com": publicAddress}, // the name in httptest's certificate
		routes: map[string]string{publicAddress + ":443": evil.Address()},
		roots:  roots,
	})
	return good, evil, d
}

const evilNS = "?ns=example.com"

// claims answers every HEAD with yes for whatever is asked, and for a tag with
// that digest; it has no bytes.
func claims(dgst digest.Digest, size int, mediaType string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "HEAD" {
			w.WriteHeader(404)
			return true
		}
		w.Header().Set("Docker-Content-Digest", dgst.String())
		w.Header().Set("Content-Type", mediaType)
		sized(w, size)
		w.WriteHeader(200)
		return true
	}
}

func TestAnUnlistedRegistryThatClaimsADigestGetsNothing(t *testing.T) {
	t.Parallel()
	good, evil, d := withEvil(t)
	secret := random(1, 300_000)
	img := good.Image("private/app", "v1", secret)
	d.get(manifestPath("private/app", "v1")).must(t, 200)
	d.get(blobPath("private/app", img.Layers[0])).must(t, 200)
	d.stored(cache.ListedDomain, img.Manifest)
	d.stored(cache.ListedDomain, img.Layers[0])

	nothing := func(a answer, what string) {
		t.Helper()
		if a.status == 200 && len(a.body) > 0 || strings.Contains(string(a.body), string(secret[:50])) {
			t.Errorf("%s: %d with %d bytes", what, a.status, len(a.body))
		}
	}
	evil.Hook = claims(img.Manifest, len(img.Body), v1.MediaTypeImageManifest)
	nothing(d.get("/v2/x/manifests/any"+evilNS), "by tag")
	nothing(d.get("/v2/x/manifests/"+img.Manifest.String()+evilNS), "manifest by digest")
	evil.Hook = claims(img.Layers[0], len(secret), "application/octet-stream")
	nothing(d.get("/v2/x/blobs/"+img.Layers[0].String()+evilNS), "blob by digest")
	nothing(d.get("/v2/x/blobs/"+img.Layers[0].String()+evilNS, "Range", "bytes=100-200"), "range of a blob")

	// After a restart without an index, what is adopted is the listed domain's.
	d.stop()
	if err := os.Remove(filepath.Join(d.options.dir, "index.db")); err != nil {
		t.Fatal(err)
	}
	again := start(t, d.options)
	again.stored(cache.ListedDomain, img.Layers[0]) // adopted
	nothing(again.get("/v2/x/blobs/"+img.Layers[0].String()+evilNS), "blob after a restart")

	// What it does deliver is its own, in a flight of its own, and only rows
	// are kept; the listed registry's copy is not touched.
	evil.Hook = nil
	evil.Blob("x", secret)
	evil.Reset()
	again.get("/v2/x/blobs/"+img.Layers[0].String()+evilNS).mustBe(t, secret)
	again.stored("example.com", img.Layers[0])
	again.get("/v2/x/blobs/"+img.Layers[0].String()+evilNS).mustBe(t, secret).mustSay(t, "Cache-Status", "tarn; hit")
	if n := evil.Count("GET", ""); n != 1 {
		t.Errorf("%d GETs to deliver it", n)
	}
}

func TestAnUnlistedRegistryCannotJoinAFlightNorItsPendingFile(t *testing.T) {
	t.Parallel()
	good, evil, d := withEvil(t)
	secret := random(1, 1<<20)
	dgst := good.Blob("private/app", secret)
	gate := make(chan struct{})
	var once sync.Once
	open := func() { once.Do(func() { close(gate) }) }
	defer open()
	good.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		sized(w, len(secret))
		w.Write(secret[:1<<19])
		w.(http.Flusher).Flush()
		<-gate
		w.Write(secret[1<<19:])
		return true
	}
	resp, err := http.Get(d.URL + blobPath("private/app", dgst))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(resp.Body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	evil.Hook = claims(dgst, len(secret), "application/octet-stream")
	if a := d.get("/v2/x/blobs/" + dgst.String() + evilNS); a.status != 404 {
		t.Errorf("joined the flight: %d, %d bytes", a.status, len(a.body))
	}
	copied := t.TempDir()
	for _, sub := range []string{"pending", "blobs/sha256"} {
		copyDir(t, filepath.Join(d.options.dir, sub), filepath.Join(copied, sub))
	}
	resp.Body.Close()
	open()
	d.stop()
	s := d.options
	s.dir = copied
	again := start(t, s)
	if a := again.get("/v2/x/blobs/" + dgst.String() + evilNS); a.status != 404 {
		t.Errorf("continued the pending file: %d, %d bytes", a.status, len(a.body))
	}
}

func TestCredentialsGoByPathToListedRegistriesOnly(t *testing.T) {
	t.Parallel()
	good, evil, d := withEvil(t)
	for _, r := range []*registrytest.Registry{good, evil} {
		r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Basic realm="give me"`)
			w.WriteHeader(401)
			return true
		}
	}
	secret := []string{"Authorization", "Basic c2VjcmV0"}
	for path, want := range map[string]struct {
		status int
		passes bool
	}{
		"/v2/app/manifests/v1?ns=example.com":             {401, true},
		"/v2/example.com/app/manifests/v1":                {403, false},
		"/example.com/v2/app/manifests/v1":                {403, false},
		"/v2/example.com/app/manifests/v1?ns=example.com": {403, false},
	} {
		evil.Reset()
		a := d.get(path, secret...).must(t, want.status)
		if (a.header.Get("WWW-Authenticate") != "") != want.passes {
			t.Errorf("%s: challenge %q", path, a.header.Get("WWW-Authenticate"))
		}
		if !want.passes && !strings.Contains(string(a.body), "upstreams: [{name:") {
			t.Errorf("%s: %s does not say what to do", path, a.body)
		}
		for _, e := range evil.Exchanges() {
			if (e.Authorization != "") != want.passes {
				t.Errorf("%s: the registry saw %q", path, e.Authorization)
			}
		}
	}
	for _, path := range []string{manifestPath("app", "v1"), "/v2/lab.test/app/manifests/v1", "/lab.test/v2/app/manifests/v1"} {
		d.get(path, secret...).must(t, 401).mustSay(t, "WWW-Authenticate", `Basic realm="give me"`)
	}
	if good.Exchanges()[0].Authorization != secret[1] {
		t.Error("a listed registry did not see the credential")
	}
}

func TestTheDialGuardKeepsStrangersOffTheNode(t *testing.T) {
	t.Parallel()
	canary, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer canary.Close()
	var touched atomic.Int32
	go func() {
		for {
			c, err := canary.Accept()
			if err != nil {
				return
			}
			touched.Add(1)
			c.Close()
		}
	}()
	_, port, _ := net.SplitHostPort(canary.Addr().String())

	evil := registrytest.NewTLS(t)
	roots := x509.NewCertPool()
	roots.AddCert(evil.Certificate())
	d := start(t, setup{
		hosts: map[string]string{
			"example.com": publicAddress, "loop.example": "127.0.0.1", "mapped.example": "::ffff:127.0.0.1",
			"meta.example": "169.254.169.254", "corp.example": "10.1.2.3", "six.example": "64:ff9b::7f00:1",
		},
		routes: map[string]string{publicAddress + ":443": evil.Address()},
		roots:  roots,
	})
	for _, ns := range []string{"loop.example", "mapped.example", "meta.example", "corp.example", "six.example",
		"127.0.0.1", "127.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254", "[::ffff:7f00:1]", "2130706433"} {
		a := d.get("/v2/app/manifests/v1?ns=" + ns + "%3A" + port)
		if a.status != 502 && a.status != 400 {
			t.Errorf("%s: %d", ns, a.status)
		}
	}
	// A stranger's redirects and realms reach no further than the stranger.
	for _, host := range []string{"127.0.0.1:" + port, "loop.example:" + port, "corp.example", "meta.example", "[::1]:" + port} {
		for _, scheme := range []string{"http", "https"} {
			evil.Hook = func(w http.ResponseWriter, req *http.Request) bool {
				http.Redirect(w, req, scheme+"://"+host+"/x", http.StatusTemporaryRedirect)
				return true
			}
			d.get("/v2/app/manifests/v1"+evilNS).must(t, 502)
			evil.Hook = func(w http.ResponseWriter, req *http.Request) bool {
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s://%s/token",service="x"`, scheme, host))
				w.WriteHeader(401)
				return true
			}
			d.get("/v2/app/manifests/v1"+evilNS).must(t, 502)
		}
	}
	if n := touched.Load(); n != 0 {
		t.Fatalf("%d connections to the canary", n)
	}
}

func TestRedirectsCarryNoCredentialAndTheirRefusalsAreNobodysWord(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	cdn := registrytest.New(t)
	blob := random(1, 100_000)
	dgst := r.Blob("app", blob)
	cdn.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Header.Get("Authorization") != "" {
			t.Error("the redirect target saw a credential")
		}
		if req.Method == "HEAD" || req.URL.Query().Get("sig") != "2" {
			w.Header().Set("WWW-Authenticate", `Basic realm="cdn"`)
			w.WriteHeader(403) // signed for GET only, and the first signature has expired
			return true
		}
		http.ServeContent(w, req, "", noTime, strings.NewReader(string(blob)))
		return true
	}
	var asked atomic.Int32
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Header.Get("Authorization") == "" {
			t.Error("the registry saw no credential")
		}
		http.Redirect(w, req, fmt.Sprintf("%s/data?sig=%d", cdn.URL, asked.Add(1)), http.StatusTemporaryRedirect)
		return true
	}
	d.stop() // asked for each object, whatever was said before
	d = start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, rules: &Rules{}})
	auth := []string{"Authorization", "Basic YTpi"}
	d.get(blobPath("app", dgst), auth...).mustBe(t, blob)
	asked.Store(0)
	d.stored(cache.ListedDomain, dgst)
	d.head(blobPath("app", dgst), auth...).must(t, 200).mustSay(t, "Content-Length", "100000")
	asked.Store(0)
	cdn.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("WWW-Authenticate", `Basic realm="cdn"`)
		w.WriteHeader(401)
		return true
	}
	a := d.get(blobPath("app", dgst), auth...).must(t, 502)
	if a.header.Get("WWW-Authenticate") != "" {
		t.Error("the redirect target's challenge was relayed")
	}
}

func TestARegistryThatLoopsOrDowngradesIsAnError(t *testing.T) {
	t.Parallel()
	_, evil, d := withEvil(t)
	for _, to := range []string{"/v2/again", "http://example.com/", "ftp://example.com/", "", "https://"} {
		evil.Reset()
		evil.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			w.Header().Set("Location", to)
			w.WriteHeader(307)
			return true
		}
		d.get("/v2/app/manifests/v1"+evilNS).must(t, 502)
		// Six hops for the HEAD, and for the GET that the client sent.
		if n := len(evil.Exchanges()); n > 12 {
			t.Errorf("%q: %d requests", to, n)
		}
	}
}

func TestNamesThatAreNoneTouchNothing(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	good := digest.FromString("x").String()
	for _, path := range []string{
		"/v2/../../etc/passwd/manifests/v1?ns=lab.test",
		"/v2/app/blobs/sha256:../../../../etc/passwd?ns=lab.test",
		"/v2/app%2F..%2Fx/manifests/v1?ns=lab.test",
		"/v2/app/manifests/v1%00?ns=lab.test",
		"/v2/app%5c/manifests/v1?ns=lab.test",
		"/v2/APP/manifests/v1?ns=lab.test",
		"/v2//manifests/v1?ns=lab.test",
		"/v2/app//x/manifests/v1?ns=lab.test",
		"/v2/app/manifests/-v1?ns=lab.test",
		"/v2/app/manifests/" + strings.Repeat("v", 129) + "?ns=lab.test",
		"/v2/" + strings.Repeat("a/", 2048) + "b/manifests/v1?ns=lab.test",
		"/v2/app/blobs/md5:d41d8cd98f00b204e9800998ecf8427e?ns=lab.test",
		"/v2/app/blobs/sha384:" + strings.Repeat("0", 96) + "?ns=lab.test",
		"/v2/app/blobs/sha256:" + strings.Repeat("0", 63) + "?ns=lab.test",
		"/v2/app/blobs/" + strings.ToUpper(good) + "?ns=lab.test",
		"/v2/app/blobs/latest?ns=lab.test",
		"/v2/app/manifests/v1?ns=user@lab.test",
		"/v2/app/manifests/v1?ns=user:canary-password@lab.test",
		"/v2/app/manifests/v1?ns=lab.test/x",
		"/v2/app/manifests/v1?ns=lab%2etest%2f",
		"/v2/app/manifests/v1?ns=%25",
		"/v2/app/manifests/v1?ns=l%C3%A4b.test",
		"/v2/app/manifests/v1?ns=lab.test&ns=other.test",
		"/v2/app/manifests/v1?ns=",
		"/v2/app/manifests/v1?ns=lab.test%00",
		"/v2/app/manifests/v1?ns=lab.test:99999",
		"/v2/app/uploads/x?ns=lab.test",
		"/x/y/v2/app/manifests/v1",
	} {
		a := d.get(path)
		if a.status != 400 && a.status != 404 {
			t.Errorf("%s: %d", path, a.status)
		}
		if a.header.Get("Location") != "" {
			t.Errorf("%s: a redirect", path)
		}
	}
	if n := r.Exchanges(); len(n) != 0 {
		t.Errorf("upstream saw %v", n)
	}
	for _, sub := range []string{"pending", "blobs/sha256", "blobs/sha512"} {
		if left, _ := filepath.Glob(filepath.Join(d.options.dir, sub, "*")); len(left) != 0 {
			t.Errorf("files: %v", left)
		}
	}
}
