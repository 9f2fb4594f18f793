// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
)

// origin is a source that serves ranges of a body, and what a test does to it.
type origin struct {
	body []byte
	// answer sees each question first, by its number; nil is the usual
	// answer. It may hold the question back, and look at what was asked.
	answer func(n int, off, length int64) (io.ReadCloser, Info, error)

	mu    sync.Mutex
	asked []span // as far as the body was read
	given int64
}

func (o *origin) fetch(ctx context.Context, off, n int64) (io.ReadCloser, Info, error) {
	o.mu.Lock()
	number := len(o.asked)
	end := int64(len(o.body))
	if n >= 0 {
		end = min(end, off+n)
	}
	o.asked = append(o.asked, span{off, end})
	o.mu.Unlock()
	if o.answer != nil {
		if body, info, err := o.answer(number, off, n); body != nil || err != nil {
			return body, info, err
		}
	}
	if off >= int64(len(o.body)) && off > 0 {
		return nil, Info{}, ErrRange
	}
	return o.part(off, end), Info{Size: int64(len(o.body)), Offset: off, End: end}, nil
}

// part is a body of these bytes.
func (o *origin) part(off, end int64) io.ReadCloser {
	return &given{Reader: bytes.NewReader(o.body[off:end]), origin: o}
}

// broken is one that breaks off after n bytes.
func (o *origin) broken(off, n int64) (io.ReadCloser, Info, error) {
	body := io.MultiReader(o.part(off, off+n), failing{})
	end := min(off+firstSegment, int64(len(o.body)))
	return io.NopCloser(body), Info{Size: int64(len(o.body)), Offset: off, End: end}, nil
}

type failing struct{}

var errReset = errors.New("connection reset")

func (failing) Read([]byte) (int, error) { return 0, errReset }

type given struct {
	io.Reader
	origin *origin
}

func (g *given) Read(p []byte) (int, error) {
	n, err := g.Reader.Read(p)
	g.origin.mu.Lock()
	g.origin.given += int64(n)
	g.origin.mu.Unlock()
	return n, err
}

func (g *given) Close() error { return nil }

func (o *origin) questions() []span {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]span(nil), o.asked...)
}

// covered is how many bytes from the start on were asked for without a gap.
func (o *origin) covered() (end int64) {
	asked := o.questions()
	slices.SortFunc(asked, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	for _, s := range asked {
		if s.start <= end {
			end = max(end, s.end)
		}
	}
	return end
}

// sent is how many bytes were read of all answers.
func (o *origin) sent() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.given
}

func parallelRequest(o *origin, reader string) Request {
	return Request{Key: Key{Domain: domain, Digest: digest.FromBytes(o.body)}, Reader: reader, Authorised: true, Parallel: 4, Fetch: o.fetch}
}

// readAll opens the object and reads it from the offset on.
func readAll(c *Cache, req Request) ([]byte, error) {
	o, err := c.Open(context.Background(), req)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	if _, err := o.Content.Seek(req.Offset, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(struct{ io.Reader }{o.Content})
}

const large = 3*minSegment + 12_345

// gated reads as nothing, once the gate is open.
type gated <-chan struct{}

func (g gated) Read([]byte) (int, error) {
	<-g
	return 0, io.EOF
}

func TestALargeObjectIsAskedForOnceInSegments(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir(), 1<<30)
	defer c.Close()
	o := &origin{body: random(large)}
	second := make(chan struct{})
	o.answer = func(n int, off, length int64) (io.ReadCloser, Info, error) {
		if n == 1 {
			close(second)
		}
		if n > 0 {
			return nil, Info{}, nil
		}
		slow := io.MultiReader(bytes.NewReader(o.body[:1]), gated(second), bytes.NewReader(o.body[1:length]))
		return &given{Reader: slow, origin: o}, Info{Size: large, End: length}, nil
	}
	got, err := readAll(c, parallelRequest(o, "a"))
	if err != nil || !bytes.Equal(got, o.body) {
		t.Fatal(len(got), err)
	}
	for _, s := range o.questions() {
		if s.end-s.start > maxSegment || s.end-s.start < minSegment/2 {
			t.Errorf("a segment of %d bytes", s.end-s.start)
		}
	}
	if len(o.questions()) < 3 || o.sent() != large || o.covered() != large {
		t.Errorf("%d bytes in %v", o.sent(), o.questions())
	}
	if o.asked[0] != (span{0, firstSegment}) {
		t.Errorf("it began with %v", o.asked[0])
	}
}

