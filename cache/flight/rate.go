// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"context"
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
	return f.watch(w, slowFor, func(brought int64) bool {
		if brought < slowBytes && len(f.waiting) > 0 && f.elsewhere(w, a) {
			w.slow = true
			f.givenUp++
			a.giveUp(errSlow)
			return false
		}
		return true
	})
}

// watch looks again and again at how many bytes a worker has brought in that time, as
// long as look says so and until it is stopped. look is called with the lock.
func (f *flight) watch(w *worker, during time.Duration, look func(brought int64) bool) (stop func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	last, stopped := w.pos, false
	var timer *time.Timer
	timer = time.AfterFunc(during, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if stopped || !look(w.pos-last) {
			return
		}
		last = w.pos
		timer.Reset(during)
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

// One answer or several. Where a source is slower than what is done with its bytes,
// several answers at once come sooner than one. Where it is not they come no sooner, and
// out of order, so that they must be read again to be hashed: one answer at a time does,
// with all that is left. (Where the right may end all is asked for at once, in parts,
// and these are read one after the other.) Nothing is known of a source at first: it has
// one, and is weighed.

const (
	// weighEvery is after how many reads a worker is weighed: each tells little, since
	// one may wait for a core and not for the source.
	weighEvery = 24
	// stallBytes in stallFor are what an answer brings unless it stalls.
	stallBytes = 64 << 10
	stallFor   = 100 * time.Millisecond
)

// pace is of how many reads since it was weighed a worker waited longer for the source
// than it worked with their bytes.
type pace struct{ reads, late int }

// weigh adds a read, and finds out when the source is the slower one, in three of four
// reads. To work is to write the bytes and to hash them.
func (f *flight) weigh(p *pace, waited, worked time.Duration) {
	if p.reads++; waited > worked {
		p.late++
	}
	if p.reads < weighEvery {
		return
	}
	if p.late > p.reads*3/4 {
		f.mu.Lock()
		f.askSeveral()
		f.mu.Unlock()
	}
	*p = pace{}
}

// watchStall is weigh for an answer of which nothing comes, until it is stopped.
func (f *flight) watchStall(w *worker) (stop func()) {
	f.mu.Lock()
	decided := f.several || f.most == 1
	f.mu.Unlock()
	if decided {
		return func() {}
	}
	return f.watch(w, stallFor, func(brought int64) bool {
		if brought < stallBytes {
			f.askSeveral()
		}
		return !f.several
	})
}

// askSeveral has more than one answer asked for at once from now on. Called with the
// lock.
func (f *flight) askSeveral() {
	if f.several || f.most == 1 {
		return
	}
	f.several = true
	f.engine.slow.add(f.source)
	f.changed.Broadcast()
	f.work.Broadcast()
}

// awaitTurn has a worker wait that was asked for ahead, until its bytes are next: the
// connection holds them. It waits for nobody but who brings what comes before: where that
// one breaks off, the gap may be given to nobody until this worker has ended.
func (f *flight) awaitTurn(w *worker) {
	stop := context.AfterFunc(f.ctx, f.wakeAll)
	defer stop()
	f.mu.Lock()
	defer f.mu.Unlock()
	for w.inOrder && !f.several && w.pos > f.hashed && f.comesBefore(w) && f.ctx.Err() == nil {
		f.changed.Wait()
	}
}

// comesBefore tells whether somebody brings the first byte that is not there before the
// worker's. Called with the lock.
func (f *flight) comesBefore(w *worker) bool {
	next := f.filled.reach(f.hashed)
	if next >= w.pos {
		return true // it is to be hashed
	}
	for other := range f.workers {
		if other.pos <= next && next < other.end {
			return true
		}
	}
	return false
}
