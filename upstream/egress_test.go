// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"tarn/internal/registrytest"

	"golang.org/x/net/http/httpproxy"
)

// names resolves some names; all others are not known here.
func names(known map[string]string) func(context.Context, string) ([]netip.Addr, error) {
	return func(_ context.Context, host string) ([]netip.Addr, error) {
		if at, ok := known[host]; ok {
			return []netip.Addr{netip.MustParseAddr(at)}, nil
		}
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
}

// behind is a client behind the proxy.
func behind(t *testing.T, f *registrytest.Proxy, opts Options) *Client {
	t.Helper()
	if opts.Proxies == nil {
		opts.Proxies = &httpproxy.Config{HTTPProxy: f.URL, HTTPSProxy: f.URL, NoProxy: "direct.test"}
	}
	opts.Connect = registrytest.Loopback(t)
	c, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// believing trusts these servers, under the name that httptest's certificate has.
func believing(servers ...*httptest.Server) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, s := range servers {
		if cert := s.Certificate(); cert != nil {
			pool.AddCert(cert)
		}
	}
	return pool
}

const proxiedHost = "registry.example.com" // httptest's certificate is for *.example.com, too

// TestAPullGoesByTheProxyAndItReadsNoCredential: with TLS all the way to the
// registry, by a proxy of either kind, with a password or without.
func TestAPullGoesByTheProxyAndItReadsNoCredential(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(http.Handler) *httptest.Server{"http": httptest.NewServer, "https": httptest.NewTLSServer} {
		t.Run(name, func(t *testing.T) {
			reg := registrytest.NewTLS(t)
			d := reg.Blob("app", []byte("bytes"))
			f := registrytest.NewProxy(t, reg.Address(), start)
			f.Password = "tarn:pro:xy@/"
			at, err := url.Parse(strings.Replace(f.URL, "127.0.0.1", "localhost", 1))
			if err != nil {
				t.Fatal(err)
			}
			if name == "https" { // the name in its certificate
				at.Host = "proxy.example.com:" + at.Port()
			}
			at.User = url.UserPassword("tarn", "pro:xy@/")
			c := behind(t, f, Options{
				Listed:  []Config{{Name: proxiedHost}},
				Proxies: &httpproxy.Config{HTTPSProxy: at.String()},
				RootCAs: believing(reg.Server, f.Server),
				Lookup:  names(map[string]string{"localhost": "127.0.0.1", "proxy.example.com": "127.0.0.1"}),
			})
			req := blobRequest("GET", d)
			req.Authorization = "Basic " + base64.StdEncoding.EncodeToString([]byte("u:secret"))
			resp, err := c.Registry(proxiedHost).Do(t.Context(), req)
			if got := read(t, resp, err); got != "bytes" {
				t.Errorf("%q", got)
			}
			if saw := reg.Exchanges(); len(saw) != 1 || saw[0].Authorization != req.Authorization {
				t.Errorf("the registry saw %v", saw)
			}
			if told := f.Told(); !slices.Equal(told, []string{proxiedHost + ":443"}) {
				t.Errorf("the proxy was told %v", told)
			}
			if f.SawAny(req.Authorization, strings.TrimPrefix(req.Authorization, "Basic ")) {
				t.Error("the proxy read the credential")
			}
		})
	}
}

// TestWhatAProxyIsNotToldOf: before it hears of a host.
func TestWhatAProxyIsNotToldOf(t *testing.T) {
	t.Parallel()
	reg := registrytest.NewTLS(t)
	d := reg.Blob("app", []byte("bytes"))
	f := registrytest.NewProxy(t, reg.Address(), httptest.NewServer)
	known := names(map[string]string{"inside.example.com": "10.0.0.7", "outside.example.com": "93.184.215.14", "metadata.example.com": "169.254.169.254"})
	ask := func(c *Client, name Name) error {
		resp, err := c.Registry(name).Do(t.Context(), blobRequest("GET", d))
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	own, err := netip.ParseAddrPort("93.184.215.14:5050")
	if err != nil {
		t.Fatal(err)
	}
	opts := Options{Lookup: known, RootCAs: believing(reg.Server), Own: []netip.AddrPort{own}}
	closed, listed := behind(t, f, opts), opts
	opts.AllowViaProxy = true
	open := behind(t, f, opts)
	listed.Listed = []Config{{Name: "inside.example.com"}, {Name: "10.0.0.7"}, {Name: "169.254.169.254"}}
	for name, c := range map[string]struct {
		by      *Client
		host    Name
		refused bool
	}{
		"nobody listed it":                          {closed, "unknown.example.com", true},
		"nobody listed it, and it is public here":   {closed, "outside.example.com", true},
		"allowed, and not known here":               {open, "unknown.example.com", false},
		"allowed, and public here":                  {open, "outside.example.com", false},
		"allowed, and private here":                 {open, "inside.example.com", true},
		"allowed, and a metadata service here":      {open, "metadata.example.com", true},
		"allowed, a private address":                {open, "10.0.0.7", true},
		"allowed, a metadata address":               {open, "169.254.169.254", true},
		"allowed, an address of IPv6":               {open, "[fd00::1]", true},
		"allowed, an address in short":              {open, "10.7", true},
		"allowed, an address as a number":           {open, "167772167", true},
		"allowed, an address in hex":                {open, "0xa000007", true},
		"allowed, tarn's own listener":              {open, "93.184.215.14:5050", true},
		"allowed, a name of one label":              {open, "intranet", true},
		"allowed, a cloud's own name":               {open, "metadata.google.internal", true},
		"the operator listed it, whatever it is":    {behind(t, f, listed), "inside.example.com", false},
		"the operator listed a metadata service":    {behind(t, f, listed), "169.254.169.254", true},
		"the name of a host that is reached direct": {open, "direct.test", true}, // it is not known here
	} {
		before := len(f.Told())
		err := ask(c.by, c.host)
		told := len(f.Told()) - before
		switch {
		case c.host == "direct.test":
			if !errors.Is(err, ErrUnreachable) || told != 0 {
				t.Errorf("%s: %v, and the proxy was told of %d", name, err, told)
			}
		case c.refused && (!errors.Is(err, ErrGuard) || told != 0):
			t.Errorf("%s: %v, and the proxy was told of %d", name, err, told)
		case !c.refused && (err != nil || told != 1):
			t.Errorf("%s: %v, and the proxy was told of %d", name, err, told)
		}
	}
}

// TestAStrangersQuestionTakesNoConnectionOfAListedRegistry that redirects to the same
// host.
func TestAStrangersQuestionTakesNoConnectionOfAListedRegistry(t *testing.T) {
	t.Parallel()
	reg := registrytest.NewTLS(t)
	d := reg.Blob("app", []byte("bytes"))
	reg.Hook = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Host != proxiedHost {
			return false
		}
		http.Redirect(w, r, "https://cdn.example.com"+r.URL.Path, http.StatusTemporaryRedirect)
		return true
	}
	f := registrytest.NewProxy(t, reg.Address(), httptest.NewServer)
	c := behind(t, f, Options{Listed: []Config{{Name: proxiedHost}}, RootCAs: believing(reg.Server), Lookup: names(nil)})
	resp, err := c.Registry(proxiedHost).Do(t.Context(), blobRequest("GET", d))
	if got := read(t, resp, err); got != "bytes" {
		t.Errorf("%q", got)
	}
	if _, err := c.Registry("cdn.example.com").Do(t.Context(), blobRequest("GET", d)); !errors.Is(err, ErrGuard) {
		t.Errorf("a stranger's: %v", err)
	}
}

// TestAProxiedRegistryDoesNotSendInside: whatever its own name is here.
func TestAProxiedRegistryDoesNotSendInside(t *testing.T) {
	t.Parallel()
	for _, inside := range []string{"https://10.0.0.7/x", "https://inside.example.com/x", "https://metadata.google.internal/x", "http://127.0.0.1:1/x", "https://127.1/x"} {
		reg := registrytest.NewTLS(t)
		reg.Hook = func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Location", inside)
			w.WriteHeader(http.StatusTemporaryRedirect)
			return true
		}
		f := registrytest.NewProxy(t, reg.Address(), httptest.NewServer)
		c := behind(t, f, Options{Listed: []Config{{Name: proxiedHost}}, RootCAs: believing(reg.Server), Lookup: names(map[string]string{"inside.example.com": "10.0.0.7"})})
		_, err := c.Registry(proxiedHost).Do(t.Context(), blobRequest("GET", reg.Blob("app", []byte("x"))))
		if downgrade := strings.HasPrefix(inside, "http:"); downgrade != errors.Is(err, ErrProtocol) || !downgrade && !errors.Is(err, ErrGuard) {
			t.Errorf("%s: %v", inside, err)
		}
		if told := f.Told(); len(told) != 1 {
			t.Errorf("%s: the proxy was told %v", inside, told)
		}
	}
}

