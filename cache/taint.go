// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// A reader who holds bytes that were never verified must not be given others of a
// flight or of a stored file that would make them look complete: a bad beginning and
// a good end are a wrong object. Where they were found to be wrong, or nothing is
// known of them, he is given no range of what passes through either.
const (
	// taintFor is how long that is remembered. Clients that resume do so within
	// seconds; what they would assemble is checked by themselves besides.
	taintFor = 60 * time.Second
	// maxTaints bounds the memory, at some 200 bytes each; past it, all readers of
	// ranges are refused until the oldest have gone.
	maxTaints = 1 << 17
)

// taints are who holds such bytes.
type taints struct {
	mu   sync.Mutex
	rows map[taintKey]taint
	full time.Time // until when everybody is tainted
	left map[digest.Digest]time.Time
}

type taintKey struct {
	Key
	reader string
}

type taint struct {
	until time.Time
	wrong bool // they are, or may be for all that is known
}

func newTaints() *taints {
	return &taints{rows: make(map[taintKey]taint), left: make(map[digest.Digest]time.Time)}
}

// add says that the reader holds unverified bytes, which may be wrong ones.
func (t *taints) add(k Key, reader string, wrong bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if len(t.rows) >= maxTaints {
		for tk, row := range t.rows {
			if now.After(row.until) {
				delete(t.rows, tk)
			}
		}
		if len(t.rows) >= maxTaints {
			t.full = now.Add(taintFor)
			return
		}
	}
	tk := taintKey{k, reader}
	before, known := t.rows[tk]
	t.rows[tk] = taint{now.Add(taintFor), wrong || known && before.wrong && now.Before(before.until)}
}

// addLeft says that anybody may hold bytes of a flight that ended with an
// earlier process.
func (t *taints) addLeft(d digest.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.left[d] = time.Now().Add(taintFor)
}

// has tells whether the reader holds unverified bytes of the object.
func (t *taints) has(k Key, reader string) bool {
	held, _ := t.of(k, reader)
	return held
}

// wrong tells whether they were found to be wrong, or nothing is known of them.
func (t *taints) wrong(k Key, reader string) bool {
	_, wrong := t.of(k, reader)
	return wrong
}

func (t *taints) of(k Key, reader string) (held, wrong bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if now.Before(t.full) || now.Before(t.left[k.Digest]) {
		return true, true
	}
	row, held := t.rows[taintKey{k, reader}]
	held = held && now.Before(row.until)
	return held, held && row.wrong
}
