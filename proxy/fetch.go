// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"tarn/cache"
	"tarn/rights"
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
// credential, whose answer is the yes or the no; afterwards the node's
// credential is as good, if there is one: the bytes are the same, and its quota
// is the operator's. So are the other endpoints. But what did not come with the
// client's own credential from the authority itself leaves only where the yes
// covers it. A refusal is marked as one that concerns this credential only. A
// client that has left is asked for only as long as its right lives.
type source struct {
	proxy  *Proxy
	q      *request
	digest digest.Digest

	mu      sync.Mutex
	asked   bool             // the authority has said yes, here or before
	yes     rights.Yes       // then
	begun   bool             // fetch was called
	next    int              // which endpoint is asked first, counted round
	brought *rights.Evidence // of an answer of the authority's own that brought bytes
}

// source is for a client whose question was answered with y, or, without one,
// has yet to be put.
func (p *Proxy) source(q *request, d digest.Digest, y *rights.Yes) *source {
	s := &source{proxy: p, q: q, digest: d}
	if y != nil {
		s.asked, s.yes = true, *y
	}
	return s
}

var errClientLeft = errors.New("the client has left, and its right has ended")

func (s *source) fetch(ctx context.Context, off, n int64) (body, cache.Info, error) {
	p, q := s.proxy, s.q
	s.mu.Lock()
	begun, asked, yes := s.begun, s.asked, s.yes
	s.begun = true
	want := part{offset: off, length: max(n, 0), authorised: asked && !yes.Finishing, endpoint: s.next}
	s.mu.Unlock()
	if (begun || asked) && q.hasLeft() {
		if _, ok := p.entitled(q); !ok {
			return nil, cache.Info{}, fmt.Errorf("%w: %w", cache.ErrRefused, errClientLeft)
		}
	}
	var resp *upstream.Response
	var y rights.Yes
	var err error
	own := false
	if want.authorised && p.lendsNode(q) {
		resp, err = p.do(ctx, q, rights.Credential{Node: true}, http.MethodGet, s.digest.String(), want)
		p.noteNode(q.upstream, err)
		resp = s.covered(resp, yes)
	}
	if resp == nil && (err == nil || nodeRefused(err)) {
		resp, y, err = p.ask(ctx, q, http.MethodGet, s.digest.String(), want)
		if own = err == nil && resp.Authority; !own {
			resp = s.covered(resp, yes)
		}
		if resp == nil && err == nil {
			want.authorised, want.endpoint = false, 0
			resp, y, err = p.ask(ctx, q, http.MethodGet, s.digest.String(), want)
			own = err == nil
		}
	}
	switch {
	case errors.Is(err, upstream.ErrRange), err != nil && !begun && want.length > 0 && q.kind == upstream.Blob && refusesParts(err):
		return nil, cache.Info{}, fmt.Errorf("%w: %w", cache.ErrRange, err)
	case err != nil:
		return nil, cache.Info{}, refusedAlone(err)
	}
	if q.kind == upstream.Blob && (off > 0 || n > 0) && resp.Offset == 0 && resp.End != resp.Offset+n && resp.Size > max(n, onePiece) {
		p.upstreams.Registry(q.upstream).Saw(upstream.NoRanges)
	}
	if q.size > 0 && resp.Size != q.size {
		resp.Body.Close()
		return nil, cache.Info{}, fmt.Errorf("%w: %w: it has %d bytes, its manifest says %d", cache.ErrRefused, errManifest, resp.Size, q.size)
	}
	if q.kind == upstream.Manifest {
		if err := s.manifest(ctx, resp); err != nil {
			return nil, cache.Info{}, err
		}
	}
	if own {
		s.mu.Lock()
		if !s.asked {
			s.asked, s.yes = true, y
		}
		s.mu.Unlock()
	}
	body := &watchedBody{ReadCloser: resp.Body, source: s, endpoint: resp.Endpoint}
	if own {
		body.evidence = &rights.Evidence{Says: rights.Verified, Asked: y.Asked, Redirected: resp.Redirected, Size: resp.Size, MediaType: resp.MediaType}
	}
	return body, cache.Info{
		Size:      resp.Size,
		Offset:    resp.Offset,
		End:       resp.End,
		Elsewhere: func() bool { return s.elsewhere(resp.Endpoint) },
		Doubtful:  own && !y.Proved,
	}, nil
}

