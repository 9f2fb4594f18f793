// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"tarn/blobstore"
	"tarn/cache"
	"tarn/index"
	"tarn/rights"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// serveTag answers HEAD and GET of a tag. What the tag means is the authority's
// answer to a question that was sent after this request arrived; the bytes come
// from the disk when they are there.
func (p *Proxy) serveTag(ctx context.Context, w *response, r *http.Request, q *request) error {
	w.told.asked = http.MethodHead
	c, shared, err := p.confirmInTime(ctx, w, q)
	if err != nil {
		return p.serveStaleTag(ctx, w, r, q, err)
	}
	w.collapsed = shared
	w.told.asked, w.told.meant, w.told.before = c.asked, c.digest, c.before
	if q.method == http.MethodHead && c.poor() {
		return p.relayManifest(ctx, w, q, c)
	}
	if schema1(c.mediaType) || !accepts(q.accept, c.mediaType) {
		return p.relayManifest(ctx, w, q, c)
	}
	if q.method == http.MethodHead {
		return p.headTag(ctx, w, r, q, c)
	}
	return p.getTag(ctx, w, r, q, c)
}

// confirmInTime leaves time for a stale answer, where one is allowed.
func (p *Proxy) confirmInTime(ctx context.Context, w *response, q *request) (*confirmation, bool, error) {
	asking, cancel := p.askingTime(ctx, w, q)
	defer cancel()
	defer w.waits.since(stepHead, time.Now())
	return p.confirmTag(asking, ctx, q, false)
}

// askingTime is how long the authority may be asked on this request's behalf:
// its head_timeout from the request's arrival on, where a stale answer may be
// given then, and a little more, so that a question that was sent at once says
// itself that it took too long.
func (p *Proxy) askingTime(ctx context.Context, w *response, q *request) (context.Context, context.CancelFunc) {
	if p.rules(q.upstream).StaleIfError <= 0 {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, w.start.Add(p.upstreams.Registry(q.upstream).HeadTimeout()+askingGrace))
}

const askingGrace = 50 * time.Millisecond

// confirmTag asks what the tag means, with a HEAD first unless the manifest
// itself is wanted.
func (p *Proxy) confirmTag(asking, ctx context.Context, q *request, manifest bool) (*confirmation, bool, error) {
	if err := p.recall(q.asker); err != nil {
		return nil, false, err
	}
	return p.fresh.confirm(asking, ctx, p.ctx, headKey{
		method:     q.method,
		manifest:   manifest,
		upstream:   string(q.upstream),
		repository: q.repository,
		tag:        q.tag,
		accept:     acceptKey(q.accept),
		credential: q.asker.Credential,
	})
}

// askTag is the question of a batch: a HEAD, and where that gets a no or says
// too little, the GET that the clients sent. The body of a GET is hashed. One
// that follows a HEAD has a number of its own.
func (p *Proxy) askTag(ctx context.Context, key headKey, sequence uint64) (*confirmation, error) {
	ctx, cancel := context.WithTimeout(ctx, headerDeadline)
	defer cancel()
	q := &request{
		method: key.method, kind: upstream.Manifest, upstream: upstream.Name(key.upstream), repository: key.repository,
		tag: key.tag, accept: acceptLines(key.accept),
	}
	q.asker = p.rights.Asker(q.repositoryKey(), key.credential)
	asked, method := p.now(), http.MethodHead
	var c *confirmation
	var err error
	if !key.manifest {
		c, err = p.headTagAt(ctx, q)
	}
	if key.manifest || lacksHead(err) || err == nil && c.poor() || isNo(err) && key.method == http.MethodGet {
		refused := err != nil
		poor := c
		asked, method = p.now(), http.MethodGet
		if !key.manifest {
			sequence = p.fresh.number()
		}
		if c, err = p.readTag(ctx, q); err == nil && refused {
			p.upstreams.Registry(q.upstream).Saw(upstream.HeadRefused)
		}
		if poor != nil && answered(err) && key.method == http.MethodHead {
			poor.asked = http.MethodHead
			return poor, nil // it says yes to HEAD and no to GET, and that is what there is to say
		}
	}
	if err != nil {
		p.refuseTag(q, sequence, err, asked)
		return nil, err
	}
	c.evidence.Asked = asked
	c.yes = p.rights.Learn(q.asker, q.object(c.digest), c.evidence)
	c.row = index.Tag{Digest: c.digest, Confirmed: asked, Sequence: sequence}
	c.asked = method
	tag := q.repositoryKey().TagKey(q.tag)
	if last, known := p.cache.Index().Tag(tag); known && last.Digest != c.digest {
		c.before = last.Digest
	}
	p.cache.NoteTag(tag, c.row)
	if !c.stored && c.digest != "" {
		p.pending.add(q.repositoryKey(), q.tag, c.row)
	}
	return c, nil
}

