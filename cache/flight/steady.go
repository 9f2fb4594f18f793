// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"
)

// steady is a body from one offset to the end of the object, asked for again
// where an answer breaks off or ends. It is for what passes through.
type steady struct {
	ctx   context.Context
	fetch Fetch
	now   *answer // what is read; nil after it broke off, and before the first
	size  int64   // -1: not known
	pos   int64
	want  int64 // where the reader of a relay is
	step  int64 // how much is asked for at a time; -1: all
	whole bool  // ranges are not to be had

	failures int
	reached  int64
}

func newSteady(ctx context.Context, fetch Fetch, a *answer) *steady {
	return &steady{ctx: ctx, fetch: fetch, now: a, size: a.Size, pos: a.Offset, step: -1}
}

// moveTo goes on at another byte, in another answer unless this one leads there and
// there is no shorter way.
func (s *steady) moveTo(to int64) {
	if s.now != nil && (to < s.pos || s.now.Offset > 0 || s.now.End > 0) {
		s.Close()
		s.now = nil
	}
	if s.now != nil {
		if _, err := io.CopyN(io.Discard, s.now.body, to-s.pos); err != nil {
			s.Close()
			s.now = nil
		}
	}
	s.pos, s.reached = to, to
}

func (s *steady) Read(p []byte) (int, error) {
	for {
		if s.size >= 0 && s.pos >= s.size {
			return 0, io.EOF
		}
		if s.now == nil {
			if err := s.askForMissing(); err != nil {
				return 0, err
			}
		}
		n, err := s.now.body.Read(p)
		s.pos += int64(n)
		if s.size >= 0 && s.pos >= s.size {
			return n, io.EOF // however the answer ends: there is nothing more to ask for
		}
		if err == nil || err == io.EOF && s.size < 0 {
			return n, err
		}
		// Only an answer that was to end here did not fail.
		if failed := err != io.EOF || s.pos != s.now.end(); failed && !s.backOff() {
			return n, err
		}
		s.Close()
		s.now = nil
		if n > 0 {
			return n, nil
		}
	}
}

// backOff counts a failure, and rests; it tells whether to try again.
func (s *steady) backOff() bool {
	if s.pos-s.reached >= goodProgress {
		s.reached, s.failures = s.pos, 0
	}
	if s.failures++; s.failures > maxFailures {
		return false
	}
	rest := min(firstRest<<(s.failures-1), lastRest)
	timer := time.NewTimer(rest/2 + rand.N(rest/2))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-s.ctx.Done():
		return false
	}
}

// askForMissing asks for what is missing.
func (s *steady) askForMissing() error {
	for {
		off, n := s.pos, s.step
		if s.whole {
			off, n = 0, -1
		}
		body, info, err := s.fetch(s.ctx, off, n)
		switch {
		case err == nil && (s.size >= 0 && info.Size != s.size || info.Offset != s.pos && info.Offset != 0):
			body.Close()
			return fmt.Errorf("%w: it had %d bytes, and has %d now", ErrBroken, s.size, info.Size)
		case err == nil:
			if _, err = io.CopyN(io.Discard, body, s.pos-info.Offset); err == nil {
				s.now = &answer{Info: info, body: body}
				return nil
			}
			body.Close()
		case errors.Is(err, ErrRange) && !s.whole:
			s.whole = true
			continue
		case errors.Is(err, ErrRefused), errors.Is(err, ErrRange):
			return err
		}
		if !s.backOff() {
			return fmt.Errorf("%w: after %d bytes: %w", ErrBroken, s.pos, err)
		}
	}
}

func (s *steady) Close() error {
	if s.now == nil {
		return nil
	}
	return s.now.body.Close()
}
