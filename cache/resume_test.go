// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"time"
)

// TestWholeASupersededFlightsReadersJoinNoOther: X gives a bad beginning and
// breaks off, hangs when it is asked again, and Y has the object: who has the
// beginning must not be given Y's end.
func TestWholeASupersededFlightsReadersJoinNoOther(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	body := randomBytes(large)
	bad := bytes.Clone(body)
	bad[100] ^= 1
	var hangs atomic.Bool
	asked := make(chan struct{}, 100)
	x := &origin{body: bad}
	x.answer = func(n int, off, _ int64) (io.ReadCloser, Info, error) {
		if hangs.Load() {
			asked <- struct{}{}
			<-c.flights.Closing()
			return nil, Info{}, context.Canceled
		}
		if n > 0 {
			return nil, Info{}, errReset
		}
		return x.broken(off, 2<<20)
	}
	y := &origin{body: body}
	req := parallelRequest(y, "a")
	fromX := req
	fromX.Fetch, fromX.Source, fromX.Parallel = x.fetch, "x", 1
	req.Source = "y"
	got, err := readAll(c, fromX)
	if err == nil || len(got) < 1<<20 {
		t.Fatalf("%d bytes: %v", len(got), err)
	}
	settle(t, "the file is parked", func() bool { return c.Stats().Parked == 1 })
	hangs.Store(true)
	another := fromX
	another.Reader = "b"
	waiting, leave := context.WithCancel(t.Context())
	defer leave()
	go c.Open(waiting, another)
	<-asked
	other := req
	other.Reader = "c"
	if whole, err := readAll(c, other); err != nil || !bytes.Equal(whole, body) {
		t.Fatalf("%d bytes: %v", len(whole), err)
	}
	resumed := req
	resumed.Offset, resumed.Ranged = int64(len(got)), true
	if tail, err := readAll(c, resumed); !errors.Is(err, ErrDropped) {
		t.Errorf("%d bytes were joined to %d bad ones: %v", len(tail), len(got), err)
	}
	leave()
	go c.Close() // X answers at last
	settle(t, "flights, and what they left of a stored object,", func() bool { s := c.Stats(); return s.Flights == 0 && s.Parked == 0 })
}

// TestASourceThatBearsOneConnectionIsEnough: more than one at a time are
// refused.
func TestASourceThatBearsOneConnectionIsEnough(t *testing.T) {
	t.Parallel()
	for _, refusal := range []error{fmt.Errorf("%w: 429", ErrRefused), errReset} {
		c := openChaos(t, t.TempDir(), 1<<30)
		defer c.Close()
		body := randomBytes(large)
		source := &origin{body: body}
		var open atomic.Int32
		source.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) {
			if !open.CompareAndSwap(0, 1) {
				return nil, Info{}, refusal
			}
			end := min(off+n, int64(len(body)))
			if n < 0 {
				end = int64(len(body))
			}
			return &counted{source.part(off, end), &open}, Info{Size: int64(len(body)), Offset: off, End: end}, nil
		}
		got, err := readAll(c, parallelRequest(source, "one"))
		if err != nil || !bytes.Equal(got, body) {
			t.Errorf("%v: %d bytes: %v", refusal, len(got), err)
		}
	}
}

type counted struct {
	io.ReadCloser
	open *atomic.Int32
}

func (b *counted) Close() error {
	b.open.Store(0)
	return b.ReadCloser.Close()
}

// TestABlipIsBorne, also where four answers break at once.
func TestABlipIsBorne(t *testing.T) {
	t.Parallel()
	const away = 500 * time.Millisecond
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	body := randomBytes(10 * minSegment)
	source := &origin{body: body}
	var until atomic.Int64
	broken := func() bool { return time.Now().UnixNano() < until.Load() }
	source.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) {
		if broken() {
			return nil, Info{}, errReset
		}
		end := min(off+n, int64(len(body)))
		part := readerFunc(func(p []byte) (int, error) {
			if source.sent() > 3*minSegment {
				until.CompareAndSwap(0, time.Now().Add(away).UnixNano())
			}
			if broken() {
				return 0, errReset
			}
			return 0, io.EOF
		})
		// In small pieces, so that it breaks in the middle.
		var pieces []io.Reader
		for at := off; at < end; at += 1 << 18 {
			pieces = append(pieces, source.part(at, min(at+1<<18, end)), part)
		}
		return io.NopCloser(io.MultiReader(pieces...)), Info{Size: int64(len(body)), Offset: off, End: end}, nil
	}
	if got, err := readAll(c, parallelRequest(source, "one")); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	if until.Load() == 0 {
		t.Error("it was not away")
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestPartsFarAheadAreBegunAtOnce: a client that asks for many parts of a large
// object at once gets the first byte of each, although what was begun for one of
// them goes on very slowly.
func TestPartsFarAheadAreBegunAtOnce(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	body := randomBytes(64 << 20)
	source := &origin{body: body}
	const parts, apart = 7, 9 << 20
	hold := make(chan struct{})
	source.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) {
		if off%apart != 0 {
			return nil, Info{}, nil
		}
		end := min(off+n, int64(len(body)))
		first := min(off+1<<16, end)
		wait := readerFunc(func([]byte) (int, error) {
			select {
			case <-hold:
			case <-c.flights.Closing():
			}
			return 0, io.EOF
		})
		return io.NopCloser(io.MultiReader(source.part(off, first), wait, source.part(first, end))),
			Info{Size: int64(len(body)), Offset: off, End: end}, nil
	}
	objects := make(chan error, parts)
	for i := range parts {
		go func() {
			req := parallelRequest(source, fmt.Sprint(i))
			req.Offset, req.Ranged = int64(i)*apart, i > 0
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			o, err := c.Open(ctx, req)
			if err == nil {
				defer o.Close()
			}
			objects <- err
		}()
	}
	for range parts {
		if err := <-objects; err != nil {
			t.Error(err)
		}
	}
	close(hold)
	if got, err := readAll(c, parallelRequest(source, "whole")); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes: %v", len(got), err)
	}
	if sent := source.sent(); sent > int64(len(body))*105/100 {
		t.Errorf("%d bytes were sent of %d", sent, len(body))
	}
}

