// SPDX-License-Identifier: Apache-2.0

package index

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, path string) *Index {
	t.Helper()
	ix, err := Open(path, nil, Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	return ix
}

var (
	d1 = digest.FromString("1")
	d2 = digest.FromString("2")
	at = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
)

func TestNotesAreReadAtOnceAndSurviveAClose(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index.db")
	ix := open(t, path)
	repo := RepositoryKey{"docker.io", "library/app"}
	tag, member := repo.TagKey("v1"), repo.MembershipKey("manifests", d1)
	for _, step := range []func(){func() {}, func() {
		if err := ix.Close(); err != nil {
			t.Fatal(err)
		}
		ix = open(t, path)
	}} {
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
	if seq, err := ix.LastSequence(); err != nil || seq != 5 {
		t.Fatal(seq, err)
	}
	ix.DeleteMembership(member)
	if _, ok := ix.Membership(member); ok {
		t.Fatal("a membership that was taken back")
	}
	if err := ix.Flush(false); err != nil {
		t.Fatal(err)
	}
	if _, ok := ix.Membership(member); ok {
		t.Fatal("a membership that was taken back, written")
	}
	if err := ix.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAnObjectIsItsPossessorsOnly(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	defer ix.Close()
	o := Object{Size: 7, Alloc: 4096, Created: at}
	if err := ix.Apply([]Stored{{Digest: d1, Domain: "*", Object: o}, {Digest: d1, Domain: "evil.example", Object: o}, {Digest: d2, Domain: "*", Object: o}}, nil); err != nil {
		t.Fatal(err)
	}
	for domain, want := range map[string]bool{"*": true, "evil.example": true, "other.example": false, "": false} {
		if _, ok := ix.Object(domain, d1); ok != want {
			t.Errorf("%q: %v", domain, ok)
		}
	}
	if err := ix.Apply(nil, []digest.Digest{d1}); err != nil {
		t.Fatal(err)
	}
	// Possessions go with the object: stored again by one, it is not the other's.
	if err := ix.Apply([]Stored{{Digest: d1, Domain: "*", Object: o}}, nil); err != nil {
		t.Fatal(err)
	}
	if _, ok := ix.Object("evil.example", d1); ok {
		t.Error("a possession outlived its object")
	}
	if _, ok := ix.Object("*", d2); !ok {
		t.Error("another object went along")
	}
}

func TestWhatIsNoIndexIsBroken(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	ix := open(t, good)
	if err := ix.Apply([]Stored{{Digest: d1, Domain: "*", Object: Object{Size: 1}}}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(good, nil, Bounds{}); !errors.Is(err, ErrLocked) {
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
		if ix, err := Open(path, nil, Bounds{}); !errors.Is(err, ErrBroken) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				ix.Close()
			}
		}
	}
}

func TestWhatWasUsedAndWhatLeadsWhereIsKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index.db")
	ix := open(t, path)
	use := Use{Time: at, Uses: 7, Priority: 1234.5}
	leads := []digest.Digest{d1, d2}
	manifest := digest.FromString("manifest")
	if err := ix.Apply([]Stored{{Digest: manifest, Domain: "*", Object: Object{Size: 1}, Children: leads}, {Digest: d1, Domain: "*", Object: Object{Size: 1}}}, nil); err != nil {
		t.Fatal(err)
	}
	ix.NoteUse(d1, Use{Time: at, Uses: 6})
	ix.NoteUse(d1, use)
	ix.NoteUse(d2, use) // which is not stored
	repository := RepositoryKey{"docker.io", "library/busybox"}
	if before, taken := ix.NoteTag(repository.TagKey("1"), Tag{Digest: d1, Sequence: 1}); before != "" || !taken {
		t.Error(before, taken)
	}
	if before, taken := ix.NoteTag(repository.TagKey("1"), Tag{Digest: d2, Sequence: 3}); before != d1 || !taken {
		t.Error(before, taken)
	}
	if _, taken := ix.NoteTag(repository.TagKey("1"), Tag{Digest: d1, Sequence: 2}); taken {
		t.Error("an older one is taken")
	}
	if err := ix.Close(); err != nil {
		t.Fatal(err)
	}

	ix = open(t, path)
	defer ix.Close()
	uses, children, tags := make(map[digest.Digest]Use), make(map[digest.Digest][]digest.Digest), 0
	err := errors.Join(
		ix.Uses(func(d digest.Digest, u Use) { uses[d] = u }),
		ix.Children(func(d digest.Digest, c []digest.Digest) { children[d] = c }),
		ix.Tags(func(k RepositoryKey, tag string, tg Tag) {
			if k != repository || tag != "1" || tg.Digest != d2 {
				t.Errorf("%v %s %v", k, tag, tg)
			}
			tags++
		}))
	if err != nil || len(uses) != 1 || !uses[d1].Time.Equal(at) || uses[d1].Uses != 7 || uses[d1].Priority != 1234.5 || len(children) != 1 || !slices.Equal(children[manifest], leads) || tags != 1 {
		t.Errorf("%v %v %d tags: %v", uses, children, tags, err)
	}
	if err := ix.Apply(nil, []digest.Digest{manifest}); err != nil {
		t.Fatal(err)
	}
	if err := ix.Children(func(d digest.Digest, _ []digest.Digest) { t.Errorf("%s still leads somewhere", d) }); err != nil {
		t.Fatal(err)
	}
}

// TestManyChildrenAreManyRows: as many as a manifest may lead to, beside one that leads
// to a few.
func TestManyChildrenAreManyRows(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	defer ix.Close()
	want := make(map[digest.Digest][]digest.Digest)
	var put []Stored
	for i, n := range []int{1, childrenARow, childrenARow + 1, 45_000, 2} {
		s := Stored{Digest: digest.FromString(fmt.Sprint("manifest", i)), Domain: "*", Object: Object{Size: 1}}
		for j := range n {
			s.Children = append(s.Children, digest.FromString(fmt.Sprint(i, "/", j)))
		}
		want[s.Digest] = s.Children
		put = append(put, s)
	}
	if err := ix.Apply(put, nil); err != nil {
		t.Fatal(err)
	}
	for len(want) > 0 {
		got := make(map[digest.Digest][]digest.Digest)
		if err := ix.Children(func(d digest.Digest, c []digest.Digest) { got[d] = c }); err != nil {
			t.Fatal(err)
		}
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
		if err := ix.Apply(nil, []digest.Digest{gone}); err != nil {
			t.Fatal(err)
		}
		if c := ix.ChildrenOf(gone); c != nil {
			t.Errorf("%d children of what is gone", len(c))
		}
	}
}

// TestAConfinedIndexDoesNotGrow: what does not fit is not written, what is deleted
// always fits, and so does what was let in.
func TestAConfinedIndexDoesNotGrow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index.db")
	ix := open(t, path)
	defer ix.Close()
	size := func() int64 {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	many := func(i int) (put []Stored) {
		for j := range 10_000 {
			put = append(put, Stored{Digest: digest.FromString(fmt.Sprint(i, "/", j)), Domain: "*", Object: Object{Size: 1}})
		}
		return put
	}
	for i := range 4 {
		limit := ix.Confine()
		put := many(i)
		ix.NoteTag(RepositoryKey{"docker.io", "app"}.TagKey(fmt.Sprint(i)), Tag{Digest: d1, Sequence: uint64(i + 1)})
		if err := ix.Apply(put, nil); !errors.Is(err, ErrFull) || size() > limit {
			t.Fatalf("%d bytes of %d: %v", size(), limit, err)
		}
		if _, ok := ix.Row(put[0].Digest); ok {
			t.Error("a part of it was written")
		}
		if i > 0 { // with nothing but the next growth
			if err := ix.Apply(nil, []digest.Digest{many(i - 1)[i].Digest}); err != nil || size() > limit {
				t.Errorf("%d bytes of %d: %v", size(), limit, err)
			}
		}
		const more = 32 << 20
		ix.Widen(more)
		if err := ix.Apply(put, nil); err != nil || size() > limit+more {
			t.Fatalf("%d bytes of %d: %v", size(), limit+more, err)
		}
		if _, ok := ix.Row(put[0].Digest); !ok {
			t.Error("it is not there")
		}
	}
}

// TestWhatIsConfirmedMeanwhileIsNotPruned: between looking and deleting.
func TestWhatIsConfirmedMeanwhileIsNotPruned(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	defer ix.Close()
	now := time.Now()
	key := RepositoryKey{"docker.io", "app"}.TagKey("v1")
	ix.NoteTag(key, Tag{Digest: d1, Sequence: 1, Confirmed: now.Add(-time.Hour)})
	if err := ix.Flush(true); err != nil {
		t.Fatal(err)
	}
	looked := ix.db.Stats().TxN
	ix.writing.Lock()
	pruned := make(chan error)
	go func() {
		untagged, err := ix.Prune(Pruning{Tags: now.Add(-time.Minute)})
		if len(untagged) > 0 {
			err = errors.Join(err, fmt.Errorf("%v is untagged", untagged))
		}
		pruned <- err
	}()
	deadline := time.Now().Add(10 * time.Second)
	for s := ix.db.Stats(); (s.TxN == looked || s.OpenTxN > 0) && time.Now().Before(deadline); s = ix.db.Stats() {
		runtime.Gosched()
	}
	fresh := Tag{Digest: d1, Sequence: 2, Confirmed: now}
	if err := ix.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(tagBucket).Put([]byte(key), fresh.encode()) }); err != nil {
		t.Error(err)
	}
	ix.writing.Unlock()
	if err := <-pruned; err != nil {
		t.Error(err)
	}
	if got, ok := ix.Tag(key); !ok || got.Sequence != 2 {
		t.Errorf("%+v, %v", got, ok)
	}
}

