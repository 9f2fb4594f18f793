// SPDX-License-Identifier: Apache-2.0

package index

import (
	_ "crypto/sha512"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tarn/internal/fault"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// Of a broken file, bbolt may keep the lock that its closing waits for.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("tarn/index.closeBroken"))
}

func open(t testing.TB, path string) *Index {
	t.Helper()
	return openWith(t, path, Options{Aside: path + ".aside"})
}

func openWith(t testing.TB, path string, opts Options) *Index {
	t.Helper()
	ix, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ix.Close() })
	return ix
}

// again closes an index and opens what it has left.
func again(t testing.TB, ix *Index) *Index {
	t.Helper()
	if err := ix.Close(); err != nil {
		t.Fatal(err)
	}
	return openWith(t, ix.file.path, ix.opts)
}

// written opens a copy of the file, as a process would find it that starts after
// this one was killed.
func written(t testing.TB, ix *Index) *Index {
	t.Helper()
	data, err := os.ReadFile(ix.file.path)
	path := filepath.Join(t.TempDir(), "copy")
	if err == nil {
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return open(t, path)
}

func sync1(t testing.TB, ix *Index) {
	t.Helper()
	if err := ix.Sync(); err != nil {
		t.Fatal(err)
	}
}

var (
	d1 = digest.FromString("1")
	d2 = digest.FromString("2")
	at = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
)

func TestNotesAreReadAtOnceAndSurviveAClose(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	repo := RepositoryKey{"docker.io", "library/app"}
	tag, member := repo.TagKey("v1"), repo.MembershipKey("manifests", d1)
	for _, step := range []func(){func() {}, func() { ix = again(t, ix) }} {
		ix.NoteTag(tag, Tag{Digest: d1, Confirmed: at, Sequence: 5})
		ix.NoteTag(tag, Tag{Digest: d2, Confirmed: at, Sequence: 4}) // handed over earlier, answered later
		ix.NoteMembership(member, Membership{Time: at, Anonymous: at, MediaType: "x"})
		step()
		if got, ok := ix.Tag(tag); !ok || got.Digest != d1 || got.Sequence != 5 {
			t.Fatalf("%+v %v", got, ok)
		}
		if got, ok := ix.Membership(member); !ok || !got.Anonymous.Equal(at) || got.MediaType != "x" || !got.Time.Equal(at) {
			t.Fatalf("%+v %v", got, ok)
		}
	}
	if seq := ix.LastSequence(); seq != 5 {
		t.Fatal(seq)
	}
	ix.DeleteMembership(member)
	if _, ok := ix.Membership(member); ok {
		t.Fatal("a membership that was taken back")
	}
	sync1(t, ix)
	if _, ok := written(t, ix).Membership(member); ok {
		t.Fatal("a membership that was taken back, written")
	}
}

func TestAnObjectIsItsPossessorsOnly(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	o := Object{Size: 7, Alloc: 4096, Created: at}
	ix.Put(Possession{Digest: d1, Domain: "*", Object: o}, Possession{Digest: d1, Domain: "evil.example", Object: o}, Possession{Digest: d2, Domain: "*", Object: o})
	possessed := func(ix *Index, want map[string]bool) {
		t.Helper()
		for domain, want := range want {
			if _, ok := ix.Object(domain, d1); ok != want {
				t.Errorf("%q: %v", domain, ok)
			}
		}
	}
	all := map[string]bool{"*": true, "evil.example": true, "other.example": false, "": false}
	possessed(ix, all)
	ix = again(t, ix)
	possessed(ix, all)
	// Possessions go with the object: stored again by one, it is not the other's,
	// whether or not the file has heard of the first end.
	for _, heard := range []bool{false, true} {
		ix.Put(Possession{Digest: d1, Domain: "evil.example", Object: o})
		sync1(t, ix)
		ix.Drop(d1)
		if heard {
			sync1(t, ix)
		}
		ix.Put(Possession{Digest: d1, Domain: "*", Object: o})
		alone := map[string]bool{"*": true, "evil.example": false}
		possessed(ix, alone)
		ix = again(t, ix)
		possessed(ix, alone)
	}
	if _, ok := ix.Object("*", d2); !ok {
		t.Error("another object went along")
	}
}

func TestWhatIsNoIndexIsBroken(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	ix := open(t, good)
	ix.Put(Possession{Digest: d1, Domain: "*", Object: Object{Size: 1}})
	sync1(t, ix)
	if _, err := Open(good, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("a second opening: %v", err)
	}
	ix.Close()
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"text":       []byte("this is no index"),
		"zeros":      make([]byte, 1<<16),
		"cut":        whole[:5000],
		"meta pages": append(make([]byte, 8192), whole[8192:]...),
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if ix, err := Open(path, Options{}); !errors.Is(err, ErrBroken) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				ix.Close()
			}
		}
	}
}