// notePending notes the tags of a manifest that is here now.
func (p *Proxy) notePending(q *request, d digest.Digest) {
	for tag, row := range p.pending.take(q.repositoryKey(), d) {
		p.cache.NoteTag(q.repositoryKey().TagKey(tag), row)
	}
}

// refuseTag takes the last word on a tag. One that meant something means nothing
// any more when somebody hears so who could have been served: whom the
// repository is hidden from hears the same.
func (p *Proxy) refuseTag(q *request, sequence uint64, err error, asked time.Time) {
	e := refusalOf(err, asked)
	if e.Says == rights.NoObject {
		e.Says = rights.NoTag
		key := q.repositoryKey().TagKey(q.tag)
		if before, known := p.cache.Index().Tag(key); known && before.Digest != "" {
			e.Says = rights.TagGone
			if p.rights.Had(q.asker, q.object(before.Digest)) {
				p.cache.NoteTag(key, index.Tag{Sequence: sequence})
			}
		}
		if p.cache.Index().Owes() {
			defer p.keepTaken()
		}
	}
	p.rights.Learn(q.asker, rights.Object{Kind: string(q.kind)}, e)
}

// headTagAt asks with HEAD.
func (p *Proxy) headTagAt(ctx context.Context, q *request) (*confirmation, error) {
	resp, err := p.do(ctx, q, q.asker.Credential, http.MethodHead, q.tag, part{})
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	c := &confirmation{size: resp.Size, mediaType: resp.MediaType}
	if blobstore.CheckDigest(resp.Digest) == nil {
		c.digest = resp.Digest
	}
	if resp.Size == 0 || resp.Encoding != "" {
		c.size = -1 // not the manifest's
	}
	c.evidence, c.stored = p.weigh(q, c.digest, resp, time.Time{})
	return c, nil
}

// poor tells whether an answer leaves out the digest, the length or the type.
func (c *confirmation) poor() bool {
	return c.digest == "" || c.size < 0 || !manifestLike(c.mediaType) && !schema1(c.mediaType)
}

// readTag asks for the manifest itself.
func (p *Proxy) readTag(ctx context.Context, q *request) (*confirmation, error) {
	resp, err := p.do(ctx, q, q.asker.Credential, http.MethodGet, q.tag, part{})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	c, err := p.readBody(ctx, q, resp)
	if err != nil {
		return nil, err
	}
	if schema1(c.mediaType) { // which nobody here can verify
		c.evidence, _ = p.weigh(q, c.digest, resp, time.Time{})
		return c, nil
	}
	c.evidence = rights.Evidence{Says: rights.Verified, Redirected: resp.Redirected, Size: c.size, MediaType: c.mediaType}
	return c, nil
}

