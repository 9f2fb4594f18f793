// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"errors"
	"hash"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"tarn/blobstore"
	"tarn/cache/store"

	"github.com/opencontainers/go-digest"
)

// A flight is one object being downloaded now, for one source domain, with any
// number of readers. One goroutine, run, decides and hashes, and has up to
// parallel workers bring parts of the object into a pending file (fill.go);
// readers follow the file, and nobody waits for a reader. Whoever starts a
// flight may leave: it lives on the cache's context.
//
//	            fetch refused or failed
//	asking ─────────────────────────────────> ending ─> failed
//	  │  │  stored meanwhile ───────────────> ending ─> gone
//	  │  └─ no room ──────────────────────────────────> apart
//	  │ headers, room                                     ^
//	  v                                                   │
//	filling ── disk refuses a write, or room ends ────────┘
//	  │  │└─ no source left to ask: the file is parked ──> ending ─> failed
//	  │  └── long, digest or check fails ────────────────> ending ─> failed
//	  │ digest matches
//	  v
//	verified ── committer: stored, or dropped ──> out of the table
//
// What a reader may do:
//
//	asking    wait
//	filling   have every hashed byte, and what was written behind them where
//	          it starts in the middle, but the last tailHold of the object
//	verified  have every byte
//	ending    wait: nobody is fed any more
//	apart     have what was hashed, then go on with a stream of its own
//	failed    have nothing more. If any of them had anything and the file is not
//	          parked, its bytes are dropped, see dropped.go.
//	gone      look at the store again
//
// A flight leaves the cache's table when it fails, goes apart or is gone, and
// after its commit; from then on nobody joins it. Ranges are refused before it
// leaves the table, so nobody joins bytes of this generation to the next one's.
// A parked file is the next flight's beginning: the bytes that its readers have
// are the ones that it goes on with.
type flight struct {
	cache    *Cache
	key      Key
	ctx      context.Context // the flight's own; ends with it or with the cache
	cancel   context.CancelFunc
	refs     atomic.Int32 // the table's or the committer's one, and one for each reader
	source   string       // who is asked first
	asker    string       // the reader whose right the fetch is to find out; "" when that is known
	ahead    bool         // see Request
	stored   bool         // its source is the stored file, see recheck.go
	answered bool         // guarded by the cache's mutex
	doubtful bool         // see Info; of the first answer, and set before it is announced
	most     int          // how many answers may be open at the source at once
	check    func([]byte) error
	children []digest.Digest // of a manifest that was checked
	held     store.Lease     // its file under blobs/, once it has one

	// mu guards what follows. The cache's mutex is never taken under it.
	mu       sync.Mutex
	changed  sync.Cond // signalled on every change that a reader may wait for
	state    flightState
	err      error // why it failed
	partial        // the file, and what there is in it
	waiting  map[*follower]int64
	tickets  []*ticket
	parallel int       // of most, what the source bears
	filling            // what fill and its workers say to each other
	prefix   hash.Hash // when apart: the state after hashed bytes
	first    *answer   // when apart before the first byte: what the leader was answered
	noLeader bool      // the leader left while asking
}

// ticket is a way to ask the source, with one reader's credential.
type ticket struct {
	source   string // see Request
	fetch    Fetch
	verified func() // see Request
	refused  bool
	slow     bool // what it brought was given up, see rate.go
}

type flightState int

const (
	asking flightState = iota
	feeding
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
	// maxTickets bounds how many readers' credentials a flight remembers.
	maxTickets = 64
)

// errStoredMeanwhile sends Open back to the store.
var errStoredMeanwhile = errors.New("stored meanwhile")

// maxFlights bounds the descriptors of what waits to be committed: a disk that
// is slower than the link must not use them up.
// What registries that are not listed send may be a part of them, one in
// store.StrangersShare.
const maxFlights = 2048

var errTooMany = errors.New("too many objects wait for the disk")

// unknownStep is reserved at a time for a body without a length.
const unknownStep = 64 << 20

// claimFor is the room that an object of this size takes while it is pending.
func claimFor(size int64) int64 {
	switch {
	case size < 0:
		return unknownStep
	case size > tailHold && size < math.MaxInt64-journalRoom: // what it leaves has a journal
		return size + journalRoom
	}
	return size
}

