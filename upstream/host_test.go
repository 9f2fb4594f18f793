// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

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
		if _, err := c.Registry(lab).Do(ctx, blobRequest("HEAD", digest.FromString("x"))); !errors.Is(err, ErrTimeout) {
			t.Error(err)
		}
		cancel()
	}
	if h := c.Health()[0]; len(h.Failing) > 0 {
		t.Errorf("%+v", h.Failing)
	}
}

// piped is a registry whose connections are pipes: answer is asked with the
// number of the connection, from 1 on, and says nothing when it returns false.
func piped(t *testing.T, answer func(conn int, r *http.Request) bool) (*Registry, *atomic.Int64) {
	t.Helper()
	var conns atomic.Int64
	c, err := New(Options{
		Listed: []Config{{Name: lab, Endpoints: []Endpoint{{URL: &url.URL{Scheme: "http", Host: "lab.test"}}}}},
		Lookup: func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
		},
		Connect: func(context.Context, string, string) (net.Conn, error) {
			n := int(conns.Add(1))
			client, server := net.Pipe()
			go func() {
				defer server.Close()
				in := bufio.NewReader(server)
				for {
					r, err := http.ReadRequest(in)
					if err != nil {
						return
					}
					if answer(n, r) {
						io.WriteString(server, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
						if r.Method != http.MethodHead {
							io.WriteString(server, "bytes")
						}
					}
				}
			}()
			return client, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c.Registry(lab), &conns
}

// head asks for a blob, and tells how long that took.
func head(t *testing.T, r *Registry, what string) (took time.Duration, err error) {
	t.Helper()
	begun := time.Now()
	resp, err := r.Do(t.Context(), blobRequest("HEAD", digest.FromString(what)))
	if err == nil {
		resp.Body.Close()
	}
	return time.Since(begun), err
}

// TestASilentHostHasASecondUntilItAnswers: and nothing is refused unasked.
func TestASilentHostHasASecondUntilItAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dumb atomic.Bool
		var asked atomic.Int64
		r, _ := piped(t, func(int, *http.Request) bool { asked.Add(1); return !dumb.Load() })
		dumb.Store(true)
		if took, err := head(t, r, "a"); !errors.Is(err, ErrTimeout) || took != DefaultHeadTimeout {
			t.Errorf("the first: %v after %v", err, took)
		}
		for range 3 {
			if took, err := head(t, r, "b"); !errors.Is(err, ErrTimeout) || took != silentPatience {
				t.Errorf("a further one: %v after %v", err, took)
			}
		}
		if n := asked.Load(); n != 4 {
			t.Errorf("%d questions for 4", n)
		}
		if h := r.health(); len(h.Failing) != 1 || h.Failing[0].Origin != "http://lab.test" {
			t.Errorf("%+v", h)
		}
		dumb.Store(false)
		if _, err := head(t, r, "c"); err != nil {
			t.Error(err)
		}
		if h := r.health(); len(h.Failing) != 0 {
			t.Errorf("%+v", h)
		}
		dumb.Store(true)
		if took, _ := head(t, r, "d"); took != DefaultHeadTimeout {
			t.Errorf("after an answer: %v", took)
		}
	})
}

// TestOneSilentQuestionIsNotASilentHost: the host answers others meanwhile.
func TestOneSilentQuestionIsNotASilentHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		silent := digest.FromString("silent").String()
		r, _ := piped(t, func(_ int, r *http.Request) bool { return !strings.HasSuffix(r.URL.Path, silent) })
		var wg sync.WaitGroup
		for range 2 * maxPlaceQuestions {
			wg.Go(func() { head(t, r, "silent") })
		}
		time.Sleep(time.Second) // of the bubble's clock
		other := Request{Method: "HEAD", Repository: "other", Kind: Blob, Reference: digest.FromString("x").String()}
		resp, err := r.Do(t.Context(), other)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		wg.Wait()
		if took, _ := head(t, r, "silent"); took != DefaultHeadTimeout {
			t.Errorf("it has %v after others were answered", took)
		}
	})
}

