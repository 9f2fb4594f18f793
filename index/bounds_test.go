// SPDX-License-Identifier: Apache-2.0

package index

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func listed(upstream string) bool { return upstream == "docker.io" }

// TestWhatAnybodyCanHaveNotedIsBounded: half a million tags and as many objects of a
// registry that is not listed take their part of the rows and no more, in memory and
// in the file; a listed one's are noted all the same, and so are newer ones once the
// oldest have gone.
func TestWhatAnybodyCanHaveNotedIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index.db")
	ix := openWith(t, path, Options{Listed: listed})
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before, most := heap(), int64(0)
	now := time.Now()
	note := func(upstream string, from, n int) {
		k := RepositoryKey{upstream, "app"}
		for i := from; i < from+n; i++ {
			ix.NoteTag(k.TagKey(fmt.Sprint("v", i)), Tag{Digest: d1, Confirmed: now.Add(time.Duration(i)), Sequence: 1})
			ix.NoteMembership(k.MembershipKey("blobs", digest.NewDigestFromHex("sha256", fmt.Sprintf("%064x", i))), Membership{Time: now.Add(time.Duration(i))})
			if i%100_000 == 99_999 {
				sync1(t, ix)
				most = max(most, heap()-before)
			}
		}
	}
	note("evil.example", 0, 500_000)
	bound := int64(usualRows / StrangersShare)
	counts := ix.Counts()
	if took := int64(counts.Tags)*tagBytes + int64(counts.Memberships)*membershipBytes; took > bound || took < bound*9/10 {
		t.Errorf("%+v are taken for %d bytes of %d", counts, took, bound)
	}
	if most > bound*3/2 {
		t.Errorf("%d bytes of memory", most)
	}
	note("docker.io", 0, 1000)
	sync1(t, ix)
	if after := ix.Counts(); after.Tags != counts.Tags+1000 || after.Memberships != counts.Memberships+1000 {
		t.Errorf("%+v", after)
	}
	took := ix.StrangersBytes()
	if info, err := os.Stat(path); err != nil || info.Size() > took+took/4 {
		t.Errorf("the file has %d bytes, and is taken to have %d: %v", info.Size(), took, err)
	}
	ix = again(t, ix)
	if now := ix.StrangersBytes(); now != took {
		t.Errorf("%d bytes are strangers' after a restart, and were %d", now, took)
	}
	evil := RepositoryKey{"evil.example", "app"}
	if _, taken := ix.NoteTag(evil.TagKey("one more"), Tag{Digest: d1, Sequence: 2}); taken {
		t.Error("one more is noted after a restart")
	}
	if _, taken := ix.NoteTag(evil.TagKey("v7"), Tag{Digest: d2, Confirmed: now.Add(time.Hour), Sequence: 2}); !taken {
		t.Error("one that is known cannot move")
	}
	gone := ix.Trim()
	if left := ix.Counts(); len(gone) == 0 || left.Tags != counts.Tags+1000-len(gone) || left.Tags < counts.Tags*6/10 {
		t.Errorf("%d tags have gone, and %+v are left of %+v", len(gone), left, counts)
	}
	for tag, want := range map[string]bool{"v0": false, "v7": true, fmt.Sprint("v", counts.Tags-1): true} {
		if _, ok := ix.Tag(evil.TagKey(tag)); ok != want {
			t.Errorf("%s: %v", tag, ok)
		}
	}
	if _, ok := ix.Tag(RepositoryKey{"docker.io", "app"}.TagKey("v0")); !ok {
		t.Error("a listed registry's made room for a stranger's")
	}
	if _, taken := ix.NoteTag(evil.TagKey("one more"), Tag{Digest: d1, Sequence: 2}); !taken {
		t.Error("there is room, and one more is not noted")
	}
}

// TestListedRowsMakeRoomForListedOnes, the oldest first.
func TestListedRowsMakeRoomForListedOnes(t *testing.T) {
	t.Parallel()
	const rows = 1000
	ix := openWith(t, filepath.Join(t.TempDir(), "index.db"), Options{Rows: rows * membershipBytes})
	k := RepositoryKey{"docker.io", "app"}
	key := func(i int) MembershipKey { return k.MembershipKey("blobs", digest.FromString(fmt.Sprint(i))) }
	for i := range 10 * rows {
		ix.NoteMembership(key(i), Membership{Time: at.Add(time.Duration(i) * time.Second)})
		ix.Trim()
	}
	if n := ix.Counts().Memberships; n < rows/2 || n > rows {
		t.Errorf("%d are left", n)
	}
	for i := 10*rows - rows/2; i < 10*rows; i++ {
		if _, ok := ix.Membership(key(i)); !ok {
			t.Fatalf("%d is gone", i)
		}
	}
}