// join returns the flight of the key with a reference for the caller, and
// whether the caller's Fetch is the one that it flies on.
//
// A stored file that is suspect is the source of the flight, and nothing is
// fetched.
func (c *Cache) join(req Request, s *store.File) (f *flight, leader bool, err error) {
	defer func() {
		if s != nil && !leader {
			s.Close()
		}
	}()
	c.mu.Lock()
	defer c.mu.Unlock()
	f = c.flights[req.Key]
	if f != nil {
		f.refs.Add(1) // it is in the table, so it has the table's reference
		return f, false, nil
	}
	if c.closed {
		return nil, false, ErrClosed
	}
	f = &flight{cache: c, key: req.Key, source: req.Source, ahead: req.Ahead, parallel: max(1, req.Parallel), most: max(1, req.Parallel), check: req.Check, waiting: make(map[*follower]int64)}
	if c.mixed.has(req.Key) {
		f.parallel, f.most, f.whole = 1, 1, true
	}
	f.changed.L, f.work.L = &f.mu, &f.mu
	f.partial = newPartial()
	if p := c.parked[req.Key]; p != nil && s == nil {
		delete(c.parked, req.Key)
		f.partial = *p
	}
	if s != nil {
		f.stored, f.answered, f.size, f.filled = true, true, s.Size, spans{{0, s.Size}}
		f.hash, f.held = req.Digest.Algorithm().Hash(), s.Lease()
		f.pending = &blobstore.Pending{File: s.File, Digest: req.Digest} // it has a place already
	}
	if !req.Authorised {
		f.asker = req.Reader
	}
	f.tickets = []*ticket{{source: req.Source, fetch: req.Fetch, verified: req.Verified}}
	f.ctx, f.cancel = context.WithCancel(c.ctx)
	f.refs.Store(2)
	c.flights[req.Key] = f
	c.flying.Add(1)
	if s != nil {
		go f.recheck(s)
	} else {
		go f.run(req)
	}
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

// supersede takes a flight out of the table that waits for the answer of
// another source than the request would ask: what that one is up to is nothing
// to who has the authority's yes. Should it answer first after all, it has the
// table again. The caller's reference is given back if so.
func (f *flight) supersede(req Request) bool {
	c := f.cache
	may := func() bool { return c.flights[f.key] == f && !f.answered && f.othersAffair(req) }
	c.mu.Lock()
	yes := may()
	c.mu.Unlock()
	if !yes {
		return false
	}
	// It may hold what an earlier one left. Who has bytes of that must find
	// nothing to join them to, before anybody can begin anew.
	f.mu.Lock()
	given := f.given
	f.mu.Unlock()
	if given {
		c.dropped.add(f.key)
	}
	c.mu.Lock()
	if yes = may(); yes {
		delete(c.flights, f.key)
	}
	c.mu.Unlock()
	if yes {
		f.release()
	}
	return yes
}

// othersAffair tells whether what becomes of the flight's question is nothing to
// who has the authority's own yes.
func (f *flight) othersAffair(req Request) bool {
	return f.source != req.Source || f.asker != "" && f.asker != req.Reader
}

// holdTable is for a flight that has its answer: it tells whether no other has
// one, and the table is its own then.
func (f *flight) holdTable() bool {
	c := f.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if other := c.flights[f.key]; other != nil && other != f && other.answered {
		return false
	}
	c.flights[f.key] = f
	f.answered = true
	return true
}

// release gives a reference back. The last one closes the file, and gives up
// the room unless the committer has turned it into a stored file's.
func (f *flight) release() {
	if f.refs.Add(-1) > 0 {
		return
	}
	if f.pending != nil {
		f.cache.store.Discard(f.key.Domain, f.pending, f.claim) // after a commit there is nothing
		f.pending.Close()
		f.cache.store.Release(f.held)
		return
	}
	f.cache.store.Unreserve(f.key.Domain, f.claim)
}

// run is the life of a flight.
func (f *flight) run(lead Request) {
	c := f.cache
	defer c.flying.Done()
	// Look again: between the caller's look at the store and its joining, an
	// earlier flight may have been committed.
	if c.store.Stored(f.key.Domain, f.key.Digest) {
		f.dropPartial()
		f.end(gone, nil)
		return
	}
	a, err := f.ask(lead)
	if err != nil {
		f.park()
		f.end(failed, err)
		return
	}
	if !f.holdTable() {
		a.body.Close()
		f.park()
		f.end(gone, nil)
		return
	}
	f.doubtful = a.Doubtful
	if err := f.begin(a.Info); err != nil {
		c.store.NoteTrouble(err)
		f.standApart(f.key.Digest.Algorithm().Hash(), a)
		return
	}
	f.fill(a)
}

// begin reserves the room and opens the pending file, unless there is one whose
// bytes go with this answer.
func (f *flight) begin(info Info) error {
	if f.pending != nil && info.Size != f.size {
		f.dropPartial()
	}
	if f.pending == nil {
		if err := f.create(info); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state = feeding
	f.changed.Broadcast()
	return nil
}

func (f *flight) create(info Info) error {
	c := f.cache
	c.mu.Lock()
	flights, most := len(c.flights), maxFlights
	if f.key.Domain != ListedDomain {
		flights, most = 0, maxFlights/store.StrangersShare
		for k := range c.flights {
			if k.Domain != ListedDomain {
				flights++
			}
		}
	}
	c.mu.Unlock()
	if flights > most {
		f.mu.Lock()
		f.size = info.Size
		f.mu.Unlock()
		return errTooMany
	}
	claim := claimFor(info.Size)
	if err := c.store.Reserve(f.key.Domain, claim); err != nil {
		f.mu.Lock()
		f.size = info.Size
		f.mu.Unlock()
		return err
	}
	p, err := c.store.Create(f.key.Digest)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.size, f.claim, f.pending = info.Size, claim, p
	return err
}

// end is for failed and gone. The order matters: first nobody is fed any more,
// then ranges are refused, then the table lets a new generation in, and only then
// do the readers hear of it: who comes back at once starts anew.
func (f *flight) end(state flightState, err error) {
	f.mu.Lock()
	f.state = ending
	given := f.given
	f.mu.Unlock()
	if given && !f.stored { // of a stored file the committer sees to it, see take
		f.cache.dropped.add(f.key)
	}
	f.leaveTable()
	f.cancel()
	f.mu.Lock()
	f.state, f.err = state, err
	f.changed.Broadcast()
	f.mu.Unlock()
}

// standApart leaves the readers to streams of their own: from the state h that
// the hash has after the hashed bytes, or, when a is not nil, from the start,
// with that answer for the leader.
func (f *flight) standApart(h hash.Hash, a *answer) {
	f.mu.Lock()
	f.state, f.prefix, f.first = apart, h, a
	orphan := a != nil && f.noLeader
	if orphan {
		f.first = nil
	}
	f.mu.Unlock()
	if orphan {
		a.body.Close()
	}
	f.cache.notePassing(f.key)
	f.wakeAll()
	if a == nil || orphan {
		f.cancel() // a leader's stream ends the flight's context itself
	}
	f.leaveTable()
}

func (f *flight) wakeAll() {
	f.mu.Lock()
	f.changed.Broadcast()
	f.mu.Unlock()
}

// readable is the end of the bytes that a reader may have from pos on; pos, or
// less, when that byte is not to be had. Called with the lock.
func (f *flight) readable(pos int64) int64 {
	switch f.state {
	case verified:
		return f.size
	case apart:
		return heldBack(f.hashed, f.size)
	case feeding:
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
	} else if state == feeding && req.Authorised {
		f.addTicket(req)
	}
	f.mu.Unlock()

	switch {
	case undecided:
		err = context.Cause(ctx)
	case state == gone:
		err = errStoredMeanwhile
	case state == failed:
	case state == apart:
		return f.openApart(ctx, req, first)
	case f.cache.dropped.refuses(f.key, req.Offset):
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
	f.tickets = append(f.tickets, &ticket{source: req.Source, fetch: req.Fetch, verified: req.Verified})
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
	case feeding:
		if f.size < 0 {
			return req.Offset > 0 || f.readable(0) == 0
		}
		return f.size <= tailHold || req.Offset < f.size-tailHold && f.readable(req.Offset) <= req.Offset
	}
	return false
}

// openApart gives the reader an answer of its own: of a range just that, and of all
// a stream from the start. The leader's is there already.
func (f *flight) openApart(ctx context.Context, req Request, first *answer) (*Object, error) {
	defer f.release()
	own := ownAnswer{first, f.ctx, f.cancel}
	if req.relayed() {
		return f.cache.openRelay(ctx, req, own)
	}
	return f.cache.openStream(ctx, req, own)
}

// openStream gives the reader a stream of its own, over an answer if there is one that
// begins at byte 0.
func (c *Cache) openStream(ctx context.Context, req Request, own ownAnswer) (*Object, error) {
	if own.answer != nil && own.Offset > 0 {
		own.close()
		own.answer = nil
	}
	if own.answer == nil {
		var err error
		if own, err = c.askFor(ctx, req, 0, -1); err != nil {
			return nil, err
		}
	}
	s, err := newStream(c, req, req.Digest.Algorithm().Hash(), 0, own.Size)
	if err != nil {
		own.close()
		return nil, err
	}
	s.take(newSteady(own.ctx, req.Fetch, own.answer), own.cancel)
	if size := own.Size; size >= 0 && size <= tailHold {
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
	return &Object{Size: own.Size, Source: Passed, Content: s, close: s.Close, interrupt: s.interrupt}, nil
}
