// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// private starts a registry where a may pull private/app, and tarn before it.
func private(t testing.TB, scheme string, s setup) (*registrytest.Registry, *tarnd) {
	t.Helper()
	r := registrytest.New(t)
	r.Access = registrytest.NewAccess(t, scheme)
	r.Access.Allow("private/app", "a")
	s.listed = map[string]*registrytest.Registry{lab: r}
	return r, start(t, s)
}

// direct asks the registry past tarn.
func direct(t testing.TB, r *registrytest.Registry, method, path string, headers ...string) int {
	t.Helper()
	u, _, _ := strings.Cut(path, "?")
	req, err := http.NewRequest(method, r.URL+u, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// stranger is somebody who may not have private/app.
type stranger struct {
	name    string
	headers func(*registrytest.Access) []string
}

var strangers = []stranger{
	{"anonymous", func(*registrytest.Access) []string { return nil }},
	{"another user", func(a *registrytest.Access) []string { return a.Login("private/app", "b") }},
	{"a wrong password or token", func(a *registrytest.Access) []string {
		if a.Scheme == "Basic" {
			return []string{"Authorization", registrytest.Basic("a", "canary-guess")}
		}
		return []string{"Authorization", "Bearer canary-guess"}
	}},
	{"a token for another repository", func(a *registrytest.Access) []string {
		if a.Scheme == "Basic" {
			return []string{"Authorization", registrytest.Basic("", "canary-guess")}
		}
		return a.Login("private/other", "a")
	}},
}

// ways are how the same thing may be asked for.
var ways = []struct {
	method  string
	headers func(d digest.Digest) []string
}{
	{"GET", func(digest.Digest) []string { return nil }},
	{"HEAD", func(digest.Digest) []string { return nil }},
	{"GET", func(digest.Digest) []string { return []string{"Range", "bytes=5-"} }},
	{"GET", func(digest.Digest) []string { return []string{"Range", "bytes=0-"} }},
	{"GET", func(d digest.Digest) []string { return []string{"If-None-Match", `"` + d.String() + `"`} }},
	{"HEAD", func(d digest.Digest) []string { return []string{"If-None-Match", `"` + d.String() + `"`} }},
}

func TestEntitledOnlyWhomTheUpstreamWouldServe(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"Basic", "Bearer"} {
		for _, redirected := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, redirected blobs %v", scheme, redirected), func(t *testing.T) {
				t.Parallel()
				testEntitled(t, scheme, redirected)
			})
		}
	}
}

func testEntitled(t *testing.T, scheme string, redirected bool) {
	r, d := private(t, scheme, setup{})
	r.Access.Allow("private/other", "a")
	layer := random(1, 300_000)
	img := r.Image("private/app", "v1", layer)
	cdn := registrytest.New(t)
	gate, reached := make(chan struct{}), make(chan struct{})
	var once sync.Once
	var held sync.Mutex // guards holding
	holding := false
	sendLayer := func(w http.ResponseWriter, req *http.Request) {
		held.Lock()
		hold := holding && req.Method == "GET"
		held.Unlock()
		if !hold {
			http.ServeContent(w, req, "", noTime, bytes.NewReader(layer))
			return
		}
		sized(w, len(layer))
		w.Write(layer[:150_000])
		w.(http.Flusher).Flush()
		once.Do(func() { close(reached) })
		<-gate
		w.Write(layer[150_000:])
	}
	cdn.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Header.Get("Authorization") != "" {
			t.Error("the redirect target saw a credential")
		}
		sendLayer(w, req)
		return true
	}
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.HasSuffix(req.URL.Path, img.Layers[0].String()) {
			return false
		}
		if redirected {
			http.Redirect(w, req, cdn.URL+"/data?sig=canary-signature", http.StatusTemporaryRedirect)
		} else {
			sendLayer(w, req)
		}
		return true
	}
	objects := map[string]digest.Digest{
		manifestPath("private/app", "v1"):                  img.Manifest,
		manifestPath("private/app", img.Manifest.String()): img.Manifest,
		blobPath("private/app", img.Config):                img.Config,
		blobPath("private/app", img.Layers[0]):             img.Layers[0],
	}
	login := make(map[string][]string)
	for _, s := range strangers {
		login[s.name] = s.headers(r.Access)
		d.get(manifestPath("private/app", "v1"), login[s.name]...) // what is asked but once is
	}
	type seen struct {
		words    string
		requests int
	}
	before := make(map[string]seen)
	refuse := func(state, path string) {
		t.Helper()
		for _, s := range strangers {
			for i, way := range ways {
				headers := append(way.headers(objects[path]), login[s.name]...)
				d.advance(refusedFor + time.Second) // no remembered 401
				r.Reset()
				a := d.do(way.method, path, headers...)
				n := len(r.Exchanges())
				if want := direct(t, r, way.method, path, login[s.name]...); a.status != want {
					t.Errorf("%s, %s, %s %s %v: %d, the registry says %d", state, s.name, way.method, path, headers, a.status, want)
				}
				if bytes.Contains(a.body, layer[:20]) || len(a.body) > 1000 || a.header.Get("Docker-Content-Digest") != "" {
					t.Errorf("%s, %s, %s %s: %q", state, s.name, way.method, path, a.body)
				}
				a.header.Del("Date")
				now := seen{fmt.Sprint(a.header, string(a.body)), n}
				key := fmt.Sprint(s.name, i, path)
				if was, ok := before[key]; ok && was != now {
					t.Errorf("%s, %s, %s %s: the refusal tells that it is here:\n%v\n%v", state, s.name, way.method, path, was, now)
				}
				before[key] = now
			}
		}
	}
	for path := range objects {
		refuse("cold", path)
	}
	auth := r.Access.Login("private/app", "a")
	d.get(manifestPath("private/app", "v1"), auth...).mustBe(t, img.Body)
	d.get(blobPath("private/app", img.Config), auth...).must(t, 200)
	held.Lock()
	holding = true
	held.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { d.get(blobPath("private/app", img.Layers[0]), auth...).mustBe(t, layer) })
	<-reached
	held.Lock()
	holding = false
	held.Unlock()
	refuse("in flight", blobPath("private/app", img.Layers[0]))
	close(gate)
	wg.Wait()
	for _, dgst := range objects {
		d.stored(cache.ListedDomain, dgst)
	}
	for path := range objects {
		refuse("cached", path)
	}
	for path := range objects {
		d.get(path, auth...).must(t, 200)
	}
}

