// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"tarn/cache"
	"tarn/index"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
)

// Who may have what. Storage is shared, rights are not: only the authority's
// own answer, to a request that carried this client's own credential, lets a
// byte out. All that is remembered of its answers is in this file:
//
//	grant       the authority said yes to this credential in this
//	            repository. Memory only, for grant_ttl from when the
//	            question was sent, never past the token's own end. What
//	            anonymous was granted serves everybody.
//	membership  the authority served this digest in this repository, as
//	            manifest or blob: to somebody then, to anonymous then. In the
//	            index, believed for membership_ttl.
//	possession  a source domain delivered all bytes of a digest, verified.
//	            The cache keeps it; bytes of one domain never serve another.
//	finish      this credential has begun to download this object: it may
//	            have the rest, for finishFor at most.
//	401         anonymous was refused in this repository a moment ago. The
//	            only refusal that is ever remembered, for refusedFor.
//
// An object that is here, stored or in flight, goes out for a grant and a
// membership (entitled). If either is missing the authority is asked, by a HEAD
// of that object, or, when nobody has it here, by the GET that fetches it (see
// openDigest). A tag is always asked for. So a question costs the same round
// trip whatever is cached, and a refusal says nothing about it.
//
// A yes that was sent before a refusal was received makes nothing: the two may
// have crossed, and the refusal is newer.

const (
	// finishFor is how long after the yes a download that it began may go
	// on. containerd asks for the ranges of a large layer one by one, and
	// after the first has nowhere else to go.
	finishFor = 10 * time.Minute
	// finishIdle ends it earlier, when nobody is downloading any more.
	finishIdle = 30 * time.Second
	// onePiece is what is sent in one piece: nobody has a part of it.
	onePiece = 64 << 10
	// refusedFor is how long a 401 answers further requests without a
	// credential: containerd's HEAD and GET each start with one.
	refusedFor = 5 * time.Second
	// crossing is how long a refusal is remembered as newer than a yes that
	// is on its way: more than any request to a registry takes.
	crossing = time.Minute
	// maxRights bounds each of the tables. Past it what is forgotten costs a
	// question, never a right.
	maxRights = 1 << 16
	// maxUnauthorised bounds the 401s, which hold what a registry wrote, and
	// maxChallenge that.
	maxUnauthorised = 256
	maxChallenge    = 4 << 10
)

// rights are what the authorities have said.
type rights struct {
	hashes sync.Pool // HMACs of the readers' names, under a key that is new with each process

	// mu guards what follows. Readers are named as in (*Proxy).reader.
	mu        sync.Mutex
	grants    map[string]grant
	finishing map[string]map[string]*finish // by reader, then by membership key
	finishes  int
	expired   time.Time // when those that had ended were last looked for
	// refused is when the last refusal of a reader, or of an object by its
	// membership key, was received; refusedAll stands for those forgotten.
	refused      map[string]time.Time
	refusedAll   time.Time
	unauthorised map[index.RepositoryKey]unauthorised
}

type grant struct{ asked, until time.Time }

type finish struct {
	until time.Time
	open  int       // answers that are being sent
	idle  time.Time // since when there is none
}

type unauthorised struct {
	err   *upstream.StatusError
	until time.Time
}

func newRights() *rights {
	r := &rights{
		grants:       make(map[string]grant),
		finishing:    make(map[string]map[string]*finish),
		refused:      make(map[string]time.Time),
		unauthorised: make(map[index.RepositoryKey]unauthorised),
	}
	key := make([]byte, sha256.Size)
	rand.Read(key)
	r.hashes.New = func() any { return hmac.New(sha256.New, key) }
	return r
}

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
	return p.upstreams.Listed(q.upstream) || q.form == formNS && !p.brokers
}

// credential is what a request is made with: a client's own Authorization, the
// node's credential, or neither.
type credential struct {
	authorization string
	node          bool
}

func (c credential) anonymous() bool { return c == credential{} }

