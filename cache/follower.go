// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"tarn/blobstore"
)

// follower reads a flight's file while it is being filled. When the flight
// goes apart, it goes on with an upstream stream of its own.
type follower struct {
	flight *flight
	req    Request

	pos     int64
	top     int64    // end of the bytes that it was given
	file    *os.File // the flight's, with an offset of its own; see Section
	entered bool     // in the reader's ledger, since the flight stands apart
	own     *stream
	// Guarded by the flight's lock.
	stopped error
	opening context.CancelFunc // ends the fetch of the own stream; nil when there is none under way
}

var errInterrupted = errors.New("reader has left")

// interrupt makes a Read that waits, and all later ones, return.
func (r *follower) interrupt() {
	f := r.flight
	f.mu.Lock()
	r.stopped = errInterrupted
	own := r.own
	if r.opening != nil {
		r.opening()
	}
	f.changed.Broadcast()
	f.mu.Unlock()
	if own != nil {
		own.interrupt()
	}
}

// wait returns when the flight has ended, or gone apart.
func (r *follower) wait() {
	f := r.flight
	f.mu.Lock()
	defer f.mu.Unlock()
	for r.stopped == nil && (f.state == feeding || f.state == ending) {
		f.changed.Wait()
	}
}

func (r *follower) close() {
	f := r.flight
	f.mu.Lock()
	leftApart := r.top > 0 && r.own == nil && f.state == apart
	f.mu.Unlock()
	switch {
	case r.own != nil:
		r.own.Close()
	case leftApart && r.top > f.hashed:
		f.cache.taint.add(f.key, r.req.Reader)
	case leftApart:
		f.cache.taint.add(f.key, r.req.Reader, f.promises()...)
	}
	if r.file != nil {
		r.file.Close()
	}
	f.release()
}

// Seek implements io.Seeker. The end is only known when the size is.
func (r *follower) Seek(offset int64, whence int) (int64, error) {
	r.flight.mu.Lock()
	size := r.flight.size
	r.flight.mu.Unlock()
	pos, err := seek(r.pos, size, offset, whence)
	if err == nil {
		r.pos = pos
	}
	return pos, err
}

func seek(pos, size, offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
		pos = offset
	case io.SeekCurrent:
		pos += offset
	case io.SeekEnd:
		if size < 0 {
			return 0, errors.New("seek: the size is not known yet")
		}
		pos = size + offset
	}
	if pos < 0 {
		return 0, errors.New("seek: before the start")
	}
	return pos, nil
}

// Read returns bytes as soon as they may be had, io.EOF after the last one of
// a verified object, and an error that wraps ErrBroken when there will be no
// more.
func (r *follower) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.own != nil {
		return r.readOwn(p)
	}
	pending, n, state, err := r.await(int64(len(p)))
	switch {
	case err != nil:
		return 0, err
	case n > 0:
		n, err := pending.File.ReadAt(p[:n], r.pos)
		r.pos += int64(n)
		return n, err
	case state == verified:
		return 0, io.EOF
	default: // apart
		if err := r.goOwn(); err != nil {
			return 0, err
		}
		return r.readOwn(p)
	}
}

// Section returns a file that stands where the reader does, and how many of its
// bytes may be had now, at most most: for who has the kernel send them. Without
// a file they can only be had by Read. Errors are Read's.
func (r *follower) Section(most int64) (*os.File, int64, error) {
	if r.own != nil || r.file == nil && !r.reopen() {
		return nil, 0, nil
	}
	_, n, state, err := r.await(most)
	switch {
	case err != nil:
		return nil, 0, err
	case n == 0 && state == verified:
		return nil, 0, io.EOF
	case n == 0:
		return nil, 0, nil
	}
	if _, err := r.file.Seek(r.pos, io.SeekStart); err != nil {
		return nil, 0, err
	}
	r.pos += n // it has them, or reads no further
	return r.file, n, nil
}

func (r *follower) reopen() bool {
	f := r.flight
	f.mu.Lock()
	pending := f.pending
	f.mu.Unlock()
	if pending == nil {
		return false
	}
	file, err := pending.Reopen()
	if err == nil {
		r.file = file
	}
	return err == nil
}

