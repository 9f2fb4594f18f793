// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"tarn/blobstore"
)

// follower reads a flight's file while it is being filled. When the flight
// passes through, it goes on with an upstream stream of its own.
type follower struct {
	flight *flight
	req    Request

	pos  int64
	gave bool     // it was given bytes
	file *os.File // the flight's, with an offset of its own; see Section
	own  passingBody
	// Guarded by the flight's lock.
	stopped error
	opening context.CancelFunc // ends the fetch of the own stream; nil when there is none under way
}

// passingBody is what a reader goes on with when its flight passes through.
type passingBody interface {
	io.ReadSeeker
	Close()
	interrupt()
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

// wait returns when the flight has ended, or passed through.
func (r *follower) wait() {
	f := r.flight
	f.mu.Lock()
	defer f.mu.Unlock()
	for r.stopped == nil && (f.state == filling || f.state == ending) {
		f.changed.Wait()
	}
}

func (r *follower) close() {
	if r.own != nil {
		r.own.Close()
	}
	if r.file != nil {
		r.file.Close()
	}
	r.flight.release()
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
	default: // passing
		if err := r.openOwn(); err != nil {
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
// had, or the flight passes through.
func (r *follower) await(most int64) (*blobstore.Pending, int64, flightState, error) {
	f := r.flight
	f.mu.Lock()
	for r.stopped == nil && r.pos >= f.readable(r.pos) && (f.state == filling || f.state == ending) {
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
	if n > 0 {
		r.gave, f.given = true, true
	}
	if state == verified {
		r.req.Fetch, r.req.Verified, r.req.Wrong, r.req.Check = nil, nil, nil, nil // they may hold what they have brought
	}
	f.mu.Unlock()

	if n == 0 && state != verified && state != passing {
		return nil, 0, state, err
	}
	return pending, n, state, nil
}

// openOwn opens what takes over from the flight: of a range, the source's own answer
// from where the reader is, and else a stream from where the flight's hash stands.
func (r *follower) openOwn() error {
	f := r.flight
	ctx, cancel := context.WithCancel(f.engine.ctx)
	f.mu.Lock()
	r.opening = cancel
	if r.stopped != nil {
		cancel()
	}
	size := f.size
	f.mu.Unlock()
	var own passingBody
	var err error
	if r.req.relayed() && size >= 0 {
		own, err = r.openOwnRelay(ctx, cancel, size)
	} else {
		own, err = r.openOwnStream(ctx, cancel)
	}
	f.mu.Lock()
	r.opening = nil
	if err == nil {
		r.own = own
	}
	stopped := r.stopped
	f.mu.Unlock()
	switch {
	case err != nil:
		cancel()
		if r.gave && errors.Is(err, errWrong) { // what it has is, or what there is now
			f.engine.dropped.add(f.key)
		}
	case stopped != nil:
		own.interrupt()
	}
	return err
}

func (r *follower) openOwnRelay(ctx context.Context, cancel context.CancelFunc, size int64) (passingBody, error) {
	if r.flight.engine.dropped.refuses(r.req.Key, r.pos) {
		return nil, ErrDropped
	}
	return &relay{&steady{ctx: ctx, fetch: r.req.Fetch, size: size, pos: r.pos, want: r.pos, step: relayStep}, cancel}, nil
}

func (r *follower) openOwnStream(ctx context.Context, cancel context.CancelFunc) (passingBody, error) {
	f := r.flight
	h, err := cloneHash(f.prefix)
	if err != nil {
		return nil, err
	}
	body, info, err := r.req.Fetch(ctx, f.hashed, -1)
	if errors.Is(err, ErrRange) {
		body, info, err = r.req.Fetch(ctx, 0, -1)
	}
	if err != nil {
		return nil, err
	}
	a := &answer{Info: info, body: body}
	if a.Size >= 0 && f.size >= 0 && a.Size != f.size || a.Offset != 0 && a.Offset != f.hashed {
		a.body.Close()
		return nil, fmt.Errorf("%w: the source has another size now", errWrong)
	}
	a.Size = max(a.Size, f.size)
	rest := newSteady(ctx, r.req.Fetch, a)
	if a.Offset == 0 && f.hashed > 0 { // the hash has the first bytes as they were given out
		if _, err := io.CopyN(io.Discard, rest, f.hashed); err != nil {
			rest.Close()
			return nil, fmt.Errorf("%w: %w", ErrBroken, err)
		}
	}
	own, err := newStream(f.engine, r.req, h, f.hashed, a.Size)
	if err != nil {
		rest.Close()
		return nil, err
	}
	own.setBody(rest, cancel)
	if from := heldBack(f.hashed, f.size); from < f.hashed {
		// Bytes of the file that were hashed and not given out yet.
		if err := own.preload(f.pending.File, from, f.hashed-from); err != nil {
			own.Close()
			return nil, err
		}
	}
	own.gave = r.gave
	return own, nil
}

func (r *follower) readOwn(p []byte) (int, error) {
	if _, err := r.own.Seek(r.pos, io.SeekStart); err != nil {
		return 0, err
	}
	n, err := r.own.Read(p)
	r.pos += int64(n)
	return n, err
}
