// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"tarn/cache"
	"tarn/index"
	"tarn/upstream"

	"go.uber.org/zap"
)

// While a registry cannot be asked, and only where the operator allows it
// (stale_if_error), what it said a while ago stands for what it would say:
//
//   - a tag means the digest that was confirmed last;
//   - a stored object is still there;
//   - who had a yes for the repository has it still: anonymous, the node, and a
//     Basic credential, which is the same each time; never a token, which says
//     itself how long it is good for.
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

// who names a credential in the index, as far as its yes may be remembered
// there: "" for anonymous; ok is false for tokens.
func (p *Proxy) who(k index.RepositoryKey, c credential) (name string, ok bool) {
	switch {
	case c.anonymous():
		return "", true
	case c.node:
		return "node", true
	}
	if scheme, _, _ := strings.Cut(c.authorization, " "); !strings.EqualFold(scheme, "Basic") || len(p.staleKey) == 0 {
		return "", false
	}
	h := hmac.New(sha256.New, p.staleKey)
	fmt.Fprintf(h, "%q %q %q", k.Upstream, k.Repository, c.authorization)
	return string(h.Sum(nil)), true
}

// staleLimit is how old an answer may be that is given to this request, 0 when
// none is.
func (p *Proxy) staleLimit(name upstream.Name) time.Duration { return p.rules(name).StaleIfError }

// remember notes a yes of the authority for the time that it cannot be asked.
func (p *Proxy) remember(k index.RepositoryKey, c credential, asked time.Time) {
	if p.staleLimit(upstream.Name(k.Upstream)) <= 0 {
		return
	}
	who, ok := p.who(k, c)
	if !ok || p.crossed(k, c, asked) {
		return
	}
	p.cache.Index().NoteYes(k.YesKey(who), asked)
	if p.crossed(k, c, asked) { // just now, and what it deleted has come back
		p.cache.Index().DeleteYes(k.YesKey(who))
	}
}

func (p *Proxy) crossed(k index.RepositoryKey, c credential, asked time.Time) bool {
	reader := p.reader(k, c)
	p.rights.mu.Lock()
	defer p.rights.mu.Unlock()
	return p.rights.crossed(reader, asked)
}

// forget takes a refusal.
func (p *Proxy) forget(k index.RepositoryKey, c credential) {
	if who, ok := p.who(k, c); ok && p.cache.Index().DeleteYes(k.YesKey(who)) {
		p.keepForgotten()
	}
}

// forgetTag takes a tag's 404, when somebody hears it who had a yes: whom the
// repository is hidden from hears the same.
func (p *Proxy) forgetTag(k index.RepositoryKey, tag string, c credential, sequence uint64, err error) {
	var refused *upstream.StatusError
	who, ok := p.who(k, c)
	if !ok || !errors.As(err, &refused) || refused.Status != http.StatusNotFound && refused.Status != http.StatusGone {
		return
	}
	if ix := p.cache.Index(); !ix.Yes(k.YesKey(who)).IsZero() {
		p.cache.NoteTag(k.TagKey(tag), index.Tag{Sequence: sequence})
		p.keepForgotten()
	}
}

// keepForgotten writes what was taken back before the answer says so: a crash
// must not bring it back.
func (p *Proxy) keepForgotten() {
	if err := p.cache.Flush(); err != nil {
		p.log.Error("what a registry took back is known to this process only", zap.Error(err))
	}
}

// pruneEvery is how often what is too old for any outage is dropped.
const pruneEvery = time.Hour

// tagsFor is how long a tag is remembered of which nothing is stored.
const tagsFor = 7 * 24 * time.Hour