// credentialOf is how the upstream is asked on behalf of this client: with what
// the client sent, as far as it may pass; as the node where the operator shares
// the repository with every client of the node; else as anonymous.
func (p *Proxy) credentialOf(q *request) credential {
	switch {
	case p.shared(q):
		return credential{node: true}
	case p.mayPass(q):
		return credential{authorization: q.authorization}
	}
	return credential{}
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

// reader names a repository and a credential. It is keyed, so that no
// credential lies in memory in a form that is worth something elsewhere.
func (p *Proxy) reader(k index.RepositoryKey, c credential) string {
	m := p.rights.hashes.Get().(hash.Hash)
	defer p.rights.hashes.Put(m)
	m.Reset()
	var buf [512]byte
	text := buf[:0]
	for _, s := range []string{k.Upstream, k.Repository, c.authorization} {
		text = binary.AppendUvarint(text, uint64(len(s)))
		text = append(text, s...)
	}
	text = strconv.AppendBool(text, c.node)
	m.Write(text)
	return string(m.Sum(buf[:0]))
}

// identify works out once who the request is to the authority.
func (p *Proxy) identify(q *request) {
	q.credential = p.credentialOf(q)
	q.reader = p.reader(q.repositoryKey(), q.credential)
	q.everybody = q.reader
	if !q.credential.anonymous() {
		q.everybody = p.reader(q.repositoryKey(), credential{})
	}
}

func (q *request) repositoryKey() index.RepositoryKey {
	return index.RepositoryKey{Upstream: string(q.upstream), Repository: q.repository}
}

func (q *request) membershipKey(d digest.Digest) string {
	return q.repositoryKey().MembershipKey(string(q.kind), d)
}

// A yes is the authority's, to this client, for an object.
type yes struct {
	asked     time.Time // when the question was sent
	mediaType string    // what this authority calls a manifest
	size      int64     // -1: not said
	// finishing: the yes is a while ago, and only lets a download end that
	// it began.
	finishing bool
	// stale: the authority could not be asked, and this is what it said once.
	stale *staleness
}

// entitled tells whether the client may have the object without another
// question.
func (p *Proxy) entitled(q *request) (y yes, ok bool) {
	rules, now := p.rules(q.upstream), p.now()
	if rules.GrantTTL <= 0 {
		return yes{}, false
	}
	own, reader, key := q.credential, q.reader, q.membershipKey(q.digest)
	m, _ := p.cache.Index().Membership(key)
	y = yes{mediaType: m.MediaType, size: -1}
	lives := func(confirmed time.Time) bool {
		age := now.Sub(confirmed)
		// What is from the future is from before the clock was set back.
		return !confirmed.IsZero() && age < rules.MembershipTTL && age > -crossing
	}

	r := p.rights
	r.mu.Lock()
	defer r.mu.Unlock()
	if g, granted := r.grants[reader]; granted && now.Before(g.until) && lives(m.Time) && !own.anonymous() {
		y.asked = g.asked
		return y, true
	}
	// What was served to a credential may be nothing for anonymous, also where
	// anonymous may have other things.
	if g, granted := r.grants[q.everybody]; granted && now.Before(g.until) && lives(m.Anonymous) {
		y.asked = g.asked
		return y, true
	}
	if f := r.finishing[reader][key]; q.resumes && f != nil && now.Before(f.until) && (f.open > 0 || now.Sub(f.idle) < finishIdle) {
		y.finishing = true
		return y, true
	}
	return yes{}, false
}

// hasGrant tells whether a yes for the repository is believed still.
func (p *Proxy) hasGrant(q *request) bool {
	now, r := p.now(), p.rights
	r.mu.Lock()
	defer r.mu.Unlock()
	return now.Before(r.grants[q.reader].until) || now.Before(r.grants[q.everybody].until)
}

// begin notes that an answer to this client is being sent, of an object of that
// size, which it may finish with further ranges. The caller calls end after it.
func (p *Proxy) begin(q *request, y yes, size int64) (end func()) {
	if p.rules(q.upstream).GrantTTL <= 0 || q.digest == "" || size >= 0 && size <= onePiece {
		return func() {}
	}
	reader, key := q.reader, q.membershipKey(q.digest)
	r := p.rights
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.finishing[reader][key]
	if f == nil {
		if r.finishes >= maxRights {
			r.expireFinishes(p.now())
		}
		if r.finishes >= maxRights {
			return func() {}
		}
		if r.finishing[reader] == nil {
			r.finishing[reader] = make(map[string]*finish)
		}
		f = &finish{}
		r.finishing[reader][key] = f
		r.finishes++
	}
	if until := y.asked.Add(finishFor); !y.finishing && until.After(f.until) {
		f.until = until
	}
	f.open++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		f.open--
		f.idle = p.now()
	}
}

