// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// They wait for the disk more than for a processor.
	if flag.Parse(); !parallelIsSet() {
		flag.Set("test.parallel", fmt.Sprint(4*runtime.GOMAXPROCS(0)))
	}
	// A broken index may keep the lock that its closing waits for.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("tarn/index.closeBroken"))
}

func parallelIsSet() (set bool) {
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == "test.parallel" })
	return set
}

func open(t testing.TB, dir string, maxSize int64) *Cache {
	t.Helper()
	c, err := New(Options{Dir: dir, MaxSize: maxSize})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// source is an upstream under the test's hand: each Fetch gets a pipe, which
// the test writes to.
type source struct {
	size    int64 // announced; -1 for unknown
	noRange bool
	err     error
	opened  chan *delivery
}

type delivery struct {
	off int64
	*io.PipeWriter
}

func newSource(size int64) *source { return &source{size: size, opened: make(chan *delivery, 10)} }

func (s *source) fetch(ctx context.Context, off, _ int64) (io.ReadCloser, Info, error) {
	if s.err != nil {
		return nil, Info{}, s.err
	}
	if s.noRange {
		off = 0
	}
	r, w := io.Pipe()
	context.AfterFunc(ctx, func() { w.CloseWithError(ctx.Err()) })
	s.opened <- &delivery{off, w}
	return r, Info{Size: s.size, Offset: off}, nil
}

// next is the delivery that a Fetch has opened.
func (s *source) next(t testing.TB) *delivery {
	t.Helper()
	select {
	case d := <-s.opened:
		return d
	case <-time.After(10 * time.Second):
		t.Fatal("nobody fetched")
		return nil
	}
}

// opening is an Open on its way.
type opening struct {
	object *Object
	err    error
}

func goOpen(c *Cache, req Request) chan opening {
	ch := make(chan opening, 1)
	go func() {
		o, err := c.Open(context.Background(), req)
		ch <- opening{o, err}
	}()
	return ch
}

func mustOpen(t testing.TB, ch chan opening) *Object {
	t.Helper()
	got := <-ch
	if got.err != nil {
		t.Fatal(got.err)
	}
	t.Cleanup(got.object.Close)
	return got.object
}

// readExactly reads n bytes and holds them to want.
func readExactly(t testing.TB, o *Object, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(o.Content, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("wrong bytes")
	}
}

// nothingMore tells whether a Read finds nothing before it is interrupted.
func nothingMore(t testing.TB, o *Object) {
	t.Helper()
	type result struct {
		n   int
		err error
	}
	ch := make(chan result, 1)
	go func() {
		n, err := o.Content.Read(make([]byte, 1))
		ch <- result{n, err}
	}()
	o.Interrupt()
	if r := <-ch; r.n != 0 || r.err == nil || r.err == io.EOF {
		t.Fatalf("read %d bytes, %v", r.n, r.err)
	}
}

const (
	domain = ListedDomain
	big    = 300_000
)

func request(d digest.Digest, s *source, reader string) Request {
	return Request{Key: Key{Domain: domain, Digest: d}, Reader: reader, Authorised: true, Fetch: s.fetch}
}

// TestFlightInterleavings walks the state machine at the top of flight.go: for
// each state, what a reader that is there, one that comes, and one that left
// may see of it.
func TestFlightInterleavings(t *testing.T) {
	t.Parallel()
	body := random(big)
	dgst := digest.FromBytes(body)
	wrong := bytes.Clone(body)
	wrong[big-1] ^= 1
	key := Key{Domain: domain, Digest: dgst}
	refused := fmt.Errorf("%w: 403", ErrRefused)

	for name, run := range map[string]func(t *testing.T, c *Cache, s *source){
		"filling: the tail is held back until the digest matched": func(t *testing.T, c *Cache, s *source) {
			ch := goOpen(c, request(dgst, s, "a"))
			d := s.next(t)
			d.Write(body) // all of it, but it is not over yet
			a := mustOpen(t, ch)
			readExactly(t, a, body[:big-tailHold])
			b := mustOpen(t, goOpen(c, request(dgst, s, "b")))
			readExactly(t, b, body[:big-tailHold])
			nothingMore(t, b)
			d.Close()
			readExactly(t, a, body[big-tailHold:])
			if _, err := a.Content.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
		},
		"filling: of a body without a length, the last bytes so far are held back": func(t *testing.T, c *Cache, s *source) {
			s.size = -1
			ch := goOpen(c, request(dgst, s, "a"))
			d := s.next(t)
			d.Write(body[:100_000])
			a := mustOpen(t, ch)
			readExactly(t, a, body[:100_000-tailHold])
			d.Write(body[100_000:])
			readExactly(t, a, body[100_000-tailHold:big-tailHold])
			d.Close()
			readExactly(t, a, body[big-tailHold:])
		},
		"asking: an unauthorised reader is told to ask, a leader is not": func(t *testing.T, c *Cache, s *source) {
			lead := request(dgst, s, "a")
			lead.Authorised = false
			ch := goOpen(c, lead)
			d := s.next(t)
			if _, err := c.Open(t.Context(), lead); !errors.Is(err, ErrAuthorise) {
				t.Fatal(err)
			}
			d.Write(body[:1])
			mustOpen(t, ch)
			if _, err := c.Open(t.Context(), lead); !errors.Is(err, ErrAuthorise) {
				t.Fatal(err)
			}
			d.Write(body[1:])
			d.Close()
			waitStored(t, c, key)
			if _, err := c.Open(t.Context(), lead); !errors.Is(err, ErrAuthorise) {
				t.Fatal(err)
			}
		},
		"asking: a refusal ends only whose credential it concerns": func(t *testing.T, c *Cache, s *source) {
			gate := make(chan struct{})
			asked := make(chan struct{})
			bad := request(dgst, s, "a")
			bad.Fetch = func(context.Context, int64, int64) (io.ReadCloser, Info, error) {
				close(asked)
				<-gate
				return nil, Info{}, refused
			}
			first := goOpen(c, bad)
			<-asked
			second := goOpen(c, request(dgst, s, "b")) // waits, or comes after: both are to work
			close(gate)
			if got := <-first; !errors.Is(got.err, ErrRefused) {
				t.Fatal(got.err)
			}
			d := s.next(t)
			d.Write(body)
			d.Close()
			o := mustOpen(t, second)
			readExactly(t, o, body)
		},
		"asking: any other error is everybody's": func(t *testing.T, c *Cache, s *source) {
			s.err = errors.New("no route")
			if _, err := c.Open(t.Context(), request(dgst, s, "a")); !errors.Is(err, s.err) {
				t.Fatal(err)
			}
		},
		"asking: who leaves last calls the question off": func(t *testing.T, c *Cache, s *source) {
			asked, left := make(chan struct{}), make(chan struct{})
			req := request(dgst, s, "a")
			req.Fetch = func(ctx context.Context, off, n int64) (io.ReadCloser, Info, error) {
				close(asked)
				<-ctx.Done()
				close(left)
				return nil, Info{}, ctx.Err()
			}
			req.Authorised = true
			var cancels [2]context.CancelFunc
			ch := make(chan error, len(cancels))
			for i := range cancels {
				var ctx context.Context
				ctx, cancels[i] = context.WithCancel(t.Context())
				go func() { _, err := c.Open(ctx, req); ch <- err }()
				if i == 0 {
					<-asked
				}
			}
			until(t, "two wait", func() bool { return c.waitingFor(key) == len(cancels) })
			for i, cancel := range cancels {
				select {
				case <-left:
					t.Fatalf("called off with %d waiting", len(cancels)-i)
				default:
				}
				cancel()
				if err := <-ch; !errors.Is(err, context.Canceled) {
					t.Fatal(err)
				}
			}
			<-left
			next := goOpen(c, request(dgst, s, "a")) // asks anew
			d := s.next(t)
			d.Write(body)
			d.Close()
			(<-next).object.Close()
			waitStored(t, c, key)
		},
		"filling: without readers it goes on to the end": func(t *testing.T, c *Cache, s *source) {
			ch := goOpen(c, request(dgst, s, "a"))
			d := s.next(t)
			d.Write(body[:1])
			(<-ch).object.Close()
			d.Write(body[1:])
			d.Close()
			waitStored(t, c, key)
		},
		"failed: readers are cut, and nobody joins a later generation to this one": func(t *testing.T, c *Cache, s *source) {
			ch := goOpen(c, request(dgst, s, "a"))
			d := s.next(t)
			d.Write(wrong)
			a := mustOpen(t, ch)
			b := mustOpen(t, goOpen(c, request(dgst, s, "b"))) // reads nothing
			readExactly(t, a, wrong[:1000])
			d.Close()
			if _, err := io.Copy(io.Discard, a.Content); !errors.Is(err, ErrBroken) {
				t.Fatal(err)
			}
			if _, err := b.Content.Read(make([]byte, 1)); !errors.Is(err, ErrBroken) {
				t.Fatal(err)
			}
			later := request(dgst, s, "a")
			fresh := goOpen(c, later)
			d = s.next(t)
			d.Write(body[:big-1])
			mustOpen(t, fresh)
			later.Offset = 1000
			if _, err := c.Open(t.Context(), later); !errors.Is(err, ErrDropped) {
				t.Fatalf("a reader of the bad generation resumes: %v", err)
			}
			other := request(dgst, s, "b") // who has nothing of it is not told from who has
			other.Offset = 1000
			if _, err := c.Open(t.Context(), other); !errors.Is(err, ErrDropped) {
				t.Fatalf("somebody else resumes: %v", err)
			}
			d.Write(body[big-1:])
			d.Close()
			waitStored(t, c, key)
			if _, err := c.Open(t.Context(), later); !errors.Is(err, ErrDropped) {
				t.Fatalf("a reader of the bad generation resumes from the store: %v", err)
			}
		},
		"verified: readers have all of it before the commit": func(t *testing.T, c *Cache, s *source) {
			ch := goOpen(c, request(dgst, s, "a"))
			d := s.next(t)
			d.Write(body)
			d.Close()
			a := mustOpen(t, ch)
			readExactly(t, a, body)
			o := mustOpen(t, goOpen(c, request(dgst, s, "b")))
			readExactly(t, o, body)
			if o.Source != Hit {
				t.Fatalf("source %d", o.Source)
			}
		},
		"apart in the middle: each goes on with a stream of its own": func(t *testing.T, c *Cache, s *source) {
			apartInTheMiddle(t, c, s, dgst, body, body)
		},
		"apart in the middle, from a source without ranges": func(t *testing.T, c *Cache, s *source) {
			s.noRange = true
			apartInTheMiddle(t, c, s, dgst, body, body)
		},
		"apart in the middle, and what follows is wrong": func(t *testing.T, c *Cache, s *source) {
			apartInTheMiddle(t, c, s, dgst, body, wrong)
		},
		"a small object has no headers before it is verified": func(t *testing.T, c *Cache, s *source) {
			small := body[:1000]
			sd := digest.FromBytes(small)
			s.size = 1000
			ch := goOpen(c, request(sd, s, "a"))
			d := s.next(t)
			d.Write(wrong[1:1001])
			d.Close()
			if got := <-ch; !errors.Is(got.err, ErrBroken) {
				t.Fatal(got.err)
			}
		},
		"what a check refuses is not stored": func(t *testing.T, c *Cache, s *source) {
			refuse := errors.New("two things at once")
			req := request(dgst, s, "a")
			req.Check = func(got []byte) error {
				if !bytes.Equal(got, body) {
					t.Error("the check saw other bytes")
				}
				return refuse
			}
			ch := goOpen(c, req)
			d := s.next(t)
			d.Write(body)
			o := mustOpen(t, ch)
			d.Close()
			if _, err := io.Copy(io.Discard, o.Content); !errors.Is(err, refuse) {
				t.Fatal(err)
			}
		},
		"two domains fly apart and share the file": func(t *testing.T, c *Cache, s *source) {
			other := newSource(big)
			ch := goOpen(c, request(dgst, s, "a"))
			req := request(dgst, other, "a")
			req.Domain = "evil.example"
			ch2 := goOpen(c, req)
			for _, d := range []*delivery{s.next(t), other.next(t)} {
				d.Write(body)
				d.Close()
			}
			mustOpen(t, ch)
			mustOpen(t, ch2)
			waitStored(t, c, key)
			waitStored(t, c, req.Key)
			files, _ := filepath.Glob(filepath.Join(c.store.Dir(), "blobs/sha256/*"))
			if len(files) != 1 {
				t.Fatalf("files: %v", files)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var refuses atomic.Bool
			c := withSteps(t, dir, func(name string, do func() error) error {
				if name == "write pending" && refuses.Load() {
					return syscall.EROFS
				}
				return do()
			})
			refusesWrites.Store(c, &refuses)
			t.Cleanup(func() {
				if err := c.Close(); err != nil {
					t.Error(err)
				}
				if s := c.Stats(); s.PendingBytes != 0 || s.Flights != 0 {
					t.Errorf("left behind: %+v", s)
				}
				if left := pendingFiles(t, dir); len(left) != 0 {
					t.Errorf("pending files: %v", left)
				}
			})
			run(t, c, newSource(big))
		})
	}
}

// refusesWrites has what makes the disk of a cache refuse to write, by the cache.
var refusesWrites sync.Map

// apartInTheMiddle has the disk refuse a write after 200,000 bytes; continued
// is what the source has from then on.
func apartInTheMiddle(t *testing.T, c *Cache, s *source, dgst digest.Digest, body, continued []byte) {
	const first = 200_000
	ch := goOpen(c, request(dgst, s, "a"))
	d := s.next(t)
	d.Write(body[:first])
	a := mustOpen(t, ch)
	readExactly(t, a, body[:1000])
	b := mustOpen(t, goOpen(c, request(dgst, s, "b")))
	leaver := <-goOpen(c, request(dgst, s, "leaver"))

	readExactly(t, mustOpen(t, goOpen(c, request(dgst, s, "whoever waits until all of it is hashed"))), body[:first])
	refuses, _ := refusesWrites.Load(c)
	refuses.(*atomic.Bool).Store(true)
	go d.Write(body[first : first+1])
	settle(t, "the flight passes through", func() bool { return c.Stats().Flights == 0 })
	readExactly(t, leaver.object, body[:1000])
	leaver.object.Close()
	if c.flights.Refuses(Key{Domain: domain, Digest: dgst}, 1) {
		t.Error("ranges of what passes through are refused")
	}

	for _, o := range []*Object{a, b} {
		from := int64(0)
		if o == a {
			from = 1000
		}
		got := make(chan error, 1)
		var rest bytes.Buffer
		go func() {
			_, err := io.Copy(&rest, struct{ io.Reader }{o.Content})
			got <- err
		}()
		own := s.next(t)
		if want := int64(first); !s.noRange && own.off != want {
			t.Errorf("went on at %d, not at %d", own.off, want)
		}
		own.Write(continued[own.off:])
		own.Close()
		err := <-got
		if bytes.Equal(continued, body) {
			if err != nil || !bytes.Equal(rest.Bytes(), body[from:]) {
				t.Fatalf("%d bytes, %v", rest.Len(), err)
			}
		} else if !errors.Is(err, ErrBroken) || rest.Len()+int(from) > big-tailHold {
			t.Fatalf("wrong bytes went out whole: %d, %v", rest.Len(), err)
		}
	}
	if c.Stats().Trouble == "" {
		t.Error("nobody was told of the disk")
	}
}

func waitStored(t testing.TB, c *Cache, k Key) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if _, ok := c.Has(k); ok {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("%v was not stored in 10 s", k)
		case <-tick.C:
		}
	}
}