func TestARevokedCredentialIsRefusedInTime(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		rules Rules
	}{
		{"a minute", DefaultRules()},
		{"ten seconds", Rules{GrantTTL: 10 * time.Second, MembershipTTL: time.Hour}},
		{"asking each time", Rules{MembershipTTL: time.Hour}},
	} {
		for _, scheme := range []string{"Basic", "Bearer"} {
			t.Run(c.name+", "+scheme, func(t *testing.T) {
				t.Parallel()
				r, d := private(t, scheme, setup{rules: &c.rules})
				r.Access.Allow("private/app", "other") // so that the repository has a reader left
				img := r.Image("private/app", "v1", random(1, 200_000))
				auth := r.Access.Login("private/app", "a")
				blob := blobPath("private/app", img.Layers[0])
				d.get(manifestPath("private/app", "v1"), auth...).must(t, 200)
				d.get(blob, auth...).must(t, 200)
				d.stored(cache.ListedDomain, img.Layers[0])
				want := direct(t, r, "GET", blob, auth...)
				if want != 200 {
					t.Fatal("a may not pull")
				}
				r.Access.Revoke("private/app", "a")
				want = direct(t, r, "GET", blob, auth...)
				if c.rules.GrantTTL > 0 {
					d.get(blob, auth...).must(t, 200) // a yes of a moment ago
					d.head(blob, auth...).must(t, 200)
					d.advance(c.rules.GrantTTL)
				}
				d.get(blob, auth...).must(t, want)
				d.head(blob, auth...).must(t, want)

				// A tag asks at once, and what it is told ends the grant.
				r.Access.Allow("private/app", "a")
				d.get(manifestPath("private/app", "v1"), auth...).must(t, 200)
				d.get(blob, auth...).must(t, 200)
				r.Access.Revoke("private/app", "a")
				d.get(manifestPath("private/app", "v1"), auth...).must(t, want)
				d.get(blob, auth...).must(t, want)
			})
		}
	}
}

// idle waits until no answer is being sent any more: a client has its last byte
// a moment before.
func (d *tarnd) idle() {
	d.t.Helper()
	eventually(d.t, "all answers have ended", func() bool {
		return d.proxy.rights.Sending() == 0
	})
}

