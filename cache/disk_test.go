// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tarn/blobstore"
	"tarn/cache/store"
	"tarn/index"

	"github.com/opencontainers/go-digest"
)

// What a bad disk must not do: each of these did, once.

func storedBy(t *testing.T, c *Cache, o *origin) Request {
	t.Helper()
	req := parallelRequest(o, "first")
	if got, err := readAll(c, req); err != nil || !bytes.Equal(got, o.body) {
		t.Fatal(err)
	}
	settle(t, "the commit", func() bool { _, ok := c.Has(req.Key); return ok && c.Stats().Flights == 0 })
	return req
}

func withSteps(t *testing.T, dir string, steps func(string, func() error) error) *Cache {
	t.Helper()
	c, err := New(Options{Dir: dir, MaxSize: 1 << 30, Steps: steps})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestWholeWhoHadAChangedFilesBeginningIsRememberedInARestart: tarn cuts who reads a changed
// file, and is restarted before he resumes.
func TestWholeWhoHadAChangedFilesBeginningIsRememberedInARestart(t *testing.T) {
	t.Parallel()
	body := randomBytes(40_000_000)
	o := &origin{body: body}
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<30)
	req := storedBy(t, c, o)
	var got []byte
	var err error
	for i := 0; err == nil; i++ { // he may not have begun when the file is found out
		if i == 10 {
			t.Fatal("he is never cut")
		}
		storedBy(t, c, o)
		if err := flip(c.store.Path(req.Digest), body, 100); err != nil {
			t.Fatal(err)
		}
		got, err = readAll(c, parallelRequest(o, "victim"))
	}
	t.Logf("victim has %d bytes: %v", len(got), err)
	// in the same process it is refused
	resumed := parallelRequest(o, "victim")
	resumed.Offset, resumed.Ranged = int64(len(got)), true
	if _, err := readAll(c, resumed); !errors.Is(err, ErrDropped) {
		t.Errorf("same process: %v", err)
	}
	c.Close()
	c = openChaos(t, dir, 1<<30)
	defer c.Close()
	tail, err := readAll(c, resumed)
	if err != nil {
		return
	}
	if whole := append(got, tail...); len(whole) == len(body) && !bytes.Equal(whole, body) {
		t.Errorf("victim assembled a complete object of %d bytes with a wrong one", len(whole))
	}
}

// TestAnIndexWhoseOpeningPanicsIsSetAside: bbolt panics on a page of
// another kind.
func TestAnIndexWhoseOpeningPanicsIsSetAside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<30)
	for range 5 {
		storedBy(t, c, &origin{body: randomBytes(100_000)})
	}
	c.Close()
	path := filepath.Join(dir, "index.db")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(data); at += 4096 {
		if data[at+8] == 0x10 { // freelist page's flags
			data[at+8] ^= 0x01
		}
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for n := range 6 {
		started := func() (ok bool) {
			defer func() {
				if p := recover(); p != nil { // a process would be gone; the lock is let go with it
					t.Logf("start %d: panics: %v", n, p)
					_, err := os.Stat(path + ".opening")
					t.Logf("marker is there: %v", err == nil)
				}
			}()
			tmp := t.TempDir() // another inode each time, as locks of this process stay
			if err := os.CopyFS(tmp, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			dir, path = tmp, filepath.Join(tmp, "index.db")
			c := openChaos(t, dir, 1<<30)
			c.Close()
			return true
		}()
		if started {
			return
		}
	}
	t.Error("it never starts again")
}

func countedBytes(t *testing.T, c *Cache) (counted, there int64) {
	t.Helper()
	there, _, err := taken(c.store.Dir())
	if err != nil {
		t.Fatal(err)
	}
	return c.store.Stats().BlobBytes, there
}

// TestAStrayThatIsReplacedCountsOnce: also when the adopter could
// not read it.
func TestAStrayThatIsReplacedCountsOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	body := randomBytes(3_000_000)
	o := &origin{body: body}
	c := openChaos(t, dir, 1<<30)
	req := storedBy(t, c, o)
	c.Close()
	if err := os.Remove(filepath.Join(dir, "index.db")); err != nil {
		t.Fatal(err)
	}
	hold := make(chan struct{})
	var first atomic.Bool
	c = withSteps(t, dir, func(name string, do func() error) error {
		if name == "open blob" && first.CompareAndSwap(false, true) {
			<-hold
			return syscall.EIO
		}
		return do()
	})
	defer c.Close()
	until(t, "the adopter is held", first.Load)
	other := req
	other.Domain = "other.example"
	if got, err := readAll(c, other); err != nil || !bytes.Equal(got, body) {
		t.Fatal(err)
	}
	settle(t, "the flights", func() bool { return c.Stats().Flights == 0 })
	close(hold)
	settle(t, "the adoption", func() bool { return c.Stats().Adopting == 0 })
	if n, there := countedBytes(t, c); n != there {
		t.Errorf("%d bytes are counted, %d are there", n, there)
	}
}

