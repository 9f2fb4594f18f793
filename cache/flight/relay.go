// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A range of what cannot be stored is the source's own answer to that range. To hash
// the object it would have to be read from byte 0, by each of the many requests that
// a client makes for a large one. So nothing of it is verified here, and each client
// compares the whole with the digest; ranges are refused only where wrong bytes of the
// object were given out a moment ago, see dropped.go.
//
// What does not fit is remembered for a moment, so that not each of those requests
// begins a flight, which asks for more than a small range.

const (
	// relayStep is how much is asked for at a time when nobody has said where the
	// range ends: containerd asks for all that follows, and leaves after a part, and
	// what has been asked for by then crosses the link for nothing.
	relayStep = 1 << 20
	// passFor is how long an object is believed not to fit.
	passFor = 10 * time.Second
)

// relayed tells whether a request is answered by a range of the source's, where the
// object passes through. What is to be checked is read whole.
func (r Request) relayed() bool { return r.Ranged && r.Check == nil }

// notePassing remembers that an object does not fit.
func (e *Engine) notePassing(k Key) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.passing.add(k, passFor)
}

// passes tells whether an object did not fit a moment ago, and no flight has it now.
func (e *Engine) passes(k Key) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.flights[k] == nil && e.passing.has(k) && !e.closed
}

// relay is a range of one reader's own. It may be read anywhere.
type relay struct {
	*steady
	cancel context.CancelFunc
}

// openRelay asks for the range, unless the source has answered already.
func (e *Engine) openRelay(ctx context.Context, req Request, own ownAnswer) (*Object, error) {
	if e.dropped.refuses(req.Key, req.Offset) {
		own.close()
		return nil, ErrDropped
	}
	if own.answer != nil && own.Offset != req.Offset && own.Offset > 0 {
		own.close()
		own = ownAnswer{}
	}
	if own.answer == nil {
		n := req.Length
		if n <= 0 {
			n = relayStep
		}
		var err error
		if own, err = e.askSource(ctx, req, req.Offset, n); err != nil {
			return nil, err
		}
	}
	if own.Size < 0 || !own.sound() {
		return e.openStream(ctx, req, own)
	}
	r := &relay{newSteady(own.ctx, req.Fetch, own.answer), own.cancel}
	r.step = relayStep
	return &Object{Size: own.Size, Source: Passed, Content: r, close: r.Close, interrupt: r.interrupt}, nil
}

// ownAnswer is an answer to one reader, and the context that it lives on.
type ownAnswer struct {
	*answer // nil: there is none yet
	ctx     context.Context
	cancel  context.CancelFunc
}

func (o ownAnswer) close() {
	if o.answer != nil {
		o.body.Close()
		o.cancel()
	}
}

// askSource asks the source on a reader's own behalf. The caller's context ends only
// the asking.
func (e *Engine) askSource(ctx context.Context, req Request, off, n int64) (ownAnswer, error) {
	sctx, cancel := context.WithCancel(e.ctx)
	stop := context.AfterFunc(ctx, cancel)
	body, info, err := req.Fetch(sctx, off, n)
	if errors.Is(err, ErrRange) && (off > 0 || n >= 0) {
		body, info, err = req.Fetch(sctx, 0, -1)
	}
	if !stop() && err == nil {
		body.Close()
		err = context.Cause(ctx)
	}
	if err == nil && info.Offset != off && info.Offset != 0 {
		body.Close()
		err = fmt.Errorf("%w: it starts at byte %d", ErrBroken, info.Offset)
	}
	if err != nil {
		cancel()
		return ownAnswer{}, err
	}
	return ownAnswer{&answer{Info: info, body: body}, sctx, cancel}, nil
}

func (r *relay) interrupt() { r.cancel() }

// Close ends what is asked for at once: nothing more of it is to cross the link.
func (r *relay) Close() {
	r.cancel()
	r.steady.Close()
}

// Seek implements io.Seeker.
func (r *relay) Seek(offset int64, whence int) (int64, error) {
	pos, err := seek(r.want, r.size, offset, whence)
	if err == nil {
		r.want = pos
	}
	return pos, err
}

// Read reads where the reader is: on in the answer that there is, or in another.
func (r *relay) Read(p []byte) (int, error) {
	if r.want != r.pos {
		r.moveTo(r.want)
	}
	n, err := r.steady.Read(p)
	r.want = r.pos
	return n, err
}
