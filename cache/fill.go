// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"tarn/cache/store"
	"tarn/internal/manifest"

	"github.com/opencontainers/go-digest"
)

// How a flight is filled. A large object is asked for in segments, over up to
// parallel answers at once, beginning where readers wait; everything that
// breaks off leaves a gap, which is asked for again. A source that does not
// serve ranges as it should is asked for the whole, once more from byte 0,
// which must then be what is in the file already. Each byte of the file is
// written once: a worker owns its segment until it lands, and what is filled
// is only compared.

const (
	// firstSegment is what is asked for before the size is known. Most objects
	// are smaller, and are whole with it.
	firstSegment = 4 << 20
	// A further segment is the parallel-th part of what is left, within these
	// bounds: few requests for a large object, and all workers busy to the
	// end. See docs/PERFORMANCE.md for the figures.
	minSegment = 4 << 20
	maxSegment = 64 << 20
	// startHere is how far into an object a reader must want to begin for
	// the flight to begin there, too.
	startHere = 64 << 10
	// askAhead is how little a worker has left when the next one may ask: the
	// answer takes a round trip or two.
	askAhead = 1 << 20
	// farAhead is how far behind the place of a worker a reader's may be
	// before another one is sent, of which there may be maxExtra besides the
	// usual ones: a client that asks for many parts at once would have as many
	// connections to the registry without tarn.
	farAhead = 4 << 20
	maxExtra = 16
	// fillBuffer balances system calls and wake-ups against the time that a
	// reader waits for the next piece.
	fillBuffer = 256 << 10

	// maxFailures in a row, without goodProgress in between, are borne.
	maxFailures  = 6
	goodProgress = 1 << 20
	// Before the next try it rests, twice as long each time, and jittered.
	firstRest = 50 * time.Millisecond
	lastRest  = 2 * time.Second
)

// filling is what fill and its workers say to each other.
type filling struct {
	work    sync.Cond // signalled when a worker has done something, or a reader wants something
	workers map[*worker]struct{}
	working sync.WaitGroup // workers and the one that notes
	whole   bool           // ranges are not to be had: one answer from byte 0
	noting  bool
	hashing bool // somebody has the hash, without the lock

	disk  error // the disk refused
	wrong error // the source sent what no further question can mend
	cause error // the source's last failure

	givenUp  int   // bodies that were too slow
	failures int   // in a row
	reached  int64 // bytes that there were at the last failure
	resting  bool
}

// worker brings the bytes from pos up to end. Its fields are guarded by the
// flight's lock.
type worker struct {
	start, pos, end int64 // end is math.MaxInt64 when nobody knows it
	whole           bool  // it asks without a range, and what is there comes again
	answered        bool
	cut             bool // it leaves what comes behind end to another
	slow            bool // it is given up, see rate.go
	ticket          *ticket
	beside          bool // others were at work when it began
}

func newWorker(t *ticket, start, end int64) *worker {
	if end < 0 {
		end = math.MaxInt64
	}
	return &worker{start: start, pos: start, end: end, ticket: t}
}

// newWhole is a worker for all of the object.
func newWhole(t *ticket, size int64) *worker {
	w := newWorker(t, 0, size)
	w.whole = true
	return w
}

// answer is a source's, with its body.
type answer struct {
	Info
	body   io.ReadCloser
	giveUp context.CancelCauseFunc // nil for one of a reader's own
}

// errDisk marks what the disk refused.
var errDisk = errors.New("disk")

