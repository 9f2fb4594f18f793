// SPDX-License-Identifier: Apache-2.0

package store

import (
	"slices"
	"sync"
	"time"

	"tarn/index"
	"tarn/internal/evict"

	"github.com/opencontainers/go-digest"
)

// What is stored goes when there is no room for what is to be stored, before the
// first byte of that is written. The order is evict.Queue's; this is what has it
// agree with rows and files.
//
// Who reads a stored object holds it, and so does a flight that was committed, for
// its readers. What is held is not chosen. The choice and the removal from the
// order are one step under the order's lock, so from then on nobody can hold
// it; then the row goes, in memory, then the file. Only the committer does that, so
// it never meets a commit of the same object.

// order is the queue of what is stored, and its lock, under which nothing else
// is taken or waited for.
type order struct {
	mu    sync.Mutex
	queue *evict.Queue[digest.Digest]
	used  map[digest.Digest]time.Time // what was used since the index was told, and when
}

func newOrder() *order {
	return &order{queue: evict.New[digest.Digest](), used: make(map[digest.Digest]time.Time)}
}

// A Lease holds an object until its Release. nil holds nothing.
type Lease = *evict.Entry[digest.Digest]

// hold holds an object that is stored. nil: it is not, or goes just now.
func (s *Store) hold(d digest.Digest) Lease {
	s.order.mu.Lock()
	defer s.order.mu.Unlock()
	return s.order.queue.Hold(d)
}

// Rehold is hold for who has a lease of that digest, perhaps of an object that has
// gone, in whose place another one has come.
func (s *Store) Rehold(d digest.Digest, l Lease) Lease {
	s.order.mu.Lock()
	if l != nil && !l.Gone() {
		s.order.mu.Unlock()
		return l
	}
	now := s.order.queue.Hold(d)
	s.order.mu.Unlock()
	s.Release(l)
	return now
}

// await holds also what is not in the order yet.
func (s *Store) await(d digest.Digest) Lease {
	s.order.mu.Lock()
	defer s.order.mu.Unlock()
	return s.order.queue.Await(d)
}

// Release ends a lease. The bytes of a file that was removed meanwhile are free
// only now.
func (s *Store) Release(l Lease) {
	if l == nil {
		return
	}
	s.order.mu.Lock()
	freed := s.order.queue.Release(l)
	s.order.mu.Unlock()
	if freed > 0 {
		s.room.addUsed(-freed)
	}
}

// releaseUsed is Release for who has used the object, with a lease or without one.
func (s *Store) releaseUsed(d digest.Digest, l Lease) {
	now := time.Now()
	s.order.mu.Lock()
	s.order.queue.Use(d) // before it may go
	s.order.used[d] = now
	freed := int64(0)
	if l != nil {
		freed = s.order.queue.Release(l)
	}
	s.order.mu.Unlock()
	if freed > 0 {
		s.room.addUsed(-freed)
	}
}

// noteUses has the index know what was used since the last time. The committer calls it
// every few seconds, so that no hit waits for the index's lock.
func (s *Store) noteUses() {
	s.order.mu.Lock()
	used := s.order.used
	s.order.used = make(map[digest.Digest]time.Time)
	s.order.mu.Unlock()
	for d, when := range used {
		s.order.mu.Lock() // for each, so that hits have their turn, and the rank is that of now
		rank, ok := s.order.queue.Rank(d)
		s.order.mu.Unlock()
		if ok {
			s.noteRank(d, when, rank)
		}
	}
}

// noteRank keeps a rank for the next process.
func (s *Store) noteRank(d digest.Digest, used time.Time, r evict.Rank) {
	s.index.NoteUse(d, index.Use{Time: used, Uses: r.Uses, Priority: r.Priority, Lost: r.Lost})
}

// enter puts an object that has its row into the order, as used just now. It runs
// in the committer.
func (s *Store) enter(d digest.Digest, alloc int64, children []digest.Digest) {
	s.order.mu.Lock()
	s.order.queue.Add(d, alloc)
	s.order.queue.Lead(d, children)
	rank, _ := s.order.queue.Rank(d)
	s.order.mu.Unlock()
	s.noteRank(d, time.Now(), rank)
	if s.hooks.Entered != nil {
		s.hooks.Entered(d, children)
	}
}