// expireFinishes looks at all of them, and so not often. It is called with the
// lock.
func (r *rights) expireFinishes(now time.Time) {
	if since := now.Sub(r.expired); since >= 0 && since < time.Second {
		return
	}
	r.expired = now
	for reader, objects := range r.finishing {
		for key, f := range objects {
			if f.open == 0 && (now.After(f.until) || now.Sub(f.idle) >= finishIdle) {
				delete(objects, key)
				r.finishes--
			}
		}
		if len(objects) == 0 {
			delete(r.finishing, reader)
		}
	}
}

// granted takes the authority's yes to a question that was sent at asked.
func (p *Proxy) granted(k index.RepositoryKey, c credential, asked time.Time) {
	until := asked.Add(p.rules(upstream.Name(k.Upstream)).GrantTTL)
	if end, ok := tokenEnd(c.authorization); ok && end.Before(until) {
		until = end
	}
	reader, now := p.reader(k, c), p.now()
	r := p.rights
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.crossed(reader, asked) {
		return
	}
	if c.anonymous() {
		delete(r.unauthorised, k)
	}
	if !now.Before(until) || r.grants[reader].asked.After(asked) {
		return
	}
	if _, known := r.grants[reader]; !known && len(r.grants) >= maxRights {
		for k, g := range r.grants {
			if !now.Before(g.until) {
				delete(r.grants, k)
			}
		}
		if len(r.grants) >= maxRights {
			clear(r.grants)
		}
	}
	r.grants[reader] = grant{asked, until}
}

// member takes the authority's yes to a question about an object.
func (p *Proxy) member(k index.RepositoryKey, kind upstream.Kind, d digest.Digest, c credential, asked time.Time, mediaType string) {
	key := k.MembershipKey(string(kind), d)
	m := index.Membership{Time: asked}
	if kind == upstream.Manifest {
		m.MediaType = mediaType
	}
	if c.anonymous() {
		m.Anonymous = asked
	}
	crossed := func() bool {
		p.rights.mu.Lock()
		defer p.rights.mu.Unlock()
		return p.rights.crossed(key, asked)
	}
	if crossed() {
		return
	}
	p.cache.Index().NoteMembership(key, m)
	if crossed() { // just now, and what it deleted has come back
		p.cache.Index().DeleteMembership(key)
	}
}

// crossed tells whether a refusal was received after a yes was asked for.
// Called with the lock.
func (r *rights) crossed(key string, asked time.Time) bool {
	return !r.refused[key].Before(asked) || !r.refusedAll.Before(asked)
}

