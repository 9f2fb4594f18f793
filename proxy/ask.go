// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	"tarn/cache"
	"tarn/index"
	"tarn/rights"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
)

// How an authority is asked, and what its answer is evidence of. What that makes
// is the package rights' to say. The last word is the registry's answer to the
// client's own request: where a question of tarn's own, a HEAD for a GET, gets a
// no or says too little, the request that the client sent is put itself.

// sourceDomain is whose deliveries may serve this upstream. The operator vouches
// for the listed ones together; a stranger vouches for itself only.
func (p *Proxy) sourceDomain(name upstream.Name) string {
	if p.upstreams.Listed(name) {
		return cache.ListedDomain
	}
	return string(name)
}

// mayPass tells whether an Authorization, or a challenge that asks for one, may
// pass between this client and the upstream. Clients that find tarn by a path
// keep their secrets under tarn's own address, and would hand them to whatever
// registry the path names; containerd's credential is the image host's. Once
// there is a token broker, secrets are kept under tarn's address for it, and
// BuildKit shows those to a mirror that it was given, too; nothing tells its
// requests for layers from containerd's. Who is refused here goes to the
// registry itself.
func (p *Proxy) mayPass(q *request) bool {
	return p.upstreams.Listed(q.upstream) || q.form == formNS && !p.ruleset.brokers
}

// credentialOf is how the upstream is asked on behalf of this client: with what
// the client sent, as far as it may pass; as the node where the operator shares
// the repository with every client of the node; else as anonymous.
func (p *Proxy) credentialOf(q *request) rights.Credential {
	switch {
	case p.shared(q):
		return rights.Credential{Node: true}
	case p.mayPass(q):
		return rights.Credential{Authorization: q.authorization}
	}
	return rights.Credential{}
}

// shared tells whether the operator lets every client have this repository.
func (p *Proxy) shared(q *request) bool {
	for _, pattern := range p.rules(q.upstream).Share {
		if ok, err := path.Match(pattern, q.repository); ok && err == nil {
			return true
		}
	}
	return false
}

// identify works out once who the request is to the authority.
func (p *Proxy) identify(q *request) {
	q.asker = p.rights.Asker(q.repositoryKey(), p.credentialOf(q))
}

func (q *request) repositoryKey() index.RepositoryKey {
	return index.RepositoryKey{Upstream: string(q.upstream), Repository: q.repository}
}

func (q *request) object(d digest.Digest) rights.Object {
	return rights.Object{Kind: string(q.kind), Digest: d}
}

// entitled tells whether the client may have the object without another
// question.
func (p *Proxy) entitled(q *request) (rights.Yes, bool) {
	return p.rights.Entitled(q.asker, q.object(q.digest), func() int64 { return p.here(q) }, q.resumes)
}

// here is the size of what is stored of the object or on its way, -1 where nobody
// knows it.
func (p *Proxy) here(q *request) int64 {
	if size, here := p.cache.Size(p.key(q, q.digest)); here {
		return size
	}
	return -1
}

// recall returns the 401 that anonymous was answered with here a moment ago.
func (p *Proxy) recall(a rights.Asker) error {
	if r, ok := p.rights.Refused(a); ok {
		return &upstream.StatusError{Status: http.StatusUnauthorized, Challenge: r.Challenge, Denied: r.Denied}
	}
	return nil
}

// ask puts a question to the authority, unless the refusal of a moment ago answers
// it.
func (p *Proxy) ask(ctx context.Context, q *request, method, reference string, part part) (*upstream.Response, rights.Yes, error) {
	if err := p.recall(q.asker); err != nil {
		return nil, rights.Yes{}, err
	}
	return p.put(ctx, q, method, reference, part)
}

// put puts a question to the authority, with the client's own credential, and
// takes what the answer says of an object, if it is about one: a yes, or an
// error that others may share who are the same to the authority; ownWords makes
// each client's own of it. A no to a HEAD for a client's GET, or to a GET for a
// client's HEAD, is not the last word, and is not taken.
func (p *Proxy) put(ctx context.Context, q *request, method, reference string, part part) (*upstream.Response, rights.Yes, error) {
	asked := p.now()
	resp, err := p.do(ctx, q, q.asker.Credential, method, reference, part)
	if q.kind != upstream.Manifest && q.kind != upstream.Blob {
		return resp, rights.Yes{}, err // lists make no rights
	}
	d := digest.Digest(reference)
	if d.Validate() != nil {
		d = ""
	}
	switch {
	case err != nil && !q.completes && (method == q.method || method == http.MethodHead && !isNo(err)):
		p.rights.Learn(q.asker, q.object(d), refusalOf(err, asked))
		return nil, rights.Yes{}, err
	case err != nil:
		return nil, rights.Yes{}, err
	}
	e, _ := p.weigh(q, d, resp, asked)
	return resp, p.rights.Learn(q.asker, q.object(d), e), nil
}