// TestAFastSourceIsReadInOrder: what comes as fast as it is hashed comes in one answer,
// or, where the right may end, in answers that are read one after the other. On this
// clock nothing takes any time.
func TestAFastSourceIsReadInOrder(t *testing.T) {
	for _, ahead := range []bool{false, true} {
		t.Run(fmt.Sprintf("ahead %v", ahead), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := open(t, t.TempDir(), 1<<30)
				defer c.Close()
				o := &origin{body: random(large)}
				var next atomic.Int64
				o.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) {
					end := min(off+n, large)
					pos, body := off, bytes.NewReader(o.body[off:end])
					read := func(p []byte) (int, error) {
						n, err := body.Read(p)
						if at := pos; n > 0 {
							if pos += int64(n); !next.CompareAndSwap(at, pos) {
								t.Errorf("byte %d is read when %d is next", at, next.Load())
							}
						}
						return n, err
					}
					return io.NopCloser(readerFunc(read)), Info{Size: large, Offset: off, End: end}, nil
				}
				req := parallelRequest(o, "a")
				req.Ahead = ahead
				if got, err := readAll(c, req); err != nil || !bytes.Equal(got, o.body) {
					t.Fatal(len(got), err)
				}
				if asked := o.questions(); ahead != (len(asked) > 2) {
					t.Errorf("asked for %v", asked)
				}
			})
		})
	}
}

// TestASlowSourceIsAskedForAllAtOnce: what one object showed of a source is known for
// the next, and so is a size that the manifest told.
func TestASlowSourceIsAskedForAllAtOnce(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir(), 1<<30)
	defer c.Close()
	slow := &origin{body: randomBytes(large)}
	second := make(chan struct{})
	slow.answer = func(n int, _, length int64) (io.ReadCloser, Info, error) {
		if n > 0 {
			if n == 1 {
				close(second)
			}
			return nil, Info{}, nil
		}
		late := io.MultiReader(gated(second), bytes.NewReader(slow.body[:length]))
		return io.NopCloser(late), Info{Size: large, End: length}, nil
	}
	if got, err := readAll(c, parallelRequest(slow, "a")); err != nil || !bytes.Equal(got, slow.body) {
		t.Fatal(len(got), err)
	}
	for name, size := range map[string]int64{"as it is": large, "shorter": large - 1_000, "longer": 2 * large} {
		t.Run(name, func(t *testing.T) {
			o := &origin{body: randomBytes(large)}
			all := make(chan struct{})
			var open atomic.Int64
			o.answer = func(n int, off, length int64) (io.ReadCloser, Info, error) {
				if n == 2 {
					close(all)
				}
				<-all // three are asked for before any is answered
				end := min(off+length, large)
				if off >= end {
					return nil, Info{}, ErrRange
				}
				open.Add(1)
				body := &closes{o.part(off, end), func() { open.Add(-1) }}
				return body, Info{Size: large, Offset: off, End: end}, nil
			}
			req := parallelRequest(o, "a")
			req.Size = func() int64 { return size }
			if got, err := readAll(c, req); err != nil || !bytes.Equal(got, o.body) {
				t.Fatal(len(got), err)
			}
			until(t, "all answers are closed", func() bool { return open.Load() == 0 })
			if o.sent() != large {
				t.Errorf("%d bytes of %d", o.sent(), large)
			}
		})
	}
	t.Run("what it is refused", func(t *testing.T) {
		o := &origin{body: randomBytes(large)}
		o.answer = func(int, int64, int64) (io.ReadCloser, Info, error) {
			return nil, Info{}, fmt.Errorf("%w: no", ErrRefused)
		}
		req := parallelRequest(o, "a")
		req.Size = func() int64 { return large }
		if _, err := readAll(c, req); !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
		if asked := o.questions(); len(asked) != 3 {
			t.Errorf("asked for %v", asked)
		}
	})
}

