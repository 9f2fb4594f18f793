// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"fmt"
	"io"
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
)

// fault is how an upstream breaks a body that should have been blob.
type fault struct {
	name  string
	serve func(w http.ResponseWriter, blob []byte)
	// heals: the rest can be asked for, and the reader sees nothing of it.
	heals bool
}

func sized(w http.ResponseWriter, n int) { w.Header().Set("Content-Length", fmt.Sprint(n)) }

func flipped(blob []byte, at int) []byte {
	b := bytes.Clone(blob)
	b[at] ^= 1
	return b
}

var faults = []fault{
	{"one flipped byte at the start", func(w http.ResponseWriter, b []byte) { sized(w, len(b)); w.Write(flipped(b, 0)) }, false},
	{"one flipped byte at the end", func(w http.ResponseWriter, b []byte) { sized(w, len(b)); w.Write(flipped(b, len(b)-1)) }, false},
	{"a body shorter than its length", func(w http.ResponseWriter, b []byte) { sized(w, len(b)); w.Write(b[:len(b)*2/3]) }, true},
	{"a short body with its own length", func(w http.ResponseWriter, b []byte) { sized(w, len(b)-1); w.Write(b[:len(b)-1]) }, false},
	{"a long body with its own length", func(w http.ResponseWriter, b []byte) { sized(w, len(b)+1); w.Write(append(bytes.Clone(b), 0)) }, false},
	{"an empty body", func(w http.ResponseWriter, b []byte) { sized(w, 0) }, false},
	{"no length, one flipped byte", func(w http.ResponseWriter, b []byte) { w.(http.Flusher).Flush(); w.Write(flipped(b, len(b)/2)) }, false},
	{"no length, cut", func(w http.ResponseWriter, b []byte) {
		w.(http.Flusher).Flush()
		w.Write(b[:len(b)/2])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}, true},
	{"no length, a byte too many", func(w http.ResponseWriter, b []byte) { w.(http.Flusher).Flush(); w.Write(b); w.Write([]byte{0}) }, false},
}

// broken has a registry whose next GETs of blobs break, n of them.
func broken(r *registrytest.Registry, f fault, blob []byte, n int32) *atomic.Int32 {
	var left atomic.Int32
	left.Store(n)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" || filepath.Base(filepath.Dir(req.URL.Path)) != "blobs" || left.Add(-1) < 0 {
			return false
		}
		f.serve(w, blob)
		return true
	}
	return &left
}

// wholes is every state of the store that a broken body may meet: room for the
// object, and none, so that it passes through.
var wholes = []struct {
	name    string
	maxSize int64
}{{"stored", 1 << 30}, {"passing through", 100 << 10}}

func TestWholeNobodyAssemblesAWrongObject(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1000, 64 << 10, 64<<10 + 1, 1 << 20} {
		for _, f := range faults {
			for _, room := range wholes {
				t.Run(fmt.Sprintf("%s, %d bytes, %s", f.name, size, room.name), func(t *testing.T) {
					t.Parallel()
					r := registrytest.New(t)
					d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, maxSize: room.maxSize})
					blob := random(1, size)
					dgst := r.Blob("app", blob)
					broken(r, f, blob, 1)

					first := d.get(blobPath("app", dgst))
					if whole := first.status == 200 && first.err == nil && len(first.body) >= size; whole && !bytes.Equal(first.body, blob) {
						t.Fatalf("a complete wrong object: %d bytes, %s", len(first.body), digest.FromBytes(first.body))
					} else if whole != f.heals {
						t.Errorf("what was missing was asked for: %v", whole)
					}
					if !f.heals && d.has(cache.ListedDomain, dgst) {
						t.Fatal("stored")
					}
					// Resume from what arrived, as containerd does. What comes
					// must not complete it, unless the whole is right.
					if got := len(first.body); got > 0 && first.status == 200 {
						rest := d.get(blobPath("app", dgst), "Range", fmt.Sprintf("bytes=%d-", got))
						whole := append(bytes.Clone(first.body), rest.body...)
						if rest.status == 206 && rest.err == nil && len(whole) == size && !bytes.Equal(whole, blob) {
							t.Fatalf("resumed at %d of %d: a complete wrong object", got, size)
						}
					}
					// From byte 0 it is right, and then it is stored.
					d.get(blobPath("app", dgst)).mustBe(t, blob)
					if room.name == "stored" && size < 1<<19 {
						d.stored(cache.ListedDomain, dgst)
					}
				})
			}
		}
	}
}