// leftOver has a file without a row, which the disk did not let go, make room before
// all others.
func (s *Store) leftOver(d digest.Digest, alloc int64) {
	s.order.mu.Lock()
	defer s.order.mu.Unlock()
	s.order.queue.Add(d, alloc)
	s.order.queue.Lose(d)
}

// takenOff takes what has no file any more out of the order, where its bytes are
// not counted any more. It returns those that somebody holds, which count until he
// lets go.
func (s *Store) takenOff(d digest.Digest) (held int64) {
	s.order.mu.Lock()
	defer s.order.mu.Unlock()
	before := s.order.queue.Lingering()
	s.order.queue.Remove(d)
	return s.order.queue.Lingering() - before
}

// forget takes an object whose file is gone out of the order and off the count
// of used bytes, where alloc is what it took. What somebody holds counts until he
// lets go of it. It runs in the committer.
func (s *Store) forget(d digest.Digest, alloc int64) {
	s.order.mu.Lock()
	if _, known := s.order.queue.Rank(d); !known { // somebody may hold it all the same
		s.order.queue.Add(d, alloc)
	}
	alloc = s.order.queue.Remove(d)
	s.order.mu.Unlock()
	s.room.addUsed(-alloc)
	s.gone(d)
}

func (s *Store) gone(d digest.Digest) {
	if s.hooks.Gone != nil {
		s.hooks.Gone(d)
	}
}

// went says why an object is stored no more, of the size that its row had.
func (s *Store) went(d digest.Digest, size int64, why Why) {
	if s.opts.Went != nil {
		s.opts.Went(d, size, why)
	}
}

// IsLost tells whether nothing leads to an object any more that has before.
func (s *Store) IsLost(d digest.Digest) bool {
	s.order.mu.Lock()
	defer s.order.mu.Unlock()
	rank, _ := s.order.queue.Rank(d)
	return rank.Lost
}

// NoteTag takes what the authority says of a tag, unless it has said something
// later. What only that tag meant is the first to be evicted. It tells whether the tag
// means something else now.
func (s *Store) NoteTag(key index.TagKey, t index.Tag) (moved bool) {
	before, taken := s.index.NoteTag(key, t)
	if !taken || before == t.Digest {
		return false
	}
	s.order.mu.Lock()
	if t.Digest != "" {
		s.order.queue.Tag(t.Digest)
	}
	if before == "" {
		s.order.mu.Unlock()
		return true
	}
	s.order.queue.Untag(before)
	rank, ok := s.order.queue.Rank(before)
	s.order.mu.Unlock()
	if ok && rank.Lost {
		u, _ := s.index.Use(before)
		s.noteRank(before, u.Time, rank)
	}
	return true
}

// Prune drops what the index need not know any more.
func (s *Store) Prune(p index.Pruning) { s.untag(s.index.Prune(p)) }

// untag has the order know that tags are forgotten, with what they meant.
func (s *Store) untag(meant []digest.Digest) {
	if len(meant) > 0 && s.hooks.Untagged != nil {
		s.hooks.Untagged()
	}
	s.order.mu.Lock()
	defer s.order.mu.Unlock()
	for _, d := range meant {
		if d != "" {
			s.order.queue.Untag(d)
		}
	}
}

// restoreOrder enters what is stored, with the bytes that it takes, as it was
// ranked when it was used last.
func (s *Store) restoreOrder(stored map[digest.Digest]int64) {
	type ranked struct {
		d digest.Digest
		u index.Use
	}
	var known []ranked
	for d := range stored {
		if u, ok := s.index.Use(d); ok {
			known = append(known, ranked{d, u})
		}
	}
	slices.SortFunc(known, func(a, b ranked) int { return a.u.Time.Compare(b.u.Time) })
	q := s.order.queue // nobody else has it yet
	for _, k := range known {
		q.Restore(k.d, stored[k.d], evict.Rank{Uses: k.u.Uses, Priority: k.u.Priority})
		delete(stored, k.d)
	}
	for d, alloc := range stored {
		q.Restore(d, alloc, evict.Rank{})
	}
	s.index.Children(q.Lead)
	s.index.Tags(func(_ index.TagKey, t index.Tag) {
		if t.Digest != "" {
			q.Tag(t.Digest)
		}
	})
	for _, k := range known {
		if k.u.Lost {
			q.Lose(k.d)
		}
	}
}
