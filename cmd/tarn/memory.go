// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"math"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"go.uber.org/zap"
)

// cgroupShare of what the process's control group may have is the soft limit of the
// runtime, which works harder below it; the rest is for what the runtime does not count,
// and for the page cache's books. The group is a container's, or of a service what
// MemoryMax says.
const cgroupShare = 0.8

// limitMemory sets the limit where GOMEMLIMIT does not, and there is one. It comes
// before whatever has a part of the limit.
func limitMemory(log *zap.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	limit, err := memlimit.Set(memlimit.WithRatio(cgroupShare), memlimit.WithProvider(memlimit.FromCgroup))
	switch {
	case err != nil:
		log.Debug("there is no memory limit to be found, and tarn sets itself none; GOMEMLIMIT would", zap.Error(err))
	case limit > 0 && limit < math.MaxInt64:
		log.Info("the memory limit is a share of the control group's", zap.Int64("bytes", limit), zap.Float64("share", cgroupShare))
	}
}

// The runtime collects the heap of a process that does nothing every two minutes, and
// gives most of what is freed back after the collection that follows. A node's pulls
// come in bursts, so without more tarn would sit on the memory of the last one.
const (
	giveBackEvery = 15 * time.Second
	// worthGiving is how much more than after the last time is worth a collection.
	worthGiving = 32 << 20
)

// startGivingBack returns what stops it.
func startGivingBack() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		giveBack(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}

// giveBack returns memory to the system once nothing has been collected for a while,
// until the context ends.
func giveBack(ctx context.Context) {
	ticker := time.NewTicker(giveBackEvery)
	defer ticker.Stop()
	var last calm
	for last.take(heap()); ; {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		if last.over(heap()) {
			debug.FreeOSMemory()
			last.take(heap())
		}
	}
}

// calm is what heap told last, and the least that was held since memory was given back:
// what was in use then may be garbage by now.
type calm struct{ collections, held uint64 }

func (c *calm) take(collections, held uint64) { *c = calm{collections, held} }

// over tells, of what there is now, whether a burst is over that is worth a collection.
func (c *calm) over(collections, held uint64) bool {
	idle := collections == c.collections
	c.collections, c.held = collections, min(c.held, held)
	return idle && held >= c.held+worthGiving
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
