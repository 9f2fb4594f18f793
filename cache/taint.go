// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// taintFor is how long a reader is kept from joining a later generation's
// bytes to those of a broken one. Clients that resume do so within seconds;
// what they would assemble is checked by themselves besides.
const taintFor = 60 * time.Second

// maxTaints bounds the memory: 65,536 of about 200 bytes. Past it, all readers
// of ranges are refused until the oldest have gone; to get there takes
// thousands of broken downloads a minute.
const maxTaints = 1 << 16

// promise is what a stream had read when its reader left before the digest
// could be checked: a later stream of the same object to the same reader must
// begin with the same bytes.
type promise struct {
	length int64
	sum    string
}

// taints remember which readers hold bytes that were never verified.
type taints struct {
	mu    sync.Mutex
	rows  map[taintKey][]taintRow
	count int
	full  time.Time // until when everybody is tainted
	left  map[digest.Digest]time.Time
}

type taintKey struct {
	Key
	reader string
}

type taintRow struct {
	until   time.Time
	promise promise // length 0: the bytes are known to be bad, or not known at all
}

func newTaints() *taints {
	return &taints{rows: make(map[taintKey][]taintRow), left: make(map[digest.Digest]time.Time)}
}

// add says that the reader holds unverified bytes; p is empty when nothing is
// known of them.
func (t *taints) add(k Key, reader string, p promise) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if t.count >= maxTaints {
		t.expire(now)
	}
	if t.count >= maxTaints {
		t.full = now.Add(taintFor)
		return
	}
	tk := taintKey{k, reader}
	t.rows[tk] = append(t.rows[tk], taintRow{until: now.Add(taintFor), promise: p})
	t.count++
}

// addLeft says that anybody may hold bytes of a flight that ended with an
// earlier process.
func (t *taints) addLeft(d digest.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.left[d] = time.Now().Add(taintFor)
}

func (t *taints) expire(now time.Time) {
	for k, rows := range t.rows {
		if kept := t.alive(k, rows, now); len(kept) > 0 {
			t.rows[k] = kept
		}
	}
}

// alive drops what has ended of one reader's rows.
func (t *taints) alive(k taintKey, rows []taintRow, now time.Time) []taintRow {
	kept := rows[:0]
	for _, r := range rows {
		if now.Before(r.until) {
			kept = append(kept, r)
		}
	}
	t.count -= len(rows) - len(kept)
	if len(kept) == 0 {
		delete(t.rows, k)
		return nil
	}
	return kept
}

// has tells whether the reader holds unverified bytes of the object.
func (t *taints) has(k Key, reader string) bool {
	bad, promises := t.of(k, reader)
	return bad || len(promises) > 0
}

// of returns what the reader holds: bytes that nothing can be said of, or
// prefixes that a stream can be compared with.
func (t *taints) of(k Key, reader string) (bad bool, promises []promise) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if now.Before(t.full) || now.Before(t.left[k.Digest]) {
		return true, nil
	}
	tk := taintKey{k, reader}
	rows := t.rows[tk]
	if len(rows) == 0 {
		return false, nil
	}
	rows = t.alive(tk, rows, now)
	if len(rows) > 0 {
		t.rows[tk] = rows
	}
	for _, r := range rows {
		if r.promise.length == 0 {
			bad = true
		} else {
			promises = append(promises, r.promise)
		}
	}
	return bad, promises
}