func TestADownloadThatBeganMayFinish(t *testing.T) {
	t.Parallel()
	layer := random(1, 2_000_000)
	// Bearer: the registry answers 401, as for a token that ran out in the
	// middle of a layer.
	setUp := func(t *testing.T, ttl time.Duration) (r *registrytest.Registry, d *tarnd, path string, auth []string) {
		r, d = private(t, "Bearer", setup{rules: &Rules{GrantTTL: ttl, MembershipTTL: time.Hour}})
		img := r.Image("private/app", "v1", layer)
		auth = r.Access.Login("private/app", "a")
		path = blobPath("private/app", img.Layers[0])
		a := d.get(path, append(auth, "Range", "bytes=0-999999")...).must(t, 206)
		if !bytes.Equal(a.body, layer[:1_000_000]) {
			t.Fatal("wrong bytes")
		}
		d.stored(cache.ListedDomain, img.Layers[0])
		d.idle()
		r.Access.Revoke("private/app", "a")
		return r, d, path, auth
	}
	rest := func(d *tarnd, path string, auth []string) answer {
		defer d.idle()
		return d.get(path, append(auth, "Range", "bytes=1000000-")...)
	}
	t.Run("with further ranges only", func(t *testing.T) {
		t.Parallel()
		_, d, path, auth := setUp(t, time.Second)
		d.advance(finishIdle - time.Second) // the grant has ended
		a := rest(d, path, auth).must(t, 206)
		if !bytes.Equal(a.body, layer[1_000_000:]) {
			t.Fatal("wrong bytes")
		}
		for _, headers := range [][]string{
			{},
			{"Range", "bytes=0-"},
			{"Range", "bytes=-2000000"},
			{"Range", "bytes=1-1,0-"},
			{"Range", "bytes=1000000-", "If-Range", `"another"`},
			{"Range", "bytes=1000000-", "Range", "bytes=0-"},
			{"Range", "bytes=+1000000-"},
		} {
			d.get(path, append(headers, auth...)...).must(t, 401)
		}
		d.head(path, auth...).must(t, 401)
		d.head(path, append(auth, "Range", "bytes=1000000-")...).must(t, 401)
		// Not by somebody else, and nothing else.
		d.get(path, append(d.options.listed[lab].Access.Login("private/app", "b"), "Range", "bytes=1000000-")...).must(t, 401)
		rest(d, path, nil).must(t, 401)
	})
	t.Run("until thirty seconds after the last answer", func(t *testing.T) {
		t.Parallel()
		_, d, path, auth := setUp(t, time.Second)
		for range 3 {
			d.advance(finishIdle - time.Second)
			rest(d, path, auth).must(t, 206)
		}
		d.advance(finishIdle)
		rest(d, path, auth).must(t, 401)
	})
	t.Run("for ten minutes", func(t *testing.T) {
		t.Parallel()
		_, d, path, auth := setUp(t, time.Second)
		for range int(finishFor / (finishIdle - time.Second)) {
			d.advance(finishIdle - time.Second)
			rest(d, path, auth).must(t, 206)
		}
		d.advance(finishIdle - time.Second)
		rest(d, path, auth).must(t, 401)
	})
	t.Run("not after a 403", func(t *testing.T) {
		t.Parallel()
		r, d, path, auth := setUp(t, time.Second)
		d.advance(2 * time.Second)
		r.Access.Allow("private/app", "a")
		r.Hook = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(403); return true }
		d.head(path, auth...).must(t, 403)
		rest(d, path, auth).must(t, 403)
	})
	t.Run("not after a tag's 404", func(t *testing.T) {
		t.Parallel()
		r, d, path, auth := setUp(t, time.Second)
		d.advance(2 * time.Second)
		r.Access.Allow("private/app", "a")
		d.get(manifestPath("private/app", "none"), auth...).must(t, 404)
		r.Access.Revoke("private/app", "a")
		rest(d, path, auth).must(t, 401)
	})
	t.Run("not when each request asks", func(t *testing.T) {
		t.Parallel()
		_, d, path, auth := setUp(t, 0)
		rest(d, path, auth).must(t, 401)
	})
}

func TestARepositoryThatGoesPublicKeepsItsOldSecrets(t *testing.T) {
	t.Parallel()
	r, d := private(t, "Bearer", setup{})
	old := r.Image("private/app", "old", random(1, 100_000))
	secret := blobPath("private/app", old.Layers[0])
	auth := r.Access.Login("private/app", "a")
	for _, path := range []string{manifestPath("private/app", "old"), secret} {
		d.get(path, auth...).must(t, 200)
	}
	d.stored(cache.ListedDomain, old.Layers[0])
	r.Delete("private/app", "blobs", old.Layers[0])
	r.Delete("private/app", "manifests", old.Manifest)
	public := r.Image("private/app", "v1", random(2, 100_000))
	r.Access.Allow("private/app", "")
	d.advance(refusedFor + time.Second)
	for _, path := range []string{manifestPath("private/app", "v1"), blobPath("private/app", public.Layers[0])} {
		d.get(path).must(t, 200)
	}
	for _, path := range []string{secret, manifestPath("private/app", old.Manifest.String()), manifestPath("private/app", "old")} {
		d.get(path).must(t, 404)
		d.head(path).must(t, 404)
	}
}

func TestADeletedDigestIsGoneAfterTheMembership(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 100_000))
	d.get(manifestPath("app", "v1")).must(t, 200)
	blob := blobPath("app", img.Layers[0])
	d.get(blob).must(t, 200)
	d.stored(cache.ListedDomain, img.Layers[0])
	r.Delete("app", "blobs", img.Layers[0])
	// Long before its end, tags keep the grant alive but not the membership.
	d.advance(23 * time.Hour)
	d.get(manifestPath("app", "v1")).must(t, 200)
	d.get(blob).must(t, 200)
	d.advance(time.Hour)
	d.get(manifestPath("app", "v1")).must(t, 200)
	d.get(blob).must(t, 404)
	d.advance(-2 * time.Hour)
	d.get(manifestPath("app", "v1")).must(t, 200)
	d.get(blob).must(t, 404) // it was deleted, not only old
}

