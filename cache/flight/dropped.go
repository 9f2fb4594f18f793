// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// One rule keeps a bad beginning and a good end from becoming a complete wrong
// object: when bytes that somebody may have are dropped, every range above 0 of
// that object is refused to everybody for dropFor. A client that is refused begins
// at byte 0, or asks the registry.
//
// These drop bytes: a flight that ends and leaves nothing to go on with, where any
// reader was given anything; a pending file that is discarded; a stored file that
// is found to be changed; a stream of one reader's own whose bytes are wrong. A
// start counts each pending file as dropped that it does not go on with, and each
// whose journal was not closed: a kill came before the journal spoke of all bytes
// that readers were given.
//
// A flight that passes through drops nothing: its object passes through from then on,
// and each client checks what passes through. A parked file is the next flight's
// beginning, and a journal that was closed speaks of all of it.
const (
	// dropFor: clients that resume do so within seconds, and they check the digest
	// of what they have put together besides.
	dropFor = 60 * time.Second
	// maxDropped bounds the objects of the listed domain, at some 150 bytes each,
	// and those of which a start does not know the domain. Past it, ranges of all
	// objects of that domain are refused.
	maxDropped = 1 << 14
	// maxStrangersDropped bounds those of all registries together that are not
	// listed, and maxStrangerDropped those of each.
	maxStrangersDropped = maxDropped / strangersShare
	maxStrangerDropped  = maxStrangersDropped / 16
	// maxDroppedLeft is how many a clean stop leaves to the next process.
	maxDroppedLeft = 1024
)

// anyStranger stands for all registries that are not listed. Like ListedDomain, no
// registry can have that name.
const anyStranger = "?"

// dropped are the objects of which bytes were dropped a short while ago. A key
// without a domain stands for the object in every domain, one without a digest for
// all objects of its domain.
type dropped struct {
	mu    sync.Mutex
	until map[Key]time.Time
	count map[string]int // of each domain, and of anyStranger for all of those
}

func newDropped() *dropped {
	return &dropped{until: make(map[Key]time.Time), count: make(map[string]int)}
}

func isStranger(domain string) bool {
	return domain != ListedDomain && domain != "" && domain != anyStranger
}

// add has ranges of the object refused from now on.
func (d *dropped) add(k Key) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	for _, all := range []Key{{Domain: k.Domain}, {Domain: anyStranger}} {
		if now.Before(d.until[all]) && (all.Domain == k.Domain || isStranger(k.Domain)) {
			d.until[all] = now.Add(dropFor) // it stands for this one as well
			return
		}
	}
	if d.full(k) {
		for old, until := range d.until {
			if !now.Before(until) {
				delete(d.until, old)
				d.addCount(old, -1)
			}
		}
		for d.full(k) {
			if k.Digest != "" {
				k.Digest = "" // all of the domain
			} else {
				k.Domain = anyStranger
			}
		}
	}
	if _, known := d.until[k]; !known {
		d.addCount(k, 1)
	}
	d.until[k] = now.Add(dropFor)
}

// full tells whether there is no room for this key. Called with the lock.
func (d *dropped) full(k Key) bool {
	most := maxDropped
	if isStranger(k.Domain) {
		most = maxStrangerDropped
	}
	_, known := d.until[k]
	return !known && (k.Digest != "" && d.count[k.Domain] >= most || isStranger(k.Domain) && d.count[anyStranger] >= maxStrangersDropped)
}

func (d *dropped) addCount(k Key, n int) {
	d.count[k.Domain] += n
	if d.count[k.Domain] == 0 {
		delete(d.count, k.Domain)
	}
	if isStranger(k.Domain) {
		d.count[anyStranger] += n
	}
}

// refuses tells whether a request wants a range that must not be joined to bytes
// that were dropped.
func (d *dropped) refuses(k Key, offset int64) bool {
	if offset <= 0 {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.until) == 0 {
		return false
	}
	now := time.Now()
	for _, of := range []Key{k, {Domain: k.Domain}, {Digest: k.Digest}, {}} {
		if now.Before(d.until[of]) {
			return true
		}
	}
	return isStranger(k.Domain) && now.Before(d.until[Key{Domain: anyStranger}])
}

// digests are those of which ranges are refused now, some if there are many. What
// registries that are not listed have brought about is not among them: the next process
// would refuse it to everybody.
func (d *dropped) digests() (all []digest.Digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	for k, until := range d.until {
		if now.Before(until) && k.Digest != "" && !isStranger(k.Domain) && len(all) < maxDroppedLeft {
			all = append(all, k.Digest)
		}
	}
	return all
}

// leaveDropped leaves what is refused to the next process, as pending files without
// a journal: it counts those as dropped. The cache is being closed. A kill leaves
// nothing of it.
func (e *Engine) leaveDropped() {
	for _, d := range e.dropped.digests() {
		if p, err := e.store.Create(d); err == nil { // else the disk has no next process soon
			p.Close()
		}
	}
}
