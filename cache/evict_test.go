// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tarn/blobstore"
	"tarn/cache/store"
	"tarn/images"
	"tarn/index"
	"tarn/internal/manifest"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// directory is what a directory takes on disk, as du has it. Meanwhile files
// come and go.
func directory(dir string) (n int64) {
	filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := e.Info(); err == nil {
			n += blobstore.Allocated(info)
		}
		return nil
	})
	return n
}

// watch looks at what a directory takes on disk until it is told to stop, and then
// says how much that was at most. Files come and go while it walks, so it counts
// what it meets twice in succession: all that was there in between.
func watch(dir string) (stop func() int64) {
	var most int64
	var before map[uint64]int64
	look := func() {
		now := make(map[uint64]int64)
		filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
			if err != nil {
				return nil
			}
			if info, err := e.Info(); err == nil {
				now[info.Sys().(*syscall.Stat_t).Ino] = blobstore.Allocated(info)
			}
			return nil
		})
		var n int64
		for inode, alloc := range now {
			n += min(alloc, before[inode])
		}
		most, before = max(most, n), now
	}
	done := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			look()
			select {
			case <-done:
				return
			default:
			}
		}
	})
	return func() int64 {
		close(done)
		watching.Wait()
		return most
	}
}

// TestAnIndexThatGrowsMakesRoomFirst: manifests that lead to as much as one can,
// of which the index takes nearly as much again as they do, and all at once.
func TestAnIndexThatGrowsMakesRoomFirst(t *testing.T) {
	t.Parallel()
	const bound, manifests, children = 40 << 20, 48, manifest.MaxDescriptors
	dir := t.TempDir()
	c := openChaos(t, dir, bound)
	defer c.Close()
	stop := watch(dir)
	var pulling sync.WaitGroup
	for i := range manifests {
		var body bytes.Buffer
		for j := range children {
			fmt.Fprintf(&body, `,{"digest":"%s"}`, digest.FromString(fmt.Sprint(i, j)))
		}
		b := append([]byte(`{"manifests":[`), append(body.Bytes()[1:], "]}"...)...)
		pulling.Go(func() {
			req := parallelRequest(&origin{body: b}, "one")
			req.Check = func([]byte) error { return nil }
			if got, err := readAll(c, req); err != nil || !bytes.Equal(got, b) {
				t.Errorf("%d bytes of %d: %v", len(got), len(b), err)
			}
		})
	}
	pulling.Wait()
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	if err := c.Index().Sync(); err != nil {
		t.Error(err)
	}
	var last []byte
	for range 2 * bound >> 20 { // and for what they leave room for, they go
		last = randomBytes(1 << 20)
		if got, err := readAll(c, parallelRequest(&origin{body: last}, "one")); err != nil || !bytes.Equal(got, last) {
			t.Fatalf("%d bytes: %v", len(got), err)
		}
	}
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	if _, ok := c.Has(Key{Domain: ListedDomain, Digest: digest.FromBytes(last)}); !ok {
		t.Error("nothing is stored any more")
	}
	most, s := stop(), c.Stats()
	t.Logf("at most %d of %d bytes: %+v", most, bound, s)
	if most > bound {
		t.Error("that is over the bound")
	}
	if info, err := os.Stat(filepath.Join(dir, "index.db")); err != nil || info.Size() < manifests/8*children*71 {
		t.Errorf("the index has not grown by what the test is about: %v, %v", info.Size(), err)
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

// TestAListThatGrowsMakesRoomFirst: a full store gets an image of which thousands of
// tags are known.
func TestAListThatGrowsMakesRoomFirst(t *testing.T) {
	t.Parallel()
	const bound, tags = 8 << 20, 5_000
	dir := t.TempDir()
	c := openChaos(t, dir, bound)
	defer c.Close()
	b := buildImage(randomBytes(1000), 1000)
	var last string
	for i := range tags {
		last = fmt.Sprintf("tag%0100d", i)
		c.Index().NoteTag(appKey.TagKey(last), index.Tag{Digest: b.indexDigest, Sequence: uint64(i + 2), Confirmed: time.Now()})
	}
	for c.Stats().Evicted.Objects == 0 { // the first of them takes the tags along
		if _, err := readAll(c, parallelRequest(&origin{body: randomBytes(64 << 10)}, "one")); err != nil {
			t.Fatal(err)
		}
	}
	stop := watch(dir)
	pullImage(t, c, "", 0, b.own()...)
	settle(t, "the list", func() bool {
		list, err := os.ReadFile(filepath.Join(dir, store.ListName))
		return err == nil && bytes.Contains(list, []byte(last))
	})
	most := stop()
	t.Logf("at most %d of %d bytes: %+v", most, bound, c.Stats())
	if most > bound {
		t.Error("that is over the bound")
	}
}

// TestTheBoundHoldsWhileFourTimesAsMuchIsPulled looks all the time at what counts,
// and in the end at what there is.
func TestTheBoundHoldsWhileFourTimesAsMuchIsPulled(t *testing.T) {
	t.Parallel()
	const bound, n, clients = 24 << 20, 80, 8
	dir := t.TempDir()
	c := openChaos(t, dir, bound)
	defer c.Close()
	r := rand.New(rand.NewPCG(1, 1))
	bodies := make([][]byte, n)
	for i := range bodies {
		bodies[i] = randomBytes(1000 + r.IntN(2<<20))
	}
	var most atomic.Int64
	done := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				s := c.Stats()
				most.Store(max(most.Load(), s.UsedBytes+s.PendingBytes))
			}
		}
	})
	var passed atomic.Int32
	var pulling sync.WaitGroup
	for client := range clients {
		pulling.Go(func() {
			for i := client; i < n; i += clients {
				req := parallelRequest(&origin{body: bodies[i]}, "one")
				o, err := c.Open(t.Context(), req)
				if err != nil {
					t.Error(err)
					continue
				}
				if o.Source == Passed {
					passed.Add(1)
				}
				got, err := io.ReadAll(o.Content)
				o.Close()
				if err != nil || !bytes.Equal(got, bodies[i]) {
					t.Errorf("%d bytes of %d: %v", len(got), len(bodies[i]), err)
				}
			}
		})
	}
	pulling.Wait()
	close(done)
	watching.Wait()
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	s := c.Stats()
	t.Logf("at most %d of %d bytes, %d evicted, %d of %d objects passed by", most.Load(), bound, s.Evicted.Objects, passed.Load(), n)
	// The index's next growth counts before it takes anything.
	if most.Load() > bound+256<<10 {
		t.Error("that is over the bound")
	}
	if n := directory(dir); n > s.UsedBytes {
		t.Errorf("%d bytes are on the disk, and %d count", n, s.UsedBytes)
	}
	if s.Evicted.Objects == 0 || passed.Load() > n/4 || s.Trouble != "" {
		t.Errorf("%+v", s)
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

// TestWholeWhatIsReadWhileItIsEvicted: readers come for objects that must go for
// each other. Everybody gets all bytes of his, and the room is free when the last
// one has gone.
func TestWholeWhatIsReadWhileItIsEvicted(t *testing.T) {
	t.Parallel()
	const races, readers, n = 1000, 4, 16
	c := openChaos(t, t.TempDir(), 5<<20)
	defer c.Close()
	bodies := make([][]byte, n)
	for i := range bodies {
		bodies[i] = randomBytes(400_000 + i)
	}
	var reading sync.WaitGroup
	for reader := range readers {
		reading.Go(func() {
			r := rand.New(rand.NewPCG(uint64(reader), 2))
			for range races / readers {
				body := bodies[r.IntN(n)]
				got, err := readAll(c, parallelRequest(&origin{body: body}, "one"))
				if err != nil || !bytes.Equal(got, body) {
					t.Errorf("%d bytes: %v", len(got), err)
				}
			}
		})
	}
	reading.Wait()
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	s := c.Stats()
	t.Logf("%d were evicted", s.Evicted.Objects)
	if s.Evicted.Objects < races/20 {
		t.Errorf("%+v", s)
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

// TestWhatIsOpenStaysAndCountsToTheEnd: room is not made of what somebody reads,
// and what is dropped all the same counts until he has gone.
func TestWhatIsOpenStaysAndCountsToTheEnd(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 4<<20)
	defer c.Close()
	first, second, third := randomBytes(1<<20), randomBytes(3<<19), randomBytes(2<<20)
	pull := func(body []byte) Source {
		t.Helper()
		o, err := c.Open(t.Context(), parallelRequest(&origin{body: body}, "one"))
		if err != nil {
			t.Fatal(err)
		}
		defer o.Close()
		got, err := io.ReadAll(o.Content)
		if err != nil || !bytes.Equal(got, body) {
			t.Errorf("%d bytes: %v", len(got), err)
		}
		return o.Source
	}
	stored := func(body []byte) bool {
		_, ok := c.Has(Key{Domain: ListedDomain, Digest: digest.FromBytes(body)})
		return ok
	}
	for _, body := range [][]byte{first, second} {
		pull(body)
		waitStored(t, c, Key{Domain: ListedDomain, Digest: digest.FromBytes(body)})
	}
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	open, err := c.Open(t.Context(), Request{Key: Key{Domain: ListedDomain, Digest: digest.FromBytes(first)}, Reader: "two", Authorised: true})
	if err != nil || open.Source != Hit {
		t.Fatal(err)
	}
	half := make([]byte, len(first)/2)
	if _, err := io.ReadFull(open.Content, half); err != nil {
		t.Fatal(err)
	}
	if s := pull(third); s != Fetched {
		t.Errorf("it was not stored: %v", s)
	}
	if !stored(first) || stored(second) {
		t.Error("what is read was evicted, or what is not was not")
	}
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	used := c.Stats().UsedBytes
	c.store.Hashed(digest.FromBytes(first), look(t, c, first), false)
	settle(t, "the dropped", func() bool { return !stored(first) })
	if now := c.Stats().UsedBytes; now < used {
		t.Errorf("%d bytes fewer count while it is read", used-now)
	}
	rest, err := io.ReadAll(open.Content)
	if err != nil || !bytes.Equal(append(half, rest...), first) {
		t.Errorf("%d bytes: %v", len(half)+len(rest), err)
	}
	open.Close()
	settle(t, "the bytes that count", func() bool { return c.Stats().UsedBytes <= used-int64(len(first)) })
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

func look(t *testing.T, c *Cache, body []byte) fs.FileInfo {
	t.Helper()
	info, err := os.Lstat(c.store.Path(digest.FromBytes(body)))
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// TestALowerBoundIsReachedAtStart: files are missing, others are nobody's, and the
// bound is lower than it was; requests are served at once.
func TestALowerBoundIsReachedAtStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<30)
	bodies := make([][]byte, 40)
	for i := range bodies {
		bodies[i] = randomBytes(500_000 + i)
		if _, err := readAll(c, parallelRequest(&origin{body: bodies[i]}, "one")); err != nil {
			t.Fatal(err)
		}
		for range i % 3 { // some are asked for again
			waitStored(t, c, Key{Domain: ListedDomain, Digest: digest.FromBytes(bodies[i])})
			readAll(c, parallelRequest(&origin{body: bodies[i]}, "one"))
		}
	}
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for i, body := range bodies {
		if i%2 == 0 {
			if err := os.Remove(c.store.Path(digest.FromBytes(body))); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range 5 {
		if err := os.WriteFile(filepath.Join(dir, "blobs", "sha256", fmt.Sprint("foreign", i)), make([]byte, 10_000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const bound = 6 << 20
	c = openChaos(t, dir, bound)
	defer c.Close()
	for i, body := range bodies {
		if got, err := readAll(c, parallelRequest(&origin{body: body}, "one")); err != nil || !bytes.Equal(got, body) {
			t.Errorf("%d: %d bytes: %v", i, len(got), err)
		}
	}
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	if n := directory(dir); n > bound {
		t.Errorf("%d bytes on the disk", n)
	}
	if s := c.Stats(); s.Evicted.Objects < 10 || s.UsedBytes+s.PendingBytes > bound {
		t.Errorf("%+v", s)
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

// TestWhatCannotFitEvictsNothing, since it would not help.
func TestWhatCannotFitEvictsNothing(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 4<<20)
	defer c.Close()
	small, large := randomBytes(1<<20), randomBytes(4<<20)
	for _, body := range [][]byte{small, large} {
		if got, err := readAll(c, parallelRequest(&origin{body: body}, "one")); err != nil || !bytes.Equal(got, body) {
			t.Errorf("%d bytes: %v", len(got), err)
		}
		settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	}
	if _, ok := c.Has(Key{Domain: ListedDomain, Digest: digest.FromBytes(small)}); !ok || c.Stats().Evicted.Objects > 0 {
		t.Errorf("%+v", c.Stats())
	}
}

// TestAMovedTagsLayersGoFirst, through a restart, however often they were used.
func TestAMovedTagsLayersGoFirst(t *testing.T) {
	t.Parallel()
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint("restarted ", restart), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			c := openChaos(t, dir, 6<<20)
			defer func() { c.Close() }()
			get := func(body []byte) {
				t.Helper()
				req := parallelRequest(&origin{body: body}, "one")
				if body[0] == '{' {
					req.Check = func([]byte) error { return nil }
				}
				if got, err := readAll(c, req); err != nil || !bytes.Equal(got, body) {
					t.Fatalf("%d bytes: %v", len(got), err)
				}
				waitStored(t, c, req.Key)
			}
			build := func() (layer, manifest []byte) {
				layer = randomBytes(3 << 19)
				manifest = fmt.Appendf(nil, `{"schemaVersion": 2, "layers": [{"digest": %q, "size": %d}]}`, digest.FromBytes(layer), len(layer))
				return layer, manifest
			}
			oldLayer, oldManifest := build()
			newLayer, newManifest := build()
			other, another := randomBytes(3<<19), randomBytes(3<<19)
			for range 5 {
				get(oldManifest)
				get(oldLayer)
			}
			c.NoteTag(appKey.TagKey("k"), index.Tag{Digest: digest.FromBytes(oldManifest), Sequence: 1, Confirmed: time.Now()})
			get(other)
			c.NoteTag(appKey.TagKey("k"), index.Tag{Digest: digest.FromBytes(newManifest), Sequence: 2, Confirmed: time.Now()})
			get(newManifest)
			get(newLayer)
			if restart {
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
				c = openChaos(t, dir, 6<<20)
			}
			get(another)
			_, has := c.Has(Key{Domain: ListedDomain, Digest: digest.FromBytes(oldLayer)})
			_, hasOther := c.Has(Key{Domain: ListedDomain, Digest: digest.FromBytes(other)})
			if has || !hasOther {
				t.Errorf("the old layer is there: %v; another is: %v", has, hasOther)
			}
		})
	}
}

// TestADiskThatDoesNotLetGoMakesNoRoom: what is to be stored passes through, and
// what was to go is served.
func TestADiskThatDoesNotLetGoMakesNoRoom(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"remove blob"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			var bad atomic.Bool
			c, err := New(Options{Dir: t.TempDir(), MaxSize: 3 << 20, Steps: func(name string, do func() error) error {
				if name == step && bad.Load() {
					return errors.New("the disk does not let go")
				}
				return do()
			}})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			first, second := randomBytes(3<<19), randomBytes(3<<19)
			pull := func(body []byte, want Source) {
				t.Helper()
				o, err := c.Open(t.Context(), parallelRequest(&origin{body: body}, "one"))
				if err != nil {
					t.Fatal(err)
				}
				defer o.Close()
				if got, err := io.ReadAll(o.Content); err != nil || !bytes.Equal(got, body) || o.Source != want {
					t.Errorf("%d bytes, %v: %v", len(got), o.Source, err)
				}
			}
			pull(first, Fetched)
			waitStored(t, c, Key{Domain: ListedDomain, Digest: digest.FromBytes(first)})
			settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
			bad.Store(true)
			pull(second, Passed)
			settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
			if err := landed(c); err != nil {
				t.Error(err)
			}
			bad.Store(false)
			pull(second, Fetched)
			waitStored(t, c, Key{Domain: ListedDomain, Digest: digest.FromBytes(second)})
			settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
			if err := landed(c); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestADiskThatIsSlowToMakeRoomIsNotWaitedFor: the object passes by, what is stored
// is served meanwhile, and nothing is left claimed in the end.
func TestADiskThatIsSlowToMakeRoomIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	slow := make(chan struct{})
	c, err := New(Options{Dir: t.TempDir(), MaxSize: 3 << 20, Steps: func(name string, do func() error) error {
		if name == "remove blob" {
			<-slow
		}
		return do()
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	small := randomBytes(100_000)
	pullImage(t, c, "", 0, small)
	for range 3 { // it is dear by now
		pullImage(t, c, "", 0, small)
	}
	for i, want := range []Source{Fetched, Passed} {
		body := randomBytes(3 << 19)
		o, err := c.Open(t.Context(), parallelRequest(&origin{body: body}, "one"))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(o.Content); err != nil || !bytes.Equal(got, body) || o.Source != want {
			t.Errorf("%d: %d bytes, %v: %v", i, len(got), o.Source, err)
		}
		o.Close()
		settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	}
	hit, err := c.Open(t.Context(), Request{Key: Key{Domain: ListedDomain, Digest: digest.FromBytes(small)}, Reader: "two", Authorised: true})
	if err != nil || hit.Source != Hit {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(hit.Content); err != nil || !bytes.Equal(got, small) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	hit.Close()
	close(slow)
	settle(t, "claims", func() bool { s := c.Stats(); return s.PendingBytes == 0 && s.Evicted.Objects == 1 })
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

// mustBeHeld evicts all that may go: an open object may not, until it was read to its
// end.
func mustBeHeld(t *testing.T, c *Cache, o *Object, body []byte) {
	t.Helper()
	if err := c.store.Evict(1 << 40); err != nil {
		t.Fatal(err)
	}
	if !c.has(body) {
		t.Error("it is open, and was evicted")
	}
	got, err := io.ReadAll(struct{ io.Reader }{o.Content})
	o.Close()
	if err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	if err := c.store.Evict(1 << 40); err != nil {
		t.Fatal(err)
	}
	if err := landed(c); err != nil || c.has(body) {
		t.Errorf("here: %v; %v", c.has(body), err)
	}
}

// TestAStrayThatIsReadIsHeld: it has no row when it is opened, and one when room is
// made.
func TestAStrayThatIsReadIsHeld(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	body := randomBytes(3 << 20)
	c := openChaos(t, dir, 8<<20)
	pullImage(t, c, "", 0, body)
	c.Close()
	if err := os.Truncate(filepath.Join(dir, "index.db"), 3000); err != nil {
		t.Fatal(err)
	}
	var adopter atomic.Bool
	c = withSteps(t, dir, func(step string, do func() error) error {
		if step == "open blob" && adopter.CompareAndSwap(false, true) {
			return syscall.EIO // it comes back in a second
		}
		return do()
	})
	defer c.Close()
	settle(t, "the adopter", adopter.Load)
	o, err := c.Open(t.Context(), parallelRequest(&origin{body: body}, "one"))
	if err != nil {
		t.Fatal(err)
	}
	o.Wait()
	settle(t, "the row", func() bool { return c.has(body) && c.Stats().Adopting == 0 })
	mustBeHeld(t, c, o, body)
}

// TestWhatIsReadWhileTheIndexBreaksIsHeld: it is committed into an index that turns
// out to be broken, and adopted.
func TestWhatIsReadWhileTheIndexBreaksIsHeld(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	body := randomBytes(3 << 20)
	c := openChaos(t, dir, 16<<20)
	defer c.Close()
	var o *Object
	if err := c.store.Do(func() (err error) {
		if o, err = c.Open(t.Context(), parallelRequest(&origin{body: body}, "one")); err != nil {
			return err
		}
		o.Wait() // verified, and waits for the committer
		return os.Truncate(filepath.Join(dir, "index.db"), 3000)
	}); err != nil {
		t.Fatal(err)
	}
	settle(t, "the adopter", func() bool {
		_, err := os.Stat(filepath.Join(dir, "index.db.broken"))
		s := c.Stats()
		return err == nil && c.has(body) && s.Adopting == 0 && s.Flights == 0
	})
	mustBeHeld(t, c, o, body)
}

// TestWhatIsPinnedSinceATagMovedStays: room is made before the pins have followed
// the tag.
func TestWhatIsPinnedSinceATagMovedStays(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 16<<20)
	defer c.Close()
	one := buildImage(randomBytes(300_000), 700_000)
	two := buildImage(one.base, 600_000)
	pullImage(t, c, "v1", 1, one.own()...)
	pullImage(t, c, "v2", 2, two.own()...)
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"}); err != nil {
		t.Fatal(err)
	}
	c.NoteTag(appKey.TagKey("v1"), index.Tag{Digest: two.indexDigest, Sequence: 3, Confirmed: time.Now()})
	if err := c.store.Evict(1 << 40); err != nil {
		t.Fatal(err)
	}
	for i, b := range two.own() {
		if !c.has(b) {
			t.Errorf("object %d of what is pinned was evicted", i)
		}
	}
	if c.has(one.layer) {
		t.Error("what was pinned before is here")
	}
}

// TestWhatIsEvictedIsNotServedFromMemory: somebody asks for it between the end of its
// row and that of its file. He fetches it, and then it is stored again.
func TestWhatIsEvictedIsNotServedFromMemory(t *testing.T) {
	t.Parallel()
	var before atomic.Pointer[func()]
	c := withSteps(t, t.TempDir(), func(name string, do func() error) error {
		if f := before.Load(); f != nil && name == "remove blob" && before.CompareAndSwap(f, nil) {
			(*f)()
		}
		return do()
	})
	defer c.Close()
	for _, evict := range []func(digest.Digest) error{
		func(d digest.Digest) error { return evictOne(c, d) },
		func(digest.Digest) error { return c.store.Evict(1 << 40) },
	} {
		body := randomBytes(500)
		pullImage(t, c, "", 0, body)
		req := parallelRequest(&origin{body: body}, "one")
		ask := func() {
			if _, err := readAll(c, req); err != nil {
				t.Error(err)
			}
		}
		ask() // now it is in memory
		before.Store(&ask)
		if err := evict(req.Digest); err != nil {
			t.Fatal(err)
		}
		settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
		o, err := c.Open(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		o.Close()
		if o.Source == Hit && !c.has(body) {
			t.Error("it was evicted, and is a hit")
		}
	}
}

// TestWhateverFailsIsAccountedFor: people and eviction change a store on a disk where
// any step may fail, or fail and have taken effect. In the end each byte counts, and all
// of them can make room.
func TestWhateverFailsIsAccountedFor(t *testing.T) {
	t.Parallel()
	start := uint64(time.Now().UnixNano())
	for seed := start; seed < start+uint64(testRounds(8)); seed++ {
		var failing atomic.Bool
		var mu sync.Mutex
		r := rand.New(rand.NewPCG(seed, 3))
		c, err := New(Options{Dir: t.TempDir(), MaxSize: 6 << 20, Steps: func(_ string, do func() error) error {
			mu.Lock()
			x := r.IntN(100)
			mu.Unlock()
			if !failing.Load() || x >= 12 {
				return do()
			}
			if x >= 8 {
				do()
			}
			return syscall.EIO
		}})
		if err != nil {
			t.Fatal(err)
		}
		var bodies [][]byte
		for i := range 12 {
			bodies = append(bodies, randomBytes(300_000+i*50_000))
		}
		failing.Store(true)
		var busy sync.WaitGroup
		for who := range uint64(4) {
			busy.Go(func() {
				r := rand.New(rand.NewPCG(seed, who+10))
				for range 40 {
					b := bodies[r.IntN(len(bodies))]
					p := images.Pin{Upstream: "lab.test", Repository: "app", Digest: digest.FromBytes(b)}
					switch r.IntN(9) {
					case 0:
						evictOne(c, p.Digest)
					case 1:
						c.store.Verify(t.Context(), 0, func(store.Verification) {})
					case 2:
						c.images.Pin(p)
					case 3:
						c.images.Unpin(p)
					default:
						got, err := readAll(c, parallelRequest(&origin{body: b}, fmt.Sprint(who)))
						if err == nil && !bytes.Equal(got, b) {
							t.Errorf("%d bytes of %d", len(got), len(b))
						}
					}
				}
			})
		}
		busy.Wait()
		failing.Store(false)
		for _, p := range c.images.Pins() {
			if err := c.images.Unpin(p); err != nil {
				t.Error(err)
			}
		}
		c.store.Housekeep()
		if err := landed(c); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		if err := c.store.Evict(1 << 40); err != nil {
			t.Error(err)
		}
		if err := landed(c); err != nil {
			t.Errorf("seed %d, with everything evicted: %v", seed, err)
		}
		used := c.store.Stats().BlobBytes
		if used != 0 || c.store.Evictable() != 0 {
			t.Errorf("seed %d: %d bytes are left, of which %d may go", seed, used, c.store.Evictable())
		}
		c.Close()
	}
}

// mustCountRight: each byte counts once, and all of them can go.
func mustCountRight(t *testing.T, c *Cache) {
	t.Helper()
	if err := landed(c); err != nil {
		t.Error(err)
	}
	if err := c.store.Evict(1 << 40); err != nil {
		t.Error(err)
	}
	if err := landed(c); err != nil || c.store.Stats().BlobBytes != 0 {
		t.Errorf("%d bytes count of nothing: %v", c.store.Stats().BlobBytes, err)
	}
}

// TestWhatWasDeletedBeforeTheIndexBrokeIsNotCounted, nor taken off once more.
func TestWhatWasDeletedBeforeTheIndexBrokeIsNotCounted(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 64<<20)
	defer c.Close()
	lost := storedBy(t, c, &origin{body: randomBytes(3_000_000)})
	storedBy(t, c, &origin{body: randomBytes(1_000_000)})
	if err := os.Remove(c.store.Path(lost.Digest)); err != nil {
		t.Fatal(err)
	}
	breakIndex(t, c)
	mustCountRight(t, c)
}

// TestWhatIsHashedCountsToTheEnd: verifying is reading, and the room of what is read is
// not free.
func TestWhatIsHashedCountsToTheEnd(t *testing.T) {
	t.Parallel()
	const size = 4 << 20
	c := openChaos(t, t.TempDir(), 64<<20)
	defer c.Close()
	storedBy(t, c, &origin{body: randomBytes(size)})
	used := func() int64 { return c.store.Stats().BlobBytes }
	before := used()
	_, err := c.store.Verify(t.Context(), 0, func(v store.Verification) {
		if v.Bytes != 1<<20 {
			return
		}
		if err := c.store.Evict(1 << 40); err != nil {
			t.Error(err)
		}
		if n := used(); n != before {
			t.Errorf("%d bytes count while it is read, not %d", n, before)
		}
	})
	if err != nil {
		t.Error(err)
	}
	if err := c.store.Evict(1 << 40); err != nil || used() != 0 {
		t.Errorf("%d bytes count in the end: %v", used(), err)
	}
}

// TestTheListIsWrittenAgainWhenItsOwnRoomCostAnImage that it names.
func TestTheListIsWrittenAgainWhenItsOwnRoomCostAnImage(t *testing.T) {
	t.Parallel()
	const bound = 6 << 20
	c := openChaos(t, t.TempDir(), bound)
	defer c.Close()
	// Large, and used once, it is the first to go.
	first, err := json.Marshal(v1.Manifest{
		MediaType: v1.MediaTypeImageManifest, Config: v1.Descriptor{Digest: digest.FromString("c"), Size: 1}, Annotations: map[string]string{"x": strings.Repeat("x", 1<<20)},
	})
	if err != nil {
		t.Fatal(err)
	}
	small := buildImage(randomBytes(1000), 1000)
	pullImage(t, c, "first", 1, first)
	pullImage(t, c, "small", 1, small.own()...)
	for i := range 1500 {
		c.NoteTag(appKey.TagKey(fmt.Sprintf("t%0100d", i)), index.Tag{Digest: small.indexDigest, Sequence: uint64(i + 2), Confirmed: time.Now()})
	}
	if err := c.Index().Sync(); err != nil {
		t.Fatal(err)
	}
	settle(t, "what the pulls reserved", func() bool { return c.Stats().Flights == 0 && c.Stats().PendingBytes == 0 })
	if err := c.store.Do(func() error {
		s, list := c.Stats(), c.images.Hooks()
		room := s.MaxBytes - s.UsedBytes - s.PendingBytes - 4096
		if err := c.store.ReserveFree(ListedDomain, room); err != nil { // a download has the rest
			return err
		}
		list.Follow()
		list.Tick()
		c.store.Unreserve(ListedDomain, room)
		if c.has(first) {
			t.Error("it was not put to the test")
		}
		list.Tick() // the next turn
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if list, err := os.ReadFile(filepath.Join(c.store.Dir(), store.ListName)); err != nil || bytes.Contains(list, []byte(":first")) || !bytes.Contains(list, []byte(":small")) {
		t.Errorf("it names what is not here, or not what is: %v", err)
	}
}

// TestEverythingInTheDirectoryCounts: whatever its files are of.
func TestEverythingInTheDirectoryCounts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	openChaos(t, dir, 1<<30).Close() // so that it is tarn's
	for name, size := range map[string]int{"index.db.broken": 1 << 20, "foreign.bin": 300_000, store.PinsName + ".broken": 10_000} {
		if err := os.WriteFile(filepath.Join(dir, name), randomBytes(size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := openChaos(t, dir, 1<<30)
	defer c.Close()
	small := buildImage(randomBytes(1000), 1000)
	pullImage(t, c, "v1", 1, small.own()...)
	for i := range 3000 { // a list of a MB
		c.NoteTag(appKey.TagKey(fmt.Sprintf("t%0100d", i)), index.Tag{Digest: small.indexDigest, Sequence: uint64(i + 2), Confirmed: time.Now()})
	}
	if err := c.store.Housekeep(); err != nil {
		t.Fatal(err)
	}
	// Between two looks, what grows has been made room for.
	if s, n := c.Stats(), directory(dir); s.UsedBytes < n || n < 2<<20 {
		t.Errorf("%d bytes count, and %d are there", s.UsedBytes, n)
	}
}

// TestMinFreeIsKept: where it cannot be, nothing is stored, and all pass through.
func TestMinFreeIsKept(t *testing.T) {
	t.Parallel()
	c, err := New(Options{Dir: t.TempDir(), MaxSize: 1 << 30, MinFree: 1 << 60})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, size := range []int{100, 1 << 20} {
		req := parallelRequest(&origin{body: randomBytes(size)}, "one")
		o, err := c.Open(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, o.Content)
		o.Close()
		if err != nil || n != int64(size) || o.Source != Passed {
			t.Errorf("%d bytes of %d, from %d: %v", n, size, o.Source, err)
		}
	}
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	if s := c.Stats(); s.PendingBytes != 0 || s.Trouble == "" {
		t.Errorf("%+v", s)
	}
}

// TestAUseIsKnownToTheNextProcess: the index hears of it at the end, if not before.
func TestAUseIsKnownToTheNextProcess(t *testing.T) {
	t.Parallel()
	for what, size := range map[string]int{"in memory": 1000, "as a file": 1 << 20} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			c := openChaos(t, dir, 1<<30)
			req := storedBy(t, c, &origin{body: randomBytes(size)})
			before, _ := c.Index().Use(req.Digest)
			if _, err := readAll(c, req); err != nil {
				t.Fatal(err)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			c = openChaos(t, dir, 1<<30)
			defer c.Close()
			if after, _ := c.Index().Use(req.Digest); after.Uses != before.Uses+1 || !after.Time.After(before.Time) {
				t.Errorf("%+v, and before the use %+v", after, before)
			}
		})
	}
}

// TestPartsOfADownloadAreOneUse: a client that asks for a layer in ten ranges has used it once.
func TestPartsOfADownloadAreOneUse(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	req := storedBy(t, c, &origin{body: randomBytes(1 << 20)})
	uses := func() int {
		c.store.Housekeep() // has the index know
		u, _ := c.Index().Use(req.Digest)
		return u.Uses
	}
	before := uses()
	for i := range 10 {
		req.Offset, req.Ranged = int64(i)*100_000, true
		if _, err := readAll(c, req); err != nil {
			t.Fatal(err)
		}
	}
	if n := uses() - before; n != 1 {
		t.Errorf("that were %d uses", n)
	}
}