// TestAConnectionThatDiedIdleIsAskedOnANewOne, and only one of those that lay
// idle costs time.
func TestAConnectionThatDiedIdleIsAskedOnANewOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dead atomic.Int64 // connections up to this one say nothing any more
		r, conns := piped(t, func(conn int, _ *http.Request) bool { return int64(conn) > dead.Load() })
		if _, err := head(t, r, "a"); err != nil {
			t.Fatal(err)
		}
		dead.Store(conns.Load())
		time.Sleep(time.Minute) // of the bubble's clock
		if took, err := head(t, r, "a"); err != nil || took != idlePatience {
			t.Errorf("%v after %v", err, took)
		}
		if took, err := head(t, r, "a"); err != nil || took != 0 {
			t.Errorf("the next: %v after %v", err, took)
		}
	})
}

// TestASlowHostIsNotAskedTwiceForLong: the first question was answered after all.
func TestASlowHostIsNotAskedTwiceForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		r, _ := piped(t, func(int, *http.Request) bool {
			asked.Add(1)
			time.Sleep(idlePatience + time.Second) // of the bubble's clock
			return true
		})
		for n, want := range []int64{1, 3, 4, 5} {
			if took, err := head(t, r, "a"); err != nil || took != idlePatience+time.Second {
				t.Errorf("%v after %v", err, took)
			}
			if got := asked.Load(); got != want {
				t.Errorf("question %d was put %d times in all, not %d", n, got, want)
			}
			time.Sleep(10 * time.Second) // of the bubble's clock
		}
	})
}

// TestAHostThatCannotBeReachedSaysSoEachTime, and once it is back nobody waits.
func TestAHostThatCannotBeReachedSaysSoEachTime(t *testing.T) {
	t.Parallel()
	reg := registrytest.New(t)
	d := reg.Blob("app", []byte("bytes"))
	var down atomic.Bool
	var dialled atomic.Int64
	c, err := New(Options{
		Listed: []Config{{Name: lab, Endpoints: []Endpoint{endpoint(reg)}}},
		Connect: func(ctx context.Context, network, addr string) (net.Conn, error) {
			dialled.Add(1)
			if down.Load() {
				return nil, &net.OpError{Op: "dial", Err: errors.New("connection refused")}
			}
			return (&net.Dialer{}).DialContext(ctx, network, addr)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := c.Registry(lab)
	down.Store(true)
	for range 3 {
		if _, err := r.Do(t.Context(), blobRequest("HEAD", d)); !errors.Is(err, ErrUnreachable) || errors.Is(err, ErrTimeout) {
			t.Error(err)
		}
	}
	if n := dialled.Load(); n != 3 {
		t.Errorf("dialled %d times for 3 questions", n)
	}
	if h := c.Health()[0]; len(h.Failing) != 1 {
		t.Errorf("%+v", h)
	}
	down.Store(false)
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			resp, err := r.Do(t.Context(), blobRequest("HEAD", d))
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
		})
	}
	wg.Wait()
	if h := c.Health()[0]; len(h.Failing) != 0 {
		t.Errorf("%+v", h)
	}
}

// TestNamingTokenServicesIsBounded: each is another one, and none can be
// reached.
func TestNamingTokenServicesIsBounded(t *testing.T) {
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
	for i := range 10 * maxHosts {
		r.Do(t.Context(), blobRequest("HEAD", digest.FromString(fmt.Sprint(i))))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.hosts) > maxHosts || r.hosts["http://"+reg.Address()] == nil {
		t.Errorf("%d hosts", len(r.hosts))
	}
}