// await waits for bytes at the reader's place, and returns how many of them may
// be had, at most most. When there are none, all of a verified object has been
// had, or the flight stands apart.
func (r *follower) await(most int64) (*blobstore.Pending, int64, flightState, error) {
	f := r.flight
	f.mu.Lock()
	for r.stopped == nil && r.pos >= f.readable(r.pos) && (f.state == feeding || f.state == ending) {
		if f.waiting[r] != r.pos {
			f.waiting[r] = r.pos
			f.work.Broadcast()
		}
		f.changed.Wait()
	}
	delete(f.waiting, r)
	n := max(0, min(most, f.readable(r.pos)-r.pos))
	state, err, pending := f.state, f.err, f.pending
	if r.stopped != nil {
		n, err, state = 0, r.stopped, failed
	}
	if n > 0 && state != apart { // apart, it is entered below
		r.top = max(r.top, r.pos+n)
		f.fed[r.req.Reader] = max(f.fed[r.req.Reader], r.top)
	}
	f.mu.Unlock()

	switch {
	case n > 0 && state == apart:
		if err := r.enter(); err != nil {
			return nil, 0, state, err
		}
		r.top = max(r.top, r.pos+n)
	case n == 0 && state != verified && state != apart:
		return nil, 0, state, err
	}
	return pending, n, state, nil
}

// enter writes what the flight gives into the reader's ledger before more of it
// leaves: others of its streams must go with it. What stands for itself is
// entered when it ends.
func (r *follower) enter() error {
	if r.entered {
		return nil
	}
	r.entered = true
	if !r.req.Ranged && r.req.Offset == 0 {
		return nil
	}
	f := r.flight
	l := f.cache.taint.open(f.key, r.req.Reader)
	if l == nil {
		return ErrTainted
	}
	defer l.leave()
	for _, p := range f.promises() {
		if !l.agree(p) {
			return fmt.Errorf("%w: it is not what this reader was given before", ErrBroken)
		}
	}
	return nil
}

// goOwn opens the stream that takes over where the flight's hash stands.
func (r *follower) goOwn() error {
	f := r.flight
	if r.req.Ranged && f.cache.taint.spoiled(f.key, r.req.Reader) {
		// Another range of this reader's had what nobody can compare with.
		return ErrTainted
	}
	h, err := cloneHash(f.prefix)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(f.cache.ctx)
	f.mu.Lock()
	r.opening = cancel
	if r.stopped != nil {
		cancel()
	}
	f.mu.Unlock()
	body, info, err := r.req.Fetch(ctx, f.hashed, -1)
	if errors.Is(err, ErrRange) {
		body, info, err = r.req.Fetch(ctx, 0, -1)
	}
	f.mu.Lock()
	r.opening = nil
	f.mu.Unlock()
	if err != nil {
		cancel()
		r.taint()
		return err
	}
	if info.Size >= 0 && f.size >= 0 && info.Size != f.size || info.Offset != 0 && info.Offset != f.hashed {
		body.Close()
		cancel()
		r.taint()
		return fmt.Errorf("%w: the source has another size now", ErrBroken)
	}
	info.Size = max(info.Size, f.size)
	if info.Offset == 0 && f.hashed > 0 {
		h = f.key.Digest.Algorithm().Hash()
	}
	own, err := newStream(f.cache, r.req, h, info)
	if err != nil {
		body.Close()
		cancel()
		r.taint()
		return err
	}
	own.take(newSteady(ctx, r.req.Fetch, &answer{info, body}), cancel)
	// From byte 0 it is the first bytes again: they must be the same.
	for _, p := range f.promises() {
		if !own.promised(p) {
			own.gave, own.wrong = r.top > 0, true
			own.Close()
			return fmt.Errorf("%w: it is not what this reader was given before", ErrBroken)
		}
	}
	if from := f.heldBack(f.hashed); info.Offset > 0 && from < f.hashed {
		// Bytes of the file that were hashed and not given out yet.
		if err := own.preload(f.pending.File, from, f.hashed-from); err != nil {
			own.gave = r.top > 0
			own.Close()
			return err
		}
	}
	own.gave = r.top > 0
	f.mu.Lock()
	r.own = own
	stopped := r.stopped
	f.mu.Unlock()
	if stopped != nil {
		own.interrupt()
	}
	return nil
}

// taint marks the reader: what it has of the flight will not be completed by
// this one.
func (r *follower) taint() {
	if r.top > 0 {
		r.flight.cache.taint.add(r.flight.key, r.req.Reader)
	}
}

func (r *follower) readOwn(p []byte) (int, error) {
	if _, err := r.own.Seek(r.pos, io.SeekStart); err != nil {
		return 0, err
	}
	n, err := r.own.Read(p)
	r.pos += int64(n)
	return n, err
}
