// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"tarn/index"
	"tarn/rights"
	"tarn/upstream"
)

// While a registry cannot be asked, and only where the operator allows it
// (stale_if_error), what it said a while ago stands for what it would say:
//
//   - a tag means the digest that was confirmed last;
//   - a stored object is still there;
//   - who had a yes for the repository has it still: anonymous, the node, and a
//     Basic credential, which is the same each time; never a token, which says
//     itself how long it is good for; or, with stale_for: node, while the
//     authority cannot be reached or answers nobody at all, every client of this
//     node, as soon as somebody of it had one.
//
// All three must be at most that old, none may have been taken back since, and
// only what is on the disk is served. The answer says that it is stale, how old
// it is, and why (RFC 9211). A registry's 401, 403 or 404 is its word, and never
// stale.

// staleCause says why the authority could not be asked, "" when it was: it
// cannot be reached, is silent, is broken or limits its requests.
func staleCause(err error) string {
	var status *upstream.StatusError
	switch {
	case errors.As(err, &status) && status.Status == http.StatusTooManyRequests:
		return "rate-limited"
	case errors.As(err, &status) && status.Status >= 500:
		return "status-" + strconv.Itoa(status.Status)
	case status != nil:
		return ""
	case errors.Is(err, upstream.ErrTimeout), errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case errors.Is(err, upstream.ErrUnreachable):
		return "unreachable"
	}
	return ""
}

// staleness is why an answer is not the authority's of now, and how old it is.
type staleness struct {
	cause string
	age   time.Duration
	err   error // what there is to say where it cannot be served after all
}

// pruneEvery is how often what is too old for any outage is dropped.
const pruneEvery = time.Hour

// tagsFor is how long a tag is remembered of which nothing is stored.
const tagsFor = 7 * 24 * time.Hour

// prune drops what neither stale_if_error nor membership_ttl reaches back to.
func (p *Proxy) prune() {
	stale, membership := p.ruleset.longest()
	now := p.now()
	p.cache.Store().Prune(index.Pruning{
		Memberships: now.Add(-max(stale, membership)), Tags: now.Add(-max(stale, tagsFor)),
	})
}

// pruneLoop ends with the proxy.
func (p *Proxy) pruneLoop() {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-tick.C:
			p.prune()
		}
	}
}

// stale tells whether the object is stored, and may be served to this client
// although err is all that the authority has to say now. An error that replaces
// err is what a client without a credential is to be told: how to show one.
func (p *Proxy) stale(q *request, err error) (rights.Yes, *staleness, error) {
	cause := staleCause(err)
	if cause == "" {
		return rights.Yes{}, nil, err
	}
	y, age, challenge, ok := p.rights.Stale(q.asker, q.object(q.digest), p.away(q, err))
	if challenge != "" {
		return y, nil, &upstream.StatusError{Status: http.StatusUnauthorized, Challenge: []string{challenge}}
	}
	size, stored := p.cache.Has(p.key(q, q.digest))
	if !ok || !stored {
		return y, nil, err
	}
	y.Size = size
	return y, &staleness{cause: cause, age: age, err: err}, nil
}

// away tells whether the authority answers nobody, of which err is an instance.
func (p *Proxy) away(q *request, err error) bool {
	cause := staleCause(err)
	return (cause == "unreachable" || cause == "timeout") && p.upstreams.Registry(q.upstream).Away(q.repository)
}

// serveStaleTag answers a tag whose authority cannot be asked, or returns err.
func (p *Proxy) serveStaleTag(ctx context.Context, w *response, r *http.Request, q *request, err error) error {
	limit := p.rules(q.upstream).StaleIfError
	if limit <= 0 || staleCause(err) == "" {
		return err
	}
	last, known := p.cache.Index().Tag(q.repositoryKey().TagKey(q.tag))
	age := p.now().Sub(last.Confirmed)
	one := *q
	if known && age >= 0 && age < limit {
		one.digest, w.told.meant = last.Digest, last.Digest
	}
	y, stale, serr := p.stale(&one, err)
	if serr != nil {
		return serr
	}
	stale.age = max(stale.age, age)
	mediaType, terr := p.storedType(ctx, q, one.digest, y.MediaType)
	if terr != nil || !accepts(q.accept, mediaType) {
		return err
	}
	if q.method == http.MethodHead {
		w.stale(stale)
		return serveHead(w, r, one.digest, mediaType, y.Size)
	}
	o, oerr := p.openStale(ctx, w, &one, stale)
	if oerr != nil {
		return err
	}
	defer o.Close()
	w.stale(stale)
	return p.serveManifest(ctx, w, r, q, o, one.digest, y.MediaType)
}

// stale marks the answer (RFC 9211 2.3, RFC 9111 5.1).
func (w *response) stale(s *staleness) {
	w.told.away = s.err
	seconds := int64(s.age / time.Second)
	w.Header().Set("Age", strconv.FormatInt(seconds, 10))
	w.detail(outcomeStale, fmt.Sprintf("hit; ttl=-%d", seconds), s.cause)
}