// ask puts the first question. It is also whether the leader may have the
// object, so any answer but a refusal of the range is final.
func (f *flight) ask(lead Request) (*answer, error) {
	off, n := int64(0), int64(-1)
	switch {
	case f.pending != nil:
		start, end := f.filled.gap(min(lead.Offset, f.size), f.size)
		if start == end {
			start, end = f.filled.gap(0, f.size)
		}
		off, n = start, min(end-start, f.segment(f.size-f.filled.total()))
	case f.parallel > 1:
		n = firstSegment
		if lead.Offset >= startHere {
			off = lead.Offset
		}
	}
	ctx, giveUp := context.WithCancelCause(f.ctx)
	body, info, err := lead.Fetch(ctx, off, n)
	if errors.Is(err, ErrRange) && off > 0 && f.pending == nil {
		off = 0 // the object may end before it
		body, info, err = lead.Fetch(ctx, off, n)
	}
	if errors.Is(err, ErrRange) {
		off, n = 0, -1
		f.whole = true
		body, info, err = lead.Fetch(ctx, 0, -1)
	}
	if err != nil {
		giveUp(nil)
		return nil, err
	}
	if info.Offset != off && info.Offset != 0 || !info.sound() {
		body.Close()
		giveUp(nil)
		return nil, fmt.Errorf("%w: it starts at byte %d", ErrBroken, info.Offset)
	}
	if n > 0 && info.Offset == 0 && (off > 0 || info.end() > n) || info.Size < 0 {
		f.whole = true // a part was asked for, and this is not it
	}
	return &answer{info, body, giveUp}, nil
}

// segment is how much of what is left is asked for at once.
func (f *flight) segment(left int64) int64 {
	if f.parallel == 1 {
		return left
	}
	n := min(max(left/int64(f.parallel), minSegment), maxSegment)
	if f.ahead {
		n = max(left/int64(max(1, f.parallel-len(f.workers))), minSegment)
	}
	if left-n < minSegment/2 {
		return left // no crumbs
	}
	return n
}

// fill is the rest of a flight, from the first answer on.
func (f *flight) fill(first *answer) {
	if f.hash == nil {
		f.hash = f.key.Digest.Algorithm().Hash()
	}
	f.mu.Lock()
	f.workers = make(map[*worker]struct{})
	f.send(newWorker(f.tickets[0], first.Offset, first.end()), first)
	for {
		switch {
		case f.disk != nil, f.wrong != nil, f.ctx.Err() != nil:
			f.halt()
		case !f.hashing && f.hashed < f.filled.reach(f.hashed):
			f.takeOff()
			f.hashPiece()
			continue
		case f.size >= 0 && f.hashed == f.size && len(f.workers) == 0:
			f.halt()
			f.mu.Unlock()
			f.land()
			return
		case f.takeOff(), len(f.workers) > 0, f.resting:
			f.work.Wait()
			continue
		}
		break
	}
	f.halt()
	disk, wrong, cause := f.disk, f.wrong, cmp.Or(f.cause, ErrBroken)
	f.mu.Unlock()
	if f.cache.ctx.Err() != nil {
		cause = ErrClosed
	}
	switch {
	case wrong != nil:
		f.cache.noteMixed(f.key)
		f.end(failed, wrong)
	case disk != nil:
		f.cache.store.NoteTrouble(disk)
		f.standApart(f.hash, nil)
	default:
		f.park()
		f.end(failed, cause)
	}
}

// halt ends the workers and waits for them. Called with the lock, which it
// gives up meanwhile.
func (f *flight) halt() {
	f.cancel()
	f.mu.Unlock()
	f.working.Wait()
	f.mu.Lock()
}

// takeOff sends workers for what nobody brings, and notes what there is. It
// tells whether it sent anybody. Called with the lock.
func (f *flight) takeOff() (sent bool) {
	if f.noteDue() {
		f.noting = true
		filled, total := slices.Clone(f.filled), f.filled.total()
		f.working.Go(func() {
			err := f.note(f.key, filled, total, false)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.noting = false
			if err != nil {
				f.disk = fmt.Errorf("%w: %w", errDisk, err)
			}
			f.work.Broadcast()
		})
	}
	for !f.resting {
		w := f.next()
		if w == nil {
			return sent
		}
		f.send(w, nil)
		sent = true
	}
	return sent
}

// noteDue is called with the lock.
func (f *flight) noteDue() bool {
	return !f.noting && f.size > firstSegment && f.filled.total()-f.noted >= max(noteStep, f.size/maxNotes)
}

