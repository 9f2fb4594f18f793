// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpproxy"
)

// A proxy on the way out connects in tarn's place, so that the address that it
// connects to cannot be checked here. What is checked, before the proxy is told
// a host:
//
//   - a registry that is not listed is asked by a proxy only where the operator
//     allows it;
//   - an address that stands in a URL is held to the same rule as one that is
//     dialled;
//   - a name that has addresses here must have none that may not be dialled,
//     since the proxy may take any of them;
//   - a name that only means something inside a network is none to ask for.
//
// The operator's own endpoints are not looked up: a node behind a proxy often
// has no name server that knows them.

// lookupBehind bounds the look-up of a name that the proxy will resolve itself: a
// node behind a proxy may have a name server that never answers.
const lookupBehind = time.Second

// proxies are those by which registries are reached; nil is none.
type proxies struct {
	choose func(*url.URL) (*url.URL, error)
	tls    map[string]*tls.Config // of those that are spoken to over TLS, by host:port
}

// CheckProxy reads the URL of a proxy: http or https, a host, perhaps a user and
// password, and http where it names no scheme. Its errors never repeat it, because
// of the password.
func CheckProxy(text string) (*url.URL, error) {
	if !strings.Contains(text, "://") {
		text = "http://" + text
	}
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Hostname() == "":
		return nil, errors.New("not the URL of a proxy, as in http://proxy.example:3128")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("the proxy's scheme must be http or https, and not %q", u.Scheme)
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("the URL of a proxy has no path, query or fragment, as in http://proxy.example:3128")
	}
	return u, nil
}

// newProxies reads what HTTP_PROXY, HTTPS_PROXY and NO_PROXY say. roots are what the
// certificate of an https proxy is held to: a registry's own TLS configuration is
// for that registry, and never for the proxy.
func newProxies(cfg *httpproxy.Config, roots *x509.CertPool) (*proxies, error) {
	if cfg == nil || cfg.HTTPProxy == "" && cfg.HTTPSProxy == "" {
		return nil, nil
	}
	p, own := &proxies{tls: make(map[string]*tls.Config)}, *cfg
	for _, text := range []*string{&own.HTTPProxy, &own.HTTPSProxy} {
		if *text == "" {
			continue
		}
		u, err := CheckProxy(*text)
		if err != nil {
			return nil, err
		}
		at := url.URL{Scheme: "http", User: u.User, Host: net.JoinHostPort(u.Hostname(), originPort(u))}
		if u.Scheme == "https" { // dial speaks TLS, the transport does not know
			p.tls[at.Host] = &tls.Config{ServerName: u.Hostname(), RootCAs: roots, NextProtos: []string{"http/1.1"}}
		}
		*text = at.String()
	}
	p.choose = own.ProxyFunc()
	return p, nil
}

// of is the proxy by which u is reached; nil for none.
func (p *proxies) of(u *url.URL) *url.URL {
	if p == nil {
		return nil
	}
	via, err := p.choose(u)
	if err != nil { // newProxies has read both
		return nil
	}
	return via
}

// dial connects to a proxy. The operator named it, so that it may be anywhere.
func (p *proxies) dial(ctx context.Context, g *guard, network, hostport string) (net.Conn, error) {
	conn, err := g.dial(ctx, network, hostport, reachAny)
	cfg := p.tls[hostport]
	if err != nil {
		return nil, err
	}
	if cfg != nil {
		ctx, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		secure := tls.Client(conn, cfg)
		if err := secure.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, err
		}
		conn = secure
	}
	conn.SetReadDeadline(time.Now().Add(dialTimeout))
	return &impatient{Conn: conn}, nil
}

// impatient is a connection to a proxy that has dialTimeout for its first byte. The
// transport gives the answer to CONNECT a minute, also where nobody waits for it any
// more, and a silent proxy would come to have all of tarn's descriptors.
type impatient struct {
	net.Conn
	heard atomic.Bool
}

func (c *impatient) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && c.heard.CompareAndSwap(false, true) {
		c.Conn.SetReadDeadline(time.Time{})
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && !c.heard.Load() {
		err = errProxySilent
	}
	return n, err
}

var errProxySilent = errors.New("the proxy does not answer")

