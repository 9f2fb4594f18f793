// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"tarn/blobstore"

	"github.com/opencontainers/go-digest"
)

// partial is a pending file and what is known of it. It is a flight's, which
// guards it, or lies parked until the next flight of its key goes on with it.
type partial struct {
	pending *blobstore.Pending // nil: there is no file yet
	size    int64              // of the object; -1: not known yet
	claim   int64              // bytes reserved
	filled  spans              // in the file
	hashed  int64              // all before it went through the hash
	hash    hash.Hash          // nil: before the first byte
	given   bool               // somebody may have bytes of it, perhaps from an earlier process
	synced  time.Time          // when it was last made durable, or begun
	noted   int64              // how many bytes the journal knows of
	journal int64              // how many bytes the journal has, or was to have
	parked  time.Time
}

func newPartial() partial { return partial{size: -1, synced: time.Now()} }

const (
	// noteStep is how many bytes are fetched again at most after a crash, for each
	// file that maxNotes of them cover, besides those that came while the last note
	// was written.
	noteStep = 8 << 20
	// syncInterval is the same for a power cut, in time: syncing each note
	// would have the download wait for the disk.
	syncInterval = 5 * time.Second
	// maxNotes bounds them for very large files, and journalRoom the space
	// that is reserved for them.
	maxNotes    = 128
	journalRoom = 64 << 10
	frameSize   = 10 // what the store adds to a record
	// closeRoom is for the record that closes a journal, and the one that opens it
	// again.
	closeRoom = 256
	// maxParked bounds the descriptors that parked files take; registries that are
	// not listed have their share.
	maxParked = 256
)

// header is a journal's first record: whose bytes these are, and of what.
type header struct {
	Domain string
	Digest digest.Digest
	Size   int64
}

// progress is each further one: all spans that were in the file when it was
// written. Unless they were Synced, they are so only as long as the machine runs
// that was then Booted. Where the last one is Closed, in this run of the machine,
// the process was stopped and not killed, and the journal speaks of all bytes that
// readers may have.
type progress struct {
	Filled [][2]int64
	Synced bool   `json:",omitempty"`
	Booted string `json:",omitempty"`
	Closed string `json:",omitempty"`
}

// bootID names this run of the machine, "" where it has no name.
var bootID = sync.OnceValue(func() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
})

// note writes into the journal what is in the file: these spans, of so many
// bytes. In between it makes them durable, now at the latest if last is set.
func (p *partial) note(k Key, filled spans, total int64, last bool) error {
	if p.noted == 0 {
		if err := p.appendRecord(header{k.Domain, k.Digest, p.size}); err != nil {
			return err
		}
	}
	pr := progress{Booted: bootID()}
	if last || time.Since(p.synced) >= syncInterval {
		if err := p.pending.Sync(); err != nil {
			return err
		}
		pr.Synced = true
		p.synced = time.Now()
	}
	for _, s := range filled {
		pr.Filled = append(pr.Filled, [2]int64{s.start, s.end})
	}
	p.noted = total
	return p.appendRecord(pr)
}

func (p *partial) appendRecord(v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if p.journal += int64(len(data)) + frameSize; p.journal > journalRoom {
		return nil
	}
	return p.pending.Note(data)
}

// closeJournal ends the journal, where it speaks of all that is in the file.
func (p *partial) closeJournal() error {
	if p.journal+closeRoom > journalRoom { // it may not, or could not be opened again
		return nil
	}
	return p.appendRecord(progress{Closed: bootID()})
}

// reopenJournal has a journal that was closed say so no more: from now on the file may
// have bytes that it does not speak of.
func (p *partial) reopenJournal() error { return p.appendRecord(progress{}) }

// restore reads a journal. A wrong one costs a refetch and never a wrong byte:
// all that is there is hashed again, and the last bytes are always fetched. Bytes
// that the journal does not speak of are holes. After an error the key is the one
// of which bytes are dropped.
func restore(left *blobstore.Pending) (k Key, p partial, closed bool, err error) {
	k, p = Key{Digest: left.Digest}, newPartial()
	p.pending, p.given = left, true
	var h header
	if err := json.Unmarshal(left.Notes[0], &h); err != nil {
		return k, p, false, fmt.Errorf("journal's header: %w", err)
	}
	if h.Digest != left.Digest || h.Domain == "" || h.Size <= tailHold {
		return k, p, false, errors.New("journal is of another object")
	}
	k.Domain = h.Domain
	info, err := left.File.Stat()
	if err != nil {
		return k, p, false, err
	}
	var pr progress
	for i, n := range slices.Backward(left.Notes[1:]) {
		pr = progress{}
		if err := json.Unmarshal(n, &pr); err != nil {
			return k, p, false, fmt.Errorf("journal's record: %w", err)
		}
		if i == len(left.Notes)-2 {
			closed = pr.Closed != "" && pr.Closed == bootID()
		}
		if pr.Synced || pr.Booted != "" && pr.Booted == bootID() {
			break
		}
		pr = progress{}
	}
	for _, s := range pr.Filled {
		if s[0] < 0 || s[0] >= s[1] || s[1] > h.Size || s[1] > info.Size() {
			return k, p, false, errors.New("journal speaks of bytes that are not there")
		}
		p.filled = p.filled.add(s[0], min(s[1], h.Size-tailHold))
	}
	if len(p.filled) == 0 {
		return k, p, false, errors.New("nothing was fetched")
	}
	for _, n := range left.Notes {
		p.journal += int64(len(n)) + frameSize
	}
	left.Notes = nil
	p.size, p.noted = h.Size, p.filled.total()
	return k, p, closed, nil
}

