// SPDX-License-Identifier: Apache-2.0

// Package cache is the front: where a request becomes a stored file, a flight or a
// passage.
//
// Contract: Open gives an object's bytes, from the disk, from a flight that is
// on its way, or from one that it starts. Rights are the caller's business: an
// object that is there, stored or in flight, is only handed to a request that
// says it is Authorised, and any other is told to ask; of what is not there the
// request's own Fetch is the question.
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
	"sync"

	"tarn/cache/flight"
	"tarn/cache/store"
	"tarn/images"
	"tarn/index"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
)

// What a request is, and what comes of it, are the flights' words.
type (
	Key     = flight.Key
	Request = flight.Request
	Info    = flight.Info
	Object  = flight.Object
	Source  = flight.Source
)

const (
	Hit     = flight.Hit
	Fetched = flight.Fetched
	Joined  = flight.Joined
	Passed  = flight.Passed

	// ListedDomain is the source domain that all listed upstreams share.
	ListedDomain = index.ListedDomain
)

// The errors are the store's and the flights'.
var (
	ErrInUse     = store.ErrInUse
	ErrForeign   = store.ErrForeign
	ErrAuthorise = flight.ErrAuthorise
	ErrRefused   = flight.ErrRefused
	ErrLimited   = flight.ErrLimited
	ErrBroken    = flight.ErrBroken
	ErrRange     = flight.ErrRange
	ErrDropped   = flight.ErrDropped
	ErrClosed    = flight.ErrClosed
)

// Options of a cache are those of its store.
type Options = store.Options

// Cache is an open data directory. It is safe for concurrent use.
type Cache struct {
	store   *store.Store
	images  *images.Images
	flights *flight.Engine
	close   func() error
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
	c := &Cache{store: st, images: images.New(st, opts.Logger)}
	c.flights = flight.New(shelf{st}, left, deleted, opts.Logger)
	c.close = sync.OnceValue(func() error {
		c.flights.Close()
		return st.Close()
	})
	hooks := c.images.Hooks()
	hooks.Spare = c.flights.Spare
	// Who has bytes of it is not known: it went out while it looked unchanged, and
	// perhaps from an earlier process, which was killed.
	hooks.Changed = c.flights.Drop
	st.Start(hooks)
	return c, nil
}

// shelf is the store as flights know it.
type shelf struct{ *store.Store }

func (s shelf) Land(l flight.Landing) {
	s.Store.Land(store.Landing{
		Domain: l.Domain, Digest: l.Digest, Pending: l.Pending, Size: l.Size, Claim: l.Claim, Children: l.Children,
		Done: func(held store.Lease, claim int64) { l.Done(func() { s.Release(held) }, claim) },
	})
}

// suspect is a stored file as flights know it.
func (s shelf) suspect(d digest.Digest, f *store.File) *flight.Suspect {
	return &flight.Suspect{
		File: f.File, Size: f.Size,
		Hashed:  func(sound bool) { s.Hashed(d, f.Info, sound) },
		Release: func() { s.Release(f.Lease()) },
	}
}

// Close ends the flights, writes what is verified, and closes the index. A
// second one does nothing.
func (c *Cache) Close() error { return c.close() }

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
	return c.flights.Flies(Key{Domain: domain, Digest: d})
}

// Size is the object's, where it is stored, or as the source of a flight has
// said.
func (c *Cache) Size(k Key) (size int64, ok bool) {
	if size, ok := c.Has(k); ok {
		return size, true
	}
	return c.flights.Size(k)
}

// Flies tells whether the object is on its way.
func (c *Cache) Flies(k Key) bool { return c.flights.Flies(k) }

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
		o, err = c.flights.Open(ctx, req, s)
		switch {
		case errors.Is(err, flight.ErrLookAgain):
		case errors.Is(err, flight.ErrChanged) && !changed:
			changed = true // and now it is fetched
		default:
			return o, err
		}
	}
}

// Pass gives the reader what its own Fetch brings, and touches nothing of what is
// here: it is for who was answered, but not with a yes that opens what is stored. It
// looks like the flight of what is not.
func (c *Cache) Pass(ctx context.Context, req Request) (*Object, error) {
	return c.flights.Pass(ctx, req)
}

// openStored returns the object when it is stored, or a file that must be hashed
// again, for the flight that does, or neither. What it returns is held, so that
// it is not evicted meanwhile.
func (c *Cache) openStored(req Request) (*Object, *flight.Suspect, error) {
	f := c.store.Open(req.Domain, req.Digest)
	if f == nil && req.Domain == ListedDomain && req.Authorised {
		f = c.store.OpenStray(req.Digest)
	}
	switch {
	case f == nil:
		return nil, nil, nil
	case !f.Suspect:
		o, err := c.hit(req, f)
		return o, nil, err
	case !req.Authorised:
		f.Close()
		return nil, nil, ErrAuthorise
	}
	return nil, shelf{c.store}.suspect(req.Digest, f), nil
}

// hit is what is stored, for who may have it.
func (c *Cache) hit(req Request, f *store.File) (*Object, error) {
	var err error
	switch {
	case !req.Authorised:
		err = ErrAuthorise
	case c.flights.Refuses(req.Key, req.Offset):
		err = ErrDropped
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	if req.Offset == 0 { // the other parts of it are the same use
		f.Use()
	}
	if f.Body != nil {
		return flight.Stored(f.Size, bytes.NewReader(f.Body), f.Close), nil
	}
	return flight.Stored(f.Size, f, f.Close), nil
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
	s.Flights, s.Parked, _ = c.flights.Stats()
	return s
}