func TestWhatIsOfNoUseIsPruned(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	defer ix.Close()
	if err := ix.Apply([]Stored{{Digest: d1, Domain: "*", Object: Object{Size: 1}}}, nil); err != nil {
		t.Fatal(err)
	}
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
	if err := ix.Flush(false); err != nil {
		t.Fatal(err)
	}
	ix.NoteTag(k.TagKey("renewed"), Tag{Digest: d1, Confirmed: now, Sequence: 6})
	before := at.Add(time.Minute)
	untagged, err := ix.Prune(Pruning{Memberships: before, Tags: before})
	if err != nil || !slices.Equal(untagged, []digest.Digest{d2}) {
		t.Errorf("%v %v", untagged, err)
	}
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
	if seq, err := ix.LastSequence(); err != nil || seq != 5 {
		t.Errorf("the sequence is %d: %v", seq, err)
	}
}

// TestASecondWriterDoesNotHangBehindAPanic: the file is cut while one writes (the proxy's Flush or Prune) and another (the
// committer) waits for its turn: the first panics, its rollback panics too, and
// bbolt's writer lock is never given back.
func TestASecondWriterDoesNotHangBehindAPanic(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index.db")
	ix := open(t, path)
	for n := range 3 {
		if err := ix.Apply([]Stored{{Digest: d1, Domain: "*", Object: Object{Size: int64(n)}}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	in, goOn := make(chan struct{}), make(chan struct{})
	firstDone := make(chan error, 1)
	go func() {
		firstDone <- ix.update(func(tx *bolt.Tx) error {
			close(in)
			<-goOn
			o := Object{Size: 1}
			return tx.Bucket(objectBucket).Put([]byte(d2), o.encode())
		})
	}()
	<-in
	second := make(chan error, 1)
	go func() { // the committer
		k := RepositoryKey{"docker.io", "x"}
		ix.NoteMembership(k.MembershipKey("blobs", d1), Membership{Time: time.Now()})
		second <- ix.Flush(false)
	}()
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	close(goOn)
	select {
	case err := <-firstDone:
		t.Logf("first: %v", err)
	case <-time.After(5 * time.Second):
		t.Error("the first hangs")
	}
	select {
	case err := <-second:
		t.Logf("second: %v", err)
	case <-time.After(5 * time.Second):
		t.Error("the second writer hangs: it is the committer, and Renew is only ever called by it")
	}
	t.Log(ix.Broken())
}

// TestManyNotesAreWrittenInParts, of which one that does not fit leaves the others
// written and itself a note.
func TestManyNotesAreWrittenInParts(t *testing.T) {
	const many = 3*notesAWrite - 1
	var writes atomic.Int64
	failing := int64(-1)
	ix, err := Open(filepath.Join(t.TempDir(), "index.db"), func(name string, do func() error) error {
		if name == "write index" && writes.Add(1) == failing {
			return berrors.ErrMaxSizeReached
		}
		return do()
	}, Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	defer ix.Close()
	key := func(i int) string {
		return RepositoryKey{"docker.io", "app"}.MembershipKey("blobs", digest.FromString(fmt.Sprint(i)))
	}
	for i := range many {
		ix.NoteMembership(key(i), Membership{Time: at})
	}
	writes.Store(0)
	failing = 2
	if err := ix.Flush(false); !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	if n := len(ix.memberships.now); n != many-notesAWrite {
		t.Errorf("%d are left", n)
	}
	// With what is to be written at once, they wait.
	if err := ix.Apply([]Stored{{Digest: d1, Domain: "*", Object: Object{Size: 1, Created: at}}}, nil); err != nil || writes.Load() != 3 {
		t.Errorf("%d transactions: %v", writes.Load(), err)
	}
	if err := ix.Flush(false); err != nil || writes.Load() != 5 || len(ix.memberships.now) != 0 {
		t.Errorf("%d transactions, %d are left: %v", writes.Load(), len(ix.memberships.now), err)
	}
	for i := range many {
		if _, ok := ix.Membership(key(i)); !ok {
			t.Fatalf("%d is lost", i)
		}
	}
}

// TestNobodyHangsOnABrokenIndex: others ask while one finds out that it is broken.
func TestNobodyHangsOnABrokenIndex(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "index.db")
		ix := open(t, path)
		if err := ix.Apply([]Stored{{Digest: d1, Domain: "*", Object: Object{Size: 1, Created: at}}}, nil); err != nil {
			t.Fatal(err)
		}
		var asking sync.WaitGroup
		var asked atomic.Int64
		for range 8 {
			asking.Go(func() {
				for ix.Broken() == nil {
					ix.Row(d1)
					asked.Add(1)
				}
			})
		}
		for asked.Load() < 1000 {
			runtime.Gosched()
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		overwrite(t, path, info.Size())
		asking.Wait() // or for ever
		if err := ix.Renew(path + ".broken"); err != nil {
			t.Fatal(err)
		}
		if err := ix.Apply([]Stored{{Digest: d1, Domain: "*", Object: Object{Size: 1, Created: at}}}, nil); err != nil {
			t.Error(err)
		}
		if err := ix.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestWhatWasTakenBackMeanwhileStaysSo: an authority takes something back between a look
// at the notes and the transaction that writes them, and that is flushed.
func TestWhatWasTakenBackMeanwhileStaysSo(t *testing.T) {
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	defer ix.Close()
	repo := RepositoryKey{"docker.io", "library/app"}
	tag, member, open := repo.TagKey("v1"), repo.MembershipKey("manifests", d1), repo.MembershipKey("blobs", d2)
	ix.NoteMembership(member, Membership{Time: at})
	ix.NoteMembership(open, Membership{Time: at, Anonymous: at})
	ix.NoteTag(tag, Tag{Digest: d1, Confirmed: at, Sequence: 1})
	seen := ix.due(true)
	ix.DeleteMembership(member)
	if !ix.CloseRepository(repo) || ix.CloseRepository(repo) {
		t.Error("what anonymous was served is not forgotten once")
	}
	ix.NoteTag(tag, Tag{Digest: d2, Confirmed: at, Sequence: 2})
	if err := ix.Flush(false); err != nil {
		t.Fatal(err)
	}
	if err := ix.write(nil, nil, seen); err != nil {
		t.Fatal(err)
	}
	if m, ok := ix.Membership(member); ok {
		t.Errorf("the membership is back: %+v", m)
	}
	if m, ok := ix.Membership(open); !ok || !m.Anonymous.IsZero() || m.Time.IsZero() {
		t.Errorf("what anonymous was served is back, or more is gone: %+v", m)
	}
	if got, _ := ix.Tag(tag); got.Digest != d2 {
		t.Errorf("the tag is back: %+v", got)
	}
}

// TestClosingFindsOutThatTheFileIsBroken, and does not wait for itself.
func TestClosingFindsOutThatTheFileIsBroken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index.db")
	ix := open(t, path)
	ix.NoteMembership("k", Membership{Time: at})
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, path, info.Size())
	if err := ix.Close(); err != nil {
		t.Error(err)
	}
}

// overwrite has zeros in place of the file's bytes, in the same file.
func overwrite(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, size), 0); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkFlush writes new notes; ten times as many take about ten times as long.
func BenchmarkFlush(b *testing.B) {
	for _, n := range []int{5_000, 50_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ix, err := Open(filepath.Join(b.TempDir(), "index.db"), nil, Bounds{})
			if err != nil {
				b.Fatal(err)
			}
			defer ix.Close()
			for round := 0; b.Loop(); round++ {
				b.StopTimer()
				for i := range n {
					ix.NoteMembership(digest.FromString(fmt.Sprint(round, i)).String(), Membership{Time: at})
				}
				b.StartTimer()
				if err := ix.Flush(false); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/note")
		})
	}
}
