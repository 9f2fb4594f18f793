// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// dropSize fits into the tail held back many times over, and into no room of a MiB.
const dropSize = 3 << 20

// A drop is something that happens to an object, after which somebody asks for a
// range above 0 of it.
type drop struct {
	refused bool
	// happens has a reader called "a" at work in the directory, and returns the cache
	// that is open then. body is the object's, and bad has one other byte.
	happens func(t *testing.T, dir string, body, bad []byte) *Cache
}

// lying is a request for the body whose source sends other bytes.
func lying(body []byte, sends *origin) Request {
	req := parallelRequest(&origin{body: body}, "a")
	req.Fetch = sends.fetch
	return req
}

// fed has a reader be given a part of what the source sends first, before the source
// sends the rest and breaks off, and read on to the end. It is asked no second time.
func fed(t *testing.T, c *Cache, req Request, sends []byte, size int64) {
	t.Helper()
	gate := make(chan struct{})
	asked := false
	wait := readerFunc(func([]byte) (int, error) { <-gate; return 0, io.EOF })
	req.Fetch = func(context.Context, int64, int64) (io.ReadCloser, Info, error) {
		if asked {
			return nil, Info{}, fmt.Errorf("%w: gone", ErrRefused)
		}
		asked = true
		return io.NopCloser(io.MultiReader(bytes.NewReader(sends[:1<<20]), wait, bytes.NewReader(sends[1<<20:]), failing{})), Info{Size: size}, nil
	}
	req.Parallel = 1
	o := mustOpen(t, goOpen(c, req))
	defer o.Close()
	if _, err := io.CopyN(io.Discard, o.Content, 1000); err != nil {
		t.Fatal(err)
	}
	close(gate)
	if n, err := io.Copy(io.Discard, o.Content); err == nil {
		t.Fatalf("%d bytes, and all is well", n)
	}
}

// someOf opens the object, reads a part of what leaves before it is verified, and
// closes it.
func someOf(t *testing.T, c *Cache, req Request) {
	t.Helper()
	o := mustOpen(t, goOpen(c, req))
	if _, err := io.CopyN(io.Discard, o.Content, 1000); err != nil {
		t.Fatal(err)
	}
	o.Close()
}

// parked leaves a file of which "a" has the beginning.
func parked(t *testing.T, dir string, body []byte) *Cache {
	t.Helper()
	c := open(t, dir, 1<<30)
	fed(t, c, parallelRequest(&origin{body: body}, "a"), body[:2<<20], dropSize)
	settle(t, "the file is parked", func() bool { return c.Stats().Parked == 1 && c.Stats().Flights == 0 })
	return c
}

func reopened(t *testing.T, c *Cache) *Cache {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, c.store.Dir(), c.store.MaxSize())
}

// changed is a stored file with another byte.
func changedFile(t *testing.T, dir string, body []byte) *Cache {
	t.Helper()
	c := open(t, dir, 1<<30)
	storedBy(t, c, &origin{body: body})
	if err := flip(c.store.Path(digest.FromBytes(body)), body, len(body)/2); err != nil {
		t.Fatal(err)
	}
	return c
}

