// SPDX-License-Identifier: Apache-2.0

// Package history remembers what became of requests: for each the tag's meaning, what
// the registry was asked, where the bytes came from, and why not from the disk; and
// what went from the disk, and why.
//
// Contract: the last entries, as many as fit into a bound, in memory and, a little
// later, in a file; Reach says how far back they go. What is alike within half a
// minute is one entry with a count. Besides, the sums of a day in quarters of an hour.
// An entry names repositories, and never a credential.
//
// Anybody can make up names by the thousand that a registry refuses, or have a registry
// of his own that has them all. Entries of such requests have a part of the bound, so
// that they push out each other and nothing else.
//
// Failure model: nobody waits for the disk. What could not be written is tried again
// while it is in memory; a crash loses the last minute; lines that cannot be read are
// left out.
package history

import (
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/opencontainers/go-digest"
)

// Cause says why an answer's bytes did not come from the disk, or why something went
// from it. "" is for what came from there.
type Cause string

const (
	// Of what was fetched.
	NeverSeen  Cause = "never-seen" // not here, as far back as the history reaches
	Moved      Cause = "moved"      // the tag means something else than before
	Evicted    Cause = "evicted"    // it was here, and had to make room
	Removed    Cause = "removed"    // it was here, and somebody had it removed
	Changed    Cause = "changed"    // its file was not as it was stored, and is dropped
	Lost       Cause = "lost"       // it was here, and nobody knows what became of it
	Unfinished Cause = "unfinished" // an earlier download has not come to its end
	Fetching   Cause = "fetching"   // another request was having it fetched
	Unproven   Cause = "unproven"   // the registry's yes was not about what is here
	// Of what was not stored.
	DiskTrouble Cause = "disk-trouble" // the disk, or its bound, took nothing
	NotStorable Cause = "not-storable" // a type, or an answer, that nothing can be stored of
	// Of what was not answered with bytes.
	Refused    Cause = "refused"     // the registry said 401, 403 or 404
	Limited    Cause = "limited"     // the registry limits requests
	Away       Cause = "away"        // the registry could not be asked, or answered 5xx
	Broken     Cause = "broken"      // what came is not what the digest says, or broke off
	NotAllowed Cause = "not-allowed" // tarn may not ask that registry
	BadRequest Cause = "bad-request" // the request itself
	Closing    Cause = "closing"     // tarn was being stopped
	Gone       Cause = "client-left" // the client has not waited for the end
	Internal   Cause = "internal"    // tarn
)

// Outcome of an entry about the store; the others are those of requests.
const OutcomeGone = "gone"

// Entry is one decision, or several that are alike.
type Entry struct {
	// ID counts up, and names the entry in this history.
	ID int64     `json:"id"`
	At time.Time `json:"at"` // when the first request came
	// Last is when the last of several came, and Count how many they are.
	Last  time.Time `json:"last,omitzero"`
	Count int       `json:"count"`
	// Client is what the User-Agent says who it is; Own says that it is tarn itself,
	// which is in no sum of what was served.
	Client     string `json:"client,omitempty"`
	Own        bool   `json:"own,omitempty"`
	Method     string `json:"method,omitempty"`
	Upstream   string `json:"upstream,omitempty"`
	Unlisted   bool   `json:"unlisted,omitempty"` // that upstream, by the operator
	Repository string `json:"repository,omitempty"`
	Kind       string `json:"kind,omitempty"` // manifests or blobs
	Tag        string `json:"tag,omitempty"`
	// Digest is what was asked for, or what the tag meant; Before is what the tag
	// meant before, where that was something else.
	Digest digest.Digest `json:"digest,omitempty"`
	Before digest.Digest `json:"before,omitempty"`
	// Outcome is hit, confirmed, miss, joined, stale, refused, bypassed or error; of
	// what went from the disk it is gone.
	Outcome string `json:"outcome"`
	Status  int    `json:"status,omitempty"` // of the answer
	// Asked is the method by which the registry was asked on behalf of this request,
	// "" where it was not; Shared says that others asked the same.
	Asked  string `json:"asked,omitempty"`
	Shared bool   `json:"shared,omitempty"`
	Cause  Cause  `json:"cause,omitempty"`
	// Detail is the cause in words, where there are any.
	Detail string `json:"detail,omitempty"`
	Bytes  int64  `json:"bytes"` // of bodies, of all of them
}

const (
	// together is how long what is alike is counted in one entry.
	together = 30 * time.Second
	// memory is the bound on entries in memory, in bytes, and cheapMemory is what of it
	// those may have that anybody can bring about.
	memory      = 8 << 20
	cheapMemory = memory / 4
	// maxDetail bounds the words of an entry, in bytes.
	maxDetail = 256
	// perEntry is what an entry takes besides its strings: itself, as the allocator
	// rounds it, and its place in the ring.
	perEntry = int64(unsafe.Sizeof(Entry{})) + 64
	// maxOpen bounds the table of what more may be counted in.
	maxOpen = 1 << 14
)

// History is safe for concurrent use. Its zero value is not; a nil one remembers
// nothing.
type History struct {
	started time.Time
	now     func() time.Time

	mu   sync.Mutex // guards what follows
	kept ring       // with the most memory
	// cheap are those that anybody can bring about, see the package's comment.
	cheap ring
	next  int64             // ID of the entry to come
	open  map[uint64]*Entry // by the hash of what makes entries alike
	seed  maphash.Seed
	day   day

	writer writer
}

