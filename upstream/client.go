// SPDX-License-Identifier: Apache-2.0

// Package upstream asks OCI registries, as OCI distribution-spec 1.1 has it.
//
// Contract: one endpoint of a Registry is asked, with exactly the credential of
// the request, or as anonymous or as the node, for which tarn fetches the tokens
// itself. Of the endpoints only the first, the authority, and those that the
// operator trusts see a credential, and only the authority's answers count as a yes
// or a no. Which endpoint is asked, and which next, is the caller's to order; those
// after the first are for bytes by digest, once the authority has said yes. Redirects are
// followed here, never by the client, and every connection passes the dial guard.
//
// Failure model: every answer has its headers within the registry's head
// timeout, and a body that brings no byte for bodyIdle fails. An error is a
// *StatusError (who was asked said no), or wraps ErrTimeout, ErrUnreachable,
// ErrProtocol, ErrGuard or ErrCredentials.
//
// It never stores anything, never hashes a body, never retries an answer that
// was understood, and never puts a URL, a token or a query string into an
// error: redirect targets are often signed.
package upstream

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/http/httpproxy"
)

// DefaultHeadTimeout is how long a registry may take for its response headers.
// A second below the 9 s in which tarn itself answers, which in turn is well
// below containerd's 30 s.
const DefaultHeadTimeout = 8 * time.Second

// An Endpoint is one URL of a registry, without the /v2/.
type Endpoint struct {
	// URL is the scheme, the host and perhaps a path prefix.
	URL *url.URL
	// Trusted lets an endpoint other than the first see credentials.
	Trusted bool
}

// A Config lists one registry.
type Config struct {
	Name Name
	// Endpoints are asked in this order; the first is the authority. None
	// means https on the registry's own name.
	Endpoints []Endpoint
	// TLS is for the endpoints. nil means the system's roots and no client
	// certificate.
	TLS *tls.Config
	// ForeignRoots are believed where this registry redirects or sends for a
	// token; tarn shows no certificate there. nil means Options.RootCAs.
	ForeignRoots *x509.CertPool
	// HeadTimeout bounds the time to the response headers. 0 means
	// DefaultHeadTimeout.
	HeadTimeout time.Duration
	// Realm is the only token service that passwords which were given to
	// tarn may go to. nil means https on the authority's own domain.
	Realm *url.URL
	// Credentials of the node for this registry. nil means none.
	Credentials Credentials
	// Proxies are those by which this registry, and what it redirects to or
	// names as its token service, are reached. nil means Options.Proxies.
	Proxies *httpproxy.Config
}

