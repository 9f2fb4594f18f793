// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"context"
	"errors"
	"hash"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"tarn/blobstore"

	"github.com/opencontainers/go-digest"
)

// A flight is one object being downloaded now, for one source domain, with any
// number of readers. One goroutine, run, decides and hashes, and has up to
// parallel workers bring parts of the object into a pending file (fill.go, worker.go);
// readers follow the file, and nobody waits for a reader. Whoever starts a
// flight may leave: it lives on the engine's context.
//
//	            fetch refused or failed
//	asking ─────────────────────────────────> ending ─> failed
//	  │  │  stored meanwhile ───────────────> ending ─> gone
//	  │  └─ no room ──────────────────────────────────> passing
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
//	filling   have every hashed byte, and what was written after them where
//	          it starts in the middle, but the last tailHold of the object
//	verified  have every byte
//	ending    wait: nobody is fed any more
//	passing   have what was hashed, then go on with a stream of its own
//	failed    have nothing more. If any of them had anything and the file is not
//	          parked, its bytes are dropped, see dropped.go.
//	gone      look at the store again
//
// A flight leaves the engine's table when it fails, passes through or is gone, and
// after its commit; from then on nobody joins it. Ranges are refused before it
// leaves the table, so nobody joins bytes of this generation to the next one's.
// A parked file is the next flight's beginning: the bytes that its readers have
// are the ones that it goes on with.
type flight struct {
	engine   *Engine
	key      Key
	ctx      context.Context // the flight's own; ends with it or with the cache
	cancel   context.CancelFunc
	refs     atomic.Int32 // the table's or the committer's one, and one for each reader
	source   string       // who is asked first
	since    time.Time    // when it began
	asker    string       // the reader whose right the fetch is to find out; "" when that is known
	ahead    bool         // see Request
	stored   bool         // its source is the stored file, see recheck.go
	answered bool         // guarded by the engine's mutex, as is the next
	resumes  bool         // it goes on with a parked file
	doubtful bool         // see Info; of the first answer, and set before it is announced
	most     int          // how many answers may be open at the source at once
	check    func([]byte) error
	children []digest.Digest // of a manifest that was checked
	held     func()          // lets go of its file under blobs/, once it has one

	// mu guards what follows. The engine's mutex is never taken under it.
	mu        sync.Mutex
	changed   sync.Cond // signalled on every change that a reader may wait for
	state     flightState
	err       error // why it failed
	partial         // the file, and what there is in it
	waiting   map[*follower]int64
	tickets   []*ticket
	parallel  int       // of most, what the source bears
	fillState           // what fill and its workers say to each other
	prefix    hash.Hash // when passing through: the state after hashed bytes
	first     *answer   // when passing through before the first byte: what the leader was answered
	noLeader  bool      // the leader left while asking
}

// ticket is a way to ask the source, with one reader's credential.
type ticket struct {
	source   string // see Request
	fetch    Fetch
	verified func() // see Request
	wrong    func() // see Request
	refused  bool
	slow     bool // what it brought was given up, see rate.go
}

type flightState int