// TestAChangedFileOnADiskThatRefusesPassesThrough: its row cannot be
// dropped, and everybody gets the right bytes all the same.
func TestAChangedFileOnADiskThatRefusesPassesThrough(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"write index", "remove blob"} {
		t.Run(step, func(t *testing.T) {
			dir := t.TempDir()
			var bad atomic.Bool
			c := withSteps(t, dir, func(name string, do func() error) error {
				if bad.Load() && name == step {
					return syscall.EROFS
				}
				return do()
			})
			defer c.Close()
			body := randomBytes(3_000_000)
			o := &origin{body: body}
			req := storedBy(t, c, o)
			if err := flip(c.store.Path(req.Digest), body, 100); err != nil {
				t.Fatal(err)
			}
			bad.Store(true)
			for n, reader := range []string{"a", "b", "c", "d"} {
				got, err := readAll(c, parallelRequest(o, reader))
				if n > 0 && (err != nil || !bytes.Equal(got, body)) {
					t.Errorf("pull %d: %d bytes: %v", n, len(got), err)
				}
			}
			// small objects, verified before headers
			bad.Store(false)
			small := &origin{body: randomBytes(3000)}
			sreq := storedBy(t, c, small)
			if err := flip(c.store.Path(sreq.Digest), small.body, 100); err != nil {
				t.Fatal(err)
			}
			bad.Store(true)
			for n := range 3 {
				got, err := readAll(c, parallelRequest(small, "x"))
				if err != nil || !bytes.Equal(got, small.body) {
					t.Errorf("small pull %d: %d bytes: %v", n, len(got), err)
				}
			}
			bad.Store(false)
			c.store.Housekeep()
			if got, err := readAll(c, parallelRequest(o, "later")); err != nil || !bytes.Equal(got, body) {
				t.Logf("after the disk is well, first: %d %v", len(got), err)
			}
			settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
			if n, there := countedBytes(t, c); n != there {
				t.Errorf("%d bytes are counted, %d are there", n, there)
			}
		})
	}
}

// TestAFileThatCannotBeOpenedIsReplaced: rather than fetched each time.
func TestAFileThatCannotBeOpenedIsReplaced(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var old atomic.Pointer[blobstore.Look] // the file that cannot be opened
	var c *Cache
	var d atomic.Value
	c = withSteps(t, dir, func(name string, do func() error) error {
		if look := old.Load(); name == "open blob" && look != nil {
			if info, err := os.Stat(c.store.Path(d.Load().(digest.Digest))); err == nil && blobstore.LookOf(info) == *look {
				return syscall.EIO
			}
		}
		return do()
	})
	defer c.Close()
	body := randomBytes(3_000_000)
	o := &origin{body: body}
	req := storedBy(t, c, o)
	d.Store(req.Digest)
	info, err := os.Stat(c.store.Path(req.Digest))
	if err != nil {
		t.Fatal(err)
	}
	look := blobstore.LookOf(info)
	old.Store(&look)
	for n := range 4 {
		asked := len(o.questions())
		if got, err := readAll(c, parallelRequest(o, "x")); err != nil || !bytes.Equal(got, body) {
			t.Errorf("pull %d: %d bytes: %v", n, len(got), err)
		}
		settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
		if n > 0 && len(o.questions()) > asked {
			t.Errorf("pull %d: fetched again", n)
		}
	}
}

