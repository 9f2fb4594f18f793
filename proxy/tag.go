// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"tarn/blobstore"
	"tarn/cache"
	"tarn/index"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// serveTag answers HEAD and GET of a tag. What the tag means is the authority's
// answer to a HEAD that was sent after this request arrived; the bytes come
// from the disk when they are there.
func (p *Proxy) serveTag(ctx context.Context, w *response, r *http.Request, q *request) error {
	for again := true; ; again = false {
		c, shared, err := p.confirmInTime(ctx, w, q)
		if err != nil {
			return p.serveStaleTag(ctx, w, r, q, err)
		}
		w.collapsed = shared
		if schema1(c.mediaType) || !accepts(q.accept, c.mediaType) {
			return p.relayManifest(ctx, w, q, c)
		}
		if q.method == http.MethodHead {
			return p.headTag(ctx, w, r, q, c)
		}
		err = p.getTag(ctx, w, r, q, c)
		var refused *upstream.StatusError
		if again && errors.As(err, &refused) && refused.Status == http.StatusNotFound {
			continue // the tag was moved, and what it meant deleted, in between
		}
		return err
	}
}

// confirmInTime leaves time for a stale answer, where one is allowed.
func (p *Proxy) confirmInTime(ctx context.Context, w *response, q *request) (*confirmation, bool, error) {
	asking, cancel := p.askingTime(ctx, w, q)
	defer cancel()
	return p.confirmTag(asking, ctx, q)
}

// askingTime is how long the authority may be asked on this request's behalf:
// its head_timeout from the request's arrival on, where a stale answer may be
// given then, and a little more, so that a question that was sent at once says
// itself that it took too long.
func (p *Proxy) askingTime(ctx context.Context, w *response, q *request) (context.Context, context.CancelFunc) {
	if p.staleLimit(q.upstream) <= 0 {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, w.start.Add(p.upstreams.Registry(q.upstream).HeadTimeout()+askingGrace))
}

const askingGrace = 50 * time.Millisecond

func (p *Proxy) confirmTag(asking, ctx context.Context, q *request) (*confirmation, bool, error) {
	if err := p.recall(q.repositoryKey(), q.credential); err != nil {
		return nil, false, err
	}
	return p.fresh.confirm(asking, ctx, p.ctx, headKey{
		upstream:   string(q.upstream),
		repository: q.repository,
		tag:        q.tag,
		accept:     acceptKey(q.accept),
		credential: q.credential,
	})
}

// askTag is the HEAD of a batch. Registries that refuse HEAD, or leave out the
// digest, the length or the type, are asked with GET, and the body is hashed.
func (p *Proxy) askTag(ctx context.Context, key headKey, sequence uint64) (*confirmation, error) {
	ctx, cancel := context.WithTimeout(ctx, headerDeadline)
	defer cancel()
	repository := index.RepositoryKey{Upstream: key.upstream, Repository: key.repository}
	asked := p.now()
	c, err := p.headOrReadTag(ctx, key)
	if err != nil {
		p.forgetTag(repository, key.tag, key.credential, sequence, err)
		p.said(repository, upstream.Manifest, "", key.credential, err)
		return nil, err
	}
	c.tag = index.Tag{Digest: c.digest, Confirmed: asked, Sequence: sequence}
	p.cache.NoteTag(repository.TagKey(key.tag), c.tag)
	p.granted(repository, key.credential, asked)
	p.remember(repository, key.credential, asked)
	p.member(repository, upstream.Manifest, c.digest, key.credential, asked, c.mediaType)
	return c, nil
}

func (p *Proxy) headOrReadTag(ctx context.Context, key headKey) (*confirmation, error) {
	registry := p.upstreams.Registry(upstream.Name(key.upstream))
	ask := upstream.Request{
		Method:        http.MethodHead,
		Repository:    key.repository,
		Kind:          upstream.Manifest,
		Reference:     key.tag,
		Accept:        acceptLines(key.accept),
		Authorization: key.credential.authorization,
	}
	if key.credential.node {
		ask.As = upstream.Node
	}
	if ask.Accept == nil {
		ask.Accept = defaultAccept
	}
	resp, err := registry.Do(ctx, ask)
	var refused *upstream.StatusError
	if errors.As(err, &refused) && (refused.Status == http.StatusMethodNotAllowed || refused.Status == http.StatusNotImplemented) {
		return readTag(ctx, registry, ask)
	}
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	if blobstore.CheckDigest(resp.Digest) != nil || resp.Size < 0 || !manifestLike(resp.MediaType) {
		return readTag(ctx, registry, ask)
	}
	return &confirmation{digest: resp.Digest, size: resp.Size, mediaType: resp.MediaType}, nil
}

// readTag asks for the manifest itself.
func readTag(ctx context.Context, registry *upstream.Registry, ask upstream.Request) (*confirmation, error) {
	ask.Method = http.MethodGet
	resp, err := registry.Do(ctx, ask)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return readBody(resp)
}

// readBody reads a manifest whole, and names it by its bytes.
func readBody(resp *upstream.Response) (*confirmation, error) {
	data, err := io.ReadAll(&limitedBody{resp.Body, maxManifest})
	if err != nil {
		return nil, err
	}
	if resp.Size >= 0 && int64(len(data)) != resp.Size {
		return nil, fmt.Errorf("%w: %d bytes of the %d announced", cache.ErrBroken, len(data), resp.Size)
	}
	c := &confirmation{size: int64(len(data)), mediaType: resp.MediaType, body: data}
	if schema1(c.mediaType) {
		if resp.Size < 0 { // nothing would tell a part from the whole
			return nil, fmt.Errorf("%w: a schema 1 manifest without a length", upstream.ErrProtocol)
		}
		c.digest = resp.Digest // over the payload without its signatures
		return c, nil
	}
	info, err := parseManifest(data)
	if err != nil {
		return nil, err
	}
	if c.mediaType, err = info.typeAs(resp.MediaType); err != nil {
		return nil, err
	}
	c.digest = digest.FromBytes(data)
	if resp.Digest != "" && resp.Digest.Algorithm() == c.digest.Algorithm() && resp.Digest != c.digest {
		return nil, fmt.Errorf("%w: the bytes are %s, the header says %s", cache.ErrBroken, c.digest, resp.Digest)
	}
	return c, nil
}