// weigh says what a 2xx of the authority is evidence of. A registry behind a
// sign-on page says 200 to everybody; what counts is whether the answer names
// the object, or says the size of one that is stored. It tells that, too.
func (p *Proxy) weigh(q *request, d digest.Digest, resp *upstream.Response, asked time.Time) (e rights.Evidence, stored bool) {
	e = rights.Evidence{Says: rights.Mute, Asked: asked, Redirected: resp.Redirected, Size: resp.Size, MediaType: resp.MediaType}
	if d == "" {
		return e, false
	}
	size, stored := p.cache.Has(p.key(q, d))
	if resp.Size == 0 && d != d.Algorithm().FromBytes(nil) || q.kind == upstream.Manifest && resp.Encoding != "" {
		e.Size = -1 // says too little, or the length of something else
	}
	switch {
	case !resp.Authority:
		e.Size = -1 // bytes at most, and no word
	case resp.Web():
	case resp.Digest != "" && resp.Digest != d && resp.Digest.Algorithm() == d.Algorithm():
		e.Size = -1 // of another thing
	case resp.Digest == d && !resp.Redirected && (!stored || e.Size < 0 || e.Size == size), resp.Digest == d && stored && e.Size == size:
		e.Says = rights.Named
	case stored && e.Size == size:
		e.Says = rights.Sized
	}
	return e, stored
}

// refusalOf is what an error of the authority is evidence of.
func refusalOf(err error, asked time.Time) rights.Evidence {
	e := rights.Evidence{Says: rights.Nothing, Asked: asked, Size: -1}
	var refused *upstream.StatusError
	if !errors.As(err, &refused) || refused.Foreign {
		return e
	}
	switch refused.Status {
	case http.StatusUnauthorized:
		e.Says, e.Challenge, e.Denied = rights.Unauthorised, refused.Challenge, refused.Denied
	case http.StatusForbidden, http.StatusUnavailableForLegalReasons:
		e.Says = rights.Forbidden
	case http.StatusNotFound, http.StatusGone:
		e.Says = rights.NoObject
	}
	return e
}

// isNo tells whether an answer to a question of tarn's own may be another one to
// the client's request: it is any status but a 429 and a 503, and no 401 that says
// what to show where nothing was; or a connection that broke.
func isNo(err error) bool {
	var status *upstream.StatusError
	if !errors.As(err, &status) {
		return errors.Is(err, upstream.ErrProtocol) || errors.Is(err, upstream.ErrUnreachable) && !errors.Is(err, upstream.ErrTimeout)
	}
	switch status.Status {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return false
	case http.StatusUnauthorized:
		return status.Shown || len(status.Challenge) == 0
	}
	return true
}

// answered tells whether an error is an answer, as opposed to none.
func answered(err error) bool {
	var status *upstream.StatusError
	return errors.As(err, &status) || errors.Is(err, upstream.ErrProtocol)
}

// lacksHead tells whether a registry refuses HEAD as such.
func lacksHead(err error) bool {
	var status *upstream.StatusError
	return errors.As(err, &status) && (status.Status == http.StatusMethodNotAllowed || status.Status == http.StatusNotImplemented)
}

// keepTaken writes what an authority took back before the answer says so.
func (p *Proxy) keepTaken() {
	if err := p.cache.Index().Sync(); err != nil {
		p.log.Error("what a registry took back is known to this process only", zap.Error(err))
	}
}

// part is what of an object is asked for, all of it when it is the zero value,
// and the time to the headers, the registry's own when that is 0.
type part struct {
	offset, length int64 // as in upstream.Request
	budget         time.Duration
}

// do asks the authority.
func (p *Proxy) do(ctx context.Context, q *request, c rights.Credential, method, reference string, part part) (*upstream.Response, error) {
	return p.upstreams.Registry(q.upstream).Do(ctx, p.upstreamRequest(q, c, method, reference, part))
}

// upstreamRequest is the request itself.
func (p *Proxy) upstreamRequest(q *request, c rights.Credential, method, reference string, part part) upstream.Request {
	req := upstream.Request{
		Method:        method,
		Repository:    q.repository,
		Kind:          q.kind,
		Reference:     reference,
		Query:         q.query,
		Accept:        p.acceptFor(q, reference),
		Authorization: c.Authorization,
		Offset:        part.offset,
		Length:        part.length,
		Budget:        part.budget,
	}
	if c.Node {
		req.As = upstream.Node
	}
	return req
}

