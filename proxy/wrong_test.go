// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"
	"tarn/rights"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// sends has a registry answer those who want bytes of a blob with these, n times. Who
// only asks for the first one is answered as ever.
func sends(r *registrytest.Registry, body []byte, n int32) {
	var left atomic.Int32
	left.Store(n)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if !wantsBytes(registrytest.Exchange{Method: req.Method, Path: req.URL.Path, Range: req.Header.Get("Range")}) || left.Add(-1) < 0 {
			return false
		}
		w.Header().Set("Docker-Content-Digest", path.Base(req.URL.Path))
		sized(w, len(body))
		w.Write(body)
		return true
	}
}

func wantsBytes(e registrytest.Exchange) bool {
	return e.Method == "GET" && strings.Contains(e.Path, "/blobs/") && e.Range != "bytes=0-0"
}

// sent is how often a registry was asked for bytes since the last time.
func sent(r *registrytest.Registry) (n int) {
	for _, e := range r.Exchanges() {
		if wantsBytes(e) {
			n++
		}
	}
	r.Reset()
	return n
}

// mustBeWrong: what came of it is an error, or not all.
func (a answer) mustBeWrong(t *testing.T, blob []byte) {
	t.Helper()
	if a.status == http.StatusOK && a.err == nil {
		t.Fatalf("%d bytes of %d, as if they were whole", len(a.body), len(blob))
	}
}

// TestWhoSentWrongBytesIsNotAskedForThemAgain while there is another, whether or not
// the client is asked about once more.
func TestWhoSentWrongBytesIsNotAskedForThemAgain(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1000, 1 << 20} {
		for _, room := range wholes {
			for _, grant := range []time.Duration{0, time.Minute} {
				t.Run(fmt.Sprintf("%d bytes, %s, believed for %v", size, room.name, grant), func(t *testing.T) {
					t.Parallel()
					authority, mirror := registrytest.New(t), registrytest.New(t)
					rules := DefaultRules()
					rules.GrantTTL = grant
					d := start(t, setup{listed: map[string]*registrytest.Registry{lab: authority}, maxSize: room.maxSize, rules: &rules, configure: func(c *upstream.Config) {
						c.Endpoints = append(c.Endpoints, upstream.Endpoint{URL: mirror.Endpoint()})
					}})
					blob, other := random(1, size), random(2, size)
					dgst, otherDigest := authority.Blob("app", blob), authority.Blob("app", other)
					mirror.Blob("app", blob)
					sends(authority, flipped(blob, 0), 1)

					d.get(blobPath("app", dgst)).mustBeWrong(t, blob)
					if a, m := sent(authority), sent(mirror); a != 1 || m != 0 {
						t.Fatalf("at first the authority was asked %d times, the mirror %d", a, m)
					}
					d.get(blobPath("app", dgst)).mustBe(t, blob)
					if asked := len(authority.Exchanges()) > 0; asked != (grant == 0) {
						t.Errorf("the authority was asked whether the client may have it: %v", asked)
					}
					if a, m := sent(authority), sent(mirror); a != 0 || m == 0 {
						t.Errorf("then the authority was asked %d times, the mirror %d", a, m)
					}
					// Another object it sends as ever.
					d.get(blobPath("app", otherDigest)).mustBe(t, other)
					if a := sent(authority); a == 0 {
						t.Error("another object was not asked for")
					}
				})
			}
		}
	}
}

// TestWhoSentWrongBytesIsAskedAtOnceWhereThereIsNoOther who has the object: it may
// have healed.
func TestWhoSentWrongBytesIsAskedAtOnceWhereThereIsNoOther(t *testing.T) {
	t.Parallel()
	blob := random(1, 1<<20)
	for name, refuse := range map[string]int{"a single endpoint": 0, "a mirror without it": 404, "a mirror that is broken": 503} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var authority, mirror *registrytest.Registry
			var d *tarnd
			if refuse == 0 {
				authority, d = one(t)
			} else {
				authority, mirror, d = withMirror(t, false)
				mirror.Hook = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(refuse); return true }
			}
			dgst := authority.Blob("app", blob)
			sends(authority, flipped(blob, 1<<19), 1)
			d.get(blobPath("app", dgst)).mustBeWrong(t, blob)
			d.get(blobPath("app", dgst)).mustBe(t, blob)
			if a := sent(authority); a != 2 {
				t.Errorf("it was asked %d times", a)
			}
			if mirror != nil && sent(mirror) == 0 {
				t.Error("the mirror was not asked before it")
			}
		})
	}
}

