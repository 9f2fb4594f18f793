// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tarn/admin"
	"tarn/cache"
	"tarn/explain"
	"tarn/history"
	"tarn/proxy"
	"tarn/upstream"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// A reload makes the registry API anew, as a restart does, but over the cache that is
// open: registries, rules, and all that was learnt under them. So nothing outlives the
// rule under which it was given, and there is no list of what depends on which key.
// Requests that are under way are the old one's, and it is closed when they have
// ended.

// generation is the registry API as one reading of the configuration has it.
type generation struct {
	proxy     *proxy.Proxy
	upstreams *upstream.Client
	running   sync.WaitGroup // requests
}

func (g *generation) close() {
	g.running.Wait()
	g.proxy.Close()
	g.upstreams.Close()
}

// api is the registry API, whichever generation it is. It is an http.Handler.
type api struct {
	metrics *proxy.Metrics
	log     *zap.Logger
	own     []net.Listener // tarn's, which are never dialled
	cache   *cache.Cache
	history *history.History

	// upstreams are those of the generation that is served, or will be as soon as
	// the cache, which asks which are listed, is open.
	upstreams atomic.Pointer[upstream.Client]
	running   atomic.Int64 // requests, of each generation

	// mu guards what follows: nobody enters a generation that is being closed.
	mu      sync.RWMutex
	now     *generation
	closing sync.WaitGroup
}

// listed tells whether the operator has named a registry, as of now.
func (a *api) listed(name string) bool { return a.upstreams.Load().Listed(upstream.Name(name)) }

// observe counts what registries are asked and send.
func (a *api) observe(e upstream.Exchange) (received func(n int)) {
	count := a.metrics.Upstream(e)
	return func(n int) {
		count(n)
		a.history.Received(int64(n))
	}
}

// open opens the cache, and makes the first generation.
func (a *api) open(cfg Config) error {
	upstreams, err := newUpstreams(cfg, a.observe, a.log, a.own...)
	if err != nil {
		return err
	}
	a.upstreams.Store(upstreams)
	if _, err := proxyOptions(cfg); err != nil { // before the cache, which may take a while
		return err
	}
	if a.cache, err = openCache(cfg, a.log, a.listed, a.history); err != nil {
		return err
	}
	if a.now, err = a.build(cfg, upstreams, nil); err != nil {
		return errors.Join(err, a.history.Close(), a.cache.Close())
	}
	return nil
}

// build makes a generation, which nobody enters yet. replaces is nil for the first.
func (a *api) build(cfg Config, upstreams *upstream.Client, replaces *proxy.Proxy) (*generation, error) {
	options, err := proxyOptions(cfg)
	if err != nil {
		return nil, err
	}
	options.Upstreams, options.Cache = upstreams, a.cache
	options.Metrics, options.Logger, options.Replaces, options.History = a.metrics, a.log, replaces, a.history
	options.Instance = os.Getenv(instanceVariable)
	p, err := proxy.New(options)
	if err != nil {
		return nil, err
	}
	return &generation{proxy: p, upstreams: upstreams}, nil
}

// replace has the next generation serve what comes from now on. disowned are the
// registries that another authority speaks for from now on, or under another trust.
func (a *api) replace(next *generation, disowned map[upstream.Name]bool) {
	a.now.proxy.Retire() // or it would note more of what is forgotten here
	a.upstreams.Store(next.upstreams)
	a.cache.Index().Relist()
	if len(disowned) > 0 {
		a.cache.Index().Disown(func(name string) bool { return disowned[upstream.Name(name)] })
	}
	a.mu.Lock()
	old := a.now
	a.now = next
	a.mu.Unlock()
	a.closing.Go(old.close)
	// The new rules do not wait for the disk.
	if len(disowned) == 0 {
		return
	}
	if err := a.cache.Index().Sync(); err != nil {
		a.log.Error("what registries have said that are others now is forgotten by this process only", zap.Error(err))
	}
}

