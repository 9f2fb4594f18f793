// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"tarn/blobstore"

	"github.com/opencontainers/go-digest"
)

// A flight is one object being downloaded now, for one source domain, with any
// number of readers. One goroutine, run, fills a pending file; readers follow
// the file, and the fill never waits for a reader. Whoever starts a flight may
// leave: it lives on the cache's context.
//
//	            fetch refused or failed
//	asking ─────────────────────────────────> ending ─> failed
//	  │  │  stored meanwhile ───────────────> ending ─> gone
//	  │  └─ no room ──────────────────────────────────> apart
//	  │ headers, room                                     ^
//	  v                                                   │
//	filling ── disk refuses a write, or room ends ────────┘
//	  │  └─ short, long, digest or check fails, source breaks ──> ending
//	  │ digest matches
//	  v
//	verified ── committer: stored, or dropped ──> out of the table
//
// What a reader may do:
//
//	asking    wait
//	filling   have every written byte but the last tailHold of the object
//	verified  have every byte
//	ending    wait: nobody is fed any more, the taints are being written
//	apart     have what is in the file, then go on with a stream of its own
//	failed    have nothing more. It is tainted if it had anything.
//	gone      look at the store again
//
// A flight leaves the cache's table when it fails, goes apart or is gone, and
// after its commit; from then on nobody joins it. Its taints are written
// before it leaves the table, so the next generation never meets a reader of
// this one unmarked.
type flight struct {
	cache  *Cache
	key    Key
	ctx    context.Context // the flight's own; ends with it or with the cache
	cancel context.CancelFunc
	refs   atomic.Int32 // the table's or the committer's one, and one for each reader
	asker  string       // the reader whose right the fetch is to find out; "" when that is known

	// mu guards what follows; changed is signalled on every change. The
	// cache's mutex is never taken under it.
	mu       sync.Mutex
	changed  sync.Cond
	state    flightState
	err      error // why it failed
	size     int64 // -1: not known yet
	written  int64 // bytes in the file, all hashed
	claim    int64 // bytes reserved
	pending  *blobstore.Pending
	fed      map[string]bool // readers that were given bytes
	prefix   hash.Hash       // when apart: the state after written bytes
	sums     []string        // of the first ledgerSteps; the fill's, and anybody's when apart
	body     io.ReadCloser   // when apart before the first byte: the leader's
	noLeader bool            // the leader left while asking
}

type flightState int

const (
	asking flightState = iota
	filling
	verified
	ending
	apart
	failed
	gone
)

const (
	// tailHold is how much of an object's end is held back until its digest
	// matched. Without it nobody has a complete object; it is small enough
	// not to be noticed in the time to the last byte.
	tailHold = 64 << 10
	// fillBuffer balances system calls against the time that a reader waits
	// for the next piece.
	fillBuffer = 128 << 10
)

// errStoredMeanwhile sends Open back to the store.
var errStoredMeanwhile = errors.New("stored meanwhile")

// ErrClosed: the cache is being closed.
var ErrClosed = errors.New("cache is closed")

// join returns the flight of the key with a reference for the caller, and
// whether the caller's Fetch is the one that it flies on.
func (c *Cache) join(req Request) (f *flight, leader bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.flights[req.Key]; f != nil {
		f.refs.Add(1) // it is in the table, so it has the table's reference
		return f, false, nil
	}
	if c.closed {
		return nil, false, ErrClosed
	}
	f = &flight{cache: c, key: req.Key, size: -1, fed: make(map[string]bool)}
	f.changed.L = &f.mu
	if !req.Authorised {
		f.asker = req.Reader
	}
	f.ctx, f.cancel = context.WithCancel(c.ctx)
	f.refs.Store(2)
	c.flights[req.Key] = f
	c.flying.Add(1)
	go f.run(req.Fetch, req.Check)
	return f, true, nil
}

