// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"sync"
	"time"

	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// A source that sent wrong bytes of an object is likely to send them again: a mirror
// that kept a broken copy, a front that answers with a page. So for a while the other
// places of its upstream are asked for that object before it, see sources.go. It is
// never left out: where no other has the object, it is asked at once, and may have
// healed.
//
// Whose bytes were wrong is known of a download from one place. Where several
// brought parts, each is counted at the same moment, which leaves the usual order; the
// next download is in one stream, and tells.
//
// Nobody can have a place asked later but for a digest of which it sent him wrong
// bytes, and of an upstream with one endpoint nothing is remembered, so that no
// registry that is not listed takes room here.

const (
	// wrongFor: about as long as a mirror takes to be mended, or to drop the copy.
	wrongFor = 10 * time.Minute
	// maxWrong bounds what is remembered of each upstream, at some 200 bytes each.
	// Past it the oldest is forgotten.
	maxWrong = 1024
)

// wrongs are the places that sent wrong bytes, and of what. Each upstream has its
// own, and cannot have another's forgotten. The zero value is empty.
type wrongs struct {
	mu    sync.Mutex
	until map[upstream.Name]map[wrong]time.Time
}

// wrong is a place, whatever credential it was shown, and an object.
type wrong struct {
	place  string
	digest digest.Digest
}

// add remembers that the place sent wrong bytes.
func (s *wrongs) add(name upstream.Name, w wrong, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	of := s.until[name]
	if of == nil {
		if s.until == nil {
			s.until = make(map[upstream.Name]map[wrong]time.Time)
		}
		of = make(map[wrong]time.Time)
		s.until[name] = of
	}
	if _, known := of[w]; !known && len(of) >= maxWrong {
		oldest, first := w, now.Add(wrongFor)
		for old, until := range of {
			if until.Before(first) {
				oldest, first = old, until
			}
		}
		delete(of, oldest)
	}
	of[w] = now.Add(wrongFor)
}

// last is until when the place is asked last for the object; the zero Time where it
// is not.
func (s *wrongs) last(name upstream.Name, w wrong, now time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if until := s.until[name][w]; now.Before(until) {
		return until
	}
	return time.Time{}
}
