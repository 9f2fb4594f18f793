// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"sync"
)

// How many questions wait for a registry's headers at once is bounded, since
// each holds a connection: what is more waits for its turn, in its own time.
// One repository has a small part of what its registry has, so that a silent
// one keeps nobody from the others.

const (
	// maxPlaceQuestions are those about one repository. Forty layers of an
	// image, each in parts, are fewer.
	maxPlaceQuestions = 64
	// maxListedQuestions are those to one listed registry.
	maxListedQuestions = 1024
	// maxStrangersQuestions are those to all registries that are not listed.
	maxStrangersQuestions = 512
)

// slots are taken by sending, and given back by receiving.
type slots chan struct{}

func (s slots) enter(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s slots) leave() { <-s }

// gate is a registry's.
type gate struct {
	all slots

	mu     sync.Mutex
	places map[string]*place // by repository, while somebody asks or waits
}

type place struct {
	slots slots
	refs  int
}

// enter waits for a turn; the caller gives it back when the headers are there.
func (g *gate) enter(ctx context.Context, repository string) (leave func(), err error) {
	g.mu.Lock()
	p := g.places[repository]
	if p == nil {
		p = &place{slots: make(slots, maxPlaceQuestions)}
		g.places[repository] = p
	}
	p.refs++
	g.mu.Unlock()
	drop := func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if p.refs--; p.refs == 0 {
			delete(g.places, repository)
		}
	}
	if err := p.slots.enter(ctx); err != nil {
		drop()
		return nil, err
	}
	if err := g.all.enter(ctx); err != nil {
		p.slots.leave()
		drop()
		return nil, err
	}
	return func() {
		g.all.leave()
		p.slots.leave()
		drop()
	}, nil
}
