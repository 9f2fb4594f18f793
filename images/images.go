// SPDX-License-Identifier: Apache-2.0

// Package images knows what is stored as the images that people know: by tag, pinned
// or not, with their platforms and sizes.
//
// Contract: what a pin leads to is held, now and when it comes, so that it is not
// evicted. Pins are a file of their own, pins.json, so that they survive the index.
// index.json and oci-layout make the data directory an OCI image layout (image-spec
// "Image Layout"), whose list of images is some seconds behind.
//
// Failure model: pins that cannot be written fail, and are not held; of a damaged file
// the pins that are whole hold, and it is set aside; while the disk does not give it,
// nothing is pinned. A list that
// cannot be written is written later, and nothing else depends on it.
//
// It serves nobody: what it reads of manifests is for eviction, pins and lists.
package images

import (
	"slices"
	"sync"
	"sync/atomic"

	"tarn/cache/store"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
)

// Images are those of a store. They are safe for concurrent use.
type Images struct {
	store *store.Store
	log   *zap.Logger
	// tagMoved: a tag means something else than before, and neither the pins nor the
	// list follow yet.
	tagMoved atomic.Bool

	mu     sync.Mutex
	pinned []Pin // replaced, never changed

	// These are the committer's, once the store has started.
	pins pins
	list imageList
}

// New reads the pins of a store that has not started, so that they hold before
// anything can go. Its Hooks are the store's to call.
func New(st *store.Store, log *zap.Logger) *Images {
	im := &Images{store: st, log: log}
	im.list.due = true
	im.readPins()
	return im
}

// Hooks are what the store calls.
func (im *Images) Hooks() store.Hooks {
	return store.Hooks{Entered: im.entered, Gone: im.gone, Untagged: im.TagMoved, Follow: im.follow, Tick: im.tick}
}

// TagMoved has pins and list follow a tag that means something else now.
func (im *Images) TagMoved() { im.tagMoved.Store(true) }

func (im *Images) entered(d digest.Digest, children []digest.Digest) {
	im.list.due = im.list.due || children != nil
	switch {
	case !im.pins.wanted[d]:
	case children != nil:
		im.pins.due = true // what it leads to is wanted, too
	default:
		im.pins.leases[d] = im.store.Rehold(d, im.pins.leases[d])
	}
}

func (im *Images) gone(d digest.Digest) {
	im.list.due = true
	if l := im.pins.leases[d]; l != nil {
		delete(im.pins.leases, d)
		im.store.Release(l)
	}
}

func (im *Images) follow() {
	if im.tagMoved.Swap(false) {
		im.list.due = true
		im.pins.due = im.pins.due || slices.ContainsFunc(im.Pins(), im.moved)
	}
	if im.pins.due {
		im.repin()
	}
}

func (im *Images) tick() {
	if im.pins.partly != nil {
		im.repin()
	}
	if im.pins.unwritten {
		im.writePins()
	}
	im.layOut()
}
