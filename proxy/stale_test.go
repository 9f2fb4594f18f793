// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"
)

// link stands before a registry, and can be taken away.
type link struct {
	t    *testing.T
	to   string
	addr string

	mu    sync.Mutex
	l     net.Listener // nil: connections are refused
	mode  string       // "", "hang" or "reset"
	conns map[net.Conn]bool
}

func newLink(t *testing.T, to string) *link {
	l := &link{t: t, to: to, conns: make(map[net.Conn]bool)}
	l.set("")
	t.Cleanup(func() { l.set("refuse") })
	return l
}

// set changes what becomes of connections, and breaks those that there are.
func (l *link) set(mode string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mode = mode
	for c := range l.conns {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	clear(l.conns)
	switch {
	case mode == "refuse" && l.l != nil:
		l.l.Close()
		l.l = nil
	case mode != "refuse" && l.l == nil:
		addr := "127.0.0.1:0"
		if l.addr != "" {
			addr = l.addr
		}
		listener, err := net.Listen("tcp", addr)
		if err != nil {
			l.t.Fatal(err)
		}
		l.l, l.addr = listener, listener.Addr().String()
		go l.serve(listener)
	}
}

func (l *link) serve(listener net.Listener) {
	for {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		l.mu.Lock()
		mode := l.mode
		l.conns[c] = true
		l.mu.Unlock()
		go func() {
			defer func() {
				l.mu.Lock()
				defer l.mu.Unlock()
				delete(l.conns, c)
				c.Close()
			}()
			switch mode {
			case "hang":
				io.Copy(io.Discard, c)
			case "reset":
				c.Read(make([]byte, 1))
				c.(*net.TCPConn).SetLinger(0)
			default:
				up, err := net.Dial("tcp", l.to)
				if err != nil {
					return
				}
				defer up.Close()
				go func() { io.Copy(up, c); up.(*net.TCPConn).CloseWrite() }()
				io.Copy(c, up)
			}
		}()
	}
}

// An outage is a way not to be able to ask a registry.
type outage struct {
	name  string
	cause string // as Cache-Status has it
	begin func(*link, *registrytest.Registry)
}

func status(code int) func(*link, *registrytest.Registry) {
	return func(_ *link, r *registrytest.Registry) {
		r.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(code)
			return true
		}
	}
}

func mode(m string) func(*link, *registrytest.Registry) {
	return func(l *link, _ *registrytest.Registry) { l.set(m) }
}

var outages = []outage{
	{"refuses", "unreachable", mode("refuse")},
	{"hangs", "timeout", mode("hang")},
	{"resets", "unreachable", mode("reset")},
	{"500", "status-500", status(500)},
	{"502", "status-502", status(502)},
	{"429", "rate-limited", status(429)},
}

const staleHead = 300 * time.Millisecond

// away is a registry that can be taken away, with one image, pulled as user
// ("" for anonymous) through a tarn that may answer stale.
func away(t *testing.T, access *registrytest.Access, limit time.Duration) (r *registrytest.Registry, l *link, d *tarnd, img registrytest.Image, layer []byte) {
	return awayWith(t, access, &Rules{GrantTTL: time.Minute, MembershipTTL: 24 * time.Hour, StaleIfError: limit, Parallel: 4})
}

func awayWith(t *testing.T, access *registrytest.Access, rules *Rules) (r *registrytest.Registry, l *link, d *tarnd, img registrytest.Image, layer []byte) {
	r = registrytest.New(t)
	r.Access = access
	l = newLink(t, r.Address())
	layer = random(1, 300_000)
	img = r.Image("app", "v1", layer)
	d = start(t, setup{urls: map[string]string{lab: "http://" + l.addr}, headTimeout: staleHead, rules: rules})
	return r, l, d, img, layer
}