func TestWholeParallelRangesOfABrokenBodyDoNotAddUp(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	const size, piece = 1 << 20, 1 << 18
	blob := random(1, size)
	dgst := r.Blob("app", blob)
	broken(r, faults[0], blob, 1) // the first byte is wrong, all else right
	var whole []byte
	for i := range size / piece { // one after the other: the first leaves early
		p := d.get(blobPath("app", dgst), "Range", fmt.Sprintf("bytes=%d-%d", i*piece, (i+1)*piece-1))
		if p.status == 206 && p.err == nil {
			whole = append(whole, p.body...)
		}
	}
	if len(whole) == size && !bytes.Equal(whole, blob) {
		t.Fatal("four ranges made a complete wrong object")
	}
}

// TestARangeOfWhatPassesThroughIsTheRegistrysOwn: three clients that read what there is
// no room for in parts have asked for three copies; a part is what the registry said,
// which each client checks, and all of it is checked by tarn.
func TestARangeOfWhatPassesThroughIsTheRegistrysOwn(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, maxSize: 100 << 10})
	const size, piece, clients = 32 << 20, 1 << 20, 3
	blob := random(1, size)
	dgst := r.Blob("app", blob)
	for range clients {
		for at := 0; at < size; at += piece {
			p := d.get(blobPath("app", dgst), "Range", fmt.Sprintf("bytes=%d-%d", at, at+piece-1))
			if p.status != 206 || p.err != nil || !bytes.Equal(p.body, blob[at:at+piece]) {
				t.Fatalf("%d, %d bytes: %v", p.status, len(p.body), p.err)
			}
		}
	}
	asked := int64(0)
	for _, e := range r.Exchanges() {
		var from, to int64
		if e.Method != "GET" || !strings.Contains(e.Path, "/blobs/") {
			continue
		} else if n, err := fmt.Sscanf(e.Range, "bytes=%d-%d", &from, &to); n != 2 {
			t.Fatalf("all of it was asked for: %q: %v", e.Range, err)
		}
		asked += min(to, size-1) - from + 1
	}
	if asked > clients*size*105/100 {
		t.Errorf("%d bytes were asked for, to give %d", asked, clients*size)
	}
	if tail := d.get(blobPath("app", dgst), "Range", "bytes=-5"); tail.status != 206 || !bytes.Equal(tail.body, blob[size-5:]) {
		t.Errorf("the last bytes: %d, %q: %v", tail.status, tail.body, tail.err)
	}
	d.get(blobPath("app", dgst)).mustBe(t, blob)
}

func TestWholeManyReadersOfABrokenBodyAreAllCut(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	blob := random(1, 1<<20)
	dgst := r.Blob("app", blob)
	gate := make(chan struct{})
	var gets atomic.Int32
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" || gets.Add(1) > 1 {
			return false
		}
		sized(w, len(blob))
		w.Write(blob[:1<<19])
		w.(http.Flusher).Flush()
		<-gate
		w.Write(flipped(blob, len(blob)-1)[1<<19:])
		return true
	}
	var wg sync.WaitGroup
	for range 10 {
		resp, err := http.Get(d.URL + blobPath("app", dgst))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer resp.Body.Close()
			if got, err := io.ReadAll(resp.Body); err == nil {
				t.Errorf("%d bytes without an error", len(got))
			}
		})
	}
	close(gate)
	wg.Wait()
	d.get(blobPath("app", dgst), "Range", "bytes=500000-").must(t, 502)
	d.get(blobPath("app", dgst), "Range", "bytes=0-").must(t, 206)
	// Another credential may have read something of the bad one, for all that is kept.
	d.get(blobPath("app", dgst), "Range", "bytes=500000-", "Authorization", "Basic eDp5").must(t, 502)
}