// TestAsManyQuestionsAsASourceBears: where one that was put together with others is
// answered with a no, it is put alone, and for a while so is each first one of that
// source.
func TestAsManyQuestionsAsASourceBears(t *testing.T) {
	for name, no := range map[string]error{"limited": ErrLimited, "refused": ErrRefused, "unavailable": errors.New("503")} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := open(t, t.TempDir(), 1<<30)
				defer c.Close()
				slow := &origin{body: randomBytes(2 << 20)}
				slow.answer = func(int, int64, int64) (io.ReadCloser, Info, error) {
					late := readerFunc(func([]byte) (int, error) { time.Sleep(time.Second); return 0, io.EOF })
					return io.NopCloser(io.MultiReader(late, bytes.NewReader(slow.body))), Info{Size: 2 << 20}, nil
				}
				if _, err := readAll(c, parallelRequest(slow, "a")); err != nil {
					t.Fatal(err)
				}
				for n := range 2 {
					o := &origin{body: randomBytes(large)}
					var mu sync.Mutex
					questions, until := 0, time.Time{}
					done := func() { mu.Lock(); defer mu.Unlock(); questions-- }
					o.answer = func(_ int, off, length int64) (io.ReadCloser, Info, error) {
						if off == 0 {
							time.Sleep(time.Millisecond) // the others come before
							if n > 0 && len(o.questions()) > 1 {
								t.Errorf("asked for %v before there was an answer", o.questions())
							}
						}
						mu.Lock()
						defer mu.Unlock()
						if questions > 0 && no == ErrLimited {
							until = time.Now().Add(time.Second)
						}
						if questions > 0 || time.Now().Before(until) {
							return nil, Info{}, no
						}
						questions++
						end := min(off+length, large)
						body := &closes{o.part(off, end), done}
						return body, Info{Size: large, Offset: off, End: end}, nil
					}
					req := parallelRequest(o, "a")
					req.Size = func() int64 { return large }
					if got, err := readAll(c, req); err != nil || !bytes.Equal(got, o.body) {
						t.Fatal(len(got), err, o.questions())
					}
				}
			})
		})
	}
}

// closes tells when it is closed.
type closes struct {
	io.Reader
	closed func()
}

func (c *closes) Close() error {
	c.closed()
	return nil
}

// TestWhoWantsTheMiddleDoesNotWaitForTheStart holds the beginning back.
func TestWhoWantsTheMiddleDoesNotWaitForTheStart(t *testing.T) {
	t.Parallel()
	for _, cold := range []bool{true, false} {
		t.Run(fmt.Sprintf("cold %v", cold), func(t *testing.T) {
			t.Parallel()
			c := open(t, t.TempDir(), 1<<30)
			o := &origin{body: random(large)}
			gate := make(chan struct{})
			middle := int64(2*minSegment + 77)
			var held atomic.Int64
			o.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) {
				if off == 0 {
					r, w := io.Pipe()
					go func() {
						<-gate
						w.Write(o.body[:n])
						w.Close()
					}()
					held.Store(n)
					return r, Info{Size: large, End: n}, nil
				}
				return nil, Info{}, nil
			}
			var first chan error
			if !cold {
				first = make(chan error, 1)
				go func() {
					got, err := readAll(c, parallelRequest(o, "a"))
					if err == nil && !bytes.Equal(got, o.body) {
						err = errors.New("wrong bytes")
					}
					first <- err
				}()
				until(t, "the flight has begun", func() bool { return len(o.questions()) > 0 })
			}
			req := parallelRequest(o, "b")
			req.Offset, req.Ranged = middle, true
			r := mustOpen(t, goOpen(c, req))
			if _, err := r.Content.Seek(middle, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			readExactly(t, r, o.body[middle:large-tailHold])
			close(gate)
			readExactly(t, r, o.body[large-tailHold:])
			if first != nil {
				if err := <-first; err != nil {
					t.Error(err)
				}
			}
			c.Close()
			if o.sent()+held.Load() != large {
				t.Errorf("%d bytes besides the first segment, in %v", o.sent(), o.questions())
			}
		})
	}
}