// New returns an empty history.
func New(now func() time.Time) *History {
	return &History{started: now(), now: now, next: 1, open: make(map[uint64]*Entry), seed: maphash.MakeSeed()}
}

// Add remembers what became of a request. ID, Last and Count are not the caller's.
func (h *History) Add(e Entry) {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.day.add(e)
	key := e.alike()
	sum := maphash.Comparable(h.seed, key)
	// What was fetched, and what went, has its place among what else happened to it.
	alone := e.Outcome == "miss" || e.Outcome == OutcomeGone
	if was := h.open[sum]; was != nil && !alone && e.At.Sub(was.At).Abs() < together && was.alike() == key {
		if e.At.After(was.Last) {
			was.Last = e.At
		}
		was.Count++
		was.Bytes += e.Bytes
		return
	}
	own(&key)
	fresh := new(Entry)
	*fresh = key
	fresh.At, fresh.Bytes, fresh.Count = e.At, e.Bytes, 1
	if h.append(fresh); !alone {
		if len(h.open) >= maxOpen {
			clear(h.open)
		}
		h.open[sum] = fresh
	}
}

// alike is what entries have in common that are counted in one.
func (e *Entry) alike() Entry {
	key := *e
	key.ID, key.At, key.Last, key.Count, key.Bytes = 0, time.Time{}, time.Time{}, 0, 0
	return key
}

// own has the strings of an entry keep nothing else alive.
func own(e *Entry) {
	if len(e.Detail) > maxDetail {
		e.Detail = strings.ToValidUTF8(e.Detail[:maxDetail], "") + "..."
	}
	for _, s := range []*string{&e.Client, &e.Upstream, &e.Repository, &e.Tag, &e.Detail, (*string)(&e.Digest), (*string)(&e.Before)} {
		*s = strings.Clone(*s)
	}
}

// append is called with the lock.
func (h *History) append(e *Entry) {
	e.ID = h.next
	h.next++
	r, most := &h.kept, int64(memory-cheapMemory)
	if e.cheap() {
		r, most = &h.cheap, cheapMemory
	}
	for _, gone := range r.append(e, most) {
		h.close(gone)
	}
}

// cheap tells whether anybody can bring about as many such entries as he likes.
func (e *Entry) cheap() bool {
	return e.Unlisted || e.Outcome == "refused" || e.Outcome == "error"
}

// close has nothing more counted in an entry. Called with the lock.
func (h *History) close(e *Entry) {
	if sum := maphash.Comparable(h.seed, e.alike()); h.open[sum] == e {
		delete(h.open, sum)
	}
}

func (e *Entry) size() int64 {
	return perEntry + int64(len(e.Client)+len(e.Upstream)+len(e.Repository)+len(e.Tag)+len(e.Detail)+len(e.Digest)+len(e.Before))
}

// Went remembers that an object went from the disk.
func (h *History) Went(d digest.Digest, bytes int64, cause Cause) {
	if h != nil {
		h.Add(Entry{At: h.now(), Digest: d, Outcome: OutcomeGone, Cause: cause, Bytes: bytes})
	}
}

// Why says why an object that a request was for was not on the disk: the last that is
// known of it.
func (h *History) Why(d digest.Digest) Cause {
	if h == nil {
		return ""
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	cause := NeverSeen
	for e := range h.backward() {
		if e.Digest != d {
			continue
		}
		if e.Before != "" {
			cause = Moved // unless it was here some time
		}
		if was, known := e.fate(); known {
			return was
		}
	}
	return cause
}

// fate is what an entry tells of its object, where that is not here any more.
func (e *Entry) fate() (Cause, bool) {
	switch e.Outcome {
	case OutcomeGone:
		return e.Cause, true
	case "hit", "confirmed", "stale":
		return Lost, true
	case "miss", "joined":
		return Lost, e.Method == "GET" && e.Cause != Unproven
	case "error":
		return Unfinished, e.Method == "GET" && e.Status > 0 && e.Status < 300
	}
	return "", false
}

// Find returns the last entries of which match says yes, the latest first, at most so
// many. match is called with the lock, and keeps nothing.
func (h *History) Find(match func(*Entry) bool, most int) []Entry {
	found := []Entry{}
	if h == nil {
		return found
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for e := range h.backward() {
		if len(found) == most {
			break
		}
		if match(e) {
			found = append(found, *e)
		}
	}
	return found
}

// After returns the entries with a higher ID, the earliest first: the last so many.
func (h *History) After(id int64, most int) []Entry {
	found := []Entry{}
	if h == nil {
		return found
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for e := range h.backward() {
		if e.ID <= id || len(found) == most {
			break
		}
		found = append(found, *e)
	}
	slices.Reverse(found)
	return found
}

// Reach is since when all that was served is remembered, but for what came from
// registries that are not listed. Of that, and of what was refused or failed, there may
// be less.
func (h *History) Reach() time.Time {
	if h == nil {
		return time.Time{}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case len(h.kept.entries) == 0:
		return h.started
	case h.kept.dropped:
		return h.kept.entries[0].At
	}
	if first := h.kept.entries[0].At; first.Before(h.started) {
		return first
	}
	return h.started
}
