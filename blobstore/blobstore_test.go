// SPDX-License-Identifier: Apache-2.0

package blobstore

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
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

func TestSweepTellsWhatWasPending(t *testing.T) {
	s := open(t)
	p := pending(t, s, "x")
	if err := os.WriteFile(filepath.Join(s.pendingDir(), "foreign"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	left, err := s.Sweep()
	if err != nil || len(left) != 1 || left[0] != p.Digest {
		t.Fatal(left, err)
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
	os.WriteFile(filepath.Join(s.algDir(digest.SHA256), "README"), nil, 0o600)
	os.Mkdir(filepath.Join(s.algDir(digest.SHA512), strings.Repeat("0", 128)), 0o700)
	known, strangers := 0, 0
	if err := s.Walk(func(d digest.Digest, _ string, _ fs.FileInfo) error {
		if d == p.Digest {
			known++
		} else if d == "" {
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
	for _, a := range Algorithms {
		if err := CheckDigest(a.FromString("x")); err != nil {
			t.Error(err)
		}
	}
}
