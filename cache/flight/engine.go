// SPDX-License-Identifier: Apache-2.0

// Package flight is the downloads: one object each, on its way from a source into a
// pending file, with any number of readers.
//
// Contract: who asks for an object that is on its way joins its flight, if the
// authority has said yes to him, and is told to ask it otherwise; of what is not on
// its way his own Fetch is the question. Nobody waits for a reader, and a flight that
// was answered goes on without them. What breaks off is parked, with its journal, and
// the next flight of the same object goes on with it, in the next process, too. What
// there is no room for passes through: each reader has an answer of the source's own.
//
// Failure model: the last bytes of an object leave only after its digest matched. A
// flight whose bytes are wrong fails, and for a minute nobody is given a range of
// that object that could be joined to what it gave out, see dropped.go. A disk that
// refuses has the readers go on with streams of their own. Errors of a Fetch come
// back as they are.
//
// It never knows what is stored but through a Store, and never asks anybody but
// through a Fetch.
package flight

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"tarn/blobstore"
	"tarn/index"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
)

// Store is what flights need of what is kept.
type Store interface {
	// Reserve claims room for n more bytes of a pending file before any of them is
	// written, and makes it where there is none; ReserveFree does not. Unreserve
	// gives a claim back.
	Reserve(domain string, n int64) error
	ReserveFree(domain string, n int64) error
	Unreserve(domain string, n int64)
	// Create opens a pending file, Discard deletes one and gives back its claim, and
	// DiscardLeft deletes one of an earlier process.
	Create(d digest.Digest) (*blobstore.Pending, error)
	Discard(domain string, p *blobstore.Pending, claim int64)
	DiscardLeft(domain string, p *blobstore.Pending)
	// Stored tells whether the domain possesses the object.
	Stored(domain string, d digest.Digest) bool
	// Land takes a file that is complete and verified.
	Land(Landing)
	// NoteTrouble is told whether the disk takes what is written.
	NoteTrouble(error)
}

// A Landing is a pending file that is complete and verified.
type Landing struct {
	Key
	Pending     *blobstore.Pending
	Size, Claim int64
	// Children are what a manifest leads to.
	Children []digest.Digest
	// Done is called once, when the object is stored or dropped: either way its
	// readers keep the open file. release is called when the last of them has gone;
	// claim is what is claimed for the file still.
	Done func(release func(), claim int64)
}

// A Suspect is a stored file that is to be hashed before its last bytes leave.
type Suspect struct {
	File *os.File
	Size int64
	// Hashed says what came out, and returns when that was taken in.
	Hashed func(sound bool)
	// Release lets go of what is stored, once the file is closed.
	Release func()
}

func (s *Suspect) close() {
	s.File.Close()
	s.Release()
}

const strangersShare = index.StrangersShare

// Engine has the flights. It is safe for concurrent use.
type Engine struct {
	store   Store
	log     *zap.Logger
	dropped *dropped
	slow    sources // that several answers come sooner from than one
	narrow  sources // that bear few questions at once

	ctx    context.Context // ends with Close: flights live on it, not on a request's
	cancel context.CancelFunc
	flying sync.WaitGroup

	// mu guards what follows. It is taken after no other lock, and a
	// flight's lock never inside it.
	mu      sync.Mutex
	closed  bool
	flights map[Key]*flight
	parked  map[Key]*partial // files that a flight left, for the next one
	passing recent           // what does not fit
	mixed   recent           // what came together wrong
}

