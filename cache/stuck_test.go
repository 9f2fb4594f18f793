// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
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
	for _, body := range [][]byte{one.index, one.manifest} { // the adopter has one file, and that may be one of these
		if got, err := readAll(c, parallelRequest(&origin{body: body}, "one")); err != nil || !bytes.Equal(got, body) {
			t.Fatalf("%d bytes: %v", len(got), err)
		}
	}
	settle(t, "a row", func() (some bool) {
		for _, body := range [][]byte{one.index, one.manifest} {
			d := digest.FromBytes(body)
			if _, ok := c.Index().Row(d); ok {
				some = true
				if leads := c.Index().ChildrenOf(d); len(leads) < 2 {
					t.Errorf("it has a row, and leads to %v", leads)
				}
			}
		}
		return some
	})
	close(hold)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// TestWholeAFileOfAnotherSizeHasRangesRefused, since whoever was being sent the one that
// was changed may have a beginning of it.
func TestWholeAFileOfAnotherSizeHasRangesRefused(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	o := &origin{body: randomBytes(300_000)}
	req := storedBy(t, c, o)
	if err := os.WriteFile(c.store.Path(req.Digest), randomBytes(200_000), 0o600); err != nil {
		t.Fatal(err)
	}
	resumed := req
	resumed.Offset, resumed.Ranged = 100_000, true
	if got, err := readAll(c, resumed); !errors.Is(err, ErrDropped) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	if got, err := readAll(c, req); err != nil || !bytes.Equal(got, o.body) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
}

// TestStrangersDownloadsAreNotParkedInTheListedOnesPlaces.
func TestStrangersDownloadsAreNotParkedInTheListedOnesPlaces(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 4<<30)
	defer c.Close()
	breaksOffAt := func(domain string, body []byte) {
		o := &origin{body: body}
		o.answer = func(n int, off, _ int64) (io.ReadCloser, Info, error) {
			if n == 0 {
				return io.NopCloser(io.MultiReader(o.part(0, 50_000), failing{})), Info{Size: int64(len(body))}, nil
			}
			return nil, Info{}, fmt.Errorf("%w: gone", ErrRefused)
		}
		req := parallelRequest(o, "one")
		req.Domain = domain
		readAll(c, req)
	}
	mine := randomBytes(150_000)
	breaksOffAt(ListedDomain, mine)
	var breaking sync.WaitGroup
	for i := range 300 {
		breaking.Go(func() { breaksOffAt("evil.example", randomBytes(100_000+i)) })
	}
	breaking.Wait()
	if s := c.Stats(); s.Parked > 100 {
		t.Errorf("%d are parked", s.Parked)
	}
	o := &origin{body: mine}
	req := parallelRequest(o, "one")
	if got, err := readAll(c, req); err != nil || !bytes.Equal(got, mine) || o.sent() > int64(len(mine))-40_000 {
		t.Errorf("%d bytes, %d of them fetched again: %v", len(got), o.sent(), err)
	}
}
