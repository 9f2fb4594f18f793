// SPDX-License-Identifier: Apache-2.0

package store

import (
	"container/list"
	"sync"

	"github.com/opencontainers/go-digest"
)

// hot keeps small objects in memory, those that were asked for last: manifests
// and configs are read by every pull, and opening a file costs more than
// sending it.
type hot struct {
	mu      sync.Mutex
	entries map[hotKey]*list.Element
	recent  list.List // of *hotEntry, the latest first
	bytes   int
}

// hotKey is an object of a source domain.
type hotKey struct {
	domain string
	digest digest.Digest
}

type hotEntry struct {
	key  hotKey
	body []byte
}

const (
	// maxHotObject is what is read into memory rather than sent by the kernel.
	maxHotObject = 64 << 10
	// maxHotBytes bounds them all. A cluster's manifests fit several times.
	maxHotBytes = 8 << 20
	// hotOverhead is what an entry takes besides its body, about.
	hotOverhead = 300
)

func newHot() *hot { return &hot{entries: make(map[hotKey]*list.Element)} }

// get returns the body, nil when it is not here. Nobody writes to it.
func (h *hot) get(k hotKey) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := h.entries[k]
	if e == nil {
		return nil
	}
	h.recent.MoveToFront(e)
	return e.Value.(*hotEntry).body
}

func (h *hot) put(k hotKey, body []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.entries[k] != nil {
		return
	}
	h.entries[k] = h.recent.PushFront(&hotEntry{k, body})
	for h.bytes += len(body) + hotOverhead; h.bytes > maxHotBytes; {
		h.remove(h.recent.Back())
	}
}

// drop forgets objects, whoever delivered them.
func (h *hot) drop(ds ...digest.Digest) {
	those := make(map[digest.Digest]bool, len(ds))
	for _, d := range ds {
		those[d] = true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for k, e := range h.entries {
		if those[k.digest] {
			h.remove(e)
		}
	}
}

func (h *hot) remove(e *list.Element) {
	entry := h.recent.Remove(e).(*hotEntry)
	delete(h.entries, entry.key)
	h.bytes -= len(entry.body) + hotOverhead
}
