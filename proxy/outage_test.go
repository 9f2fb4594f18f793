// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

// none has each path asked for, with a registry that is away, and nothing may
// be answered.
func none(t *testing.T, d *tarnd, img registrytest.Image, auth ...string) {
	t.Helper()
	for _, path := range []string{manifestPath("app", "v1"), manifestPath("app", img.Manifest.String()), blobPath("app", img.Layers[0])} {
		if a := d.get(path, auth...); a.status < 400 {
			t.Errorf("%s: %d %s, %d bytes", path, a.status, a.header.Get("Cache-Status"), len(a.body))
		}
	}
}

func allStored(t *testing.T, d *tarnd, img registrytest.Image) {
	t.Helper()
	for _, one := range append([]digest.Digest{img.Manifest, img.Config}, img.Layers...) {
		d.stored(cache.ListedDomain, one)
	}
}

// TestStaleNeverAfterATagsEnd: it was deleted, or is hidden from who asks; a
// 410 and a 451 are such words, too.
func TestStaleNeverAfterATagsEnd(t *testing.T) {
	t.Parallel()
	for _, code := range []int{404, 410, 451} {
		for _, user := range []string{"", "a"} {
			t.Run(fmt.Sprint(code, user), func(t *testing.T) {
				t.Parallel()
				access := registrytest.NewAccess(t, "Basic")
				access.Allow("app", user)
				auth := access.Login("app", user)
				r, l, d, img, layer := away(t, access, time.Hour)
				pull(t, d, img, layer, auth...)
				allStored(t, d, img)
				d.advance(5 * time.Minute)
				status(code)(l, r)
				d.get(manifestPath("app", "v1"), auth...)
				d.advance(time.Minute)
				l.set("refuse")
				none(t, d, img, auth...)
			})
		}
	}
}

// TestStaleNeverAfterARefusalAndACrash: the process ends as soon as the client
// has heard of it.
func TestStaleNeverAfterARefusalAndACrash(t *testing.T) {
	t.Parallel()
	access := registrytest.NewAccess(t, "Basic")
	access.Allow("app", "a")
	auth := access.Login("app", "a")
	r, l, d, img, layer := away(t, access, time.Hour)
	pull(t, d, img, layer, auth...)
	allStored(t, d, img)
	if err := d.cache.Index().Sync(); err != nil {
		t.Fatal(err)
	}
	crash := func(s setup) *tarnd {
		s.dir = t.TempDir()
		if err := os.CopyFS(s.dir, os.DirFS(d.options.dir)); err != nil {
			t.Fatal(err)
		}
		if err := filepath.WalkDir(s.dir, func(path string, e os.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				err = os.Chmod(path, 0o600)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return start(t, s)
	}
	d.advance(5 * time.Minute)
	r.Delete("app", "blobs", img.Layers[0])
	d.get(blobPath("app", img.Layers[0]), auth...).must(t, 404)
	one := crash(d.options)
	access.Revoke("app", "a")
	d.get(manifestPath("app", "v1"), auth...).must(t, 403)
	two := crash(d.options)
	l.set("refuse")
	if a := one.get(blobPath("app", img.Layers[0]), auth...); a.status < 400 {
		t.Errorf("deleted, and served: %d %s", a.status, a.header.Get("Cache-Status"))
	}
	none(t, two, img, auth...)
}

// TestStaleNeverForWhomAPortalSaidYesTo: for a while something else answers
// everybody.
func TestStaleNeverForWhomAPortalSaidYesTo(t *testing.T) {
	t.Parallel()
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			access := registrytest.NewAccess(t, "Basic")
			access.Allow("app", "a")
			_, l, d, img, layer := away(t, access, time.Hour)
			pull(t, d, img, layer, access.Login("app", "a")...)
			allStored(t, d, img)
			portal := registrytest.New(t)
			var answers atomic.Int64
			portal.Hook = func(w http.ResponseWriter, q *http.Request) bool {
				if strings.Contains(q.URL.Path, "/blobs/") {
					answers.Add(1)
				}
				w.Header().Set("Content-Type", "application/octet-stream")
				w.Write([]byte("please sign in"))
				return true
			}
			l.set("refuse")
			l.mu.Lock()
			registry := l.to
			l.to = portal.Address()
			l.mu.Unlock()
			l.set("")
			stranger := []string{"Authorization", registrytest.Basic("mallory", "whatever")}
			ask := func() { d.do(method, blobPath("app", digest.FromString("nothing")), stranger...) }
			eventually(t, "the portal is asked", func() bool { ask(); return answers.Load() > 0 })
			l.set("refuse")
			l.mu.Lock()
			l.to = registry
			l.mu.Unlock()
			d.advance(5 * time.Minute)
			none(t, d, img, stranger...)
		})
	}
}

