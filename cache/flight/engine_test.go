// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"tarn/blobstore"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"go.uber.org/zap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// shelf is a store of a few lines: files in a directory, without rows or bounds.
type shelf struct {
	*blobstore.Store
	full   atomic.Bool // there is no room
	mu     sync.Mutex
	stored map[Key]bool
	claims int64
}

var errFull = errors.New("full")

func (s *shelf) Reserve(_ string, n int64) error {
	if s.full.Load() {
		return errFull
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.claims += n
	return nil
}

func (s *shelf) ReserveFree(domain string, n int64) error { return s.Reserve(domain, n) }

func (s *shelf) Unreserve(_ string, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.claims -= n
}

func (s *shelf) Discard(domain string, p *blobstore.Pending, claim int64) {
	p.Discard()
	s.Unreserve(domain, claim)
}

func (s *shelf) DiscardLeft(domain string, p *blobstore.Pending) { s.Discard(domain, p, 0) }

func (s *shelf) Stored(domain string, d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stored[Key{domain, d}]
}

func (s *shelf) Land(l Landing) {
	claim := l.Claim
	if s.Commit([]*blobstore.Pending{l.Pending})[0] == nil {
		s.Unreserve(l.Domain, claim)
		claim = 0
		s.mu.Lock()
		s.stored[l.Key] = true
		s.mu.Unlock()
	}
	l.Done(func() {}, claim)
}

func (s *shelf) NoteTrouble(error) {}

// engine is one on a shelf, which has nothing claimed in the end.
func engine(t *testing.T) (*Engine, *shelf) {
	t.Helper()
	blobs, err := blobstore.Open(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	s := &shelf{Store: blobs, stored: make(map[Key]bool)}
	e := New(s, nil, nil, zap.NewNop())
	t.Cleanup(func() {
		e.Close()
		if s.claims != 0 {
			t.Errorf("%d bytes are claimed in the end", s.claims)
		}
		blobs.Close()
	})
	return e, s
}

// ask is a request for a body whose source sends that.
func ask(body, sends []byte, asked *atomic.Int64) Request {
	return Request{
		Key: Key{ListedDomain, digest.FromBytes(body)}, Reader: "one", Authorised: true, Parallel: 4,
		Fetch: func(_ context.Context, off, n int64) (io.ReadCloser, Info, error) {
			asked.Add(1)
			size := int64(len(sends))
			end := size
			if n >= 0 {
				end = min(end, off+n)
			}
			return io.NopCloser(bytes.NewReader(sends[off:end])), Info{Size: size, Offset: off, End: end}, nil
		},
	}
}

func read(e *Engine, req Request) ([]byte, *Object, error) {
	o, err := e.Open(context.Background(), req, nil)
	if err != nil {
		return nil, nil, err
	}
	defer o.Close()
	got, err := io.ReadAll(struct{ io.Reader }{o.Content})
	return got, o, err
}

func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

// TestAFlightOnAStoreOfAFewLines: what comes is stored, what is wrong is not, and what
// there is no room for passes through.
func TestAFlightOnAStoreOfAFewLines(t *testing.T) {
	t.Parallel()
	for _, size := range []int{100, tailHold, tailHold + 1, 3*minSegment + 1} {
		var asked atomic.Int64
		e, s := engine(t)
		body := noise(size)
		req := ask(body, body, &asked)
		s.full.Store(true)
		if got, o, err := read(e, req); err != nil || !bytes.Equal(got, body) || o.Source != Passed || s.Stored(req.Domain, req.Digest) {
			t.Errorf("%d bytes, without room: %d, %+v: %v", size, len(got), o, err)
		}
		s.full.Store(false)
		wrong := bytes.Clone(body)
		wrong[size-1] ^= 1
		got, _, err := read(e, ask(body, wrong, &asked))
		if !errors.Is(err, ErrBroken) || len(got) > max(0, size-tailHold) {
			t.Errorf("%d bytes, the last one wrong: %d: %v", size, len(got), err)
		}
		if e.Refuses(req.Key, 1) != (len(got) > 0) {
			t.Errorf("%d bytes, of which %d were given out: %v", size, len(got), e.Refuses(req.Key, 1))
		}
		if got, o, err := read(e, req); err != nil || !bytes.Equal(got, body) || o.Source != Fetched {
			t.Errorf("%d bytes: %d: %v", size, len(got), err)
		}
		e.flying.Wait()
		if !s.Stored(req.Domain, req.Digest) {
			t.Errorf("%d bytes are not stored", size)
		}
		if _, _, err := read(e, req); !errors.Is(err, ErrLookAgain) {
			t.Errorf("%d bytes, stored: %v", size, err)
		}
	}
}

// TestManyReadersAreOneFlight.
func TestManyReadersAreOneFlight(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	e, _ := engine(t)
	body := noise(minSegment)
	req := ask(body, body, &asked)
	var reading sync.WaitGroup
	for range 20 {
		reading.Go(func() {
			if got, _, err := read(e, req); !errors.Is(err, ErrLookAgain) && (err != nil || !bytes.Equal(got, body)) {
				t.Errorf("%d bytes: %v", len(got), err)
			}
		})
	}
	reading.Wait()
	if asked.Load() != 1 {
		t.Errorf("%d questions", asked.Load())
	}
}