// TestRowsThatGoMakeRoomForOthers: what is taken back, and what is pruned.
func TestRowsThatGoMakeRoomForOthers(t *testing.T) {
	t.Parallel()
	const rows = 50
	ix := openWith(t, filepath.Join(t.TempDir(), "index.db"), Options{Listed: listed, StrangersFile: rows * rowRoom})
	now := time.Now()
	key := func(i int) MembershipKey {
		return RepositoryKey{"evil.example", "app"}.MembershipKey("blobs", digest.FromString(fmt.Sprint(i)))
	}
	there := func(from, to int) (n int) {
		for i := from; i < to; i++ {
			if _, ok := ix.Membership(key(i)); ok {
				n++
			}
		}
		return n
	}
	fill := func(from, to int) {
		for i := from; i < to; i++ {
			ix.NoteMembership(key(i), Membership{Time: now})
		}
	}
	fill(0, 2*rows)
	if n := there(0, 2*rows); n != rows {
		t.Errorf("%d are noted", n)
	}
	for i := range 10 {
		ix.DeleteMembership(key(i))
	}
	fill(rows, 2*rows)
	if n := there(0, 2*rows); n != rows || there(rows, 2*rows) != 10 {
		t.Errorf("%d are noted after some were taken back", n)
	}
	ix.Prune(Pruning{Memberships: now.Add(time.Second)})
	if ix.StrangersBytes() != 0 || ix.rows != (extent{}) || len(ix.repositories) != 0 {
		t.Errorf("%d bytes are left of none, %+v, %d repositories", ix.StrangersBytes(), ix.rows, len(ix.repositories))
	}
	// Long names count as several.
	long := RepositoryKey{"evil.example", strings.Repeat("x", 255)}
	n := 0
	for i := range rows {
		if _, taken := ix.NoteTag(long.TagKey(fmt.Sprint(i)), Tag{Digest: d1, Sequence: 1}); taken {
			n++
		}
	}
	if n != rows/2 {
		t.Errorf("%d tags of long names are noted", n)
	}
}

// TestNoMediaTypeIsLongerThanOneCanBe, whatever a registry has said.
func TestNoMediaTypeIsLongerThanOneCanBe(t *testing.T) {
	t.Parallel()
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	for n, want := range map[int]int{maxMediaType: maxMediaType, maxMediaType + 1: 0} {
		k := RepositoryKey{"docker.io", fmt.Sprint(n)}.MembershipKey("manifests", d1)
		ix.NoteMembership(k, Membership{Time: time.Now(), MediaType: strings.Repeat("x", n)})
		if m, ok := ix.Membership(k); !ok || len(m.MediaType) != want {
			t.Errorf("%d characters: %d", n, len(m.MediaType))
		}
	}
}

// TestRowsOfOneMomentDoNotAllGo: only as many as room is made for.
func TestRowsOfOneMomentDoNotAllGo(t *testing.T) {
	t.Parallel()
	const rows = 1000
	ix := openWith(t, filepath.Join(t.TempDir(), "index.db"), Options{Rows: repositoryBytes + 100 + rows*membershipBytes})
	k := RepositoryKey{"docker.io", "app"}
	for i := range rows {
		ix.NoteMembership(k.MembershipKey("blobs", digest.FromString(fmt.Sprint(i))), Membership{Time: at})
	}
	ix.Trim()
	if n := ix.Counts().Memberships; n < rows*trimTo/8-50 || n > rows*trimTo/8+50 {
		t.Errorf("%d of %d are left", n, rows)
	}
}

// TestWhatManifestsLeadToIsBounded, and what a stranger's do is no reason for a listed
// one's to lead nowhere.
func TestWhatManifestsLeadToIsBounded(t *testing.T) {
	t.Parallel()
	ix := openWith(t, filepath.Join(t.TempDir(), "index.db"), Options{})
	children := make([]digest.Digest, 10_000)
	for i := range children {
		children[i] = digest.FromString(fmt.Sprint(i))
	}
	const bytes = 10_000 * 33
	manifest := func(domain string, i int) digest.Digest {
		d := digest.FromString(fmt.Sprint(domain, i))
		ix.Put(Possession{Digest: d, Domain: domain, Object: Object{Size: 1}, Children: children})
		return d
	}
	n := 0
	for i := range 2 * maxStrangersLed / bytes {
		if ix.Leads(manifest("evil.example", i)) {
			n++
		}
	}
	if n != maxStrangersLed/bytes {
		t.Errorf("%d of strangers' manifests lead somewhere", n)
	}
	mine := manifest(ListedDomain, 0)
	if !ix.Leads(mine) {
		t.Error("a listed one leads nowhere")
	}
	first := digest.FromString("evil.example0")
	ix.Put(Possession{Digest: first, Domain: ListedDomain, Object: Object{Size: 1}}) // now it is a listed one's
	if !ix.Leads(manifest("evil.example", 1<<20)) {
		t.Error("what is a listed registry's, too, counts as a stranger's still")
	}
	ix = again(t, ix)
	if !ix.Leads(mine) || ix.leads.strangers > maxStrangersLed {
		t.Errorf("after a restart, %+v", ix.leads)
	}
}

