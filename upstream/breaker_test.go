// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

var errRefusedHere = &net.OpError{Op: "dial", Err: errors.New("connection refused")}

// TestWantOfDescriptorsIsNoOutage: that a connection cannot be opened for want
// of something here says nothing of the registry.
func TestWantOfDescriptorsIsNoOutage(t *testing.T) {
	t.Parallel()
	reg := registrytest.New(t)
	d := reg.Blob("app", []byte("bytes"))
	var short atomic.Bool
	c, err := New(Options{
		Listed: []Config{{Name: lab, Endpoints: []Endpoint{endpoint(reg)}}},
		Connect: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if short.Load() {
				return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", syscall.EMFILE)}
			}
			return (&net.Dialer{}).DialContext(ctx, network, reg.Address())
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := c.Registry(lab)
	short.Store(true)
	for range 3 {
		if _, err := r.Do(t.Context(), blobRequest("HEAD", d)); !errors.Is(err, syscall.EMFILE) {
			t.Errorf("%v", err)
		}
	}
	short.Store(false)
	resp, err := r.Do(t.Context(), blobRequest("HEAD", d))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}

// TestARegistryThatIsBackIsRefusedToNobody: many ask at once, the first time
// since it went away.
func TestARegistryThatIsBackIsRefusedToNobody(t *testing.T) {
	t.Parallel()
	for name, listed := range map[string]bool{"listed": true, "not listed": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := registrytest.NewTLS(t)
			d := reg.Blob("app", []byte("bytes"))
			roots := x509.NewCertPool()
			roots.AddCert(reg.Certificate())
			var down atomic.Bool
			opts := Options{
				RootCAs: roots,
				Lookup: func(context.Context, string) ([]netip.Addr, error) {
					return []netip.Addr{netip.MustParseAddr("93.184.216.34")}, nil
				},
				Connect: func(ctx context.Context, network, addr string) (net.Conn, error) {
					if down.Load() {
						return nil, errRefusedHere
					}
					return (&net.Dialer{}).DialContext(ctx, network, reg.Address())
				},
			}
			if listed {
				opts.Listed = []Config{{Name: "example.com"}}
			}
			c, err := New(opts)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			r := c.Registry("example.com")
			ask := func() error {
				resp, err := r.Do(t.Context(), blobRequest("HEAD", d))
				if err == nil {
					resp.Body.Close()
				}
				return err
			}
			down.Store(true)
			if err := ask(); !errors.Is(err, ErrUnreachable) {
				t.Fatal(err)
			}
			b := r.breaker(r.endpoints[0].URL)
			wait := func(what string, done func() bool) {
				tick := time.NewTicker(10 * time.Millisecond)
				defer tick.Stop()
				for n := 0; !done(); n++ {
					if n == 1000 {
						t.Fatalf("not in 10 s: %s", what)
					}
					<-tick.C
				}
			}
			b.mu.Lock()
			b.asked = time.Now().Add(-2 * probeFor) // nobody has asked since
			b.mu.Unlock()
			wait("the probing ends", func() bool {
				b.mu.Lock()
				defer b.mu.Unlock()
				return !b.probing
			})
			down.Store(false)
			wait("somebody is let through", func() bool { return b.circuit.State().String() != "open" })
			// The first is held up until all have come.
			all := make(chan struct{})
			var come atomic.Int64
			another := func() {
				if come.Add(1) == 10 {
					close(all)
				}
			}
			reg.Hook = func(http.ResponseWriter, *http.Request) bool {
				another()
				<-all
				return false
			}
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() {
					if err := ask(); err != nil {
						t.Error(err)
						another()
					}
				})
			}
			wg.Wait()
		})
	}
}