// said takes the authority's refusal, if the error is one: of a tag when d is
// "".
func (p *Proxy) said(k index.RepositoryKey, kind upstream.Kind, d digest.Digest, c credential, err error) {
	var refused *upstream.StatusError
	if !errors.As(err, &refused) {
		return
	}
	now := p.now()
	reader, r := p.reader(k, c), p.rights
	switch refused.Status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusUnavailableForLegalReasons:
		defer p.forget(k, c) // without the lock
		if refused.Status == http.StatusUnauthorized && c.anonymous() {
			defer p.rememberChallenge(k, refused, now)
		}
	case http.StatusNotFound, http.StatusGone:
		if d == "" {
			defer p.forget(k, c)
		} else {
			// Some registries say it also where they mean 403, and then it
			// costs those who have the object a question.
			key := k.MembershipKey(string(kind), d)
			r.mu.Lock()
			r.refuse(key, now)
			r.mu.Unlock()
			if p.cache.Index().DeleteMembership(key) {
				p.keepForgotten()
			}
			return
		}
	default:
		return // says nothing about rights
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refuse(reader, now)
	delete(r.grants, reader)
	if refused.Status != http.StatusUnauthorized || refused.Denied { // a token that ran out may be renewed
		r.finishes -= len(r.finishing[reader])
		delete(r.finishing, reader)
	}
	if refused.Status == http.StatusUnauthorized && c.anonymous() && refused.ChallengeSize() <= maxChallenge {
		for k, u := range r.unauthorised {
			if !now.Before(u.until) {
				delete(r.unauthorised, k)
			}
		}
		if len(r.unauthorised) >= maxUnauthorised {
			clear(r.unauthorised)
		}
		r.unauthorised[k] = unauthorised{refused, now.Add(refusedFor)}
	}
}

// refuse notes when a refusal was received. Called with the lock.
func (r *rights) refuse(key string, now time.Time) {
	if len(r.refused) >= maxRights {
		for k, t := range r.refused {
			if now.Sub(t) > crossing {
				delete(r.refused, k)
			}
		}
		if len(r.refused) >= maxRights {
			clear(r.refused)
			r.refusedAll = now
		}
	}
	r.refused[key] = now
}

// recall returns the 401 that anonymous was answered with here a moment ago.
func (p *Proxy) recall(k index.RepositoryKey, c credential) error {
	if !c.anonymous() {
		return nil
	}
	now := p.now()
	p.rights.mu.Lock()
	defer p.rights.mu.Unlock()
	if u, ok := p.rights.unauthorised[k]; ok && now.Before(u.until) {
		return u.err
	}
	return nil
}

// tokenEnd reads when a Bearer token says that it ends (RFC 7519 4.1.4). It is
// not verified: it can only shorten what the authority granted.
func tokenEnd(authorization string) (time.Time, bool) {
	scheme, token, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return time.Time{}, false
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return time.Time{}, false
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(parts[1], "="))
	if err != nil {
		return time.Time{}, false
	}
	var claims struct {
		Expires float64 `json:"exp"`
	}
	const forever = 1 << 40 // seconds
	if json.Unmarshal(payload, &claims) != nil || claims.Expires <= 0 || claims.Expires > forever {
		return time.Time{}, false
	}
	return time.Unix(int64(claims.Expires), 0), true
}

// ask puts the client's question to the authority, with the client's own
// credential, and takes what the answer says. What it refuses is an error that
// others may share who are the same to the authority; ownWords makes each
// client's own of it.
func (p *Proxy) ask(ctx context.Context, q *request, method, reference string, part part) (*upstream.Response, time.Time, error) {
	k, c := q.repositoryKey(), q.credential
	if err := p.recall(k, c); err != nil {
		return nil, time.Time{}, err
	}
	asked := p.now()
	resp, err := p.do(ctx, q, c, method, reference, part)
	if q.kind != upstream.Manifest && q.kind != upstream.Blob {
		return resp, asked, err // lists make no rights
	}
	d := digest.Digest(reference)
	if d.Validate() != nil {
		d = ""
	}
	switch {
	case err != nil:
		p.said(k, q.kind, d, c, err)
		return nil, asked, err
	case resp.Authority && d != "" && !p.speaksOf(q, d, resp):
		resp.Body.Close()
		return nil, asked, errAnotherThing
	case resp.Authority:
		p.granted(k, c, asked)
		if resp.Digest == d || d == "" || p.isHere(q, d, resp) {
			p.remember(k, c, asked)
		}
		if d != "" {
			p.member(k, q.kind, d, c, asked, resp.MediaType)
		}
	}
	return resp, asked, nil
}