func TestWhatWasUsedAndWhatLeadsWhereIsKept(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	use := Use{Time: at, Uses: 7, Priority: 1234.5}
	leads := []digest.Digest{d1, digest.SHA512.FromString("2")}
	manifest := digest.FromString("manifest")
	ix.Put(Possession{Digest: manifest, Domain: "*", Object: Object{Size: 1}, Children: leads}, Possession{Digest: d1, Domain: "*", Object: Object{Size: 1}})
	ix.NoteUse(d1, Use{Time: at, Uses: 6})
	sync1(t, ix)
	ix.NoteUse(d1, use)
	ix.NoteUse(d2, use) // which is not stored
	repository := RepositoryKey{"docker.io", "library/busybox"}
	for _, note := range []struct {
		tag    Tag
		before digest.Digest
		taken  bool
	}{{Tag{Digest: d1, Sequence: 1}, "", true}, {Tag{Digest: d2, Sequence: 3}, d1, true}, {Tag{Digest: d1, Sequence: 2}, "", false}} {
		if before, taken := ix.NoteTag(repository.TagKey("1"), note.tag); before != note.before || taken != note.taken {
			t.Errorf("%+v: %v %v", note, before, taken)
		}
	}

	ix = again(t, ix)
	use, used := ix.Use(d1)
	children, tags := make(map[digest.Digest][]digest.Digest), 0
	ix.Children(func(d digest.Digest, c []digest.Digest) { children[d] = c })
	ix.Tags(func(k TagKey, tg Tag) {
		if k != repository.TagKey("1") || tg.Digest != d2 {
			t.Errorf("%v %v", k, tg)
		}
		tags++
	})
	if !used || !use.Time.Equal(at) || use.Uses != 7 || use.Priority != 1234.5 || len(children) != 1 || !slices.Equal(children[manifest], leads) || tags != 1 {
		t.Errorf("%v %v %d tags", use, children, tags)
	}
	ix.Drop(manifest)
	ix = again(t, ix)
	ix.Children(func(d digest.Digest, _ []digest.Digest) { t.Errorf("%s still leads somewhere", d) })
}

// TestManyChildrenAreManyRows: as many as a manifest may lead to, beside one that leads
// to a few.
func TestManyChildrenAreManyRows(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	want := make(map[digest.Digest][]digest.Digest)
	var put []Possession
	for i, n := range []int{1, childrenARow, childrenARow + 1, 45_000, 2} {
		s := Possession{Digest: digest.FromString(fmt.Sprint("manifest", i)), Domain: "*", Object: Object{Size: 1}}
		for j := range n {
			s.Children = append(s.Children, digest.FromString(fmt.Sprint(i, "/", j)))
		}
		want[s.Digest] = s.Children
		put = append(put, s)
	}
	ix.Put(put...)
	for len(want) > 0 {
		ix = again(t, ix)
		got := make(map[digest.Digest][]digest.Digest)
		ix.Children(func(d digest.Digest, c []digest.Digest) { got[d] = c })
		for d, children := range want {
			if !slices.Equal(got[d], children) || !slices.Equal(ix.ChildrenOf(d), children) {
				t.Errorf("%d and %d children, not %d", len(got[d]), len(ix.ChildrenOf(d)), len(children))
			}
		}
		if len(got) != len(want) {
			t.Errorf("%d lead to others, not %d", len(got), len(want))
		}
		gone := put[0].Digest
		put = put[1:]
		delete(want, gone)
		ix.Drop(gone)
		if c := ix.ChildrenOf(gone); c != nil {
			t.Errorf("%d children of what is gone", len(c))
		}
	}
}

