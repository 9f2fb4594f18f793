// SPDX-License-Identifier: Apache-2.0

// Package evict decides which of the stored objects would be missed least.
//
// It is GDSF (Cherkasova 1998, "Greedy-Dual-Size-Frequency") with a cost that is
// what a miss costs: the bytes, and a request, which is as dear as requestCost
// bytes. An object's priority is
//
//	inflation + uses * (size + requestCost) / size
//
// as of its last use. The lowest goes, of equals the one used longest ago, and its priority becomes the inflation,
// so that what was used often long ago ages; uses count up to maxUses. What was
// reached through a manifest or a tag, and is by none any more, goes before all
// others. docs/EVICTION.md has the comparison that this was chosen by.
//
// Contract: a Queue holds keys, never the objects. It is not safe for concurrent
// use. Every operation costs O(log n), and those on a manifest that for each of
// its children.
package evict

import "container/heap"

const (
	// requestCost is what a request costs the one who waits for it and the
	// registry that counts it, in bytes: about what a link brings in a round trip.
	requestCost = 1 << 20
	// maxUses bounds how long an object that was popular lives on that.
	maxUses = 64
)

// Rank is what a Queue knows of an entry, for who keeps it across a restart.
type Rank struct {
	Uses     int
	Priority float64
}

// Queue orders entries by how much they would be missed.
type Queue[K comparable] struct {
	entries   map[K]*entry[K]
	order     order[K] // those that may go
	inflation float64
	links     map[K]*link[K]
	turn      int // of the last use
}

type entry[K comparable] struct {
	key    K
	size   int64
	rank   Rank
	turn   int
	orphan bool
	held   int
	at     int // in the order; -1: it is held
}

// link is what leads to a key, stored or not, and where it leads.
type link[K comparable] struct {
	parents  int // stored manifests that are no orphans
	tags     int
	lost     bool // parents and tags have led here, and none does any more
	children []K  // while it is stored
}

// New returns an empty Queue.
func New[K comparable]() *Queue[K] {
	return &Queue[K]{entries: make(map[K]*entry[K]), links: make(map[K]*link[K])}
}

// Len is how many entries there are.
func (q *Queue[K]) Len() int { return len(q.entries) }

// Add enters what was stored for a use, with its size on disk in bytes. An entry
// that is there already is used once more.
func (q *Queue[K]) Add(k K, size int64) {
	if q.entries[k] == nil {
		q.insert(k, size, Rank{})
	}
	q.Use(k)
}

// Restore enters what an earlier Queue had, as it was ranked there. All of them
// come before the first Add, those that were used last at the end.
func (q *Queue[K]) Restore(k K, size int64, r Rank) {
	if q.entries[k] != nil {
		return
	}
	if len(q.entries) == 0 || r.Priority < q.inflation {
		q.inflation = r.Priority // about what it was: the next victim's
	}
	q.insert(k, size, r)
}

func (q *Queue[K]) insert(k K, size int64, r Rank) {
	q.turn++
	e := &entry[K]{key: k, size: size, rank: r, turn: q.turn, orphan: q.isLost(k)}
	q.entries[k] = e
	heap.Push(&q.order, e)
}

// Rank returns the rank of an entry.
func (q *Queue[K]) Rank(k K) (r Rank, ok bool) {
	e := q.entries[k]
	if e == nil {
		return r, false
	}
	return e.rank, true
}

// Use counts a use. A key that is not there is none of its business.
func (q *Queue[K]) Use(k K) {
	e := q.entries[k]
	if e == nil {
		return
	}
	q.turn++
	e.turn = q.turn
	e.rank.Uses = min(e.rank.Uses+1, maxUses)
	e.rank.Priority = q.inflation + float64(e.rank.Uses)*weight(e.size)
	q.fix(e)
	if q.isLost(k) { // somebody knows the way all the same
		q.setLost(k, false)
	}
}

func weight(size int64) float64 { return 1 + requestCost/float64(max(size, 1)) }

func (q *Queue[K]) fix(e *entry[K]) {
	if e.at >= 0 {
		heap.Fix(&q.order, e.at)
	}
}

// Lead says that an entry is a manifest, and what it leads to.
func (q *Queue[K]) Lead(k K, children []K) {
	e := q.entries[k]
	if e == nil || len(children) == 0 {
		return
	}
	l := q.link(k)
	if l.children != nil {
		return // a digest names one list of children
	}
	l.children = children
	if !l.lost {
		q.follow(l, 1)
	}
}