// TestWhatBreaksOffIsAskedForAgain breaks every answer but those that the test
// lets through, and holds the source to giving each byte once.
func TestWhatBreaksOffIsAskedForAgain(t *testing.T) {
	t.Parallel()
	for _, parallel := range []int{1, 4} {
		t.Run(fmt.Sprintf("parallel %d", parallel), func(t *testing.T) {
			t.Parallel()
			c := open(t, t.TempDir(), 1<<30)
			defer c.Close()
			o := &origin{body: random(large)}
			breaks := 0
			var mu sync.Mutex
			o.answer = func(n int, off, length int64) (io.ReadCloser, Info, error) {
				mu.Lock()
				defer mu.Unlock()
				end := int64(large)
				if length >= 0 {
					end = min(end, off+length)
				}
				if end-off <= goodProgress+1 || breaks == 9 {
					return nil, Info{}, nil
				}
				breaks++
				if breaks%3 == 0 {
					return nil, Info{}, errReset
				}
				body := io.MultiReader(o.part(off, off+goodProgress+1), failing{})
				return io.NopCloser(body), Info{Size: large, Offset: off, End: end}, nil
			}
			req := parallelRequest(o, "a")
			req.Parallel = parallel
			if parallel == 1 {
				// The first question is the leader's affair.
				o.answer(0, 0, -1)
			}
			got, err := readAll(c, req)
			if err != nil || !bytes.Equal(got, o.body) {
				t.Fatal(len(got), err)
			}
			if o.sent() != large || breaks < 6 {
				t.Errorf("%d bytes of %d, after %d breaks", o.sent(), large, breaks)
			}
		})
	}
}

func TestASourceThatKeepsBreakingIsGivenUp(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir(), 1<<30)
	defer c.Close()
	o := &origin{body: random(large)}
	o.answer = func(n int, off, _ int64) (io.ReadCloser, Info, error) {
		if n == 0 {
			return o.broken(off, 100_000)
		}
		return nil, Info{}, errReset
	}
	got, err := readAll(c, parallelRequest(o, "a"))
	if !errors.Is(err, errReset) || len(got) > 100_000 {
		t.Fatal(len(got), err)
	}
	if n := len(o.questions()); n > 4+maxFailures+1 {
		t.Errorf("asked %d times", n)
	}
	// What is there is not asked for again, neither by who has it nor by others.
	o.answer = nil
	for _, reader := range []string{"a", "b"} {
		req := parallelRequest(o, reader)
		if reader == "a" {
			req.Offset, req.Ranged = 100_000, true
		}
		got, err := readAll(c, req)
		if err != nil || !bytes.Equal(got, o.body[req.Offset:]) {
			t.Fatal(len(got), err)
		}
	}
	if o.sent() != large {
		t.Errorf("%d bytes of %d", o.sent(), large)
	}
}

