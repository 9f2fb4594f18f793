// SPDX-License-Identifier: Apache-2.0

// Package cache is the front: where a request becomes a stored file, a flight or a
// passage.
//
// Contract: Open gives an object's bytes, from the disk, from a flight that is
// on its way, or from one that it starts. Rights are the caller's business: an
// object that is there, stored or in flight, is only handed to a request that
// says it is Authorised, and otherwise the request's own Fetch is what asks.
// Objects are shared within a source domain and never across two.
//
// Failure model: the last bytes of an object leave only after its digest
// matched, so a reader of wrong bytes is cut short. When the disk or the bound
// is in the way, the object passes through: each reader has an upstream stream
// of its own, or, of a range, the source's own answer, which is not verified.
// Errors of a Fetch come back as they are.
//
// It never knows HTTP, and never asks anybody but through a Fetch. What is kept is
// package store's, which has the invariants.
package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"

	"tarn/cache/store"
	"tarn/images"
	"tarn/index"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
)

var (
	// ErrInUse, ErrForeign and ErrClosed are the store's.
	ErrInUse   = store.ErrInUse
	ErrForeign = store.ErrForeign
	ErrClosed  = store.ErrClosed
	// ErrAuthorise: the object is here, and the request has not said that it
	// may have it.
	ErrAuthorise = errors.New("the object is cached: authorise first")
	// ErrRefused is what a Fetch wraps when the refusal concerns its own
	// credential only, so that others who wait must ask for themselves.
	ErrRefused = errors.New("refused")
	// ErrLimited is what a Fetch wraps when its own credential is to wait:
	// others may ask for themselves, and it may ask again.
	ErrLimited = errors.New("limited")
	// ErrBroken: the source sent something else than what the digest names,
	// or stopped in the middle.
	ErrBroken = errors.New("broken body")
	// ErrRange is what a Fetch wraps when the source answers with neither the
	// bytes that were asked for nor the whole object.
	ErrRange = errors.New("not the range that was asked for")
	// ErrDropped: bytes of this object that somebody may have were dropped a short
	// while ago; what is wanted now must not be joined to them. See dropped.go.
	ErrDropped = errors.New("an earlier part of this object may be wrong: read it from the start")
)

// ListedDomain is the source domain that all listed upstreams share.
const ListedDomain = store.ListedDomain

// Key names an object as one source domain delivered it.
type Key struct {
	Domain string
	Digest digest.Digest
}

// Fetch opens the object at its source from byte off on, n bytes, or to the
// end when n is negative; fewer only where the object ends. A source that does
// not honour ranges may give all of it instead, and says so in Info. The
// context covers the body too. It may be called again, and by several
// goroutines at once, for as long as the flight lasts; whether it may still ask
// is its own affair.
type Fetch func(ctx context.Context, off, n int64) (io.ReadCloser, Info, error)

// Info is what a source says of a body.
type Info struct {
	Size   int64 // of the whole object in bytes, -1 when it does not say
	Offset int64 // first byte of the body
	End    int64 // byte after the body's last, 0 when that is the object's
	// From is the name of the one that sent it, for people; "" when it has none.
	From string
	// Elsewhere has the next Fetch ask another one than this body came from, and
	// tells whether there is one. nil: there is none.
	Elsewhere func() bool
	// Doubtful: nothing tells yet that what was answered is the object at all.
	Doubtful bool
}

func (i Info) end() int64 {
	if i.End > 0 {
		return i.End
	}
	return i.Size
}

// sound tells whether it is the description of a part of an object.
func (i Info) sound() bool {
	if i.Size < 0 {
		return i.Offset == 0
	}
	return 0 <= i.Offset && i.Offset <= i.end() && i.end() <= i.Size
}

// Request asks for an object.
type Request struct {
	Key
	// Reader names who reads, such as repository and credential: only the answer to
	// his own question is his, see Wait.
	Reader string
	// Source names who the Fetch asks. Several of one domain may be asked for
	// the same object; the failures of one are nothing to who asks another.
	Source string
	// Offset is the first byte that is wanted, and Length how many; 0: all that
	// follow.
	Offset, Length int64
	// Ranged: the reader asked for a part, also if that begins at byte 0. It
	// may be asking for the others at the same time.
	Ranged bool
	// Authorised: the authority has said yes to this reader.
	Authorised bool
	// Wait is for who is not Authorised. When the same Reader's question is
	// on its way, as a Fetch that has not answered yet, its answer is waited
	// for: a refusal is this request's too, and after a yes the error is
	// ErrAuthorise as ever, but the caller may know more by then.
	Wait bool
	// Fetch asks the source with this reader's credential.
	Fetch Fetch
	// Ahead has all of the object asked for as soon as its size is known: the
	// right may end before the download does, and an answer that was begun is
	// read to its end.
	Ahead bool
	// Parallel is how many answers of the source a flight may have open at
	// once; with 1 or less it asks for all bytes in one.
	Parallel int
	// Verified is called when the bytes that the Fetch may have brought are the
	// object's, before any reader has the last of them. nil means nobody wants
	// to know.
	Verified func()
	// Check looks at the verified bytes before they are stored; its error
	// fails the flight. nil checks nothing. It is for manifests, which the
	// Fetch has bounded, since it is given the whole body.
	Check func(body []byte) error
}

