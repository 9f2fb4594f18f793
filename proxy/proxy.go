// SPDX-License-Identifier: Apache-2.0

// Package proxy is the pull side of the OCI distribution API, version 1.1, in
// front of other registries.
//
// Contract: for each tag the authority is asked after the request arrived; for
// each object that is cached, whether this client may have it; everything else
// comes from the cache. See rights.go for who gets what, fresh.go for how tags
// stay fresh, and request.go for how a registry is named.
//
// Failure model: an answer has its headers within headerDeadline, or is an
// error that makes clients fall back to the upstream. A body that breaks is
// cut, never padded and never ended early as if it were whole. errors.go is
// the only place where an error becomes a status.
//
// It never redirects, never sends Content-Encoding, never answers 429, and
// never tells one client what another has pulled.
package proxy

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"tarn/cache"
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
	// StaleKey makes the names under which it is remembered, across restarts,
	// which Basic credentials the authorities said yes to. Without one such a
	// yes is not remembered.
	StaleKey []byte
	// WriteTimeout is how long a client may take for a piece of an answer
	// before its connection is cut, since it holds a file. The http.Server
	// must have the same, to begin with. 0 means DefaultWriteTimeout.
	WriteTimeout time.Duration
	// Logger gets one line for each request; nil logs nothing.
	Logger *zap.Logger
}

// Rules say how far an authority's yes is believed, and by whom, and how it is
// asked for bytes.
type Rules struct {
	// GrantTTL is how long a yes to a credential is believed for further
	// objects of the repository. 0 means asking for each.
	GrantTTL time.Duration
	// MembershipTTL is how long the authority is believed to have what it
	// had. 0 means asking every time.
	MembershipTTL time.Duration
	// StaleIfError is how old an answer may be that is given while the
	// authority cannot be asked. 0 means that none is.
	StaleIfError time.Duration
	// Parallel is how many connections one large blob is fetched over.
	Parallel int
	// TokenBroker passes clients' credentials on to the token service.
	TokenBroker bool
	// Share are patterns (path.Match) of repositories that every client of
	// this node may have, with the node's credential.
	Share []string
}

// DefaultRules are those of the configuration's defaults.
func DefaultRules() Rules {
	return Rules{GrantTTL: time.Minute, MembershipTTL: 24 * time.Hour, Parallel: 4}
}

// Proxy serves the registry API. It is an http.Handler.
type Proxy struct {
	upstreams *upstream.Client
	cache     *cache.Cache
	names     names
	hosts     hosts
	fresh     *freshness
	infos     manifestInfos
	metrics   *Metrics
	log       *zap.Logger
	router    *mux.Router
	rights    *rights
	ruleOf    map[upstream.Name]Rules
	defaults  Rules
	brokers   bool // some upstream has a token broker
	staleKey  []byte

	writeTimeout time.Duration
	now          func() time.Time

	prefetch   Prefetch
	ahead      sync.WaitGroup // what is fetched ahead
	aheadSlots chan struct{}
	pruning    sync.WaitGroup

	nodeTrouble sync.Map // upstream.Name to what ails the node's credential, "" for nothing

	ctx    context.Context // of what is shared between requests; ends with Close
	cancel context.CancelFunc
}

