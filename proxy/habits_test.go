// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tarn/cache"
	"tarn/index"
	"tarn/internal/registrytest"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// Habits of real registries that are no matter of one request and its answer,
// which direct_test.go combines.

// TestATokenServiceThatHasMovedIsFollowed, for a token that everybody has; a
// password goes nowhere else.
func TestATokenServiceThatHasMovedIsFollowed(t *testing.T) {
	t.Parallel()
	for _, status := range []int{301, 302, 303, 307, 308} {
		for _, elsewhere := range []bool{false, true} {
			r := registrytest.New(t)
			r.Access = registrytest.NewAccess(t, "Bearer")
			r.Access.Allow("app", "")
			r.Access.Allow("private", "a")
			img := r.Image("app", "v1", random(1, 1000))
			service := r.Access.Service.Config.Handler
			moved := httptest.NewServer(service)
			defer moved.Close()
			var shown atomic.Int64
			r.Access.Service.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if req.Header.Get("Authorization") != "" {
					shown.Add(1)
				}
				switch {
				case req.URL.Path == "/new":
					service.ServeHTTP(w, req)
				case elsewhere:
					http.Redirect(w, req, moved.URL+"/token?"+req.URL.RawQuery, status)
				default:
					http.Redirect(w, req, "/new?"+req.URL.RawQuery, status)
				}
			})
			d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}})
			d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
			if n := shown.Load(); n != 0 {
				t.Errorf("%d, elsewhere %v: a credential was shown %d times", status, elsewhere, n)
			}
		}
	}
}

