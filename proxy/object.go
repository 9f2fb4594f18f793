// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"tarn/cache"
	"tarn/rights"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// blobType is what registries call a blob; what is in it, its manifest says.
const blobType = "application/octet-stream"

func (p *Proxy) key(q *request, d digest.Digest) cache.Key {
	return cache.Key{Domain: p.sourceDomain(q.upstream), Digest: d}
}

// serveDigest answers HEAD and GET of a manifest or blob by digest.
func (p *Proxy) serveDigest(ctx context.Context, w *response, r *http.Request, q *request) error {
	if q.method == http.MethodHead {
		return p.headDigest(ctx, w, r, q)
	}
	o, y, stale, err := p.openDigest(ctx, w, q)
	if errors.Is(err, errSchema1) {
		return p.relayManifest(ctx, w, q, &confirmation{mediaType: schema1Type})
	}
	if err != nil {
		return err
	}
	defer o.Close()
	defer p.rights.Begin(q.asker, q.object(q.digest), y, o.Size)()
	if w.source(o.Source); stale != nil {
		w.stale(stale)
	}
	if q.kind == upstream.Manifest {
		p.notePending(q, q.digest)
		return p.serveManifest(ctx, w, r, q, o, q.digest, y.MediaType)
	}
	return serveObject(w, r, o, q.digest, blobType)
}

// openDigest opens an object for a client that may have it. Who is known to be
// entitled is not asked about again. Else the authority is asked with the
// client's own credential: about a blob that is here by a GET of its first byte,
// about a manifest by HEAD, and if that says no by the GET that the client sent.
// What is not here is asked for by the GET that fetches it. A refusal costs the
// same questions, in the same order, whatever is here.
func (p *Proxy) openDigest(ctx context.Context, w *response, q *request) (*cache.Object, rights.Yes, *staleness, error) {
	for present := false; ; present = true {
		y, ok := p.entitled(q)
		here := true
		if !ok {
			if err := p.recall(q.asker); err != nil {
				return nil, y, nil, err
			}
			size := p.here(q) // -1 also when a flight does not know it yet
			here = size >= 0 || present
			if here { // by an answer that may have come since, and be this client's, too
				y, ok = p.entitled(q)
			}
			var err error
			if !ok {
				y, ok, err = p.inquire(ctx, w, q, here, size)
			}
			if err != nil {
				y, stale, err := p.stale(q, err)
				if err != nil {
					return nil, y, nil, err
				}
				o, err := p.openStale(ctx, w, q, stale)
				return o, y, stale, err
			}
		}
		var o *cache.Object
		var err error
		switch {
		case ok:
			w.fetcher = p.fetcher(q, q.digest, &y)
			o, err = p.open(ctx, w, p.cacheRequest(q, w.fetcher, true))
			if err == nil && (o.Source != cache.Fetched && !y.Covers(o.Size) || o.Doubtful && y.Size != o.Size) {
				o.Close()
				o, y, err = p.pass(ctx, w, q)
			}
		case !here:
			// The GET that fetches it is the question.
			w.told.asked = http.MethodGet
			w.fetcher = p.fetcher(q, q.digest, nil)
			o, err = p.open(ctx, w, p.cacheRequest(q, w.fetcher, false))
			y = w.fetcher.answer()
		default:
			o, y, err = p.pass(ctx, w, q)
		}
		if errors.Is(err, cache.ErrAuthorise) && !present {
			continue // it is here now
		}
		return o, y, nil, err
	}
}

// open opens the object, and notes what the client waited for meanwhile.
func (p *Proxy) open(ctx context.Context, w *response, req cache.Request) (*cache.Object, error) {
	start := time.Now()
	o, err := p.cache.Open(ctx, req)
	if err == nil && o.Source == cache.Hit {
		w.waits.since(stepDisk, start)
	} else {
		w.waits.since(stepFirstByte, start)
	}
	return o, err
}

func (p *Proxy) cacheRequest(q *request, f *fetcher, authorised bool) cache.Request {
	req := cache.Request{
		Key:        p.key(q, q.digest),
		Reader:     q.asker.Name(),
		Source:     string(q.upstream),
		Offset:     q.first,
		Length:     q.length,
		Ranged:     q.ranged,
		Authorised: authorised,
		Wait:       p.rules(q.upstream).GrantTTL > 0,
		Fetch:      f.fetch,
		Verified:   f.verified,
		Wrong:      f.wrong,
	}
	if q.kind == upstream.Blob {
		req.Parallel = p.rules(q.upstream).Parallel
		req.Ahead = q.asker.Credential.Authorization != "" && !p.lendsNode(q)
		req.Size = func() int64 {
			if !authorised && !p.rights.Granted(q.asker) || p.upstreams.Registry(q.upstream).Has(upstream.NoRanges) {
				return 0
			}
			return p.sizes.of(q.repositoryKey(), q.digest)
		}
	} else {
		req.Check = checkAs(func() string { return f.answer().MediaType }) // runs after the fetch
	}
	return req
}