// enter is for who leaves with running.Done.
func (a *api) enter() *generation {
	a.mu.RLock()
	defer a.mu.RUnlock()
	a.now.running.Add(1)
	return a.now
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.running.Add(1)
	defer a.running.Add(-1)
	g := a.enter()
	defer g.running.Done()
	g.proxy.ServeHTTP(w, r)
}

// grants is how many yeses are remembered.
func (a *api) grants() int {
	g := a.enter()
	defer g.running.Done()
	return g.proxy.Grants()
}

// parseImage, askImage and pullImage are the proxy's.

func (a *api) parseImage(name string) (proxy.ImageName, error) {
	g := a.enter()
	defer g.running.Done()
	return g.proxy.ParseImage(name)
}

func (a *api) askImage(ctx context.Context, name proxy.ImageName) (proxy.Offered, error) {
	g := a.enter()
	defer g.running.Done()
	return g.proxy.AskImage(ctx, name)
}

func (a *api) pullImage(ctx context.Context, name proxy.ImageName, o proxy.PullOptions) (proxy.Pulled, error) {
	g := a.enter()
	defer g.running.Done()
	return g.proxy.Pull(ctx, name, o)
}

func (a *api) explain(ctx context.Context, name proxy.ImageName) explain.Explanation {
	g := a.enter()
	defer g.running.Done()
	return explain.Explain(ctx, explain.Sources{Proxy: g.proxy, Cache: a.cache, History: a.history, Now: time.Now}, name)
}

// close waits for all generations, and closes the cache. Call it when no request
// comes any more.
func (a *api) close() error {
	a.now.close()
	a.closing.Wait()
	if err := a.history.Close(); err != nil { // which nobody is kept from stopping for
		a.log.Warn("the last decisions could not be written", zap.Error(err))
	}
	return a.cache.Close()
}

// reloader reads the configuration anew.
type reloader struct {
	load  func() (Config, error) // the file, and the flags that go before it
	file  string                 // "" for none
	log   *zap.Logger
	level zap.AtomicLevel
	certs *certificates // nil: plain http
	api   *api
	// manager is told of each.
	manager notifier

	mu  sync.Mutex // one at a time
	cfg Config     // what is served, where mu is held
}

// follow reloads for each hangup. stop lets a reload that is running end, and has all
// others refused.
func (r *reloader) follow(hangup <-chan os.Signal) (stop func()) {
	stopping, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stopping:
				return
			case <-hangup:
				r.reload() // which says in the log what became of it
			}
		}
	}()
	return func() {
		close(stopping)
		<-done
		r.refuse()
	}
}

// refuse lets a reload that is running end, and no other begin.
func (r *reloader) refuse() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.load = func() (Config, error) { return Config{}, errors.New("tarn is shutting down") }
}

// reload has what can change follow the configuration; or nothing, where any of it
// cannot be used.
func (r *reloader) reload() (admin.Reloaded, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manager.reloading()
	defer r.manager.ready()
	needsRestart, err := r.apply()
	if err != nil {
		r.log.Error("the configuration cannot be used; all stays as it was", zap.Error(err))
		return admin.Reloaded{}, err
	}
	r.log.Info("reloaded", zap.Strings("needs_restart", needsRestart))
	return admin.Reloaded{NeedsRestart: needsRestart}, nil
}