// TestTheFileGrowsOnlyAsItMay: what it may not grow for stays known, and is written
// when it may.
func TestTheFileGrowsOnlyAsItMay(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index.db")
	full := errors.New("full")
	var room, granted atomic.Int64
	ix := openWith(t, path, Options{Grow: func(n int64) error {
		if room.Add(-n) < 0 {
			room.Add(n)
			return full
		}
		granted.Add(n)
		return nil
	}})
	start := ix.Limit()
	bounded := func() {
		t.Helper()
		info, err := os.Stat(path)
		if most := start + granted.Load(); err != nil || info.Size() > most || ix.Limit() > most {
			t.Errorf("%d bytes of %d, its limit is %d: %v", info.Size(), most, ix.Limit(), err)
		}
	}
	objects := 0
	for range 4 {
		var err error
		for n := objects + 100_000; err == nil && objects < n; objects += 1000 {
			for i := range 1000 {
				ix.Put(Possession{Digest: digest.FromString(fmt.Sprint(objects + i)), Domain: "*", Object: Object{Size: 1}})
			}
			err = ix.Sync()
		}
		if !errors.Is(err, full) {
			t.Fatalf("%d objects: %v", objects, err)
		}
		bounded()
		if n := ix.Counts().Objects; n != objects {
			t.Errorf("%d of %d objects are known", n, objects)
		}
		room.Store(4 << 20)
		sync1(t, ix)
		bounded()
		if n := written(t, ix).Counts().Objects; n != objects {
			t.Errorf("%d of %d objects are written", n, objects)
		}
		room.Store(0)
	}
}

// TestWhatIsConfirmedMeanwhileIsNotPruned: between looking and dropping.
func TestWhatIsConfirmedMeanwhileIsNotPruned(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	k := RepositoryKey{"docker.io", "app"}
	ix.NoteTag(k.TagKey("v1"), Tag{Digest: d1, Sequence: 1, Confirmed: at})
	ix.NoteMembership(k.MembershipKey("blobs", d1), Membership{Time: at})
	looks := 0
	once := func() bool { looks++; return looks <= 2 }
	untagged := ix.forget(func(RepositoryKey, int64) bool { return once() }, func(TagKey, Tag) bool { return once() })
	if _, ok := ix.Tag(k.TagKey("v1")); !ok || len(untagged) > 0 || looks != 4 {
		t.Errorf("%v, after %d looks: %v", ok, looks, untagged)
	}
	if _, ok := ix.Membership(k.MembershipKey("blobs", d1)); !ok {
		t.Error("the membership is gone")
	}
}

func TestWhatIsOfNoUseIsPruned(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	ix.Put(Possession{Digest: d1, Domain: "*", Object: Object{Size: 1}})
	k := RepositoryKey{"docker.io", "library/busybox"}
	now := at.Add(time.Hour)
	for tag, tg := range map[string]Tag{
		"stored":  {Digest: d1, Confirmed: at, Sequence: 1},
		"old":     {Digest: d2, Confirmed: at, Sequence: 2},
		"renewed": {Digest: d2, Confirmed: at, Sequence: 3},
		"new":     {Digest: d2, Confirmed: now, Sequence: 4},
		"gone":    {Sequence: 5},
	} {
		ix.NoteTag(k.TagKey(tag), tg)
	}
	ix.NoteMembership(k.MembershipKey("blobs", d1), Membership{Time: at})
	ix.NoteMembership(k.MembershipKey("blobs", d2), Membership{Time: at, Anonymous: now})
	sync1(t, ix)
	ix.NoteTag(k.TagKey("renewed"), Tag{Digest: d1, Confirmed: now, Sequence: 6})
	before := at.Add(time.Minute)
	if untagged := ix.Prune(Pruning{Memberships: before, Tags: before}); !slices.Equal(untagged, []digest.Digest{d2}) {
		t.Errorf("%v", untagged)
	}
	for range 2 {
		for tag, want := range map[string]bool{"stored": true, "old": false, "renewed": true, "new": true, "gone": true} {
			if _, ok := ix.Tag(k.TagKey(tag)); ok != want {
				t.Errorf("%s: %v", tag, ok)
			}
		}
		for d, want := range map[digest.Digest]bool{d1: false, d2: true} {
			if _, ok := ix.Membership(k.MembershipKey("blobs", d)); ok != want {
				t.Errorf("membership of %s: %v", d, ok)
			}
		}
		ix = again(t, ix)
	}
	if seq := ix.LastSequence(); seq != 6 {
		t.Errorf("the sequence is %d", seq)
	}
}