// leaveTable ends the joining. The table's reference goes with it.
func (f *flight) leaveTable() {
	c := f.cache
	c.mu.Lock()
	if c.flights[f.key] == f {
		delete(c.flights, f.key)
	}
	c.mu.Unlock()
	f.release()
}

// release gives a reference back. The last one closes the file, and gives up
// the room unless the committer has turned it into a stored file's.
func (f *flight) release() {
	if f.refs.Add(-1) > 0 {
		return
	}
	if f.pending != nil {
		f.mu.Lock()
		unverified := len(f.fed) > 0 && f.state != verified
		f.mu.Unlock()
		// What was fed when the cache was closed is left to the next start's
		// sweep, which taints it: the taints of this process end with it.
		if !unverified || f.cache.ctx.Err() == nil {
			f.pending.Discard() // nothing to discard after a commit
		}
		f.pending.File.Close()
	}
	if f.claim > 0 {
		f.cache.unreserve(f.claim)
	}
}

// run is the life of a flight.
func (f *flight) run(fetch Fetch, check func([]byte) error) {
	c := f.cache
	defer c.flying.Done()
	// Look again: between the caller's look at the store and its joining, an
	// earlier flight may have been committed.
	if row, ok := c.index.Object(f.key.Domain, f.key.Digest); ok {
		if file, err := c.openFile(f.key.Digest, row); err == nil {
			file.Close()
			f.end(gone, nil)
			return
		}
	}
	body, info, err := fetch(f.ctx, 0, -1)
	if err == nil && info.Offset != 0 {
		body.Close()
		err = fmt.Errorf("%w: it starts at byte %d", ErrBroken, info.Offset)
	}
	if err != nil {
		f.end(failed, err)
		return
	}
	if err := f.begin(info); err != nil {
		c.noteTrouble(err)
		f.standApart(f.key.Digest.Algorithm().Hash(), body)
		return
	}
	defer body.Close()
	f.fill(body, check)
}

// begin reserves the room and opens the pending file.
func (f *flight) begin(info Info) error {
	c := f.cache
	claim := info.Size
	if claim < 0 {
		claim = unknownStep
	}
	if err := c.reserve(claim); err != nil {
		f.mu.Lock()
		f.size = info.Size
		f.mu.Unlock()
		return err
	}
	p, err := c.store.Create(f.key.Digest)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.size, f.claim = info.Size, claim
	if err != nil {
		return err
	}
	f.pending = p
	f.state = filling
	f.changed.Broadcast()
	return nil
}

var fillBuffers = sync.Pool{New: func() any { b := make([]byte, fillBuffer); return &b }}

// fill copies the body into the file and through the hash. Only fill changes
// written, size and claim while the flight is filling.
func (f *flight) fill(body io.Reader, check func([]byte) error) {
	c := f.cache
	h := f.key.Digest.Algorithm().Hash()
	buf := fillBuffers.Get().(*[]byte)
	defer fillBuffers.Put(buf)
	for {
		n, err := body.Read(*buf)
		if n > 0 {
			piece := (*buf)[:n]
			if f.size >= 0 && f.written+int64(n) > f.size {
				f.end(failed, fmt.Errorf("%w: more than the %d bytes announced", ErrBroken, f.size))
				return
			}
			if werr := f.write(piece); werr != nil {
				c.noteTrouble(werr)
				f.standApart(h, nil)
				return
			}
			f.hashed(h, f.written, piece)
			f.mu.Lock()
			f.written += int64(n)
			f.changed.Broadcast()
			f.mu.Unlock()
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			f.end(failed, fmt.Errorf("%w: after %d bytes: %w", ErrBroken, f.written, err))
			return
		}
	}
	if err := f.verify(h, check); err != nil {
		f.end(failed, err)
		return
	}
	c.noteTrouble(nil)
	f.mu.Lock()
	f.state, f.size = verified, f.written
	f.changed.Broadcast()
	f.mu.Unlock()
	f.cancel()
	c.verified <- f // with the table's reference
}

