// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bytes"
)

// Anybody who has a registry of his own can have tarn hear of any number of tags
// and objects. Their rows have a bound, and those of registries that are not listed
// a smaller one, so that they fill only their own part. What is beyond it is not
// noted: that costs a question each time, and prune makes room again.
const (
	// maxTags is what nodes have of tags ten times over; maxMemberships is five
	// objects to each.
	maxTags        = 100_000
	maxMemberships = 500_000
	// strangersShare is which part of them, one in so many, registries that are
	// not listed may have.
	strangersShare = 4
	// rowUnit is how many bytes of a key count as a row: a name can be several
	// times as long as any that is usual.
	rowUnit = 256
	// rowRoom is how many bytes of the file a row is taken for, its value and what
	// bbolt's pages leave free included.
	rowRoom = 2 * rowUnit
	// maxMediaType is how long one may be (RFC 6838 4.2).
	maxMediaType = 255
)

// Bounds are what the index must know of the configuration to keep strangers to
// their part.
type Bounds struct {
	// Listed tells whether the operator has named an upstream. nil: all are.
	Listed func(upstream string) bool
	// Strangers bounds the bytes that the rows of all others take, besides their
	// number. 0: only that.
	Strangers int64
}

// extent is a number of rows, where a long key counts as several.
type extent struct{ all, strangers int64 }

func (e extent) with(more extent) extent {
	return extent{e.all + more.all, e.strangers + more.strangers}
}

func (e extent) without(less extent) extent {
	return extent{e.all - less.all, e.strangers - less.strangers}
}

// extentOf is what the row of a tag or membership counts.
func (ix *Index) extentOf(key []byte) (e extent) {
	e.all = 1 + int64(len(key)/rowUnit)
	upstream, _, _ := bytes.Cut(key, []byte{0})
	if ix.bounds.Listed != nil && !ix.bounds.Listed(string(upstream)) {
		e.strangers = e.all
	}
	return e
}

// within tells whether there may be one more row beside those of its kind, and
// beside both kinds together.
func (ix *Index) within(rows, one extent, most int64, both extent) bool {
	if rows.all+one.all > most {
		return false
	}
	if one.strangers == 0 {
		return true
	}
	bound := ix.bounds.Strangers
	return rows.strangers+one.strangers <= most/strangersShare && (bound <= 0 || (both.strangers+one.strangers)*rowRoom <= bound)
}

// notes are those of a kind that has bounds, guarded by the index's lock.
type notes[V comparable] struct {
	now   map[string]V
	most  int64
	rows  extent // in the file
	noted extent // in now, whether they have a row or not
}

// all is more than the rows that there will be: some notes are of rows.
func (n *notes[V]) all() extent { return n.rows.with(n.noted) }

func (n *notes[V]) set(key string, v V, counts extent) {
	if _, known := n.now[key]; !known {
		n.noted = n.noted.with(counts)
	}
	n.now[key] = v
}

// forget deletes what is still as it was written.
func (n *notes[V]) forget(written map[string]V, extentOf func([]byte) extent) {
	for k, v := range written {
		if now, ok := n.now[k]; ok && now == v {
			delete(n.now, k)
			n.noted = n.noted.without(extentOf([]byte(k)))
		}
	}
}

// mayNote tells whether a key that has no note may have one: if it has a row, or
// there may be one more. Called with the lock.
func (ix *Index) mayNote(hasRow bool, noted int, rows extent, most int64, key string) bool {
	return noted < maxNotes && (hasRow || ix.within(rows, ix.extentOf([]byte(key)), most, ix.tags.all().with(ix.memberships.all())))
}

// StrangersBytes is about what the rows and notes of registries that are not listed
// take.
func (ix *Index) StrangersBytes() int64 {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	return ix.tags.all().with(ix.memberships.all()).strangers * rowRoom
}