// TestNoCredentialGoesByAProxyInTheClear.
func TestNoCredentialGoesByAProxyInTheClear(t *testing.T) {
	t.Parallel()
	reg := registrytest.New(t)
	d := reg.Blob("app", []byte("bytes"))
	f := registrytest.NewProxy(t, reg.Address(), httptest.NewServer)
	c := behind(t, f, Options{Listed: []Config{{Name: lab, Endpoints: []Endpoint{{URL: &url.URL{Scheme: "http", Host: "plain.example.com"}}}}}, Lookup: names(nil)})
	req := blobRequest("GET", d)
	resp, err := c.Registry(lab).Do(t.Context(), req)
	if got := read(t, resp, err); got != "bytes" || !slices.Equal(f.Told(), []string{"plain.example.com"}) {
		t.Errorf("as anonymous: %q, and the proxy was told %v", got, f.Told())
	}
	if !f.SawAny(d.String()) {
		t.Error("what goes by it in the clear is not seen, and so this test shows nothing")
	}
	req.Authorization = "Bearer c2VjcmV0"
	var host *HostError
	if _, err := c.Registry(lab).Do(t.Context(), req); !errors.Is(err, ErrGuard) || !errors.As(err, &host) || !strings.Contains(host.Advice, "NO_PROXY") {
		t.Errorf("with a credential: %v", err)
	}
	if len(f.Told()) != 1 || f.SawAny("c2VjcmV0") {
		t.Errorf("the proxy was told %v", f.Told())
	}
	refresh := tokenRequest{realm: &url.URL{Scheme: "http", Host: "auth.example.com", Path: "/token"}, refreshToken: "c2VjcmV0"}
	if _, err := c.Registry(lab).fetchToken(t.Context(), refresh, reachPublic, false); !errors.Is(err, ErrGuard) || len(f.Told()) != 1 {
		t.Errorf("with a refresh token: %v, told %v", err, f.Told())
	}
}