// write appends to the file, within the room that is reserved.
func (f *flight) write(piece []byte) error {
	if end := f.written + int64(len(piece)); end > f.claim {
		if err := f.cache.reserve(unknownStep); err != nil {
			return err
		}
		f.mu.Lock()
		f.claim += unknownStep
		f.mu.Unlock()
	}
	_, err := f.pending.File.WriteAt(piece, f.written)
	return err
}

func (f *flight) verify(h hash.Hash, check func([]byte) error) error {
	if f.size >= 0 && f.written < f.size {
		return fmt.Errorf("%w: %d bytes of the %d announced", ErrBroken, f.written, f.size)
	}
	if got := digest.NewDigest(f.key.Digest.Algorithm(), h); got != f.key.Digest {
		return fmt.Errorf("%w: the bytes are %s, not %s", ErrBroken, got, f.key.Digest)
	}
	if check == nil {
		return nil
	}
	var body bytes.Buffer
	if _, err := io.Copy(&body, io.NewSectionReader(f.pending.File, 0, f.written)); err != nil {
		return err
	}
	return check(body.Bytes())
}

// end is for failed and gone. The order matters: first nobody is fed any more,
// then the taints are written, then the table lets a new generation in, and
// only then do the readers hear of it: who comes back at once starts anew.
func (f *flight) end(state flightState, err error) {
	f.mu.Lock()
	f.state = ending
	fed := f.fed
	f.mu.Unlock()
	for reader := range fed {
		f.cache.taint.add(f.key, reader)
	}
	f.leaveTable()
	f.cancel()
	f.mu.Lock()
	f.state, f.err = state, err
	f.changed.Broadcast()
	f.mu.Unlock()
}

// standApart leaves the readers to streams of their own: from the state h that
// the hash has after the written bytes, or, when body is not nil, from the
// start, with that body for the leader.
func (f *flight) standApart(h hash.Hash, body io.ReadCloser) {
	f.mu.Lock()
	f.state, f.prefix, f.body = apart, h, body
	fed := slices.Collect(maps.Keys(f.fed)) // readers go on being fed
	orphan := body != nil && f.noLeader
	if orphan {
		f.body = nil
	}
	f.mu.Unlock()
	if orphan {
		body.Close()
	}
	// Who has a part of this generation and comes back for another must find
	// that the next one begins alike. Who is fed from now on sees to that
	// when it closes.
	for _, reader := range fed {
		f.cache.taint.add(f.key, reader, f.promises()...)
	}
	f.wakeAll()
	if body == nil || orphan {
		f.cancel() // a leader's stream ends the flight's context itself
	}
	f.leaveTable()
}

// promises are what a reader of a flight that stands apart may hold.
func (f *flight) promises() []promise {
	ps := make([]promise, 0, len(f.sums)+1)
	for i, sum := range f.sums {
		ps = append(ps, promise{int64(i+1) * ledgerStep, sum})
	}
	if f.written%ledgerStep != 0 {
		ps = append(ps, promise{f.written, string(f.prefix.Sum(nil))})
	}
	return ps
}

// hashed takes the next bytes into the hash, and its state at each step.
func (f *flight) hashed(h hash.Hash, at int64, piece []byte) {
	for len(piece) > 0 {
		n := min(int64(len(piece)), ledgerStep-at%ledgerStep)
		h.Write(piece[:n])
		at, piece = at+n, piece[n:]
		if at%ledgerStep == 0 {
			f.sums = append(f.sums, string(h.Sum(nil)))
		}
	}
}

func (f *flight) wakeAll() {
	f.mu.Lock()
	f.changed.Broadcast()
	f.mu.Unlock()
}

// readable is how many bytes a reader may have now, from the start. Called
// with the lock.
func (f *flight) readable() int64 {
	switch f.state {
	case verified:
		return f.written
	case filling, apart:
		return f.heldBack()
	default:
		return 0
	}
}

// heldBack is how much of the file may leave before the digest matched.
func (f *flight) heldBack() int64 {
	if f.size < 0 {
		return max(0, f.written-tailHold)
	}
	return max(0, min(f.written, f.size-tailHold))
}

