// SPDX-License-Identifier: Apache-2.0

//go:build !race

package proxy

import "testing"

// Under the race detector, pools forget at random.
func TestRoutingTakesFewAllocations(t *testing.T) {
	const most = 10
	requests, way := routed(t)
	for name, r := range requests {
		if n := testing.AllocsPerRun(100, func() { way(r) }); n > most {
			t.Errorf("%s: %v allocations, of at most %d", name, n, most)
		}
	}
}