// refusesParts tells whether a request for all may do where one for a part, which
// is tarn's own idea, did not: some firewalls let no Range pass.
func refusesParts(err error) bool {
	var status *upstream.StatusError
	if !errors.As(err, &status) {
		return errors.Is(err, upstream.ErrUnreachable) && !errors.Is(err, upstream.ErrTimeout)
	}
	switch status.Status {
	case http.StatusForbidden, http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusPreconditionFailed:
		return true
	}
	return status.Status >= 500 && status.Status != http.StatusServiceUnavailable
}

// elsewhere has the next question go to another endpoint, if there is one that may be
// asked.
func (s *source) elsewhere(than int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.asked || s.yes.Finishing || s.proxy.upstreams.Registry(s.q.upstream).Endpoints() < 2 {
		return false
	}
	s.next = than + 1
	return true
}

// onePiece is what a registry sends in one piece, whatever is asked for.
const onePiece = 64 << 10

// covered is an answer that did not come from the authority with the client's
// own credential, nil when the yes does not cover it.
func (s *source) covered(resp *upstream.Response, yes rights.Yes) *upstream.Response {
	if resp == nil || yes.Covers(resp.Size) {
		return resp
	}
	resp.Body.Close()
	return nil
}

// answer is the authority's yes.
func (s *source) answer() rights.Yes {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.yes
}

// verified takes that the bytes were the object's: whoever was sent some of them
// by the authority may have it.
func (s *source) verified() {
	s.mu.Lock()
	e := s.brought
	s.mu.Unlock()
	if e != nil {
		s.proxy.rights.Learn(s.q.asker, s.q.object(s.digest), *e)
	}
}

// manifest bounds a manifest's body, and takes off the coding of one that came
// compressed although nobody asked for that.
func (s *source) manifest(ctx context.Context, resp *upstream.Response) error {
	switch {
	case schema1(resp.MediaType):
		resp.Body.Close()
		return fmt.Errorf("%w: %w", cache.ErrRefused, errSchema1)
	case resp.Size > maxManifest:
		resp.Body.Close()
		return fmt.Errorf("%w: it has %d bytes, of at most %d", errManifest, resp.Size, maxManifest)
	case resp.Encoding == "":
		resp.Body = &limitedBody{resp.Body, maxManifest}
		return nil
	}
	// What it is once it is decoded, nobody knows.
	release, err := s.proxy.hold(ctx, s.q.upstream, maxManifest)
	if err != nil {
		resp.Body.Close()
		return err
	}
	data, err := io.ReadAll(&limitedBody{resp.Body, maxManifest})
	resp.Body.Close()
	if err != nil {
		release()
		return err
	}
	data = decoded(data, resp.Encoding, s.digest)
	resp.Body = &heldBody{bytes.NewReader(data), sync.OnceFunc(release)}
	resp.Offset, resp.Size, resp.End = 0, int64(len(data)), int64(len(data))
	return nil
}

// heldBody is in memory, and gives that back.
type heldBody struct {
	*bytes.Reader
	release func()
}

func (b *heldBody) Close() error {
	b.release()
	return nil
}

// decoded takes the coding off a manifest where what is below it is what the
// digest names. The label alone says little: the bytes may be the object's as
// they are. Without a digest the one that reads like a manifest is taken.
func decoded(data []byte, encoding string, d digest.Digest) []byte {
	right := func(b []byte) bool {
		if d != "" {
			return d.Algorithm().FromBytes(b) == d
		}
		_, err := parseManifest(b)
		return err == nil
	}
	if right(data) || !strings.Contains(strings.ToLower(encoding), "gzip") {
		return data
	}
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return data
	}
	plain, err := io.ReadAll(io.LimitReader(z, maxManifest+1))
	if err != nil || len(plain) > maxManifest || !right(plain) {
		return data
	}
	return plain
}

// watchedBody sees when an endpoint's body breaks off, so that the next one is
// asked for the rest, and when the authority's own brings bytes.
type watchedBody struct {
	io.ReadCloser
	source   *source
	endpoint int
	evidence *rights.Evidence // nil where it is no word of the authority's
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.evidence != nil && n > 0 {
		b.source.mu.Lock()
		if before := b.source.brought; before == nil || before.Redirected && !b.evidence.Redirected {
			b.source.brought = b.evidence
		}
		b.source.mu.Unlock()
		b.evidence = nil // once is enough
	}
	if err != nil && err != io.EOF && !errors.Is(err, context.Canceled) {
		b.source.mu.Lock()
		b.source.next = b.endpoint + 1 // however many break together
		b.source.mu.Unlock()
	}
	return n, err
}
