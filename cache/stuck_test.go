// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestAFileThatDoesNotGoKeepsNoOther: one that the disk does not let go of stays, with
// its row, and what comes after it makes room.
func TestAFileThatDoesNotGoKeepsNoOther(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	c := openChaos(t, t.TempDir(), 7*size)
	defer c.Close()
	stuck := storedBy(t, c, &origin{body: randomBytes(size)})
	path := c.store.Path(stuck.Digest)
	// A directory with something in it is not removed as a file is.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(path, "something"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		body := randomBytes(size)
		storedBy(t, c, &origin{body: body})
		if !c.has(body) {
			t.Fatal("it was not stored")
		}
	}
	if s := c.Stats(); s.Evicted.Objects < 10 || s.UsedBytes+s.PendingBytes > s.MaxBytes {
		t.Errorf("%+v", s)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := c.store.Evict(1 << 40); err != nil || c.store.Stats().BlobBytes != 0 {
		t.Errorf("%d bytes are left: %v", c.store.Stats().BlobBytes, err)
	}
}

// TestAManifestThatIsAskedForBeforeItsTurnLeadsOn: its row says where it leads, also to
// a process that starts before the adopter has come by.
func TestAManifestThatIsAskedForBeforeItsTurnLeadsOn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<30)
	one := buildImage(randomBytes(3000), 70_000)
	pullImage(t, c, "v1", 1, one.own()...)
	if err := c.Close(); err != nil {
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
	until(t, "the adopter is held", first.Load)
	rows := 0
	for _, body := range [][]byte{one.index, one.manifest} { // the adopter has one file, and that may be one of these
		if got, err := readAll(c, parallelRequest(&origin{body: body}, "one")); err != nil || !bytes.Equal(got, body) {
			t.Fatalf("%d bytes: %v", len(got), err)
		}
		settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
		d := digest.FromBytes(body)
		if _, ok := c.Index().Row(d); ok {
			rows++
			if leads := c.Index().ChildrenOf(d); len(leads) < 2 {
				t.Errorf("it has a row, and leads to %v", leads)
			}
		}
	}
	close(hold)
	if err := c.Close(); err != nil || rows == 0 {
		t.Errorf("%d rows: %v", rows, err)
	}
}