// pull is what a client asks; what is here afterwards is on the disk.
func pull(t *testing.T, d *tarnd, img registrytest.Image, layer []byte, auth ...string) (said []string) {
	t.Helper()
	for _, a := range []answer{
		d.head(manifestPath("app", "v1"), auth...).must(t, 200),
		d.get(manifestPath("app", "v1"), auth...).mustBe(t, img.Body),
		d.get(manifestPath("app", img.Manifest.String()), auth...).mustBe(t, img.Body),
		d.head(blobPath("app", img.Config), auth...).must(t, 200),
		d.get(blobPath("app", img.Config), auth...).must(t, 200),
		d.get(blobPath("app", img.Layers[0]), auth...).mustBe(t, layer),
	} {
		said = append(said, a.header.Get("Cache-Status")+" "+a.header.Get("Age"))
	}
	return said
}

func TestStaleAWholePullWorksWhileTheRegistryIsAway(t *testing.T) {
	t.Parallel()
	for _, f := range outages {
		for _, user := range []string{"", "a"} {
			name := f.name + ", public"
			if user != "" {
				name = f.name + ", Basic"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				var access *registrytest.Access
				var auth []string
				if user != "" {
					access = registrytest.NewAccess(t, "Basic")
					access.Allow("app", user)
					auth = access.Login("app", user)
				}
				r, l, d, img, layer := away(t, access, time.Hour)
				if user != "" {
					d.get(manifestPath("app", "v1")).must(t, 401) // as containerd begins
				}
				pull(t, d, img, layer, auth...)
				d.stored(cache.ListedDomain, img.Layers[0])
				d.stored(cache.ListedDomain, img.Config)
				d.advance(5 * time.Minute) // grants have ended
				f.begin(l, r)
				marked := regexp.MustCompile(`^tarn; hit; ttl=-30[0-9]; detail=` + f.cause + ` 30[0-9]$`)
				for n := range 2 {
					for _, said := range pull(t, d, img, layer, auth...) {
						if !marked.MatchString(said) {
							t.Errorf("round %d: %s", n, said)
						}
					}
				}
				if user != "" {
					a := d.get(manifestPath("app", "v1")).must(t, 401)
					if !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Basic ") {
						t.Errorf("%v", a.header)
					}
					// Never to who had no right.
					for _, other := range [][]string{access.Login("app", "b"), {"Authorization", registrytest.Basic("a", "wrong")}} {
						for _, path := range []string{manifestPath("app", "v1"), manifestPath("app", img.Manifest.String()), blobPath("app", img.Layers[0])} {
							if a := d.get(path, other...); a.status < 400 || bytes.Contains(a.body, layer[:100]) {
								t.Errorf("%s: %d", path, a.status)
							}
						}
					}
				}
				eventually(t, "they are counted", func() bool { return d.outcomes("stale") >= 12 })
			})
		}
	}
}

// outcomes is how many requests the metrics count with that outcome.
func (d *tarnd) outcomes(outcome string) (n int) {
	families, err := d.metrics.Gather()
	if err != nil {
		d.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if f.GetName() == "tarn_requests_total" && l.GetName() == "outcome" && l.GetValue() == outcome {
					n += int(m.Counter.GetValue())
				}
			}
		}
	}
	return n
}

func TestStaleIsOffByDefault(t *testing.T) {
	t.Parallel()
	for _, f := range outages {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			r, l, d, img, layer := away(t, nil, 0)
			pull(t, d, img, layer)
			d.advance(5 * time.Minute)
			f.begin(l, r)
			for range 2 {
				for _, path := range []string{manifestPath("app", "v1"), manifestPath("app", img.Manifest.String()), blobPath("app", img.Layers[0])} {
					if a := d.get(path); a.status < 500 {
						t.Errorf("%s: %d %s", path, a.status, a.header.Get("Cache-Status"))
					}
				}
			}
		})
	}
}