// TestA429IsTheAnswerToOneQuestion: of that credential, about that object.
func TestA429IsTheAnswerToOneQuestion(t *testing.T) {
	t.Parallel()
	reg := registrytest.New(t)
	limited, free := digest.FromString("limited"), reg.Blob("app", []byte("free"))
	reg.Hook = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, limited.String()) {
			return false
		}
		w.Header().Set("Retry-After", "30")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
	r := listed(t, endpoint(reg))
	ask := func(method string, d digest.Digest, authorization string) error {
		req := blobRequest(method, d)
		req.Authorization = authorization
		resp, err := r.Do(t.Context(), req)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	for _, one := range []struct {
		method, authorization string
		digest                digest.Digest
		limited               bool
		asked                 int
	}{
		{"HEAD", "", limited, true, 1},
		{"HEAD", "", limited, true, 1},
		{"GET", "", limited, true, 2},
		{"HEAD", "Basic eDp5", limited, true, 3},
		{"HEAD", "", free, false, 4},
		{"GET", "Basic eDp5", free, false, 5},
	} {
		var status *StatusError
		err := ask(one.method, one.digest, one.authorization)
		if got := errors.As(err, &status) && status.Status == 429; got != one.limited {
			t.Errorf("%+v: %v", one, err)
		}
		if n := len(reg.Exchanges()); n != one.asked {
			t.Errorf("%+v: %d exchanges", one, n)
		}
	}
}

func TestRetryAfterIsADelayOrAMoment(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_800_000_000, 0)
	date := func(d time.Duration) string { return now.Add(d).UTC().Format(http.TimeFormat) }
	for _, one := range []struct {
		header, date string
		want         time.Duration
	}{
		{"", "", 0},
		{"7", "", 7 * time.Second},
		{" 7 ", "", 7 * time.Second},
		{"0", "", time.Second},
		{"-3", "", time.Second},
		{"3600", "", time.Minute},
		{"99999999999999999999", "", time.Minute},
		{"soon", "", time.Second},
		{date(9 * time.Second), "", 9 * time.Second},
		{date(-9 * time.Second), "", time.Second},
		{"1800000003", "", 3 * time.Second},
		{"1800000000", "", time.Second},
		// A server whose clock is an hour ahead.
		{date(time.Hour + 9*time.Second), date(time.Hour), 9 * time.Second},
		{"1800003605", date(time.Hour), 5 * time.Second},
	} {
		h := http.Header{}
		h.Set("Retry-After", one.header)
		if one.date != "" {
			h.Set("Date", one.date)
		}
		if got := retryAfter(h, now); got != one.want {
			t.Errorf("%+v: %v", one, got)
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
			w.Header().Set("Retry-After", "50")
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
			if !errors.As(err, &status) || status.RetryAfter <= 45*time.Second {
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
		w.Header().Set("Retry-After", "50")
		w.WriteHeader(http.StatusTooManyRequests)
	})
	r := listed(t, endpoint(reg))
	for _, who := range []string{"Basic eDp5", "Basic eDp5", "Basic eDp6"} {
		var status *StatusError
		if _, err := r.ClientToken(t.Context(), []string{"app"}, who, ""); !errors.As(err, &status) || status.RetryAfter <= 45*time.Second {
			t.Error(err)
		}
	}
	if n.Load() != 2 {
		t.Errorf("asked %d times for two credentials", n.Load())
	}
}

// TestASlowHostIsFoundOutToBeOne: it takes longer than one that was silent is
// given, and whoever asked hears nothing; but it has answered.
func TestASlowHostIsFoundOutToBeOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dumb atomic.Bool
		r, _ := piped(t, func(int, *http.Request) bool {
			if dumb.Load() {
				return false
			}
			time.Sleep(silentPatience + 200*time.Millisecond) // of the bubble's clock
			return true
		})
		dumb.Store(true)
		head(t, r, "a")
		dumb.Store(false)
		if took, err := head(t, r, "b"); !errors.Is(err, ErrTimeout) || took != silentPatience {
			t.Errorf("%v after %v", err, took)
		}
		time.Sleep(time.Second) // of the bubble's clock
		if took, err := head(t, r, "c"); err != nil || took != silentPatience+200*time.Millisecond {
			t.Errorf("the next: %v after %v", err, took)
		}
		// Another repository has its time, whatever this one is silent about.
		dumb.Store(true)
		head(t, r, "d")
		begun := time.Now()
		r.Do(t.Context(), Request{Method: "HEAD", Repository: "other", Kind: Blob, Reference: digest.FromString("x").String()})
		if took := time.Since(begun); took != DefaultHeadTimeout {
			t.Errorf("another repository had %v", took)
		}
	})
}