var errAnotherThing = fmt.Errorf("%w: what it says yes to is not this object", upstream.ErrProtocol)

// speaksOf tells whether a 200 can be about the object: a registry behind a
// sign-on page answers everything to everybody, with that page. What is here
// has a size; of what is not, the digest tells in the end, see retract.
func (p *Proxy) speaksOf(q *request, d digest.Digest, resp *upstream.Response) bool {
	switch t := resp.MediaType; {
	case resp.Digest != "" && resp.Digest != d && resp.Digest.Algorithm() == d.Algorithm():
		return false
	case t == "text/html", t == "application/xhtml+xml":
		return false
	case q.kind == upstream.Manifest && !generic(t) && !manifestLike(t) && !schema1(t):
		return false
	}
	size, here := p.cache.Size(p.key(q, d))
	return !here || resp.Size == size || resp.Size < 0 && resp.Digest == d
}

// isHere tells whether the answer has the size of an object that is here. A yes
// to a question about something that nobody knows, in an answer that does not
// name it, may be anybody's.
func (p *Proxy) isHere(q *request, d digest.Digest, resp *upstream.Response) bool {
	size, here := p.cache.Size(p.key(q, d))
	return here && resp.Size == size
}

// retract takes back what a yes made whose bytes were another thing's.
func (p *Proxy) retract(k index.RepositoryKey, kind upstream.Kind, d digest.Digest, c credential) {
	reader, key, now := p.reader(k, c), k.MembershipKey(string(kind), d), p.now()
	r := p.rights
	r.mu.Lock()
	r.refuse(reader, now)
	r.refuse(key, now)
	delete(r.grants, reader)
	r.mu.Unlock()
	p.forget(k, c)
	if p.cache.Index().DeleteMembership(key) {
		p.keepForgotten()
	}
}

// do is the request itself.
func (p *Proxy) do(ctx context.Context, q *request, c credential, method, reference string, part part) (*upstream.Response, error) {
	req := upstream.Request{
		Method:        method,
		Repository:    q.repository,
		Kind:          q.kind,
		Reference:     reference,
		Query:         q.query,
		Accept:        p.acceptFor(q, reference),
		Authorization: c.authorization,
		Offset:        part.offset,
		Length:        part.length,
		Authorised:    part.authorised,
		Endpoint:      part.endpoint,
	}
	if c.node {
		req.As = upstream.Node
	}
	return p.upstreams.Registry(q.upstream).Do(ctx, req)
}

// acceptFor is what the upstream is told. A digest names its bytes whatever is
// accepted, and a flight is for everybody: they are asked for with all types.
func (p *Proxy) acceptFor(q *request, reference string) []string {
	switch {
	case q.kind == upstream.Blob:
		return nil
	case q.kind != upstream.Manifest:
		return q.accept
	case reference == q.tag && len(q.accept) > 0:
		return q.accept
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

// nodeRefused tells whether the node's credential is the trouble, so that the
// client's own may do.
func nodeRefused(err error) bool {
	var refused *upstream.StatusError
	return errors.Is(err, upstream.ErrCredentials) || errors.As(err, &refused) && refused.Status < 500
}

// noteNode logs when the node's credential begins to fail, and when it works
// again.
func (p *Proxy) noteNode(name upstream.Name, err error) {
	trouble := ""
	if err != nil && nodeRefused(err) {
		trouble = err.Error()
	}
	if before, _ := p.nodeTrouble.Swap(name, trouble); before == trouble || before == nil && trouble == "" {
		return
	}
	if trouble == "" {
		p.log.Info("the node's credentials work again", zap.String("upstream", string(name)))
	} else {
		p.log.Error("the node's credentials do not work; clients' own are used", zap.String("upstream", string(name)), zap.Error(err))
	}
}