func TestStaleNeverAgainstTheRegistrysWord(t *testing.T) {
	t.Parallel()
	for _, code := range []int{401, 403, 404} {
		r, l, d, img, layer := away(t, nil, time.Hour)
		pull(t, d, img, layer)
		d.stored(cache.ListedDomain, img.Layers[0])
		d.advance(5 * time.Minute)
		status(code)(l, r)
		for _, path := range []string{manifestPath("app", "v1"), manifestPath("app", img.Manifest.String()), blobPath("app", img.Layers[0])} {
			d.get(path).must(t, code)
		}
		// And what it took back does not come back when it is away.
		d.advance(refusedFor)
		l.set("refuse")
		for _, path := range []string{manifestPath("app", "v1"), manifestPath("app", img.Manifest.String()), blobPath("app", img.Layers[0])} {
			if a := d.get(path); a.status < 500 {
				t.Errorf("after %d: %s: %d", code, path, a.status)
			}
		}
	}
}

func TestStaleEnds(t *testing.T) {
	t.Parallel()
	_, l, d, img, layer := away(t, nil, time.Hour)
	pull(t, d, img, layer)
	d.stored(cache.ListedDomain, img.Layers[0])
	l.set("refuse")
	d.advance(59 * time.Minute)
	pull(t, d, img, layer)
	d.advance(time.Minute)
	for _, path := range []string{manifestPath("app", "v1"), manifestPath("app", img.Manifest.String()), blobPath("app", img.Layers[0])} {
		d.get(path).must(t, 502)
	}
}

func TestStaleNeverForATokensOwner(t *testing.T) {
	t.Parallel()
	access := registrytest.NewAccess(t, "Bearer")
	access.Allow("app", "a")
	_, l, d, img, layer := away(t, access, time.Hour)
	auth := access.Login("app", "a")
	pull(t, d, img, layer, auth...)
	d.stored(cache.ListedDomain, img.Layers[0])
	d.advance(5 * time.Minute)
	l.set("refuse")
	for _, path := range []string{manifestPath("app", "v1"), manifestPath("app", img.Manifest.String()), blobPath("app", img.Layers[0])} {
		d.get(path, auth...).must(t, 502)
		d.get(path).must(t, 502)
	}
}

// TestStaleForAnonymousOutlivesARestart: what anonymous was served is in the
// index. Passwords are remembered by this process only.
func TestStaleForAnonymousOutlivesARestart(t *testing.T) {
	t.Parallel()
	for _, user := range []string{"", "a"} {
		access := registrytest.NewAccess(t, "Basic")
		access.Allow("app", user)
		_, l, d, img, layer := away(t, access, time.Hour)
		auth := access.Login("app", user)
		pull(t, d, img, layer, auth...)
		allStored(t, d, img)
		l.set("refuse")
		pull(t, d, img, layer, auth...)
		s := d.options
		d.stop()
		again := start(t, s)
		if user == "" {
			pull(t, again, img, layer)
		} else {
			none(t, again, img, auth...)
		}
	}
}