// pass gives a client what the authority sends to its own request, and nothing
// of what is here.
func (p *Proxy) pass(ctx context.Context, w *response, q *request) (*cache.Object, rights.Yes, error) {
	defer w.waits.since(stepFirstByte, time.Now())
	w.fetcher = p.fetcher(q, q.digest, nil)
	w.told.asked, w.told.unproven = http.MethodGet, true
	o, err := p.cache.Pass(ctx, p.cacheRequest(q, w.fetcher, false))
	return o, w.fetcher.answer(), err
}

// inquire puts what questions there are to put before the object is opened. ok
// says that the yes is for what is here, or, where nothing is, that there is
// one. size is that of what is here, -1 where nobody knows it.
func (p *Proxy) inquire(ctx context.Context, w *response, q *request, here bool, size int64) (y rights.Yes, ok bool, err error) {
	asking, cancel := p.askingTime(ctx, w, q)
	defer cancel()
	defer w.waits.since(stepRights, time.Now())
	covers := func() bool {
		return !here || size < 0 || y.Covers(size) && (y.Size < 0 || y.Size == size) // else what is on its way is another thing
	}
	registry := p.upstreams.Registry(q.upstream)
	head := q.kind == upstream.Blob && registry.Has(upstream.NoRanges) ||
		q.kind == upstream.Manifest && (here || p.asksApart(q) || !p.rights.Granted(q.asker))
	refused := false
	if head {
		w.told.asked = http.MethodHead
		y, err = p.question(asking, q, http.MethodHead, part{})
		switch {
		case err == nil && covers():
			return y, true, nil
		case err != nil && !isNo(err):
			return y, false, err
		case lacksHead(err):
			registry.Saw(upstream.HeadRefused)
		case err != nil:
			refused = true
		}
	}
	if !here && (head || !p.asksApart(q)) {
		return y, false, nil
	}
	w.told.asked = http.MethodGet
	first := part{}
	if q.kind == upstream.Blob && !registry.Has(upstream.NoRanges) && size != 0 {
		first.length = 1
	}
	y, err = p.question(asking, q, http.MethodGet, first)
	// What is not here is asked for in parts, too, unless it is in one.
	if errors.Is(err, upstream.ErrRange) || err != nil && first.length > 0 && p.rules(q.upstream).Parallel > 1 && refusesParts(err) {
		if y, err = p.question(asking, q, http.MethodGet, part{}); err == nil {
			registry.Saw(upstream.NoRanges)
		}
	}
	if err == nil && refused {
		registry.Saw(upstream.HeadRefused)
	}
	return y, err == nil && covers(), err
}

// question asks the authority about the object, and wants no more of it than the
// headers.
func (p *Proxy) question(ctx context.Context, q *request, method string, part part) (rights.Yes, error) {
	resp, y, err := p.ask(ctx, q, method, q.digest.String(), part)
	if err != nil {
		return y, err
	}
	resp.Body.Close()
	if part.length > 0 && resp.End-resp.Offset > onePiece {
		p.upstreams.Registry(q.upstream).Saw(upstream.NoRanges)
	}
	return y, nil
}

// openStale opens what is stored, and asks nobody.
func (p *Proxy) openStale(ctx context.Context, w *response, q *request, stale *staleness) (*cache.Object, error) {
	defer w.waits.since(stepDisk, time.Now())
	o, err := p.cache.Open(ctx, cache.Request{Key: p.key(q, q.digest), Reader: q.asker.Name(), Offset: q.first, Ranged: q.ranged, Authorised: true, Fetch: notNow})
	if errors.Is(err, errGone) {
		err = stale.err // nobody has it now
	}
	return o, err
}

// headDigest fetches nothing, unless the registry's answer to HEAD says too
// little.
func (p *Proxy) headDigest(ctx context.Context, w *response, r *http.Request, q *request) error {
	size, cached := p.cache.Has(p.key(q, q.digest))
	y, ok := p.entitled(q)
	var stale *staleness
	if !cached || !ok {
		var err error
		if y, err = p.headQuestion(ctx, w, q); err != nil {
			if y, stale, err = p.stale(q, err); err != nil {
				return err
			}
		}
		size, cached = p.cache.Has(p.key(q, q.digest))
	}
	if cached && y.Covers(size) {
		mediaType, err := blobType, error(nil)
		if q.kind == upstream.Manifest {
			mediaType, err = p.storedType(ctx, q, q.digest, y.MediaType)
		}
		if !errors.Is(err, errGone) {
			if err != nil {
				return err
			}
			if w.source(cache.Hit); stale != nil {
				w.stale(stale)
			}
			return serveHead(w, r, q.digest, mediaType, size)
		}
		if ok { // and no question was asked
			if y, err = p.headQuestion(ctx, w, q); err != nil {
				return err
			}
		}
	}
	if stale != nil {
		return stale.err // it went just now, or was not what it should be
	}
	w.told.unproven = cached // and the answer is not about that
	w.detail(outcomeMiss, "fwd=uri-miss; fwd-status=200", "")
	switch {
	case q.kind == upstream.Blob:
		return serveHead(w, r, q.digest, blobType, y.Size)
	case !schema1(y.MediaType) && (y.Size <= 0 || !manifestLike(y.MediaType)):
		if err := p.headByGet(ctx, w, r, q); err == nil || w.status != 0 || !answered(err) {
			return err
		}
		// It says yes to HEAD and no to GET, and that is what there is to say.
	}
	return serveHead(w, r, q.digest, cmp.Or(y.MediaType, blobType), y.Size)
}