func TestAMembershipOutlivesARestart(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 100_000))
	d.get(manifestPath("app", "v1")).must(t, 200)
	d.get(blobPath("app", img.Layers[0])).must(t, 200)
	d.stored(cache.ListedDomain, img.Layers[0])
	d.stop()
	again := start(t, d.options)
	r.Reset()
	again.get(manifestPath("app", "v1")).mustBe(t, img.Body)
	again.get(blobPath("app", img.Layers[0])).must(t, 200).mustSay(t, "Cache-Status", "tarn; hit")
	if n := len(r.Exchanges()); n != 1 {
		t.Errorf("after a restart it cost %v", r.Exchanges())
	}
}

func TestABlobIsServedOnlyWhereTheRegistryHasIt(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	layer := random(1, 100_000)
	a := r.Image("a", "v1", layer)
	d.get(manifestPath("a", "v1")).must(t, 200)
	d.get(blobPath("a", a.Layers[0])).must(t, 200)
	d.stored(cache.ListedDomain, a.Layers[0])
	// The same manifest in b, whose layer is not there.
	r.Manifest("b", "v1", v1.MediaTypeImageManifest, a.Body)
	d.get(manifestPath("b", "v1")).mustBe(t, a.Body)
	d.get(blobPath("b", a.Layers[0])).must(t, 404)
	d.head(blobPath("b", a.Layers[0])).must(t, 404)
	// Once b has it, the first question costs a byte, and nothing crosses twice.
	r.Blob("b", layer)
	r.Reset()
	for range 2 {
		d.get(blobPath("b", a.Layers[0])).mustBe(t, layer)
	}
	if n := r.Questions(); n != 1 || len(r.Exchanges()) != 1 {
		t.Errorf("through a second repository: %v", r.Exchanges())
	}
}

func TestTheFirstRepositorysTypeAndKindStay(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	// Without a mediaType of its own, only the registry says what it is.
	body := []byte(`{"schemaVersion":2,"config":{"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000","size":1},"layers":[]}`)
	dgst := r.Manifest("first", "v1", v1.MediaTypeImageManifest, body)
	const docker = "application/vnd.docker.distribution.manifest.v2+json"
	r.Manifest("second", "v1", docker, body)
	r.Blob("third", body)
	for range 2 {
		for repository, mediaType := range map[string]string{"first": v1.MediaTypeImageManifest, "second": docker} {
			for _, ref := range []string{"v1", dgst.String()} {
				d.get(manifestPath(repository, ref)).mustBe(t, body).mustSay(t, "Content-Type", mediaType)
				d.head(manifestPath(repository, ref)).must(t, 200).mustSay(t, "Content-Type", mediaType)
			}
			d.get(blobPath(repository, dgst)).must(t, 404)
		}
		d.get(blobPath("third", dgst)).mustBe(t, body).mustSay(t, "Content-Type", "application/octet-stream")
		d.get(manifestPath("third", dgst.String())).must(t, 404)
		d.stored(cache.ListedDomain, dgst)
	}
	if n := r.Count("GET", ""); n != 1+4 { // the bytes once, and what is 404 when it is asked for
		t.Logf("%v", r.Exchanges())
	}
	for _, both := range []string{`{"schemaVersion":2,"manifests":[],"layers":[]}`, `{"schemaVersion":2,"manifests":[],"config":{}}`} {
		r.Manifest("first", "both", v1.MediaTypeImageIndex, []byte(both))
		d.get(manifestPath("first", "both")).must(t, 502)
	}
}

