// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
)

// passing is a request for a range of what does not fit anywhere.
func passing(o *origin, off, n int64) Request {
	req := parallelRequest(o, "r")
	req.Ranged, req.Offset, req.Length = true, off, n
	return req
}

// readPart opens a range and reads so many bytes of it, as a client does that then
// leaves.
func readPart(c *Cache, req Request, n int64) ([]byte, error) {
	o, err := c.Open(context.Background(), req)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	if o.Source != Passed {
		return nil, fmt.Errorf("it did not pass through: %v", o.Source)
	}
	if size, err := o.Content.Seek(0, io.SeekEnd); err != nil || size != o.Size { // as net/http does
		return nil, fmt.Errorf("%d bytes, %d: %w", size, o.Size, err)
	}
	if _, err := o.Content.Seek(req.Offset, io.SeekStart); err != nil {
		return nil, err
	}
	buf := make([]byte, n)
	read, err := io.ReadFull(o.Content, buf)
	return buf[:read], err
}

// TestRangesOfWhatPassesThroughCostThemselves: three clients that read an object in
// parts, of known ends and, as containerd does, of all that follows, have no more
// asked for than three copies, and a little for what they leave.
func TestRangesOfWhatPassesThroughCostThemselves(t *testing.T) {
	t.Parallel()
	const parts, part, clients = 12, 8 << 20, 3
	body := random(parts * part)
	for name, length := range map[string]int64{"to a byte": part, "to the end": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := open(t, t.TempDir(), 1<<20)
			defer c.Close()
			var asked, questions int64
			o := &origin{body: body}
			o.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) { // one at a time asks
				if n < 0 {
					n = int64(len(body))
				}
				asked, questions = asked+min(n, int64(len(body))-off), questions+1
				return nil, Info{}, nil
			}
			for range clients {
				for i := range int64(parts) {
					got, err := readPart(c, passing(o, i*part, length), part)
					if err != nil || !bytes.Equal(got, body[i*part:(i+1)*part]) {
						t.Fatalf("%d bytes: %v", len(got), err)
					}
				}
			}
			if most := int64(clients * parts * part * 105 / 100); asked > most {
				t.Errorf("%d bytes were asked for, of at most %d", asked, most)
			}
			t.Logf("%d questions, %.3f copies", questions, float64(asked)/float64(len(body)))
		})
	}
}

// TestARangeThatPassesThroughIsWhatItIs: whatever the source does, as long as it gives
// right bytes.
func TestARangeThatPassesThroughIsWhatItIs(t *testing.T) {
	t.Parallel()
	const size, off, n = 9 << 20, 3<<20 + 17, 5 << 20
	body := random(size)
	for name, answer := range map[string]func(o *origin) func(i int, off, n int64) (io.ReadCloser, Info, error){
		"as it should be": func(*origin) func(int, int64, int64) (io.ReadCloser, Info, error) { return nil },
		"it breaks off": func(o *origin) func(int, int64, int64) (io.ReadCloser, Info, error) {
			return func(i int, off, n int64) (io.ReadCloser, Info, error) {
				if i%2 == 1 || off < 0 {
					return nil, Info{}, nil
				}
				end := size
				if n > 0 {
					end = min(int(off+n), size)
				}
				return io.NopCloser(io.MultiReader(bytes.NewReader(body[off:min(int(off)+1_000_000, end)]), failing{})), Info{Size: size, Offset: off, End: int64(end)}, nil
			}
		},
		"it knows no ranges": func(*origin) func(int, int64, int64) (io.ReadCloser, Info, error) {
			return func(int, int64, int64) (io.ReadCloser, Info, error) {
				return io.NopCloser(bytes.NewReader(body)), Info{Size: size}, nil
			}
		},
		"it refuses ranges": func(*origin) func(int, int64, int64) (io.ReadCloser, Info, error) {
			return func(_ int, off, n int64) (io.ReadCloser, Info, error) {
				if off > 0 || n > 0 {
					return nil, Info{}, ErrRange
				}
				return io.NopCloser(bytes.NewReader(body)), Info{Size: size}, nil
			}
		},
		"it says no size": func(*origin) func(int, int64, int64) (io.ReadCloser, Info, error) {
			return func(int, int64, int64) (io.ReadCloser, Info, error) {
				return io.NopCloser(bytes.NewReader(body)), Info{Size: -1}, nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := open(t, t.TempDir(), 1<<20)
			defer c.Close()
			for _, length := range []int64{n, 0, 1} { // the end, none, and what a suffix has
				o := &origin{body: body}
				o.answer = answer(o)
				req := passing(o, off, length)
				object, err := c.Open(t.Context(), req)
				if err != nil {
					t.Fatal(err)
				}
				for _, at := range []int64{off, off - 1_000_000, 0, size - 2_500_000} {
					if at < off && object.Size < 0 {
						continue // a stream is not read backwards
					}
					if _, err := object.Content.Seek(at, io.SeekStart); err != nil {
						t.Fatal(err)
					}
					got := make([]byte, 2_500_000)
					if n, err := io.ReadFull(object.Content, got); err != nil || !bytes.Equal(got, body[at:at+2_500_000]) {
						t.Errorf("%d bytes from %d: %v", n, at, err)
					}
				}
				if n, err := object.Content.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					t.Errorf("%d bytes after the end: %v", n, err)
				}
				object.Close()
			}
		})
	}
}

