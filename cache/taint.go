// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"maps"
	"sync"
	"time"

	"tarn/cache/store"
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
	// ranges are refused until the oldest have gone. What registries that are not
	// listed send has a bound of its own, one in store.StrangersShare, and refuses nobody
	// else.
	maxTaints = 1 << 17
	// maxFed bounds the readers of one flight that are known by name. Past it anybody
	// may have read of that object.
	maxFed = 4096
)

// taints are who holds such bytes.
type taints struct {
	mu     sync.Mutex
	listed taintRows
	others taintRows         // of registries that are not listed
	left   map[Key]time.Time // of everybody; without a domain it is of all domains
}

// taintRows are those of one kind of source domain.
type taintRows struct {
	rows map[taintKey]taint
	most int
	full time.Time // until when everybody is tainted
}

func (t *taints) of(k Key) *taintRows {
	if k.Domain == ListedDomain {
		return &t.listed
	}
	return &t.others
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
	return &taints{
		listed: taintRows{rows: make(map[taintKey]taint), most: maxTaints},
		others: taintRows{rows: make(map[taintKey]taint), most: maxTaints / store.StrangersShare},
		left:   make(map[Key]time.Time),
	}
}

// add says that the reader holds unverified bytes, which may be wrong ones.
func (t *taints) add(k Key, reader string, wrong bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, r := time.Now(), t.of(k)
	if len(r.rows) >= r.most {
		for tk, row := range r.rows {
			if now.After(row.until) {
				delete(r.rows, tk)
			}
		}
		if len(r.rows) >= r.most {
			r.full = now.Add(taintFor)
			return
		}
	}
	tk := taintKey{k, reader}
	before, known := r.rows[tk]
	r.rows[tk] = taint{now.Add(taintFor), wrong || known && before.wrong && now.Before(before.until)}
}

// addLeft says that anybody may hold bytes of a flight, one that ended with an
// earlier process, whose domain is not known, or that had very many readers.
func (t *taints) addLeft(k Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(t.left, func(_ Key, until time.Time) bool { return now.After(until) })
	t.left[k] = now.Add(taintFor)
}

// has tells whether the reader holds unverified bytes of the object.
func (t *taints) has(k Key, reader string) bool {
	held, _ := t.holds(k, reader)
	return held
}

// wrong tells whether they were found to be wrong, or nothing is known of them.
func (t *taints) wrong(k Key, reader string) bool {
	_, wrong := t.holds(k, reader)
	return wrong
}

func (t *taints) holds(k Key, reader string) (held, wrong bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, r := time.Now(), t.of(k)
	if now.Before(r.full) || now.Before(t.left[k]) || now.Before(t.left[Key{Digest: k.Digest}]) {
		return true, true
	}
	row, held := r.rows[taintKey{k, reader}]
	held = held && now.Before(row.until)
	return held, held && row.wrong
}
