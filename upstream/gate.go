// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"sync"
)

// How many questions wait for a registry's headers at once is bounded, since
// each holds a connection: what is more waits for its turn, in its own time.
// One repository has a small part of what its registry has, so that a silent
// one keeps nobody from the others, and the first of each repository is not
// counted, so that neither do very many.

const (
	// maxPlaceQuestions are those about one repository. Forty layers of an
	// image, each in parts, are fewer.
	maxPlaceQuestions = 64
	// maxListedQuestions are those to one listed registry.
	maxListedQuestions = 1024
	// maxStrangersQuestions are those to all registries that are not listed, and
	// maxStrangerQuestions those to one.
	maxStrangersQuestions = 512
	maxStrangerQuestions  = maxStrangersQuestions / 4
	// freeQuestions of each repository are not counted.
	freeQuestions = 2
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
	own slots // the registry's; nil where only all counts
	all slots

	mu     sync.Mutex
	places map[string]*place // by repository, while somebody asks or waits
}

type place struct {
	slots slots
	refs  int
}

// inFlight is how many questions wait for headers, or for their turn.
func (g *gate) inFlight() (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.places {
		n += p.refs
	}
	return n
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
	counted := []slots{p.slots}
	leave = func() {
		for _, s := range counted {
			s.leave()
		}
		drop()
	}
	if len(p.slots) <= freeQuestions {
		return leave, nil
	}
	for _, s := range []slots{g.own, g.all} {
		if s == nil {
			continue
		}
		if err := s.enter(ctx); err != nil {
			leave()
			return nil, err
		}
		counted = append(counted, s)
	}
	return leave, nil
}