// TestAnotherReadersRightCarriesOn has the first reader's credential refused
// after the first segment.
func TestAnotherReadersRightCarriesOn(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir(), 1<<30)
	defer c.Close()
	o := &origin{body: random(large)}
	refused := fmt.Errorf("%w: its token has ended", ErrRefused)
	gate := make(chan struct{})
	lead := parallelRequest(o, "a")
	var asked atomic.Int32
	lead.Fetch = func(ctx context.Context, off, n int64) (io.ReadCloser, Info, error) {
		if asked.Add(1) > 1 {
			return nil, Info{}, refused
		}
		r, w := io.Pipe()
		go func() {
			w.Write(o.body[:1000])
			<-gate
			w.Write(o.body[1000:firstSegment])
			w.Close()
		}()
		return r, Info{Size: large, End: firstSegment}, nil
	}
	lead.Parallel = 2 // the first answer, and one that is refused at once
	a := mustOpen(t, goOpen(c, lead))
	readExactly(t, a, o.body[:1000])
	b := mustOpen(t, goOpen(c, parallelRequest(o, "b")))
	close(gate)
	readExactly(t, b, o.body)
	readExactly(t, a, o.body[1000:]) // whose answer was begun
	if o.sent() != large-firstSegment {
		t.Errorf("%d bytes", o.sent())
	}

	// With nobody else it is over for now, and the answer that was begun is
	// read to its end.
	other := &origin{body: append(random(large), 1)}
	alone := parallelRequest(other, "a")
	asked.Store(0)
	alone.Fetch = func(ctx context.Context, off, n int64) (io.ReadCloser, Info, error) {
		if asked.Add(1) > 1 {
			return nil, Info{}, refused
		}
		return other.fetch(ctx, off, n)
	}
	alone.Parallel = 2
	got, err := readAll(c, alone)
	if !errors.Is(err, ErrRefused) || len(got) > firstSegment {
		t.Fatal(len(got), err)
	}
	got, err = readAll(c, parallelRequest(other, "a"))
	if err != nil || !bytes.Equal(got, other.body) || other.sent() != int64(len(other.body)) {
		t.Fatal(len(got), err, other.sent())
	}
}

// TestALiarAboutRangesGivesNoWrongByteAndNoEndlessLoop has a source that
// answers questions for a part in every wrong way.
func TestALiarAboutRangesGivesNoWrongByteAndNoEndlessLoop(t *testing.T) {
	t.Parallel()
	body := random(large)
	cut := func(off, n int64) []byte { return body[off:min(off+n, large)] }
	whole := func() (io.ReadCloser, Info, error) {
		return io.NopCloser(bytes.NewReader(body)), Info{Size: large}, nil
	}
	for name, lie := range map[string]func(off, n int64) (io.ReadCloser, Info, error){
		"the whole instead": func(off, n int64) (io.ReadCloser, Info, error) { return whole() },
		"refused as a range": func(off, n int64) (io.ReadCloser, Info, error) {
			return nil, Info{}, fmt.Errorf("%w: 416", ErrRange)
		},
		"another size": func(off, n int64) (io.ReadCloser, Info, error) {
			return io.NopCloser(bytes.NewReader(cut(off, n))), Info{Size: large + 1, Offset: off, End: off + n}, nil
		},
		"another place": func(off, n int64) (io.ReadCloser, Info, error) {
			return io.NopCloser(bytes.NewReader(body[off-1:])), Info{Size: large, Offset: off - 1, End: off - 1 + n}, nil
		},
		"more than it says": func(off, n int64) (io.ReadCloser, Info, error) {
			return io.NopCloser(bytes.NewReader(append(bytes.Clone(cut(off, n)), 0))), Info{Size: large, Offset: off, End: off + n}, nil
		},
		"less than it says": func(off, n int64) (io.ReadCloser, Info, error) {
			return io.NopCloser(bytes.NewReader(cut(off, n-1))), Info{Size: large, Offset: off, End: off + n}, nil
		},
		"nothing": func(off, n int64) (io.ReadCloser, Info, error) {
			return io.NopCloser(strings.NewReader("")), Info{Size: large, Offset: off, End: off + n}, nil
		},
		"other bytes": func(off, n int64) (io.ReadCloser, Info, error) {
			return io.NopCloser(bytes.NewReader(make([]byte, n))), Info{Size: large, Offset: off, End: off + n}, nil
		},
	} {
		for _, always := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, from the first question on %v", name, always), func(t *testing.T) {
				t.Parallel()
				c := open(t, t.TempDir(), 1<<30)
				defer c.Close()
				o := &origin{body: body}
				o.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) {
					switch {
					case n < 0:
						return whole()
					case off > 0, always && name != "another place":
						return lie(off, n)
					}
					return nil, Info{}, nil
				}
				for range 3 {
					got, err := readAll(c, parallelRequest(o, "a"))
					if err == nil && !bytes.Equal(got, body) {
						t.Fatal("a complete wrong object")
					}
					if len(o.questions()) > 3*(4+maxFailures+2) {
						t.Fatalf("%d questions", len(o.questions()))
					}
				}
				got, err := readAll(c, parallelRequest(o, "a"))
				healed := err == nil && bytes.Equal(got, body)
				// Where a part is not to be had the whole is, and so where parts
				// were wrong; who says that it is the part and gives less is
				// believed.
				believed := map[string]bool{"less than it says": true, "nothing": true, "another size": always}
				if healed == believed[name] {
					t.Errorf("healed: %v, %v", healed, err)
				}
			})
		}
	}
}

