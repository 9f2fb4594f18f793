// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"tarn/cache"
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
	o, y, err := p.openDigest(ctx, w, q)
	if errors.Is(err, errSchema1) {
		return p.relayManifest(ctx, w, q, &confirmation{mediaType: schema1Type})
	}
	if err != nil {
		return err
	}
	defer o.Close()
	defer p.begin(q, y, o.Size)()
	if w.source(o.Source); y.stale != nil {
		w.stale(y.stale)
	}
	if q.kind == upstream.Manifest {
		return p.serveManifest(ctx, w, r, q, o, q.digest, y.mediaType)
	}
	return serveObject(w, r, o, q.digest, blobType)
}

// openDigest opens an object for a client that may have it. Who is known to be
// entitled is not asked about again. What is here costs everybody else a HEAD
// with their own credential; what is not, is asked for by the GET that fetches
// it, whose answer those wait for that ask with the same credential.
func (p *Proxy) openDigest(ctx context.Context, w *response, q *request) (*cache.Object, yes, error) {
	req := cache.Request{
		Key:    p.key(q, q.digest),
		Reader: q.reader,
		Source: string(q.upstream),
		Offset: q.first,
		Length: q.length,
		Ranged: q.ranged,
	}
	if q.kind == upstream.Blob {
		req.Parallel = p.rules(q.upstream).Parallel
		req.Ahead = q.credential.authorization != "" && !p.lendsNode(q)
	}
	y, ok := p.entitled(q)
	if !ok {
		if err := p.recall(q.repositoryKey(), q.credential); err != nil {
			return nil, yes{}, err
		}
	}
	if !ok && !p.lendsNode(q) {
		var answer yes
		req.Fetch = p.fetch(q, q.digest, false, &answer)
		req.Check = p.check(q, func() string { return answer.mediaType }) // runs after the Fetch
		req.Wait = p.rules(q.upstream).GrantTTL > 0
		req.Wrong = func() { p.retract(q.repositoryKey(), q.kind, q.digest, q.credential) }
		o, err := p.cache.Open(ctx, req)
		switch {
		case err == nil:
			return o, answer, nil
		case !errors.Is(err, cache.ErrAuthorise):
			return nil, yes{}, err // the Fetch may be running still
		}
		y, ok = p.entitled(q)
	}
	if !ok {
		var err error
		if y, err = p.inquireOrStale(ctx, w, q); err != nil {
			return nil, yes{}, err
		}
	}
	// The flight that is there may fail, and then it is this client's turn.
	// The other endpoints may serve it, unless the yes was for what had begun.
	req.Authorised, req.Wrong = true, nil
	req.Fetch = p.fetch(q, q.digest, !y.finishing, nil)
	if y.stale != nil {
		req.Fetch = notNow
	}
	req.Check = p.check(q, func() string { return y.mediaType })
	o, err := p.cache.Open(ctx, req)
	if y.stale != nil && errors.Is(err, errGone) {
		err = y.stale.err // nobody has it now
	}
	return o, y, err
}

// inquireOrStale asks the authority about the object, by HEAD, or says what may
// be served while it cannot be asked.
func (p *Proxy) inquireOrStale(ctx context.Context, w *response, q *request) (yes, error) {
	asking, cancel := p.askingTime(ctx, w, q)
	defer cancel()
	y, err := p.inquire(asking, q)
	if err != nil {
		return p.stale(q, err)
	}
	return y, nil
}

// inquire asks the authority about the object, by HEAD.
func (p *Proxy) inquire(ctx context.Context, q *request) (yes, error) {
	resp, asked, err := p.ask(ctx, q, http.MethodHead, q.digest.String(), part{})
	if err != nil {
		return yes{}, err
	}
	resp.Body.Close()
	return yes{asked: asked, mediaType: resp.MediaType, size: resp.Size}, nil
}

// check is what a flight looks at before it stores the object.
func (p *Proxy) check(q *request, contentType func() string) func([]byte) error {
	if q.kind != upstream.Manifest {
		return nil
	}
	return checkAs(contentType)
}

// headDigest fetches nothing, unless the registry's answer to HEAD says too
// little.
func (p *Proxy) headDigest(ctx context.Context, w *response, r *http.Request, q *request) error {
	size, cached := p.cache.Has(p.key(q, q.digest))
	y, ok := p.entitled(q)
	if !cached || !ok {
		var err error
		if y, err = p.inquireOrStale(ctx, w, q); err != nil {
			return err
		}
		size, cached = p.cache.Has(p.key(q, q.digest))
	}
	if cached {
		mediaType, err := blobType, error(nil)
		if q.kind == upstream.Manifest {
			mediaType, err = p.storedType(ctx, q, q.digest, y.mediaType)
		}
		if !errors.Is(err, errGone) {
			if err != nil {
				return err
			}
			if w.source(cache.Hit); y.stale != nil {
				w.stale(y.stale)
			}
			return serveHead(w, r, q.digest, mediaType, size)
		}
		if ok { // and no question was asked
			if y, err = p.inquire(ctx, q); err != nil {
				return err
			}
		}
	}
	if y.stale != nil {
		return y.stale.err // it went just now, or was not what it should be
	}
	w.detail("fwd=uri-miss; fwd-status=200", "")
	switch {
	case q.kind == upstream.Blob:
		return serveHead(w, r, q.digest, blobType, y.size)
	case !schema1(y.mediaType) && (y.size < 0 || !manifestLike(y.mediaType)):
		return p.headByGet(ctx, w, r, q)
	}
	return serveHead(w, r, q.digest, y.mediaType, y.size)
}