// TestTheUsualPathCostsNoRoundTripPerLayer counts what the registry is asked
// when all is cached, the token service apart.
func TestTheUsualPathCostsNoRoundTripPerLayer(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		scheme string
		public bool
		logins int // Bearer: containerd's HEAD and GET have a token each
		most   int
	}{
		{"public, open", "Basic", true, 0, 1},
		{"public, with tokens for everybody", "Bearer", true, 0, 1},
		{"Basic", "Basic", false, 1, 2},
		{"Bearer, two tokens", "Bearer", false, 2, 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r, d := private(t, c.scheme, setup{})
			var layers [][]byte
			for i := range 10 {
				layers = append(layers, random(uint64(i), 100_000))
			}
			img := r.Image("private/app", "v1", layers...)
			images := map[string]registrytest.Image{"private/app": img, "private/twin": r.Image("private/twin", "v1", layers...)}
			if c.public {
				r.Access.Allow("private/app", "")
				r.Access.Allow("private/twin", "")
			}
			r.Access.Allow("private/twin", "a")
			pull := func(repository string) {
				t.Helper()
				ask := func(do func(string, ...string) answer, path string, auth *[]string) {
					t.Helper()
					a := do(path, *auth...)
					if a.status == 401 && *auth == nil && !c.public {
						*auth = r.Access.Login(repository, "a")
						a = do(path, *auth...)
					}
					a.must(t, 200)
				}
				// containerd: each of its two authorizers starts with nothing.
				var head, get []string
				ask(d.head, manifestPath(repository, "v1"), &head)
				ask(d.get, manifestPath(repository, d.head(manifestPath(repository, "v1"), head...).header.Get("Docker-Content-Digest")), &get)
				ask(d.get, blobPath(repository, images[repository].Config), &get)
				for _, l := range img.Layers {
					ask(d.get, blobPath(repository, l), &get)
				}
			}
			pull("private/app")
			for _, l := range img.Layers {
				d.stored(cache.ListedDomain, l)
			}
			if n := r.Questions() + r.Count("HEAD", "/blobs/"); n != 0 {
				t.Errorf("the first pull put %d questions about blobs", n)
			}
			if g := r.Count("GET", "/blobs/"); g != 11 && c.scheme != "Bearer" {
				t.Errorf("the first pull sent %d GETs of blobs", g)
			}
			d.advance(time.Hour)
			r.Reset()
			pull("private/app")
			// The test's own HEAD, which it learns the digest by, comes on top.
			if n := len(r.Exchanges()) - 1; n > c.most {
				t.Errorf("all cached: %d requests, want %d at most: %v", n, c.most, r.Exchanges())
			} else {
				t.Logf("all cached: %d requests", n)
			}
			if n := r.Count("", "/blobs/"); n != 0 {
				t.Errorf("%d requests for blobs", n)
			}
			// Through a second repository: a question an object, and one byte.
			r.Reset()
			pull("private/twin")
			for _, e := range r.Exchanges() {
				if e.Range != "bytes=0-0" && strings.Contains(e.Path, "/blobs/") && !strings.HasSuffix(e.Path, images["private/twin"].Config.String()) {
					t.Errorf("through a second repository: %v", e)
				}
			}
			if n := r.Questions(); n < 10 || n > 12 {
				t.Errorf("through a second repository: %d questions about blobs", n)
			}
			d.advance(time.Hour)
			r.Reset()
			pull("private/twin")
			if n := len(r.Exchanges()) - 1; n > c.most {
				t.Errorf("the second repository again: %d requests: %v", n, r.Exchanges())
			}
		})
	}
}

func TestColdClientsThatShareACredentialShareItsQuestion(t *testing.T) {
	t.Parallel()
	r, d := private(t, "Basic", setup{})
	r.Access.Allow("private/app", "b")
	r.Latency = 20 * time.Millisecond
	layer := random(1, 1_000_000)
	img := r.Image("private/app", "v1", layer)
	path := blobPath("private/app", img.Layers[0])
	a := r.Access.Login("private/app", "a")
	var wg sync.WaitGroup
	for range 30 {
		wg.Go(func() { d.get(path, a...).mustBe(t, layer) })
	}
	wg.Wait()
	if h, g := r.Count("HEAD", ""), r.Count("GET", ""); h != 0 || g != 1 {
		t.Errorf("30 clients with one credential: %d HEAD, %d GET", h, g)
	}
	// A refusal ends only those that share it.
	r.Reset()
	config := blobPath("private/app", img.Config)
	stranger := []string{"Authorization", registrytest.Basic("a", "canary-guess")}
	for range 10 {
		wg.Go(func() { d.get(config, stranger...).must(t, 401) })
		wg.Go(func() { d.get(config, a...).must(t, 200) })
		wg.Go(func() { d.get(config, r.Access.Login("private/app", "b")...).must(t, 200) })
	}
	wg.Wait()
	// Who has the authority's yes does not wait for the answer to another's
	// question, so that there may be a GET for each of the two.
	served := make(map[string]int)
	for _, e := range r.Exchanges() {
		if e.Method == "GET" && e.Authorization != stranger[1] && e.Range != "bytes=0-0" {
			served[e.Authorization]++
		}
	}
	if a, b := served[a[1]], served[r.Access.Login("private/app", "b")[1]]; a > 1 || b > 1 || a+b == 0 {
		t.Errorf("%d and %d GETs with rights: %v", a, b, r.Exchanges())
	}
}