// TestAProxyThatOpensNoWayIsSaidSo: it is as if the registry could not be reached,
// and the words are about the proxy.
func TestAProxyThatOpensNoWayIsSaidSo(t *testing.T) {
	t.Parallel()
	reg := registrytest.NewTLS(t)
	plain := Config{Name: "plain.test", Endpoints: []Endpoint{{URL: &url.URL{Scheme: "http", Host: "plain.example.com"}}}}
	for name, c := range map[string]struct {
		prepare func(*registrytest.Proxy)
		want    string
		plain   bool // also where the registry itself has no TLS
	}{
		"wants a password": {func(f *registrytest.Proxy) { f.Password = "u:p" }, "wants a user and password", true},
		"does not like it": {func(f *registrytest.Proxy) { f.Refuse = 403 }, "it answered 403", false},
		"finds it broken":  {func(f *registrytest.Proxy) { f.Refuse = 502 }, "it answered 502", false},
		"is not there":     {func(f *registrytest.Proxy) { f.Close() }, "the proxy cannot be reached", true},
	} {
		f := registrytest.NewProxy(t, reg.Address(), httptest.NewServer)
		c.prepare(f)
		client := behind(t, f, Options{Listed: []Config{{Name: proxiedHost}, plain}, RootCAs: believing(reg.Server), Lookup: names(nil)})
		for _, registry := range []Name{proxiedHost, plain.Name} {
			if registry == plain.Name && !c.plain {
				continue
			}
			_, err := client.Registry(registry).Do(t.Context(), Request{Method: "HEAD", Repository: "app", Kind: Manifest, Reference: "v1"})
			var host *HostError
			if !errors.Is(err, ErrUnreachable) || !errors.As(err, &host) || host.Kind != troubleProxy || !strings.Contains(host.Brief(), c.want) {
				t.Errorf("%s, %s: %v", name, registry, err)
			}
			if !client.Registry(registry).Away("app") {
				t.Errorf("%s, %s: it is not away", name, registry)
			}
		}
	}
}

