// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"context"
	"slices"
)

// What a reader may have of a flight.

// readable is the end of the bytes that a reader may have from pos on; pos, or
// less, when that byte is not to be had. Called with the lock.
func (f *flight) readable(pos int64) int64 {
	switch f.state {
	case verified:
		return f.size
	case passing:
		return heldBack(f.hashed, f.size)
	case filling:
		if pos > f.hashed {
			return heldBack(f.filled.reach(pos), f.size)
		}
		// Who reads from the start is not given what was not hashed: when
		// the disk fails, all that it has is known.
		return heldBack(f.hashed, f.size)
	}
	return 0
}

// heldBack is up to where bytes of an object of this size may leave before the
// digest matched, when all up to end are there. A size of -1 is not known yet.
func heldBack(end, size int64) int64 {
	if size < 0 {
		return max(0, end-tailHold)
	}
	return max(0, min(end, size-tailHold))
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
	r := &follower{flight: f, req: req}
	f.mu.Lock()
	f.waiting[r] = req.Offset
	f.work.Broadcast()
	for ctx.Err() == nil && f.undecided(req) {
		f.changed.Wait()
	}
	delete(f.waiting, r)
	if leader && f.state == asking {
		f.noLeader = true // nobody will take the body if it comes to that
	}
	state, err, size := f.state, f.err, f.size
	undecided := f.undecided(req)
	var first *answer
	if leader {
		first, f.first = f.first, nil
	} else if state == filling && req.Authorised {
		f.addTicket(req)
	}
	f.mu.Unlock()

	switch {
	case undecided:
		err = context.Cause(ctx)
	case state == gone:
		err = ErrLookAgain
	case state == failed:
	case state == passing:
		return f.openPassing(ctx, req, first)
	case f.engine.dropped.refuses(f.key, req.Offset):
		err = ErrDropped
	default:
		source := Joined
		switch {
		case leader && !f.stored:
			source = Fetched
		case f.stored, state == verified:
			source = Hit // all of it was here already
		}
		doubtful := source == Joined && f.doubtful
		return &Object{Size: size, Source: source, Doubtful: doubtful, Content: r, close: r.close, interrupt: r.interrupt, wait: r.wait}, nil
	}
	f.release()
	return nil, err
}

// addTicket takes a reader's right along, in place of one that was refused, or
// of the first, when there are many. Called with the lock.
func (f *flight) addTicket(req Request) {
	if f.size < 0 && f.asker != "" && f.asker != req.Reader {
		// Nothing tells yet whether what the leader is being sent is the object:
		// it must not be completed with bytes that the leader may not have.
		return
	}
	if len(f.tickets) >= maxTickets {
		i := max(0, slices.IndexFunc(f.tickets, func(t *ticket) bool { return t.refused }))
		f.tickets = slices.Delete(f.tickets, i, i+1)
	}
	f.tickets = append(f.tickets, &ticket{source: req.Source, fetch: req.Fetch, verified: req.Verified, wrong: req.Wrong})
	f.work.Broadcast()
}

// undecided: nothing can be answered yet. The first byte is waited for, and all
// of what fits into the tail, so that an error can still be one; so is the end
// of a body without a length when a range of it is asked for. Called with the
// lock.
func (f *flight) undecided(req Request) bool {
	switch f.state {
	case asking, ending:
		return true
	case filling:
		if f.size < 0 {
			return req.Offset > 0 || f.readable(0) == 0
		}
		return f.size <= tailHold || req.Offset < f.size-tailHold && f.readable(req.Offset) <= req.Offset
	}
	return false
}

// openPassing gives the reader an answer of its own: of a range just that, and of all
// a stream from the start. The leader's is there already.
func (f *flight) openPassing(ctx context.Context, req Request, first *answer) (*Object, error) {
	defer f.release()
	own := ownAnswer{first, f.ctx, f.cancel}
	if req.relayed() {
		return f.engine.openRelay(ctx, req, own)
	}
	return f.engine.openStream(ctx, req, own)
}