// TestAPendingFileThatStaysAtTheStartCounts: it does not fit, and cannot be
// removed.
func TestAPendingFileThatStaysAtTheStartCounts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	// parked, then the bound is lowered: it does not fit any more
	c := withSteps(t, dir, nil)
	body := randomBytes(5 * minSegment)
	o := &origin{body: body}
	parkIt(t, c, o)
	c.Close()
	var bad atomic.Bool
	bad.Store(true)
	c, err := New(Options{Dir: dir, MaxSize: 8 << 20, Steps: func(name string, do func() error) error {
		if bad.Load() && (name == "remove pending" || name == "remove journal") {
			return syscall.EIO
		}
		return do()
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	bad.Store(false) // the disk is well again
	c.store.Housekeep()
	_, pending, _ := taken(dir)
	claimed := c.Stats().PendingBytes
	if pending > claimed {
		t.Errorf("%d bytes lie under pending, %d are counted, max is %d", pending, claimed, c.store.MaxSize())
	}
}

func parkIt(t *testing.T, c *Cache, o *origin) {
	t.Helper()
	o.answer = breaking(o)
	readAll(c, parallelRequest(o, "one"))
	settle(t, "parked", func() bool { return c.Stats().Parked == 1 && c.Stats().Flights == 0 })
	o.answer = nil
}

// TestAnIndexThatBreaksDuringAdoption: two adopters meet at one file.
func TestAnIndexThatBreaksDuringAdoption(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o700); err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(dir, "blobs/sha256", digest.FromString("x").Encoded())
	if err := os.WriteFile(bad, randomBytes(1_000_000), 0o600); err != nil {
		t.Fatal(err)
	}
	hold := make(chan struct{})
	var first atomic.Bool
	c := withSteps(t, dir, func(name string, do func() error) error {
		if name == "open blob" && first.CompareAndSwap(false, true) {
			<-hold
		}
		return do()
	})
	defer c.Close()
	until(t, "the adopter is held", first.Load)
	path := filepath.Join(dir, "index.db")
	info, _ := os.Stat(path)
	if err := os.WriteFile(path, make([]byte, info.Size()), 0o600); err != nil {
		t.Fatal(err)
	}
	k := index.RepositoryKey{Upstream: "docker.io", Repository: "x"}
	c.Index().NoteMembership(k.MembershipKey("blobs", digest.FromString("x")), index.Membership{Time: time.Now()})
	if err := c.Index().Sync(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "index.db.broken")); err != nil {
		t.Error(err)
	}
	close(hold)
	settle(t, "the adoption", func() bool { return c.Stats().Adopting == 0 })
	if n, there := countedBytes(t, c); n != there {
		t.Errorf("%d bytes are counted, %d are there", n, there)
	}
}