// New returns a proxy that is ready to serve.
func New(opts Options) (*Proxy, error) {
	if opts.DefaultUpstream == "" {
		opts.DefaultUpstream = upstream.DockerHub
	}
	if opts.Logger == nil {
		opts.Logger = zap.NewNop()
	}
	hosts, err := newHosts(opts.Names)
	if err != nil {
		return nil, fmt.Errorf("names: %w", err)
	}
	sequence, err := opts.Cache.Index().LastSequence()
	if err != nil {
		return nil, fmt.Errorf("read the last sequence: %w", err)
	}
	p := &Proxy{
		upstreams: opts.Upstreams,
		cache:     opts.Cache,
		metrics:   opts.Metrics,
		log:       opts.Logger,
		hosts:     hosts,
		names: names{
			listed:          func(n upstream.Name) bool { return n == opts.DefaultUpstream || opts.Upstreams.Listed(n) },
			defaultUpstream: opts.DefaultUpstream,
			listedOnly:      opts.ListedOnly,
		},
		rights:   newRights(),
		ruleOf:   opts.Rules,
		defaults: opts.Defaults,
		now:      time.Now,
		staleKey: opts.StaleKey,

		writeTimeout: cmp.Or(opts.WriteTimeout, DefaultWriteTimeout),

		prefetch:   opts.Prefetch,
		aheadSlots: make(chan struct{}, maxAhead),
	}
	for _, rules := range opts.Rules {
		p.brokers = p.brokers || rules.TokenBroker
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.fresh = &freshness{ask: p.askTag, queues: make(map[headKey]*headQueue), crowds: make(map[headKey]time.Duration), sequence: sequence}

	p.prune()
	p.pruning.Go(p.pruneLoop)
	p.router = newRouter(p.serveAPI)
	if p.brokers {
		p.router.MatcherFunc(isToken).Methods(http.MethodGet, http.MethodPost).HandlerFunc(p.serveToken)
	}
	return p, nil
}

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

func (p *Proxy) rules(name upstream.Name) Rules {
	if r, ok := p.ruleOf[name]; ok {
		return r
	}
	return p.defaults
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
	if !q.base {
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
	w := &response{ResponseWriter: rw, cacheStatus: "tarn", timeout: p.writeTimeout, start: start}
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

// observe is the one line and the counters of a request.
func (p *Proxy) observe(w *response, r *http.Request, took time.Duration) {
	q := w.request
	if q == nil {
		q = &request{method: r.Method}
	}
	route := "none"
	if q.base || q.kind != "" {
		route = q.route()
	}
	p.metrics.request(route, w.outcome(), w.status, w.bytes, w.headers)
	if ce := p.log.Check(zap.InfoLevel, "request"); ce != nil {
		fields := []zap.Field{
			zap.String("method", r.Method),
			zap.String("route", route),
			zap.String("upstream", string(q.upstream)),
			zap.String("repository", q.repository),
			zap.String("reference", q.reference()),
			zap.Int("status", w.status),
			zap.Int64("bytes", w.bytes),
			zap.Duration("took", took),
			zap.String("cache", w.cacheStatus),
			zap.String("client", r.RemoteAddr),
			zap.String("agent", r.UserAgent()),
		}
		if w.err != nil {
			fields = append(fields, zap.String("error", w.err.Error()))
		}
		ce.Write(fields...)
	}
}

// response is a ResponseWriter that remembers what a log line says. It keeps
// io.ReaderFrom, without which a file would be copied through memory rather
// than sent by the kernel.
type response struct {
	http.ResponseWriter
	request     *request
	cacheStatus string // RFC 9211
	collapsed   bool
	err         error
	timeout     time.Duration // Options.WriteTimeout
	start       time.Time
	headers     time.Duration // from arrival to the headers
	slow        bool          // the body may come later than the headers
	status      int
	bytes       int64
}

func (w *response) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
		w.headers = time.Since(w.start)
		w.Header().Set("Cache-Status", w.cacheStatus)
	}
	w.ResponseWriter.WriteHeader(status)
	if w.slow {
		http.NewResponseController(w.ResponseWriter).Flush()
	}
}

func (w *response) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

const (
	// DefaultWriteTimeout is Options.WriteTimeout's.
	DefaultWriteTimeout = time.Minute
	// sendPiece is what must go out within that time, in bytes: at 70 KB/s.
	sendPiece = 4 << 20
)

// extend begins the client's time anew.
func (w *response) extend() {
	http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(w.timeout))
}