func TestWholeAfterARestartInMidFlight(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	blob := random(1, 1<<20)
	dgst := r.Blob("app", blob)
	gate := make(chan struct{})
	var once sync.Once
	open := func() { once.Do(func() { close(gate) }) }
	defer open()
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		sized(w, len(blob))
		w.Write(flipped(blob, 0)[:1<<19])
		w.(http.Flusher).Flush()
		<-gate
		return true
	}
	resp, err := http.Get(d.URL + blobPath("app", dgst))
	if err != nil {
		t.Fatal(err)
	}
	prefix := make([]byte, 1000)
	if _, err := io.ReadFull(resp.Body, prefix); err != nil {
		t.Fatal(err)
	}
	// As after a kill: the pending file is there, and the lock is free.
	copied := t.TempDir()
	for _, sub := range []string{"pending", "blobs/sha256"} {
		copyDir(t, filepath.Join(d.options.dir, sub), filepath.Join(copied, sub))
	}
	if left, _ := filepath.Glob(filepath.Join(copied, "pending", "*")); len(left) != 1 {
		t.Fatalf("pending files: %v", left)
	}
	resp.Body.Close()
	open()
	d.stop()
	r.Hook = nil

	again := start(t, setup{dir: copied, listed: d.options.listed})
	again.get(blobPath("app", dgst), "Range", "bytes=1000-").must(t, 502)
	again.get(blobPath("app", dgst)).mustBe(t, blob)
	if left, _ := filepath.Glob(filepath.Join(copied, "pending", "*")); len(left) > 1 {
		t.Fatalf("pending files were not swept: %v", left)
	}
}

func copyDir(t testing.TB, from, to string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

func TestWhatDoesNotFitPassesThrough(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, maxSize: 300 << 10})
	blob := random(1, 1<<20)
	dgst := r.Blob("app", blob)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if i%2 == 0 {
				d.get(blobPath("app", dgst)).mustBe(t, blob).mustSay(t, "Cache-Status", "tarn; fwd=bypass; fwd-status=200; detail=not-storable")
				return
			}
			from := i * 100_000
			a := d.get(blobPath("app", dgst), "Range", fmt.Sprintf("bytes=%d-", from), "Authorization", fmt.Sprint("Basic ", i)).must(t, 206)
			if !bytes.Equal(a.body, blob[from:]) {
				t.Errorf("range from %d: wrong bytes", from)
			}
		})
	}
	wg.Wait()
	if d.has(cache.ListedDomain, dgst) {
		t.Error("stored past max_size")
	}
	small := random(2, 10_000)
	sd := r.Blob("app", small)
	d.get(blobPath("app", sd)).mustBe(t, small)
	d.stored(cache.ListedDomain, sd)
}

func TestWhoLeavesAStreamOfItsOwnMayResumeIt(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, maxSize: 100 << 10})
	blob := random(1, 1<<20)
	dgst := r.Blob("app", blob)
	for i, cut := range []struct {
		name string
		hook func(w http.ResponseWriter, req *http.Request) bool
	}{
		{"the client leaves", nil},
		{"the upstream breaks", func(w http.ResponseWriter, req *http.Request) bool {
			sized(w, len(blob))
			w.Write(blob[:1<<19])
			return true
		}},
	} {
		r.Hook = cut.hook
		resp, err := http.Get(d.URL + blobPath("app", dgst))
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 1000)
		if _, err := io.ReadFull(resp.Body, got); err != nil {
			t.Fatal(err)
		}
		if cut.hook != nil {
			if _, err := io.Copy(io.Discard, resp.Body); err == nil {
				t.Fatal("a cut body ended well")
			}
		}
		resp.Body.Close()
		r.Hook = nil
		// What it may hold is written down when its answer has ended.
		eventually(t, "the answer has ended", func() bool {
			return bytes.Count(d.log.take(), []byte(`"status":200`)) == i+1
		})
		a := d.get(blobPath("app", dgst), "Range", "bytes=1000-").must(t, 206)
		if !bytes.Equal(append(got, a.body...), blob) {
			t.Errorf("%s: the resumed blob is wrong", cut.name)
		}
	}
}