// anything: some firewalls let nobody pass who says nothing.
var anything = []string{"*/*"}

// acceptFor is what the upstream is told. A digest names its bytes whatever is
// accepted, and a flight is for everybody: they are asked for with all types.
func (p *Proxy) acceptFor(q *request, reference string) []string {
	switch {
	case q.kind == upstream.Blob:
		return anything
	case q.kind != upstream.Manifest:
		return q.accept
	case reference == q.tag && len(q.accept) > 0:
		return q.accept
	case len(q.accept) > 0: // some give a type only to who names it
		return []string{strings.Join(append(slices.Clip(q.accept), defaultAccept...), ", ")}
	default:
		return defaultAccept
	}
}

// ownWords replaces a refusal that would send the client the wrong way: a
// challenge that may not pass, and what the registry says of the node's
// credential, which is not the client's affair.
func (p *Proxy) ownWords(q *request, err error) error {
	var refused *upstream.StatusError
	if !errors.As(err, &refused) ||
		refused.Status != http.StatusUnauthorized && refused.Status != http.StatusForbidden {
		return err
	}
	switch {
	case p.shared(q):
		return &apiError{http.StatusForbidden, errDenied, fmt.Sprintf(
			"%s is shared with every client of this node, but %s refuses the node's credentials: look at credentials: of that upstream in tarn's configuration",
			q.repository, q.upstream)}
	case p.mayPass(q):
		return err
	}
	when := "by path"
	if q.form == formNS {
		when = "with token_broker on"
	}
	return &apiError{http.StatusForbidden, errDenied, fmt.Sprintf(
		"%s refuses anonymous, and %s tarn passes credentials to listed registries only: add \"upstreams: [{name: %q}]\" to its configuration",
		q.upstream, when, q.upstream)}
}

// refusedAlone marks a 4xx as the affair of the credential that asked.
func refusedAlone(err error) error {
	var refused *upstream.StatusError
	var api *apiError
	switch {
	case errors.As(err, &api):
	case !errors.As(err, &refused), refused.Status >= 500:
		return err
	case refused.Status == http.StatusTooManyRequests:
		return fmt.Errorf("%w: %w", cache.ErrLimited, err)
	}
	return fmt.Errorf("%w: %w", cache.ErrRefused, err)
}

// lendsNode tells whether bytes may be fetched with the node's credential for
// a client that has the authority's own yes. A shared repository is asked as
// the node anyhow.
func (p *Proxy) lendsNode(q *request) bool {
	return p.upstreams.Registry(q.upstream).HasNode() && !p.shared(q)
}

// asksApart tells whether the authority is asked for its yes before anybody is asked
// for the bytes, and not with the request that brings them: after the yes, another
// source is the first.
func (p *Proxy) asksApart(q *request) bool {
	return p.fetcher(q, q.digest, nil).sources(true, 0)[0].after
}

// nodeRefused tells whether the node's credential is the trouble, so that the
// client's own may do.
func nodeRefused(err error) bool {
	var refused *upstream.StatusError
	return errors.Is(err, upstream.ErrCredentials) || errors.As(err, &refused) && refused.Status < 500
}

// nodeNote is what ails the node's credential for a registry, "" for nothing, and how often
// that was told in the minute that began then.
type nodeNote struct {
	trouble string
	since   time.Time
	told    int
}

// maxNodeNotes of a minute are logged of one registry.
const maxNodeNotes = 16

// noteNode logs when the node's credential begins to fail, and when it works
// again.
func (p *Proxy) noteNode(name upstream.Name, err error) {
	trouble := ""
	if err != nil && nodeRefused(err) {
		trouble = err.Error()
	}
	var note nodeNote
	if before, ok := p.nodeTrouble.Load(name); ok {
		note = before.(nodeNote)
	}
	if note.trouble == trouble {
		return
	}
	// It may work for one image and not for the next, and clients name the images.
	if note.trouble = trouble; time.Since(note.since) > time.Minute {
		note.since, note.told = time.Now(), 0
	}
	note.told++
	p.nodeTrouble.Store(name, note)
	if note.told > maxNodeNotes {
		return
	}
	if trouble == "" {
		p.log.Info("the node's credentials work again", zap.String("upstream", string(name)))
	} else {
		p.log.Error("the node's credentials do not work; clients' own are used", zap.String("upstream", string(name)), zap.Error(err))
	}
}
