// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"errors"
	"time"
)

// A source that gives a byte each few seconds never fails, and everybody who wants the
// object waits for it. So while somebody waits, and there is another way to ask, by
// another reader's right or at another endpoint, what comes too slowly is given up for
// that. With nobody else to ask, a slow body is borne.
const (
	// slowBytes in slowFor are what a body must bring: 13 KB a second, which a modem
	// has, and no link that images are pulled over.
	slowBytes = 64 << 10
	slowFor   = 5 * time.Second
	// maxGivenUp is how many bodies a flight gives up: where all are slow, it is the
	// link.
	maxGivenUp = 4
)

var errSlow = errors.New("too slow, and others can be asked")

// watchRate gives up what a worker brings when it is too slow, until it is stopped.
func (f *flight) watchRate(w *worker, a *answer) (stop func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	last, stopped := w.pos, false
	var timer *time.Timer
	timer = time.AfterFunc(slowFor, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if stopped {
			return
		}
		if w.pos-last < slowBytes && len(f.waiting) > 0 && f.elsewhere(w, a) {
			w.slow = true
			f.givenUp++
			a.giveUp(errSlow)
			return
		}
		last = w.pos
		timer.Reset(slowFor)
	})
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		stopped = true
		timer.Stop()
	}
}

// elsewhere tells whether the flight can ask in another way. Called with the lock.
func (f *flight) elsewhere(w *worker, a *answer) bool {
	if f.givenUp >= maxGivenUp {
		return false
	}
	for _, t := range f.tickets {
		if t != w.ticket && !t.refused && !t.slow {
			return true
		}
	}
	return a.Elsewhere != nil && a.Elsewhere()
}