const (
	asking flightState = iota
	filling
	verified
	ending
	passing
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

// maxFlights bounds the descriptors of what waits to be committed: a disk that
// is slower than the link must not use them up.
// What registries that are not listed send may be a part of them, one in
// strangersShare.
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
func (e *Engine) join(req Request, s *Suspect) (f *flight, leader bool, err error) {
	defer func() {
		if s != nil && !leader {
			s.close()
		}
	}()
	e.mu.Lock()
	defer e.mu.Unlock()
	f = e.flights[req.Key]
	if f != nil {
		f.refs.Add(1) // it is in the table, so it has the table's reference
		return f, false, nil
	}
	if e.closed {
		return nil, false, ErrClosed
	}
	f = &flight{engine: e, key: req.Key, source: req.Source, since: time.Now(), ahead: req.Ahead, parallel: max(1, req.Parallel), most: max(1, req.Parallel), check: req.Check, waiting: make(map[*follower]int64)}
	if e.mixed.has(req.Key) {
		f.parallel, f.most, f.whole = 1, 1, true
	}
	f.several = e.slow.has(req.Source)
	f.changed.L, f.work.L = &f.mu, &f.mu
	f.partial = newPartial()
	if p := e.parked[req.Key]; p != nil && s == nil {
		delete(e.parked, req.Key)
		f.partial, f.resumes = *p, true
	}
	if s != nil {
		f.stored, f.answered, f.size, f.filled = true, true, s.Size, spans{{0, s.Size}}
		f.hash, f.held = req.Digest.Algorithm().Hash(), s.Release
		f.pending = &blobstore.Pending{File: s.File, Digest: req.Digest} // it has a place already
	}
	if !req.Authorised {
		f.asker = req.Reader
	}
	f.tickets = []*ticket{{source: req.Source, fetch: req.Fetch, verified: req.Verified, wrong: req.Wrong}}
	f.ctx, f.cancel = context.WithCancel(e.ctx)
	f.refs.Store(2)
	e.flights[req.Key] = f
	e.flying.Add(1)
	if s != nil {
		go f.recheck(s)
	} else {
		go f.run(req)
	}
	return f, true, nil
}

// leaveTable ends the joining. The table's reference goes with it.
func (f *flight) leaveTable() {
	e := f.engine
	e.mu.Lock()
	if e.flights[f.key] == f {
		delete(e.flights, f.key)
	}
	e.mu.Unlock()
	f.release()
}

// supersede takes a flight out of the table that waits for the answer of
// another source than the request would ask: what that one is up to is nothing
// to who has the authority's yes. Should it answer first after all, it has the
// table again, see holdTable. The caller's reference is given back if so.
//
// No lock covers all of it, so the order counts. If ranges were refused after the
// table is free:
//
//	1: the flight goes on with a parked file, whose first bytes a client has
//	2: this request takes the flight out of the table
//	3: the client asks for the rest, and begins a flight with another source: what it
//	   is given may be of other bytes than those it has
//	4: ranges are refused, too late
//
// And if may were not asked again with the lock that deletes:
//
//	1: this request sees that the flight waits
//	2: the flight is answered, holds the table, and has readers
//	3: this request takes it out, and fetches the object a second time
func (f *flight) supersede(req Request) bool {
	e := f.engine
	may := func() bool { return e.flights[f.key] == f && !f.answered && f.othersAffair(req) }
	e.mu.Lock()
	yes := may()
	e.mu.Unlock()
	if !yes {
		return false
	}
	f.mu.Lock()
	given := f.given
	f.mu.Unlock()
	if given {
		e.dropped.add(f.key)
	}
	e.mu.Lock()
	if yes = may(); yes {
		delete(e.flights, f.key)
	}
	e.mu.Unlock()
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
// one and somebody waits for it, and the table is its own then. If the first to be answered did not take the
// table, or the second did not look:
//
//	1: flight A waits; a request supersedes it and begins flight B
//	2: A is answered, and its readers follow its file
//	3: B is answered: the object crosses the link twice, into two files, and who
//	   joins gets B, however much A has
func (f *flight) holdTable() bool {
	e := f.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	if other := e.flights[f.key]; f.ctx.Err() != nil || other != nil && other != f && other.answered {
		return false
	}
	e.flights[f.key] = f
	f.answered = true
	return true
}

// release gives a reference back. The last one closes the file, and gives up
// the room unless the committer has turned it into a stored file's.
func (f *flight) release() {
	if n := f.refs.Add(-1); n > 0 {
		if n == 1 {
			f.callOff()
		}
		return
	}
	if f.pending != nil {
		f.engine.store.Discard(f.key.Domain, f.pending, f.claim) // after a commit there is nothing
		f.pending.Close()
		if f.held != nil {
			f.held()
		}
		return
	}
	f.engine.store.Unreserve(f.key.Domain, f.claim)
}

// callOff ends a flight whose question nobody waits for any more, the table's reference
// being the last. Without that, clients that ask and hang up would have tarn hold more
// questions than it has clients. One that goes on with a parked file keeps it; there are
// few.
func (f *flight) callOff() {
	e := f.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	if f.answered || f.resumes || f.refs.Load() > 1 {
		return
	}
	if e.flights[f.key] == f { // else it was superseded
		delete(e.flights, f.key)
	}
	f.cancel()
}

// run is the life of a flight.
func (f *flight) run(lead Request) {
	e := f.engine
	defer e.flying.Done()
	// Look again: between the caller's look at the store and its joining, an
	// earlier flight may have been committed.
	if e.store.Stored(f.key.Domain, f.key.Digest) {
		f.dropPartial()
		f.end(gone, nil)
		return
	}
	told := int64(0)
	if f.several && lead.Size != nil {
		told = lead.Size()
	}
	a, err := f.ask(lead, told)
	if err != nil && f.early != nil {
		a, err = f.askAlone(lead, err)
	}
	if err != nil || f.whole || a.Size != told {
		f.dropEarly()
	}
	if err != nil {
		f.park()
		f.end(failed, err)
		return
	}
	if !f.holdTable() {
		f.dropEarly()
		a.body.Close()
		f.park()
		f.end(gone, nil)
		return
	}
	f.doubtful = a.Doubtful
	if err := f.begin(a.Info); err != nil {
		f.dropEarly()
		e.store.NoteTrouble(err)
		f.passThrough(f.key.Digest.Algorithm().Hash(), a)
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
	f.state = filling
	f.changed.Broadcast()
	return nil
}

func (f *flight) create(info Info) error {
	e := f.engine
	e.mu.Lock()
	flights, most := len(e.flights), maxFlights
	if f.key.Domain != ListedDomain {
		flights, most = 0, maxFlights/strangersShare
		for k := range e.flights {
			if k.Domain != ListedDomain {
				flights++
			}
		}
	}
	e.mu.Unlock()
	if flights > most {
		f.mu.Lock()
		f.size = info.Size
		f.mu.Unlock()
		return errTooMany
	}
	claim := claimFor(info.Size)
	if err := e.store.Reserve(f.key.Domain, claim); err != nil {
		f.mu.Lock()
		f.size = info.Size
		f.mu.Unlock()
		return err
	}
	p, err := e.store.Create(f.key.Digest)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.size, f.claim, f.pending = info.Size, claim, p
	return err
}

// end is for failed and gone. Four steps, and what goes wrong where one of them
// comes later than it does:
//
//	nobody is fed any more   1: end sees that nobody was given anything
//	                         2: a reader is given bytes
//	                         3: he leaves, and asks for the rest: nothing refuses it
//	ranges are refused       1: the flight leaves the table
//	                         2: a reader's range begins another, of other bytes perhaps
//	                         3: ranges are refused, too late
//	the table is free        1: a reader hears of the end, and starts anew at once
//	                         2: he joins this flight, and hears the same
//	the readers hear of it
func (f *flight) end(state flightState, err error) {
	f.mu.Lock()
	f.state = ending
	given := f.given
	f.mu.Unlock()
	if given && !f.stored { // of a stored file the committer sees to it, see drop
		f.engine.dropped.add(f.key)
	}
	f.leaveTable()
	f.cancel()
	f.mu.Lock()
	f.state, f.err = state, err
	f.changed.Broadcast()
	f.mu.Unlock()
}

// passThrough leaves the readers to streams of their own: from the state h that
// the hash has after the hashed bytes, or, when a is not nil, from the start,
// with that answer for the leader.
func (f *flight) passThrough(h hash.Hash, a *answer) {
	f.mu.Lock()
	f.state, f.prefix, f.first = passing, h, a
	orphan := a != nil && f.noLeader
	if orphan {
		f.first = nil
	}
	f.mu.Unlock()
	if orphan {
		a.body.Close()
	}
	f.engine.notePassing(f.key)
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