// next is the next worker's task, nil when there is none now. Called with the
// lock.
func (f *flight) next() *worker {
	t := f.ticket()
	busy := 0
	for w := range f.workers {
		if w.end-w.pos > askAhead || len(f.workers) == 1 {
			busy++
		}
	}
	if t == nil || f.whole && len(f.workers) > 0 {
		return nil
	}
	if f.size < 0 {
		return newWhole(t, f.size)
	}
	at, taken, waited := f.wanted()
	most := f.parallel
	if waited && f.parallel == f.most {
		most += maxExtra
	}
	if busy >= most || len(f.workers) > most {
		return nil
	}
	start, end := taken.gap(at, f.size)
	switch {
	case start == end:
		return nil
	case f.whole:
		return newWhole(t, f.size)
	}
	return newWorker(t, start, min(end, start+f.segment(f.size-taken.total())))
}

// wanted is where the next worker begins, and what is there or being brought:
// at the first byte that a reader waits for and that nobody brings, or not soon,
// or else at the first gap. A worker that would come by much later leaves the
// rest of its segment to the new one. Called with the lock.
func (f *flight) wanted() (at int64, taken spans, waited bool) {
	at = math.MaxInt64
	take := func() {
		taken = slices.Clone(f.filled)
		for w := range f.workers {
			taken = taken.add(w.pos, w.end)
		}
	}
	take()
	for _, pos := range f.waiting {
		if start, end := taken.gap(pos, f.size); start == pos && start < end {
			at = min(at, pos)
			continue
		}
		for w := range f.workers {
			if w.answered && w.pos+farAhead < pos && pos < w.end && pos < at && f.filled.reach(pos) == pos && f.parallel == f.most {
				at, w.end, w.cut = pos, pos, true
				take()
			}
		}
	}
	if at == math.MaxInt64 {
		return 0, taken, false
	}
	return at, taken, true
}

// ticket is somebody's who was not refused. Called with the lock.
func (f *flight) ticket() *ticket {
	var slow *ticket
	for _, t := range f.tickets {
		switch {
		case t.refused:
		case !t.slow:
			return t
		case slow == nil:
			slow = t
		}
	}
	return slow
}

// send starts a worker, with its answer if that is here already. Called with
// the lock.
func (f *flight) send(w *worker, a *answer) {
	w.beside = len(f.workers) > 0
	f.workers[w] = struct{}{}
	f.working.Go(func() {
		err := f.bring(w, a)
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.workers, w)
		f.landed(w, err)
		f.work.Broadcast()
	})
}

// landed takes how a worker ended. Called with the lock.
func (f *flight) landed(w *worker, err error) {
	switch {
	case errors.Is(err, errCut):
		return
	case err == nil:
		f.parallel = min(f.parallel+1, f.most)
		return
	case w.slow:
		w.ticket.slow, f.cause = true, err
		return
	case errors.Is(err, errDisk):
		f.disk = err
		return
	case errors.Is(err, errWrong):
		f.wrong = err
		return
	case errors.Is(err, ErrRange) && !f.whole:
		f.whole, f.cause = true, err
		return
	case errors.Is(err, ErrRefused) && (len(f.workers) > 0 || w.beside):
		// Some sources bear few connections. The next one tells.
		f.parallel, f.cause = max(1, len(f.workers)), err
		f.rest(firstRest)
		return
	case errors.Is(err, ErrRefused):
		w.ticket.refused, f.cause = true, err
		return
	}
	f.cause = err
	f.parallel = max(1, len(f.workers))
	if f.resting {
		return // those that break together are one failure
	}
	// A whole answer began at byte 0: what it brought anew cost all before it.
	if total := f.filled.total(); total-f.reached >= goodProgress && !w.whole {
		f.reached, f.failures = total, 0
	}
	if f.failures++; f.failures > maxFailures {
		for _, t := range f.tickets {
			t.refused = true // enough
		}
		return
	}
	f.rest(min(firstRest<<(f.failures-1), lastRest))
}