// TestOneErrorAtOpeningKeepsTheIndex: it is opened again.
func TestOneErrorAtOpeningKeepsTheIndex(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<30)
	k := index.RepositoryKey{Upstream: "docker.io", Repository: "x"}
	c.Index().NoteTag(k.TagKey("v1"), index.Tag{Digest: digest.FromString("x"), Confirmed: time.Now(), Sequence: 1})
	c.Close()
	var once sync.Once
	c, err := New(Options{Dir: dir, MaxSize: 1 << 30, Steps: func(name string, do func() error) (err error) {
		if name == "open index" {
			once.Do(func() { err = &os.PathError{Op: "read", Path: "index.db", Err: syscall.EIO} })
			if err != nil {
				return err
			}
		}
		return do()
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, ok := c.Index().Tag(k.TagKey("v1")); !ok {
		t.Error("a sound index was set aside for one EIO; what was known is lost")
	}
}

func breaking(o *origin) func(int, int64, int64) (io.ReadCloser, Info, error) {
	const there = 3 * minSegment
	return func(n int, off, length int64) (io.ReadCloser, Info, error) {
		if n == 0 {
			end := min(int64(firstSegment), int64(len(o.body)))
			return o.part(0, end), Info{Size: int64(len(o.body)), End: end}, nil
		}
		if end := min(off+length, int64(len(o.body))); n < 4 && off < there {
			body := io.MultiReader(o.part(off, min(end, there)), failing{})
			return io.NopCloser(body), Info{Size: int64(len(o.body)), Offset: off, End: end}, nil
		}
		return nil, Info{}, fmt.Errorf("%w: gone", ErrRefused)
	}
}

// TestADamagedStrayIsTakenOffOnce: asked for before the adopter
// comes by.
func TestADamagedStrayIsTakenOffOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	body := randomBytes(3_000_000)
	o := &origin{body: body}
	c := openChaos(t, dir, 1<<30)
	req := storedBy(t, c, o)
	c.Close()
	if err := flip(filepath.Join(dir, "blobs/sha256", req.Digest.Encoded()), body, 100); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "index.db")); err != nil {
		t.Fatal(err)
	}
	hold := make(chan struct{})
	var first atomic.Bool
	c = withSteps(t, dir, func(name string, do func() error) error {
		if name == "open blob" && first.CompareAndSwap(false, true) {
			<-hold
		}
		return do()
	})
	defer c.Close()
	until(t, "the adopter is held", first.Load)
	readAll(c, parallelRequest(o, "one")) // is cut, and the file is dropped
	settle(t, "the flights", func() bool { return c.Stats().Flights == 0 })
	close(hold)
	settle(t, "the adoption", func() bool { return c.Stats().Adopting == 0 })
	if n, there := countedBytes(t, c); n != there {
		t.Errorf("%d bytes are counted, %d are there", n, there)
	}
}