// headQuestion is the client's own HEAD. Where the registry knows none, or leaves
// out the length of a blob, a GET of the first byte completes it.
func (p *Proxy) headQuestion(ctx context.Context, w *response, q *request) (rights.Yes, error) {
	asking, cancel := p.askingTime(ctx, w, q)
	defer cancel()
	w.told.asked = http.MethodHead
	defer w.waits.since(stepRights, time.Now())
	y, err := p.question(asking, q, http.MethodHead, part{})
	if lacksHead(err) {
		p.upstreams.Registry(q.upstream).Saw(upstream.HeadRefused)
	} else if err != nil || q.kind == upstream.Manifest || y.Size >= 0 {
		return y, err
	}
	first := part{}
	if q.kind == upstream.Blob {
		first.length = 1
	}
	z, gerr := p.question(asking, q, http.MethodGet, first)
	if errors.Is(gerr, upstream.ErrRange) { // an empty blob has no first byte
		z, gerr = p.question(asking, q, http.MethodGet, part{})
	}
	if gerr != nil && err == nil {
		return y, nil // it said yes, and that is all that it says
	}
	return z, gerr
}

// headByGet fetches the manifest to say what a HEAD must say of it.
func (p *Proxy) headByGet(ctx context.Context, w *response, r *http.Request, q *request) error {
	one := *q
	one.method, one.completes = http.MethodGet, true
	o, y, _, err := p.openDigest(ctx, w, &one)
	if err != nil {
		return err
	}
	defer o.Close()
	w.source(o.Source)
	return p.serveManifest(ctx, w, r, q, o, q.digest, y.MediaType)
}

// errGone: what was stored a moment ago is not any more.
var errGone = errors.New("no longer stored")

// storedType is the type of a stored manifest where this authority calls it
// contentType. It fails with errGone when the manifest is not there.
func (p *Proxy) storedType(ctx context.Context, q *request, d digest.Digest, contentType string) (string, error) {
	info, ok := p.infos.get(d)
	if !ok {
		o, err := p.cache.Open(ctx, cache.Request{Key: p.key(q, d), Authorised: true, Fetch: notNow})
		if err != nil {
			return "", err
		}
		defer o.Close()
		defer context.AfterFunc(ctx, o.Interrupt)()
		data, release, err := p.readManifest(ctx, q.upstream, o.Content, o.Size)
		defer release()
		if err != nil {
			return "", err
		}
		if info, err = parseManifest(data); err != nil {
			return "", err
		}
		p.infos.put(d, info)
	}
	return info.typeAs(contentType)
}

// notNow is the Fetch of who only wants what is there. Others who wait for it
// are to fetch it themselves.
func notNow(context.Context, int64, int64) (body, cache.Info, error) {
	return nil, cache.Info{}, fmt.Errorf("%w: %w", cache.ErrRefused, errGone)
}

// serveManifest reads the manifest whole before it answers: it is small, and
// its type is in it. Then it is sent from where it lies.
func (p *Proxy) serveManifest(ctx context.Context, w *response, r *http.Request, q *request, o *cache.Object, d digest.Digest, contentType string) error {
	info, known := p.infos.get(d)
	if known && o.Source == cache.Hit {
		mediaType, err := info.typeAs(contentType)
		if err != nil {
			return err
		}
		return serveObject(w, r, o, d, mediaType)
	}
	defer context.AfterFunc(ctx, o.Interrupt)()
	start, from := time.Now(), stepFirstByte
	if o.Source == cache.Hit {
		from = stepDisk
	}
	data, release, err := p.readManifest(ctx, q.upstream, o.Content, o.Size)
	w.waits.since(from, start)
	defer func() { release() }()
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return err
	}
	if info, err = parseManifest(data); err != nil {
		return err
	}
	if o.Source == cache.Hit {
		p.infos.put(d, info)
	}
	mediaType, err := info.typeAs(contentType)
	if err != nil {
		return err
	}
	p.sizes.note(q.repositoryKey(), data)
	if o.Source == cache.Fetched {
		p.fetchAhead(q, data)
	}
	if _, err := o.Content.Seek(0, io.SeekStart); err == nil && len(data) > smallManifest && o.Rereadable() {
		data = nil
		release()
		release = func() {}
		return serveObject(w, r, o, d, mediaType)
	}
	release()
	if release, err = p.holdSent(q.upstream, int64(len(data))); err != nil {
		release = func() {}
		return err
	}
	whole := &cache.Object{Size: int64(len(data)), Content: bytes.NewReader(data)}
	return serveObject(w, r, whole, d, mediaType)
}