// rest lets nobody ask for about that long. Called with the lock.
func (f *flight) rest(about time.Duration) {
	if f.resting {
		return
	}
	f.resting = true
	f.working.Go(func() {
		select {
		case <-time.After(about/2 + rand.N(about/2)):
		case <-f.ctx.Done():
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		f.resting = false
		f.work.Broadcast()
	})
}

// bring is what a worker does: ask, unless there is an answer already, and
// bring its body into the file.
func (f *flight) bring(w *worker, a *answer) error {
	if a == nil {
		n := w.end - w.start
		if w.whole {
			n = -1
		}
		ctx, giveUp := context.WithCancelCause(f.ctx)
		body, info, err := w.ticket.fetch(ctx, w.start, n)
		if err != nil {
			giveUp(nil)
			return err
		}
		a = &answer{info, body, giveUp}
	}
	defer a.giveUp(nil)
	defer a.body.Close()
	if err := f.fits(w, a.Info); err != nil {
		return err
	}
	defer f.watchRate(w, a)()
	return f.copy(w, a.body)
}

// errCut ends a worker whose segment was shortened.
var errCut = errors.New("the rest is another's")

// errWrong marks an ErrBroken that asking again does not mend.
var errWrong = fmt.Errorf("%w", ErrBroken)

// fits tells whether an answer is what the worker is to bring, of the same
// object as the others.
func (f *flight) fits(w *worker, info Info) error {
	if !info.sound() {
		return fmt.Errorf("%w: bytes %d to %d of %d", ErrRange, info.Offset, info.end(), info.Size)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.size < 0 && info.Size >= 0 && info.Size < f.filled.end() {
		return fmt.Errorf("%w: it had %d bytes at least, and has %d now", errWrong, f.filled.end(), info.Size)
	}
	if f.size < 0 && info.Size >= 0 && info.Offset == w.start {
		// The size is known at last. What is reserved is the flight's own
		// affair, see write.
		f.size, w.end = info.Size, info.end()
	}
	if info.Size != f.size || info.Offset != w.start || w.end != math.MaxInt64 && info.end() != w.end {
		if w.whole && info.Offset == 0 {
			return fmt.Errorf("%w: it had %d bytes, and has %d now", errWrong, f.size, info.Size)
		}
		return fmt.Errorf("%w: bytes %d to %d of %d", ErrRange, info.Offset, info.end(), info.Size)
	}
	w.answered = true
	return nil
}

var fillBuffers = sync.Pool{New: func() any { b := make([]byte, fillBuffer); return &b }}

// strangersBuffers are for what registries that are not listed send: very many
// bodies that bring next to nothing must not take much memory.
var strangersBuffers = sync.Pool{New: func() any { b := make([]byte, fillBuffer/16); return &b }}

// copy brings the body into the file.
func (f *flight) copy(w *worker, body io.Reader) error {
	buffers := &fillBuffers
	if f.key.Domain != ListedDomain {
		buffers = &strangersBuffers
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := body.Read(*buf)
		if n > 0 {
			if werr := f.take(w, (*buf)[:n]); werr != nil {
				return werr
			}
		}
		switch {
		case err == io.EOF:
			return f.ended(w)
		case err != nil:
			return fmt.Errorf("%w: after %d bytes: %w", ErrBroken, w.pos, err)
		}
	}
}

// ended is for a body that ended by itself.
func (f *flight) ended(w *worker) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.size < 0 && w.pos < f.filled.end():
		return fmt.Errorf("%w: it had %d bytes at least, and has %d now", errWrong, f.filled.end(), w.pos)
	case f.size < 0:
		f.size = w.pos
		f.changed.Broadcast()
	case w.pos < w.end:
		return fmt.Errorf("%w: it ended at byte %d of %d", ErrBroken, w.pos, w.end)
	}
	return nil
}

// take writes what is new of the bytes at the worker's place, and compares what
// is not.
func (f *flight) take(w *worker, piece []byte) error {
	f.mu.Lock()
	room, cut := w.end-w.pos, w.cut
	f.mu.Unlock()
	if room < int64(len(piece)) {
		if !cut {
			return fmt.Errorf("%w: more than the %d bytes announced", errWrong, w.end)
		}
		piece = piece[:room]
	}
	for len(piece) > 0 {
		f.mu.Lock()
		known := f.filled.reach(w.pos) - w.pos
		_, end := f.filled.gap(w.pos, math.MaxInt64)
		f.mu.Unlock()
		var n int64
		if known > 0 {
			n = min(known, int64(len(piece)))
			if err := f.compare(piece[:n], w.pos); err != nil {
				return err
			}
		} else {
			n = min(end-w.pos, int64(len(piece)))
			if err := f.write(piece[:n], w.pos); err != nil {
				return fmt.Errorf("%w: %w", errDisk, err)
			}
		}
		f.took(w, piece[:n])
		piece = piece[n:]
	}
	if cut && w.pos == w.end {
		return errCut
	}
	return nil
}