// headByGet fetches the manifest to say what a HEAD must say of it.
func (p *Proxy) headByGet(ctx context.Context, w *response, r *http.Request, q *request) error {
	var answer yes
	o, err := p.cache.Open(ctx, cache.Request{
		Key:        p.key(q, q.digest),
		Reader:     q.reader,
		Source:     string(q.upstream),
		Authorised: true,
		Fetch:      p.fetch(q, q.digest, true, &answer),
		Check:      checkAs(func() string { return answer.mediaType }),
	})
	if err != nil {
		return err
	}
	defer o.Close()
	w.source(o.Source)
	return p.serveManifest(ctx, w, r, q, o, q.digest, "")
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
		data, err := io.ReadAll(io.LimitReader(o.Content, maxManifest+1))
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
// its type is in it.
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
	if o.Size > maxManifest {
		return fmt.Errorf("%w: it has %d bytes, of at most %d", errManifest, o.Size, maxManifest)
	}
	data, err := io.ReadAll(&limitedBody{io.NopCloser(o.Content), maxManifest})
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
	if o.Source == cache.Fetched {
		p.fetchAhead(q, data)
	}
	whole := &cache.Object{Size: int64(len(data)), Content: bytes.NewReader(data)}
	return serveObject(w, r, whole, d, mediaType)
}

// serveObject sends the object, or the range of it that was asked for.
// http.ServeContent knows ranges and conditions (RFC 9110 13, 14) and hands a
// complete file to the kernel (sendfile).
func serveObject(w *response, r *http.Request, o *cache.Object, d digest.Digest, mediaType string) error {
	h := w.Header()
	h.Set("Content-Type", mediaType)
	setDigest(h, d)
	if o.Source != cache.Hit { // and so may have to wait
		defer context.AfterFunc(r.Context(), o.Interrupt)()
	}
	if o.Size < 0 {
		return serveUnsized(w, r, o, d)
	}
	quoteCondition(r)
	http.ServeContent(w, r, "", noTime, o.Content)
	// A body that broke off is shorter than its Content-Length, and net/http
	// closes the connection on that.
	return nil
}

// quoteCondition adds the quotes that some clients leave out of If-None-Match;
// the standard library knows no such entity tag.
func quoteCondition(r *http.Request) {
	if inm := r.Header.Get("If-None-Match"); inm != "" {
		if d, err := digest.Parse(inm); err == nil {
			r.Header.Set("If-None-Match", `"`+d.String()+`"`)
		}
	}
}

// serveUnsized sends a body of unknown length, chunked; its end is only
// written when all was right. Conditions hold as ever, ranges wait for the
// length: the whole is a legal answer to one (RFC 9110 14.2).
func serveUnsized(w *response, r *http.Request, o *cache.Object, d digest.Digest) error {
	if inm := r.Header.Get("If-None-Match"); inm != "" && quoted(inm, d) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	if !r.ProtoAtLeast(1, 1) {
		return errNoLength
	}
	w.WriteHeader(http.StatusOK)
	_, err := io.Copy(w, onlyReader{o.Content})
	return aborted(err)
}

// onlyReader hides Seek, which io.Copy has no use for.
type onlyReader struct{ io.Reader }

// aborted marks an error after the headers: the connection must be cut, or a
// chunked body would seem to end well.
func aborted(err error) error {
	if err != nil {
		return fmt.Errorf("%w: %w", errAborted, err)
	}
	return nil
}

var errAborted = errors.New("body broke off")

// serveHead answers a HEAD without opening anything. size is -1 when nobody
// knows it.
func serveHead(w *response, r *http.Request, d digest.Digest, mediaType string, size int64) error {
	h := w.Header()
	h.Set("Content-Type", mediaType)
	setDigest(h, d)
	if size < 0 {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	quoteCondition(r)
	http.ServeContent(w, r, "", noTime, sizeOnly(size))
	return nil
}

// sizeOnly is the content of an answer to HEAD: it has a size and no bytes.
type sizeOnly int64

func (s sizeOnly) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		offset += int64(s)
	}
	return offset, nil
}

func (sizeOnly) Read([]byte) (int, error) { return 0, io.EOF }