// proxied makes t go by the proxies. Its connections are apart from all direct
// ones, and among themselves by proxy and, for https, by host.
func (p *proxies) proxied(t *http.Transport, g *guard, far reach, userAgent string) {
	t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		return p.dial(ctx, g, network, addr)
	}
	t.Proxy = func(req *http.Request) (*url.URL, error) {
		if req.URL.Scheme == "http" { // one connection for all hosts
			if err := g.checkBehind(req.Context(), req.URL.Hostname(), originPort(req.URL), far); err != nil {
				return nil, err
			}
		}
		return p.of(req.URL), nil
	}
	t.GetProxyConnectHeader = func(ctx context.Context, _ *url.URL, target string) (http.Header, error) {
		host, port, err := net.SplitHostPort(target)
		if err != nil {
			return nil, err
		}
		return http.Header{"User-Agent": {userAgent}}, g.checkBehind(ctx, host, port, far)
	}
	t.OnProxyConnectResponse = func(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
		if resp.StatusCode != http.StatusOK {
			return &proxyRefused{resp.StatusCode}
		}
		return nil
	}
}

// proxyRefused is a proxy's answer that opens no way.
type proxyRefused struct{ status int }

func (e *proxyRefused) Error() string {
	if e.status == http.StatusProxyAuthRequired {
		return "the proxy wants a user and password, or others than it was given (407)"
	}
	return fmt.Sprintf("the proxy does not connect there, it answered %d", e.status)
}

// checkBehind tells whether a proxy may be told to connect to host:port. It fails with
// ErrGuard.
func (g *guard) checkBehind(ctx context.Context, host, port string, r reach) error {
	portNum, err := net.LookupPort("tcp", port)
	if err != nil {
		return err
	}
	var addrs []netip.Addr
	a, err := netip.ParseAddr(host)
	switch {
	case err == nil:
		addrs = []netip.Addr{a}
	case endsInNumber(host): // a proxy's resolver may take 127.1 and 0x7f000001 for addresses
		return fmt.Errorf("%w: %w: %s", ErrGuard, errOddAddress, host)
	case r == reachAny:
		return nil
	case isInside(host):
		return fmt.Errorf("%w: %w: %s", ErrGuard, errInside, host)
	default:
		ctx, cancel := context.WithTimeout(ctx, lookupBehind)
		defer cancel()
		if addrs, err = g.lookup(ctx, host); err != nil {
			return nil // it cannot be checked here
		}
	}
	for _, a := range addrs {
		ap := netip.AddrPortFrom(a.Unmap(), uint16(portNum))
		if z := g.zoneOf(ap); !r.allows(z) {
			return &refusedAddress{host, ap, z}
		}
	}
	return nil
}

// endsInNumber tells whether resolvers may take a host for an IPv4 address although
// it is not written as one (WHATWG URL 3.5).
func endsInNumber(host string) bool {
	host = strings.TrimSuffix(host, ".")
	last := asciiLower(host[strings.LastIndexByte(host, '.')+1:])
	if hex, ok := strings.CutPrefix(last, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return last != "" && strings.Trim(last, "0123456789") == ""
}

// isInside tells whether a name can only mean a host of somebody's own network: it
// has one label, or stands under a name that is reserved for such (RFC 6761, 6762,
// 8375; ICANN's internal, where clouds have their metadata services).
func isInside(host string) bool {
	host = asciiLower(strings.TrimSuffix(host, "."))
	if !strings.Contains(host, ".") {
		return true
	}
	for _, suffix := range []string{".localhost", ".local", ".internal", ".home.arpa"} {
		if strings.HasSuffix(host, suffix) {
			return true
		}
	}
	return false
}

// checkEgress is what a request must be to go by a proxy, whatever its connection.
// It fails with ErrGuard.
func (r *Registry) checkEgress(hreq *http.Request) error {
	switch {
	case !r.listed && !r.client.opts.AllowViaProxy:
		return fmt.Errorf("%w: %w", ErrGuard, errUnlistedBehind)
	case hreq.URL.Scheme == "http" && (hreq.Header.Get("Authorization") != "" || hreq.Method == http.MethodPost):
		return fmt.Errorf("%w: %w for %s", ErrGuard, errPlain, hreq.URL.Hostname())
	}
	return nil
}

var (
	errUnlistedBehind = errors.New("the registry is not listed, and is reached by a proxy, where its address cannot be checked")
	errInside         = errors.New("this name can only mean a host of the proxy's own network")
	errOddAddress     = errors.New("this is no name, and no address as it is written")
	// errPlain: whoever runs the proxy would read it.
	errPlain = errors.New("no credential is sent by a proxy over plain http")
)
