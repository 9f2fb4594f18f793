// SPDX-License-Identifier: Apache-2.0

package store

import (
	"fmt"
	"sync/atomic"
	"time"

	"tarn/index"

	"github.com/opencontainers/go-digest"
)

const (
	// roomPatience is how long a download waits for room before it passes by: a disk
	// may take its time, and the client's is short.
	roomPatience = 2 * time.Second
	// maxRounds bounds how often room is made for one reservation: a filesystem
	// may take its time to count what was deleted as free, and must not have
	// all go for it.
	maxRounds = 3
	// slackShare of the bound is made free besides, one part in so many, so that
	// not every reservation of a full store waits for the committer.
	slackShare = 100
	maxSlack   = 64 << 20
)

// errSlow is the errNoRoom of a disk that is slow to make any.
var errSlow = fmt.Errorf("%w: the disk is slow to make any", errNoRoom)

// reserveByEvicting has the committer make room for n more bytes and claim it.
func (s *Store) reserveByEvicting(domain string, n int64) error {
	done := make(chan error, 1)
	var settled atomic.Bool // it has its answer, or nobody waits for it any more
	provide := func() {
		err := s.claimByEvicting(domain, n)
		if err != nil && s.committer.waiting() { // of what is committed, some may go
			s.commit()
			err = s.claimByEvicting(domain, n)
		}
		if settled.CompareAndSwap(false, true) {
			done <- err
		} else if err == nil {
			s.Unreserve(domain, n) // he has left
		}
	}
	patience := time.NewTimer(roomPatience)
	defer patience.Stop()
	select {
	case s.committer.calls <- provide:
	case <-patience.C:
		return errSlow
	case <-s.ctx.Done():
		return ErrClosed
	}
	select {
	case err := <-done:
		return err
	case <-patience.C:
		if settled.CompareAndSwap(false, true) {
			return errSlow
		}
		return <-done
	}
}

// claimByEvicting runs in the committer.
func (s *Store) claimByEvicting(domain string, n int64) error {
	for round := 0; ; round++ {
		short, share, err := s.tryReserve(domain, n)
		if short <= 0 || share || round == maxRounds || s.Evictable() < short {
			return err
		}
		if everr := s.evict(short + min(s.opts.MaxSize/slackShare, maxSlack)); everr != nil {
			return fmt.Errorf("%w, and nothing can be evicted: %w", err, everr)
		}
	}
}

// Evictable is how many bytes could be evicted.
func (s *Store) Evictable() int64 {
	s.order.mu.Lock()
	defer s.order.mu.Unlock()
	return s.order.queue.Free()
}

// keepBounds runs in the committer, now and then: others write to the disk, and the
// bound may be lower than it was.
func (s *Store) keepBounds() {
	short, _, err := s.tryReserve(index.ListedDomain, 0)
	switch {
	case short <= 0:
		return
	case s.Evictable() == 0:
		s.NoteTrouble(fmt.Errorf("%w: %d bytes over the bounds, and what is stored is all pinned or being read", err, short))
		return
	}
	before := s.Stats().Evicted
	if err := s.evict(short); err != nil {
		s.NoteTrouble(err)
	}
	after := s.Stats().Evicted
	if after == before {
		return
	}
	s.log.Sugar().Infow("evicted what was over the bounds", "objects", after.Objects-before.Objects, "bytes", after.Bytes-before.Bytes)
}

// Evict frees so many bytes, or all that may go.
func (s *Store) Evict(n int64) error { return s.Do(func() error { return s.evict(n) }) }

// maxRefusals is how many files in a row the disk may refuse to let go of before
// others are not tried: then it is the disk, and not the file.
const maxRefusals = 16

// evict runs in the committer. What the disk does not let go of stays stored, and is no
// reason for what comes after it to stay.
func (s *Store) evict(short int64) (refused error) {
	var stay []digest.Digest
	defer func() { s.putBack(stay) }() // only then: they would be taken again
	for short > 0 {
		s.follow() // what is held from now on does not go
		victims := s.choose(short)
		if len(victims) == 0 {
			return refused
		}
		freed, left, err := s.evictAll(victims)
		stay = append(stay, left...)
		if err != nil {
			refused = err
		}
		if freed == 0 && len(stay) >= maxRefusals {
			return refused
		}
		short -= freed
	}
	return nil
}

// putBack has what was taken to be evicted be in the order again.
func (s *Store) putBack(ds []digest.Digest) {
	s.order.mu.Lock()
	defer s.order.mu.Unlock()
	for _, d := range ds {
		s.order.queue.PutBack(d)
	}
}

func (s *Store) follow() {
	if s.hooks.Follow != nil {
		s.hooks.Follow()
	}
}

// choose takes what goes first, as many bytes, or a batch.
func (s *Store) choose(short int64) (victims []digest.Digest) {
	s.order.mu.Lock()
	defer s.order.mu.Unlock()
	q := s.order.queue
	for free := q.Free(); len(victims) < maxBatch && free-q.Free() < short; {
		d, ok := q.Take()
		if !ok {
			break
		}
		victims = append(victims, d)
	}
	return victims
}

// evictAll evicts what was taken: the row, then the file. It returns what the disk did
// not let go of, or was not tried after that, and the error. It runs in the committer.
func (s *Store) evictAll(victims []digest.Digest) (freed int64, left []digest.Digest, refused error) {
	var gone Evicted
	for i, d := range victims {
		if len(left) >= maxRefusals {
			left = append(left, victims[i:]...)
			break
		}
		was := s.index.Drop(d)
		if err := s.blobs.Remove(d); err != nil {
			refused = err
			left = append(left, d)
			s.index.Put(was...)
			continue
		}
		s.order.mu.Lock()
		gone.Bytes += s.order.queue.Evict(d)
		s.order.mu.Unlock()
		gone.Objects++
		s.doubts.unstray(d) // whoever adopts finds that it has gone
		if len(was) > 0 {
			s.went(d, was[0].Object.Size, ForRoom)
		}
		s.gone(d)
	}
	s.hot.drop(victims...) // with the rows gone, nobody brings them back
	r := &s.room
	r.mu.Lock()
	defer r.mu.Unlock()
	r.used -= gone.Bytes
	r.evicted.Objects += gone.Objects
	r.evicted.Bytes += gone.Bytes
	return gone.Bytes, left, refused
}
