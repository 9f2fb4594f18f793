// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tarn/cache"
	"tarn/history"
	"tarn/internal/registrytest"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// DefaultRules are those of the configuration's defaults.
func DefaultRules() Rules {
	return Rules{GrantTTL: time.Minute, MembershipTTL: 24 * time.Hour, Parallel: 4}
}

func TestMain(m *testing.M) {
	// What the distribution registry in process starts and never ends.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/docker/go-events.(*Broadcaster).run"))
}

// tarnd is a proxy over real files, with its registries, on loopback.
type tarnd struct {
	*httptest.Server
	t       testing.TB
	cache   *cache.Cache
	proxy   *Proxy
	options setup
	ahead   atomic.Int64 // of the rights' clock
	log     logBuffer
	metrics *prometheus.Registry

	mu       sync.Mutex
	secrets  map[string]bool
	refusals [][]byte
}

// setup is what a test may choose; the zero value lists nothing.
type setup struct {
	dir     string
	maxSize int64
	listed  map[string]*registrytest.Registry
	urls    map[string]string // listed too
	// hosts are what names resolve to; every other name fails.
	hosts map[string]string
	// routes are where connections to public addresses really go.
	routes map[string]string
	roots  *x509.CertPool
	// headTimeout of all upstreams; 0 is the default.
	headTimeout  time.Duration
	writeTimeout time.Duration
	listedOnly   bool
	names        []string
	prefetch     Prefetch
	// rules are each listed upstream's; nil means the defaults.
	rules *Rules
	// without are listed upstreams that follow the defaults all the same.
	without []string
	// configure may change how an upstream is listed.
	configure func(*upstream.Config)
}

// start runs tarn, and again over the same directory after stop.
func start(t testing.TB, s setup) *tarnd {
	t.Helper()
	if s.dir == "" {
		s.dir = t.TempDir()
	}
	if s.maxSize == 0 {
		s.maxSize = 1 << 30
	}
	d := &tarnd{t: t, options: s, metrics: prometheus.NewRegistry()}
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.AddSync(&d.log), zap.DebugLevel))
	c, err := cache.New(cache.Options{Dir: s.dir, MaxSize: s.maxSize, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	var listed []upstream.Config
	add := func(name, raw string) {
		u, err := url.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		n, err := upstream.ParseName(name)
		if err != nil {
			t.Fatal(err)
		}
		c := upstream.Config{Name: n, Endpoints: []upstream.Endpoint{{URL: u}}, HeadTimeout: s.headTimeout}
		if s.configure != nil {
			s.configure(&c)
		}
		listed = append(listed, c)
	}
	for name, r := range s.listed {
		add(name, r.URL)
	}
	for name, raw := range s.urls {
		add(name, raw)
	}
	loopback, metrics := registrytest.Loopback(t), NewMetrics(d.metrics)
	u, err := upstream.New(upstream.Options{
		Listed: listed,
		Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			if a, ok := s.hosts[host]; ok {
				return []netip.Addr{netip.MustParseAddr(a)}, nil
			}
			return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
		},
		Connect: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if to, ok := s.routes[addr]; ok {
				addr = to
			}
			return loopback(ctx, network, addr)
		},
		RootCAs: s.roots,
		Observe: metrics.Upstream,
	})
	if err != nil {
		t.Fatal(err)
	}
	rules := DefaultRules()
	if s.rules != nil {
		rules = *s.rules
	}
	ruleOf := make(map[upstream.Name]Rules)
	for _, l := range listed {
		if !slices.Contains(s.without, string(l.Name)) {
			ruleOf[l.Name] = rules
		}
	}
	p, err := New(Options{
		Upstreams: u, Cache: c, Prefetch: s.prefetch, ListedOnly: s.listedOnly, Names: s.names, Rules: ruleOf, Defaults: DefaultRules(),
		WriteTimeout: s.writeTimeout, Metrics: metrics, History: history.New(time.Now), Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	p.now = func() time.Time { return time.Now().Add(time.Duration(d.ahead.Load())) }
	d.Server, d.cache, d.proxy = httptest.NewServer(p), c, p
	t.Cleanup(func() { d.stop(); u.Close() })
	return d
}

// advance turns the clock of the rights.
func (d *tarnd) advance(by time.Duration) { d.ahead.Add(int64(by)) }

// keepsNoSecret fails the test when what a client or registry called secret is
// in a log line, a metric or a file of the data directory. Secrets of tests have
// the word canary in them; besides, each Authorization that was sent is one.
func (d *tarnd) keepsNoSecret() {
	d.mu.Lock()
	defer d.mu.Unlock()
	look := func(where string, text []byte) {
		for secret := range d.secrets {
			if bytes.Contains(text, []byte(secret)) {
				d.t.Errorf("%s has the secret %q", where, secret)
			}
		}
		if i := bytes.Index(text, []byte("canary")); i >= 0 {
			d.t.Errorf("%s has a secret: %.80q", where, text[max(0, i-20):])
		}
	}
	look("the log", d.log.take())
	families, err := d.metrics.Gather()
	if err != nil {
		d.t.Error(err)
	}
	look("a metric", []byte(fmt.Sprint(families)))
	filepath.WalkDir(d.options.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			data, _ := os.ReadFile(path)
			look(path, data)
		}
		return nil
	})
	for _, text := range d.refusals {
		look("an error's answer", text)
	}
}

