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
	// maxLinks bounds the memory for what manifests say that they lead to: some
	// 40 MiB. A node has a dozen for each image. What comes after so many is
	// followed by none.
	maxLinks = 1 << 18
)

// Rank is what a Queue knows of an entry, for who keeps it across a restart.
type Rank struct {
	Uses     int
	Priority float64
	Lost     bool // nothing leads to it any more
}

// Queue orders entries by how much they would be missed.
type Queue[K comparable] struct {
	entries   map[K]*Entry[K]
	awaited   map[K]*Entry[K] // held, and not entered yet
	order     order[K]        // those that may go
	inflation float64
	links     map[K]*link[K]
	leading   int // number of all children
	turn      int // of the last use
	free      int64
	lingering int64
}

// An Entry is what Hold or Await has held. There may be a million of them.
type Entry[K comparable] struct {
	key      K
	size     int64
	priority float64
	turn     int
	uses     int32
	held     int32
	at       int32 // in the order; -1: it is held, going or gone
	orphan   bool
	going    bool // it was taken
	gone     bool // it was removed
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
	return &Queue[K]{entries: make(map[K]*Entry[K]), awaited: make(map[K]*Entry[K]), links: make(map[K]*link[K])}
}

// Free is the size in bytes of all entries that may go.
func (q *Queue[K]) Free() int64 { return q.free }

// Lingering is the size in bytes of all that was removed and is held still.
func (q *Queue[K]) Lingering() int64 { return q.lingering }

// Add enters what was stored for a use, with its size on disk in bytes. An entry
// that is there already has that size now, and is used once more.
func (q *Queue[K]) Add(k K, size int64) {
	if e := q.entries[k]; e == nil {
		q.insert(k, size, Rank{})
	} else {
		q.PutBack(k)
		if e.at >= 0 {
			q.free += size - e.size
		}
		e.size = size
	}
	q.Use(k)
}

// Restore enters what an earlier Queue had, as it was ranked there, or with no rank
// what came too late to be. All of them come before the first Add, those that were
// used last at the end, and Resume behind them. Who was Lost is so again after Lose.
func (q *Queue[K]) Restore(k K, size int64, r Rank) {
	if q.entries[k] == nil {
		q.insert(k, size, r)
	}
}

// Resume ends the restoring, when all is held that may not go: only what goes says
// what the inflation was.
func (q *Queue[K]) Resume() {
	var unranked []*Entry[K]
	first := true
	for _, e := range q.entries {
		switch {
		case e.uses == 0:
			unranked = append(unranked, e)
		case e.at < 0 || e.orphan:
		case first || e.priority < q.inflation:
			q.inflation, first = e.priority, false // about what it was: the next victim's
		}
	}
	for _, e := range unranked {
		q.Use(e.key)
	}
}

func (q *Queue[K]) insert(k K, size int64, r Rank) {
	q.turn++
	e := q.awaited[k]
	if e == nil {
		e = &Entry[K]{key: k, at: -1}
	}
	delete(q.awaited, k)
	e.size, e.uses, e.priority, e.turn, e.orphan = size, int32(r.Uses), r.Priority, q.turn, q.isLost(k)
	q.entries[k] = e
	if e.held == 0 {
		q.enter(e)
	}
}

// enter and leave are for an entry that may go, or may not any more.
func (q *Queue[K]) enter(e *Entry[K]) {
	heap.Push(&q.order, e)
	q.free += e.size
}

func (q *Queue[K]) leave(e *Entry[K]) {
	if e.at >= 0 {
		heap.Remove(&q.order, int(e.at))
		q.free -= e.size
	}
}

// Size is what an entry takes, in bytes.
func (q *Queue[K]) Size(k K) (size int64, ok bool) {
	if e := q.entries[k]; e != nil {
		return e.size, true
	}
	return 0, false
}

// Gone tells whether an entry was removed.
func (e *Entry[K]) Gone() bool { return e.gone }

// Rank returns the rank of an entry.
func (q *Queue[K]) Rank(k K) (r Rank, ok bool) {
	e := q.entries[k]
	if e == nil {
		return r, false
	}
	return Rank{int(e.uses), e.priority, e.orphan}, true
}

// Use counts a use. A key that is not there is none of its business.
func (q *Queue[K]) Use(k K) {
	e := q.entries[k]
	if e == nil {
		return
	}
	q.turn++
	e.turn = q.turn
	e.uses = min(e.uses+1, maxUses)
	e.priority = q.inflation + float64(e.uses)*weight(e.size)
	q.fix(e)
	if q.isLost(k) { // somebody knows the way all the same
		q.setLost(k, false)
	}
}

func weight(size int64) float64 { return 1 + requestCost/float64(max(size, 1)) }