// TestMediaTypesAreBounded: those that strangers make up leave room for the others.
func TestMediaTypesAreBounded(t *testing.T) {
	t.Parallel()
	ix := openWith(t, filepath.Join(t.TempDir(), "index.db"), Options{Listed: listed})
	note := func(upstream string, i int, mediaType string) string {
		k := RepositoryKey{upstream, "app"}.MembershipKey("manifests", digest.FromString(fmt.Sprint(i)))
		ix.NoteMembership(k, Membership{Time: time.Now(), MediaType: mediaType})
		m, _ := ix.Membership(k)
		return m.MediaType
	}
	for i := range 2 * maxTypes {
		note("evil.example", i, fmt.Sprint("a/b", i))
	}
	if n := len(ix.types.known); n != maxTypes/StrangersShare {
		t.Errorf("%d are kept", n)
	}
	if got := note("docker.io", 1, "a/mine"); got != "a/mine" {
		t.Errorf("%q", got)
	}
	if got := note("evil.example", 1<<20, "a/mine"); got != "a/mine" {
		t.Errorf("%q, which is known", got)
	}
}

// TestWhoHearsOfARefusalWaitsForTheFile, whoever has had it forgotten.
func TestWhoHearsOfARefusalWaitsForTheFile(t *testing.T) {
	t.Parallel()
	ix := open(t, filepath.Join(t.TempDir(), "index.db"))
	k := RepositoryKey{"docker.io", "app"}.MembershipKey("blobs", d1)
	ix.NoteMembership(k, Membership{Time: at})
	sync1(t, ix)
	if ix.Owes() {
		t.Error("nothing was taken back")
	}
	if !ix.DeleteMembership(k) || ix.DeleteMembership(k) || !ix.Owes() {
		t.Error("nothing is owed")
	}
	sync1(t, ix)
	if ix.Owes() {
		t.Error("it is in the file")
	}
}

// TestWhoIsListedLaterIsCountedSo: what is taken off as one of the others than it was
// entered as would leave counts that no row stands for.
func TestWhoIsListedLaterIsCountedSo(t *testing.T) {
	t.Parallel()
	var now atomic.Pointer[string]
	set := func(name string) { now.Store(&name) }
	set("a.example")
	ix := openWith(t, filepath.Join(t.TempDir(), "index.db"), Options{Listed: func(upstream string) bool { return upstream == *now.Load() }})
	at := time.Now()
	for _, upstream := range []string{"a.example", "b.example", "c.example"} {
		k := RepositoryKey{upstream, "app"}
		for i := range len(upstream) + int(upstream[0]) {
			ix.NoteTag(k.TagKey(fmt.Sprint("v", i)), Tag{Digest: d1, Confirmed: at, Sequence: 1})
			d := digest.NewDigestFromHex("sha256", fmt.Sprintf("%064x", i))
			ix.NoteMembership(k.MembershipKey(manifests, d), Membership{Time: at})
			ix.NoteMembership(k.MembershipKey(blobs, d), Membership{Time: at})
		}
	}
	as := ix.strangers
	ix.Relist()
	if ix.strangers != as {
		t.Errorf("counted anew %+v, as noted %+v", ix.strangers, as)
	}
	set("b.example")
	ix.Relist()
	if ix.strangers == as {
		t.Error("nothing has changed")
	}
	ix.Prune(Pruning{Memberships: at.Add(time.Hour), Tags: at.Add(time.Hour)})
	if ix.strangers != (extent{}) || ix.rows != (extent{}) {
		t.Errorf("without a row: %+v, %+v", ix.strangers, ix.rows)
	}
}

func TestWhoIsDisownedIsForgottenInTheFileToo(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "index.db")
	ix := openWith(t, path, Options{})
	key := func(upstream string) MembershipKey {
		return RepositoryKey{upstream, "app"}.MembershipKey(blobs, d1)
	}
	tag := RepositoryKey{"a.example", "app"}.TagKey("v1")
	ix.NoteTag(tag, Tag{Digest: d1, Confirmed: time.Now(), Sequence: 1})
	for _, name := range []string{"a.example", "b.example"} {
		ix.NoteMembership(key(name), Membership{Time: time.Now(), Anonymous: time.Now()})
	}
	sync1(t, ix)
	ix.Disown(func(upstream string) bool { return upstream == "a.example" })
	sync1(t, ix)
	for range 2 {
		if _, ok := ix.Membership(key("a.example")); ok {
			t.Error("not forgotten")
		}
		if _, ok := ix.Membership(key("b.example")); !ok {
			t.Error("another's is forgotten")
		}
		if _, ok := ix.Tag(tag); !ok {
			t.Error("the tag is forgotten")
		}
		if err := ix.Close(); err != nil {
			t.Fatal(err)
		}
		ix = openWith(t, path, Options{})
	}
}
