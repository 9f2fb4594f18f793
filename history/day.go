// SPDX-License-Identifier: Apache-2.0

package history

import (
	"slices"
	"time"
)

// Sum is what was served within one quarter of an hour.
type Sum struct {
	Start    time.Time `json:"start"`
	Requests int64     `json:"requests"` // for manifests and blobs
	// FromDisk are the bytes of bodies that were on the disk before they were asked
	// for, and FromRegistry of those that were not.
	FromDisk     int64 `json:"fromDiskBytes"`
	FromRegistry int64 `json:"fromRegistryBytes"`
	// Received are the bytes that registries sent.
	Received int64 `json:"receivedBytes"`
}

const (
	quarter = 15 * time.Minute
	// quarters are those of a day, and the one that has begun.
	quarters = 24*4 + 1
	// maxAhead is how far a clock is set back without a doubt about the one before.
	maxAhead = 24 * time.Hour
)

// day are the sums of the last quarters in which there was something, the latest
// last.
type day []Sum

// at is the sum that a time belongs to. A clock that was set back counts in the
// latest; one that was far ahead has its sums forgotten, or they would be the latest
// until then.
func (d *day) at(t time.Time) *Sum {
	start := t.Truncate(quarter).UTC()
	for n := len(*d); n > 0 && (*d)[n-1].Start.Sub(start) > maxAhead; n-- {
		*d = (*d)[:n-1]
	}
	if n := len(*d); n > 0 && !start.After((*d)[n-1].Start) {
		return &(*d)[n-1]
	}
	if len(*d) == quarters {
		*d = slices.Delete(*d, 0, 1)
	}
	*d = append(*d, Sum{Start: start})
	return &(*d)[len(*d)-1]
}

func (d *day) add(e Entry) {
	if e.Outcome == OutcomeGone || e.Own {
		return
	}
	s := d.at(e.At)
	s.Requests++
	switch e.Outcome {
	case "hit", "confirmed", "stale":
		s.FromDisk += e.Bytes
	case "miss", "joined", "bypassed":
		s.FromRegistry += e.Bytes
	}
}

// Received counts bytes that a registry has sent.
func (h *History) Received(n int64) {
	if h == nil || n <= 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.day.at(h.now()).Received += n
}

// Day returns the sums of the last 24 hours, the latest last; quarters in which
// nothing was served are left out.
func (h *History) Day() []Sum {
	sums := []Sum{}
	if h == nil {
		return sums
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	since := h.now().Add(-24 * time.Hour)
	for _, s := range h.day {
		if s.Start.Add(quarter).After(since) {
			sums = append(sums, s)
		}
	}
	return sums
}

// Total is the sum of several; it starts when the first of them does.
func Total(sums []Sum) (t Sum) {
	for i, s := range sums {
		if i == 0 {
			t.Start = s.Start
		}
		t.Requests += s.Requests
		t.FromDisk += s.FromDisk
		t.FromRegistry += s.FromRegistry
		t.Received += s.Received
	}
	return t
}