// prune drops what neither stale_if_error nor membership_ttl reaches back to.
func (p *Proxy) prune() {
	stale, membership := p.defaults.StaleIfError, p.defaults.MembershipTTL
	for _, r := range p.ruleOf {
		stale, membership = max(stale, r.StaleIfError), max(membership, r.MembershipTTL)
	}
	now := p.now()
	if err := p.cache.Prune(index.Pruning{
		Yeses: now.Add(-stale), Memberships: now.Add(-max(stale, membership)), Tags: now.Add(-max(stale, tagsFor)),
	}); err != nil {
		p.log.Warn("could not drop what is out of date", zap.Error(err))
	}
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

// rememberChallenge notes how a client is asked for a Basic credential. Others
// are of no use while the registry is away.
func (p *Proxy) rememberChallenge(k index.RepositoryKey, refused *upstream.StatusError, now time.Time) {
	if p.staleLimit(upstream.Name(k.Upstream)) <= 0 || refused.ChallengeSize() > maxChallenge {
		return
	}
	for _, c := range refused.Challenge {
		if scheme, _, _ := strings.Cut(c, " "); strings.EqualFold(scheme, "Basic") {
			p.cache.Index().NoteChallenge(k, index.Challenge{Time: now, Text: c})
			return
		}
	}
}

// stale tells whether the object is stored, and may be served to this client
// although err is all that the authority has to say now. An error that replaces
// err is what a client without a credential is to be told: how to show one.
func (p *Proxy) stale(q *request, err error) (yes, error) {
	limit, cause := p.staleLimit(q.upstream), staleCause(err)
	if limit <= 0 || cause == "" {
		return yes{}, err
	}
	k, now, ix := q.repositoryKey(), p.now(), p.cache.Index()
	age := func(t time.Time) (time.Duration, bool) {
		d := now.Sub(t)
		return d, !t.IsZero() && d >= 0 && d < limit
	}
	m, _ := ix.Membership(q.membershipKey(q.digest))
	s := staleness{cause: cause, err: err}
	may := func(c credential, served time.Time) bool {
		who, ok := p.who(k, c)
		if !ok {
			return false
		}
		since, ok := age(ix.Yes(k.YesKey(who)))
		held, alive := age(served)
		s.age = max(since, held)
		return ok && alive
	}
	size, stored := p.cache.Has(p.key(q, q.digest))
	switch {
	case may(credential{}, m.Anonymous):
	case !q.credential.anonymous() && may(q.credential, m.Time):
	default:
		if challenge, ok := ix.Challenge(k); ok && q.credential.anonymous() {
			if _, ok := age(challenge.Time); ok && challenge.Time.After(ix.Yes(k.YesKey(""))) {
				return yes{}, &upstream.StatusError{Status: http.StatusUnauthorized, Challenge: []string{challenge.Text}}
			}
		}
		return yes{}, err
	}
	if !stored {
		return yes{}, err
	}
	return yes{mediaType: m.MediaType, size: size, stale: &s}, nil
}

// serveStaleTag answers a tag whose authority cannot be asked, or returns err.
func (p *Proxy) serveStaleTag(ctx context.Context, w *response, r *http.Request, q *request, err error) error {
	limit := p.staleLimit(q.upstream)
	if limit <= 0 || staleCause(err) == "" {
		return err
	}
	last, known := p.cache.Index().Tag(q.repositoryKey().TagKey(q.tag))
	age := p.now().Sub(last.Confirmed)
	one := *q
	if known && age >= 0 && age < limit {
		one.digest = last.Digest
	}
	y, serr := p.stale(&one, err)
	if serr != nil {
		return serr
	}
	y.stale.age = max(y.stale.age, age)
	mediaType, terr := p.storedType(ctx, q, one.digest, y.mediaType)
	if terr != nil || !accepts(q.accept, mediaType) {
		return err
	}
	if q.method == http.MethodHead {
		w.stale(y.stale)
		return serveHead(w, r, one.digest, mediaType, y.size)
	}
	o, oerr := p.cache.Open(ctx, cache.Request{Key: p.key(q, one.digest), Reader: q.reader, Authorised: true, Fetch: notNow})
	if oerr != nil {
		return err
	}
	defer o.Close()
	w.stale(y.stale)
	return p.serveManifest(ctx, w, r, q, o, one.digest, y.mediaType)
}

// stale marks the answer (RFC 9211 2.3, RFC 9111 5.1).
func (w *response) stale(s *staleness) {
	seconds := int64(s.age / time.Second)
	w.Header().Set("Age", strconv.FormatInt(seconds, 10))
	w.detail(fmt.Sprintf("hit; ttl=-%d", seconds), s.cause)
}