// TestStaleOfWhatIsGoneIsAnError: the registry's own, also to a HEAD.
func TestStaleOfWhatIsGoneIsAnError(t *testing.T) {
	t.Parallel()
	_, l, d, img, layer := away(t, nil, time.Hour)
	pull(t, d, img, layer)
	allStored(t, d, img)
	s := d.options
	d.stop()
	for _, one := range []digest.Digest{img.Manifest, img.Layers[0]} {
		path := filepath.Join(s.dir, "blobs", "sha256", one.Encoded())
		body, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		body[0] ^= 1
		if err := os.WriteFile(path, body, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l.set("refuse")
	again := start(t, s)
	for _, path := range []string{manifestPath("app", "v1"), manifestPath("app", img.Manifest.String()), blobPath("app", img.Layers[0])} {
		if a := again.get(path); a.status != 502 && !(a.status == 200 && a.err != nil) {
			t.Errorf("GET %s: %d %v", path, a.status, a.err)
		}
		if a := again.head(path); a.status != 502 || a.header.Get("Age") != "" {
			t.Errorf("HEAD %s: %d %v", path, a.status, a.header)
		}
	}
}

// TestATagIsNotStaleWhereTheRegistryAnswers: a request that waits for its turn
// has its own time.
func TestATagIsNotStaleWhereTheRegistryAnswers(t *testing.T) {
	t.Parallel()
	r, _, d, img, layer := away(t, nil, time.Hour)
	pull(t, d, img, layer)
	moved := r.Image("app", "v2", random(7, 100))
	arrived, answer := make(chan chan string, 3), make([]chan string, 0, 3)
	r.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		if q.Method != http.MethodHead || !strings.HasSuffix(q.URL.Path, "/manifests/v1") {
			return false
		}
		says := make(chan string)
		arrived <- says
		w.Header().Set("Docker-Content-Digest", <-says)
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.Header().Set("Content-Length", fmt.Sprint(len(img.Body)))
		return true
	}
	var wg sync.WaitGroup
	ask := func(want digest.Digest) {
		wg.Go(func() {
			if a := d.head(manifestPath("app", "v1")); a.status != 200 || a.header.Get("Docker-Content-Digest") != want.String() {
				t.Errorf("%d %s %s", a.status, a.header.Get("Cache-Status"), a.header.Get("Docker-Content-Digest"))
			}
		})
	}
	for range 2 {
		ask(img.Manifest)
		answer = append(answer, <-arrived)
	}
	ask(moved.Manifest)
	eventually(t, "the third waits", func() bool {
		d.proxy.fresh.mu.Lock()
		defer d.proxy.fresh.mu.Unlock()
		for _, q := range d.proxy.fresh.queues {
			return q.gathering != nil
		}
		return false
	})
	// Each has two thirds of its time; together they are too long for one.
	long := time.NewTimer(staleHead * 2 / 3)
	<-long.C
	for _, a := range answer {
		a <- img.Manifest.String()
	}
	third := <-arrived
	long.Reset(staleHead * 2 / 3)
	<-long.C
	third <- moved.Manifest.String()
	wg.Wait()
}

// TestA503ForALimitSaysForHowLong, whatever the registry says or does not.
func TestA503ForALimitSaysForHowLong(t *testing.T) {
	t.Parallel()
	for said, want := range map[string]string{"": "1", "soon": "1", "0": "1", "Wed, 21 Oct 2015 07:28:00 GMT": "1", "99999999999999999999": "60", "3600": "60", "17": "17"} {
		r, _, d, _, _ := away(t, nil, 0)
		r.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Retry-After", said)
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}
		if got := d.get(manifestPath("app", "v1")).must(t, 503).header.Get("Retry-After"); got != want {
			t.Errorf("%q became %q, want %q", said, got, want)
		}
	}
}
