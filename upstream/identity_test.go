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
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

func TestOnlyThePinnedRealmIsShownAPassword(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		authority, pin, realm string
		want                  bool
	}{
		{"https://registry-1.docker.io", "", "https://auth.docker.io/token", true},
		{"https://registry.gitlab.com", "", "https://gitlab.com/jwt/auth", true},
		{"https://ghcr.io", "", "https://ghcr.io/token", true},
		{"https://registry.corp:5000", "", "https://registry.corp/token", true},
		{"https://registry.corp:5000", "", "https://auth.registry.corp/token", true},
		{"https://ghcr.io", "", "http://ghcr.io/token", false},
		{"https://ghcr.io", "", "https://ghcr.io.evil.example/token", false},
		{"https://ghcr.io", "", "https://evilghcr.io/token", false},
		{"https://a.co.uk", "", "https://b.co.uk/token", false},
		{"https://a.github.io", "", "https://b.github.io/token", false},
		{"https://10.0.0.5:5000", "", "https://10.0.0.5/token", true},
		{"https://10.0.0.5:5000", "", "https://10.0.0.6/token", false},
		{"https://registry:5000", "", "https://auth:5000/token", false},
		{"http://127.0.0.1:5000", "", "http://127.0.0.1:5001/token", true},
		{"http://10.0.0.5:5000", "", "http://10.0.0.5:5000/token", false},
		{"http://127.0.0.1:5000", "", "http://10.0.0.5/token", false},
		{"https://ghcr.io", "https://auth.example/token", "https://auth.example/token", true},
		{"https://ghcr.io", "https://auth.example/token", "https://auth.example:443/token", true},
		{"https://ghcr.io", "https://auth.example/token", "https://auth.example/other", false},
		{"https://ghcr.io", "https://auth.example/token", "https://ghcr.io/token", false},
		{"https://ghcr.io", "https://auth.example/token", "http://auth.example/token", false},
	} {
		u, err := url.Parse(c.authority)
		if err != nil {
			t.Fatal(err)
		}
		r := &Registry{listed: true, endpoints: []Endpoint{{URL: u}}}
		if c.pin != "" {
			r.realm, _ = url.Parse(c.pin)
		}
		realm, _ := url.Parse(c.realm)
		if got := r.pinned(realm); got != c.want {
			t.Errorf("%s, pin %q, realm %s: %v", c.authority, c.pin, c.realm, got)
		}
	}
}

func TestRealmsThatPasswordsMayNotGoTo(t *testing.T) {
	t.Parallel()
	for raw, ok := range map[string]bool{
		"https://auth.example/token": true, "http://127.0.0.1:5001/token": true, "http://localhost/token": true, "http://[::1]/token": true,
		"http://10.0.0.5/token": false, "http://auth.example/token": false, "ftp://auth.example": false, "auth.example": false,
		"https://u:p@auth.example/": false, "https://auth.example/?x=y": false, "": false,
	} {
		u, err := url.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		if got := CheckRealm(u) == nil; got != ok {
			t.Errorf("%q: %v", raw, got)
		}
	}
}

// TestARedirectElsewhereCarriesNoAuthorization: elsewhere is any other scheme,
// host or port.
func TestARedirectElsewhereCarriesNoAuthorization(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	seen := make(map[string]string)
	target := registrytest.New(t)
	target.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		seen[req.Host] = req.Header.Get("Authorization")
		fmt.Fprint(w, "bytes")
		return true
	}
	home := registrytest.New(t)
	var to atomic.Value
	home.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path == "/landed" {
			return target.Hook(w, req)
		}
		http.Redirect(w, req, to.Load().(string), http.StatusTemporaryRedirect)
		return true
	}
	_, homePort, _ := net.SplitHostPort(home.Address())
	_, targetPort, _ := net.SplitHostPort(target.Address())
	loopback := registrytest.Loopback(t)
	c, err := New(Options{
		Listed: []Config{{Name: "lab.test", Endpoints: []Endpoint{{URL: &url.URL{Scheme: "http", Host: "lab.test:" + homePort}}}}},
		Lookup: func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
		},
		Connect: loopback,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	d := digest.FromString("bytes")
	for location, carries := range map[string]bool{
		"/landed": true,
		"http://LAB.test:" + homePort + "/landed":     true,
		"http://lab.test:" + targetPort + "/":         false, // another port
		"http://sub.lab.test:" + homePort + "/landed": false, // a subdomain
		"http://127.0.0.1:" + homePort + "/landed":    false, // another name
		"http://lab.test.:" + homePort + "/landed":    false,
		"http://other.test:" + targetPort + "/":       false,
	} {
		to.Store(location)
		req := blobRequest("GET", d)
		req.Authorization = "Basic Y2FuYXJ5"
		resp, err := c.Registry("lab.test").Do(t.Context(), req)
		if got := read(t, resp, err); got != "bytes" {
			t.Fatalf("%s: %q", location, got)
		}
		u, _ := url.Parse(location)
		host := u.Host
		if host == "" {
			host = "lab.test:" + homePort
		}
		mu.Lock()
		got, there := seen[host]
		if !there || (got != "") != carries {
			t.Errorf("%s saw %q (asked: %v)", location, got, there)
		}
		clear(seen)
		mu.Unlock()
	}
}