// TestABodyThatWasLongerThanItsSizeEnds: the first answer has no length, and
// more bytes than the object.
func TestABodyThatWasLongerThanItsSizeEnds(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	body := randomBytes(300_000)
	source := &origin{body: body}
	source.answer = func(n int, off, _ int64) (io.ReadCloser, Info, error) {
		if n > 0 {
			return nil, Info{}, nil
		}
		long := append(bytes.Clone(body), "and more"...)
		return io.NopCloser(io.MultiReader(bytes.NewReader(long), failing{})), Info{Size: -1}, nil
	}
	if got, err := readAll(c, parallelRequest(source, "one")); err == nil {
		t.Errorf("%d bytes", len(got))
	}
	settle(t, "the flight", func() bool { return c.Stats().Flights == 0 })
	if n := len(source.questions()); n > 3 {
		t.Errorf("%d questions", n)
	}
}

// TestWholeNobodyJoinsWhatTheJournalHadNotYet: tarn ends suddenly while somebody
// has more of a file than its journal speaks of. Whatever comes in its place, nobody
// may join it to that; who begins anew has what the journal speaks of for nothing.
func TestWholeNobodyJoinsWhatTheJournalHadNotYet(t *testing.T) {
	t.Parallel()
	body := randomBytes(noteStep + 6<<20)
	const wrongAt = noteStep + 1<<20
	for name, flip := range map[string]byte{"wrong": 1, "zero": body[wrongAt], "right": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, left := t.TempDir(), t.TempDir()
			c := openChaos(t, dir, 1<<30)
			defer c.Close()
			bad := bytes.Clone(body)
			bad[wrongAt] ^= flip
			first, honest := &origin{body: bad}, &origin{body: body}
			noted := make(chan struct{})
			wait := readerFunc(func([]byte) (int, error) { <-noted; return 0, io.EOF })
			hang := readerFunc(func([]byte) (int, error) { <-c.flights.Closing(); return 0, context.Canceled })
			first.answer = func(_ int, off, n int64) (io.ReadCloser, Info, error) {
				const end = wrongAt + 1<<20 + 100
				size := int64(len(body))
				return io.NopCloser(io.MultiReader(first.part(off, noteStep), wait, first.part(noteStep, end), hang)), Info{Size: size, Offset: off, End: size}, nil
			}
			req := parallelRequest(honest, "a")
			req.Fetch, req.Parallel = first.fetch, 1
			o, err := c.Open(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			settle(t, "the journal", func() bool { return isNoted(c) })
			close(noted)
			got := make([]byte, wrongAt+1<<20)
			if _, err := io.ReadFull(o.Content, got); err != nil {
				t.Fatal(err)
			}
			copyAll(t, dir, left) // as a kill leaves it
			next := openChaos(t, left, 1<<30)
			defer next.Close()
			req.Fetch, req.Offset, req.Ranged = honest.fetch, int64(len(got)), true
			if tail, err := readAll(next, req); !errors.Is(err, ErrDropped) {
				t.Errorf("%d bytes were joined to %d: %v", len(tail), len(got), err)
			}
			req.Offset, req.Ranged = 0, false
			if all, err := readAll(next, req); err != nil || !bytes.Equal(all, body) {
				t.Errorf("from the start: %d bytes: %v", len(all), err)
			}
			if honest.sent() > int64(len(body))-noteStep {
				t.Errorf("%d bytes were fetched again", honest.sent())
			}
			o.Interrupt()
			o.Close()
		})
	}
}
