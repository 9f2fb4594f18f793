// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"time"
)

// worker brings the bytes from pos up to end. Its fields are guarded by the
// flight's lock.
type worker struct {
	start, pos, end int64 // end is math.MaxInt64 when nobody knows it
	whole           bool  // it asks without a range, and what is there comes again
	answered        bool
	cut             bool // it leaves what comes after end to another
	inOrder         bool // its bytes are read when they are next, see awaitTurn
	slow            bool // it is given up, see rate.go
	ticket          *ticket
	beside          bool        // others were at work when it began
	early           chan opened // it was asked for with the first part; nil: it is not yet
}

// opened is what a question came to.
type opened struct {
	answer *answer
	err    error
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

// bring is what a worker does: ask, unless there is an answer already, and
// bring its body into the file.
func (f *flight) bring(w *worker, a *answer) (err error) {
	switch {
	case a != nil:
	case w.early != nil:
		o := <-w.early
		a, err = o.answer, o.err
	default:
		a, err = f.question(f.ctx, w)
	}
	if err != nil {
		return err
	}
	defer a.giveUp(nil)
	defer a.body.Close()
	if err := f.fits(w, a.Info); err != nil {
		return err
	}
	f.awaitTurn(w)
	defer f.watchRate(w, a)()
	defer f.watchStall(w)()
	return f.copy(w, a.body)
}

// question asks for what a worker is to bring.
func (f *flight) question(ctx context.Context, w *worker) (*answer, error) {
	n := w.end - w.start
	if w.whole {
		n = -1
	}
	ctx, giveUp := context.WithCancelCause(ctx)
	body, info, err := w.ticket.fetch(ctx, w.start, n)
	if err != nil {
		giveUp(nil)
		return nil, err
	}
	return &answer{info, body, giveUp}, nil
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
	var p pace
	for {
		asked := time.Now()
		n, err := body.Read(*buf)
		came := time.Now()
		if n > 0 {
			if werr := f.take(w, (*buf)[:n]); werr != nil {
				return werr
			}
			f.weigh(&p, came.Sub(asked), time.Since(came))
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
		if err := f.engine.store.Reserve(f.key.Domain, unknownStep); err != nil {
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
