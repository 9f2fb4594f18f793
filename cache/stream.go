// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"time"

	"tarn/blobstore"

	"github.com/opencontainers/go-digest"
)

// stream is an upstream body of one reader's own, for what cannot be stored.
// Everything passes through the hash, from byte 0 on; what the reader did not
// ask for is thrown away. Of a range nothing leaves before its hash was compared
// with what the reader was given of the object by other streams, and of all
// the last tailHold bytes not before the digest matched. It reads forward only.
type stream struct {
	cache  *Cache
	key    Key
	reader string
	size   int64 // -1 until the end

	body     io.ReadCloser
	told     func() // Request.Verified
	cancel   context.CancelFunc
	hash     hash.Hash // of all bytes up to start+len(buf)
	buf      []byte    // hashed, not given out
	start    int64     // offset of buf[0]
	pos      int64     // next byte the reader wants
	agreed   int64     // all before it was compared
	verified bool
	wrong    bool // the bytes are not the object's, as opposed to not all of them
	err      error
	gave     bool // the reader has bytes of this object
	once     sync.Once

	// ledger is the reader's, which all of its streams share, when the reader
	// asked for a range; what it asks for without one stands for itself, and
	// is only entered when it ends unverified.
	ledger *ledger
	ranged bool
	seen   map[int64]bool // promises off the steps that were compared
	// name is a pending file without a byte: a start meanwhile, or soon after,
	// finds it, and taints who has read.
	name *blobstore.Pending
}

// newStream starts from the state h that the hash has at info.Offset. It fails
// with ErrTainted when the reader holds what cannot be compared with.
func newStream(c *Cache, req Request, h hash.Hash, info Info) (*stream, error) {
	s := &stream{
		cache: c, key: req.Key, reader: req.Reader, size: info.Size, hash: h, told: req.Verified,
		start: info.Offset, agreed: info.Offset, seen: make(map[int64]bool),
	}
	bad := c.taint.spoiled(req.Key, req.Reader)
	switch {
	case bad && req.Offset > 0:
		return nil, ErrTainted
	case bad || !req.Ranged && req.Offset == 0:
		s.ledger = newLedger() // it starts anew
	default:
		s.ranged = true
		if s.ledger = c.taint.open(req.Key, req.Reader); s.ledger == nil {
			return nil, ErrTainted
		}
	}
	// A disk that refuses even that has nothing else to keep either.
	s.name, _ = c.store.Create(req.Digest)
	return s, nil
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

// promised enters what a flight gave or may have given to this reader.
func (s *stream) promised(p promise) bool {
	s.seen[p.length] = true
	return s.ledger.agree(p)
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
		if s.cancel != nil {
			s.cancel()
			s.body.Close()
		}
		unverified := s.gave && !s.verified
		if s.name != nil {
			s.name.Close()
			if unverified {
				time.AfterFunc(taintFor, func() { s.name.Discard() })
			} else {
				s.name.Discard()
			}
		}
		if s.ranged {
			if unverified && s.wrong {
				s.ledger.spoil()
			}
			s.ledger.leave()
			return
		}
		if !unverified {
			return
		}
		var ps []promise // none: nothing is known
		if !s.wrong {
			s.ledger.agree(promise{s.start + int64(len(s.buf)), string(s.hash.Sum(nil))})
			for length, sum := range s.ledger.sums { // nobody else's
				ps = append(ps, promise{length, sum})
			}
		}
		s.cache.taint.add(s.key, s.reader, ps...)
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
	return int(max(0, min(end, s.agreed)-s.start))
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
	s.buf = s.buf[n:]
	s.start += int64(n)
}

// verifyAll reads an object that is held back altogether to its end.
func (s *stream) verifyAll() error {
	for !s.verified && s.err == nil {
		s.err = s.more()
	}
	return s.err
}

// more reads a piece, never past what is to be compared, and checks what can be
// checked.
func (s *stream) more() error {
	const piece = 64 << 10
	at := s.start + int64(len(s.buf))
	next := s.ledger.next(at)
	chunk := make([]byte, min(piece, next-at))
	n, err := s.body.Read(chunk)
	s.hash.Write(chunk[:n])
	s.buf = append(s.buf, chunk[:n]...)
	at += int64(n)
	if s.size >= 0 && at > s.size {
		s.wrong = true
		return fmt.Errorf("%w: more than the %d bytes announced", ErrBroken, s.size)
	}
	if n > 0 && at == next {
		if !s.promised(promise{at, string(s.hash.Sum(nil))}) {
			s.wrong = true
			return fmt.Errorf("%w: it is not what this reader was given before", ErrBroken)
		}
		s.agreed = at
	}
	if !s.ranged {
		s.agreed = at // nothing else is read at the same time
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
	if s.ledger.missed(at, s.seen) {
		s.ledger.spoil()
		return fmt.Errorf("%w: this reader was given bytes that do not go with it", ErrBroken)
	}
	s.size, s.verified = at, true
	if s.told != nil {
		s.told()
	}
	return nil
}