// TestADownloadGoesOnAfterARestart breaks off in the middle, once by closing
// and once as a kill does, and opens the directory again.
func TestADownloadGoesOnAfterARestart(t *testing.T) {
	t.Parallel()
	for _, killed := range []bool{false, true} {
		t.Run(fmt.Sprintf("killed %v", killed), func(t *testing.T) {
			t.Parallel()
			const size = 40 << 20
			o := &origin{body: random(size)}
			dir := t.TempDir()
			c := open(t, dir, 1<<30)
			stop := make(chan struct{})
			o.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) {
				const there = 24 << 20 // and then nothing comes
				if off+n <= there {
					return nil, Info{}, nil
				}
				body := io.MultiReader(o.part(off, max(off, there)), gated(stop), failing{})
				return io.NopCloser(body), Info{Size: size, Offset: off, End: min(off+n, size)}, nil
			}
			r := mustOpen(t, goOpen(c, parallelRequest(o, "a")))
			readExactly(t, r, o.body[:24<<20])
			req := parallelRequest(o, "a")
			if killed {
				// What a kill leaves is what is on disk now; the rest of this
				// process is in the way of nobody.
				left := t.TempDir()
				until(t, "something was noted", func() bool {
					journals, _ := filepath.Glob(filepath.Join(dir, "pending", "*.journal"))
					if len(journals) == 0 {
						return false
					}
					text, _ := os.ReadFile(journals[0])
					return bytes.Count(text, []byte("\n")) > 1
				})
				copyDir(t, dir, left)
				dir = left
			}
			close(stop)
			c.Close()
			before := o.sent()

			o.answer = nil
			c = open(t, dir, 1<<30)
			defer c.Close()
			if s := c.Stats(); s.Parked != 1 || s.PendingBytes < size {
				t.Fatalf("%+v", s)
			}
			req.Offset, req.Ranged = 20<<20, true
			if killed {
				if n, err := readAll(c, req); !errors.Is(err, ErrDropped) {
					t.Fatal(len(n), err)
				}
				req.Offset, req.Ranged = 0, false
			}
			got, err := readAll(c, req)
			if err != nil || !bytes.Equal(got, o.body[req.Offset:]) {
				t.Fatal(len(got), err)
			}
			waitStored(t, c, req.Key)
			allowed := int64(size)
			if killed {
				allowed += 2 * noteStep
			}
			if o.sent() > allowed {
				t.Errorf("%d bytes of %d, %d of them before the restart", o.sent(), size, before)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "pending", "*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 10_000 {
		if done() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("not in 10 s: %s", what)
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(filepath.Join(to, "pending"), os.DirFS(filepath.Join(from, "pending"))); err != nil {
		t.Fatal(err)
	}
}

// TestAWrongJournalCostsARefetchAndNoWrongByte spoils what a kill left in every
// way that a disk or a hand can.
func TestAWrongJournalCostsARefetchAndNoWrongByte(t *testing.T) {
	t.Parallel()
	body := random(large)
	d := digest.FromBytes(body)
	for name, left := range map[string]struct {
		header, progress string
		data             []byte
		continued        bool
	}{
		"as it should be":       {fmt.Sprintf(`{"Domain":"*","Digest":%q,"Size":%d}`, d, large), `{"Synced":true,"Filled":[[0,5000000]]}`, body[:5_000_000], true},
		"of an earlier boot":    {fmt.Sprintf(`{"Domain":"*","Digest":%q,"Size":%d}`, d, large), `{"Booted":"before","Filled":[[0,5000000]]}`, make([]byte, 5_000_000), false},
		"wrong bytes":           {fmt.Sprintf(`{"Domain":"*","Digest":%q,"Size":%d}`, d, large), `{"Synced":true,"Filled":[[0,5000000]]}`, make([]byte, 5_000_000), true},
		"all is there":          {fmt.Sprintf(`{"Domain":"*","Digest":%q,"Size":%d}`, d, large), fmt.Sprintf(`{"Synced":true,"Filled":[[0,%d]]}`, large), body, true},
		"bytes that are not":    {fmt.Sprintf(`{"Domain":"*","Digest":%q,"Size":%d}`, d, large), `{"Synced":true,"Filled":[[0,5000001]]}`, body[:5_000_000], false},
		"another digest":        {fmt.Sprintf(`{"Domain":"*","Digest":%q,"Size":%d}`, digest.FromString("x"), large), `{"Synced":true,"Filled":[[0,5]]}`, body[:5_000_000], false},
		"another size":          {fmt.Sprintf(`{"Domain":"*","Digest":%q,"Size":%d}`, d, large+1), `{"Synced":true,"Filled":[[0,5000000]]}`, body[:5_000_000], true},
		"spans that make none":  {fmt.Sprintf(`{"Domain":"*","Digest":%q,"Size":%d}`, d, large), `{"Synced":true,"Filled":[[-5,5]]}`, body[:5_000_000], false},
		"only a header":         {fmt.Sprintf(`{"Domain":"*","Digest":%q,"Size":%d}`, d, large), `{}`, body[:5_000_000], false},
		"no JSON":               {"x", "y", body[:5_000_000], false},
		"another source domain": {fmt.Sprintf(`{"Domain":"evil.example","Digest":%q,"Size":%d}`, d, large), `{"Synced":true,"Filled":[[0,5000000]]}`, make([]byte, 5_000_000), true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			c := open(t, dir, 1<<30)
			p, err := c.store.Create(d)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.File.Write(left.data); err != nil {
				t.Fatal(err)
			}
			for _, r := range []string{left.header, left.progress} {
				if err := p.Note([]byte(r)); err != nil {
					t.Fatal(err)
				}
			}
			p.Close()
			c.Close()

			c = open(t, dir, 1<<30)
			defer c.Close()
			if got := c.Stats().Parked == 1; got != left.continued {
				t.Fatalf("continued: %v", got)
			}
			o := &origin{body: body}
			refetched := 0
			for {
				got, err := readAll(c, parallelRequest(o, "a"))
				if err == nil && bytes.Equal(got, body) {
					break
				}
				if err == nil || refetched > 0 {
					t.Fatal(len(got), err)
				}
				refetched++
				// Whoever has a part of it must not get another.
				again := parallelRequest(o, "a")
				again.Offset = 4096
				if _, err := readAll(c, again); !errors.Is(err, ErrDropped) {
					t.Fatal(err)
				}
			}
			if (name == "wrong bytes") != (refetched == 1) {
				t.Errorf("refetched %d times", refetched)
			}
			if name == "as it should be" && o.sent() != large-5_000_000 || name == "all is there" && o.sent() != tailHold {
				t.Errorf("%d bytes were fetched", o.sent())
			}
		})
	}
}

func TestParkedFilesMakeRoom(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir(), 30<<20)
	defer c.Close()
	var first *origin
	for i := range 3 { // two of them have room
		o := &origin{body: append(random(10<<20), byte(i))}
		gate := make(chan struct{})
		o.answer = func(n int, off, _ int64) (io.ReadCloser, Info, error) {
			if n > 0 {
				<-gate
				return nil, Info{}, fmt.Errorf("%w: enough", ErrRefused)
			}
			return nil, Info{}, nil
		}
		r := mustOpen(t, goOpen(c, parallelRequest(o, "a")))
		readExactly(t, r, o.body[:firstSegment])
		close(gate)
		if n, err := r.Content.Read(make([]byte, 1)); !errors.Is(err, ErrRefused) {
			t.Fatal(n, err)
		}
		if first == nil {
			first = o
		}
	}
	if s := c.Stats(); s.Parked != 2 || s.UsedBytes+s.PendingBytes > s.MaxBytes {
		t.Fatalf("%+v", s)
	}
	// The oldest has gone, and who read of it starts anew.
	req := parallelRequest(first, "a")
	req.Offset, req.Ranged = 1<<20, true
	first.answer = nil
	if _, err := readAll(c, req); !errors.Is(err, ErrDropped) {
		t.Fatal(err)
	}
	if got, err := readAll(c, parallelRequest(first, "b")); err != nil || !bytes.Equal(got, first.body) {
		t.Fatal(len(got), err)
	}
}

// TestWhoseRightMayEndAsksForAllAtOnce: every answer is begun before the first
// has ended.
func TestWhoseRightMayEndAsksForAllAtOnce(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir(), 1<<30)
	defer c.Close()
	o := &origin{body: random(60 << 20)}
	gate := make(chan struct{})
	var ended atomic.Bool
	o.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) {
		if ended.Load() {
			return nil, Info{}, fmt.Errorf("%w: the token has ended", ErrRefused)
		}
		end := min(off+n, int64(len(o.body)))
		r, w := io.Pipe()
		go func() {
			w.Write(o.body[off : off+1])
			<-gate
			w.Write(o.body[off+1 : end])
			w.Close()
		}()
		return r, Info{Size: int64(len(o.body)), Offset: off, End: end}, nil
	}
	req := parallelRequest(o, "a")
	req.Ahead = true
	r := mustOpen(t, goOpen(c, req))
	until(t, "all was asked for", func() bool {
		return o.covered() == int64(len(o.body))
	})
	ended.Store(true)
	close(gate)
	readExactly(t, r, o.body)
}

