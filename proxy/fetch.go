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
	"slices"
	"strings"
	"sync"

	"tarn/cache"
	"tarn/rights"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// fetcher fetches an object's bytes for one client. Its fetch is a cache.Fetch,
// and so what is behind a flight's ticket.
//
// Before the authority has said yes, that is a GET with the client's
// credential, whose answer is the yes or the no; afterwards the node's
// credential is as good, if there is one: the bytes are the same, and its quota
// is the operator's. So are the other endpoints. But what did not come with the
// client's own credential from the authority itself leaves only where the yes
// covers it. sources.go has the order. A refusal is marked as one that concerns
// this credential only. A client that has left is asked for only as long as its
// right lives.
type fetcher struct {
	proxy  *Proxy
	q      *request
	digest digest.Digest

	mu      sync.Mutex
	asked   bool             // the authority has said yes, here or before
	yes     rights.Yes       // then
	begun   bool             // fetch was called; several may be at once
	first   int              // which endpoint is asked first, counted round
	names   []string         // of the sources that answered, each once
	brought *rights.Evidence // of an answer of the authority's own that brought bytes
	places  []string         // of the sources that brought bytes, each once
}

// fetcher is for a client whose question was answered with y, or, without one,
// has yet to be put.
func (p *Proxy) fetcher(q *request, d digest.Digest, y *rights.Yes) *fetcher {
	f := &fetcher{proxy: p, q: q, digest: d}
	if y != nil {
		f.asked, f.yes = true, *y
	}
	return f
}

var errClientLeft = errors.New("the client has left, and its right has ended")

// fetched tells whether any source was asked for bytes. A nil fetcher asked none.
func (f *fetcher) fetched() bool {
	if f == nil {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.begun
}

func (f *fetcher) fetch(ctx context.Context, off, n int64) (body, cache.Info, error) {
	f.mu.Lock()
	begun, asked, yes, after, first := f.begun, f.asked, f.yes, f.after(), f.first
	f.begun = true
	f.mu.Unlock()
	if (begun || asked) && f.q.hasLeft() {
		// Before the first answer the grant is the right: parts are asked for at once.
		if _, ok := f.proxy.entitled(f.q); !ok && (asked || !f.proxy.rights.Granted(f.q.asker)) {
			return nil, cache.Info{}, fmt.Errorf("%w: %w", cache.ErrRefused, errClientLeft)
		}
	}
	want := part{offset: off, length: max(n, 0)}
	r, err := f.walk(ctx, f.sources(after, first), yes, want)
	switch {
	case errors.Is(err, upstream.ErrRange), err != nil && want.length > 0 && f.q.kind == upstream.Blob && refusesParts(err) && !f.heard():
		return nil, cache.Info{}, fmt.Errorf("%w: %w", cache.ErrRange, err)
	case err != nil:
		return nil, cache.Info{}, refusedAlone(err)
	}
	if err := f.check(ctx, r, off, n); err != nil {
		return nil, cache.Info{}, err
	}
	f.note(r.source.name())
	body := &watchedBody{ReadCloser: r.Body, fetcher: f, source: r.source}
	if r.yes != nil {
		f.confirm(*r.yes)
		body.evidence = &rights.Evidence{Says: rights.Verified, Asked: r.yes.Asked, Redirected: r.Redirected, Size: r.Size, MediaType: r.MediaType}
	}
	return body, cache.Info{
		Size:      r.Size,
		Offset:    r.Offset,
		End:       r.End,
		From:      r.source.name(),
		Elsewhere: func() bool { return f.elsewhere(r.source) },
		Doubtful:  r.yes != nil && !r.yes.Proved,
	}, nil
}

// check looks at an answer before its body is read. It closes what it refuses.
func (f *fetcher) check(ctx context.Context, r reply, off, n int64) error {
	q := f.q
	if q.kind == upstream.Blob && (off > 0 || n > 0) && r.Offset == 0 && r.End != r.Offset+n && r.Size > max(n, onePiece) {
		f.proxy.upstreams.Registry(q.upstream).Saw(upstream.NoRanges)
	}
	if q.size > 0 && r.Size != q.size {
		r.Body.Close()
		return fmt.Errorf("%w: %w: it has %d bytes, its manifest says %d", cache.ErrRefused, errManifest, r.Size, q.size)
	}
	if q.kind == upstream.Manifest {
		return f.manifest(ctx, r.Response)
	}
	return nil
}

// confirm takes the authority's yes, if it is the first.
func (f *fetcher) confirm(y rights.Yes) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.asked {
		f.asked, f.yes = true, y
	}
}

