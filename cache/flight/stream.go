// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"
)

// stream is an upstream body of one reader's own, for what cannot be stored.
// Everything passes through the hash, from byte 0 on; what the reader did not
// ask for is thrown away. The last tailHold bytes do not leave before the digest
// matched. It reads forward only.
type stream struct {
	engine *Engine
	key    Key
	size   int64 // -1 until the end

	body       io.ReadCloser
	onVerified func() // Request.Verified
	onWrong    func() // Request.Wrong
	cancel     context.CancelFunc
	hash       hash.Hash // of all bytes up to start+len(buf)
	buf        []byte    // hashed, not given out
	start      int64     // offset of buf[0]
	pos        int64     // next byte the reader wants
	verified   bool
	wrong      bool // the bytes are not the object's, as opposed to not all of them
	err        error
	gave       bool // the reader has bytes of this object
	alone      bool // nobody else is refused anything for what this one brings, see Pass
	once       sync.Once
}

// newStream starts from the state h that the hash has at byte at. It fails with
// ErrDropped where the reader wants no beginning, and may hold a wrong one.
func newStream(e *Engine, req Request, h hash.Hash, at, size int64) (*stream, error) {
	if e.dropped.refuses(req.Key, req.Offset) {
		return nil, ErrDropped
	}
	return &stream{engine: e, key: req.Key, size: size, hash: h, start: at, onVerified: req.Verified, onWrong: req.Wrong}, nil
}

// setBody gives the stream its body, and what ends its context.
func (s *stream) setBody(body io.ReadCloser, cancel context.CancelFunc) {
	s.body, s.cancel = body, cancel
}

// preload starts the stream with n bytes of a file, from off on, which the
// hash has seen already.
func (s *stream) preload(file io.ReaderAt, off, n int64) error {
	s.buf, s.start = make([]byte, n), off
	_, err := io.ReadFull(io.NewSectionReader(file, off, n), s.buf)
	return err
}

// cloneHash copies the state of a hash.
func cloneHash(h hash.Hash) (hash.Hash, error) {
	c, ok := h.(hash.Cloner)
	if !ok {
		return nil, errors.New("the hash cannot be copied")
	}
	return c.Clone()
}

// interrupt ends a Read that waits for the upstream. Any goroutine may call it.
func (s *stream) interrupt() { s.cancel() }

// Close ends the stream.
func (s *stream) Close() {
	s.once.Do(func() {
		if s.cancel != nil {
			s.cancel()
			s.body.Close()
		}
		if s.wrong && s.onWrong != nil {
			s.onWrong()
		}
		if s.wrong && s.gave && !s.alone {
			s.engine.dropped.add(s.key)
		}
	})
}

// Seek implements io.Seeker; reading goes forward only.
func (s *stream) Seek(offset int64, whence int) (int64, error) {
	pos, err := seek(s.pos, s.size, offset, whence)
	if err == nil {
		s.pos = pos
	}
	return pos, err
}

// ready is how much of buf may leave.
func (s *stream) ready() int {
	if s.verified {
		return len(s.buf)
	}
	return int(max(0, heldBack(s.start+int64(len(s.buf)), s.size)-s.start))
}

func (s *stream) Read(p []byte) (int, error) {
	if s.pos < s.start {
		return 0, errors.New("a stream cannot be read backwards")
	}
	for s.err == nil {
		skip := min(int(min(s.pos-s.start, int64(len(s.buf)))), s.ready())
		s.consume(skip)
		if ready := s.ready(); ready > 0 && s.start == s.pos {
			n := copy(p, s.buf[:ready])
			s.consume(n)
			s.pos += int64(n)
			s.gave = true
			return n, nil
		}
		if s.verified {
			return 0, io.EOF
		}
		s.err = s.readMore()
	}
	return 0, s.err
}

func (s *stream) consume(n int) {
	s.buf = s.buf[n:]
	s.start += int64(n)
}

// verifyAll reads an object that is held back altogether to its end.
func (s *stream) verifyAll() error {
	for !s.verified && s.err == nil {
		s.err = s.readMore()
	}
	return s.err
}

// readMore reads a piece, and checks what can be checked.
func (s *stream) readMore() error {
	chunk := make([]byte, 64<<10)
	n, err := s.body.Read(chunk)
	s.hash.Write(chunk[:n])
	s.buf = append(s.buf, chunk[:n]...)
	at := s.start + int64(len(s.buf))
	if s.size >= 0 && at > s.size {
		s.wrong = true
		return fmt.Errorf("%w: more than the %d bytes announced", ErrBroken, s.size)
	}
	switch {
	case err == nil:
		return nil
	case err != io.EOF:
		return fmt.Errorf("%w: after %d bytes: %w", ErrBroken, at, err)
	case s.size >= 0 && at < s.size:
		return fmt.Errorf("%w: %d bytes of the %d announced", ErrBroken, at, s.size)
	}
	if got := digest.NewDigest(s.key.Digest.Algorithm(), s.hash); got != s.key.Digest {
		s.wrong = true
		return fmt.Errorf("%w: the bytes are %s, not %s", ErrBroken, got, s.key.Digest)
	}
	s.size, s.verified = at, true
	if s.onVerified != nil {
		s.onVerified()
	}
	return nil
}

// openStream gives the reader a stream of its own, over an answer if there is one that
// begins at byte 0.
func (e *Engine) openStream(ctx context.Context, req Request, own ownAnswer) (*Object, error) {
	if own.answer != nil && own.Offset > 0 {
		own.close()
		own.answer = nil
	}
	if own.answer == nil {
		var err error
		if own, err = e.askSource(ctx, req, 0, -1); err != nil {
			return nil, err
		}
	}
	s, err := newStream(e, req, req.Digest.Algorithm().Hash(), 0, own.Size)
	if err != nil {
		own.close()
		return nil, err
	}
	s.setBody(newSteady(own.ctx, req.Fetch, own.answer), own.cancel)
	if size := own.Size; size >= 0 && size <= tailHold {
		// As with a flight: what is held back altogether is verified before
		// there is an answer.
		stop := context.AfterFunc(ctx, s.interrupt)
		err := s.verifyAll()
		if !stop() && err != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			s.Close()
			return nil, err
		}
	}
	return &Object{Size: own.Size, Source: Passed, Content: s, close: s.Close, interrupt: s.interrupt}, nil
}