// TestWhoIsGivenLittleTimeIsNotDown: a registry that others have kept waiting.
func TestWhoIsGivenLittleTimeIsNotDown(t *testing.T) {
	t.Parallel()
	reg := registrytest.New(t)
	held := make(chan struct{})
	defer close(held)
	reg.Hook = func(http.ResponseWriter, *http.Request) bool {
		<-held
		return true
	}
	c, err := New(Options{Listed: []Config{{Name: lab, Endpoints: []Endpoint{endpoint(reg)}, HeadTimeout: time.Second}}, Connect: registrytest.Loopback(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 4 {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, ErrTimeout)
		if _, err := c.Registry(lab).Do(ctx, blobRequest("HEAD", digest.FromString("x"))); !errors.Is(err, ErrTimeout) || errors.Is(err, errOpen) {
			t.Error(err)
		}
		cancel()
	}
	if h := c.Health()[0]; len(h.Down) > 0 {
		t.Errorf("%+v", h.Down)
	}
}

// TestAHangThatIsNotTheFrontsIsProbed: /v2/ answers all the time.
func TestAHangThatIsNotTheFrontsIsProbed(t *testing.T) {
	t.Parallel()
	reg := registrytest.New(t)
	held := make(chan struct{})
	reg.Hook = func(_ http.ResponseWriter, q *http.Request) bool {
		if q.URL.Path != "/v2/" {
			<-held
		}
		return false
	}
	c, err := New(Options{Listed: []Config{{Name: lab, Endpoints: []Endpoint{endpoint(reg)}, HeadTimeout: 200 * time.Millisecond}}, Connect: registrytest.Loopback(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	d := reg.Blob("app", []byte("bytes"))
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for n := range 20 { // more than three probes
		if _, err := c.Registry(lab).Do(t.Context(), blobRequest("HEAD", d)); errors.Is(err, errOpen) != (n >= 2) {
			t.Errorf("request %d: %v", n, err)
		}
		<-tick.C
	}
	close(held)
	for begun := time.Now(); ; <-tick.C {
		resp, err := c.Registry(lab).Do(t.Context(), blobRequest("HEAD", d))
		if err == nil {
			resp.Body.Close()
			return
		}
		if time.Since(begun) > 10*time.Second {
			t.Fatal(err)
		}
	}
}

// TestNamingTokenServicesMakesNoEndlessProbing: each is another one, and none
// can be reached.
func TestNamingTokenServicesMakesNoEndlessProbing(t *testing.T) {
	t.Parallel()
	reg := registrytest.New(t)
	var n atomic.Int64
	reg.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://x%d.example/token"`, n.Add(1)))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	c, err := New(Options{
		Listed: []Config{{Name: lab, Endpoints: []Endpoint{endpoint(reg)}}},
		Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		},
		Connect: registrytest.Loopback(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := c.Registry(lab)
	var all []*breaker
	for i := range 10 * maxBreakers {
		r.Do(t.Context(), blobRequest("HEAD", digest.FromString(fmt.Sprint(i))))
		r.mu.Lock()
		for _, b := range r.breakers {
			all = append(all, b)
		}
		r.mu.Unlock()
	}
	if home := r.breaker(r.endpoints[0].URL); home.dropped {
		t.Error("the registry's own was dropped")
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for begun := time.Now(); ; <-tick.C {
		probing := make(map[*breaker]bool)
		for _, b := range all {
			b.mu.Lock()
			if b.probing {
				probing[b] = true
			}
			b.mu.Unlock()
		}
		if len(probing) <= maxBreakers {
			return
		}
		if time.Since(begun) > 10*time.Second {
			t.Fatalf("%d hosts are being probed", len(probing))
		}
	}
}

// TestOfTwo429sTheLongerHolds, in whatever order they come.
func TestOfTwo429sTheLongerHolds(t *testing.T) {
	t.Parallel()
	reg := registrytest.New(t)
	var n atomic.Int64
	both, one := make(chan struct{}), make(chan struct{})
	reg.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		if n.Add(1) == 1 {
			<-both
			w.Header().Set("Retry-After", "600")
		} else {
			close(both)
			<-one
		}
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
	r := listed(t, endpoint(reg))
	var answered sync.Once
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			_, err := r.Do(t.Context(), blobRequest("HEAD", digest.FromString("x")))
			answered.Do(func() { close(one) })
			var status *StatusError
			if !errors.As(err, &status) || status.RetryAfter != "600" {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
}

// TestATokenServicesLimitHoldsForClientsTokens: those that it was asked for on
// their behalf.
func TestATokenServicesLimitHoldsForClientsTokens(t *testing.T) {
	t.Parallel()
	access := registrytest.NewAccess(t, "Bearer")
	reg := registrytest.New(t)
	reg.Access = access
	var n atomic.Int64
	access.Service.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n.Add(1)
		w.Header().Set("Retry-After", "600")
		w.WriteHeader(http.StatusTooManyRequests)
	})
	r := listed(t, endpoint(reg))
	for _, who := range []string{"Basic eDp5", "Basic eDp5", "Basic eDp6"} {
		var status *StatusError
		if _, err := r.ClientToken(t.Context(), []string{"app"}, who, ""); !errors.As(err, &status) || status.RetryAfter != "600" {
			t.Error(err)
		}
	}
	if n.Load() != 2 {
		t.Errorf("asked %d times for two credentials", n.Load())
	}
}
