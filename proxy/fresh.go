// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"strings"
	"sync"
	"time"

	"tarn/index"

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
	tag  index.Tag // as it was noted
}

// headKey is who may share one HEAD: the same question with the same
// credential.
type headKey struct {
	upstream, repository, tag, accept string
	credential                        credential
}

// freshness is group commit for HEADs. A request may use only a HEAD that was
// handed to the transport after the request arrived, for the tag may have
// moved in between; so a HEAD that is on its way is never joined, and who
// comes while it is gathers for the next.
//
//	request ──> gathering ──(closed, then numbered and sent)──> in flight ──> answer
//
// At most maxHeads of a key are in flight. With none there, a HEAD goes out at
// once, unless the last one was a crowd's, whose next requests are on their way;
// with one, after a pause, so that a burst shares the second; with two, when one
// of them has come back. The pause is short against the time that a HEAD takes.
type freshness struct {
	ask func(ctx context.Context, key headKey, sequence uint64) (*confirmation, error)

	// mu guards what follows, and the batches' membership.
	mu       sync.Mutex
	queues   map[headKey]*headQueue
	crowds   map[headKey]time.Duration // how long the HEAD of a crowd took; at most maxCrowds
	sequence uint64                    // of the last HEAD that was handed over
	asking   sync.WaitGroup
}

type headQueue struct {
	inFlight  int
	answered  int        // HEADs that were not in vain
	gathering *headBatch // nil: nobody waits for the next
}

// headBatch is one HEAD and all that wait for it.
type headBatch struct {
	timer *time.Timer   // closes the gathering; nil when a slot must be freed first
	done  chan struct{} // closed when the answer is in
	size  int           // requests

	answer *confirmation
	err    error
}

const (
	maxHeads  = 2
	gatherFor = 500 * time.Microsecond
	// A HEAD that takes longer is worth waiting longer for, an eighth of it:
	// who misses one waits for all of the next.
	gatherShare = 8
	maxGather   = 5 * time.Millisecond
	// crowd is how many requests make one.
	crowd     = 8
	maxCrowds = 1024
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
		return nil, false, context.Cause(asking)
	}
	select {
	case <-b.done:
		return b.answer, b.size > 1, b.err
	case <-ctx.Done():
		return nil, false, context.Cause(ctx)
	}
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
		return q, b, q.answered
	}
	b = &headBatch{done: make(chan struct{}), size: 1}
	q.gathering = b
	if _, crowded := f.crowds[key]; q.inFlight == 0 && !crowded {
		f.send(life, key, q)
	} else if q.inFlight < maxHeads {
		f.sendLater(life, key, q)
	}
	return q, b, q.answered
}

// sendLater closes the batch that gathers in a little while. Called with the
// lock, while there is a slot.
func (f *freshness) sendLater(life context.Context, key headKey, q *headQueue) {
	b := q.gathering
	b.timer = time.AfterFunc(min(max(gatherFor, f.crowds[key]/gatherShare), maxGather), func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if q.gathering == b && q.inFlight < maxHeads {
			f.send(life, key, q)
		}
	})
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
	f.sequence++
	sequence := f.sequence
	f.asking.Add(1)
	sent := time.Now()
	go func() {
		defer f.asking.Done()
		b.answer, b.err = f.ask(life, key, sequence)
		f.mu.Lock()
		defer f.mu.Unlock()
		f.pace(key, b.size, time.Since(sent))
		close(b.done)
		q.inFlight--
		if b.err == nil {
			q.answered++
		}
		_, crowded := f.crowds[key]
		switch {
		case q.gathering != nil && q.gathering.timer == nil && !crowded:
			// Those who gathered came after this HEAD went out. A slot is
			// free for them now.
			f.send(life, key, q)
		case q.gathering != nil && q.gathering.timer == nil:
			f.sendLater(life, key, q) // with those who have just been answered
		case q.gathering != nil:
		case q.inFlight == 0:
			delete(f.queues, key)
		}
	}()
}

// pace remembers a crowd. Called with the lock.
func (f *freshness) pace(key headKey, size int, took time.Duration) {
	if size < crowd {
		delete(f.crowds, key)
		return
	}
	if len(f.crowds) >= maxCrowds {
		clear(f.crowds)
	}
	f.crowds[key] = took
}

// acceptKey is the Accept lines as one string.
func acceptKey(lines []string) string { return strings.Join(lines, "\n") }

func acceptLines(key string) []string {
	if key == "" {
		return nil
	}
	return strings.Split(key, "\n")
}