// took enters what a worker has brought, and hashes it when it is next: that is
// cheaper than to read it again.
func (f *flight) took(w *worker, piece []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := w.pos
	f.filled = f.filled.add(at, at+int64(len(piece)))
	w.pos += int64(len(piece))
	if at != f.hashed || f.hashing {
		if at > f.hashed {
			f.changed.Broadcast() // who reads in the middle; others wait for the hash
		}
		f.work.Broadcast()
		return
	}
	f.hashing = true
	f.mu.Unlock()
	f.hash.Write(piece)
	f.mu.Lock()
	f.hashing = false
	f.hashed += int64(len(piece))
	f.changed.Broadcast()
	if f.filled.reach(f.hashed) > f.hashed || w.end-w.pos <= askAhead || f.noteDue() {
		f.work.Broadcast()
	}
}

// write writes within the room that is reserved. Only a single worker, of a
// body without a length, ever needs more of it.
func (f *flight) write(piece []byte, at int64) error {
	if at+int64(len(piece)) > f.claim {
		if err := f.cache.store.Reserve(f.key.Domain, unknownStep); err != nil {
			return err
		}
		f.mu.Lock()
		f.claim += unknownStep
		f.mu.Unlock()
	}
	_, err := f.pending.WriteAt(piece, at)
	return err
}

// compare holds bytes that came again to those that are there, and may have
// been given out.
func (f *flight) compare(piece []byte, at int64) error {
	there := make([]byte, len(piece))
	if _, err := f.pending.File.ReadAt(there, at); err != nil {
		return fmt.Errorf("%w: %w", errDisk, err)
	}
	if !bytes.Equal(there, piece) {
		return fmt.Errorf("%w: other bytes than before", errWrong)
	}
	return nil
}

// hashPiece takes the next bytes of the file into the hash. Called with the
// lock, which it gives up meanwhile.
func (f *flight) hashPiece() {
	buf := fillBuffers.Get().(*[]byte)
	defer fillBuffers.Put(buf)
	at := f.hashed
	piece := (*buf)[:min(int64(len(*buf)), f.filled.reach(at)-at)]
	f.hashing = true
	f.mu.Unlock()
	_, err := f.pending.File.ReadAt(piece, at)
	if err == nil {
		f.hash.Write(piece)
	}
	f.mu.Lock()
	f.hashing = false
	if err != nil {
		f.disk = fmt.Errorf("%w: %w", errDisk, err)
		return
	}
	f.hashed += int64(len(piece))
	f.changed.Broadcast()
}

// land ends a flight whose bytes are all there.
func (f *flight) land() {
	if err := f.verify(); err != nil {
		f.cache.noteMixed(f.key)
		f.end(failed, err)
		return
	}
	c := f.cache
	c.store.NoteTrouble(nil)
	f.mu.Lock()
	tickets := slices.Clone(f.tickets)
	f.mu.Unlock()
	for _, t := range tickets {
		if t.verified != nil {
			t.verified()
		}
	}
	f.mu.Lock()
	f.state = verified
	f.tickets = nil // they may hold what they have brought
	f.changed.Broadcast()
	f.mu.Unlock()
	c.store.Land(store.Landing{
		Domain: f.key.Domain, Digest: f.key.Digest, Pending: f.pending, Size: f.size, Claim: f.claim, Children: f.children, Done: f.committed,
	})
}

// committed takes over what the committer says of a flight that has landed: who holds
// the file, and what is claimed still. Nobody else looks at that before the table's
// reference is back.
func (f *flight) committed(held store.Lease, claim int64) {
	f.held, f.claim = held, claim
	f.leaveTable()
	if p := f.cache.takeParked(f.key); p != nil {
		f.cache.discard(f.key, p)
	}
}