func TestTheBoundHoldsWithReservations(t *testing.T) {
	t.Parallel()
	c := open(t, t.TempDir(), 1<<20)
	defer c.Close()
	var stored int
	for i := range 8 {
		body := append(random(200_000), byte(i))
		s := newSource(int64(len(body)))
		ch := goOpen(c, request(digest.FromBytes(body), s, "a"))
		d := s.next(t)
		go func() { d.Write(body); d.Close() }()
		o := mustOpen(t, ch)
		if st := c.Stats(); st.UsedBytes+st.PendingBytes > st.MaxBytes {
			t.Fatalf("over the bound: %+v", st)
		}
		readExactly(t, o, body)
		if o.Source == Passed {
			continue
		}
		stored++
		waitStored(t, c, Key{Domain: domain, Digest: digest.FromBytes(body)})
		var used int64
		filepath.Walk(c.store.Dir(), func(_ string, info os.FileInfo, _ error) error {
			if info != nil && info.Mode().IsRegular() {
				used += info.Size()
			}
			return nil
		})
		if used > 1<<20 {
			t.Fatalf("%d bytes on disk", used)
		}
	}
	if stored == 0 || stored == 8 {
		t.Fatalf("%d of 8 objects of 200 kB were stored in 1 MiB", stored)
	}
}

func TestASecondCacheOnTheDirectoryIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := open(t, dir, 1<<20)
	defer c.Close()
	if _, err := New(Options{Dir: dir, MaxSize: 1 << 20}); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
}