// Tag says that a tag, stored or not, means the key.
func (q *Queue[K]) Tag(k K) {
	q.link(k).tags++
	q.setLost(k, false)
}

// Untag says that a tag means something else now.
func (q *Queue[K]) Untag(k K) {
	l := q.link(k)
	l.tags--
	q.lose(k, l)
}

func (q *Queue[K]) link(k K) *link[K] {
	l := q.links[k]
	if l == nil {
		l = &link[K]{}
		q.links[k] = l
	}
	return l
}

func (q *Queue[K]) isLost(k K) bool {
	l := q.links[k]
	return l != nil && l.lost
}

// lose is for a link of which a tag or a parent has gone.
func (q *Queue[K]) lose(k K, l *link[K]) {
	if l.tags > 0 || l.parents > 0 {
		return
	}
	if q.entries[k] == nil {
		delete(q.links, k)
		return
	}
	q.setLost(k, true)
}

func (q *Queue[K]) setLost(k K, lost bool) {
	l := q.links[k]
	if l.lost == lost {
		return
	}
	l.lost = lost
	if e := q.entries[k]; e != nil {
		e.orphan = lost
		q.fix(e)
	}
	if lost {
		q.follow(l, -1)
	} else {
		q.follow(l, 1)
	}
}

// follow enters a parent more, or one less, with the children.
func (q *Queue[K]) follow(l *link[K], parents int) {
	for _, child := range l.children {
		c := q.link(child)
		if c.parents += parents; parents > 0 {
			q.setLost(child, false)
		} else {
			q.lose(child, c)
		}
	}
}

// Hold keeps an entry from going until as many Releases. It tells whether there
// is one.
func (q *Queue[K]) Hold(k K) bool {
	e := q.entries[k]
	if e == nil {
		return false
	}
	if e.held++; e.at >= 0 {
		heap.Remove(&q.order, e.at)
	}
	return true
}

// Release ends a Hold. Of an entry that was removed meanwhile, it does nothing.
func (q *Queue[K]) Release(k K) {
	e := q.entries[k]
	if e == nil || e.held == 0 {
		return
	}
	if e.held--; e.held == 0 {
		heap.Push(&q.order, e)
	}
}

// Victim is the entry that would be missed least; ok is false when all are held.
func (q *Queue[K]) Victim() (k K, ok bool) {
	if len(q.order) == 0 {
		return k, false
	}
	return q.order[0].key, true
}

// Evict removes an entry to make room: what is used from now on ranks above it.
func (q *Queue[K]) Evict(k K) {
	e := q.entries[k]
	if e == nil {
		return
	}
	if !e.orphan {
		q.inflation = max(q.inflation, e.rank.Priority)
	}
	q.Remove(k)
}

// Remove forgets an entry that is gone for another reason.
func (q *Queue[K]) Remove(k K) {
	e := q.entries[k]
	if e == nil {
		return
	}
	delete(q.entries, k)
	if e.at >= 0 {
		heap.Remove(&q.order, e.at)
	}
	l := q.links[k]
	if l == nil {
		return
	}
	if !l.lost {
		q.follow(l, -1)
	}
	if l.children, l.lost = nil, false; l.tags <= 0 && l.parents <= 0 {
		delete(q.links, k)
	}
}

// order is a heap, the next victim first.
type order[K comparable] []*entry[K]

func (o order[K]) Len() int { return len(o) }

func (o order[K]) Less(i, j int) bool {
	if o[i].orphan != o[j].orphan {
		return o[i].orphan
	}
	if o[i].rank.Priority != o[j].rank.Priority {
		return o[i].rank.Priority < o[j].rank.Priority
	}
	return o[i].turn < o[j].turn
}

func (o order[K]) Swap(i, j int) {
	o[i], o[j] = o[j], o[i]
	o[i].at, o[j].at = i, j
}

func (o *order[K]) Push(x any) {
	e := x.(*entry[K])
	e.at = len(*o)
	*o = append(*o, e)
}

func (o *order[K]) Pop() any {
	last := len(*o) - 1
	e := (*o)[last]
	(*o)[last] = nil
	*o = (*o)[:last]
	e.at = -1
	return e
}