func TestAYesThatCrossedARefusalMakesNothing(t *testing.T) {
	t.Parallel()
	r, d := private(t, "Basic", setup{})
	img := r.Image("private/app", "v1", random(1, 100_000))
	auth := r.Access.Login("private/app", "a")
	d.get(manifestPath("private/app", "v1"), auth...).must(t, 200)
	d.get(blobPath("private/app", img.Layers[0]), auth...).must(t, 200)
	d.stored(cache.ListedDomain, img.Layers[0])

	// A HEAD of the config has its yes from before the revocation, and brings
	// it after the tag's refusal.
	asked, release := make(chan struct{}), make(chan struct{})
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if strings.HasSuffix(req.URL.Path, img.Config.String()) {
			close(asked)
			<-release
		}
		return false
	}
	var wg sync.WaitGroup
	wg.Go(func() { d.head(blobPath("private/app", img.Config), auth...).must(t, 200) })
	<-asked
	r.Access.Revoke("private/app", "a")
	want := d.head(manifestPath("private/app", "v1"), auth...)
	if want.status != 403 {
		t.Fatalf("revoked: %d", want.status)
	}
	close(release)
	wg.Wait()
	r.Hook = nil
	d.get(blobPath("private/app", img.Layers[0]), auth...).must(t, 403)

	// The same for an object: a yes that was sent before the 404.
	r.Access.Allow("private/app", "a")
	asked, release = make(chan struct{}), make(chan struct{})
	var late sync.Once
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		hold := false
		late.Do(func() { hold = true })
		if hold {
			r.Answer(&slowHeaders{ResponseWriter: w, asked: asked, release: release}, req)
			return true
		}
		return false
	}
	d.advance(2 * time.Minute)
	wg.Go(func() { d.get(blobPath("private/app", img.Layers[0]), auth...).must(t, 200) })
	<-asked
	r.Delete("private/app", "blobs", img.Layers[0])
	d.head(blobPath("private/app", img.Layers[0]), auth...).must(t, 404)
	close(release)
	wg.Wait()
	d.get(manifestPath("private/app", "v1"), auth...).must(t, 200)
	d.get(blobPath("private/app", img.Layers[0]), auth...).must(t, 404)
}

// slowHeaders holds an answer that has been decided.
type slowHeaders struct {
	http.ResponseWriter
	asked, release chan struct{}
	once           sync.Once
}

func (s *slowHeaders) WriteHeader(status int) {
	s.once.Do(func() {
		close(s.asked)
		<-s.release
	})
	s.ResponseWriter.WriteHeader(status)
}

func TestATokensOwnEndEndsTheGrant(t *testing.T) {
	t.Parallel()
	jwt := func(claims any) string {
		payload, err := json.Marshal(claims)
		if err != nil {
			t.Fatal(err)
		}
		return "Bearer e30." + base64.RawURLEncoding.EncodeToString(payload) + ".canary-signature"
	}
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 100_000))
	auth := []string{"Authorization", jwt(map[string]any{"exp": time.Now().Add(20 * time.Second).Unix()})}
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Header.Get("Authorization") == auth[1] {
			return false
		}
		w.WriteHeader(401)
		return true
	}
	blob := blobPath("app", img.Layers[0])
	d.get(manifestPath("app", "v1"), auth...).must(t, 200)
	d.get(blob, auth...).must(t, 200)
	d.stored(cache.ListedDomain, img.Layers[0])
	r.Reset()
	d.advance(10 * time.Second)
	d.get(blob, auth...).must(t, 200)
	if n := len(r.Exchanges()); n != 0 {
		t.Errorf("%d requests while the token holds", n)
	}
	d.advance(15 * time.Second)
	d.get(blob, auth...).must(t, 200)
	if got := r.Exchanges(); len(got) != 1 || got[0].Range != "bytes=0-0" {
		t.Errorf("after its end: %v", got)
	}
}

func TestARefusalOfAnonymousIsRememberedForFiveSeconds(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"Basic", "Bearer"} {
		r, d := private(t, scheme, setup{})
		img := r.Image("private/app", "v1", random(1, 100_000))
		first := d.head(manifestPath("private/app", "v1")).must(t, 401)
		r.Reset()
		for _, path := range []string{manifestPath("private/app", "v1"), manifestPath("private/app", img.Manifest.String()),
			blobPath("private/app", img.Layers[0]), "/v2/private/app/tags/list?ns=lab.test"} {
			d.get(path).must(t, 401).mustSay(t, "WWW-Authenticate", first.header.Get("WWW-Authenticate"))
		}
		if n := len(r.Exchanges()); n != 0 {
			t.Errorf("%s: %d requests", scheme, n)
		}
		// Not for another repository, not for a credential, not for longer.
		d.get(manifestPath("private/other", "v1"))
		d.get(manifestPath("private/app", "v1"), r.Access.Login("private/app", "a")...).must(t, 200)
		if r.Count("GET", "private/other")+r.Count("HEAD", "private/other") == 0 {
			t.Errorf("%s: another repository was not asked about", scheme)
		}
		r.Access.Allow("private/app", "")
		d.get(manifestPath("private/app", "v1")).must(t, 401)
		d.advance(refusedFor)
		d.get(manifestPath("private/app", "v1")).must(t, 200)
	}
}

