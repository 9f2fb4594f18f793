// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"tarn/cache/store"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// damages are what may become of a stored file.
var damages = map[string]func(path string, body []byte) error{
	"flipped": func(path string, body []byte) error { return flip(path, body, len(body)/2) },
	"flipped in its last byte, and dated back": func(path string, body []byte) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		return errors.Join(flip(path, body, len(body)-1), os.Chtimes(path, info.ModTime(), info.ModTime()))
	},
	"halved":  func(path string, body []byte) error { return os.Truncate(path, int64(len(body)/2)) },
	"emptied": func(path string, _ []byte) error { return os.Truncate(path, 0) },
	"zeroed": func(path string, body []byte) error {
		return errors.Join(os.Truncate(path, 0), os.Truncate(path, int64(len(body))))
	},
	"replaced": func(path string, body []byte) error {
		other := bytes.Clone(body)
		other[0] ^= 1
		return errors.Join(os.WriteFile(path+".new", other, 0o600), os.Rename(path+".new", path))
	},
	"deleted": func(path string, _ []byte) error { return os.Remove(path) },
}

func flip(path string, body []byte, at int) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte{body[at] ^ 1}, int64(at))
	return errors.Join(err, f.Close())
}

func TestWholeAChangedFileNeverGoesOut(t *testing.T) {
	t.Parallel()
	for name, damage := range damages {
		for _, size := range []int{1000, 70_000, 3_000_000} {
			for _, running := range []bool{true, false} {
				for _, offset := range []int64{0, int64(size) / 3} {
					t.Run(name, func(t *testing.T) {
						t.Parallel()
						body := randomBytes(size)
						source := &origin{body: body}
						dir := t.TempDir()
						c := openChaos(t, dir, 1<<30)
						defer func() { c.Close() }()
						req := parallelRequest(source, "first")
						if got, err := readAll(c, req); err != nil || !bytes.Equal(got, body) {
							t.Fatal(err)
						}
						settle(t, "the commit", func() bool { _, ok := c.Has(req.Key); return ok && c.Stats().Flights == 0 })
						if !running {
							c.Close()
						}
						if err := damage(filepath.Join(dir, "blobs/sha256", req.Digest.Encoded()), body); err != nil {
							t.Fatal(err)
						}
						if !running {
							c = openChaos(t, dir, 1<<30)
						}
						asked := len(source.questions())
						ranged := parallelRequest(source, "second")
						ranged.Offset, ranged.Ranged = offset, offset > 0
						if got, err := readAll(c, ranged); err == nil && !bytes.Equal(got, body[offset:]) {
							t.Fatalf("%d wrong bytes, and all is well", len(got))
						}
						// Who begins anew has it right, also the same one.
						if got, err := readAll(c, parallelRequest(source, "second")); err != nil || !bytes.Equal(got, body) {
							t.Fatalf("%d bytes: %v", len(got), err)
						}
						if len(source.questions()) == asked {
							t.Error("it was not fetched again")
						}
						settle(t, "the commit", func() bool { _, ok := c.Has(req.Key); return ok && c.Stats().Flights == 0 })
					})
				}
			}
		}
	}
}

// TestAFileThatOnlyLooksChangedIsServedAndBelievedAgain: a copy of the data
// directory has other inodes and times, and is not fetched again.
func TestAFileThatOnlyLooksChangedIsServedAndBelievedAgain(t *testing.T) {
	t.Parallel()
	body := randomBytes(3_000_000)
	source := &origin{body: body}
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	req := parallelRequest(source, "one")
	if _, err := readAll(c, req); err != nil {
		t.Fatal(err)
	}
	settle(t, "the commit", func() bool { _, ok := c.Has(req.Key); return ok && c.Stats().Flights == 0 })
	path := c.store.Path(req.Digest)
	if err := errors.Join(os.WriteFile(path+".copy", body, 0o600), os.Rename(path+".copy", path)); err != nil {
		t.Fatal(err)
	}
	asked := len(source.questions())
	before, _ := c.Index().Row(req.Digest)
	for _, offset := range []int64{2_000_000, 0} {
		ranged := req
		ranged.Offset = offset
		if got, err := readAll(c, ranged); err != nil || !bytes.Equal(got, body[offset:]) {
			t.Fatalf("%d bytes: %v", len(got), err)
		}
	}
	settle(t, "the row", func() bool { row, _ := c.Index().Row(req.Digest); return row.Inode != before.Inode })
	settle(t, "the flight", func() bool { return c.Stats().Flights == 0 })
	o, err := c.Open(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	if _, ok := o.Content.(*store.File); !ok || o.Source != Hit {
		t.Errorf("%T, source %d", o.Content, o.Source)
	}
	if n := len(source.questions()); n != asked {
		t.Errorf("%d questions", n-asked)
	}
	// Nobody without a right has it hashed.
	stranger := req
	stranger.Authorised = false
	if err := os.Chtimes(path, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Open(context.Background(), stranger); !errors.Is(err, ErrAuthorise) || c.Stats().Flights != 0 {
		t.Errorf("%v", err)
	}
}

func TestScrubbingFindsWhatDecayed(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	var keys []Key
	var bodies [][]byte
	for range 3 {
		body := randomBytes(500_000)
		req := parallelRequest(&origin{body: body}, "one")
		if _, err := readAll(c, req); err != nil {
			t.Fatal(err)
		}
		keys, bodies = append(keys, req.Key), append(bodies, body)
	}
	settle(t, "the commits", func() bool { return c.Stats().Flights == 0 })
	if err := flip(c.store.Path(keys[1].Digest), bodies[1], 77); err != nil {
		t.Fatal(err)
	}
	used := c.Stats().UsedBytes
	c.store.Scrub(time.Now(), 0)
	if _, ok := c.Has(keys[1]); !ok {
		t.Error("it was looked at too soon")
	}
	c.store.Scrub(time.Now().Add((7 * 24 * time.Hour)), 0)
	for i, k := range keys {
		if _, ok := c.Has(k); ok != (i != 1) {
			t.Errorf("object %d is there: %v", i, ok)
		}
	}
	if freed := used - c.Stats().UsedBytes; freed < 500_000 {
		t.Errorf("%d bytes freed", freed)
	}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	crand.Read(b)
	return b
}

// TestVerifyDoesNotMissWhatCameBack: it is evicted just before it is opened, and
// fetched again just after.
func TestVerifyDoesNotMissWhatCameBack(t *testing.T) {
	t.Parallel()
	var before atomic.Pointer[func()]
	c := withSteps(t, t.TempDir(), func(name string, do func() error) error {
		if f := before.Load(); f != nil && name == "open blob" && before.CompareAndSwap(f, nil) {
			(*f)()
			return &os.PathError{Op: "open", Path: "blob", Err: syscall.ENOENT}
		}
		return do()
	})
	defer c.Close()
	body := randomBytes(500_000)
	pullImage(t, c, "", 0, body)
	comesBack := func() {
		if err := evictOne(c, digest.FromBytes(body)); err != nil {
			t.Error(err)
		}
		pullImage(t, c, "", 0, body)
	}
	before.Store(&comesBack)
	v, err := c.store.Verify(t.Context(), 0, func(store.Verification) {})
	if err != nil || len(v.Missing)+len(v.Bad) > 0 || !c.has(body) {
		t.Errorf("%+v: %v", v, err)
	}
}