// Options are all optional.
type Options struct {
	// Listed are the registries that the operator named. They may live on
	// any address, and they are the only ones that may.
	Listed []Config
	// HeadTimeout is for registries that are not listed; 0 means
	// DefaultHeadTimeout.
	HeadTimeout time.Duration
	// Own are tarn's own listeners, which are never dialled.
	Own []netip.AddrPort
	// UserAgent is sent with every request.
	UserAgent string
	// Observe is called after each exchange with a registry, a redirect
	// target or a token service. What it returns hears how many bytes of the
	// body came, as they come; nil, nobody. nil means nobody looks.
	Observe func(Exchange) (received func(n int))
	// Logger has each exchange on the level of debug, and trouble with a host as
	// a warning. nil logs nothing.
	Logger *zap.Logger
	// RootCAs are believed where a registry has no TLS configuration of its
	// own, and of https proxies. nil means the system's.
	RootCAs *x509.CertPool
	// Proxies are those by which registries are reached, as HTTP_PROXY,
	// HTTPS_PROXY and NO_PROXY name them: http or https, see CheckProxy. nil
	// means none.
	Proxies *httpproxy.Config
	// AllowViaProxy lets registries that are not listed be asked by a proxy,
	// which connects to addresses that cannot be checked here.
	AllowViaProxy bool
	// Lookup resolves a host. nil means the system's resolver.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	// Connect opens a connection to an address that the dial guard has
	// allowed. nil means the network.
	Connect func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Client holds all registries and their connections. It is safe for
// concurrent use.
type Client struct {
	log   *zap.Logger
	opts  Options
	guard *guard
	// For registries without a TLS configuration or proxies of their own.
	pool    pool
	proxies *proxies
	listed  map[Name]*Registry
	key     [sha256.Size]byte // of the names of credentials, new with each process

	strangers slots  // of all registries that are not listed together
	warnings  budget // likewise

	mu       sync.Mutex
	unlisted map[Name]*Registry // at most maxUnlisted
	troubled []Health           // of those; at most maxStrangers, the last one last
}

// maxUnlisted bounds what clients can make tarn remember by naming registries:
// a forgotten one costs the next request an anonymous token.
const maxUnlisted = 256

// pool has transports for each reach, because a pooled connection is used
// again without a dial: one that was opened for the operator's own endpoint
// must never carry a request that a stranger caused. Nor does one that goes by a
// proxy.
type pool struct{ direct, proxied [reachAny + 1]transports }

// to returns the transports of that reach; via is the proxy, nil for none.
func (p *pool) to(far reach, via *url.URL) transports {
	if via != nil {
		return p.proxied[far]
	}
	return p.direct[far]
}

// transports dial alike. The one keeps its connections, the other has a new one
// for each request.
type transports struct{ kept, fresh *http.Transport }

// New checks the options and returns a client without any connection yet.
func New(opts Options) (*Client, error) {
	c := &Client{
		opts: opts,
		log:  cmp.Or(opts.Logger, zap.NewNop()),
		guard: &guard{
			own:     opts.Own,
			lookup:  opts.Lookup,
			connect: opts.Connect,
		},
		listed:   make(map[Name]*Registry, len(opts.Listed)),
		unlisted: make(map[Name]*Registry),
	}
	if c.guard.lookup == nil {
		c.guard.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if c.guard.connect == nil {
		c.guard.connect = (&net.Dialer{}).DialContext
	}
	rand.Read(c.key[:])
	c.strangers = make(slots, maxStrangersQuestions)
	var err error
	if c.proxies, err = newProxies(opts.Proxies, opts.RootCAs); err != nil {
		return nil, err
	}
	c.pool = c.newPool(&tls.Config{RootCAs: opts.RootCAs}, c.proxies)
	for _, cfg := range opts.Listed {
		if _, dup := c.listed[cfg.Name]; dup {
			return nil, fmt.Errorf("upstream %s is listed twice", cfg.Name)
		}
		for _, e := range cfg.Endpoints {
			if err := CheckEndpoint(e.URL); err != nil {
				return nil, fmt.Errorf("upstream %s: %w", cfg.Name, err)
			}
		}
		if cfg.Realm != nil {
			if err := CheckRealm(cfg.Realm); err != nil {
				return nil, fmt.Errorf("upstream %s: realm: %w", cfg.Name, err)
			}
		}
		via := c.proxies
		if cfg.Proxies != nil {
			if via, err = newProxies(cfg.Proxies, opts.RootCAs); err != nil {
				return nil, fmt.Errorf("upstream %s: proxy: %w", cfg.Name, err)
			}
		}
		r := c.newRegistry(cfg, via)
		r.listed, r.asking.all, r.warnings = true, make(slots, maxListedQuestions), new(budget)
		c.listed[cfg.Name] = r
	}
	return c, nil
}

// CheckEndpoint says what is wrong with the URL of an endpoint, if anything.
func CheckEndpoint(u *url.URL) error {
	switch {
	case u == nil:
		return errors.New("endpoint without a URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return fmt.Errorf("endpoint %q: the scheme must be http or https", u.Redacted())
	case u.Hostname() == "":
		return fmt.Errorf("endpoint %q: no host", u.Redacted())
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return fmt.Errorf("endpoint %q: user info, query and fragment have no place here", u.Redacted())
	}
	return nil
}

// newPool makes the transports that dial through the guard.
func (c *Client) newPool(cfg *tls.Config, via *proxies) (p pool) {
	for r := range p.direct {
		kept := &http.Transport{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				return c.guard.dial(ctx, network, addr, reach(r))
			},
			TLSClientConfig:     cfg,
			TLSHandshakeTimeout: DefaultHeadTimeout,
			// A node pulls from few registries, many layers at a time.
			MaxIdleConns:        256,
			MaxIdleConnsPerHost: 64,
			IdleConnTimeout:     90 * time.Second,
			// What is stored is what the digest names: the bytes as they are.
			DisableCompression:     true,
			MaxResponseHeaderBytes: 64 << 10,
			Protocols:              http1Only(),
		}
		p.direct[r] = transports{kept, unkept(kept)}
		if via != nil {
			kept = kept.Clone()
			via.proxied(kept, c.guard, reach(r), c.opts.UserAgent)
			p.proxied[r] = transports{kept, unkept(kept)}
		}
	}
	return p
}

// unkept dials as t does, for each request anew.
func unkept(t *http.Transport) *http.Transport {
	t = t.Clone()
	t.DisableKeepAlives = true
	return t
}

// http1Only keeps a blob on a connection of its own: parallel requests are
// meant to be parallel connections.
func http1Only() *http.Protocols {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	return p
}

// newRegistry has the registry's connections go by via.
func (c *Client) newRegistry(cfg Config, via *proxies) *Registry {
	if len(cfg.Endpoints) == 0 {
		host := string(cfg.Name)
		if cfg.Name == DockerHub {
			host = hubHost
		}
		cfg.Endpoints = []Endpoint{{URL: &url.URL{Scheme: "https", Host: host}}}
	}
	r := &Registry{
		name:        cfg.Name,
		client:      c,
		endpoints:   cfg.Endpoints,
		pool:        c.pool,
		foreign:     c.pool,
		proxies:     via,
		warnings:    &c.warnings,
		headTimeout: cmp.Or(cfg.HeadTimeout, DefaultHeadTimeout),
		realm:       cfg.Realm,
		credentials: cfg.Credentials,
		proofs:      make(map[proofKey]proof),
		bases:       make(map[string]base),
		hosts:       make(map[string]*host),
		habits:      make(map[Habit]bool),
		limits:      make(map[question]time.Time),
		asking:      gate{places: make(map[string]*place)},
	}
	if cfg.TLS != nil || via != c.proxies {
		r.pool = c.newPool(cmp.Or(cfg.TLS, &tls.Config{RootCAs: c.opts.RootCAs}), via)
	}
	if cfg.ForeignRoots != nil || via != c.proxies {
		r.foreign = c.newPool(&tls.Config{RootCAs: cmp.Or(cfg.ForeignRoots, c.opts.RootCAs)}, via)
	}
	return r
}

// Registry returns the registry of that name, listed or not.
func (c *Client) Registry(name Name) *Registry {
	if r := c.listed[name]; r != nil {
		return r
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.unlisted[name]; r != nil {
		return r
	}
	if len(c.unlisted) >= maxUnlisted {
		for n := range c.unlisted { // any: the order of a map is as good as another
			delete(c.unlisted, n)
			break
		}
	}
	r := c.newRegistry(Config{Name: name, HeadTimeout: c.opts.HeadTimeout}, c.proxies)
	r.asking.own, r.asking.all = make(slots, maxStrangerQuestions), c.strangers
	c.unlisted[name] = r
	return r
}

// Names are those of the listed registries.
func (c *Client) Names() []Name { return slices.Sorted(maps.Keys(c.listed)) }

// StrangersInFlight is how many questions wait for the headers of registries that
// are not listed, or for their turn.
func (c *Client) StrangersInFlight() (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.unlisted {
		n += r.asking.inFlight()
	}
	return n
}

// Listed tells whether the operator named that registry.
func (c *Client) Listed(name Name) bool { return c.listed[name] != nil }

// Close drops the idle connections, and ends what still runs for credentials.
func (c *Client) Close() {
	c.pool.close()
	for _, r := range c.listed {
		if r.credentials != nil {
			r.credentials.Close()
		}
		r.pool.close()
		r.foreign.close()
	}
}

func (p *pool) close() {
	for r := range p.direct {
		p.direct[r].kept.CloseIdleConnections()
		if t := p.proxied[r].kept; t != nil {
			t.CloseIdleConnections()
		}
	}
}