// TestWrongBytesAreForgottenAfterTenMinutes, with what passes through, so that each
// request has to be fetched.
func TestWrongBytesAreForgottenAfterTenMinutes(t *testing.T) {
	t.Parallel()
	authority, mirror := registrytest.New(t), registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: authority}, maxSize: 100 << 10, configure: func(c *upstream.Config) {
		c.Endpoints = append(c.Endpoints, upstream.Endpoint{URL: mirror.Endpoint()})
	}})
	blob := random(1, 1<<20)
	dgst := authority.Blob("app", blob)
	mirror.Blob("app", blob)
	sends(authority, flipped(blob, 5), 1)
	d.get(blobPath("app", dgst)).mustBeWrong(t, blob)
	sent(authority)
	for _, c := range []struct {
		by     time.Duration
		mirror bool
	}{{0, true}, {wrongFor - time.Second, true}, {2 * time.Second, false}} {
		d.advance(c.by)
		d.get(blobPath("app", dgst)).mustBe(t, blob)
		if a, m := sent(authority), sent(mirror); (a == 0) != c.mirror || (m > 0) != c.mirror {
			t.Errorf("after %v more the authority was asked %d times, the mirror %d", c.by, a, m)
		}
	}
}

// TestWhereAllSentWrongBytesTheFirstToDoSoIsAsked: it has had the longest time to heal.
func TestWhereAllSentWrongBytesTheFirstToDoSoIsAsked(t *testing.T) {
	t.Parallel()
	authority, mirror, d := withMirror(t, false)
	blob := random(1, 1<<20)
	dgst := authority.Blob("app", blob)
	mirror.Blob("app", blob)
	sends(authority, flipped(blob, 5), 2)
	sends(mirror, flipped(blob, 5), 1)
	for i, want := range [][2]int{{1, 0}, {0, 1}, {1, 0}} {
		d.get(blobPath("app", dgst)).mustBeWrong(t, blob)
		if got := [2]int{sent(authority), sent(mirror)}; got != want {
			t.Errorf("%d: asked %v times, not %v", i, got, want)
		}
	}
	d.get(blobPath("app", dgst)).mustBe(t, blob)
	if a, m := sent(authority), sent(mirror); a != 0 || m != 1 {
		t.Errorf("the authority was asked %d times, the mirror %d", a, m)
	}
}

// TestNobodyKnowsWhichPartWasWrong: the authority's body is, and breaks off, and the
// mirror's is right. Both are asked in the usual order then, each for all of it, and
// that tells.
func TestNobodyKnowsWhichPartWasWrong(t *testing.T) {
	t.Parallel()
	authority, mirror, d := withMirror(t, false)
	blob := random(1, 2<<20)
	dgst := authority.Blob("app", blob)
	mirror.Blob("app", blob)
	bad, cut := flipped(blob, 5), true
	authority.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		sized(w, len(bad))
		if !cut {
			w.Write(bad)
			return true
		}
		cut = false
		w.Write(bad[:1<<20])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	for i, want := range [][2]int{{1, 1}, {1, 0}} {
		d.get(blobPath("app", dgst)).mustBeWrong(t, blob)
		if got := [2]int{sent(authority), sent(mirror)}; got != want {
			t.Errorf("%d: asked %v times, not %v", i, got, want)
		}
	}
	d.get(blobPath("app", dgst)).mustBe(t, blob)
	if a, m := sent(authority), sent(mirror); a != 0 || m == 0 {
		t.Errorf("at last the authority was asked %d times, the mirror %d", a, m)
	}
}

// TestOtherBytesThanBeforeAreWrongOnes: what broke off comes again, and is another thing.
func TestOtherBytesThanBeforeAreWrongOnes(t *testing.T) {
	t.Parallel()
	authority, mirror, d := withMirror(t, false)
	blob := random(1, 2<<20)
	dgst := authority.Blob("app", blob)
	var gets atomic.Int32
	authority.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		sized(w, len(blob))
		if gets.Add(1) > 1 {
			w.Write(flipped(blob, 5))
			return true
		}
		w.Write(blob[:1<<20])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	d.get(blobPath("app", dgst)).mustBeWrong(t, blob)
	if a, m := sent(authority), sent(mirror); a < 2 || m == 0 {
		t.Fatalf("the authority was asked %d times, the mirror, which does not have it, %d", a, m)
	}
	mirror.Blob("app", blob)
	d.get(blobPath("app", dgst)).mustBe(t, blob)
	if a := sent(authority); a != 0 {
		t.Errorf("the authority was asked %d times more", a)
	}
}

// TestAWrongManifestIsFetchedElsewhere, by its digest; the question goes to the
// authority.
func TestAWrongManifestIsFetchedElsewhere(t *testing.T) {
	t.Parallel()
	authority, mirror, d := withMirror(t, false)
	image := authority.Image("app", "v1", random(1, 1000))
	mirror.Image("app", "v1", random(1, 1000))
	authority.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		io.WriteString(w, `{"schemaVersion":2,"layers":[]}`)
		return true
	}
	d.get(manifestPath("app", image.Manifest.String())).must(t, http.StatusBadGateway)
	if got := d.get(manifestPath("app", image.Manifest.String())).must(t, http.StatusOK); digest.FromBytes(got.body) != image.Manifest {
		t.Errorf("%.100q", got.body)
	}
	if a := authority.Count("GET", "/manifests/"); a != 1 {
		t.Errorf("the authority was asked %d times", a)
	}
}

