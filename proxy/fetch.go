// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"tarn/cache"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// part is what of an object is asked for, and of whom: all of it from the
// authority when it is the zero value.
type part struct {
	offset, length int64 // as in upstream.Request
	authorised     bool
	endpoint       int
}

// source fetches an object's bytes for one client. Its fetch is a cache.Fetch.
//
// Before the authority has said yes, that is a GET with the client's
// credential, and what it is told comes back in answer; afterwards the node's
// credential is as good, if there is one: the bytes are the same, and its
// quota is the operator's. A refusal is marked as one that concerns this
// credential only. A client that has left is asked for only as long as its
// right lives.
type source struct {
	proxy  *Proxy
	q      *request
	digest digest.Digest
	answer *yes // nil: nobody wants to know

	mu         sync.Mutex
	authorised bool // the other endpoints may serve the bytes
	begun      bool
	next       int // which endpoint is asked first, counted round
}

func (p *Proxy) fetch(q *request, d digest.Digest, authorised bool, answer *yes) cache.Fetch {
	s := &source{proxy: p, q: q, digest: d, authorised: authorised, answer: answer}
	return s.fetch
}

var errClientLeft = errors.New("the client has left, and its right has ended")

func (s *source) fetch(ctx context.Context, off, n int64) (body, cache.Info, error) {
	p, q := s.proxy, s.q
	s.mu.Lock()
	begun := s.begun
	s.begun = true
	want := part{offset: off, length: max(n, 0), authorised: s.authorised, endpoint: s.next}
	s.mu.Unlock()
	if _, ok := p.entitled(q); (begun || want.authorised) && q.hasLeft() && !ok {
		return nil, cache.Info{}, fmt.Errorf("%w: %w", cache.ErrRefused, errClientLeft)
	}
	var resp *upstream.Response
	var err error
	var asked time.Time
	if want.authorised && p.lendsNode(q) {
		resp, err = p.do(ctx, q, credential{node: true}, http.MethodGet, s.digest.String(), want)
		p.noteNode(q.upstream, err)
	}
	if resp == nil && (err == nil || nodeRefused(err)) {
		resp, asked, err = p.ask(ctx, q, http.MethodGet, s.digest.String(), want)
	}
	switch {
	case errors.Is(err, upstream.ErrRange):
		return nil, cache.Info{}, fmt.Errorf("%w: %w", cache.ErrRange, err)
	case err != nil:
		return nil, cache.Info{}, refusedAlone(err)
	}
	if q.size > 0 && resp.Size != q.size {
		resp.Body.Close()
		return nil, cache.Info{}, fmt.Errorf("%w: %w: it has %d bytes, its manifest says %d", cache.ErrRefused, errManifest, resp.Size, q.size)
	}
	if q.kind == upstream.Manifest {
		if schema1(resp.MediaType) {
			resp.Body.Close()
			return nil, cache.Info{}, fmt.Errorf("%w: %w", cache.ErrRefused, errSchema1)
		}
		if resp.Size > maxManifest {
			resp.Body.Close()
			return nil, cache.Info{}, fmt.Errorf("%w: it has %d bytes, of at most %d", errManifest, resp.Size, maxManifest)
		}
		resp.Body = &limitedBody{resp.Body, maxManifest}
	}
	if s.answer != nil && !begun {
		*s.answer = yes{asked: asked, mediaType: resp.MediaType, size: resp.Size}
	}
	if resp.Authority && !asked.IsZero() {
		s.mu.Lock()
		s.authorised = true
		s.mu.Unlock()
	}
	return &watchedBody{resp.Body, s, resp.Endpoint}, cache.Info{
		Size:      resp.Size,
		Offset:    resp.Offset,
		End:       resp.End,
		Elsewhere: func() bool { return s.elsewhere(resp.Endpoint) },
	}, nil
}

// elsewhere has the next question go to another endpoint, if there is one that may be
// asked.
func (s *source) elsewhere(than int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.authorised || s.proxy.upstreams.Registry(s.q.upstream).Endpoints() < 2 {
		return false
	}
	s.next = than + 1
	return true
}

// watchedBody sees when an endpoint's body breaks off, so that the next one is
// asked for the rest.
type watchedBody struct {
	io.ReadCloser
	source   *source
	endpoint int
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF && !errors.Is(err, context.Canceled) {
		b.source.mu.Lock()
		b.source.next = b.endpoint + 1 // however many break together
		b.source.mu.Unlock()
	}
	return n, err
}