// headTag answers from what was verified when the manifest is here, and else
// from the HEAD; it fetches nothing, because who polls would spend the quota
// of pulls.
func (p *Proxy) headTag(ctx context.Context, w *response, r *http.Request, q *request, c *confirmation) error {
	if size, cached := p.cache.Has(p.key(q, c.digest)); cached {
		mediaType, err := p.storedType(ctx, q, c.digest, c.mediaType)
		if !errors.Is(err, errGone) {
			if err != nil {
				return err
			}
			w.detail("fwd=stale; fwd-status=200", "confirmed")
			return serveHead(w, r, c.digest, mediaType, size)
		}
	}
	w.detail("fwd=uri-miss; fwd-status=200", "")
	return serveHead(w, r, c.digest, c.mediaType, c.size)
}

// getTag serves the manifest, which is fetched by its digest when it is not
// here: the tag may move between HEAD and GET.
func (p *Proxy) getTag(ctx context.Context, w *response, r *http.Request, q *request, c *confirmation) error {
	fetch := p.fetch(q, c.digest, true, nil)
	if c.body != nil {
		fetch = func(context.Context, int64, int64) (body, cache.Info, error) {
			return io.NopCloser(bytes.NewReader(c.body)), cache.Info{Size: c.size}, nil
		}
	}
	o, err := p.cache.Open(ctx, cache.Request{
		Key:        p.key(q, c.digest),
		Reader:     q.reader,
		Source:     string(q.upstream),
		Authorised: true,
		Fetch:      fetch,
		Check:      checkAs(func() string { return c.mediaType }),
	})
	if err != nil {
		return err
	}
	defer o.Close()
	if o.Source == cache.Hit {
		w.detail("fwd=stale; fwd-status=200", "confirmed")
	} else {
		p.cache.NoteTag(q.repositoryKey().TagKey(q.tag), c.tag) // what it means comes only now
		w.source(o.Source)
	}
	return p.serveManifest(ctx, w, r, q, o, c.digest, c.mediaType)
}

// checkAs is a flight's check of a manifest, with the type that the authority
// gave.
func checkAs(contentType func() string) func([]byte) error {
	return func(data []byte) error {
		info, err := parseManifest(data)
		if err == nil {
			_, err = info.typeAs(contentType())
		}
		return err
	}
}

// relayManifest passes on what cannot be cached by its digest, or is of a type
// that the client did not ask for, as the upstream gives it.
func (p *Proxy) relayManifest(ctx context.Context, w *response, q *request, c *confirmation) error {
	h := w.Header()
	cause := "type-not-accepted"
	if schema1(c.mediaType) {
		cause = "schema1"
	}
	w.detail("fwd=bypass; fwd-status=200", cause)
	if q.method == http.MethodHead {
		h.Set("Content-Type", c.mediaType)
		h.Set("Content-Length", fmt.Sprint(c.size))
		if c.digest != "" {
			setDigest(h, c.digest)
		}
		w.WriteHeader(http.StatusOK)
		return nil
	}
	if c.body == nil {
		var err error
		if c, err = p.readManifest(ctx, q); err != nil {
			return err
		}
	}
	data := c.body
	h.Set("Content-Type", c.mediaType)
	h.Set("Content-Length", fmt.Sprint(len(data)))
	if c.digest != "" {
		setDigest(h, c.digest)
	}
	w.WriteHeader(http.StatusOK)
	_, err := w.Write(data)
	return aborted(err)
}

// readManifest asks for the manifest itself, for this client alone. Only of a
// schema 1 manifest the digest is the registry's word; of all others it is
// that of the bytes.
func (p *Proxy) readManifest(ctx context.Context, q *request) (*confirmation, error) {
	resp, _, err := p.ask(ctx, q, http.MethodGet, q.reference(), part{})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	stop := context.AfterFunc(ctx, func() { resp.Body.Close() })
	defer stop()
	c, err := readBody(resp)
	if err != nil {
		return nil, err
	}
	if q.digest != "" && !schema1(c.mediaType) {
		if got := q.digest.Algorithm().FromBytes(c.body); got != q.digest {
			return nil, fmt.Errorf("%w: the bytes are %s, not %s", cache.ErrBroken, got, q.digest)
		}
		c.digest = q.digest
	}
	return c, nil
}

// setDigest writes the two headers by which clients know an object.
func setDigest(h http.Header, d digest.Digest) {
	h.Set("Docker-Content-Digest", d.String())
	h.Set("ETag", `"`+d.String()+`"`)
}

// quoted tells whether an If-None-Match header names this digest, in quotes or,
// as some clients send it, without.
func quoted(header string, d digest.Digest) bool {
	for tag := range strings.SplitSeq(header, ",") {
		tag = strings.TrimPrefix(strings.TrimSpace(tag), "W/")
		if tag == "*" || strings.Trim(tag, `"`) == d.String() {
			return true
		}
	}
	return false
}

// noTime keeps http.ServeContent from dating an answer: only the digest says
// what is current.
var noTime time.Time