// note takes the name of a source that answered.
func (f *fetcher) note(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Contains(f.names, name) {
		f.names = append(f.names, name)
	}
}

// noteBrought takes that a place has sent bytes, as an answer of the authority's own
// or, with nil, not.
func (f *fetcher) noteBrought(place string, e *rights.Evidence) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Contains(f.places, place) {
		f.places = append(f.places, place)
	}
	if e != nil && (f.brought == nil || f.brought.Redirected && !e.Redirected) {
		f.brought = e
	}
}

// heard tells whether any source has answered with bytes so far.
func (f *fetcher) heard() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.names) > 0
}

// from are the sources that answered so far, in the order of their first answers.
func (f *fetcher) from() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.names)
}

// after tells whether others than the authority may be asked: it has said yes, and
// not to a download that only finishes. Called with the lock.
func (f *fetcher) after() bool { return f.asked && !f.yes.Finishing }

// beginWith has the lists to come begin with that endpoint.
func (f *fetcher) beginWith(endpoint int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.first = endpoint
}

// elsewhere has the lists to come begin with another endpoint than this one, if
// there is one that may be asked.
func (f *fetcher) elsewhere(than source) bool {
	f.mu.Lock()
	after := f.after()
	f.mu.Unlock()
	if !after {
		return false
	}
	than.rest()
	f.mu.Lock()
	first := f.first
	f.mu.Unlock()
	return f.sources(after, first)[0].place != than.place
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

// onePiece is what a registry sends in one piece, whatever is asked for.
const onePiece = 64 << 10

// answer is the authority's yes.
func (f *fetcher) answer() rights.Yes {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.yes
}

// verified takes that the bytes were the object's: whoever was sent some of them
// by the authority may have it.
func (f *fetcher) verified() {
	f.mu.Lock()
	e := f.brought
	f.mu.Unlock()
	if e != nil {
		f.proxy.rights.Learn(f.q.asker, f.q.object(f.digest), *e)
	}
}

// wrong takes that the bytes were not the object's: where another may be asked for it,
// each place that sent some of them comes last for a while.
func (f *fetcher) wrong() {
	if len(f.proxy.upstreams.Registry(f.q.upstream).Endpoints()) < 2 {
		return
	}
	f.mu.Lock()
	places := slices.Clone(f.places)
	f.mu.Unlock()
	now := f.proxy.now() // one moment for all: none of them is more at fault
	for _, place := range places {
		f.proxy.wrongs.add(f.q.upstream, wrong{place, f.digest}, now)
	}
}

// manifest bounds a manifest's body, and takes off the coding of one that came
// compressed although nobody asked for that.
func (f *fetcher) manifest(ctx context.Context, resp *upstream.Response) error {
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
	release, err := f.proxy.hold(ctx, f.q.upstream, maxManifest)
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
	data = decoded(data, resp.Encoding, f.digest)
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

// watchedBody sees when a source's body breaks off, so that the next one is asked
// for the rest, and when it brings bytes.
type watchedBody struct {
	io.ReadCloser
	fetcher  *fetcher
	source   source
	evidence *rights.Evidence // nil where it is no word of the authority's
	began    bool             // it has brought bytes
}

func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 && !b.began {
		b.began = true
		b.fetcher.noteBrought(b.source.place, b.evidence)
	}
	if err != nil && err != io.EOF && !errors.Is(err, context.Canceled) {
		b.source.rest() // however many break together
	}
	return n, err
}