// New goes on with what an earlier process left: pending files, and the digests of
// those that could not be gone on with.
func New(st Store, left []*blobstore.Pending, deleted []digest.Digest, log *zap.Logger) *Engine {
	e := &Engine{
		store:   st,
		log:     log,
		dropped: newDropped(),
		slow:    sources{recent: make(recent)},
		narrow:  sources{recent: make(recent)},
		flights: make(map[Key]*flight),
		parked:  make(map[Key]*partial),
		passing: make(recent),
		mixed:   make(recent),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	for _, d := range deleted {
		e.dropped.add(Key{Digest: d})
	}
	if parked := e.restoreAll(left); len(deleted)+len(left) > 0 {
		e.log.Sugar().Infow("looked at what was pending", "kept", parked, "swept", len(deleted)+len(left)-parked)
	}
	return e
}

// Close ends the flights, and leaves what they have to the next process. It returns
// when all that is verified has been handed to the Store.
func (e *Engine) Close() {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	e.cancel()
	e.flying.Wait()
	e.closeParked()
	e.leaveDropped()
}

// Open returns the object as soon as its size is known (or known to be
// unknown); one that is small enough to be held back altogether, not before it
// is verified. A Suspect is the source, and nothing is fetched; it is the engine's from
// then on. ctx bounds only that; reading ends with Interrupt. Errors: ErrAuthorise,
// ErrDropped, ErrBroken, ErrChanged, ErrClosed, ErrLookAgain, the context's, and those of
// the Fetch.
func (e *Engine) Open(ctx context.Context, req Request, s *Suspect) (*Object, error) {
	if s == nil && req.relayed() && e.passes(req.Key) {
		return e.openRelay(ctx, req, ownAnswer{})
	}
	f, leader, err := e.join(req, s)
	switch {
	case err != nil:
		return nil, err
	case !leader && req.Authorised && f.supersede(req):
		return nil, ErrLookAgain
	case !leader && !req.Authorised:
		err := ErrAuthorise
		if req.Wait {
			err = f.answer(ctx, req.Reader)
		}
		f.release()
		return nil, err
	}
	o, err := f.open(ctx, req, leader)
	switch {
	case errors.Is(err, ErrLookAgain) && !req.Authorised:
		return nil, ErrAuthorise
	case leader, err == nil, ctx.Err() != nil, errors.Is(err, ErrDropped), errors.Is(err, ErrChanged):
		return o, err
	case errors.Is(err, ErrRefused), errors.Is(err, ErrLimited), f.othersAffair(req):
		return nil, ErrLookAgain
	}
	return o, err
}

// Size is that of an object on its way, as its source has said.
func (e *Engine) Size(k Key) (size int64, ok bool) {
	e.mu.Lock()
	f, p := e.flights[k], e.parked[k]
	e.mu.Unlock()
	switch {
	case p != nil:
		return p.size, true
	case f == nil:
		return 0, false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.size, f.size >= 0
}

// Flies tells whether an object is on its way.
func (e *Engine) Flies(k Key) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.flights[k] != nil
}

// Drop has ranges of an object refused for a minute, in whatever domain: bytes that
// somebody may have were found to be wrong.
func (e *Engine) Drop(d digest.Digest) { e.dropped.add(Key{Digest: d}) }

// Refuses tells whether a request wants a range that must not be joined to bytes
// that were dropped.
func (e *Engine) Refuses(k Key, offset int64) bool { return e.dropped.refuses(k, offset) }

// Waiting is how many readers wait for something of an object on its way.
func (e *Engine) Waiting(k Key) int {
	e.mu.Lock()
	f := e.flights[k]
	e.mu.Unlock()
	if f == nil {
		return 0
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.waiting)
}

// Closing is closed when the engine ends its flights.
func (e *Engine) Closing() <-chan struct{} { return e.ctx.Done() }

// Progress is how far the download of an object has come.
type Progress struct {
	Key
	// Source is who was asked first, as in Request; "" for a file that is parked.
	Source string
	// Here is how many of its bytes are in the file, and Size how many it has, -1
	// while the source has not said.
	Here, Size int64
	// Readers are those that read it now.
	Readers int
	// Since is when the flight began, or when the file was parked.
	Since time.Time
	// Parked: nobody brings it any more, and the next who asks goes on with it.
	Parked bool
}

// Progress is that of all that is on its way or parked, but for stored files that are
// read again, in no order. A flight may have ended by the time that its own lock is
// taken, which is never inside the engine's; then it is as it ended.
func (e *Engine) Progress() (all []Progress) {
	e.mu.Lock()
	flights := make([]*flight, 0, len(e.flights))
	for _, f := range e.flights {
		flights = append(flights, f)
	}
	for k, p := range e.parked {
		all = append(all, Progress{Key: k, Here: p.filled.total(), Size: p.size, Since: p.parked, Parked: true})
	}
	e.mu.Unlock()
	for _, f := range flights {
		if f.stored {
			continue
		}
		p := Progress{Key: f.key, Source: f.source, Readers: max(0, int(f.refs.Load())-1), Since: f.since}
		f.mu.Lock()
		p.Here, p.Size = f.filled.total(), f.size
		f.mu.Unlock()
		all = append(all, p)
	}
	return all
}

// Stats are how many flights there are, how many files are parked, and what is
// claimed for those, in bytes.
func (e *Engine) Stats() (flights, parked int, claimed int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, p := range e.parked {
		claimed += p.claim
	}
	return len(e.flights), len(e.parked), claimed
}
