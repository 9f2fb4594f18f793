// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"math"
	"slices"
)

// What of an object is asked for next, and with whose right.

// segment is how much of what is left is asked for at once, in order or for a reader
// that waits in the middle, where so many workers are busy.
func (f *flight) segment(left int64, inOrder bool, workers int) int64 {
	if f.parallel == 1 {
		return left
	}
	least := int64(minSegment)
	if !f.several && inOrder {
		least = aloneSegment
	}
	n := min(max(left/int64(f.parallel), least), maxSegment)
	if f.ahead {
		n = max(left/int64(max(1, f.parallel-workers)), minSegment)
	}
	if left-n < minSegment/2 {
		return left // no crumbs
	}
	return n
}

// parts are what an object of this size is asked for in, at the beginning and all at
// once: they are those that would be asked for once the first answer told the size.
func (f *flight) parts(size int64) []span {
	parts := []span{{0, min(size, firstSegment)}}
	for at := parts[0].end; at < size && len(parts) < f.parallel; {
		n := f.segment(size-at, true, len(parts))
		parts = append(parts, span{at, at + n})
		at += n
	}
	return parts
}

// noteDue is called with the lock.
func (f *flight) noteDue() bool {
	return !f.noting && f.size > firstSegment && f.filled.total()-f.noted >= max(noteStep, f.size/maxNotes)
}

// next is the next worker's task, nil when there is none now. Called with the
// lock.
func (f *flight) next() *worker {
	t := f.ticket()
	busy := 0
	for w := range f.workers {
		if w.end-w.pos > askAhead || len(f.workers) == 1 {
			busy++
		}
	}
	if t == nil || f.whole && len(f.workers) > 0 {
		return nil
	}
	if f.size < 0 {
		return newWhole(t, f.size)
	}
	at, taken, waited := f.wanted()
	most := f.parallel
	if !f.several && !f.ahead {
		most = 1
	}
	if waited && f.parallel == f.most {
		most += maxExtra
	}
	if busy >= most || len(f.workers) > most {
		return nil
	}
	start, end := taken.gap(at, f.size)
	switch {
	case start == end:
		return nil
	case f.whole:
		return newWhole(t, f.size)
	}
	first, _ := taken.gap(0, f.size)
	w := newWorker(t, start, min(end, start+f.segment(f.size-taken.total(), start == first, len(f.workers))))
	w.inOrder = start == first
	return w
}

// wanted is where the next worker begins, and what is there or being brought:
// at the first byte that a reader waits for and that nobody brings, or not soon,
// or else at the first gap. A worker that would come by much later leaves the
// rest of its segment to the new one. Called with the lock.
func (f *flight) wanted() (at int64, taken spans, waited bool) {
	at = math.MaxInt64
	take := func() {
		taken = slices.Clone(f.filled)
		for w := range f.workers {
			taken = taken.add(w.pos, w.end)
		}
	}
	take()
	for _, pos := range f.waiting {
		if start, end := taken.gap(pos, f.size); start == pos && start < end {
			at = min(at, pos)
			continue
		}
		for w := range f.workers {
			if w.answered && w.pos+farAhead < pos && pos < w.end && pos < at && f.filled.reach(pos) == pos && f.parallel == f.most {
				at, w.end, w.cut = pos, pos, true
				take()
			}
		}
	}
	if at == math.MaxInt64 {
		return 0, taken, false
	}
	return at, taken, true
}

// ticket is somebody's who was not refused. Called with the lock.
func (f *flight) ticket() *ticket {
	var slow *ticket
	for _, t := range f.tickets {
		switch {
		case t.refused:
		case !t.slow:
			return t
		case slow == nil:
			slow = t
		}
	}
	return slow
}