// TestAFileThatBreaksIsWrittenAfresh from memory, while others read and note, and a
// start finds all that there is, and nothing that was taken back.
func TestAFileThatBreaksIsWrittenAfresh(t *testing.T) {
	t.Parallel()
	in := func(path string, at int64, bytes []byte) error {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(bytes, at)
		return errors.Join(err, f.Close())
	}
	noise := make([]byte, 60_000)
	for i := range noise {
		noise[i] = byte(i * i >> 3)
	}
	for name, damage := range map[string]func(path string) error{
		"cut":         func(path string) error { return os.Truncate(path, 8192) },
		"zeroed":      func(path string) error { return in(path, 0, make([]byte, 100_000)) },
		"noise":       func(path string) error { return in(path, 8192, noise) },
		"overwritten": func(path string) error { return os.WriteFile(path, []byte("no index"), 0o600) },
		"removed":     os.Remove,
		"exchanged": func(path string) error {
			return errors.Join(os.WriteFile(path+".other", noise, 0o600), os.Rename(path+".other", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "index.db")
			var broken atomic.Int64
			ix := openWith(t, path, Options{Aside: path + ".aside", Trouble: func(err error) {
				if errors.Is(err, ErrBroken) {
					broken.Add(1)
				} else if err != nil {
					t.Error(err)
				}
			}})
			k := RepositoryKey{"docker.io", "app"}
			const rows = 3000
			digests := make([]digest.Digest, rows)
			for i := range rows {
				digests[i] = digest.FromString(fmt.Sprint(i))
				ix.Put(Possession{Digest: digests[i], Domain: "*", Object: Object{Size: int64(i)}})
				ix.NoteMembership(k.MembershipKey("blobs", digests[i]), Membership{Time: at, Anonymous: at})
				ix.NoteTag(k.TagKey(fmt.Sprint(i)), Tag{Digest: digests[i], Confirmed: at, Sequence: uint64(i + 1)})
			}
			gone := digest.FromString("gone")
			ix.Put(Possession{Digest: gone, Domain: "*", Object: Object{Size: 1}})
			sync1(t, ix)
			var others sync.WaitGroup
			stop := make(chan struct{})
			others.Go(func() {
				for i := 0; ; i = (i + 1) % rows {
					select {
					case <-stop:
						return
					default:
					}
					if o, ok := ix.Object("*", digests[i]); !ok || o.Size != int64(i) {
						t.Errorf("%+v, %v", o, ok)
						return
					}
					ix.NoteUse(digests[i], Use{Time: at, Uses: 1})
				}
			})
			if err := damage(path); err != nil {
				t.Fatal(err)
			}
			ix.DeleteMembership(k.MembershipKey("blobs", digests[7]))
			ix.Drop(gone)
			sync1(t, ix)
			close(stop)
			others.Wait()
			if broken.Load() != 1 {
				t.Errorf("it was broken %d times", broken.Load())
			}
			if _, ok := written(t, ix).Membership(k.MembershipKey("blobs", digests[7])); ok {
				t.Error("what was taken back is there")
			}
			// The writer may have found it before Sync came, which waits for what was
			// changed only, and then is still writing the rest.
			next := again(t, ix)
			if c, want := next.Counts(), (Counts{Objects: rows, Tags: rows, Memberships: rows - 1, Possessions: rows}); c != want {
				t.Errorf("%+v, not %+v", c, want)
			}
			if _, err := os.Stat(path + ".aside"); (err == nil) != (name != "removed") {
				t.Errorf("kept for whoever looks: %v", err)
			}
		})
	}
}

