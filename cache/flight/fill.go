// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"tarn/internal/manifest"

	"github.com/opencontainers/go-digest"
)

// How a flight is filled. A large object is asked for in segments, over up to
// parallel answers at once where the source is slower than the hash, beginning
// where readers wait; everything that breaks off leaves a gap, which is asked for
// again. A source that does not serve ranges as it should is asked for the whole,
// once more from byte 0, which must then be what is in the file already. Each byte of the file is
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
	// aloneSegment is minSegment where one answer at a time does.
	aloneSegment = 16 << 20
	// startHere is how far into an object a reader must want to begin for
	// the flight to begin there, too.
	startHere = 64 << 10
	// askAhead is how little a worker has left when the next one may ask: the
	// answer takes a round trip or two.
	askAhead = 2 << 20
	// farAhead is how far after the place of a worker a reader's may be
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
	// limitedRest is for who is told to wait and not how long: see upstream's limit.go.
	limitedRest = 1100 * time.Millisecond
)

// fillState is what fill and its workers say to each other.
type fillState struct {
	work    sync.Cond // signalled when a worker has done something, or a reader wants something
	workers map[*worker]struct{}
	early   []*worker          // asked for with the first part, until they are sent
	noEarly context.CancelFunc // ends their questions
	working sync.WaitGroup     // workers and the one that notes
	whole   bool               // ranges are not to be had: one answer from byte 0
	several bool               // more than one answer at once comes sooner, see weigh
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

// ask puts the first question. It is also whether the leader may have the
// object, so any answer but a refusal of the range is final. Where the
// size was told, the other parts are asked for, too.
func (f *flight) ask(lead Request, told int64) (*answer, error) {
	off, n := int64(0), int64(-1)
	switch {
	case f.pending != nil:
		start, end := f.filled.gap(min(lead.Offset, f.size), f.size)
		if start == end {
			start, end = f.filled.gap(0, f.size)
		}
		off, n = start, min(end-start, f.segment(f.size-f.filled.total(), lead.Offset == 0, 0))
	case f.parallel > 1:
		n = firstSegment
		switch {
		case lead.Offset >= startHere:
			off = lead.Offset
		case told > firstSegment && !f.engine.narrow.has(f.source):
			f.askEarly(f.parts(told)[1:])
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

// askEarly asks for further parts of an object whose size its manifest told, without
// waiting for the first answer. A first answer that tells otherwise, or none, ends them.
func (f *flight) askEarly(parts []span) {
	var ctx context.Context
	ctx, f.noEarly = context.WithCancel(f.ctx)
	for _, part := range parts {
		w := newWorker(f.tickets[0], part.start, part.end)
		w.inOrder, w.early = true, make(chan opened, 1)
		f.early = append(f.early, w)
		go func() {
			a, err := f.question(ctx, w)
			w.early <- opened{a, err}
		}()
	}
}

// askAlone puts the first question once more, without others at its side, where one of
// those was answered: some sources bear few at once, and which one they refuse is
// chance. Where all are refused, the no is about the object.
func (f *flight) askAlone(lead Request, no error) (*answer, error) {
	answered := false
	for _, w := range f.early {
		o := <-w.early
		w.early <- o
		if answered = o.err == nil; answered {
			break
		}
	}
	f.dropEarly()
	if !answered {
		return nil, no
	}
	if errors.Is(no, ErrLimited) {
		select {
		case <-time.After(limitedRest):
		case <-f.ctx.Done():
		}
	}
	if f.ctx.Err() != nil {
		return nil, no
	}
	f.whole = false
	a, err := f.ask(lead, 0)
	if err == nil {
		f.engine.narrow.add(f.source)
	}
	return a, err
}

// dropEarly ends those that no worker waits for.
func (f *flight) dropEarly() {
	if f.early == nil {
		return
	}
	f.noEarly()
	for _, w := range f.early {
		if o := <-w.early; o.err == nil {
			o.answer.body.Close()
			o.answer.giveUp(nil)
		}
	}
	f.early = nil
}

// fill is the rest of a flight, from the first answer on.
func (f *flight) fill(first *answer) {
	if f.hash == nil {
		f.hash = f.key.Digest.Algorithm().Hash()
	}
	f.mu.Lock()
	f.workers = make(map[*worker]struct{})
	f.send(newWorker(f.tickets[0], first.Offset, first.end()), first)
	for _, w := range f.early {
		f.send(w, nil)
	}
	f.early = nil
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
	if f.engine.ctx.Err() != nil {
		cause = ErrClosed
	}
	switch {
	case wrong != nil:
		f.fail(wrong)
	case disk != nil:
		f.engine.store.NoteTrouble(disk)
		f.passThrough(f.hash, nil)
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
		f.changed.Broadcast() // for who waits for its turn
	})
}

// landed takes how a worker ended. Called with the lock.
func (f *flight) landed(w *worker, err error) {
	// The first answer was a part, so a no to a question at its side is not to parts.
	beside := w.early != nil && !w.answered
	if beside && err != nil && f.ctx.Err() == nil {
		f.engine.narrow.add(f.source)
	}
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
	case errors.Is(err, ErrRange) && !f.whole && !beside:
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

// land ends a flight whose bytes are all there.
func (f *flight) land() {
	if err := f.verify(); err != nil {
		f.fail(err)
		return
	}
	e := f.engine
	e.store.NoteTrouble(nil)
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
	e.store.Land(Landing{
		Key: f.key, Pending: f.pending, Size: f.size, Claim: f.claim, Children: f.children, Done: f.committed,
	})
}

// fail ends a flight whose bytes are of no use. Where they are wrong, those who
// brought some hear of it while the table still has the flight: who is cut short and
// comes back at once finds it remembered.
func (f *flight) fail(err error) {
	if errors.Is(err, errWrong) {
		f.engine.noteMixed(f.key)
		f.mu.Lock()
		tickets := slices.Clone(f.tickets)
		f.mu.Unlock()
		for _, t := range tickets {
			if t.wrong != nil {
				t.wrong()
			}
		}
	}
	f.end(failed, err)
}

// committed takes over what the committer says of a flight that has landed: who holds
// the file, and what is claimed still. It needs no lock, since nobody else looks at that
// before leaveTable has given the table's reference back. The other way round:
//
//	1: the committer gives the table's reference back
//	2: the last reader leaves, and release gives up the whole claim of a file that is
//	   stored, and holds nothing that it could let go of
//	3: the committer says who holds the file, and nobody ever lets go of it
func (f *flight) committed(release func(), claim int64) {
	f.held, f.claim = release, claim
	f.leaveTable()
	if p := f.engine.takeParked(f.key); p != nil {
		f.engine.discard(f.key, p)
	}
}

func (f *flight) verify() error {
	if got := digest.NewDigest(f.key.Digest.Algorithm(), f.hash); got != f.key.Digest {
		return fmt.Errorf("%w: the bytes are %s, not %s", errWrong, got, f.key.Digest)
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
