// SPDX-License-Identifier: Apache-2.0

// Package proxy is the pull side of the OCI distribution API, version 1.1, in
// front of other registries.
//
// Contract: for each tag the authority is asked after the request arrived; for
// each object that is cached, whether this client may have it; everything else
// comes from the cache. See the package rights for who gets what, ask.go for how
// that is asked, fresh.go for how tags stay fresh, and request.go for how a
// registry is named.
//
// Failure model: an answer has its headers within headerDeadline, or is an
// error that makes clients fall back to the upstream. A body that breaks is
// cut, never padded and never ended early as if it were whole. errors.go is
// the only place where an error becomes an answer.
//
// It never redirects, never sends Content-Encoding, never answers 429, and
// never tells who is refused what others have pulled.
package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"tarn/cache"
	"tarn/history"
	"tarn/internal/probe"
	"tarn/rights"
	"tarn/upstream"

	"github.com/gorilla/mux"
	"go.uber.org/zap"
)

// headerDeadline is from a request's arrival to its response headers, all
// upstream hops included. containerd waits 30 s for one, and a pull has a
// progress timeout; after 9 s it is better off asking the registry itself.
const headerDeadline = 9 * time.Second

// Options of a Proxy. Upstreams and Cache are required.
type Options struct {
	Upstreams *upstream.Client
	Cache     *cache.Cache
	// DefaultUpstream is asked when a request names none. "" means
	// docker.io.
	DefaultUpstream upstream.Name
	// ListedOnly serves only registries that are listed.
	ListedOnly bool
	// Rules by listed upstream; the others follow Defaults.
	Rules    map[upstream.Name]Rules
	Defaults Rules
	// Names are hosts under which clients ask, besides addresses, localhost, tarn
	// and this host's own name: with or without a port, which does not count.
	Names []string
	// Prefetch is what is fetched before a client asks. 0 means nothing.
	Prefetch Prefetch
	// Metrics counts; nil counts nothing.
	Metrics *Metrics
	// WriteTimeout is how long a client may take for a piece of an answer
	// before its connection is cut, since it holds a file. The http.Server
	// must have the same, to begin with. 0 means DefaultWriteTimeout.
	WriteTimeout time.Duration
	// History remembers what became of requests; nil does not.
	History *history.History
	// Instance is what only who started this tarn knows, such as its pod's UID: answers
	// for the probe say which one they are of. "" says nothing.
	Instance string
	// Now is the clock by which rights end; nil is time.Now.
	Now func() time.Time
	// Logger gets one line for each request that AccessLog means; nil logs nothing.
	Logger    *zap.Logger
	AccessLog AccessLog
	// Replaces is the proxy of the same cache whose place this one will take: the
	// HEADs of both are numbered together. nil: there is none.
	Replaces *Proxy
}

// Proxy serves the registry API. It is an http.Handler.
type Proxy struct {
	upstreams *upstream.Client
	cache     *cache.Cache
	names     names
	hosts     hosts
	fresh     *freshness
	pending   pendingTags
	memory    memory
	infos     manifestInfos
	sizes     sizes
	wrongs    wrongs
	observer
	router  *mux.Router
	rights  *rights.Rights
	ruleset ruleset
	sealer  sealer
	ahead   *ahead

	instance     string // of the probe's answers
	writeTimeout time.Duration
	now          func() time.Time
	pruning      sync.WaitGroup

	nodeTrouble sync.Map // upstream.Name to nodeNote

	ctx    context.Context // of what is shared between requests; ends with Close
	cancel context.CancelFunc
}

