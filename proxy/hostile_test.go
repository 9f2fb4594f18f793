// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

// What somebody on the node, or with a repository of his own, tries against
// others.

// TestASilentRepositoryLocksNoDigest: somebody asks for it there first.
func TestASilentRepositoryLocksNoDigest(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	blob := random(1, 300_000)
	dgst := r.Blob("good/app", blob)
	asked, release := make(chan struct{}, 100), make(chan struct{})
	defer close(release)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if strings.Contains(req.URL.Path, "/silent/") {
			asked <- struct{}{}
			<-release
			return true
		}
		return false
	}
	go func() {
		resp, err := http.Get(d.URL + blobPath("silent/x", dgst))
		if err == nil {
			resp.Body.Close()
		}
	}()
	<-asked
	d.get(blobPath("good/app", dgst)).mustBe(t, blob)
}

// TestAFailingRepositoryFailsNoDigest, which another one has.
func TestAFailingRepositoryFailsNoDigest(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	blob := random(1, 300_000)
	dgst := r.Blob("good/app", blob)
	asked, release := make(chan struct{}, 100), make(chan struct{})
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if strings.Contains(req.URL.Path, "/silent/") {
			asked <- struct{}{}
			<-release
			w.WriteHeader(500)
			return true
		}
		return false
	}
	go d.get(blobPath("silent/x", dgst))
	<-asked
	time.AfterFunc(300*time.Millisecond, func() { close(release) })
	d.get(blobPath("good/app", dgst)).mustBe(t, blob)
}

// TestASignOnPageBreaksNoPull: what a stranger is shown leads the flight, and who
// has the right asks meanwhile.
func TestASignOnPageBreaksNoPull(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		chunked bool
		named   bool
		size    int
	}{{"sized small", false, false, 20_000}, {"sized large", false, false, 200_000}, {"chunked", true, false, 20_000},
		{"sized small named", false, true, 20_000}, {"sized large named", false, true, 200_000}, {"chunked named", true, true, 20_000}} {
		t.Run(c.name, func(t *testing.T) {
			r, d := one(t)
			layer := random(1, 300_000)
			img := r.Image("private/app", "v1", layer)
			begun, release := make(chan struct{}, 100), make(chan struct{})
			r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
				if u, _, _ := req.BasicAuth(); u == "a" {
					if c.named && strings.Contains(req.URL.Path, "/blobs/") {
						w.Header().Set("Docker-Content-Digest", img.Layers[0].String())
					}
					return false
				}
				w.Header().Set("Content-Type", "text/html")
				if !c.chunked {
					sized(w, c.size)
				}
				w.WriteHeader(200)
				w.Write(bytes.Repeat([]byte("x"), c.size/2))
				w.(http.Flusher).Flush()
				begun <- struct{}{}
				<-release
				w.Write(bytes.Repeat([]byte("x"), c.size-c.size/2))
				return true
			}
			a := []string{"Authorization", registrytest.Basic("a", "pw")}
			d.get(manifestPath("private/app", "v1"), a...).mustBe(t, img.Body)
			go d.get(blobPath("private/app", img.Layers[0])) // stranger
			<-begun
			time.AfterFunc(time.Second, func() { close(release) })
			got := d.get(blobPath("private/app", img.Layers[0]), a...)
			got.mustBe(t, layer)
		})
	}
}

// TestALargePageDoesNotTellWhatIsCached: it looks as if nothing were.
func TestALargePageDoesNotTellWhatIsCached(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("private/app", "v1", random(1, 300_000), random(2, 300_000))
	page := bytes.Repeat([]byte("x"), 200_000)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if u, _, _ := req.BasicAuth(); u == "a" {
			return false
		}
		w.Header().Set("Content-Type", "text/html")
		sized(w, len(page))
		w.Write(page)
		return true
	}
	a := []string{"Authorization", registrytest.Basic("a", "pw")}
	d.get(blobPath("private/app", img.Layers[0]), a...).must(t, 200)
	d.stored(cache.ListedDomain, img.Layers[0])
	look := func(dg digest.Digest) (string, int) {
		r.Reset()
		resp, err := http.Get(d.URL + blobPath("private/app", dg))
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		return fmt.Sprint(resp.StatusCode, resp.Header.Get("Cache-Status")), len(r.Exchanges())
	}
	warm, nw := look(img.Layers[0])
	cold, nc := look(img.Layers[1])
	if warm != cold || nw != nc {
		t.Errorf("cached: %q (%d questions), not cached: %q (%d questions)", warm, nw, cold, nc)
	}
}

// TestSilentRepositoriesKeepNobodyWaiting: seventeen of them take all that a
// registry has.
func TestSilentRepositoriesKeepNobodyWaiting(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 1000))
	release := make(chan struct{})
	var silent atomic.Int32
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.Contains(req.URL.Path, "/silent") {
			return false
		}
		silent.Add(1)
		select {
		case <-release:
		case <-req.Context().Done():
		}
		return true
	}
	d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for repo := range 17 {
		for i := range 64 {
			wg.Go(func() {
				req, _ := http.NewRequestWithContext(ctx, "GET", d.URL+blobPath(fmt.Sprintf("silent%d", repo), digest.FromString(fmt.Sprint(repo, i))), nil)
				if resp, err := http.DefaultTransport.RoundTrip(req); err == nil {
					resp.Body.Close()
				}
			})
		}
	}
	eventually(t, "1024 are silent", func() bool { return silent.Load() >= 1024 })
	began := time.Now()
	a := d.get(manifestPath("app", "v1"))
	took := time.Since(began)
	cancel()
	close(release)
	wg.Wait()
	a.mustBe(t, img.Body)
	if took > 3*time.Second {
		t.Errorf("a registry that is well was asked after %v", took)
	}
}