var drops = map[string]drop{
	"a flight's bytes are wrong": {true, func(t *testing.T, dir string, body, bad []byte) *Cache {
		c := open(t, dir, 1<<30)
		fed(t, c, parallelRequest(&origin{body: body}, "a"), bad, dropSize)
		return c
	}},
	"a flight is longer than was announced": {true, func(t *testing.T, dir string, body, bad []byte) *Cache {
		c := open(t, dir, 1<<30)
		fed(t, c, parallelRequest(&origin{body: body}, "a"), append(bytes.Clone(body), 1), dropSize)
		return c
	}},
	"a flight is not what it is checked for": {true, func(t *testing.T, dir string, body, bad []byte) *Cache {
		c := open(t, dir, 1<<30)
		req := parallelRequest(&origin{body: body}, "a")
		req.Check = func([]byte) error { return errors.New("no") }
		fed(t, c, req, body, dropSize)
		return c
	}},
	"a flight without a length breaks off": {true, func(t *testing.T, dir string, body, bad []byte) *Cache {
		c := open(t, dir, 1<<30)
		fed(t, c, parallelRequest(&origin{body: body}, "a"), body[:2<<20], -1)
		return c
	}},
	"a flight's bytes are wrong, and nobody was given any": {false, func(t *testing.T, dir string, body, bad []byte) *Cache {
		c := open(t, dir, 1<<30)
		if o := (<-goOpen(c, lying(body, &origin{body: bad}))).object; o != nil { // it had not ended yet
			o.Wait()
			o.Close()
		}
		return c
	}},
	"a parked file goes on": {false, func(t *testing.T, dir string, body, _ []byte) *Cache {
		return parked(t, dir, body)
	}},
	"a parked file makes room": {true, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := parked(t, dir, body)
		if !c.flights.Spare(false, 0) {
			t.Error("it is held")
		}
		return c
	}},
	"a parked file makes room after a clean stop": {true, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := reopened(t, parked(t, dir, body))
		if !c.flights.Spare(false, 0) {
			t.Error("it is held")
		}
		return c
	}},
	"a parked file's object has another size": {true, func(t *testing.T, dir string, body, bad []byte) *Cache {
		c := parked(t, dir, body)
		readAll(c, lying(body, &origin{body: append(bytes.Clone(bad), 1)}))
		return c
	}},
	"a flight passes through": {false, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := open(t, dir, 1<<20)
		someOf(t, c, parallelRequest(&origin{body: body}, "a"))
		return c
	}},
	"a passage is wrong": {true, func(t *testing.T, dir string, body, bad []byte) *Cache {
		c := open(t, dir, 1<<20)
		readAll(c, lying(body, &origin{body: bad}))
		return c
	}},
	"a passage is left": {false, func(t *testing.T, dir string, body, bad []byte) *Cache {
		c := open(t, dir, 1<<20)
		readAll(c, parallelRequest(&origin{body: body}, "a"))
		someOf(t, c, lying(body, &origin{body: bad}))
		return c
	}},
	"a page that was passed is wrong": {false, func(t *testing.T, dir string, body, bad []byte) *Cache {
		c := open(t, dir, 1<<30)
		o, err := c.Pass(t.Context(), lying(body, &origin{body: bad}))
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, o.Content); !errors.Is(err, ErrBroken) || n == 0 {
			t.Fatal(n, err)
		}
		o.Close()
		return c
	}},
	"a stored file was changed, and is read": {true, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := changedFile(t, dir, body)
		readAll(c, parallelRequest(&origin{body: body}, "a"))
		return c
	}},
	"a stored file was changed, and the scrubber comes by": {true, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := changedFile(t, dir, body)
		c.store.Scrub(time.Now().Add((7 * 24 * time.Hour)), 0)
		return c
	}},
	"a stored file only looks changed": {false, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := open(t, dir, 1<<30)
		storedBy(t, c, &origin{body: body})
		if err := os.Chtimes(c.store.Path(digest.FromBytes(body)), time.Now(), time.Now()); err != nil {
			t.Fatal(err)
		}
		someOf(t, c, parallelRequest(&origin{body: body}, "a"))
		return c
	}},
	"a stored file is removed": {false, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := open(t, dir, 1<<30)
		storedBy(t, c, &origin{body: body})
		if err := os.Remove(c.store.Path(digest.FromBytes(body))); err != nil {
			t.Fatal(err)
		}
		return c
	}},
	"a clean stop with a parked file": {false, func(t *testing.T, dir string, body, _ []byte) *Cache {
		return reopened(t, reopened(t, parked(t, dir, body)))
	}},
	"a clean stop in the middle of a flight": {false, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := open(t, dir, 1<<30)
		o := &origin{body: body}
		o.answer = func(int, int64, int64) (io.ReadCloser, Info, error) {
			hang := readerFunc(func([]byte) (int, error) { <-c.flights.Closing(); return 0, context.Canceled })
			return io.NopCloser(io.MultiReader(o.part(0, 2<<20), hang)), Info{Size: dropSize}, nil
		}
		someOf(t, c, parallelRequest(o, "a"))
		return reopened(t, c)
	}},
	"a clean stop after wrong bytes": {true, func(t *testing.T, dir string, body, bad []byte) *Cache {
		c := open(t, dir, 1<<30)
		fed(t, c, parallelRequest(&origin{body: body}, "a"), bad, dropSize)
		return reopened(t, reopened(t, c))
	}},
	"a kill with a parked file": {true, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := parked(t, dir, body)
		t.Cleanup(func() { c.Close() })
		left := t.TempDir()
		copyDir(t, dir, left)
		return open(t, left, 1<<30)
	}},
	"a kill after a clean stop": {true, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := reopened(t, parked(t, dir, body))
		t.Cleanup(func() { c.Close() })
		left := t.TempDir()
		copyDir(t, dir, left)
		return open(t, left, 1<<30)
	}},
	"a file without a journal": {true, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := open(t, dir, 1<<30)
		p, err := c.store.Create(digest.FromBytes(body))
		if err != nil {
			t.Fatal(err)
		}
		p.Close()
		return reopened(t, c)
	}},
	"a parked file that does not fit at the start": {true, func(t *testing.T, dir string, body, _ []byte) *Cache {
		c := parked(t, dir, body)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		return open(t, dir, 1<<20)
	}},
}

