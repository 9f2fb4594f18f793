// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tarn/internal/registrytest"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// warnings are a log's lines of that message's beginning.
func warnings(logged *observer.ObservedLogs, message string) (all []map[string]any) {
	for _, e := range logged.All() {
		if e.Level == zapcore.WarnLevel && strings.HasPrefix(e.Message, message) {
			all = append(all, e.ContextMap())
		}
	}
	return all
}

const noAnswer = "pulls of this registry go past tarn"

// TestTroubleIsToldWithItsCauseAndWhatToDo: in the log, in the status and in the
// error, for each mistake of a first day.
func TestTroubleIsToldWithItsCauseAndWhatToDo(t *testing.T) {
	t.Parallel()
	secure, plain := registrytest.NewTLS(t), registrytest.New(t)
	gone := registrytest.New(t)
	gone.Close()
	elsewhere := registrytest.New(t)
	elsewhere.Hook = func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, "http://nowhere.test/x/SIGNED?sig=SIGNED", http.StatusTemporaryRedirect)
		return true
	}
	at := func(scheme string, r *registrytest.Registry) []Endpoint {
		return []Endpoint{{URL: &url.URL{Scheme: scheme, Host: r.Address()}}}
	}
	named := func(host string) []Endpoint { return []Endpoint{{URL: &url.URL{Scheme: "https", Host: host}}} }
	_, port, err := net.SplitHostPort(secure.Address())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		endpoints []Endpoint
		tls       *tls.Config
		unlisted  Name
		sentinel  error
		kind      string
		cause     string // of log and status
		brief     string // of the client
		advice    string
		host      string // "": the endpoint's
	}{
		"an unknown CA": {at("https", secure), nil, "", ErrUnreachable, troubleCertificate, "x509: certificate signed by unknown authority",
			"x509: certificate signed by unknown authority", `upstreams: [{name: "lab.test", ca_file: /path/to/ca.pem}]`, ""},
		"another host's certificate": {named("wrong.test:" + port), &tls.Config{RootCAs: believing(secure.Server)}, "", ErrUnreachable, troubleCertificate, "x509: certificate is valid for",
			"not wrong.test", "other names than wrong.test", "wrong.test:" + port},
		"no TLS": {at("https", plain), nil, "", ErrUnreachable, troubleTLS, "does not look like a TLS handshake", "it speaks no TLS there", `endpoints: ["http://` + plain.Address() + `"]`, ""},
		"not there": {at("http", gone), nil, "", ErrUnreachable, troubleRefused, "dial tcp " + gone.Address() + ": connect: connection refused",
			"connection refused", "check that the registry runs", ""},
		"a name with a typo": {named("typo.test"), nil, "", ErrUnreachable, troubleName, "lookup typo.test on 10.9.9.9:53: no such host", "there is no such host", "correct the name", "typo.test"},
		"no name server":     {named("dark.test"), nil, "", ErrUnreachable, troubleName, "lookup dark.test on 10.9.9.9:53: i/o timeout", "its name cannot be looked up", "/etc/resolv.conf", "dark.test"},
		"private, not listed": {nil, nil, "private.test:5000", ErrGuard, troubleAddress, "private.test is at 10.0.0.7:5000 (private)",
			"this registry's address is not public", `upstreams: [{name: "private.test:5000"}]`, "private.test:5000"},
		"a metadata service": {nil, nil, "169.254.169.254", ErrGuard, troubleAddress, "169.254.169.254 is at 169.254.169.254:443 (never dialled)",
			"never connects to", "never dialled", "169.254.169.254"},
		"a redirect that leads nowhere": {at("http", elsewhere), nil, "", ErrUnreachable, troubleName, "no such host", "there is no such host", "correct the name", "nowhere.test"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			core, logged := observer.New(zapcore.DebugLevel)
			client, err := New(Options{
				Listed: []Config{{Name: lab, Endpoints: c.endpoints, TLS: c.tls}}, Logger: zap.New(core),
				Connect: registrytest.Loopback(t),
				Lookup: func(ctx context.Context, host string) ([]netip.Addr, error) {
					switch host {
					case "wrong.test":
						return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
					case "private.test":
						return []netip.Addr{netip.MustParseAddr("10.0.0.7")}, nil
					case "dark.test":
						return nil, &net.DNSError{Err: "i/o timeout", Name: host, Server: "10.9.9.9:53", IsTimeout: true}
					}
					return nil, &net.DNSError{Err: "no such host", Name: host, Server: "10.9.9.9:53", IsNotFound: true}
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			registry, host := lab, c.host
			if c.unlisted != "" {
				registry = c.unlisted
			} else if host == "" {
				host = c.endpoints[0].URL.Host
			}
			var told *HostError
			for range 3 {
				req := Request{Method: "GET", Repository: "app", Kind: Manifest, Reference: "v1", Query: url.Values{"q": {"SIGNED"}}}
				if _, err := client.Registry(registry).Do(t.Context(), req); !errors.Is(err, c.sentinel) || !errors.As(err, &told) {
					t.Fatalf("%v", err)
				}
			}
			if told.Host != host || !strings.Contains(told.Brief(), c.brief) || strings.Contains(told.Brief(), "10.") {
				t.Errorf("the client hears of %s: %s", told.Host, told.Brief())
			}
			lines := warnings(logged, noAnswer)
			if len(lines) != 1 {
				t.Fatalf("%d warnings for 3 questions: %v", len(lines), lines)
			}
			l := lines[0]
			if l["upstream"] != string(registry) || l["listed"] != (c.unlisted == "") || l["host"] != host || l["kind"] != c.kind ||
				!strings.Contains(fmt.Sprint(l["cause"]), c.cause) || !strings.Contains(fmt.Sprint(l["advice"]), c.advice) || !strings.Contains(fmt.Sprint(l["url"]), host) {
				t.Errorf("the log says %v", l)
			}
			for _, e := range logged.All() {
				if strings.Contains(fmt.Sprint(e.Message, e.ContextMap()), "SIGNED") {
					t.Errorf("the log has what may be signed: %v", e.ContextMap())
				}
			}
			all := client.Health()
			if c.unlisted != "" {
				all = client.Strangers()
			}
			i := slices.IndexFunc(all, func(h Health) bool { return h.Name == registry })
			if i < 0 || len(all[i].Failing) != 1 || all[i].Effect != "pulls of this registry go past tarn" {
				t.Fatalf("the status says %+v", all)
			}
			if f := all[i].Failing[0]; f.Kind != c.kind || !strings.Contains(f.Cause, c.cause) || !strings.Contains(f.Advice, c.advice) || f.Since.IsZero() {
				t.Errorf("the status says %+v", f)
			}
		})
	}
}

// TestACertificateMovesNoCursor: its names are chosen by who answers, and people read them
// on terminals.
func TestACertificateMovesNoCursor(t *testing.T) {
	t.Parallel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"x\x1b[2J\r\nall is well"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(nil)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()
	_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
	client, err := New(Options{Listed: []Config{{Name: lab, Endpoints: []Endpoint{{URL: &url.URL{Scheme: "https", Host: "localhost:" + port}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	_, err = client.Registry(lab).Do(t.Context(), Request{Method: http.MethodGet, Repository: "app", Kind: Manifest, Reference: "1"})
	var e *HostError
	if !errors.As(err, &e) {
		t.Fatal(err)
	}
	for _, said := range []string{e.Brief(), e.Cause, client.Health()[0].Failing[0].Cause} {
		if !strings.Contains(said, "all is well") || strings.ContainsAny(said, "\x1b\r\n") {
			t.Errorf("it says %q", said)
		}
	}
}

// TestTroubleIsToldOnceAMinuteAndSoIsItsEnd.
func TestTroubleIsToldOnceAMinuteAndSoIsItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logged := observer.New(zapcore.WarnLevel)
		var down atomic.Bool
		r, _ := piped(t, func(int, *http.Request) bool { return true })
		open := r.client.guard.connect
		r.client.log = zap.New(core)
		r.client.guard.connect = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if down.Load() {
				return nil, &net.OpError{Op: "dial", Net: network, Err: errors.New("connection refused")}
			}
			return open(ctx, network, addr)
		}
		ask := func() {
			head(t, r, "x")
			r.client.Close() // the next question has a connection of its own
		}
		said := func(downs, backs int) {
			t.Helper()
			if d, b := len(warnings(logged, noAnswer)), len(warnings(logged, "a host of a registry answers again")); d != downs || b != backs {
				t.Errorf("%d warnings that it is down and %d that it is back, want %d and %d", d, b, downs, backs)
			}
		}
		ask()
		said(0, 0)
		for range 5 { // it flaps
			down.Store(true)
			ask()
			ask()
			down.Store(false)
			ask()
		}
		said(1, 1)
		if h := r.health(); len(h.Failing) != 0 || h.Effect != "" {
			t.Errorf("it answers, and the status says %+v", h)
		}
		down.Store(true)
		time.Sleep(warnEvery)
		ask()
		said(2, 1)
		since := r.health().Failing[0].Since
		time.Sleep(warnEvery)
		ask()
		said(3, 1)
		if f := r.health().Failing[0]; !f.Since.Equal(since) || f.Last.Sub(since) != warnEvery {
			t.Errorf("since %v, asked last %v", f.Since, f.Last)
		}
		down.Store(false)
		ask()
		said(3, 2)
	})
}

// TestTroubleWithStrangersHasABound: whatever hosts they name.
func TestTroubleWithStrangersHasABound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logged := observer.New(zapcore.WarnLevel)
		c, err := New(Options{Logger: zap.New(core), Listed: []Config{{Name: lab}}, Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		}})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ask := func(name Name) {
			c.Registry(name).Do(t.Context(), Request{Method: "HEAD", Repository: "app", Kind: Manifest, Reference: "v1"})
		}
		for minute := range 3 {
			for i := range 1000 {
				ask(Name(fmt.Sprintf("host-%d.test", i)))
			}
			if n := len(warnings(logged, noAnswer)); n != maxWarnings*(minute+1) {
				t.Errorf("%d warnings after %d minutes", n, minute+1)
			}
			time.Sleep(warnEvery + time.Second)
		}
		if n := len(warnings(logged, "there is more trouble")); n != 3 {
			t.Errorf("that there is more is said %d times", n)
		}
		all := c.Strangers()
		if len(all) != maxStrangers || all[maxStrangers-1].Name != "host-999.test" || all[0].Name != "host-984.test" {
			t.Errorf("%d in the status, %+v", len(all), all)
		}
		// They take nothing from the listed ones.
		for range maxWarnings + 1 {
			ask("host-1.test")
		}
		ask(lab)
		if lines := warnings(logged, noAnswer); lines[len(lines)-1]["upstream"] != string(lab) {
			t.Errorf("the last warning is %v", lines[len(lines)-1])
		}
	})
}