// New returns a proxy that is ready to serve.
func New(opts Options) (*Proxy, error) {
	if opts.DefaultUpstream == "" {
		opts.DefaultUpstream = upstream.DockerHub
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.Logger == nil {
		opts.Logger = zap.NewNop()
	}
	if opts.DefaultUpstream == probeName || opts.Upstreams.Listed(probeName) {
		return nil, fmt.Errorf("%s is no registry to list, or to be the default: tarn answers for it, and asks nobody", probeName)
	}
	hosts, err := newHosts(opts.Names)
	if err != nil {
		return nil, fmt.Errorf("names: %w", err)
	}
	sequence := new(atomic.Uint64)
	if opts.Replaces != nil {
		sequence = opts.Replaces.fresh.sequence
	} else {
		sequence.Store(opts.Cache.Index().LastSequence())
	}
	p := &Proxy{
		upstreams: opts.Upstreams,
		cache:     opts.Cache,
		observer:  newObserver(opts),
		hosts:     hosts,
		names: names{
			listed:          func(n upstream.Name) bool { return n == opts.DefaultUpstream || opts.Upstreams.Listed(n) },
			defaultUpstream: opts.DefaultUpstream,
			listedOnly:      opts.ListedOnly,
			refused:         opts.Upstreams.Refused,
		},
		ruleset: newRuleset(opts.Rules, opts.Defaults),
		sealer:  newSealer(),
		memory:  newMemory(),
		ahead:   newAhead(opts.Prefetch),
		now:     opts.Now,

		instance:     probe.Instance(opts.Instance),
		writeTimeout: cmp.Or(opts.WriteTimeout, DefaultWriteTimeout),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.fresh = &freshness{ask: p.askTag, queues: make(map[headKey]*headQueue), sequence: sequence}
	p.rights = rights.New(rights.Options{
		Index: opts.Cache.Index(),
		Keep:  p.keepTaken,
		Terms: p.terms,
		Now:   func() time.Time { return p.now() },
	})

	p.prune()
	p.pruning.Go(p.pruneLoop)
	p.router = newRouter(p.serveAPI)
	if p.ruleset.brokers {
		p.router.MatcherFunc(isToken).Methods(http.MethodGet, http.MethodPost).HandlerFunc(p.serveToken)
	}
	return p, nil
}

// Retire has this proxy remember no yes any more, since another one takes its place.
// Requests that it has go on as they began.
func (p *Proxy) Retire() { p.rights.Retire() }

// Grants is how many yeses of registries this proxy remembers.
func (p *Proxy) Grants() int { return p.rights.Grants() }

// newRouter has mux find prefixes and methods; SkipClean and UseEncodedPath keep
// it from redirecting and from decoding. The rest is one parser's.
func newRouter(api http.HandlerFunc) *mux.Router {
	r := mux.NewRouter().SkipClean(true).UseEncodedPath()
	for _, prefix := range []string{"/v2", "/{upstream}/v2"} {
		r.PathPrefix(prefix).Methods(http.MethodGet, http.MethodHead).HandlerFunc(api)
	}
	r.NotFoundHandler = failing(errNoRoute)
	r.MethodNotAllowedHandler = failing(errMethod)
	return r
}

// route is the router's own ServeHTTP without the two copies of the request that
// tell a handler what matched: here nobody asks.
func route(router *mux.Router, w http.ResponseWriter, r *http.Request) {
	var match mux.RouteMatch
	router.Match(r, &match) // there is a handler also for what does not match
	match.Handler.ServeHTTP(w, r)
}

// Close ends what is shared between requests and waits for it. Call it when no
// request is running any more.
func (p *Proxy) Close() {
	p.cancel()
	p.fresh.asking.Wait()
	p.ahead.Wait()
	p.pruning.Wait()
}

func failing(err error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.(*response).fail(&request{method: r.Method}, err)
	})
}

// serveAPI is a request in a straight line: parse, then to the one file that
// answers its kind.
func (p *Proxy) serveAPI(rw http.ResponseWriter, r *http.Request) {
	w := rw.(*response)
	ctx, cancel := context.WithTimeout(r.Context(), headerDeadline)
	defer cancel()
	q, err := p.names.parse(r)
	if err != nil {
		w.fail(&request{method: r.Method}, err)
		return
	}
	w.request = q
	if q.upstream == probeName {
		if !q.base && clientKind(r.UserAgent()) != otherKind { // others watch by it
			p.metrics.client(r.UserAgent(), w.start)
		}
		if err := p.serveProbe(w, r, q); err != nil {
			w.fail(q, err)
		}
		return
	}
	if !q.base {
		p.metrics.client(r.UserAgent(), w.start)
		if err := p.unseal(w, r, q); err != nil {
			w.fail(q, err)
			return
		}
		p.identify(q)
	}
	if q.ns != "" {
		w.Header().Set("OCI-Namespace", q.ns)
	}
	switch {
	case q.base:
		err = p.serveBase(w, r, q)
	case q.kind == upstream.Manifest && q.tag != "":
		err = p.serveTag(ctx, w, r, q)
	case q.kind == upstream.Manifest, q.kind == upstream.Blob:
		err = p.serveDigest(ctx, w, r, q)
	default:
		err = p.serveRelayed(ctx, w, r, q)
	}
	if err != nil {
		// A refusal may be shared; what may pass depends on how each client
		// asked.
		w.fail(q, p.ownWords(q, err))
	}
}

// ServeHTTP times, counts, logs and recovers; handlers only set what is to be
// logged.
func (p *Proxy) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	start := time.Now()
	w := &response{ResponseWriter: rw, timing: timing{start: start}, counted: &p.counted, cacheStatus: "tarn", timeout: p.writeTimeout}
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	defer func() {
		v := recover()
		if v != nil && v != http.ErrAbortHandler {
			w.err = fmt.Errorf("panic: %v", v)
			p.log.Error("panic while serving", zap.Any("panic", v), zap.ByteString("stack", debug.Stack()))
			if w.status == 0 {
				v = nil
				serveError(w, w.request, w.err)
			}
		}
		p.observe(w, r, time.Since(start))
		if v != nil || errors.Is(w.err, errAborted) {
			panic(http.ErrAbortHandler) // cuts the connection, quietly
		}
	}()
	if err := p.hosts.check(r); err != nil {
		w.fail(&request{method: r.Method}, err)
		return
	}
	route(p.router, w, r)
}