// TestWhoSentWrongBytesIsLastOfEachTurn, whatever credential it is shown, and is no
// other place to whom a slow body would be given up for.
func TestWhoSentWrongBytesIsLastOfEachTurn(t *testing.T) {
	t.Parallel()
	d := start(t, setup{urls: map[string]string{lab: "https://a.test", "other.test": "https://a.test"}, configure: func(u *upstream.Config) {
		u.Endpoints = append(u.Endpoints, mirrors("b.test", "+c.test")...)
		u.Credentials = upstream.NewDockerConfig("/nowhere", u.Name)
	}})
	dgst, yes := digest.FromString("bytes"), &rights.Yes{Size: 5, Proved: true}
	list := func(f *fetcher) (hosts string) {
		for _, s := range f.list() {
			hosts += fmt.Sprintf("%s %v ", strings.TrimSuffix(s.host, ".test"), s.budget)
		}
		return strings.TrimSpace(hosts)
	}
	const usual = "a 3s b 3s c 8s a 3s b 3s c 8s a 8s"
	f := d.fetcherFor("app", "Basic c2VjcmV0", dgst, yes)
	brings := func(i int) {
		body := &watchedBody{ReadCloser: io.NopCloser(strings.NewReader("other")), fetcher: f, source: f.list()[i]}
		io.Copy(io.Discard, body)
	}
	f.wrong()
	if got := list(f); got != usual {
		t.Errorf("before anybody sent anything: %s", got)
	}
	brings(0)
	f.wrong()
	if got := list(f); got != "b 3s c 3s a 8s b 3s c 3s a 8s a 8s" {
		t.Errorf("after wrong bytes of the first: %s", got)
	}
	b, c := f.list()[0], f.list()[1]
	if !f.elsewhere(b) || list(f) != "c 3s b 3s a 8s c 3s b 3s a 8s a 8s" {
		t.Errorf("given up: %s", list(f))
	}
	if !f.elsewhere(c) || list(f) != "b 3s c 3s a 8s b 3s c 3s a 8s a 8s" {
		t.Errorf("given up, too: %s", list(f))
	}
	for name, other := range map[string]*fetcher{
		"another object":     d.fetcherFor("app", "", digest.FromString("more"), yes),
		"another registry":   {proxy: d.proxy, q: &request{upstream: "other.test"}, digest: dgst, asked: true, yes: *yes},
		"another repository": d.fetcherFor("web", "", dgst, yes),
	} {
		if got, want := list(other), map[bool]string{true: usual, false: "b 3s c 3s a 8s b 3s c 3s a 8s a 8s"}[name != "another repository"]; got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := list(d.fetcherFor("app", "Basic c2VjcmV0", dgst, nil)); got != "a 8s" {
		t.Errorf("before the yes: %s", got)
	}
	brings(0) // b
	f.wrong()
	if first := f.list()[0]; first.host != "c.test" || f.elsewhere(first) {
		t.Errorf("the only one left is given up for one that sends wrong bytes: %s", list(f))
	}
	brings(0) // c: now it is all of them, a, b and c, at one moment
	f.wrong()
	f.beginWith(0)
	if got := list(f); got != usual {
		t.Errorf("after wrong bytes of all: %s", got)
	}
}

// TestAPageForEverybodyIsNobodysFault: an answer that is no yes to what is here says
// nothing about the source's object.
func TestAPageForEverybodyIsNobodysFault(t *testing.T) {
	t.Parallel()
	authority, _, d := withMirror(t, false)
	blob := random(1, 1<<20)
	dgst := authority.Blob("app", blob)
	d.get(blobPath("app", dgst), "Authorization", registrytest.Basic("a", "canary-password")).mustBe(t, blob)
	d.stored(cache.ListedDomain, dgst)
	authority.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, "sign on")
		return true
	}
	d.get(blobPath("app", dgst)).mustBeWrong(t, blob)
	if first := d.fetcherFor("app", "", dgst, &rights.Yes{Size: 1 << 20}).list()[0]; first.host != authority.Address() {
		t.Errorf("%s is asked first", first.name())
	}
}

func TestTheWrongAreBounded(t *testing.T) {
	t.Parallel()
	var s wrongs
	now := time.Now()
	at := func(i int) wrong { return wrong{"https://a.test", digest.FromBytes(fmt.Append(nil, i))} }
	s.add("quiet.test", at(0), now)
	for i := range 2 * maxWrong {
		s.add("loud.test", at(i), now.Add(time.Duration(i)*time.Millisecond))
	}
	if n := len(s.until["loud.test"]); n != maxWrong {
		t.Errorf("%d of one upstream", n)
	}
	if s.last("loud.test", at(maxWrong-1), now) != (time.Time{}) || s.last("loud.test", at(maxWrong), now).IsZero() {
		t.Error("it is not the oldest that was forgotten")
	}
	if s.last("quiet.test", at(0), now).IsZero() {
		t.Error("another upstream's was forgotten")
	}
	s.add("loud.test", at(2*maxWrong-1), now) // known: nothing is forgotten for it
	if n := len(s.until["loud.test"]); n != maxWrong || s.last("loud.test", at(maxWrong), now).IsZero() {
		t.Errorf("%d after one that was known", n)
	}
	if !s.last("quiet.test", at(0), now.Add(wrongFor)).IsZero() {
		t.Error("it is remembered for longer")
	}
}