func (q *Queue[K]) fix(e *Entry[K]) {
	if e.at >= 0 {
		heap.Fix(&q.order, int(e.at))
	}
}

// Lead says that an entry is a manifest, and what it leads to. Beyond maxLinks it
// leads nowhere.
func (q *Queue[K]) Lead(k K, children []K) {
	if q.entries[k] == nil || len(children) == 0 || len(children) > maxLinks-q.leading {
		return
	}
	l := q.link(k)
	if l.children != nil {
		return // a digest names one list of children
	}
	l.children = children
	q.leading += len(children)
	if !l.lost {
		q.follow(l, 1)
	}
}

// Tag says that a tag means the key, which may be stored or not.
func (q *Queue[K]) Tag(k K) { q.tag(k, 1) }

// Untag says that a tag means something else now. It may come before its Tag.
func (q *Queue[K]) Untag(k K) { q.tag(k, -1) }

// Lose says that what led to the key has gone, unless something does now.
func (q *Queue[K]) Lose(k K) { q.tag(k, 0) }

func (q *Queue[K]) tag(k K, n int) {
	l := q.link(k)
	if l.tags += n; l.tags > 0 {
		q.setLost(k, false)
	} else {
		q.lose(k, l)
	}
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
	if l.tags != 0 || l.parents != 0 {
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

// Hold keeps an entry from going until its Release. nil: there is none, or it
// goes just now.
func (q *Queue[K]) Hold(k K) *Entry[K] {
	e := q.entries[k]
	if e == nil || e.going {
		return nil
	}
	q.leave(e)
	e.held++
	return e
}

// Await is Hold also of what goes just now, whose room is free after the Release,
// and of what is not there yet, from when it is entered.
func (q *Queue[K]) Await(k K) *Entry[K] {
	e := q.entries[k]
	if e == nil {
		e = q.awaited[k]
	}
	if e == nil {
		e = &Entry[K]{key: k, at: -1}
		q.awaited[k] = e
	}
	q.leave(e)
	e.held++
	return e
}

// Release ends a Hold or an Await. Of an entry that was removed meanwhile, the last one
// returns its size: its room is free only now.
func (q *Queue[K]) Release(e *Entry[K]) (freed int64) {
	e.held--
	switch {
	case e.held > 0:
	case e.gone:
		q.lingering -= e.size
		return e.size
	case e.going:
	case q.awaited[e.key] == e:
		delete(q.awaited, e.key)
	default:
		q.enter(e)
	}
	return 0
}

// Take takes the entry that would be missed least: until Evict, Remove or
// PutBack nobody can hold it. ok is false when all are held.
func (q *Queue[K]) Take() (k K, ok bool) {
	if len(q.order) == 0 {
		return k, false
	}
	e := q.order[0]
	q.leave(e)
	e.going = true
	return e.key, true
}

// PutBack is for one that was taken and stays.
func (q *Queue[K]) PutBack(k K) {
	if e := q.entries[k]; e != nil && e.going {
		e.going = false
		if e.held == 0 {
			q.enter(e)
		}
	}
}

// Evict removes an entry to make room: what is used from now on ranks above it.
// It returns what Remove does.
func (q *Queue[K]) Evict(k K) (freed int64) {
	e := q.entries[k]
	if e == nil {
		return 0
	}
	if !e.orphan {
		q.inflation = max(q.inflation, e.priority)
	}
	return q.Remove(k)
}

// Remove forgets an entry. It returns its size, or 0 when it is held: the room
// is free when the last Release is there.
func (q *Queue[K]) Remove(k K) (freed int64) {
	e := q.entries[k]
	if e == nil {
		return 0
	}
	delete(q.entries, k)
	q.leave(e)
	if l := q.links[k]; l != nil {
		if !l.lost {
			q.follow(l, -1)
		}
		q.leading -= len(l.children)
		if l.children, l.lost = nil, false; l.tags == 0 && l.parents == 0 {
			delete(q.links, k)
		}
	}
	e.gone = true
	if e.held > 0 {
		q.lingering += e.size
		return 0
	}
	return e.size
}

// order is a heap, the next victim first.
type order[K comparable] []*Entry[K]

func (o order[K]) Len() int { return len(o) }

func (o order[K]) Less(i, j int) bool {
	if o[i].orphan != o[j].orphan {
		return o[i].orphan
	}
	if o[i].priority != o[j].priority {
		return o[i].priority < o[j].priority
	}
	return o[i].turn < o[j].turn
}

func (o order[K]) Swap(i, j int) {
	o[i], o[j] = o[j], o[i]
	o[i].at, o[j].at = int32(i), int32(j)
}

func (o *order[K]) Push(x any) {
	e := x.(*Entry[K])
	e.at = int32(len(*o))
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