// TestStaleForTheNode: whoever asks, and has shown nothing or something new, as
// long as nobody hears anything of the registry.
func TestStaleForTheNode(t *testing.T) {
	t.Parallel()
	for _, m := range []string{"refuse", "hang", "500", "429", "a silent object"} {
		t.Run(m, func(t *testing.T) {
			t.Parallel()
			access := registrytest.NewAccess(t, "Bearer")
			access.Allow("app", "a")
			rules := DefaultRules()
			rules.StaleIfError, rules.StaleForNode = time.Hour, true
			r, l, d, img, layer := awayWith(t, access, &rules)
			pull(t, d, img, layer, access.Login("app", "a")...)
			allStored(t, d, img)
			d.advance(5 * time.Minute)
			access.Allow("other", "a")
			others := [][]string{nil, access.Login("app", "a"), {"Authorization", "Bearer another"}}
			switch m {
			case "refuse", "hang":
				l.set(m)
				for range 2 { // a restart forgets no membership
					for _, auth := range others {
						pull(t, d, img, layer, auth...)
					}
					s := d.options
					d.stop()
					d = start(t, s)
				}
				return
			case "500", "429":
				status(map[string]int{"500": 500, "429": 429}[m])(l, r)
			default:
				// One pod asks for what the registry is silent about; it answers
				// all others.
				r.Hook = func(_ http.ResponseWriter, q *http.Request) bool {
					silent := strings.HasPrefix(q.URL.Path, "/v2/app/")
					if silent {
						<-q.Context().Done()
					}
					return silent
				}
				ticks := time.NewTicker(staleHead / 10)
				defer ticks.Stop()
				other := access.Login("other", "a")
				ended := make(chan struct{})
				defer func() { <-ended }()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go func() {
					defer close(ended)
					for ctx.Err() == nil {
						if a := d.get(manifestPath("other", "v1"), other...); a.status != 404 {
							t.Errorf("another repository: %d", a.status)
						}
						<-ticks.C
					}
				}()
			}
			none(t, d, img, others[1]...)
		})
	}
}

// TestStaleIsQuickAndEndsWithTheOutage: whoever asks a registry that hangs waits
// for it a second at most once it was silent, and the first question that it
// answers ends that.
func TestStaleIsQuickAndEndsWithTheOutage(t *testing.T) {
	t.Parallel()
	for _, m := range []string{"refuse", "hang"} {
		_, l, d, img, layer := away(t, nil, time.Hour)
		pull(t, d, img, layer)
		d.stored(cache.ListedDomain, img.Manifest)
		l.set(m)
		for range 4 {
			begun := time.Now()
			a := d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
			if took := time.Since(begun); m == "refuse" && took >= staleHead || took > 2*time.Second {
				t.Errorf("%s: it waited for %v", m, took)
			}
			if !strings.HasPrefix(a.header.Get("Cache-Status"), "tarn; hit; ttl=-") {
				t.Fatalf("%s: %v", m, a.header)
			}
		}
		l.set("")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		back := time.Now()
		for ctx.Err() == nil {
			if a := d.get(manifestPath("app", "v1")).mustBe(t, img.Body); strings.Contains(a.header.Get("Cache-Status"), "confirmed") {
				break
			}
		}
		t.Logf("%s: confirmed again %v after the registry's return", m, time.Since(back))
		if ctx.Err() != nil {
			t.Errorf("%s: still stale", m)
		}
	}
}

func TestA429IsObeyed(t *testing.T) {
	t.Parallel()
	access := registrytest.NewAccess(t, "Basic")
	access.Allow("app", "a")
	access.Allow("app", "b")
	r, _, d, img, _ := away(t, access, 0)
	limited := access.Login("app", "a")
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Header.Get("Authorization") != limited[1] {
			return false
		}
		w.Header().Set("Retry-After", "7")
		w.Header().Set("RateLimit-Limit", "100;w=21600")
		w.Header().Set("RateLimit-Remaining", "0;w=21600")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
	d.get(manifestPath("app", "v1"), limited...).must(t, 503).mustSay(t, "Retry-After", "7")
	r.Reset()
	for range 5 {
		a := d.get(manifestPath("app", "v1"), limited...).must(t, 503)
		if after := a.header.Get("Retry-After"); after != "7" && after != "6" {
			t.Errorf("Retry-After: %q", after)
		}
	}
	if n := len(r.Exchanges()); n != 0 {
		t.Errorf("%d requests after a 429", n)
	}
	d.get(manifestPath("app", "v1"), access.Login("app", "b")...).mustBe(t, img.Body)
	h := d.proxy.upstreams.Health()
	if len(h) != 1 || h[0].LimitedUntil == nil || h[0].RateLimit == nil || h[0].RateLimit.Limit != 100 || h[0].RateLimit.Remaining != 0 {
		t.Errorf("%+v", h)
	}
}