func TestEverythingSurvivesARestart(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 100_000), random(2, 200_000))
	d.get(manifestPath("app", "v1")).must(t, 200)
	for _, l := range img.Layers {
		d.get(blobPath("app", l)).must(t, 200)
	}
	d.stop() // commits what is verified
	again := start(t, d.options)
	r.Reset()
	again.get(manifestPath("app", "v1")).mustBe(t, img.Body).mustSay(t, "Cache-Status", "tarn; fwd=stale; fwd-status=200; detail=confirmed")
	for _, l := range img.Layers {
		again.get(blobPath("app", l)).must(t, 200).mustSay(t, "Cache-Status", "tarn; hit")
	}
	if n := r.Count("GET", ""); n != 0 {
		t.Fatalf("%d GETs after a restart", n)
	}
}

func TestABrokenOrLostIndexIsRebuiltFromTheBlobs(t *testing.T) {
	t.Parallel()
	for name, hurt := range map[string]func(path string) error{
		"lost":      os.Remove,
		"zeroed":    func(p string) error { return os.WriteFile(p, make([]byte, 1<<16), 0o600) },
		"cut":       func(p string) error { return os.Truncate(p, 5000) },
		"no index":  func(p string) error { return os.WriteFile(p, []byte("hello"), 0o600) },
		"scrambled": func(p string) error { return scramble(p) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, d := one(t)
			img := r.Image("app", "v1", random(1, 100_000))
			d.get(manifestPath("app", "v1")).must(t, 200)
			d.get(blobPath("app", img.Layers[0])).must(t, 200)
			d.stop()
			if err := hurt(filepath.Join(d.options.dir, "index.db")); err != nil {
				t.Fatal(err)
			}
			// A file that is not what its name says, too.
			bad := digest.FromString("bad")
			if err := os.WriteFile(filepath.Join(d.options.dir, "blobs/sha256", bad.Encoded()), []byte("worse"), 0o600); err != nil {
				t.Fatal(err)
			}
			again := start(t, d.options)
			again.stored(cache.ListedDomain, img.Layers[0])
			again.stored(cache.ListedDomain, img.Manifest)
			eventually(t, "all strays are settled", func() bool { return again.cache.Stats().Adopting == 0 })
			r.Reset()
			again.get(manifestPath("app", "v1")).mustBe(t, img.Body)
			again.get(blobPath("app", img.Layers[0])).must(t, 200)
			for _, e := range r.Exchanges() {
				if e.Method == "GET" && e.Range != "bytes=0-0" {
					t.Errorf("after the rebuild: %v", e)
				}
			}
			if _, err := os.Stat(filepath.Join(again.options.dir, "blobs/sha256", bad.Encoded())); !os.IsNotExist(err) {
				t.Errorf("the bad file: %v", err)
			}
		})
	}
}

// scramble flips bytes all over the pages behind the two meta pages.
func scramble(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for i := 2 * 4096; i < len(b); i += 97 {
		b[i] ^= 0xff
	}
	return os.WriteFile(path, b, 0o600)
}

func TestAFileThatWasCutOnDiskIsFetchedAnew(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	blob := random(1, 100_000)
	dgst := r.Blob("app", blob)
	d.get(blobPath("app", dgst)).must(t, 200)
	d.stored(cache.ListedDomain, dgst)
	path := filepath.Join(d.options.dir, "blobs/sha256", dgst.Encoded())
	for _, hurt := range []func() error{func() error { return os.Truncate(path, 99_999) }, func() error { return os.Remove(path) }} {
		eventually(t, "the flight has landed", func() bool { return d.cache.Stats().Flights == 0 })
		if err := hurt(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the row is dropped", func() bool {
			return bytes.Equal(d.get(blobPath("app", dgst)).mustBe(t, blob).body, blob) && !d.has(cache.ListedDomain, dgst) || r.Count("GET", "") > 1
		})
		d.get(blobPath("app", dgst)).mustBe(t, blob)
		d.stored(cache.ListedDomain, dgst)
		r.Reset()
	}
}