// TestAStrangerThatAnswersAgainIsShownNoMore.
func TestAStrangerThatAnswersAgainIsShownNoMore(t *testing.T) {
	t.Parallel()
	var known atomic.Bool
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		tls.Server(far, &tls.Config{}).Handshake()
	}()
	c, err := New(Options{
		Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			if known.Load() {
				return []netip.Addr{netip.MustParseAddr("93.184.215.14")}, nil
			}
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		},
		Connect: func(context.Context, string, string) (net.Conn, error) { return near, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ask := func() {
		c.Registry("lab.test").Do(t.Context(), Request{Method: "HEAD", Repository: "app", Kind: Manifest, Reference: "v1"})
	}
	ask()
	if all := c.Strangers(); len(all) != 1 || all[0].Failing[0].Kind != troubleName {
		t.Errorf("%+v", all)
	}
	known.Store(true)
	ask()
	if all := c.Strangers(); len(all) != 1 || all[0].Failing[0].Kind == troubleName {
		t.Errorf("%+v", all)
	}
	c.Registry("lab.test").heardAnswer(&url.URL{Scheme: "https", Host: "lab.test"}, time.Now())
	if all := c.Strangers(); len(all) != 0 {
		t.Errorf("%+v", all)
	}
}

// TestEachStepThatIsWaitedForHasItsWords.
func TestEachStepThatIsWaitedForHasItsWords(t *testing.T) {
	for step, want := range map[string]string{"connect": "did not take a connection", "tls": "TLS handshake", "answer": "it sent no answer", "name": "no name server"} {
		synctest.Test(t, func(t *testing.T) {
			scheme := map[bool]string{true: "https", false: "http"}[step == "tls"]
			c, err := New(Options{
				Listed: []Config{{Name: lab, HeadTimeout: 4 * time.Second, Endpoints: []Endpoint{{URL: &url.URL{Scheme: scheme, Host: "lab.test"}}}}},
				Lookup: func(ctx context.Context, _ string) ([]netip.Addr, error) {
					httptrace.ContextClientTrace(ctx).DNSStart(httptrace.DNSStartInfo{}) // as the system's resolver does
					if step == "name" {
						<-ctx.Done()
						return nil, ctx.Err()
					}
					return []netip.Addr{netip.MustParseAddr("10.0.0.1")}, nil
				},
				Connect: func(ctx context.Context, _, _ string) (net.Conn, error) {
					httptrace.ContextClientTrace(ctx).ConnectStart("tcp", "10.0.0.1:443") // as net.Dialer does
					if step == "connect" {
						<-ctx.Done()
						return nil, ctx.Err()
					}
					near, far := net.Pipe()
					go func() {
						defer far.Close()
						for buf := make([]byte, 4096); ; {
							if _, err := far.Read(buf); err != nil {
								return
							}
						}
					}()
					return near, nil
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, err = head(t, c.Registry(lab), "x")
			var e *HostError
			if !errors.Is(err, ErrTimeout) || errors.Is(err, ErrUnreachable) || !errors.As(err, &e) || !strings.Contains(e.Brief(), want) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", step, err)
			}
			time.Sleep(time.Minute) // a synctest clock: until the dial is given up
		})
	}
}

// TestACertificateThatIsNotValidYetNamesTheClock, and so does one that ended long ago.
func TestACertificateThatIsNotValidYetNamesTheClock(t *testing.T) {
	t.Parallel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const day = 24 * time.Hour
	now := time.Now()
	for name, c := range map[string]struct {
		from, to time.Duration
		want     string
	}{
		"not valid yet":  {day, 2 * day, "this node's clock says " + now.UTC().Format("2006-01-02 15:04 MST") + ", and the certificate begins at " + now.Add(day).UTC().Format("2006-01-02 15:04 MST") + ": set this node's clock"},
		"ended long ago": {-90 * day, -60 * day, "and the certificate ended at " + now.Add(-60*day).UTC().Format("2006-01-02 15:04 MST") + ": set this node's clock where it is wrong, else renew"},
		"just ended":     {-90 * day, -day, "renew the certificate, which ended at " + now.Add(-day).UTC().Format("2006-01-02 15:04 MST") + "; this node's clock says"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(c.from), NotAfter: now.Add(c.to), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
			der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
			if err != nil {
				t.Fatal(err)
			}
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			s := httptest.NewUnstartedServer(http.NotFoundHandler())
			s.Config.ErrorLog = log.New(io.Discard, "", 0)
			s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
			s.StartTLS()
			defer s.Close()
			u, err := url.Parse(s.URL)
			if err != nil {
				t.Fatal(err)
			}
			roots := x509.NewCertPool()
			roots.AddCert(cert)
			client, err := New(Options{Listed: []Config{{Name: lab, Endpoints: []Endpoint{{URL: u}}, TLS: &tls.Config{RootCAs: roots}}}, Connect: registrytest.Loopback(t)})
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			var told *HostError
			if _, err := client.Registry(lab).Do(t.Context(), Request{Method: "GET", Repository: "app", Kind: Manifest, Reference: "v1"}); !errors.As(err, &told) {
				t.Fatal(err)
			}
			// A minute may have passed between the two looks at the clock.
			later := strings.ReplaceAll(c.want, now.UTC().Format("15:04 MST")+", and", now.Add(time.Minute).UTC().Format("15:04 MST")+", and")
			if told.Kind != troubleCertificate || !strings.Contains(told.Advice, c.want) && !strings.Contains(told.Advice, later) {
				t.Errorf("%s: %q\nlacks %q", told.Kind, told.Advice, c.want)
			}
		})
	}
}