// answer waits for what the fetch is told, when it asks for this reader, and
// returns a refusal or failure, or ErrAuthorise.
func (f *flight) answer(ctx context.Context, reader string) error {
	if f.asker == "" || f.asker != reader {
		return ErrAuthorise
	}
	stop := context.AfterFunc(ctx, f.wakeAll)
	defer stop()
	f.mu.Lock()
	defer f.mu.Unlock()
	for ctx.Err() == nil && (f.state == asking || f.state == ending) {
		f.changed.Wait()
	}
	switch {
	case f.state == failed:
		return f.err
	case f.state == asking || f.state == ending:
		return context.Cause(ctx)
	}
	return ErrAuthorise
}

// open waits until the flight can say what the object's size is, and returns
// the object for one reader. The caller's reference goes over to the object,
// or back.
func (f *flight) open(ctx context.Context, req Request, leader bool) (*Object, error) {
	stop := context.AfterFunc(ctx, f.wakeAll)
	defer stop()
	f.mu.Lock()
	for ctx.Err() == nil && f.undecided(req) {
		f.changed.Wait()
	}
	if leader && f.state == asking {
		f.noLeader = true // nobody will take the body if it comes to that
	}
	state, err, size, body := f.state, f.err, f.size, f.body
	undecided := f.undecided(req)
	if leader {
		f.body = nil
	} else {
		body = nil
	}
	f.mu.Unlock()

	switch {
	case undecided:
		err = context.Cause(ctx)
	case state == gone:
		err = errStoredMeanwhile
	case state == failed:
	case state == apart:
		return f.openApart(ctx, req, body)
	case req.Offset > 0 && f.cache.taint.has(f.key, req.Reader):
		err = ErrTainted
	default:
		r := &follower{flight: f, req: req}
		source := Joined
		switch {
		case leader:
			source = Fetched
		case state == verified:
			source = Hit // all of it was here already
		}
		return &Object{Size: size, Source: source, Content: r, close: r.close, interrupt: r.interrupt}, nil
	}
	f.release()
	return nil, err
}

// undecided: nothing can be answered yet. What fits into the tail is waited
// for, so that an error can still be one; so is the end of a body without a
// length when a range of it is asked for. Called with the lock.
func (f *flight) undecided(req Request) bool {
	switch f.state {
	case asking, ending:
		return true
	case filling:
		if f.size < 0 {
			return req.Offset > 0
		}
		return f.size <= tailHold
	}
	return false
}

// openApart gives the reader a stream of its own from the start, over the
// leader's body if there is one.
func (f *flight) openApart(ctx context.Context, req Request, body io.ReadCloser) (*Object, error) {
	cancel := f.cancel
	info := Info{Size: f.size}
	if body == nil {
		f.release()
		var sctx context.Context
		sctx, cancel = context.WithCancel(f.cache.ctx)
		// Until the headers are there, the caller's context ends it too.
		stop := context.AfterFunc(ctx, cancel)
		var err error
		body, info, err = req.Fetch(sctx, 0, -1)
		if !stop() && err == nil {
			body.Close()
			err = context.Cause(ctx)
		}
		if err != nil {
			cancel()
			return nil, err
		}
	} else {
		defer f.release()
	}
	s, err := newStream(f.cache, req, f.key.Digest.Algorithm().Hash(), info)
	if err != nil {
		body.Close()
		cancel()
		return nil, err
	}
	s.take(body, cancel)
	if info.Size >= 0 && info.Size <= tailHold {
		// As with a flight: what is held back altogether is verified before
		// there is an answer.
		stop := context.AfterFunc(ctx, s.interrupt)
		err := s.verifyAll()
		if !stop() && err != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			s.Close()
			return nil, err
		}
	}
	return &Object{Size: info.Size, Source: Passed, Content: s, close: s.Close, interrupt: s.interrupt}, nil
}