// TestARefusedTokenIsNotKept: the repository was opened after somebody had asked
// for it, and the token from before opens nothing.
func TestARefusedTokenIsNotKept(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 1000))
	var open atomic.Bool
	var tokens atomic.Int64
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if strings.HasPrefix(req.URL.Path, "/token") {
			tokens.Add(1)
			fmt.Fprintf(w, `{"token":"open-%v","expires_in":3600}`, open.Load())
			return true
		}
		if a := req.Header.Get("Authorization"); a != "Bearer open-true" {
			why := ""
			if a != "" {
				why = `,error="insufficient_scope"`
			}
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="lab",scope="repository:app:pull"%s`, r.URL, why))
			w.WriteHeader(401)
			return true
		}
		return false
	}
	d.get(manifestPath("app", "v1")).must(t, 401)
	open.Store(true)
	for range 20 {
		d.advance(refusedFor)
		d.get(manifestPath("app", "v1"))
	}
	if n := tokens.Load(); n != 1 {
		t.Errorf("%d tokens within a moment", n)
	}
	eventually(t, "the image that was opened is had", func() bool {
		d.advance(refusedFor)
		return d.get(manifestPath("app", "v1")).status == 200
	})
	d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
	if n := tokens.Load(); n != 2 {
		t.Errorf("%d tokens", n)
	}
}

// TestAListThatIsNotServedReadsSo: clients go on to the referrers tag, unless
// they must show who they are, or wait.
func TestAListThatIsNotServedReadsSo(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	for _, c := range []struct {
		status int
		html   bool
		want   int
	}{
		{400, false, 404}, {404, false, 404}, {405, false, 404}, {406, false, 404}, {410, true, 404}, {418, false, 404},
		{501, false, 404}, {505, false, 404}, {500, true, 404}, {200, true, 404},
		{401, false, 401}, {403, false, 403}, {429, false, 503}, {500, false, 502}, {503, false, 502},
	} {
		r.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
			if c.html {
				w.Header().Set("Content-Type", "text/html; charset=utf-8")
			}
			if c.status == 401 {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			}
			w.WriteHeader(c.status)
			fmt.Fprint(w, "404 page not found")
			return true
		}
		d.advance(refusedFor)
		subject := digest.FromString(fmt.Sprint(c)) // a 429 holds for the same question
		a := d.get("/v2/app/referrers/"+subject.String()+"?ns="+lab).must(t, c.want)
		if c.want == 404 && (strings.Contains(string(a.body), "NAME_UNKNOWN") || !strings.Contains(string(a.body), "UNSUPPORTED")) {
			t.Errorf("%d: %s", c.status, a.body)
		}
	}
}

// TestACompressedManifestIsDecoded where that is what the digest names.
func TestACompressedManifestIsDecoded(t *testing.T) {
	t.Parallel()
	zip := func(b []byte) []byte {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		w.Write(b)
		w.Close()
		return z.Bytes()
	}
	for name, answer := range map[string]func(body []byte) []byte{
		"compressed": zip,
		"labelled":   func(b []byte) []byte { return b },
		"another":    func([]byte) []byte { return zip([]byte(`{"layers":[]}`)) },
		"a bomb":     func([]byte) []byte { return zip(make([]byte, 16<<20)) },
		"cut":        func(b []byte) []byte { z := zip(b); return z[:len(z)-5] },
	} {
		for _, reference := range []string{"v1", ""} {
			r, d := one(t)
			img := r.Image("app", "v1", random(1, 1000))
			body := answer(img.Body)
			r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
				if !strings.Contains(req.URL.Path, "/manifests/") {
					return false
				}
				h := w.Header()
				h.Set("Content-Encoding", "gzip")
				h.Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
				h.Set("Docker-Content-Digest", img.Manifest.String())
				h.Set("Content-Length", fmt.Sprint(len(body)))
				if req.Method == http.MethodGet {
					w.Write(body)
				}
				return true
			}
			if reference == "" {
				reference = img.Manifest.String()
			}
			for range 2 {
				a := d.get(manifestPath("app", reference))
				if name == "compressed" || name == "labelled" {
					a.mustBe(t, img.Body)
					d.head(manifestPath("app", reference)).must(t, 200).mustSay(t, "Content-Length", fmt.Sprint(len(img.Body)))
				} else if a.status != 502 {
					t.Errorf("%s, %s: %d, %d bytes", name, reference, a.status, len(a.body))
				}
			}
		}
	}
}

// TestASecondPullThroughRedirectsAsksNothingALayer: the first one's bytes were
// the objects', and that is on record.
func TestASecondPullThroughRedirectsAsksNothingALayer(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"", "Basic", "Bearer"} {
		r, cdn := registrytest.New(t), registrytest.New(t)
		var auth []string
		if scheme != "" {
			r.Access = registrytest.NewAccess(t, scheme)
			r.Access.Allow("app", "a")
			auth = r.Access.Login("app", "a")
		}
		var layers [][]byte
		for i := range 5 {
			layers = append(layers, random(uint64(i), 200_000))
		}
		img := r.Image("app", "v1", layers...)
		r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			i := strings.LastIndexByte(req.URL.Path, '/')
			if !strings.Contains(req.URL.Path, "/blobs/") {
				return false
			}
			http.Redirect(w, req, cdn.URL+req.URL.Path[i:]+"?sig=canary", http.StatusTemporaryRedirect)
			return true
		}
		cdn.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			if req.Method == http.MethodHead {
				w.WriteHeader(403) // the URL is signed for GET
				return true
			}
			for i, l := range img.Layers {
				if strings.HasSuffix(req.URL.Path, l.String()) {
					http.ServeContent(w, req, "", noTime, bytes.NewReader(layers[i]))
					return true
				}
			}
			w.WriteHeader(404)
			return true
		}
		d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}})
		pull := func() {
			d.get(manifestPath("app", "v1"), auth...).mustBe(t, img.Body)
			for i, l := range img.Layers {
				d.get(blobPath("app", l), auth...).mustBe(t, layers[i])
				d.stored(cache.ListedDomain, l)
			}
		}
		pull()
		d.advance(30 * time.Minute)
		r.Reset()
		cdn.Reset()
		pull()
		if n, m := r.Count("", "/blobs/"), len(cdn.Exchanges()); n != 0 || m != 0 {
			t.Errorf("%q: %d questions about layers, %d to where they lie", scheme, n, m)
		}
		// When memberships are asked again, a layer costs a byte.
		d.advance(25 * time.Hour)
		pull()
		for _, e := range cdn.Exchanges() {
			if e.Method != "GET" || e.Range != "bytes=0-0" {
				t.Errorf("%q: %v", scheme, e)
			}
		}
	}
}

// TestWhatARegistryWasSeenToDoStandsUnderIt, for people.
func TestWhatARegistryWasSeenToDoStandsUnderIt(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	r.NoRange = true
	layer := random(1, 300_000)
	img := r.Image("app", "v1", layer)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method == http.MethodHead {
			w.WriteHeader(405)
			return true
		}
		if strings.Contains(req.URL.Path, "/manifests/") {
			w.Header().Set("Content-Encoding", "x-gzip")
		}
		return false
	}
	d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
	d.get(blobPath("app", img.Layers[0])).mustBe(t, layer)
	d.stored(cache.ListedDomain, img.Layers[0])
	d.advance(25 * time.Hour)
	for range 2 {
		d.get(blobPath("app", img.Layers[0])).mustBe(t, layer)
	}
	got := d.proxy.upstreams.Health()[0].Habits
	if want := []upstream.Habit{upstream.Labelled, upstream.HeadRefused, upstream.NoRanges}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestATagIsKnownOnceItsManifestIsHere: containerd asks for the tag with HEAD,
// and for the manifest by its digest; what the tag means is of use in an outage.
func TestATagIsKnownOnceItsManifestIsHere(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 1000))
	r.Tag("app", "v2", img.Manifest)
	k := index.RepositoryKey{Upstream: lab, Repository: "app"}
	known := func(tag string) bool {
		row, ok := d.cache.Index().Tag(k.TagKey(tag))
		return ok && row.Digest == img.Manifest
	}
	for _, tag := range []string{"v1", "v2"} {
		d.head(manifestPath("app", tag)).must(t, 200)
		if known(tag) {
			t.Errorf("%s is noted before its manifest is here", tag)
		}
	}
	d.get(manifestPath("app", img.Manifest.String())).mustBe(t, img.Body)
	for _, tag := range []string{"v1", "v2"} {
		if !known(tag) {
			t.Errorf("%s is not known", tag)
		}
	}
	for i := range 3 * maxPending {
		d.proxy.pending.add(k, fmt.Sprint(i), index.Tag{Digest: digest.FromString(fmt.Sprint(i))})
	}
	if n := d.proxy.pending.n; n > maxPending || n != len(d.proxy.pending.tags) {
		t.Errorf("%d tags wait, %d are counted", len(d.proxy.pending.tags), n)
	}
}

// TestAFirewallThatLetsNoRangePass: the client sent none.
func TestAFirewallThatLetsNoRangePass(t *testing.T) {
	t.Parallel()
	for _, status := range []int{403, 405, 406, 412, 416, 500, 502, 0} {
		r, d := one(t)
		layer := random(1, 300_000)
		img := r.Image("one", "v1", layer)
		r.Blob("two", layer)
		r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			if req.Header.Get("Range") == "" {
				return false
			}
			if status == 0 {
				panic(http.ErrAbortHandler)
			}
			w.WriteHeader(status)
			return true
		}
		d.get(blobPath("one", img.Layers[0])).mustBe(t, layer)
		d.stored(cache.ListedDomain, img.Layers[0])
		d.get(blobPath("two", img.Layers[0])).mustBe(t, layer)
	}
}

// TestADigestHeaderOfAnotherThing: by tag, clients name a manifest by its bytes.
func TestADigestHeaderOfAnotherThing(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 1000))
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if strings.HasSuffix(req.URL.Path, "/v1") || strings.HasSuffix(req.URL.Path, digest.FromString("another").String()) {
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			w.Header().Set("Docker-Content-Digest", digest.FromString("another").String())
			sized(w, len(img.Body))
			if req.Method == http.MethodGet {
				w.Write(img.Body)
			}
			return true
		}
		return false
	}
	for range 2 {
		d.get(manifestPath("app", "v1")).mustBe(t, img.Body).mustSay(t, "Docker-Content-Digest", img.Manifest.String())
	}
}

// TestARegistryThatHidesWhatNeedsAToken says 404 to who shows nothing, and what it
// wants at /v2/ only; and one that wants another scope for blobs.
func TestARegistryThatHidesWhatNeedsAToken(t *testing.T) {
	t.Parallel()
	for _, hides := range []int{404, 403, 401} {
		r, d := one(t)
		layer := random(1, 1000)
		img := r.Image("app", "v1", layer)
		r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			challenge := func(scope string) {
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="lab"%s`, r.URL, scope))
			}
			want := "pull"
			if strings.Contains(req.URL.Path, "/blobs/") {
				want = "layers"
			}
			token, _ := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
			switch {
			case req.URL.Path == "/token":
				fmt.Fprintf(w, `{"token":"%s","expires_in":"300"}`, strings.ReplaceAll(strings.Join(req.URL.Query()["scope"], "+"), "repository:app:", ""))
			case req.URL.Path == "/v2/":
				challenge("")
				w.WriteHeader(401)
			case token == "" && hides != 401:
				w.WriteHeader(hides)
			case hides == 401 && !strings.Contains(token, want):
				challenge(`,scope="repository:app:` + want + `"`)
				w.WriteHeader(401)
			default:
				return false
			}
			return true
		}
		d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
		d.get(blobPath("app", img.Layers[0])).mustBe(t, layer)
	}
}

