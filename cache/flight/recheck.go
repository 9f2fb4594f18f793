// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"fmt"

	"github.com/opencontainers/go-digest"
)

// A stored file that must be hashed before it goes out is read by a flight, whose
// source is the file itself, so that its readers are held to the same rule as those
// of a download; then the row vouches for it again, or it is dropped and fetched anew.

// recheck is the life of a flight whose source is its file.
func (f *flight) recheck(s *Suspect) {
	e := f.engine
	defer e.flying.Done()
	f.mu.Lock()
	f.state = filling
	f.changed.Broadcast()
	for f.disk == nil && f.hashed < f.size && f.ctx.Err() == nil {
		f.hashPiece()
	}
	unread := f.disk
	f.mu.Unlock()
	switch {
	case f.ctx.Err() != nil:
		f.end(failed, ErrClosed)
	case unread != nil:
		e.store.NoteTrouble(unread)
		f.drop(s, unread)
	case digest.NewDigest(f.key.Digest.Algorithm(), f.hash) != f.key.Digest:
		f.drop(s, ErrChanged)
	default:
		f.mu.Lock()
		f.state = verified
		f.changed.Broadcast()
		f.mu.Unlock()
		f.leaveTable() // before it waits: who comes now looks at the file again
		s.Hashed(true)
		f.cancel()
	}
}

// drop ends a flight whose file is not what it should be, after the file. Nobody is
// fed any more before ranges are refused: see end.
func (f *flight) drop(s *Suspect, cause error) {
	f.mu.Lock()
	f.state = ending
	f.mu.Unlock()
	s.Hashed(false)
	f.end(failed, fmt.Errorf("%w: %w", ErrChanged, cause))
}