// TestAFileThatBreaksJustWhenItWasWrittenIsFoundOut, by the next look at it.
func TestAFileThatBreaksJustWhenItWasWrittenIsFoundOut(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(path string) error{
		"cut":         func(path string) error { return os.Truncate(path, 8192) },
		"zeroed":      func(path string) error { return os.WriteFile(path, make([]byte, 1<<20), 0o600) },
		"overwritten": func(path string) error { return os.WriteFile(path, []byte("no index"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "index.db")
			var spoil atomic.Bool
			ix := openWith(t, path, Options{Aside: path + ".aside", Steps: func(step string, do func() error) error {
				err := do()
				if step == "write index" && spoil.CompareAndSwap(true, false) {
					err = errors.Join(err, damage(path))
				}
				return err
			}})
			spoil.Store(true)
			ix.Put(Possession{Digest: d1, Domain: "*", Object: Object{Size: 1}})
			sync1(t, ix)
			for range 2 { // whether or not the first one was the one that was spoilt
				sync1(t, ix)
			}
			if _, ok := written(t, ix).Row(d1); !ok {
				t.Error("the file is broken still")
			}
		})
	}
}

// TestADiskThatRefusesIsAskedAgain, and knows all that was changed meanwhile in the
// end, also where that was too much to keep account of.
func TestADiskThatRefusesIsAskedAgain(t *testing.T) {
	t.Parallel()
	for _, many := range []int{100, maxDirty + 1} {
		t.Run(fmt.Sprint(many), func(t *testing.T) {
			t.Parallel()
			var refuses atomic.Bool
			path := filepath.Join(t.TempDir(), "index.db")
			ix := openWith(t, path, Options{Aside: path + ".aside", Steps: refusing(&refuses)})
			k := RepositoryKey{"docker.io", "app"}
			gone := k.MembershipKey("blobs", d1)
			ix.NoteMembership(gone, Membership{Time: at})
			sync1(t, ix)
			refuses.Store(true)
			ix.DeleteMembership(gone)
			for i := range many {
				ix.NoteMembership(k.MembershipKey("blobs", digest.FromString(fmt.Sprint("x", i))), Membership{Time: at})
			}
			if err := ix.Sync(); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("%v", err)
			}
			refuses.Store(false)
			sync1(t, ix)
			next := written(t, ix)
			if _, ok := next.Membership(gone); ok || next.Counts().Memberships != many {
				t.Errorf("%v, %+v", ok, next.Counts())
			}
		})
	}
}

func refusing(when *atomic.Bool) fault.Steps {
	return func(_ string, do func() error) error {
		if when.Load() {
			return syscall.ENOSPC
		}
		return do()
	}
}

// TestManyNotesAreWrittenInParts, of which one that fails leaves those before it
// written, and itself and those after it for the next time.
func TestManyNotesAreWrittenInParts(t *testing.T) {
	const many = 3*rowsAWrite - 1
	var writes, failing atomic.Int64
	ix := openWith(t, filepath.Join(t.TempDir(), "index.db"), Options{Steps: func(name string, do func() error) error {
		if name == "write index" && writes.Add(1) == failing.Load() {
			return syscall.EIO
		}
		return do()
	}})
	for i := range many {
		ix.NoteMembership(RepositoryKey{"docker.io", "app"}.MembershipKey("blobs", digest.FromString(fmt.Sprint(i))), Membership{Time: at})
	}
	writes.Store(0)
	failing.Store(4) // the first part grows the file on its way
	if err := ix.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	if n := ix.dirty.len(); n == 0 || n >= many {
		t.Errorf("%d are left", n)
	}
	sync1(t, ix)
	if n := written(t, ix).Counts().Memberships; n != many || ix.dirty.len() > 0 {
		t.Errorf("%d are written, %d left", n, ix.dirty.len())
	}
}

