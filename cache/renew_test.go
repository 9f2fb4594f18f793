// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"tarn/images"
	"tarn/index"

	"github.com/opencontainers/go-digest"
)

// TestAnIndexThatBreaksCostsNothing: cut, zeroed or written over under the running
// process, whose memory map it is.
func TestAnIndexThatBreaksCostsNothing(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(path string, size int64) error{
		"cut":    func(path string, _ int64) error { return os.Truncate(path, 8192) },
		"zeroed": func(path string, size int64) error { return os.WriteFile(path, make([]byte, size), 0o600) },
		"noise": func(path string, size int64) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt(randomBytes(int(size)-8192), 8192)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			c := openChaos(t, dir, 1<<30)
			defer func() { c.Close() }()
			var sources []*origin
			for range 20 {
				o := &origin{body: randomBytes(100_000)}
				sources = append(sources, o)
				if _, err := readAll(c, parallelRequest(o, "one")); err != nil {
					t.Fatal(err)
				}
			}
			settle(t, "the commits", func() bool { return c.Stats().Flights == 0 })
			if err := c.Index().Sync(); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "index.db")
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := damage(path, info.Size()); err != nil {
				t.Fatal(err)
			}
			asked := func(reader string) (n int) {
				t.Helper()
				for _, o := range sources {
					n -= len(o.questions())
					if got, err := readAll(c, parallelRequest(o, reader)); err != nil || !bytes.Equal(got, o.body) {
						t.Fatalf("%d bytes: %v", len(got), err)
					}
					n += len(o.questions())
				}
				return n
			}
			if n := asked("two"); n > 0 { // while it is broken
				t.Errorf("%d questions for what was on the disk", n)
			}
			if err := c.Index().Sync(); err != nil {
				t.Fatal(err)
			}
			if s := c.Stats(); s.Adopting > 0 || s.Trouble != "" {
				t.Errorf("%+v", s)
			}
			if _, err := os.Stat(filepath.Join(dir, "index.db.broken")); err != nil {
				t.Error(err)
			}
			if err := landed(c); err != nil {
				t.Error(err)
			}
			c.Close()
			c = openChaos(t, dir, 1<<30)
			if s := c.Stats(); s.Adopting > 0 {
				t.Errorf("after a restart, %d files have no row", s.Adopting)
			}
			if n := asked("three"); n > 0 {
				t.Errorf("%d questions for what was on the disk, after a restart", n)
			}
		})
	}
}

// TestAnIndexThatEndsTheProcessIsSetAside: the marker of those that did not
// survive opening it.
func TestAnIndexThatEndsTheProcessIsSetAside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<30)
	o := &origin{body: randomBytes(100_000)}
	req := parallelRequest(o, "one")
	if _, err := readAll(c, req); err != nil {
		t.Fatal(err)
	}
	settle(t, "the commit", func() bool { return c.Stats().Flights == 0 })
	c.Close()
	marker := filepath.Join(dir, "index.db"+".opening")
	for n, aside := range []bool{false, false, true} {
		if n > 0 {
			if err := os.WriteFile(marker, bytes.Repeat([]byte("."), n), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c := openChaos(t, dir, 1<<30)
		if _, err := os.Stat(filepath.Join(dir, "index.db.broken")); (err == nil) != aside {
			t.Errorf("after %d: set aside: %v", n, err == nil)
		}
		if _, err := os.Stat(marker); err == nil {
			t.Error("the marker is left")
		}
		settle(t, "the adoption", func() bool { _, ok := c.Has(req.Key); return ok })
		c.Close()
	}
}

// TestWithoutAnIndexManifestsAndPinsStay: over the bound, what was not looked at yet goes like
// what was, and what is pinned is known from the start.
func TestWithoutAnIndexManifestsAndPinsStay(t *testing.T) {
	t.Parallel()
	const many, bound = 8, 6 << 20
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<30)
	var all []built
	for i := range many {
		all = append(all, buildImage(randomBytes(100_000), 900_000))
		pullImage(t, c, fmt.Sprint("v", i), uint64(i+1), all[i].own()...)
	}
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v0"}); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "index.db")); err != nil {
		t.Fatal(err)
	}
	var opened atomic.Int64
	goOn := make(chan struct{})
	slow := func(name string, do func() error) error {
		if name == "open blob" && opened.Add(1) == 3*many { // of five
			<-goOn
		}
		return do()
	}
	c, err := New(Options{Dir: dir, MaxSize: bound, Steps: slow})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	settle(t, "the middle", func() bool { return opened.Load() >= 3*many })
	body := randomBytes(1 << 20)
	if got, err := readAll(c, parallelRequest(&origin{body: body}, "one")); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	if err := c.store.Housekeep(); err != nil {
		t.Fatal(err)
	}
	if n := directory(dir); n > bound {
		t.Errorf("%d bytes on the disk", n)
	}
	close(goOn)
	settle(t, "the adopter", func() bool { return c.Stats().Adopting == 0 })
	if err := c.store.Housekeep(); err != nil {
		t.Fatal(err)
	}
	for i, image := range all {
		if !c.has(image.index) || !c.has(image.manifest) || !c.has(image.config) {
			t.Errorf("of image %d, what is small is gone", i)
		}
	}
	for i, b := range all[0].own() {
		if !c.has(b) {
			t.Errorf("object %d of what is pinned is gone", i)
		}
	}
	if n := directory(dir); n > bound {
		t.Errorf("%d bytes on the disk", n)
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

// TestAFullStoreIsRebuilt: its index has to grow again, and what is pinned is not what makes
// the room for that.
func TestAFullStoreIsRebuilt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<30)
	one := buildImage(randomBytes(3000), 7000)
	pullImage(t, c, "v1", 1, one.own()...)
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"}); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for range 1500 {
		body := randomBytes(2000)
		if err := os.WriteFile(c.store.Path(digest.FromBytes(body)), body, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c = openChaos(t, dir, 1<<30)
	settle(t, "the adopter", func() bool { return c.Stats().Adopting == 0 })
	if err := c.store.Housekeep(); err != nil {
		t.Fatal(err)
	}
	full := c.Stats().UsedBytes
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "index.db")
	info, err := os.Stat(path)
	if err == nil {
		err = os.WriteFile(path, make([]byte, info.Size()), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	c = openChaos(t, dir, full)
	defer c.Close()
	settle(t, "the adopter", func() bool { return c.Stats().Adopting == 0 })
	files, rows := 0, 0
	// In the committer, which may be making room.
	err = c.store.Do(func() error {
		entries, err := os.ReadDir(filepath.Join(dir, "blobs", "sha256"))
		files = len(entries)
		c.Index().Objects(func(digest.Digest, index.Object) { rows++ })
		return err
	})
	if err != nil || rows != files || rows < 500 {
		t.Errorf("%d files have %d rows: %v", files, rows, err)
	}
	for i, b := range one.own() {
		if !c.has(b) {
			t.Errorf("object %d of what is pinned is gone", i)
		}
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
	if n := directory(dir); n > full {
		t.Errorf("%d bytes on the disk, of %d", n, full)
	}
}
