// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"strings"
	"sync"
	"time"

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
// once; with one, after gatherFor, so that a burst shares the second; with two,
// when one of them has come back.
type freshness struct {
	ask func(ctx context.Context, key headKey, sequence uint64) (*confirmation, error)

	// mu guards what follows, and the batches' membership.
	mu       sync.Mutex
	queues   map[headKey]*headQueue
	sequence uint64 // of the last HEAD that was handed over
	asking   sync.WaitGroup
}

type headQueue struct {
	inFlight  int
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
)

// confirm returns what the authority says now, and whether the HEAD was shared.
// It returns early with the context's error; the HEAD goes on for the others.
func (f *freshness) confirm(ctx context.Context, life context.Context, key headKey) (c *confirmation, shared bool, err error) {
	b := f.enter(life, key)
	select {
	case <-b.done:
		return b.answer, b.size > 1, b.err
	case <-ctx.Done():
		return nil, false, context.Cause(ctx)
	}
}

// enter puts the request into the batch that gathers.
func (f *freshness) enter(life context.Context, key headKey) *headBatch {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := f.queues[key]
	if q == nil {
		q = &headQueue{}
		f.queues[key] = q
	}
	if b := q.gathering; b != nil {
		b.size++
		return b
	}
	b := &headBatch{done: make(chan struct{}), size: 1}
	q.gathering = b
	switch {
	case q.inFlight == 0:
		f.send(life, key, q)
	case q.inFlight < maxHeads:
		b.timer = time.AfterFunc(gatherFor, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if q.gathering == b && q.inFlight < maxHeads {
				f.send(life, key, q)
			}
		})
	}
	return b
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
	go func() {
		defer f.asking.Done()
		b.answer, b.err = f.ask(life, key, sequence)
		close(b.done)
		f.mu.Lock()
		defer f.mu.Unlock()
		q.inFlight--
		switch {
		case q.gathering != nil:
			// Those who gathered came after this HEAD went out. A slot is
			// free for them now.
			f.send(life, key, q)
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
