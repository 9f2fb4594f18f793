// SPDX-License-Identifier: Apache-2.0

package index

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, path string) *Index {
	t.Helper()
	ix, err := Open(path, nil)
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
	if err := ix.Flush(); err != nil {
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
	if err := ix.Apply([]Stored{{d1, "*", o}, {d1, "evil.example", o}, {d2, "*", o}}, nil); err != nil {
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
	if err := ix.Apply([]Stored{{d1, "*", o}}, nil); err != nil {
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
	if err := ix.Apply([]Stored{{d1, "*", Object{Size: 1}}}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(good, nil); !errors.Is(err, ErrLocked) {
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
		if ix, err := Open(path, nil); !errors.Is(err, ErrBroken) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				ix.Close()
			}
		}
	}
}