// TestWholeWhoHasWrongBytesIsGivenNoRange of what passes through; from byte 0 he may
// begin anew.
func TestWholeWhoHasWrongBytesIsGivenNoRange(t *testing.T) {
	t.Parallel()
	body := random(3 << 20)
	bad := bytes.Clone(body)
	bad[100] ^= 1
	c := open(t, t.TempDir(), 1<<20)
	defer c.Close()
	good := &origin{body: body}
	req := parallelRequest(good, "r")
	req.Fetch = (&origin{body: bad}).fetch
	if got, err := readAll(c, req); !errors.Is(err, ErrBroken) || len(got) != len(body)-tailHold {
		t.Fatalf("%d bytes: %v", len(got), err)
	}
	for range 2 { // where it is not known yet that it passes through, and where it is
		if tail, err := readPart(c, passing(good, 1<<20, 0), 1<<20); !errors.Is(err, ErrDropped) {
			t.Errorf("%d bytes were joined to bad ones: %v", len(tail), err)
		}
	}
	if got, err := readPart(c, passing(good, 0, 0), 3<<20); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	if got, err := readAll(c, parallelRequest(good, "r")); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
}

// TestWholeAManifestIsNotRelayed: tarn itself reads what it is, and only verified.
func TestWholeAManifestIsNotRelayed(t *testing.T) {
	t.Parallel()
	body := random(200_000)
	bad := bytes.Clone(body)
	bad[150_000] ^= 1
	c := open(t, t.TempDir(), 1<<10)
	defer c.Close()
	for range 2 {
		req := passing(&origin{body: body}, 0, 0)
		req.Fetch = (&origin{body: bad}).fetch
		req.Check = func([]byte) error { return nil }
		if got, err := readAll(c, req); !errors.Is(err, ErrBroken) {
			t.Errorf("%d bytes: %v", len(got), err)
		}
	}
}

// TestWholeWhatPassedThroughIsRememberedInARestart: the next process knows that
// somebody holds a bad beginning.
func TestWholeWhatPassedThroughIsRememberedInARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<20)
	defer c.Close()
	body := randomBytes(3 << 20)
	bad := bytes.Clone(body)
	bad[100] ^= 1
	lying, honest := &origin{body: bad}, &origin{body: body}
	req := parallelRequest(honest, "a")
	req.Fetch = lying.fetch
	got, err := readAll(c, req)
	if err == nil || len(got) != len(body)-tailHold {
		t.Fatalf("%d bytes: %v", len(got), err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	next := openChaos(t, dir, 1<<20)
	defer next.Close()
	req.Fetch, req.Offset, req.Ranged = honest.fetch, int64(len(got)), true
	if tail, err := readAll(next, req); !errors.Is(err, ErrDropped) {
		t.Errorf("%d bytes were joined to %d bad ones: %v", len(tail), len(got), err)
	}
}