// killed makes what a killed process leaves: the journal speaks of noted bytes,
// the file has these.
func killed(t *testing.T, dir string, body, file []byte, noted int64) {
	t.Helper()
	d := digest.FromBytes(body)
	pending := filepath.Join(dir, "pending")
	if err := os.MkdirAll(pending, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(pending, "sha256-"+d.Encoded()+".123")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	var journal []byte
	for _, v := range []any{header{domain, d.String(), int64(len(body))}, progress{Filled: [][2]int64{{0, noted}}, Booted: bootID()}} {
		rec, _ := json.Marshal(v)
		journal = fmt.Appendf(journal, "%08x %s\n", crc32.ChecksumIEEE(rec), rec)
	}
	if err := os.WriteFile(path+journalSuffix, journal, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestWholeZerosGivenOutBeforeAKill: the source sent zeros where the object
// has others, up to where the reader was when tarn was killed. What is shorter than
// a block is not told from what was never written.
func TestWholeZerosGivenOutBeforeAKill(t *testing.T) {
	t.Parallel()
	body := randomBytes(3 * minSegment)
	const noted = 8<<20 + 1000
	for _, zeros := range []int{5000, 20_000} {
		t.Run(fmt.Sprint(zeros), func(t *testing.T) {
			dir := t.TempDir()
			had := bytes.Clone(body[:noted+1<<20])
			clear(had[len(had)-zeros:])
			killed(t, dir, body, had, noted)
			c := openChaos(t, dir, 1<<30)
			defer c.Close()
			resumed := parallelRequest(&origin{body: body}, "victim")
			resumed.Offset, resumed.Ranged = int64(len(had)), true
			tail, err := readAll(c, resumed)
			if whole := append(bytes.Clone(had), tail...); err == nil && len(whole) == len(body) && !bytes.Equal(whole, body) {
				t.Errorf("victim assembled a complete wrong object; wrong are %d bytes", zeros)
			}
		})
	}
}

// TestAFilesystemOfLargeRecords: SEEK_DATA tells of whole records of 128 KiB, with
// zeros behind what was written.
func TestAFilesystemOfLargeRecords(t *testing.T) {
	t.Parallel()
	body := randomBytes(3 * minSegment)
	const noted = 8<<20 + 1000
	dir := t.TempDir()
	had := bytes.Clone(body[:noted])
	had = append(had, make([]byte, 128<<10-len(had)%(128<<10))...)
	killed(t, dir, body, had, noted)
	c := openChaos(t, dir, 1<<30)
	defer c.Close()
	got, err := readAll(c, parallelRequest(&origin{body: body}, "somebody"))
	if err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
}

// unreadable is what the kernel does not read: EIO.
const unreadable = "/proc/self/mem"

// TestAnUnreadableSectorIsFetchedAnew: the file looks as ever, and the disk does
// not read it, which a reader finds out, or the scrubber.
func TestAnUnreadableSectorIsFetchedAnew(t *testing.T) {
	t.Parallel()
	var failing atomic.Bool
	c := withSteps(t, t.TempDir(), func(name string, do func() error) error {
		if name == "open blob" && failing.Load() {
			return syscall.EIO
		}
		return do()
	})
	defer c.Close()
	o := &origin{body: randomBytes(3_000_000)}
	req := storedBy(t, c, o)
	mustBeFetched := func() {
		t.Helper()
		settle(t, "row and file", func() bool { // the row goes first
			_, ok := c.Has(req.Key)
			_, err := os.Lstat(c.store.Path(req.Digest))
			return !ok && err != nil
		})
		storedBy(t, c, o)
		if err := landed(c); err != nil {
			t.Error(err)
		}
	}
	read, err := c.Open(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	bad, err := os.Open(unreadable)
	if err != nil {
		t.Fatal(err)
	}
	content := read.Content.(*store.File)
	content.File.Close()
	content.File = bad
	if _, err := read.Content.Read(make([]byte, 10)); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	read.Close()
	bad.Close()
	mustBeFetched()

	failing.Store(true)
	c.store.Scrub(time.Now().Add(2*(7*24*time.Hour)), 0)
	failing.Store(false)
	mustBeFetched()
}

// TestWholeAFileThatIsChangedInItsCommitIsNotVouchedFor: after its hash, and before the look
// that its row remembers.
func TestWholeAFileThatIsChangedInItsCommitIsNotVouchedFor(t *testing.T) {
	t.Parallel()
	body := randomBytes(300_000)
	path := ""
	var once sync.Once
	c := withSteps(t, t.TempDir(), func(name string, do func() error) error {
		err := do()
		if name == "rename blob" {
			once.Do(func() {
				if err := flip(path, body, 7); err != nil {
					t.Error(err)
				}
			})
		}
		return err
	})
	defer c.Close()
	path = c.store.Path(digest.FromBytes(body))
	storedBy(t, c, &origin{body: body})
	for range 3 {
		if got, _ := readAll(c, parallelRequest(&origin{body: body}, "two")); len(got) == len(body) && !bytes.Equal(got, body) {
			t.Error("wrong bytes went out whole")
		}
	}
}

// TestWhatIsNoFileIsDropped: a pipe is not waited for, nor a link followed, which may have
// no end.
func TestWhatIsNoFileIsDropped(t *testing.T) {
	t.Parallel()
	for name, put := range map[string]func(path string) error{
		"pipe":      func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"link":      func(path string) error { return os.Symlink("/dev/zero", path) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		for _, size := range []int{500, 300_000} {
			t.Run(fmt.Sprint(name, " in place of ", size), func(t *testing.T) {
				t.Parallel()
				c := openChaos(t, t.TempDir(), 1<<30)
				defer c.Close()
				o := &origin{body: randomBytes(size)}
				req := storedBy(t, c, o)
				for _, finds := range []func() error{
					func() error { got, err := readAll(c, req); return cmp.Or(err, is(got, o.body)) },
					func() error {
						v, err := c.store.Verify(t.Context(), 0, func(store.Verification) {})
						if len(v.Bad) != 1 {
							err = errors.Join(err, fmt.Errorf("%+v", v))
						}
						return err
					},
				} {
					path := c.store.Path(req.Digest)
					if err := cmp.Or(os.Remove(path), put(path)); err != nil {
						t.Fatal(err)
					}
					if err := finds(); err != nil {
						t.Error(err)
					}
					settle(t, "row and file", func() bool {
						_, ok := c.Has(req.Key)
						info, err := os.Lstat(path)
						return !ok && err != nil || ok && err == nil && info.Mode().IsRegular()
					})
					storedBy(t, c, o)
				}
			})
		}
	}
}

func is(got, want []byte) error {
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%d bytes that are not it", len(got))
	}
	return nil
}

// TestStraysAreAdoptedWhenTheDiskIsBack: that they cannot be read now is no reason
// to fetch them again later.
func TestStraysAreAdoptedWhenTheDiskIsBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := &origin{body: randomBytes(3_000_000)}
	c := openChaos(t, dir, 1<<30)
	storedBy(t, c, o)
	c.Close()
	if err := os.Remove(filepath.Join(dir, "index.db")); err != nil {
		t.Fatal(err)
	}
	var bad atomic.Bool
	var refused atomic.Int32
	bad.Store(true)
	c = withSteps(t, dir, func(name string, do func() error) error {
		if bad.Load() && name == "open blob" {
			refused.Add(1)
			return syscall.EIO
		}
		return do()
	})
	defer c.Close()
	until(t, "the disk has refused", func() bool { return refused.Load() > 0 })
	bad.Store(false)
	settle(t, "the adopter", func() bool { return c.Stats().Adopting == 0 })
	asked := len(o.questions())
	if got, err := readAll(c, parallelRequest(o, "x")); err != nil || !bytes.Equal(got, o.body) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	if len(o.questions()) > asked {
		t.Error("what is whole on the disk was fetched again")
	}
}

// TestTroubleEndsByItself, when nobody downloads anything.
func TestTroubleEndsByItself(t *testing.T) {
	t.Parallel()
	var bad atomic.Bool
	c := withSteps(t, t.TempDir(), func(name string, do func() error) error {
		if bad.Load() && name == "write index" {
			return syscall.ENOSPC
		}
		return do()
	})
	defer c.Close()
	bad.Store(true)
	k := index.RepositoryKey{Upstream: "docker.io", Repository: "x"}
	c.Index().NoteMembership(k.MembershipKey("blobs", digest.FromString("x")), index.Membership{Time: time.Now()})
	settle(t, "trouble", func() bool { return c.Stats().Trouble != "" })
	bad.Store(false)
	settle(t, "all", func() bool { return c.Stats().Trouble == "" })
}

// breakIndex writes over the index of a running cache, and has it find out.
func breakIndex(t *testing.T, c *Cache) {
	t.Helper()
	path := filepath.Join(c.store.Dir(), "index.db")
	err := c.Index().Sync()
	info, serr := os.Stat(path)
	if err = errors.Join(err, serr); err == nil {
		err = os.WriteFile(path, make([]byte, info.Size()), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Index().Sync(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(c.store.Dir(), "index.db.broken")); err != nil {
		t.Fatal(err)
	}
}

// TestWhatIsReadCountsOnceThroughABrokenIndex: it was removed while somebody reads
// it, and then all that lies there is counted anew.
func TestWhatIsReadCountsOnceThroughABrokenIndex(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	req := storedBy(t, c, &origin{body: randomBytes(3_000_000)})
	reading, err := c.Open(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if err := evictOne(c, req.Digest); err != nil {
		t.Fatal(err)
	}
	used := c.Stats().UsedBytes
	breakIndex(t, c)
	if now := c.Stats().UsedBytes; now < used-500_000 { // the index is a new one
		t.Errorf("%d bytes count, and did %d", now, used)
	}
	reading.Close()
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

// TestVerifyWithoutDescriptorsDropsNothing.
func TestVerifyWithoutDescriptorsDropsNothing(t *testing.T) {
	t.Parallel()
	var short atomic.Bool
	c := withSteps(t, t.TempDir(), func(name string, do func() error) error {
		if short.Load() && name == "open blob" {
			return &os.PathError{Op: "open", Path: "blob", Err: syscall.EMFILE}
		}
		return do()
	})
	defer c.Close()
	req := storedBy(t, c, &origin{body: randomBytes(3_000_000)})
	short.Store(true)
	if v, err := c.store.Verify(t.Context(), 0, func(store.Verification) {}); !errors.Is(err, syscall.EMFILE) || len(v.Bad) > 0 {
		t.Errorf("%+v: %v", v, err)
	}
	short.Store(false)
	if _, ok := c.Has(req.Key); !ok {
		t.Error("it is dropped")
	}
}