// park keeps the file for the next flight, if there is something in it that a
// reader may have. Nobody works on it any more. What is not kept stays with the
// flight.
func (f *flight) park() {
	e := f.engine
	if f.pending == nil || f.size <= tailHold || len(f.filled) == 0 {
		return
	}
	if f.filled.total() > f.noted {
		if err := f.note(f.key, f.filled, f.filled.total(), true); err != nil {
			e.store.NoteTrouble(err)
			return
		}
	}
	f.mu.Lock()
	p := f.partial
	f.partial = newPartial()
	f.size = p.size
	f.mu.Unlock()
	p.parked = time.Now()
	e.mu.Lock()
	other := e.parked[f.key] // of a flight that was superseded
	e.parked[f.key] = &p
	all, strangers := e.countParked()
	e.mu.Unlock()
	if other != nil {
		e.discard(f.key, other)
	}
	// Of a flight that was superseded, it may be late: another one has stored the
	// object. Both write first and look then, park the file and the commit the row, so
	// that one of them sees the other. If this looked before it parks:
	//
	//	1: park sees no row
	//	2: the commit writes its row, and committed finds nothing parked
	//	3: the file is parked, for a flight that never comes
	if e.store.Stored(f.key.Domain, f.key.Digest) {
		if late := e.takeParked(f.key); late != nil {
			e.discard(f.key, late)
		}
	}
	switch {
	case strangers > maxParked/strangersShare && isStranger(f.key.Domain):
		e.Spare(true, 0)
	case all > maxParked:
		e.Spare(false, 0)
	}
}

// countParked is called with the lock.
func (e *Engine) countParked() (all, strangers int) {
	for k := range e.parked {
		if isStranger(k.Domain) {
			strangers++
		}
	}
	return len(e.parked), strangers
}

// takeParked returns what lies parked, nil if nothing does; it is the caller's
// then.
func (e *Engine) takeParked(k Key) *partial {
	e.mu.Lock()
	defer e.mu.Unlock()
	p := e.parked[k]
	delete(e.parked, k)
	return p
}

// Spare gives up the file that has lain longest, for its room, but only
// where all of them make up for what is short. Where that is the share of
// registries that are not listed, only their own count.
func (e *Engine) Spare(strangersOnly bool, short int64) bool {
	e.mu.Lock()
	var oldest *partial
	var key Key
	for k, p := range e.parked {
		if strangersOnly && k.Domain == ListedDomain {
			continue
		}
		short -= p.claim
		if oldest == nil || p.parked.Before(oldest.parked) {
			key, oldest = k, p
		}
	}
	if short > 0 {
		oldest = nil
	} else {
		delete(e.parked, key)
	}
	e.mu.Unlock()
	if oldest == nil {
		return false
	}
	e.discard(key, oldest)
	return true
}

func (e *Engine) discard(k Key, p *partial) {
	if p.given {
		e.dropped.add(k)
	}
	e.store.Discard(k.Domain, p.pending, p.claim)
	p.pending.Close()
}

// dropPartial gives up what an earlier flight left.
func (f *flight) dropPartial() {
	f.mu.Lock()
	p := f.partial
	f.partial = newPartial()
	f.mu.Unlock()
	if p.pending != nil {
		f.engine.discard(f.key, &p)
	}
}

// closeParked leaves the parked files to the next process.
func (e *Engine) closeParked() {
	e.mu.Lock()
	parked := e.parked
	e.parked = make(map[Key]*partial)
	e.mu.Unlock()
	for k, p := range parked {
		if err := p.closeJournal(); err != nil {
			e.store.NoteTrouble(err) // the next process refuses ranges
		}
		p.pending.Close()
		e.store.Unreserve(k.Domain, p.claim)
	}
}

// restoreAll parks what the flights of an earlier process left, as far as there
// is room, and returns how many files that is.
func (e *Engine) restoreAll(left []*blobstore.Pending) int {
	for _, l := range left {
		k, p, closed, err := restore(l)
		if err == nil && e.store.Stored(k.Domain, k.Digest) {
			err = errors.New("the object is stored")
		}
		all, strangers := e.countParked() // nobody else has the table yet
		if err == nil && (e.parked[k] != nil || all >= maxParked || isStranger(k.Domain) && strangers >= maxParked/strangersShare) {
			err = errors.New("there are others")
		}
		if err == nil {
			p.claim = claimFor(p.size)
			err = e.store.ReserveFree(k.Domain, p.claim)
		}
		if err == nil && closed {
			if err = p.reopenJournal(); err != nil {
				e.store.Unreserve(k.Domain, p.claim)
			}
		}
		if err != nil {
			e.log.Sugar().Infow("a download that was broken off starts anew", "digest", l.Digest, "cause", err.Error())
			e.dropped.add(k)
			e.store.DiscardLeft(k.Domain, l)
			continue
		}
		if !closed {
			e.dropped.add(k)
		}
		e.parked[k] = &p
	}
	return len(e.parked)
}
