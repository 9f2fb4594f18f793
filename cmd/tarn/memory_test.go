// SPDX-License-Identifier: Apache-2.0

package main

import "testing"

// TestWhenABurstIsOver: nothing was collected since the last look, and there is much
// more than there was at rest, however much that was before.
func TestWhenABurstIsOver(t *testing.T) {
	t.Parallel()
	const mb = 1 << 20
	var last calm
	last.take(1, 20*mb)
	for i, at := range []struct {
		collections, held uint64
		over              bool
	}{
		{1, 40 * mb, false},  // it is little
		{2, 300 * mb, false}, // there is work
		{2, 300 * mb, true},
		{3, 300 * mb, false}, // the collection that was for it: all of it is in use
		{3, 300 * mb, false},
		{4, 50 * mb, false}, // and now it is not
		{5, 310 * mb, false},
		{5, 310 * mb, true}, // as much once more
	} {
		over := last.over(at.collections, at.held)
		if over != at.over {
			t.Errorf("look %d: %v", i, over)
		}
		if over {
			last.take(at.collections+1, at.held)
		}
	}
}