// TestASilentProxyIsASilentRegistry.
func TestASilentProxyIsASilentRegistry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := make(chan struct{}, 2)
		c, err := New(Options{
			Listed:  []Config{{Name: proxiedHost, HeadTimeout: 4 * time.Second}},
			Proxies: &httpproxy.Config{HTTPSProxy: "http://10.0.0.1:3128"},
			Connect: func(context.Context, string, string) (net.Conn, error) {
				near, far := net.Pipe()
				go func() {
					io.Copy(io.Discard, far)
					gone <- struct{}{}
				}()
				return near, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		begun := time.Now()
		_, err = c.Registry(proxiedHost).Do(t.Context(), Request{Method: "HEAD", Repository: "app", Kind: Manifest, Reference: "v1"})
		var host *HostError
		if !errors.Is(err, ErrTimeout) || !errors.As(err, &host) || host.Kind != troubleProxy || time.Since(begun) != 4*time.Second {
			t.Errorf("%v after %v", err, time.Since(begun))
		}
		<-gone
	})
}

// TestASilentProxyHoldsNoConnectionThatNobodyWaitsFor.
func TestASilentProxyHoldsNoConnectionThatNobodyWaitsFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := make(chan struct{})
		c, err := New(Options{
			Listed:  []Config{{Name: proxiedHost}},
			Proxies: &httpproxy.Config{HTTPSProxy: "http://10.0.0.1:3128"},
			Connect: func(context.Context, string, string) (net.Conn, error) {
				near, far := net.Pipe()
				go func() {
					io.Copy(io.Discard, far)
					close(gone)
				}()
				return near, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, leave := context.WithTimeout(t.Context(), time.Second)
		defer leave()
		begun := time.Now()
		c.Registry(proxiedHost).Do(ctx, Request{Method: "HEAD", Repository: "app", Kind: Manifest, Reference: "v1"})
		<-gone
		if took := time.Since(begun); took != dialTimeout {
			t.Errorf("the connection was given up after %v", took)
		}
	})
}

// TestARegistrysProxyIsItsOwn: and its TLS configuration is not for the proxy.
func TestARegistrysProxyIsItsOwn(t *testing.T) {
	t.Parallel()
	reg := registrytest.NewTLS(t)
	d := reg.Blob("app", []byte("bytes"))
	everybodys := registrytest.NewProxy(t, reg.Address(), httptest.NewServer)
	its := registrytest.NewProxy(t, reg.Address(), httptest.NewTLSServer)
	var certificates int
	its.TLS.ClientAuth = tls.RequestClientCert
	its.TLS.VerifyConnection = func(s tls.ConnectionState) error { certificates += len(s.PeerCertificates); return nil }
	own := &tls.Config{InsecureSkipVerify: true, Certificates: reg.TLS.Certificates}
	proxy := &httpproxy.Config{HTTPSProxy: strings.Replace(its.URL, "127.0.0.1", "proxy.example.com", 1), HTTPProxy: "http://unused.example.com"}
	for _, believed := range []bool{false, true} {
		opts := Options{
			Listed: []Config{{Name: "a.example.com"}, {Name: "b.example.com", Proxies: proxy, TLS: own}},
			Lookup: names(map[string]string{"proxy.example.com": "127.0.0.1"}), RootCAs: believing(reg.Server),
		}
		if !believed { // insecure_skip_verify of the registry says nothing of the proxy
			opts.RootCAs = x509.NewCertPool()
		}
		_, err := behind(t, everybodys, opts).Registry("b.example.com").Do(t.Context(), blobRequest("GET", d))
		if (err == nil) != believed {
			t.Errorf("believed: %v: %v", believed, err)
		}
	}
	if n := len(its.Told()); n != 1 || len(everybodys.Told()) != 0 || certificates != 0 {
		t.Errorf("its proxy was asked %d times, and saw %d certificates of tarn's; the other was told %v", n, certificates, everybodys.Told())
	}
}

func TestURLsOfProxies(t *testing.T) {
	t.Parallel()
	for text, ok := range map[string]bool{
		"http://p:3128": true, "https://p": true, "p:3128": true, "http://u:p@p:3128/": true, "[::1]:3128": true,
		"": false, "socks5://p": false, "http://": false, "http://p/path": false, "http://p?q": false, "http://u:se cret@p": false,
	} {
		u, err := CheckProxy(text)
		if (err == nil) != ok {
			t.Errorf("%q: %v, %v", text, u, err)
		}
		if err != nil && strings.Contains(fmt.Sprint(err), "cret") {
			t.Errorf("the error repeats the password: %v", err)
		}
	}
}