// apply reads all before it changes anything. Called with the lock.
func (r *reloader) apply() (needsRestart []string, err error) {
	next, err := r.load()
	if err != nil {
		return nil, err
	}
	needsRestart = keepFixed(&next, &r.cfg)
	level, err := zapcore.ParseLevel(next.LogLevel)
	if err != nil {
		return nil, fmt.Errorf("log_level: %w", err)
	}
	var shown *tls.Config
	var seen [3]fileVersion
	if r.certs != nil {
		if shown, seen, err = readCertificates(next.TLS); err != nil {
			return nil, err
		}
	}
	upstreams, err := newUpstreams(next, r.api.observe, r.log, r.api.own...)
	if err != nil {
		return nil, err
	}
	g, err := r.api.build(next, upstreams, r.api.now.proxy)
	if err != nil {
		return nil, err
	}
	r.level.SetLevel(level)
	if r.certs != nil {
		r.certs.use(next.TLS, shown, seen)
	}
	r.api.replace(g, disowned(authorities(r.cfg), authorities(next)))
	r.cfg = next
	return needsRestart, nil
}

func newReloadCommand() *cobra.Command {
	var d daemon
	return d.register(&cobra.Command{
		Use:   "reload",
		Short: "Have the daemon read its configuration and certificates anew",
		Long: `Have the daemon read its configuration and certificates anew, as SIGHUP does.
Answers that are running go on; what was learnt under the old rules is forgotten,
which costs a question for each credential. Where anything cannot be used, nothing
changes. What needs a restart is named, and stays as it was.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var answer admin.Reloaded
			return d.do(cmd, "POST", "/api/v1/reload", admin.Order{}, &answer, func(w io.Writer) {
				fmt.Fprintln(w, "reloaded")
				if len(answer.NeedsRestart) > 0 {
					fmt.Fprintln(w, "changed, but only a restart uses it:", strings.Join(answer.NeedsRestart, ", "))
				}
			})
		},
	})
}

// keepFixed leaves as it is what only a start reads, and names the keys that say
// something else by now.
func keepFixed(next, now *Config) []string {
	changed := []string{}
	keep(&changed, "listen", &next.Listen, now.Listen)
	keep(&changed, "admin_listen", &next.AdminListen, now.AdminListen)
	keep(&changed, "admin_socket", &next.AdminSocket, now.AdminSocket)
	keep(&changed, "admin_changes", &next.AdminChanges, now.AdminChanges)
	keep(&changed, "admin_names", &next.AdminNames, now.AdminNames)
	keep(&changed, "metrics_listen", &next.MetricsListen, now.MetricsListen)
	keep(&changed, "dir", &next.Dir, now.Dir)
	keep(&changed, "max_size", &next.MaxSize, now.MaxSize)
	keep(&changed, "min_free", &next.MinFree, now.MinFree)
	keep(&changed, "min_free_inodes", &next.MinFreeInodes, now.MinFreeInodes)
	if (next.TLS.CertFile == "") != (now.TLS.CertFile == "") { // other files are followed
		keep(&changed, "tls", &next.TLS, now.TLS)
	}
	return changed
}

func keep[T comparable](changed *[]string, key string, next *T, now T) {
	if *next != now {
		*changed = append(*changed, key)
		*next = now
	}
}

// authorities are whose word counts for each listed registry.
func authorities(cfg Config) map[upstream.Name]string {
	all := make(map[upstream.Name]string)
	if name, err := upstream.ParseName(cfg.DefaultUpstream); err == nil {
		all[name] = ""
	}
	for _, u := range cfg.Upstreams {
		name, err := upstream.ParseName(u.Name)
		if err != nil {
			continue // such a configuration is not served
		}
		all[name] = ""
		if len(u.Endpoints) > 0 {
			all[name] = strings.TrimSuffix(u.Endpoints[0].URL, "/")
		}
		if u.InsecureSkipVerify { // it may have been anybody
			all[name] += " insecure"
		}
	}
	return all
}

// disowned are the registries that are not listed any more, or only now, and those
// with another authority.
func disowned(before, after map[upstream.Name]string) map[upstream.Name]bool {
	all := make(map[upstream.Name]bool)
	for name, was := range before {
		if is, listed := after[name]; !listed || is != was {
			all[name] = true
		}
	}
	for name := range after {
		if _, listed := before[name]; !listed {
			all[name] = true
		}
	}
	return all
}