func (f *flight) verify() error {
	if got := digest.NewDigest(f.key.Digest.Algorithm(), f.hash); got != f.key.Digest {
		return fmt.Errorf("%w: the bytes are %s, not %s", ErrBroken, got, f.key.Digest)
	}
	if f.check == nil {
		prefix := make([]byte, min(f.size, manifest.Prefix))
		if _, err := f.pending.File.ReadAt(prefix, 0); err != nil || !manifest.Looks(prefix, f.size) {
			return nil
		}
	}
	body := make([]byte, f.size)
	if _, err := f.pending.File.ReadAt(body, 0); err != nil {
		return err
	}
	f.children = manifest.Children(body) // a manifest may have been asked for as a blob
	if f.check == nil {
		return nil
	}
	return f.check(body)
}

// steady is a body from one offset to the end of the object, asked for again
// where an answer breaks off or ends. It is for what passes through.
type steady struct {
	ctx   context.Context
	fetch Fetch
	now   *answer // what is read; nil after it broke off, and before the first
	size  int64   // -1: not known
	pos   int64
	want  int64 // where the reader of a relay is
	step  int64 // how much is asked for at a time; -1: all
	whole bool  // ranges are not to be had

	failures int
	reached  int64
}

func newSteady(ctx context.Context, fetch Fetch, a *answer) *steady {
	return &steady{ctx: ctx, fetch: fetch, now: a, size: a.Size, pos: a.Offset, step: -1}
}

// move goes on at another byte, in another answer unless this one leads there and
// there is no shorter way.
func (s *steady) move(to int64) {
	if s.now != nil && (to < s.pos || s.now.Offset > 0 || s.now.End > 0) {
		s.Close()
		s.now = nil
	}
	if s.now != nil {
		if _, err := io.CopyN(io.Discard, s.now.body, to-s.pos); err != nil {
			s.Close()
			s.now = nil
		}
	}
	s.pos, s.reached = to, to
}

func (s *steady) Read(p []byte) (int, error) {
	for {
		if s.size >= 0 && s.pos >= s.size {
			return 0, io.EOF
		}
		if s.now == nil {
			if err := s.again(); err != nil {
				return 0, err
			}
		}
		n, err := s.now.body.Read(p)
		s.pos += int64(n)
		if s.size >= 0 && s.pos >= s.size {
			return n, io.EOF // however the answer ends: there is nothing more to ask for
		}
		if err == nil || err == io.EOF && s.size < 0 {
			return n, err
		}
		// Only an answer that was to end here did not fail.
		if failed := err != io.EOF || s.pos != s.now.end(); failed && !s.bear() {
			return n, err
		}
		s.Close()
		s.now = nil
		if n > 0 {
			return n, nil
		}
	}
}

// bear counts a failure, and rests; it tells whether to try again.
func (s *steady) bear() bool {
	if s.pos-s.reached >= goodProgress {
		s.reached, s.failures = s.pos, 0
	}
	if s.failures++; s.failures > maxFailures {
		return false
	}
	rest := min(firstRest<<(s.failures-1), lastRest)
	timer := time.NewTimer(rest/2 + rand.N(rest/2))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-s.ctx.Done():
		return false
	}
}

// again asks for what is missing.
func (s *steady) again() error {
	for {
		off, n := s.pos, s.step
		if s.whole {
			off, n = 0, -1
		}
		body, info, err := s.fetch(s.ctx, off, n)
		switch {
		case err == nil && (s.size >= 0 && info.Size != s.size || info.Offset != s.pos && info.Offset != 0):
			body.Close()
			return fmt.Errorf("%w: it had %d bytes, and has %d now", ErrBroken, s.size, info.Size)
		case err == nil:
			if _, err = io.CopyN(io.Discard, body, s.pos-info.Offset); err == nil {
				s.now = &answer{Info: info, body: body}
				return nil
			}
			body.Close()
		case errors.Is(err, ErrRange) && !s.whole:
			s.whole = true
			continue
		case errors.Is(err, ErrRefused), errors.Is(err, ErrRange):
			return err
		}
		if !s.bear() {
			return fmt.Errorf("%w: after %d bytes: %w", ErrBroken, s.pos, err)
		}
	}
}

func (s *steady) Close() error {
	if s.now == nil {
		return nil
	}
	return s.now.body.Close()
}