// TestWholeWhatDropsBytesHasRangesRefused to everybody, and nothing else has.
func TestWholeWhatDropsBytesHasRangesRefused(t *testing.T) {
	t.Parallel()
	body := random(dropSize)
	bad := bytes.Clone(body)
	bad[100] ^= 1
	for name, d := range drops {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := d.happens(t, t.TempDir(), body, bad)
			defer func() { c.Close() }()
			req := parallelRequest(&origin{body: body}, "another")
			req.Offset, req.Ranged = 1<<20, true
			got, err := readAll(c, req)
			switch {
			case d.refused && !errors.Is(err, ErrDropped):
				t.Errorf("%d bytes: %v", len(got), err)
			case !d.refused && (err != nil || !bytes.Equal(got, body[1<<20:])):
				t.Errorf("%d bytes: %v", len(got), err)
			}
			req.Offset, req.Ranged = 0, false
			if got, err := readAll(c, req); err != nil || !bytes.Equal(got, body) {
				t.Errorf("from the start, %d bytes: %v", len(got), err)
			}
		})
	}
}

// TestWholeRangesAreRefusedForAMinute, and served again from then on.
func TestWholeRangesAreRefusedForAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := random(dropSize)
		bad := bytes.Clone(body)
		bad[100] ^= 1
		c := open(t, t.TempDir(), 1<<30)
		defer c.Close()
		fed(t, c, parallelRequest(&origin{body: body}, "a"), bad, dropSize)
		req := parallelRequest(&origin{body: body}, "a")
		if got, err := readAll(c, req); err != nil || !bytes.Equal(got, body) {
			t.Fatal(len(got), err)
		}
		req.Offset, req.Ranged = 1<<20, true
		time.Sleep(dropFor - time.Second)
		if got, err := readAll(c, req); !errors.Is(err, ErrDropped) {
			t.Errorf("too soon: %d bytes: %v", len(got), err)
		}
		time.Sleep(2 * time.Second)
		if got, err := readAll(c, req); err != nil || !bytes.Equal(got, body[1<<20:]) {
			t.Errorf("%d bytes: %v", len(got), err)
		}
	})
}

// killedBody is the object of the process that is killed, the same in each.
func killedBody() []byte {
	body := make([]byte, noteStep+6<<20)
	rand.NewChaCha8([32]byte{9}).Read(body)
	return body
}

// TestWholeAfterAKillRangesAreRefused: a process is killed while a reader has more
// than the journal speaks of. What the journal speaks of crosses the link once.
func TestWholeAfterAKillRangesAreRefused(t *testing.T) {
	t.Parallel()
	dir, body := t.TempDir(), killedBody()
	cmd := exec.Command(os.Args[0], "-test.run=^TestOneProcessThatIsKilled$", "-test.count=1")
	cmd.Env = append(os.Environ(), "TARN_TEST_KILL_DIR="+dir)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("%v: %s", err, out)
	}
	c := open(t, dir, 1<<30)
	defer func() { c.Close() }()
	o := &origin{body: body}
	for range 2 { // and after a clean stop as well
		req := parallelRequest(o, "another")
		req.Offset, req.Ranged = noteStep+1<<20, true
		if got, err := readAll(c, req); !errors.Is(err, ErrDropped) {
			t.Errorf("%d bytes: %v", len(got), err)
		}
		c = reopened(t, c)
	}
	if got, err := readAll(c, parallelRequest(o, "a")); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	if sent := o.sent(); sent > int64(len(body))-noteStep+1<<20 { // the flights that were stopped had some on their way
		t.Errorf("%d bytes were fetched again", sent)
	}
	settle(t, "what is pending", func() bool {
		left, _ := filepath.Glob(filepath.Join(dir, "pending", "*"))
		return len(left) == 0
	})
}

func TestOneProcessThatIsKilled(t *testing.T) {
	dir := os.Getenv("TARN_TEST_KILL_DIR")
	if dir == "" {
		t.Skip("part of another")
	}
	c := open(t, dir, 1<<30)
	bad := killedBody()
	bad[noteStep+1000] ^= 1
	noted := make(chan struct{})
	o := &origin{body: bad}
	o.answer = func(int, int64, int64) (io.ReadCloser, Info, error) {
		wait := readerFunc(func([]byte) (int, error) { <-noted; return 0, io.EOF })
		hang := readerFunc(func([]byte) (int, error) { select {} })
		return io.NopCloser(io.MultiReader(o.part(0, noteStep), wait, o.part(noteStep, noteStep+2<<20), hang)), Info{Size: int64(len(bad))}, nil
	}
	req := lying(killedBody(), o)
	object, err := c.Open(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	settle(t, "the journal", func() bool { return isNoted(c) })
	close(noted)
	if _, err := io.ReadFull(object.Content, make([]byte, noteStep+1<<20)); err != nil {
		t.Fatal(err)
	}
	die()
}

// isNoted tells whether a download's journal says that bytes of it are there.
func isNoted(c *Cache) bool {
	journals, _ := filepath.Glob(filepath.Join(c.store.Dir(), "pending", "*.journal"))
	for _, j := range journals {
		if data, err := os.ReadFile(j); err == nil && bytes.Contains(data, []byte(`"Filled":[[`)) {
			return true
		}
	}
	return false
}
