// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"context"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"tarn/cache"
	"tarn/cache/store"
	"tarn/history"
	"tarn/images"
	"tarn/internal/registrytest"
	"tarn/proxy"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

const corp = "reg.corp"

// node is a tarn before a registry that it lists as reg.corp, with a clock that a test
// turns.
type node struct {
	t        testing.TB
	registry *registrytest.Registry
	cache    *cache.Cache
	proxy    *proxy.Proxy
	history  *history.History
	server   *httptest.Server
	ahead    atomic.Int64
	asks     func(*http.Request) // looks at what the registry is asked; nil does not
	answers  atomic.Value        // func(w, r) bool, in place of the registry
}

// usual are the rules of a tarn without a configuration.
var usual = proxy.Rules{GrantTTL: time.Minute, MembershipTTL: 24 * time.Hour, Parallel: 4}

type options struct {
	maxSize    int64
	rules      proxy.Rules
	listedOnly bool
	patience   time.Duration // head_timeout
}

func start(t testing.TB, o options) *node {
	t.Helper()
	n := &node{t: t, registry: registrytest.New(t)}
	n.registry.Hook = func(w http.ResponseWriter, r *http.Request) bool {
		f, _ := n.answers.Load().(func(http.ResponseWriter, *http.Request) bool)
		return f != nil && f(w, r)
	}
	n.history = history.New(n.now)
	if o.maxSize == 0 {
		o.maxSize = 1 << 30
	}
	var err error
	why := map[store.Why]history.Cause{store.ForRoom: history.Evicted, store.OnRequest: history.Removed, store.NotAsItWas: history.Changed}
	if n.cache, err = cache.New(cache.Options{Dir: t.TempDir(), MaxSize: o.maxSize, Went: func(d digest.Digest, size int64, w store.Why) { n.history.Went(d, size, why[w]) }}); err != nil {
		t.Fatal(err)
	}
	up, err := upstream.New(upstream.Options{
		Listed:  []upstream.Config{{Name: corp, Endpoints: []upstream.Endpoint{{URL: n.registry.Endpoint()}}, HeadTimeout: o.patience}},
		Connect: registrytest.Loopback(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	if n.proxy, err = proxy.New(proxy.Options{
		Upstreams: up, Cache: n.cache, History: n.history, Now: n.now, ListedOnly: o.listedOnly,
		Rules: map[upstream.Name]proxy.Rules{corp: o.rules}, Defaults: usual,
	}); err != nil {
		t.Fatal(err)
	}
	n.server = httptest.NewServer(n.proxy)
	t.Cleanup(func() {
		n.server.Close()
		n.proxy.Close()
		if err := n.cache.Close(); err != nil {
			t.Error(err)
		}
		up.Close()
	})
	return n
}

func (n *node) now() time.Time          { return time.Now().Add(time.Duration(n.ahead.Load())) }
func (n *node) forward(d time.Duration) { n.ahead.Add(int64(d)) }
func (n *node) sources() Sources        { return Sources{n.proxy, n.cache, n.history, n.now} }
func (n *node) address() string         { return n.registry.Address() }
func (n *node) answer(f http.HandlerFunc) {
	n.hook(func(w http.ResponseWriter, r *http.Request) bool { f(w, r); return true })
}
func (n *node) status(code int) {
	n.answer(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) })
}
func (n *node) answersAgain()                                        { n.hook(func(http.ResponseWriter, *http.Request) bool { return false }) }
func (n *node) has(d digest.Digest) bool                             { _, ok := n.cache.Store().IsHere(d); return ok }
func (n *node) hook(f func(http.ResponseWriter, *http.Request) bool) { n.answers.Store(f) }

// away has the registry close each connection without an answer.
func (n *node) away() {
	n.answer(func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) })
}

func (n *node) explain(name string) Explanation {
	n.t.Helper()
	image, err := n.proxy.ParseImage(name)
	if err != nil {
		n.t.Fatal(err)
	}
	return Explain(context.Background(), n.sources(), image)
}

// get asks as containerd does.
func (n *node) get(method, path string, header ...string) (status int, body []byte) {
	n.t.Helper()
	req, err := http.NewRequest(method, n.server.URL+path+"?ns="+corp, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	req.Header.Set("User-Agent", "containerd/2.4.2")
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	before := n.requests()
	resp, err := http.DefaultClient.Do(req)
	if err == nil {
		body, _ = io.ReadAll(resp.Body)
		resp.Body.Close()
		status = resp.StatusCode
	}
	// Which comes after the answer.
	n.eventually("the request is remembered", func() bool { return n.requests() > before })
	return status, body
}

func (n *node) requests() (count int) {
	for _, e := range n.history.After(0, 1<<20) {
		if e.Outcome != history.OutcomeGone {
			count += e.Count
		}
	}
	return count
}

// pull has an image pulled as containerd does, and waits until all that came is stored.
func (n *node) pull(repository, tag string, img registrytest.Image) {
	n.t.Helper()
	n.get("HEAD", "/v2/"+repository+"/manifests/"+tag)
	n.get("GET", "/v2/"+repository+"/manifests/"+img.Manifest.String())
	n.stored(img.Manifest)
	for _, d := range append([]digest.Digest{img.Config}, img.Layers...) {
		n.get("GET", "/v2/"+repository+"/blobs/"+d.String())
		n.stored(d)
	}
}

func (n *node) stored(d digest.Digest) {
	n.t.Helper()
	n.eventually(d.String()+" is stored", func() bool { return n.has(d) })
}

// eventually waits for what happens in the background.
func (n *node) eventually(what string, is func() bool) {
	n.t.Helper()
	deadline, tick := time.NewTimer(10*time.Second), time.NewTicker(time.Millisecond)
	defer deadline.Stop()
	defer tick.Stop()
	for !is() {
		select {
		case <-deadline.C:
			n.t.Fatal("not within 10 s: ", what)
		case <-tick.C:
		}
	}
}

func (n *node) evict(ds ...digest.Digest) {
	n.t.Helper()
	if err := n.cache.Store().Do(func() error { _, err := n.cache.Store().Remove(ds); return err }); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) pin(tag string) {
	n.t.Helper()
	if _, err := n.cache.Images().Pin(images.Pin{Upstream: corp, Repository: "app", Tag: tag}); err != nil {
		n.t.Fatal(err)
	}
}

// random bytes, other ones with each seed.
func random(seed uint64, size int) []byte {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1}).Read(b)
	return b
}