// TestWhatWasTakenBackStaysSo in the file, once Sync has returned.
func TestWhatWasTakenBackStaysSo(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	repo := RepositoryKey{"docker.io", "library/app"}
	member, open := repo.MembershipKey("manifests", d1), repo.MembershipKey("blobs", d2)
	ix.NoteMembership(member, Membership{Time: at, MediaType: "a/b"})
	ix.NoteMembership(open, Membership{Time: at, Anonymous: at})
	sync1(t, ix)
	ix.DeleteMembership(member)
	if !ix.CloseRepository(repo) || ix.CloseRepository(repo) {
		t.Error("what anonymous was served is not forgotten once")
	}
	sync1(t, ix)
	for _, ix := range []*Index{ix, written(t, ix)} {
		if m, ok := ix.Membership(member); ok {
			t.Errorf("the membership is back: %+v", m)
		}
		if m, ok := ix.Membership(open); !ok || !m.Anonymous.IsZero() || m.Time.IsZero() {
			t.Errorf("what anonymous was served is back, or more is gone: %+v", m)
		}
	}
}

// TestNobodyWaitsForAnIndexThatIsClosed.
func TestNobodyWaitsForAnIndexThatIsClosed(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	if err := errors.Join(ix.Close(), ix.Close()); err != nil {
		t.Error(err)
	}
	if err := ix.Sync(); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

// fill makes an index of so many objects, each of five repositories' and a fifth of
// them manifests, which lead to the four after them.
func fill(b testing.TB, path string, objects int) *Index {
	ix := openWith(b, path, Options{Rows: 1 << 40})
	put := make([]Possession, objects)
	for i := range put {
		put[i] = Possession{Digest: digest.FromString(fmt.Sprint(i)), Domain: "*", Object: Object{Size: int64(i), Alloc: 4096, Created: at, Inode: uint64(i), Modified: at.UnixNano(), Changed: at.UnixNano(), Verified: at}}
	}
	for i := range put {
		kind := "blobs"
		if i%5 == 0 {
			kind = "manifests"
			for j := 1; j < 5 && i+j < objects; j++ {
				put[i].Children = append(put[i].Children, put[i+j].Digest)
			}
		}
		for j := range 5 {
			m := Membership{Time: at, Anonymous: at}
			if kind == "manifests" {
				m.MediaType = "application/vnd.oci.image.manifest.v1+json"
			}
			ix.NoteMembership(RepositoryKey{"registry.example", fmt.Sprint("team/app", (i/5+j*7)%1000)}.MembershipKey(kind, put[i].Digest), m)
		}
	}
	ix.Put(put...)
	return ix
}

// BenchmarkOpen is a start: what it takes, in time and in memory.
func BenchmarkOpen(b *testing.B) {
	for _, objects := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(objects), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "index.db")
			if err := fill(b, path, objects).Close(); err != nil {
				b.Fatal(err)
			}
			heap := func() float64 {
				runtime.GC()
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				return float64(m.HeapAlloc)
			}
			before := heap()
			for b.Loop() {
				ix, err := Open(path, Options{Rows: 1 << 40})
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				b.ReportMetric((heap()-before)/(1<<20), "MiB")
				b.ReportMetric(float64(ix.Counts().Memberships), "memberships")
				ix.Close()
				b.StartTimer()
			}
		})
	}
}

// BenchmarkRead is what a hit asks.
func BenchmarkRead(b *testing.B) {
	ix := fill(b, filepath.Join(b.TempDir(), "index.db"), 100_000)
	d := digest.FromString("500")
	k := RepositoryKey{"registry.example", "team/app100"}.MembershipKey("manifests", d)
	b.Run("membership", func(b *testing.B) {
		for b.Loop() {
			if _, ok := ix.Membership(k); !ok {
				b.Fatal("it is not there")
			}
		}
	})
	b.Run("object", func(b *testing.B) {
		for b.Loop() {
			if _, ok := ix.Object("*", d); !ok {
				b.Fatal("it is not there")
			}
		}
	})
}

// BenchmarkSync writes new notes; ten times as many take about ten times as long.
func BenchmarkSync(b *testing.B) {
	for _, n := range []int{5_000, 50_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ix := open(b, filepath.Join(b.TempDir(), "index.db"))
			k := RepositoryKey{"docker.io", "app"}
			for round := 0; b.Loop(); round++ {
				b.StopTimer()
				for i := range n {
					ix.NoteMembership(k.MembershipKey("blobs", digest.FromString(fmt.Sprint(round, i))), Membership{Time: at})
				}
				b.StartTimer()
				sync1(b, ix)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/note")
		})
	}
}
