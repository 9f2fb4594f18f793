// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"math/rand/v2"
	"testing"
)

// TestSpansAreASetOfBytes compares with a set that nobody can get wrong.
func TestSpansAreASetOfBytes(t *testing.T) {
	t.Parallel()
	const size = 40
	for trial := range 500 {
		rnd := rand.New(rand.NewPCG(1, uint64(trial)))
		var s spans
		var set [size]bool
		for range 12 {
			a := rnd.Int64N(size + 1)
			b := rnd.Int64N(size + 1)
			s = s.add(a, b)
			for i := a; i < b; i++ {
				set[i] = true
			}
			total := int64(0)
			for at := range int64(size) {
				if set[at] {
					total++
				}
				reach := at
				for reach < size && set[reach] {
					reach++
				}
				start, end := reach, reach
				for end < size && !set[end] {
					end++
				}
				if got := s.reach(at); got != reach {
					t.Fatalf("%v reaches %d from %d, not %d", s, got, at, reach)
				}
				if gs, ge := s.gap(at, size); gs != start || ge != end && start < size {
					t.Fatalf("the gap of %v from %d is %d-%d, not %d-%d", s, at, gs, ge, start, end)
				}
			}
			if s.total() != total {
				t.Fatalf("%v has %d bytes, not %d", s, s.total(), total)
			}
			for i, sp := range s {
				if sp.start >= sp.end || i > 0 && s[i-1].end >= sp.start {
					t.Fatalf("not in order: %v", s)
				}
			}
		}
	}
}
