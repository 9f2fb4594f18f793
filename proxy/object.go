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

// serveDigest answers HEAD and GET of a manifest or blob by digest. What is
// cached, or on its way, costs one HEAD with this client's credential; what is
// not, is asked for by the GET that fetches it.
func (p *Proxy) serveDigest(ctx context.Context, w *response, r *http.Request, q *request) error {
	if q.method == http.MethodHead {
		return p.headDigest(ctx, w, r, q)
	}
	var said upstream.Response
	req := cache.Request{
		Key:    p.key(q, q.digest),
		Reader: p.reader(q),
		Offset: rangeStart(r),
		Fetch:  p.fetch(q, q.digest, false, &said),
	}
	if q.kind == upstream.Manifest {
		// The check runs in the flight, after this Fetch.
		req.Check = checkAs(func() string { return said.MediaType })
	}
	o, err := p.cache.Open(ctx, req)
	contentType := ""
	if errors.Is(err, cache.ErrAuthorise) {
		var yes *upstream.Response
		if yes, err = p.ask(ctx, q, http.MethodHead, q.digest.String(), false, 0); err != nil {
			return err
		}
		yes.Body.Close()
		contentType = yes.MediaType
		req.Authorised = true
		// The flight that was there may fail, and then it is this client's
		// turn; the other endpoints may serve it now.
		req.Fetch = p.fetch(q, q.digest, true, nil)
		if q.kind == upstream.Manifest {
			req.Check = checkAs(func() string { return contentType })
		}
		o, err = p.cache.Open(ctx, req)
	} else if err == nil {
		contentType = said.MediaType
	}
	if errors.Is(err, errSchema1) {
		return p.relayManifest(ctx, w, q, &confirmation{mediaType: schema1Type})
	}
	if err != nil {
		return err
	}
	defer o.Close()
	w.source(o.Source)
	if q.kind == upstream.Manifest {
		return p.serveManifest(ctx, w, r, q, o, q.digest, contentType)
	}
	return serveObject(w, r, o, q.digest, blobType)
}

// headDigest asks the authority, cached or not, and fetches nothing unless the
// registry's answer to HEAD says too little.
func (p *Proxy) headDigest(ctx context.Context, w *response, r *http.Request, q *request) error {
	yes, err := p.ask(ctx, q, http.MethodHead, q.digest.String(), false, 0)
	if err != nil {
		return err
	}
	yes.Body.Close()
	if size, cached := p.cache.Has(p.key(q, q.digest)); cached {
		mediaType := blobType
		if q.kind == upstream.Manifest {
			mediaType, err = p.storedType(ctx, q, q.digest, yes.MediaType)
		}
		if !errors.Is(err, errGone) {
			if err != nil {
				return err
			}
			w.source(cache.Hit)
			return serveHead(w, r, q.digest, mediaType, size)
		}
	}
	w.detail("fwd=uri-miss; fwd-status=200", "")
	switch {
	case q.kind == upstream.Blob:
		return serveHead(w, r, q.digest, blobType, yes.Size)
	case !schema1(yes.MediaType) && (yes.Size < 0 || !manifestLike(yes.MediaType)):
		return p.headByGet(ctx, w, r, q)
	}
	return serveHead(w, r, q.digest, yes.MediaType, yes.Size)
}

// headByGet fetches the manifest to say what a HEAD must say of it.
func (p *Proxy) headByGet(ctx context.Context, w *response, r *http.Request, q *request) error {
	var said upstream.Response
	o, err := p.cache.Open(ctx, cache.Request{
		Key:        p.key(q, q.digest),
		Reader:     p.reader(q),
		Authorised: true,
		Fetch:      p.fetch(q, q.digest, true, &said),
		Check:      checkAs(func() string { return said.MediaType }),
	})
	if err != nil {
		return err
	}
	defer o.Close()
	w.source(o.Source)
	return p.serveManifest(ctx, w, r, q, o, q.digest, "")
}

// rangeStart is the first byte that the request wants, 0 for all. What cannot
// be read is left to http.ServeContent, which answers it; a suffix counts as
// some way into the object.
func rangeStart(r *http.Request) int64 {
	var first, last int64
	h := r.Header.Get("Range")
	if n, _ := fmt.Sscanf(h, "bytes=%d-%d", &first, &last); n >= 1 {
		if first < 0 {
			return 1 // "-500": the last 500 bytes
		}
		return first
	}
	return 0
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
	defer context.AfterFunc(r.Context(), o.Interrupt)()
	if o.Size < 0 {
		return serveUnsized(w, r, o, d)
	}
	simplifyRange(r)
	http.ServeContent(w, r, "", noTime, o.Content)
	// A body that broke off is shorter than its Content-Length, and net/http
	// closes the connection on that.
	return nil
}

// simplifyRange leaves the one kind of range that registries' clients send, so
// that the answer is the same whether the object is complete or on its way: a
// GET with one range. A server may ignore any other (RFC 9110 14.2).
func simplifyRange(r *http.Request) {
	h := r.Header
	if r.Method != http.MethodGet || len(h["Range"]) > 1 || bytes.IndexByte([]byte(h.Get("Range")), ',') >= 0 {
		h.Del("Range")
	}
	if inm := h.Get("If-None-Match"); inm != "" {
		// Some clients leave the quotes out; the standard library knows no
		// such entity tag.
		if d, err := digest.Parse(inm); err == nil {
			h.Set("If-None-Match", `"`+d.String()+`"`)
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
	simplifyRange(r)
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
