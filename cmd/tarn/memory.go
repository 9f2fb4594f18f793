// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// The runtime collects the heap of a process that does nothing every two minutes, and
// gives most of what is freed back after the collection that follows. A node's pulls
// come in bursts, so without more tarn would sit on the memory of the last one.
const (
	giveBackEvery = 30 * time.Second
	// worthGiving is how much more than after the last time is worth a collection.
	worthGiving = 32 << 20
)

// giveBack returns memory to the system once nothing has been collected for a while,
// until the context ends.
func giveBack(ctx context.Context) {
	ticker := time.NewTicker(giveBackEvery)
	defer ticker.Stop()
	collections, held := heap()
	for rest := held; ; {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		before := collections
		if collections, held = heap(); collections != before || held < rest+worthGiving {
			continue
		}
		debug.FreeOSMemory()
		collections, rest = heap()
	}
}

// heap is how many collections there were, and how many bytes the heap holds of the
// system's memory.
func heap() (collections, held uint64) {
	s := []metrics.Sample{
		{Name: "/gc/cycles/total:gc-cycles"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
	}
	metrics.Read(s)
	return s[0].Value.Uint64(), s[1].Value.Uint64() + s[2].Value.Uint64() + s[3].Value.Uint64()
}
