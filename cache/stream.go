// SPDX-License-Identifier: Apache-2.0

package cache

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
// ask for is thrown away, and the last tailHold bytes are kept until the
// digest matched. It reads forward only.
type stream struct {
	cache  *Cache
	key    Key
	reader string
	size   int64 // -1 until the end

	body     io.ReadCloser
	cancel   context.CancelFunc
	hash     hash.Hash // of all bytes up to start+len(buf)
	buf      []byte    // hashed, not given out
	start    int64     // offset of buf[0]
	pos      int64     // next byte the reader wants
	verified bool
	wrong    bool // the bytes are not the object's, as opposed to not all of them
	err      error
	gave     bool // the reader has bytes of this object
	promises []promise
	once     sync.Once
}

func newStream(c *Cache, k Key, reader string, h hash.Hash, info Info) *stream {
	return &stream{cache: c, key: k, reader: reader, size: info.Size, hash: h, start: info.Offset}
}

// take gives the stream its body, and what ends the context behind it.
func (s *stream) take(body io.ReadCloser, cancel context.CancelFunc) {
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

// Close ends the stream. A reader that has bytes which were not verified is
// remembered, with what they were.
func (s *stream) Close() {
	s.once.Do(func() {
		s.cancel()
		s.body.Close()
		if !s.gave || s.verified {
			return
		}
		p := promise{}
		if !s.wrong {
			p = promise{length: s.start + int64(len(s.buf)), sum: string(s.hash.Sum(nil))}
		}
		s.cache.taint.add(s.key, s.reader, p)
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
	end := s.start + int64(len(s.buf))
	if s.size >= 0 {
		end = min(end, s.size-tailHold)
	} else {
		end -= tailHold
	}
	return int(max(0, end-s.start))
}

func (s *stream) Read(p []byte) (int, error) {
	if s.pos < s.start {
		return 0, errors.New("a stream cannot be read backwards")
	}
	for s.err == nil {
		skip := min(int(min(s.pos-s.start, int64(len(s.buf)))), s.ready())
		s.drop(skip)
		if ready := s.ready(); ready > 0 && s.start == s.pos {
			n := copy(p, s.buf[:ready])
			s.drop(n)
			s.pos += int64(n)
			s.gave = true
			return n, nil
		}
		if s.verified {
			return 0, io.EOF
		}
		s.err = s.more()
	}
	return 0, s.err
}

func (s *stream) drop(n int) {
	s.buf = s.buf[:copy(s.buf, s.buf[n:])]
	s.start += int64(n)
}

// verifyAll reads an object that is held back altogether to its end.
func (s *stream) verifyAll() error {
	for !s.verified && s.err == nil {
		s.err = s.more()
	}
	return s.err
}

// more reads a piece, never past a promise, and checks what can be checked.
func (s *stream) more() error {
	const piece = 32 << 10
	at := s.start + int64(len(s.buf))
	want := int64(piece)
	for _, p := range s.promises {
		if p.length > at {
			want = min(want, p.length-at)
		}
	}
	if s.buf == nil {
		s.buf = make([]byte, 0, tailHold+2*piece)
	}
	chunk := make([]byte, want)
	n, err := s.body.Read(chunk)
	s.hash.Write(chunk[:n])
	s.buf = append(s.buf, chunk[:n]...)
	at += int64(n)
	if s.size >= 0 && at > s.size {
		s.wrong = true
		return fmt.Errorf("%w: more than the %d bytes announced", ErrBroken, s.size)
	}
	if n > 0 {
		for _, p := range s.promises {
			if p.length == at && string(s.hash.Sum(nil)) != p.sum {
				s.wrong = true
				return fmt.Errorf("%w: it does not begin as it did before", ErrBroken)
			}
		}
	}
	switch {
	case err == nil:
		return nil
	case err != io.EOF:
		return fmt.Errorf("%w: after %d bytes: %w", ErrBroken, at, err)
	case s.size >= 0 && at < s.size:
		return fmt.Errorf("%w: %d bytes of the %d announced", ErrBroken, at, s.size)
	}
	for _, p := range s.promises {
		if p.length > at {
			s.wrong = true
			return fmt.Errorf("%w: it is shorter than before", ErrBroken)
		}
	}
	if got := digest.NewDigest(s.key.Digest.Algorithm(), s.hash); got != s.key.Digest {
		s.wrong = true
		return fmt.Errorf("%w: the bytes are %s, not %s", ErrBroken, got, s.key.Digest)
	}
	s.size, s.verified = at, true
	return nil
}