func TestAChallengeComesFromTheBaseWhereTheAnswerHasNone(t *testing.T) {
	t.Parallel()
	r, d := private(t, "Basic", setup{})
	r.Access.Challenge = func(repository string) string {
		if repository == "" {
			return `Basic realm="base"`
		}
		return ""
	}
	d.get(manifestPath("private/app", "v1")).must(t, 401).mustSay(t, "WWW-Authenticate", `Basic realm="base"`)
	d.get(manifestPath("private/app", "v1"), "Authorization", registrytest.Basic("a", "canary-guess")).
		must(t, 401).mustSay(t, "WWW-Authenticate", `Basic realm="base"`)
}

func TestAnAuthorityThatIsDownAuthorisesNobody(t *testing.T) {
	t.Parallel()
	mirror := registrytest.New(t) // open to everybody, and has it all
	layer := random(1, 200_000)
	img := mirror.Image("private/app", "v1", layer)
	r, d := private(t, "Basic", setup{configure: func(c *upstream.Config) {
		u, err := url.Parse(mirror.URL)
		if err != nil {
			t.Fatal(err)
		}
		c.Endpoints = append(c.Endpoints, upstream.Endpoint{URL: u})
	}})
	r.Image("private/app", "v1", layer)
	auth := r.Access.Login("private/app", "a")
	var broken func(w http.ResponseWriter, req *http.Request) bool
	var mu sync.Mutex
	set := func(f func(http.ResponseWriter, *http.Request) bool) {
		mu.Lock()
		defer mu.Unlock()
		broken = f
	}
	front := r.Server.Config.Handler
	r.Server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		f := broken
		mu.Unlock()
		if f == nil || !f(w, req) {
			front.ServeHTTP(w, req)
		}
	})
	faults := map[string]func(http.ResponseWriter, *http.Request) bool{
		"503": func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(503); return true },
		"cut": func(w http.ResponseWriter, _ *http.Request) bool { panic(http.ErrAbortHandler) },
	}
	nobody := func(state string) {
		t.Helper()
		for fault, f := range faults {
			set(f)
			for _, s := range strangers {
				for _, path := range []string{manifestPath("private/app", "v1"), manifestPath("private/app", img.Manifest.String()),
					blobPath("private/app", img.Layers[0]), blobPath("private/app", img.Config)} {
					for _, way := range ways {
						d.advance(refusedFor + time.Second)
						a := d.do(way.method, path, append(way.headers(img.Manifest), s.headers(r.Access)...)...)
						if a.status < 500 || a.status > 504 {
							t.Errorf("%s, %s, %s: %s %s: %d", state, fault, s.name, way.method, path, a.status)
						}
					}
				}
			}
		}
		set(nil)
	}
	nobody("cold")
	// Who has the right is served by the mirror meanwhile.
	d.get(manifestPath("private/app", "v1"), auth...).must(t, 200)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method == "GET" {
			w.WriteHeader(503)
			return true
		}
		return false
	}
	d.head(blobPath("private/app", img.Layers[0]), auth...).must(t, 200)
	d.get(blobPath("private/app", img.Layers[0]), auth...).mustBe(t, layer)
	for _, e := range mirror.Exchanges() {
		if e.Authorization != "" {
			t.Error("the second endpoint saw a credential")
		}
	}
	r.Hook = nil
	d.get(blobPath("private/app", img.Config), auth...).must(t, 200)
	for _, dgst := range []digest.Digest{img.Manifest, img.Layers[0], img.Config} {
		d.stored(cache.ListedDomain, dgst)
	}
	nobody("warm")
}

