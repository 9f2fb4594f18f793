// SPDX-License-Identifier: Apache-2.0

//go:build !race

package proxy

import (
	"net/http"
	"testing"
)

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

func TestWhoAsksUnderWhichNameTakesNoAllocation(t *testing.T) {
	h, err := newHosts([]string{"mirror.corp.example"})
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"127.0.0.1:5050", "[::1]:5050", "localhost:5050", "mirror.corp.example"} {
		r := mustRequest(t, "/v2/")
		r.Host = host
		if n := testing.AllocsPerRun(100, func() {
			if err := h.check(r); err != nil {
				t.Error(err)
			}
		}); n > 0 {
			t.Errorf("%s: %v allocations", host, n)
		}
	}
}

func TestWhatWasNotWaitedForTakesNoAllocation(t *testing.T) {
	h := make(http.Header)
	w := waits{stepDisk: leastWait - 1}
	if n := testing.AllocsPerRun(100, func() { w.tell(h) }); n > 0 || len(h) > 0 {
		t.Errorf("%v allocations, %v", n, h)
	}
}