// readBody reads a manifest whole, and names it by its bytes.
func (p *Proxy) readBody(ctx context.Context, q *request, resp *upstream.Response) (*confirmation, error) {
	data, release, err := p.readManifest(ctx, q.upstream, resp.Body, resp.Size)
	defer release()
	if err != nil {
		return nil, err
	}
	if resp.Size >= 0 && int64(len(data)) != resp.Size {
		return nil, fmt.Errorf("%w: %d bytes of the %d announced", cache.ErrBroken, len(data), resp.Size)
	}
	if resp.Encoding != "" {
		data = decoded(data, resp.Encoding, resp.Digest)
	}
	c := &confirmation{size: int64(len(data)), mediaType: resp.MediaType, body: data}
	if schema1(c.mediaType) {
		if resp.Size < 0 && !json.Valid(data) { // nothing would tell a part from the whole
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
	if resp.Digest != "" && blobstore.CheckDigest(resp.Digest) == nil && resp.Digest != c.digest {
		if resp.Digest.Algorithm().FromBytes(data) == resp.Digest {
			c.digest = resp.Digest
		} // else the header is of something else, and nobody's clients look at it
	}
	return c, nil
}

// headTag answers from what was verified when the manifest is here, and else
// from the HEAD; it fetches nothing, because who polls would spend the quota
// of pulls.
func (p *Proxy) headTag(ctx context.Context, w *response, r *http.Request, q *request, c *confirmation) error {
	size, cached := p.cache.Has(p.key(q, c.digest))
	if cached && c.yes.Covers(size) {
		mediaType, err := p.storedType(ctx, q, c.digest, c.mediaType)
		if !errors.Is(err, errGone) {
			if err != nil {
				return err
			}
			w.detail(outcomeConfirmed, "fwd=stale; fwd-status=200", "confirmed")
			return serveHead(w, r, c.digest, mediaType, size)
		}
	}
	w.told.unproven = cached // and the answer is not about that
	w.detail(outcomeMiss, "fwd=uri-miss; fwd-status=200", "")
	return serveHead(w, r, c.digest, c.mediaType, c.size)
}

// getTag serves the manifest, which is fetched by its digest when it is not
// here: the tag may move between HEAD and GET. Some registries have it by its
// tag only, and it may be gone meanwhile: then the tag is asked for itself.
func (p *Proxy) getTag(ctx context.Context, w *response, r *http.Request, q *request, c *confirmation) error {
	o, err := p.openTag(ctx, w, q, c)
	if err != nil && (!goesByTag(err) || c.body != nil) {
		return err
	}
	if err != nil {
		start := time.Now()
		c, w.collapsed, err = p.confirmTag(ctx, ctx, q, true)
		if w.waits.since(stepHead, start); err != nil {
			return err
		}
		w.told.asked, w.told.meant = c.asked, c.digest
		if schema1(c.mediaType) || !accepts(q.accept, c.mediaType) {
			return p.relayManifest(ctx, w, q, c)
		}
		if o, err = p.openTag(ctx, w, q, c); err != nil {
			return err
		}
	}
	defer o.Close()
	if o.Source == cache.Hit {
		w.detail(outcomeConfirmed, "fwd=stale; fwd-status=200", "confirmed")
	} else {
		p.notePending(q, c.digest)
		w.source(o.Source)
	}
	return p.serveManifest(ctx, w, r, q, o, c.digest, c.mediaType)
}

// goesByTag tells whether the tag itself is worth asking for, after it was not to be had
// by its digest.
func goesByTag(err error) bool {
	return err != nil && (isNo(err) || errors.Is(err, cache.ErrBroken) || errors.Is(err, errManifest))
}

// openTag opens what the authority said that the tag means. What is here of
// another size than it said is not that: the client's own request tells.
func (p *Proxy) openTag(ctx context.Context, w *response, q *request, c *confirmation) (*cache.Object, error) {
	one := *q
	one.digest = c.digest
	f := p.fetcher(&one, c.digest, &c.yes)
	w.fetcher = f
	fetch, mediaType := f.fetch, c.mediaType
	if data := c.body; data != nil {
		fetch = func(context.Context, int64, int64) (body, cache.Info, error) {
			return io.NopCloser(bytes.NewReader(data)), cache.Info{Size: int64(len(data))}, nil
		}
	}
	o, err := p.open(ctx, w, cache.Request{
		Key:        p.key(q, c.digest),
		Reader:     q.asker.Name(),
		Source:     string(q.upstream),
		Authorised: true,
		Fetch:      fetch,
		Verified:   f.verified,
		Wrong:      f.wrong,
		Check:      checkAs(func() string { return mediaType }),
	})
	if err == nil && (o.Source != cache.Fetched && !c.yes.Covers(o.Size) || o.Doubtful && c.size != o.Size) {
		o.Close()
		return nil, errAnotherThing
	}
	return o, err
}

// errAnotherThing: what the authority said yes to is not what is here.
var errAnotherThing = fmt.Errorf("%w: what it says yes to is not this object", upstream.ErrProtocol)

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
	switch {
	case schema1(c.mediaType):
		cause = "schema1"
	case c.poor():
		cause = "head-only"
	}
	w.detail(outcomeBypassed, "fwd=bypass; fwd-status=200", cause)
	if q.method == http.MethodHead {
		h.Set("Content-Type", cmp.Or(c.mediaType, blobType))
		if c.size >= 0 {
			h.Set("Content-Length", fmt.Sprint(c.size))
		}
		if c.digest != "" {
			setDigest(h, c.digest)
		}
		w.WriteHeader(http.StatusOK)
		return nil
	}
	if c.body == nil {
		var err error
		start := time.Now()
		c, err = p.readAlone(ctx, q)
		if w.waits.since(stepFirstByte, start); err != nil {
			return err
		}
	}
	data := c.body
	release, err := p.holdSent(q.upstream, int64(len(data)))
	if err != nil {
		return err
	}
	defer release()
	h.Set("Content-Type", c.mediaType)
	h.Set("Content-Length", fmt.Sprint(len(data)))
	if c.digest != "" {
		setDigest(h, c.digest)
	}
	w.WriteHeader(http.StatusOK)
	_, err = w.Write(data)
	return aborted(err)
}

// readAlone asks for the manifest itself, for this client alone. Only of a
// schema 1 manifest the digest is the registry's word; of all others it is
// that of the bytes.
func (p *Proxy) readAlone(ctx context.Context, q *request) (*confirmation, error) {
	resp, _, err := p.ask(ctx, q, http.MethodGet, q.reference(), part{})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	stop := context.AfterFunc(ctx, func() { resp.Body.Close() })
	defer stop()
	c, err := p.readBody(ctx, q, resp)
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
