// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// A reader who holds bytes that were never verified must not be given others
// that would make them look complete: a bad beginning and a good end are a
// wrong object. What a reader holds is written into its ledger, one for each
// object and reader.
const (
	// taintFor is how long it is kept. Clients that resume do so within
	// seconds; what they would assemble is checked by themselves besides.
	taintFor = 60 * time.Second
	// ledgerStep is how many bytes of an object that passes through are
	// hashed and compared before any of them leaves.
	ledgerStep = 1 << 20
	// maxTaints bounds the memory: 262,144 hashes or bare ledgers, of about
	// 100 bytes. That is 256 GiB on their way through within a minute; past
	// it, all readers of ranges are refused until the oldest have gone.
	maxTaints = 1 << 18
)

// promise is the hash after so many bytes of an object: what comes later must
// begin so.
type promise struct {
	length int64
	sum    string
}

// ledger holds the promises of all streams and flights that gave one reader
// unverified bytes of one object. They are one sequence of bytes, or it is bad.
type ledger struct {
	taints *taints // nil for a stream's own, until it is merged

	// mu guards what follows. It is taken after the table's.
	mu    sync.Mutex
	sums  map[int64]string
	bad   bool // bytes of two sequences, of a wrong one, or of one that is not known
	live  int  // streams that write to it
	until time.Time
}

func newLedger() *ledger { return &ledger{sums: make(map[int64]string)} }

// agree enters a promise, and tells whether it goes with the others.
func (l *ledger) agree(p promise) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if before, ok := l.sums[p.length]; ok && before != p.sum {
		l.bad = true
	} else if !ok {
		l.sums[p.length] = p.sum
		l.taints.grow(1)
	}
	return !l.bad
}

// next is how long the next promise after a length is: one that somebody made,
// or the next step.
func (l *ledger) next(after int64) int64 {
	n := after - after%ledgerStep + ledgerStep
	l.mu.Lock()
	defer l.mu.Unlock()
	for length := range l.sums {
		if length > after && length < n {
			n = length
		}
	}
	return n
}

// missed tells whether there is a promise up to size that no step leads to and
// that is not among those that were seen.
func (l *ledger) missed(size int64, seen map[int64]bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for length := range l.sums {
		if length > size || length%ledgerStep != 0 && !seen[length] {
			return true
		}
	}
	return l.bad
}

func (l *ledger) isBad() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bad
}

// spoil says that nothing can be said of what the reader holds.
func (l *ledger) spoil() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bad = true
}

// leave ends the writing of a stream: verified, if nothing of it is left to be
// said.
func (l *ledger) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.live--
	l.until = time.Now().Add(taintFor)
}

// taints are the ledgers.
type taints struct {
	mu   sync.Mutex
	rows map[taintKey]*ledger
	full time.Time // until when everybody is tainted
	left map[digest.Digest]time.Time

	countMu sync.Mutex // guards count; taken last
	count   int        // ledgers and their sums
}

type taintKey struct {
	Key
	reader string
}

func newTaints() *taints {
	return &taints{rows: make(map[taintKey]*ledger), left: make(map[digest.Digest]time.Time)}
}

func (t *taints) grow(n int) (count int) {
	if t == nil {
		return 0
	}
	t.countMu.Lock()
	defer t.countMu.Unlock()
	t.count += n
	return t.count
}

// open returns the reader's ledger, for somebody who will leave it; nil when
// there are too many.
func (t *taints) open(k Key, reader string) *ledger {
	t.mu.Lock()
	defer t.mu.Unlock()
	tk := taintKey{k, reader}
	l := t.alive(tk, time.Now())
	if l == nil {
		if t.grow(0) >= maxTaints {
			t.expire()
		}
		if t.grow(0) >= maxTaints {
			t.full = time.Now().Add(taintFor)
			return nil
		}
		l = newLedger()
		l.taints = t
		t.rows[tk] = l
		t.grow(1)
	}
	l.mu.Lock()
	l.live++
	l.mu.Unlock()
	return l
}

// add says that the reader holds unverified bytes: these, or, without any
// promise, some that nothing is known of.
func (t *taints) add(k Key, reader string, ps ...promise) {
	l := t.open(k, reader)
	if l == nil {
		return
	}
	defer l.leave()
	if len(ps) == 0 {
		l.spoil()
	}
	for _, p := range ps {
		l.agree(p)
	}
}

// addLeft says that anybody may hold bytes of a flight that ended with an
// earlier process.
func (t *taints) addLeft(d digest.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.left[d] = time.Now().Add(taintFor)
}

// alive returns the ledger of a key if it has not ended, and drops it if it
// has. Called with the table's lock.
func (t *taints) alive(tk taintKey, now time.Time) *ledger {
	l := t.rows[tk]
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.live > 0 || now.Before(l.until) && (l.bad || len(l.sums) > 0) {
		return l
	}
	t.grow(-1 - len(l.sums))
	delete(t.rows, tk)
	return nil
}

// expire is called with the table's lock.
func (t *taints) expire() {
	now := time.Now()
	for tk := range t.rows {
		t.alive(tk, now)
	}
}

// has tells whether the reader holds unverified bytes of the object.
func (t *taints) has(k Key, reader string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if t.leftOrFull(k, now) {
		return true
	}
	l := t.alive(taintKey{k, reader}, now)
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bad || len(l.sums) > 0
}

// spoiled tells whether the reader holds bytes that nothing is known of.
func (t *taints) spoiled(k Key, reader string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if t.leftOrFull(k, now) {
		return true
	}
	l := t.alive(taintKey{k, reader}, now)
	return l != nil && l.isBad()
}

func (t *taints) leftOrFull(k Key, now time.Time) bool {
	return now.Before(t.full) || now.Before(t.left[k.Digest])
}