// ReadFrom implements io.ReaderFrom.
func (w *response) ReadFrom(src io.Reader) (int64, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	var sent int64
	if part, ok := src.(*io.LimitedReader); ok {
		if body, ok := part.R.(*bytes.Reader); ok && int64(body.Len()) == part.N {
			// In one piece it goes out together with the headers.
			n, err := body.WriteTo(w.ResponseWriter)
			w.bytes += n
			return n, err
		}
		var err error
		switch from := part.R.(type) {
		case sectioned:
			if sent, err = w.sendSections(from, part.N); err != nil || sent == part.N {
				return sent, err
			}
			part.N -= sent
		}
	}
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	for { // what is waited for is not the client's time
		n, err := src.Read(*buf)
		if n > 0 {
			w.extend()
			m, werr := w.Write((*buf)[:n])
			if sent += int64(m); werr != nil {
				return sent, werr
			}
		}
		if err == io.EOF {
			return sent, nil
		}
		if err != nil {
			return sent, err
		}
	}
}

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// sendFile has the kernel send the next n bytes of the file.
func (w *response) sendFile(file *os.File, n int64) (sent int64, err error) {
	for sent < n {
		w.extend()
		m, err := io.CopyN(w.ResponseWriter, file, min(sendPiece, n-sent))
		sent += m
		w.bytes += m
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// sectioned lies in a file, as far as it is there.
type sectioned interface {
	Section(most int64) (*os.File, int64, error)
}

// sendSections has the kernel send what comes, as long as it comes by a file.
func (w *response) sendSections(s sectioned, most int64) (sent int64, err error) {
	for sent < most {
		file, n, err := s.Section(most - sent)
		if err == io.EOF || file == nil && err == nil {
			return sent, nil
		}
		if err != nil {
			return sent, err
		}
		m, err := w.sendFile(file, n)
		if sent += m; err != nil {
			if f, ok := s.(interface{ Failed(error) }); ok {
				f.Failed(err)
			}
			return sent, err
		}
	}
	return sent, nil
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// detail sets the Cache-Status, with detail "" for none.
func (w *response) detail(status, detail string) {
	w.cacheStatus = "tarn; " + status
	if w.collapsed {
		w.cacheStatus += "; collapsed"
	}
	if detail != "" {
		w.cacheStatus += "; detail=" + detail
	}
}

// source sets the Cache-Status of an object's bytes.
func (w *response) source(s cache.Source) {
	w.slow = s != cache.Hit
	switch s {
	case cache.Hit:
		w.detail("hit", "")
	case cache.Joined:
		w.collapsed = true
		w.detail("fwd=uri-miss; fwd-status=200; stored", "")
	case cache.Fetched:
		w.detail("fwd=uri-miss; fwd-status=200; stored", "")
	case cache.Passed:
		w.detail("fwd=bypass; fwd-status=200", "not-storable")
	}
}

// outcome is the Cache-Status as a metric's label.
func (w *response) outcome() string {
	switch {
	case w.err != nil || w.status >= 400:
		return "error"
	case w.request == nil || w.request.base:
		return "none"
	}
	for _, o := range []struct{ prefix, outcome string }{
		{"tarn; hit; ttl=-", "stale"},
		{"tarn; hit", "hit"},
		{"tarn; fwd=stale", "confirmed"},
		{"tarn; fwd=uri-miss", "miss"},
		{"tarn; fwd=bypass", "bypass"},
	} {
		if len(w.cacheStatus) >= len(o.prefix) && w.cacheStatus[:len(o.prefix)] == o.prefix {
			return o.outcome
		}
	}
	return "none"
}

// fail answers with the error, or, when the headers are out, has the
// connection cut.
func (w *response) fail(q *request, err error) {
	w.err = err
	if w.status != 0 {
		w.err = fmt.Errorf("%w: %w", errAborted, err)
		return
	}
	status, _ := answerFor(q, err)
	// The same words whatever is cached.
	w.cacheStatus = fmt.Sprintf("tarn; fwd=miss; fwd-status=%d", status)
	serveError(w, q, err)
}
