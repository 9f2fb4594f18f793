// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tarn/index"
	"tarn/rights"

	"github.com/opencontainers/go-digest"
)

// confirmation is what the authority says of a tag, as of a question that was
// sent after the request arrived.
type confirmation struct {
	digest    digest.Digest
	size      int64
	mediaType string
	// body is the manifest itself, when the authority had to be asked with
	// GET to know the rest.
	body []byte

	evidence rights.Evidence
	yes      rights.Yes // what it makes
	stored   bool       // it was, when a HEAD was answered
	asked    string     // by which method
	// before is what the tag meant, as far as was known, if that was something else.
	before digest.Digest
	row    index.Tag
}

// headKey is who may share one question: those who ask the same with the same
// credential. A HEAD's last word is the answer to a HEAD, a GET's is that to a
// GET, and so they are not shared.
type headKey struct {
	method                            string
	manifest                          bool // the manifest itself is asked for at once
	upstream, repository, tag, accept string
	credential                        rights.Credential
}

// freshness is group commit for HEADs. A request may use only a HEAD that was
// handed to the transport after the request arrived, for the tag may have
// moved in between; so a HEAD that is on its way is never joined, and who
// comes while it is gathers for the next.
//
//	request ──> gathering ──(closed, then numbered and sent)──> in flight ──> answer
//
// At most maxHeads of a key are in flight. With none there, a HEAD goes out at
// once; with one, after a pause, so that a burst shares the second; with two,
// when one of them has come back. A HEAD that nobody waits for any more is
// called off.
type freshness struct {
	ask      func(ctx context.Context, key headKey, sequence uint64) (*confirmation, error)
	sequence *atomic.Uint64 // of the last HEAD that was handed over

	// mu guards what follows, and the batches' membership.
	mu     sync.Mutex
	queues map[headKey]*headQueue
	asking sync.WaitGroup
}

type headQueue struct {
	inFlight  int
	answered  int           // HEADs that were not in vain
	took      time.Duration // the last one, from being sent to its answer
	gathering *headBatch    // nil: nobody waits for the next
}

// headBatch is one HEAD and all that wait for it.
type headBatch struct {
	timer   *time.Timer        // closes the gathering; nil when a slot must be freed first
	done    chan struct{}      // closed when the answer is in
	size    int                // requests
	waiting int                // those that have not left
	cancel  context.CancelFunc // of what is in flight; nil before

	answer *confirmation
	err    error
}

const (
	maxHeads = 2
	// A gathering is short against the time that a HEAD takes: an eighth of
	// what the last one took, within these. A crowd that a HEAD has answered
	// comes back over some milliseconds, and who is not in the next one waits
	// for the one after it.
	gatherFor     = 500 * time.Microsecond
	gatherForMost = 5 * time.Millisecond
)

// confirm returns what the authority says now, and whether the HEAD was shared.
// It returns early with the context's error; the HEAD goes on for the others. It
// returns when asking ends, too, unless it is its turn that the request waits
// for, with an authority that answers.
func (f *freshness) confirm(asking, ctx, life context.Context, key headKey) (c *confirmation, shared bool, err error) {
	q, b, answered := f.enter(life, key)
	select {
	case <-b.done:
		return b.answer, b.size > 1, b.err
	case <-asking.Done():
	}
	f.mu.Lock()
	answers := q.answered > answered
	f.mu.Unlock()
	if !answers {
		f.leave(key, q, b)
		return nil, false, context.Cause(asking)
	}
	select {
	case <-b.done:
		return b.answer, b.size > 1, b.err
	case <-ctx.Done():
		f.leave(key, q, b)
		return nil, false, context.Cause(ctx)
	}
}

// number is for a question that follows a HEAD of a batch.
func (f *freshness) number() uint64 {
	return f.sequence.Add(1)
}

// enter puts the request into the batch that gathers, and returns how many
// answers there were before.
func (f *freshness) enter(life context.Context, key headKey) (q *headQueue, b *headBatch, answered int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	q = f.queues[key]
	if q == nil {
		q = &headQueue{}
		f.queues[key] = q
	}
	if b := q.gathering; b != nil {
		b.size++
		b.waiting++
		return q, b, q.answered
	}
	b = &headBatch{done: make(chan struct{}), size: 1, waiting: 1}
	q.gathering = b
	switch {
	case q.inFlight == 0:
		f.send(life, key, q)
	case q.inFlight < maxHeads:
		b.timer = time.AfterFunc(min(max(q.took/8, gatherFor), gatherForMost), func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if q.gathering == b && q.inFlight < maxHeads {
				f.send(life, key, q)
			}
		})
	}
	return q, b, q.answered
}

// leave takes a request out of its batch. The last one calls it off.
func (f *freshness) leave(key headKey, q *headQueue, b *headBatch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b.waiting--; b.waiting > 0 {
		return
	}
	if b.cancel != nil {
		b.cancel()
		return
	}
	if b.timer != nil {
		b.timer.Stop()
	}
	q.gathering = nil
	if q.inFlight == 0 {
		delete(f.queues, key)
	}
}

// send closes the batch that gathers, numbers it and hands it over. Called
// with the lock; from here on nobody joins it.
func (f *freshness) send(life context.Context, key headKey, q *headQueue) {
	b := q.gathering
	q.gathering = nil
	if b.timer != nil {
		b.timer.Stop()
	}
	q.inFlight++
	sequence := f.sequence.Add(1)
	ctx, cancel := context.WithCancel(life)
	b.cancel = cancel
	f.asking.Add(1)
	go func() {
		defer f.asking.Done()
		defer cancel()
		sent := time.Now()
		b.answer, b.err = f.ask(ctx, key, sequence)
		f.mu.Lock()
		defer f.mu.Unlock()
		q.took = time.Since(sent)
		close(b.done)
		q.inFlight--
		if b.err == nil {
			q.answered++
		}
		switch {
		case q.gathering != nil && q.gathering.timer == nil:
			// Those who gathered came after this HEAD went out. A slot is
			// free for them now.
			f.send(life, key, q)
		case q.gathering != nil:
		case q.inFlight == 0:
			delete(f.queues, key)
		}
	}()
}

// acceptKey is the Accept lines as one string.
func acceptKey(lines []string) string { return strings.Join(lines, "\n") }

func acceptLines(key string) []string {
	if key == "" {
		return nil
	}
	return strings.Split(key, "\n")
}