// TestAListThatCameCompressedIsDecoded, and its next page is found however the
// link to it is written.
func TestAListThatCameCompressedIsDecoded(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	const list = `{"name":"app","tags":["a"]}`
	for link, next := range map[string]bool{
		`</v2/app/tags/list?last=a&n=1>; rel="next"`: true, `</v2/app/tags/list?last=a&n=1>`: true,
		`</v2/app/tags/list?last=a&n=1>; rel='next'`: true, `</v2/app/tags/list?last=a&n=1>; rel="last next"`: true,
		`</v2/app/tags/list?last=a&n=1>; rel="prev"`: false, "": false,
	} {
		r.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Encoding", "gzip")
			w.Header().Set("Content-Type", "application/json")
			if link != "" {
				w.Header().Set("Link", link)
			}
			z := gzip.NewWriter(w)
			z.Write([]byte(list))
			z.Close()
			return true
		}
		a := d.get("/v2/app/tags/list?ns="+lab).must(t, 200)
		if string(a.body) != list || a.header.Get("Content-Encoding") != "" || (a.header.Get("Link") != "") != next {
			t.Errorf("%s: %q, %v", link, a.body, a.header)
		}
	}
}

// TestARegistryIsNotBlamedForWhatItDoesNotHave: a tag that is not there, and a host that
// is not, are answered with no to HEAD and to GET.
func TestARegistryIsNotBlamedForWhatItDoesNotHave(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	img := r.Image("app", "v1", random(1, 1000))
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, urls: map[string]string{"gone.test": gone.URL}})
	d.get(manifestPath("app", "v2")).must(t, 404)
	d.get(manifestPath("app", digestOf(7).String())).must(t, 404)
	d.get("/v2/app/manifests/v1?ns=gone.test").must(t, 502)
	d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
	for _, h := range d.proxy.upstreams.Health() {
		if len(h.Habits) > 0 {
			t.Errorf("%s is said to have habits: %v", h.Name, h.Habits)
		}
	}
}