// logBuffer keeps what was logged.
type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) take() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.text.Bytes())
}

// stop ends it in good order; a second call does nothing.
func (d *tarnd) stop() {
	if d.Server == nil {
		return
	}
	d.Server.CloseClientConnections()
	d.Server.Close()
	d.Server = nil
	d.proxy.Close()
	if err := d.cache.Close(); err != nil {
		d.t.Errorf("close the cache: %v", err)
	}
	d.keepsNoSecret()
}

// answer is a whole response.
type answer struct {
	status int
	header http.Header
	body   []byte
	err    error // of the body
}

// do sends one request; headers are name, value, ...
func (d *tarnd) do(method, path string, headers ...string) answer {
	d.t.Helper()
	req, err := http.NewRequest(method, d.URL+path, nil)
	if err != nil {
		d.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	_, secret, _ := strings.Cut(req.Header.Get("Authorization"), " ")
	if len(secret) > 10 && secret != markerToken { // a short one is in any file by chance
		d.mu.Lock()
		if d.secrets == nil {
			d.secrets = make(map[string]bool)
		}
		d.secrets[secret] = true
		d.mu.Unlock()
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	a := answer{status: resp.StatusCode, header: resp.Header}
	a.body, a.err = io.ReadAll(resp.Body)
	if a.status >= 400 {
		d.mu.Lock()
		d.refusals = append(d.refusals, fmt.Appendf(nil, "%v %s", a.header, a.body))
		d.mu.Unlock()
	}
	return a
}

func (d *tarnd) get(path string, headers ...string) answer {
	d.t.Helper()
	return d.do("GET", path, headers...)
}
func (d *tarnd) head(path string, headers ...string) answer {
	d.t.Helper()
	return d.do("HEAD", path, headers...)
}

// must be a whole answer with that status.
func (a answer) must(t testing.TB, status int) answer {
	t.Helper()
	if a.err != nil || a.status != status {
		t.Fatalf("status %d, want %d (error %v, body %.200q)", a.status, status, a.err, a.body)
	}
	return a
}

// mustBe the bytes of that digest.
func (a answer) mustBe(t testing.TB, body []byte) answer {
	t.Helper()
	a.must(t, http.StatusOK)
	if !bytes.Equal(a.body, body) {
		t.Fatalf("%d bytes, %s, want %s", len(a.body), digest.FromBytes(a.body), digest.FromBytes(body))
	}
	return a
}

func (a answer) mustSay(t testing.TB, header, want string) answer {
	t.Helper()
	if got := a.header.Get(header); got != want {
		t.Fatalf("%s: %q, want %q", header, got, want)
	}
	return a
}

// eventually waits for what happens in the background.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("not in 10 s: %s", what)
		case <-tick.C:
		}
	}
}

// stored waits until the object is committed.
func (d *tarnd) stored(domain string, dgst digest.Digest) {
	d.t.Helper()
	eventually(d.t, dgst.String()+" is stored", func() bool {
		_, ok := d.cache.Has(cache.Key{Domain: domain, Digest: dgst})
		return ok
	})
}

func (d *tarnd) has(domain string, dgst digest.Digest) bool {
	_, ok := d.cache.Has(cache.Key{Domain: domain, Digest: dgst})
	return ok
}

// random bytes, different each time it is asked with another seed.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	r.Read(b)
	return b
}

const lab = "lab.test"

// one starts a registry and a tarn that lists it as lab.test.
func one(t testing.TB) (*registrytest.Registry, *tarnd) {
	t.Helper()
	r := registrytest.New(t)
	return r, start(t, setup{listed: map[string]*registrytest.Registry{lab: r}})
}

func manifestPath(repository, ref string) string {
	return "/v2/" + repository + "/manifests/" + ref + "?ns=" + lab
}

func blobPath(repository string, d digest.Digest) string {
	return "/v2/" + repository + "/blobs/" + d.String() + "?ns=" + lab
}
