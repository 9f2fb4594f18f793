// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"sync"
	"time"
)

// recent are objects of which something is remembered for a moment. It is a way to do
// better, and nothing depends on it: when there are too many, others are not
// remembered.
type recent map[Key]time.Time

const maxRecent = 1024

func (r recent) add(k Key, during time.Duration) {
	now := time.Now()
	if len(r) >= maxRecent {
		for k, until := range r {
			if now.After(until) {
				delete(r, k)
			}
		}
	}
	if len(r) < maxRecent {
		r[k] = now.Add(during)
	}
}

func (r recent) has(k Key) bool { return time.Now().Before(r[k]) }

// mixedFor is how long an object is fetched in one stream, after its bytes were not
// what the digest says.
const mixedFor = time.Minute

// noteMixed remembers that what came of an object was wrong. Parts may be of two
// generations, or of two endpoints that do not have the same, and only the digest
// tells: names and lengths may differ where the bytes are the same, and the other way
// round.
func (e *Engine) noteMixed(k Key) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.mixed.add(k, mixedFor)
}

// sourceFor is how long it is known of a source that it is slow, or bears few questions.
const sourceFor = 10 * time.Minute

// sources are those of which something is remembered for sourceFor.
type sources struct {
	mu sync.Mutex // taken after any other
	recent
}

func (s *sources) add(source string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recent.add(Key{Domain: source}, sourceFor)
}

func (s *sources) has(source string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.recent.has(Key{Domain: source})
}
