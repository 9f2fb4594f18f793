// SPDX-License-Identifier: Apache-2.0

package index

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func listed(upstream string) bool { return upstream == "docker.io" }

// TestWhatAnybodyCanHaveNotedIsBounded: half a million tags and as many objects of a
// registry that is not listed take their part of the rows and no more, in memory, in
// the file and of the time of a start; a listed one's are noted all the same.
func TestWhatAnybodyCanHaveNotedIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index.db")
	ix, err := Open(path, nil, Bounds{Listed: listed})
	if err != nil {
		t.Fatal(err)
	}
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before, most := heap(), int64(0)
	now := time.Now()
	note := func(upstream string, n int) {
		k := RepositoryKey{upstream, "app"}
		for i := range n {
			ix.NoteTag(k.TagKey(fmt.Sprint("v", i)), Tag{Digest: d1, Confirmed: now, Sequence: 1})
			ix.NoteMembership(k.MembershipKey("blobs", digest.NewDigestFromHex("sha256", fmt.Sprintf("%064x", i))), Membership{Time: now})
			if i%100_000 == 99_999 {
				most = max(most, heap()-before)
				if err := ix.Flush(false); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	note("evil.example", 500_000)
	counts, err := ix.Counts()
	if err != nil || counts.Tags != maxTags/strangersShare || counts.Memberships != maxMemberships/strangersShare {
		t.Errorf("%+v, %v", counts, err)
	}
	note("docker.io", 1000)
	if err := ix.Flush(true); err != nil {
		t.Fatal(err)
	}
	if after, err := ix.Counts(); err != nil || after.Tags != counts.Tags+1000 || after.Memberships != counts.Memberships+1000 {
		t.Errorf("%+v, %v", after, err)
	}
	if most > 64<<20 {
		t.Errorf("%d bytes of memory", most)
	}
	took := ix.StrangersBytes()
	if info, err := os.Stat(path); err != nil || info.Size() > took+took/4 {
		t.Errorf("the file has %d bytes, and is taken to have %d: %v", info.Size(), took, err)
	}
	if err := ix.Close(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if ix, err = Open(path, nil, Bounds{Listed: listed}); err != nil {
		t.Fatal(err)
	}
	defer ix.Close()
	if d := time.Since(start); d > time.Second {
		t.Errorf("it takes %v to open", d)
	}
	if again := ix.StrangersBytes(); again != took {
		t.Errorf("%d bytes are strangers' after a restart, and were %d", again, took)
	}
	if _, taken := ix.NoteTag(RepositoryKey{"evil.example", "app"}.TagKey("one more"), Tag{Digest: d1, Sequence: 2}); taken {
		t.Error("one more is noted after a restart")
	}
	if _, taken := ix.NoteTag(RepositoryKey{"evil.example", "app"}.TagKey("v0"), Tag{Digest: d2, Sequence: 2}); !taken {
		t.Error("one that is known cannot move")
	}
}

// TestRowsThatGoMakeRoomForOthers: what is taken back, and what is pruned.
func TestRowsThatGoMakeRoomForOthers(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "index.db")
	const rows = 50
	ix, err := Open(path, nil, Bounds{Listed: listed, Strangers: rows * rowRoom})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { ix.Close() }()
	now := time.Now()
	key := func(i int) string {
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
	flush := func() {
		t.Helper()
		if err := ix.Flush(true); err != nil {
			t.Fatal(err)
		}
	}
	fill(0, 2*rows)
	if n := there(0, 2*rows); n != rows {
		t.Errorf("%d are noted", n)
	}
	flush()
	for i := range 10 {
		ix.DeleteMembership(key(i))
	}
	flush()
	fill(rows, 2*rows)
	if n := there(0, 2*rows); n != rows || there(rows, 2*rows) != 10 {
		t.Errorf("%d are noted after some were taken back", n)
	}
	flush()
	if _, err := ix.Prune(Pruning{Memberships: now.Add(time.Second)}); err != nil || ix.StrangersBytes() != 0 {
		t.Errorf("%d bytes are left of none: %v", ix.StrangersBytes(), err)
	}
	fill(0, 2*rows)
	flush()
	if err := ix.Renew(path + ".aside"); err != nil {
		t.Fatal(err)
	}
	if ix.StrangersBytes() != 0 {
		t.Error("a new index has rows already")
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
	defer ix.Close()
	for n, want := range map[int]int{maxMediaType: maxMediaType, maxMediaType + 1: 0} {
		ix.NoteMembership(fmt.Sprint(n), Membership{Time: time.Now(), MediaType: strings.Repeat("x", n)})
		if m, ok := ix.Membership(fmt.Sprint(n)); !ok || len(m.MediaType) != want {
			t.Errorf("%d characters: %d", n, len(m.MediaType))
		}
	}
}