// TestPartsOfTwoGenerationsAreFetchedAnewInOneStream: a source has replaced the object
// in between, or two endpoints do not have the same. Parts that go together are taken
// whatever they are called, and what does not is not tried in parts again.
func TestPartsOfTwoGenerationsAreFetchedAnewInOneStream(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	body := random(large)
	var inParts, whole int
	var mu sync.Mutex
	o := &origin{body: body}
	o.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) {
		mu.Lock()
		defer mu.Unlock()
		if n < 0 {
			whole++
			if whole == 1 { // and breaks off: what comes again must be the same
				return io.NopCloser(io.MultiReader(bytes.NewReader(body[:2<<20]), failing{})), Info{Size: large}, nil
			}
			return nil, Info{}, nil
		}
		if inParts++; inParts == 1 {
			return nil, Info{}, nil
		}
		return io.NopCloser(bytes.NewReader(make([]byte, min(n, large-off)))), Info{Size: large, Offset: off, End: min(off+n, large)}, nil
	}
	if _, err := readAll(c, parallelRequest(o, "a")); !errors.Is(err, ErrBroken) || inParts < 2 || whole != 0 {
		t.Fatalf("%d parts, %d in one: %v", inParts, whole, err)
	}
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	before := inParts
	if got, err := readAll(c, parallelRequest(o, "a")); err != nil || !bytes.Equal(got, body) || inParts != before || whole != 2 {
		t.Errorf("%d parts, %d in one, %d bytes: %v", inParts-before, whole, len(got), err)
	}
}
