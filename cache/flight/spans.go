// SPDX-License-Identifier: Apache-2.0

package flight

import "slices"

// span is the bytes from start up to and without end.
type span struct{ start, end int64 }

// spans is a set of bytes: sorted, disjoint, and never touching one another.
type spans []span

// after is the index of the first span that ends at or after at.
func (s spans) after(at int64) int {
	i, _ := slices.BinarySearchFunc(s, at, func(sp span, at int64) int {
		if sp.end < at {
			return -1
		}
		return 1
	})
	return i
}

// add returns the set with these bytes. It may use the memory of s.
func (s spans) add(start, end int64) spans {
	if start >= end {
		return s
	}
	i := s.after(start)
	j := i
	for ; j < len(s) && s[j].start <= end; j++ {
		start, end = min(start, s[j].start), max(end, s[j].end)
	}
	return slices.Replace(s, i, j, span{start, end})
}

// reach is the end of the bytes that are there from at on without a gap; it is
// at itself when that byte is not there.
func (s spans) reach(at int64) int64 {
	// A span that only ends at at has no byte there.
	if i := s.after(at + 1); i < len(s) && s[i].start <= at {
		return s[i].end
	}
	return at
}

// gap returns the first bytes at or after at that are not there, up to limit;
// they are none when start is limit.
func (s spans) gap(at, limit int64) (start, end int64) {
	start, end = min(s.reach(at), limit), limit
	if i := s.after(start + 1); i < len(s) {
		end = min(end, s[i].start)
	}
	return start, max(start, end)
}

// end is that of the last byte.
func (s spans) end() int64 {
	if len(s) == 0 {
		return 0
	}
	return s[len(s)-1].end
}

// total is how many bytes there are.
func (s spans) total() (n int64) {
	for _, sp := range s {
		n += sp.end - sp.start
	}
	return n
}