func TestARedirectTargetsRefusalTakesNoRight(t *testing.T) {
	t.Parallel()
	for _, status := range []int{401, 403, 404} {
		r, d := private(t, "Basic", setup{})
		cdn := registrytest.New(t)
		layer := random(1, 200_000)
		img := r.Image("private/app", "v1", layer)
		auth := r.Access.Login("private/app", "a")
		// Signed for GET only, and the first signature of each has expired.
		var mu sync.Mutex
		signed := make(map[string]int)
		cdn.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			signed[req.Method]++
			if req.Method == "HEAD" || signed[req.Method]%2 == 1 {
				w.Header().Set("WWW-Authenticate", `Basic realm="cdn"`)
				w.WriteHeader(status)
				return true
			}
			http.ServeContent(w, req, "", noTime, bytes.NewReader(layer))
			return true
		}
		r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			if !strings.HasSuffix(req.URL.Path, img.Layers[0].String()) {
				return false
			}
			http.Redirect(w, req, cdn.URL+"/x?sig=canary-signature", http.StatusFound)
			return true
		}
		d.get(manifestPath("private/app", "v1"), auth...).must(t, 200)
		d.get(blobPath("private/app", img.Layers[0]), auth...).mustBe(t, layer)
		d.stored(cache.ListedDomain, img.Layers[0])
		cdn.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Basic realm="cdn"`)
			w.WriteHeader(status)
			return true
		}
		b := r.Access.Login("private/app", "b")
		r.Access.Allow("private/app", "b")
		for _, a := range []answer{d.get(blobPath("private/app", img.Layers[0]), b...), d.head(blobPath("private/app", img.Layers[0]), b...)} {
			a.must(t, 502)
			if a.header.Get("WWW-Authenticate") != "" {
				t.Error("the redirect target's challenge was relayed")
			}
		}
		r.Reset()
		d.get(blobPath("private/app", img.Layers[0]), auth...).mustBe(t, layer) // a keeps grant and membership
		if n := len(r.Exchanges()); n != 0 {
			t.Errorf("%d: a right was lost: %v", status, r.Exchanges())
		}
	}
}

func TestAStrangerCannotSlowOrFeedAnothersFlight(t *testing.T) {
	t.Parallel()
	good, evil, d := withEvil(t)
	layer := random(1, 1<<20)
	dgst := good.Blob("app", layer)
	// evil stalls in the middle of the same digest, having sent rubbish.
	stall, begun := make(chan struct{}), make(chan struct{})
	defer close(stall)
	evil.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		sized(w, len(layer))
		if req.Method == "GET" {
			w.Write(random(2, 1<<19))
			w.(http.Flusher).Flush()
			close(begun)
			<-stall
		}
		return true
	}
	resp, err := http.Get(d.URL + "/v2/x/blobs/" + dgst.String() + evilNS)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	<-begun
	if _, err := io.ReadFull(resp.Body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	d.get(blobPath("app", dgst)).mustBe(t, layer)
	d.stored(cache.ListedDomain, dgst)
}

func TestSharesAreAnchored(t *testing.T) {
	t.Parallel()
	r, d := private(t, "Basic", setup{rules: &Rules{GrantTTL: time.Minute, MembershipTTL: time.Hour, Share: []string{"platform/*", "one"}}})
	_ = r
	for repository, want := range map[string]bool{
		"platform/app": true, "platform/app/deep": false, "platform": false, "xplatform/app": false,
		"platformx/app": false, "other/platform/app": false, "one": true, "one/two": false, "onetwo": false,
	} {
		q := &request{upstream: lab, repository: repository}
		if got := d.proxy.shared(q); got != want {
			t.Errorf("%s: %v", repository, got)
		}
		if q.upstream = "other.test"; d.proxy.shared(q) {
			t.Errorf("%s of another registry", repository)
		}
	}
}

func TestOnlyStrictRangesResume(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]struct {
		first   int64
		resumes bool
	}{
		"":                            {0, false},
		"bytes=0-":                    {0, false},
		"bytes=0-5":                   {0, false},
		"bytes=5-":                    {5, true},
		"bytes=5-9":                   {5, true},
		"bytes=-5":                    {1, false},
		"bytes=5-,0-":                 {0, false},
		"bytes= 5-":                   {0, false},
		"bytes=+5-":                   {0, false},
		"bytes=0x5-":                  {0, false},
		"bytes=5 -":                   {0, false},
		"bytes=99999999999999999999-": {0, false},
		"lines=5-":                    {0, false},
		"bytes=":                      {0, false},
	} {
		r, err := http.NewRequest("GET", "/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if header != "" {
			r.Header.Set("Range", header)
		}
		if got := parseRange(r); got.first != want.first || got.resumes != want.resumes {
			t.Errorf("%q: %+v", header, got)
		}
		kept := r.Header.Get("Range") != ""
		if served := slices.Contains([]string{"bytes=0-", "bytes=0-5", "bytes=5-", "bytes=5-9", "bytes=-5", "lines=5-"}, header); kept != served {
			t.Errorf("%q: kept %v", header, kept)
		}
	}
}

// TestAClockThatIsSetMakesNothingLastForEver: what is from the future, after the
// clock was set back, is asked about once, and then is of now.
func TestAClockThatIsSetMakesNothingLastForEver(t *testing.T) {
	t.Parallel()
	const years = 10 * 365 * 24 * time.Hour
	for _, set := range []time.Duration{-years, years} {
		r, d := one(t)
		layer := random(1, 200_000)
		img := r.Image("app", "v1", layer)
		blob := blobPath("app", img.Layers[0])
		d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
		d.get(blob).mustBe(t, layer)
		d.stored(cache.ListedDomain, img.Layers[0])
		s := d.options
		d.stop()
		d = start(t, s)
		d.advance(set)
		r.Reset()
		d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
		for range 3 {
			d.get(blob).mustBe(t, layer)
		}
		if q, n := r.Questions(), r.Count("GET", ""); q != 1 || n != 1 {
			t.Errorf("%v: %d questions about the blob, %d GETs", set, q, n)
		}
		r.Delete("app", "blobs", img.Layers[0])
		d.advance(25 * time.Hour)
		d.get(blob).must(t, 404)
	}
}