// TestWhoWasSentElsewhereDoesNotComeHome: a path that a foreign host chose is
// neither asked with the credential nor the registry's own word.
func TestWhoWasSentElsewhereDoesNotComeHome(t *testing.T) {
	t.Parallel()
	home, foreign := registrytest.New(t), registrytest.New(t)
	foreign.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		http.Redirect(w, req, home.URL+"/chosen", http.StatusFound)
		return true
	}
	home.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path != "/chosen" {
			http.Redirect(w, req, foreign.URL+"/", http.StatusFound)
			return true
		}
		if req.Header.Get("Authorization") != "" {
			t.Error("the credential came home")
		}
		w.WriteHeader(404)
		return true
	}
	req := blobRequest("GET", digest.FromString("bytes"))
	req.Authorization = "Basic Y2FuYXJ5"
	var refused *StatusError
	if _, err := listed(t, endpoint(home)).Do(t.Context(), req); errors.As(err, &refused) || !errors.Is(err, ErrProtocol) {
		t.Errorf("%v", err)
	}
}

func TestTarnsCertificateIsForTheRegistryAlone(t *testing.T) {
	t.Parallel()
	var shown atomic.Int32
	target := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		shown.Add(int32(len(req.TLS.PeerCertificates)))
		fmt.Fprint(w, "bytes")
	}))
	target.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	target.StartTLS()
	defer target.Close()
	home := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if len(req.TLS.PeerCertificates) == 0 {
			t.Error("the registry saw no certificate")
		}
		http.Redirect(w, req, target.URL, http.StatusFound)
	}))
	home.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	home.StartTLS()
	defer home.Close()
	u, err := url.Parse(home.URL)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(home.Certificate()) // both servers'
	do := func(foreign *x509.CertPool) (*Response, error) {
		c, err := New(Options{
			Listed: []Config{{
				Name: lab, Endpoints: []Endpoint{{URL: u}}, ForeignRoots: foreign,
				TLS: &tls.Config{InsecureSkipVerify: true, Certificates: home.TLS.Certificates},
			}},
			Connect: registrytest.Loopback(t),
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c.Registry(lab).Do(t.Context(), blobRequest("GET", digest.FromString("bytes")))
	}
	resp, err := do(roots)
	if got := read(t, resp, err); got != "bytes" || shown.Load() != 0 {
		t.Errorf("%q, %d certificates shown elsewhere", got, shown.Load())
	}
	if _, err := do(nil); !errors.Is(err, ErrUnreachable) {
		t.Errorf("a target that nobody vouches for: %v", err)
	}
}

func TestSixHopsAreRefused(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	var hops, limit atomic.Int32
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if hops.Add(1) <= limit.Load() {
			http.Redirect(w, req, fmt.Sprintf("/hop/%d", hops.Load()), http.StatusFound)
			return true
		}
		fmt.Fprint(w, "bytes")
		return true
	}
	registry := listed(t, endpoint(r))
	for n, ok := range map[int32]bool{5: true, 6: false} {
		hops.Store(0)
		limit.Store(n)
		resp, err := registry.Do(t.Context(), blobRequest("GET", digest.FromString("bytes")))
		if ok {
			if got := read(t, resp, err); got != "bytes" {
				t.Errorf("%d hops: %q", n, got)
			}
		} else if !errors.Is(err, ErrProtocol) {
			t.Errorf("%d hops: %v", n, err)
		}
	}
}

func TestAnAnonymousTokenIsRenewedWithoutAsking(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	r.Access = registrytest.NewAccess(t, "Bearer")
	r.Access.Allow("app", "")
	d := r.Blob("app", []byte("bytes"))
	registry := listed(t, endpoint(r))
	get := func() {
		t.Helper()
		resp, err := registry.Do(t.Context(), blobRequest("GET", d))
		if got := read(t, resp, err); got != "bytes" {
			t.Fatalf("%q", got)
		}
	}
	get()
	if n := len(r.Exchanges()); n != 2 {
		t.Errorf("the first time: %v", r.Exchanges())
	}
	r.Reset()
	get()
	if n := len(r.Exchanges()); n != 1 || len(r.Access.Exchanges()) != 1 {
		t.Errorf("the second time: %v, %v", r.Exchanges(), r.Access.Exchanges())
	}
	// As if it had run out.
	registry.mu.Lock()
	for k, p := range registry.proofs {
		p.expires = p.expires.Add(-maxTokenLife)
		registry.proofs[k] = p
	}
	registry.mu.Unlock()
	r.Reset()
	get()
	if n := len(r.Exchanges()); n != 1 || len(r.Access.Exchanges()) != 2 {
		t.Errorf("after it ran out: %v, %v", r.Exchanges(), r.Access.Exchanges())
	}
}

func TestNoIdentityShowsAnothersProof(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	r.Access = registrytest.NewAccess(t, "Bearer")
	for _, user := range []string{"", "node"} {
		r.Access.Allow("app", user)
	}
	d := r.Blob("app", []byte("bytes"))
	registry := listed(t, endpoint(r))
	registry.credentials = NewDockerConfig(writeDockerConfig(t, fmt.Sprintf(`{"auths":{"lab.test":{"username":"node","password":%q}}}`, registrytest.Password("node"))), "lab.test")
	for range 2 {
		for as, user := range map[Identity]string{Anonymous: "", Node: "node"} {
			r.Reset()
			req := blobRequest("GET", d)
			req.As = as
			resp, err := registry.Do(t.Context(), req)
			read(t, resp, err)
			seen := r.Exchanges()
			if got := seen[len(seen)-1].Authorization; !strings.HasSuffix(got, "-of-"+user) {
				t.Errorf("as %q: %q", user, got)
			}
		}
	}
}