// TestAnObjectOfAPagesSizeOpensNoOther: a repository was open, and strangers are
// shown a page now; somebody stores an object of its length.
func TestAnObjectOfAPagesSizeOpensNoOther(t *testing.T) {
	t.Parallel()
	for _, mediaType := range []string{"text/html", "text/plain", "application/json", "application/octet-stream"} {
		t.Run(mediaType, func(t *testing.T) { testPageSized(t, mediaType) })
	}
}

func testPageSized(t *testing.T, mediaType string) {
	hub, r := registrytest.New(t), registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r, "hub.test": hub}})
	layer := random(1, 300_000)
	img := r.Image("app", "v1", layer)
	d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
	d.get(blobPath("app", img.Layers[0])).mustBe(t, layer)
	d.stored(cache.ListedDomain, img.Layers[0])
	// It goes private, behind a page that says 200 to strangers.
	page := []byte("<html>Sign in</html>")
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		w.Header().Set("Content-Type", mediaType)
		sized(w, len(page))
		w.Write(page)
		return true
	}
	d.advance(2 * time.Minute)
	if a := d.get(blobPath("app", img.Layers[0])); a.status == 200 {
		t.Fatalf("control: %d", a.status)
	}
	// The attacker has an object of that length, anywhere that is listed.
	bait := hub.Blob("evil/bait", bytes.Repeat([]byte("z"), len(page)))
	d.get("/v2/evil/bait/blobs/"+bait.String()+"?ns=hub.test").must(t, 200)
	d.stored(cache.ListedDomain, bait)
	d.get(blobPath("app", bait))
	if a := d.get(blobPath("app", img.Layers[0])); a.status == 200 {
		t.Errorf("anonymous has %d bytes of what the registry shows him a sign-on page for: %s", len(a.body), a.header.Get("Cache-Status"))
	}
}

// TestOneSilentRepositoryTakesNoTimeFromOthers: a registry that takes longer than
// one that was silent is given.
func TestOneSilentRepositoryTakesNoTimeFromOthers(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 1000))
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if strings.Contains(req.URL.Path, "/silent/") {
			<-req.Context().Done()
			return true
		}
		late := time.NewTimer(1200 * time.Millisecond)
		defer late.Stop()
		<-late.C
		return false
	}
	d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
	d.get(blobPath("silent/x", digest.FromString("x")))
	for range 3 {
		a := d.get(manifestPath("app", "v1"))
		if a.status != 200 {
			t.Errorf("%d", a.status)
		}
	}
}

// TestStaleForTheNodeIsNotForWhoMakesASilence: b has a repository that hangs, and
// asks for what the registry would refuse him.
func TestStaleForTheNodeIsNotForWhoMakesASilence(t *testing.T) {
	t.Parallel()
	rules := DefaultRules()
	rules.StaleIfError, rules.StaleForNode = time.Hour, true
	r, d := private(t, "Basic", setup{rules: &rules})
	layer := random(1, 100_000)
	img := r.Image("private/app", "v1", layer)
	auth := r.Access.Login("private/app", "a")
	r.Hook = nil
	d.get(manifestPath("private/app", "v1"), auth...).must(t, 200)
	d.get(blobPath("private/app", img.Layers[0]), auth...).must(t, 200)
	d.stored(cache.ListedDomain, img.Layers[0])
	r.Latency = 1200 * time.Millisecond
	// b's own repository hangs.
	access := r.Access
	access.Allow("silent/x", "b")
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if strings.Contains(req.URL.Path, "/silent/") {
			<-req.Context().Done()
			return true
		}
		return false
	}
	b := access.Login("private/app", "b")
	if a := d.get(blobPath("private/app", img.Layers[0]), b...); a.status == 200 {
		t.Fatal("control")
	}
	d.get(blobPath("silent/x", digest.FromString("x")), access.Login("silent/x", "b")...)
	a := d.get(blobPath("private/app", img.Layers[0]), b...)
	if a.status == 200 {
		t.Errorf("b has %d bytes of private/app", len(a.body))
	}
}

// TestADownloadWhoseYesCrossedARefusalIsNotFinished.
func TestADownloadWhoseYesCrossedARefusalIsNotFinished(t *testing.T) {
	t.Parallel()
	r, d := private(t, "Basic", setup{})
	layer := random(1, 1<<20)
	img := r.Image("private/app", "v1", layer)
	auth := r.Access.Login("private/app", "a")
	asked, release := make(chan struct{}), make(chan struct{})
	hold := true
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if hold && strings.HasSuffix(req.URL.Path, img.Layers[0].String()) {
			hold = false
			r.Answer(&slowHeaders{ResponseWriter: w, asked: asked, release: release}, req)
			return true
		}
		return false
	}
	done := make(chan answer, 1)
	go func() { done <- d.get(blobPath("private/app", img.Layers[0]), auth...) }()
	<-asked
	r.Access.Revoke("private/app", "a")
	d.head(manifestPath("private/app", "v1"), auth...).must(t, 403)
	close(release)
	<-done
	d.stored(cache.ListedDomain, img.Layers[0])
	r.Reset()
	a := d.get(blobPath("private/app", img.Layers[0]), append([]string{"Range", "bytes=1-"}, auth...)...)
	if a.status == 206 {
		t.Errorf("%d bytes go to who was told 403, and nobody asks", len(a.body))
	}
}
