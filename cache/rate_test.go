// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// drip gives a beginning, and then a byte each second, until its context ends.
type drip struct {
	io.Reader
	rest []byte
	ctx  context.Context
}

func (d *drip) Read(p []byte) (int, error) {
	if n, err := d.Reader.Read(p); n > 0 {
		return n, nil
	} else if err != io.EOF {
		return n, err
	}
	if len(d.rest) == 0 {
		return 0, io.EOF
	}
	select {
	case <-d.ctx.Done():
		return 0, context.Cause(d.ctx)
	case <-time.After(time.Second):
	}
	p[0], d.rest = d.rest[0], d.rest[1:]
	return 1, nil
}

func (d *drip) Close() error { return nil }

// TestWhoDripsIsGivenUpForAnother reader's way to ask, or another endpoint, while
// somebody waits; with nobody else to ask, it is borne.
func TestWhoDripsIsGivenUpForAnother(t *testing.T) {
	const begin, dripped = 200_000, 200
	body := random(begin + dripped + tailHold)
	for name, c := range map[string]struct {
		another   bool // a reader joins, who asks elsewhere
		endpoints int
		most      time.Duration
	}{
		"another reader's way": {another: true, endpoints: 1, most: 3 * slowFor},
		"another endpoint":     {endpoints: 2, most: 3 * slowFor},
		"nobody":               {endpoints: 1, most: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cache := open(t, t.TempDir(), 1<<30)
				defer cache.Close()
				endpoint, asked := 0, 0
				req := parallelRequest(&origin{body: body}, "a")
				good := req.Fetch
				req.Fetch = func(ctx context.Context, off, n int64) (io.ReadCloser, Info, error) {
					asked++
					if endpoint > 0 {
						return good(ctx, off, n)
					}
					start := max(off, min(begin, off+1))
					d := &drip{bytes.NewReader(body[off:start]), body[start:min(start+dripped, int64(len(body)))], ctx}
					return struct {
							io.Reader
							io.Closer
						}{io.MultiReader(d, bytes.NewReader(body[min(start+dripped, int64(len(body))):])), d}, Info{Size: int64(len(body)), Offset: off, Elsewhere: func() bool {
							if c.endpoints > 1 {
								endpoint++
							}
							return c.endpoints > 1
						}}, nil
				}
				req.Parallel = 1
				began := time.Now()
				if c.another {
					first := mustOpen(t, goOpen(cache, req))
					defer first.Close()
					req = parallelRequest(&origin{body: body}, "b")
					req.Source = "elsewhere"
				}
				got, err := readAll(cache, req)
				took := time.Since(began)
				if err != nil || !bytes.Equal(got, body) || took > c.most {
					t.Errorf("%d bytes in %v: %v", len(got), took, err)
				}
				if c.endpoints == 1 && asked != 1 {
					t.Errorf("who drips was asked %d times", asked)
				}
			})
		})
	}
}

// TestWhoWaitsForItsTurnIsNotForgotten: an answer that was asked for ahead is read when
// the one before it fails, in whatever way.
func TestWhoWaitsForItsTurnIsNotForgotten(t *testing.T) {
	const size = 64 << 20
	for name, fails := range map[string]func(o *origin, off, end int64) (io.ReadCloser, Info, error){
		"it breaks off": func(o *origin, off, end int64) (io.ReadCloser, Info, error) {
			later := readerFunc(func([]byte) (int, error) {
				time.Sleep(time.Millisecond) // the reader waits for it
				return 0, errReset
			})
			return io.NopCloser(io.MultiReader(o.part(off, end-1<<20), later)), Info{Size: size, Offset: off, End: end}, nil
		},
		"it ends too early": func(o *origin, off, end int64) (io.ReadCloser, Info, error) {
			return o.part(off, end-1), Info{Size: size, Offset: off, End: end}, nil
		},
		"it is less than asked for": func(o *origin, off, end int64) (io.ReadCloser, Info, error) {
			return o.part(off, end-1), Info{Size: size, Offset: off, End: end - 1}, nil
		},
		"it is no range": func(*origin, int64, int64) (io.ReadCloser, Info, error) {
			return nil, Info{}, ErrRange
		},
		"it is refused": func(*origin, int64, int64) (io.ReadCloser, Info, error) {
			return nil, Info{}, fmt.Errorf("%w: too many connections", ErrRefused)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := open(t, t.TempDir(), 1<<30)
				defer c.Close()
				o := &origin{body: randomBytes(size)}
				var failed atomic.Bool
				o.answer = func(_ int, off, length int64) (io.ReadCloser, Info, error) {
					if off != firstSegment || !failed.CompareAndSwap(false, true) {
						return nil, Info{}, nil
					}
					time.Sleep(time.Millisecond) // the others are answered
					return fails(o, off, off+length)
				}
				req := parallelRequest(o, "a")
				req.Ahead = true
				r, err := c.Open(t.Context(), req)
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				defer time.AfterFunc(time.Minute, r.Interrupt).Stop()
				got, err := io.ReadAll(struct{ io.Reader }{r.Content})
				if err != nil || !bytes.Equal(got, o.body) {
					t.Fatal(len(got), err, o.questions())
				}
			})
		})
	}
}

// TestWhoWaitsForTheMiddleIsNotForgotten: an answer for a reader in the middle is read
// when the one that leads there breaks off.
func TestWhoWaitsForTheMiddleIsNotForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, middle = 64 << 20, 16 << 20
		c := open(t, t.TempDir(), 1<<30)
		defer c.Close()
		o := &origin{body: randomBytes(size)}
		begun := make(chan struct{})
		cut := make(chan struct{})
		o.answer = func(n int, off, length int64) (io.ReadCloser, Info, error) {
			switch n {
			case 1:
				close(begun)
				body := io.MultiReader(o.part(off, off+1<<20), gated(cut), failing{})
				return io.NopCloser(body), Info{Size: size, Offset: off, End: off + length}, nil
			case 2:
				time.AfterFunc(time.Millisecond, func() { close(cut) })
			}
			return nil, Info{}, nil
		}
		r, err := c.Open(t.Context(), parallelRequest(o, "a"))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		<-begun
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		at := parallelRequest(o, "b")
		at.Offset, at.Ranged = middle, true
		m, err := c.Open(ctx, at)
		if err != nil {
			t.Fatal(err, o.questions())
		}
		defer m.Close()
		defer time.AfterFunc(time.Minute, r.Interrupt).Stop()
		if got, err := io.ReadAll(struct{ io.Reader }{r.Content}); err != nil || !bytes.Equal(got, o.body) {
			t.Fatal(len(got), err, o.questions())
		}
	})
}
