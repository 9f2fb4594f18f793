// SPDX-License-Identifier: Apache-2.0

package blobstore

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func pending(t *testing.T, s *Store, text string) *Pending {
	t.Helper()
	p, err := s.Create(digest.FromString(text))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.File.Close() })
	if _, err := io.WriteString(p.File, text); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestACommitMakesFilesVisibleAndPrivate(t *testing.T) {
	s := open(t)
	a, b := pending(t, s, "a"), pending(t, s, "b")
	if _, err := s.Open(a.Digest); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("visible before the commit: %v", err)
	}
	for i, err := range s.Commit([]*Pending{a, b}) {
		if err != nil {
			t.Errorf("file %d: %v", i, err)
		}
	}
	for _, p := range []*Pending{a, b} {
		info, err := os.Stat(s.Path(p.Digest))
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("%v %v", info, err)
		}
		p.Discard() // nothing to discard any more
		if _, err := os.Stat(s.Path(p.Digest)); err != nil {
			t.Error(err)
		}
	}
	info, err := os.Stat(filepath.Join(s.dir, "blobs"))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", info, err)
	}
}

func TestPendingBytesAreWhatIsWritten(t *testing.T) {
	s := open(t)
	p := pending(t, s, strings.Repeat("x", 100_000))
	if err := p.Note([]byte("journal")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.File.WriteAt([]byte("end"), 1<<30); err != nil { // most of it is a hole
		t.Fatal(err)
	}
	if n := s.PendingBytes(); n < 100_000 || n > 200_000 {
		t.Errorf("%d bytes", n)
	}
	if err := p.Discard(); err != nil || s.PendingBytes() != 0 {
		t.Errorf("%d bytes of nothing: %v", s.PendingBytes(), err)
	}
}

func TestAFileThatCannotBeCommittedLeavesTheOthersAlone(t *testing.T) {
	s := open(t)
	good, closed, lost := pending(t, s, "good"), pending(t, s, "closed"), pending(t, s, "lost")
	closed.File.Close()
	os.Remove(lost.File.Name())
	errs := s.Commit([]*Pending{closed, good, lost})
	if errs[0] == nil || errs[1] != nil || errs[2] == nil {
		t.Fatal(errs)
	}
	if _, err := os.Stat(s.Path(good.Digest)); err != nil {
		t.Error(err)
	}
	for _, p := range []*Pending{closed, lost} {
		if _, err := os.Stat(s.Path(p.Digest)); !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	}
}

func TestOnlyPendingFilesWithAJournalAreLeft(t *testing.T) {
	s := open(t)
	bare, noted, torn, spoiled, orphan := pending(t, s, "bare"), pending(t, s, "noted"), pending(t, s, "torn"), pending(t, s, "spoiled"), pending(t, s, "orphan")
	for _, p := range []*Pending{noted, torn, spoiled, orphan} {
		for _, record := range []string{"one", "two words"} {
			if err := p.Note([]byte(record)); err != nil {
				t.Fatal(err)
			}
		}
	}
	tear := func(p *Pending, change func([]byte) []byte) {
		data, err := os.ReadFile(p.path + journalSuffix)
		if err == nil {
			err = os.WriteFile(p.path+journalSuffix, change(data), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	tear(torn, func(b []byte) []byte { return b[:len(b)-3] })
	tear(spoiled, func(b []byte) []byte { b[10] ^= 1; return b })
	os.Remove(orphan.path)
	if err := os.WriteFile(filepath.Join(s.pendingDir(), "foreign"), nil, 0o600); err != nil {
		t.Fatal(err)
	}

	left, deleted, err := s.Left()
	if err != nil {
		t.Fatal(err)
	}
	notes := make(map[digest.Digest]string)
	for _, p := range left {
		t.Cleanup(func() { p.Close() })
		notes[p.Digest] = string(bytes.Join(p.Notes, []byte(",")))
		if data, err := io.ReadAll(p.File); err != nil || digest.FromBytes(data) != p.Digest {
			t.Error(data, err)
		}
	}
	if want := map[digest.Digest]string{noted.Digest: "one,two words", torn.Digest: "one"}; !maps.Equal(notes, want) {
		t.Errorf("%v, not %v", notes, want)
	}
	slices.Sort(deleted)
	want := []digest.Digest{bare.Digest, spoiled.Digest}
	slices.Sort(want)
	if !slices.Equal(deleted, want) {
		t.Errorf("deleted %v", deleted)
	}
	if entries, _ := os.ReadDir(s.pendingDir()); len(entries) != 4 {
		t.Error(entries)
	}

	// What is noted after a torn record is read, and a commit takes it all away.
	for _, p := range left {
		if p.Digest == torn.Digest {
			if err := p.Note([]byte("three")); err != nil {
				t.Fatal(err)
			}
			if data, _ := os.ReadFile(p.path + journalSuffix); !bytes.HasSuffix(data, []byte("three\n")) || bytes.Contains(data, []byte("two")) {
				t.Errorf("%q", data)
			}
		}
	}
	if errs := s.Commit(left); errors.Join(errs...) != nil {
		t.Fatal(errs)
	}
	if entries, _ := os.ReadDir(s.pendingDir()); len(entries) != 0 {
		t.Error(entries)
	}
}

func TestWalkKnowsStrangers(t *testing.T) {
	s := open(t)
	p := pending(t, s, "x")
	if err := s.Commit([]*Pending{p})[0]; err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(s.algDir(digest.SHA256), "README"), nil, 0o600) // a regular file: the caller checks its name
	os.Mkdir(filepath.Join(s.algDir(digest.SHA512), strings.Repeat("0", 128)), 0o700)
	known, strangers := 0, 0
	all, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	if err := all.Walk(func(d digest.Digest, _ fs.DirEntry) error {
		if d == p.Digest {
			known++
		} else if CheckDigest(d) != nil {
			strangers++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if known != 1 || strangers != 2 {
		t.Error(known, strangers)
	}
}

func TestOnlyRegisteredDigestsBecomePaths(t *testing.T) {
	for _, d := range []digest.Digest{"", "sha256:", "sha256:..", "sha256:../../x", "md5:d41d8cd98f00b204e9800998ecf8427e",
		digest.Digest("sha384:" + strings.Repeat("0", 96)), digest.Digest("sha256:" + strings.Repeat("A", 64)), digest.Digest("sha256:" + strings.Repeat("0", 65))} {
		if CheckDigest(d) == nil {
			t.Errorf("%q passes", d)
		}
	}
	for _, a := range algorithms {
		if err := CheckDigest(a.FromString("x")); err != nil {
			t.Error(err)
		}
	}
}

// FuzzJournal: of whatever lies in a journal, the records before the first that
// was not written so are read, and nothing behind it.
func FuzzJournal(f *testing.F) {
	f.Add([]byte("one"), []byte("two"), []byte("00000000 x\n"))
	f.Add([]byte(""), []byte("a b"), frame([]byte("three"))[1:])
	f.Fuzz(func(t *testing.T, one, two, torn []byte) {
		if bytes.ContainsAny(append(one, two...), "\n") {
			return
		}
		sound := append(frame(one), frame(two)...)
		notes, whole := readNotes(append(slices.Clone(sound), torn...))
		if whole < len(sound) || len(notes) < 2 || !bytes.Equal(notes[0], one) || !bytes.Equal(notes[1], two) {
			t.Fatalf("%q, %d", notes, whole)
		}
		var again []byte
		for _, n := range notes {
			again = append(again, frame(n)...)
		}
		if len(again) != whole {
			t.Errorf("%q takes %d bytes, not %d", notes, len(again), whole)
		}
	})
}
