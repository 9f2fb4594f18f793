// SPDX-License-Identifier: Apache-2.0

package history

import "iter"

// ring has the last entries of a kind, as many as fit.
type ring struct {
	entries []*Entry // by ID
	bytes   int64
	dropped bool // some had to go
}

// append returns those that had to go.
func (r *ring) append(e *Entry, most int64) (gone []*Entry) {
	r.entries = append(r.entries, e)
	r.bytes += e.size()
	for r.bytes > most {
		first := r.entries[0]
		r.entries[0] = nil
		r.entries = r.entries[1:]
		r.bytes -= first.size()
		r.dropped = true
		gone = append(gone, first)
	}
	return gone
}

// backward are all entries, the latest first. It is used with the lock.
func (h *History) backward() iter.Seq[*Entry] {
	return func(yield func(*Entry) bool) {
		a, b := h.kept.entries, h.cheap.entries
		for len(a)+len(b) > 0 {
			if len(a) == 0 || len(b) > 0 && b[len(b)-1].ID > a[len(a)-1].ID {
				a, b = b, a
			}
			last := len(a) - 1
			if !yield(a[last]) {
				return
			}
			a = a[:last]
		}
	}
}