// Options of a cache are those of its store.
type Options = store.Options

// Cache is an open data directory. It is safe for concurrent use.
type Cache struct {
	store   *store.Store
	images  *images.Images
	log     *zap.Logger
	dropped *dropped

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

// New opens the data directory, reconciles rows and files, and starts the
// background work.
func New(opts Options) (*Cache, error) {
	if opts.Logger == nil {
		opts.Logger = zap.NewNop()
	}
	st, left, deleted, err := store.Open(opts)
	if err != nil {
		return nil, err
	}
	c := &Cache{
		store:   st,
		images:  images.New(st, opts.Logger),
		log:     opts.Logger,
		dropped: newDropped(),
		flights: make(map[Key]*flight),
		parked:  make(map[Key]*partial),
		passing: make(recent),
		mixed:   make(recent),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	for _, d := range deleted {
		c.dropped.add(Key{Digest: d})
	}
	if parked := c.restoreAll(left); parked+len(deleted)+len(left) > 0 {
		c.log.Sugar().Infow("looked at what was pending", "kept", parked, "swept", len(deleted)+len(left)-parked)
	}
	hooks := c.images.Hooks()
	hooks.Spare = c.dropParked
	// Who has bytes of it is not known: it went out while it looked unchanged, and
	// perhaps from an earlier process, which was killed.
	hooks.Changed = func(d digest.Digest) { c.dropped.add(Key{Digest: d}) }
	st.Start(hooks)
	return c, nil
}

// Close ends the flights, writes what is verified, and closes the index. A
// second one does nothing.
func (c *Cache) Close() error {
	c.mu.Lock()
	closed := c.closed
	c.closed = true
	c.mu.Unlock()
	if closed {
		return nil
	}
	c.cancel()
	c.flying.Wait()
	c.closeParked()
	c.leaveDropped()
	return c.store.Close()
}

// Store is what is kept.
func (c *Cache) Store() *store.Store { return c.store }

// Images are what is kept as people know it.
func (c *Cache) Images() *images.Images { return c.images }

// Index is where tags and memberships are noted.
func (c *Cache) Index() *index.Index { return c.store.Index() }

// Has tells whether the object is stored, and its size.
func (c *Cache) Has(k Key) (size int64, ok bool) { return c.store.Has(k.Domain, k.Digest) }

// NoteTag takes what the authority says of a tag, unless it has said something
// later.
//
// A tag that was not known, of what is neither here nor on its way, is not noted:
// nothing could be done with it, and there is no end to such tags. Whoever fetches
// what it means notes it again, as often as he likes.
func (c *Cache) NoteTag(key index.TagKey, t index.Tag) {
	if _, known := c.Index().Tag(key); !known && !c.comes(key, t.Digest) {
		return
	}
	if c.store.NoteTag(key, t) {
		c.images.TagMoved()
	}
}

// comes tells whether what a tag means is here, or on its way from its registry.
func (c *Cache) comes(tag index.TagKey, d digest.Digest) bool {
	if _, here := c.store.IsHere(d); here {
		return true
	}
	domain := ListedDomain
	if !c.store.Listed(tag.Upstream) {
		domain = tag.Upstream
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flights[Key{domain, d}] != nil
}

// Size is the object's, where it is stored, or as the source of a flight has
// said.
func (c *Cache) Size(k Key) (size int64, ok bool) {
	if size, ok := c.Has(k); ok {
		return size, true
	}
	c.mu.Lock()
	f, p := c.flights[k], c.parked[k]
	c.mu.Unlock()
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

// Source tells where an object came from.
type Source int

const (
	Hit     Source = iota // complete and verified before this request
	Fetched               // this request started the flight
	Joined                // this request joined a flight
	Passed                // not storable: a stream of its own
)

// Object is an open object. It is for one goroutine; Close it.
type Object struct {
	// Size in bytes, -1 while the source has not said.
	Size   int64
	Source Source
	// Doubtful: it is what another reader is being sent, and nothing tells yet that
	// it is the object. Who knows its size can compare that.
	Doubtful bool
	// Content reads it. It has a method Section where the kernel may send it.
	// Seeking to the end is only possible when Size is known.
	Content io.ReadSeeker

	close     func()
	interrupt func() // nil when nothing can wait
	wait      func() // nil when there is nothing to wait for
}

// Rereadable tells whether Content can be read from the start again, because it
// lies in a file.
func (o *Object) Rereadable() bool {
	_, forward := o.Content.(*stream)
	return !forward
}

// Wait returns when nothing more is coming of a flight, or after Interrupt.
func (o *Object) Wait() {
	if o.wait != nil {
		o.wait()
	}
}

// Close ends the reading. A flight goes on without its readers.
func (o *Object) Close() { o.close() }

// Interrupt ends a Read that waits for a flight, and all later ones. Any
// goroutine may call it, before Close.
func (o *Object) Interrupt() {
	if o.interrupt != nil {
		o.interrupt()
	}
}

// Open returns the object as soon as its size is known (or known to be
// unknown); one that is small enough to be held back altogether, not before it
// is verified. ctx bounds only that; reading ends with Interrupt. Errors:
// ErrAuthorise, ErrDropped, ErrBroken, the context's, and those of the Fetch.
func (c *Cache) Open(ctx context.Context, req Request) (*Object, error) {
	// Each round either ends or follows a refusal that was somebody else's.
	for changed := false; ; {
		o, s, err := c.openStored(req)
		if o != nil || err != nil {
			return o, err
		}
		if s == nil && req.relayed() && c.passes(req.Key) {
			return c.openRelay(ctx, req, ownAnswer{})
		}
		f, leader, err := c.join(req, s)
		if err != nil {
			return nil, err
		}
		if !leader && req.Authorised && f.supersede(req) {
			continue
		}
		if !leader && !req.Authorised {
			err := ErrAuthorise
			if req.Wait {
				err = f.answer(ctx, req.Reader)
			}
			f.release()
			return nil, err
		}
		o, err = f.open(ctx, req, leader)
		switch {
		case errors.Is(err, errChanged) && !changed:
			changed = true // and now it is fetched
		case errors.Is(err, errStoredMeanwhile):
			if !req.Authorised {
				return nil, ErrAuthorise
			}
		case leader || err == nil || ctx.Err() != nil || errors.Is(err, ErrDropped):
			return o, err
		case errors.Is(err, ErrRefused), errors.Is(err, ErrLimited), f.othersAffair(req):
			// It was somebody else's affair.
		default:
			return o, err
		}
	}
}

// openStored returns the object when it is stored, or a file that must be hashed
// again, for the flight that does, or neither. What it returns is held, so that
// it is not evicted meanwhile.
func (c *Cache) openStored(req Request) (*Object, *store.File, error) {
	f := c.store.Open(req.Domain, req.Digest)
	if f == nil && req.Domain == ListedDomain && req.Authorised {
		f = c.store.OpenStray(req.Digest)
	}
	switch {
	case f == nil:
		return nil, nil, nil
	case f.Body != nil:
		o, err := c.hit(req, f.Size, bytes.NewReader(f.Body), func() {})
		return o, nil, err
	case !f.Suspect:
		o, err := c.hit(req, f.Size, f, f.Close)
		return o, nil, err
	case !req.Authorised:
		f.Close()
		return nil, nil, ErrAuthorise
	}
	return nil, f, nil
}

// hit is what is stored, for who may have it.
func (c *Cache) hit(req Request, size int64, content io.ReadSeeker, close func()) (*Object, error) {
	var err error
	switch {
	case !req.Authorised:
		err = ErrAuthorise
	case c.dropped.refuses(req.Key, req.Offset):
		err = ErrDropped
	}
	if err != nil {
		close()
		return nil, err
	}
	if req.Offset == 0 { // the other parts of it are the same use
		c.store.Used(req.Digest)
	}
	return &Object{Size: size, Source: Hit, Content: content, close: close}, nil
}

// Stats are for people and metrics.
type Stats struct {
	UsedBytes    int64         `json:"usedBytes"`    // all but what is pending, the index's next growth included
	PendingBytes int64         `json:"pendingBytes"` // reserved for flights, and for what they left to go on with
	MaxBytes     int64         `json:"maxBytes"`
	Flights      int           `json:"flights"`
	Parked       int           `json:"parked"`   // downloads that broke off, and go on when they are asked for
	Adopting     int           `json:"adopting"` // files without a row, being hashed
	Evicted      store.Evicted `json:"evicted"`
	// Trouble is why the disk last refused to store something, "" when the
	// last attempt went well.
	Trouble string `json:"trouble,omitempty"`
}

// Stats returns a snapshot.
func (c *Cache) Stats() Stats {
	kept := c.store.Stats()
	s := Stats{
		UsedBytes:    kept.UsedBytes,
		PendingBytes: kept.PendingBytes,
		MaxBytes:     c.store.MaxSize(),
		Adopting:     kept.Adopting,
		Evicted:      kept.Evicted,
	}
	if kept.Trouble != nil {
		s.Trouble = kept.Trouble.Error()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Flights, s.Parked = len(c.flights), len(c.parked)
	return s
}
