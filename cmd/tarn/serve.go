// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"tarn/admin"
	"tarn/cache"
	"tarn/proxy"
	"tarn/upstream"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	// shutdownGrace is how long running answers may take after SIGTERM. A
	// DaemonSet's pod is given 30 s.
	shutdownGrace = 25 * time.Second
	// adminGrace is the same for what people have asked for.
	adminGrace = time.Second
	// readHeaderTimeout bounds how long a client may take for its request.
	readHeaderTimeout = 10 * time.Second
	// idleTimeout closes connections that nobody uses; containerd opens new
	// ones for each pull.
	idleTimeout = 2 * time.Minute
	// writeTimeout is how long a client may take nothing; the proxy begins it
	// anew with each piece that it sends.
	writeTimeout = proxy.DefaultWriteTimeout
	// maxHeaderBytes is room for the longest tokens that registries hand out, and
	// with as many connections as there may be less than the memory of a pod.
	maxHeaderBytes = 32 << 10
)

func newServeCommand() *cobra.Command {
	var flags serveFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon",
		Long: `Run the daemon. Every setting has a default; the configuration file and,
before it, the flags change them. SIGTERM and SIGINT close the listener at once
and let running answers finish.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := flags.config()
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			return serve(ctx, cfg)
		},
	}
	flags.register(cmd.Flags())
	return cmd
}

// serve runs until the context ends.
func serve(ctx context.Context, cfg Config) (err error) {
	log, err := newLogger(cfg.LogLevel)
	if err != nil {
		return err
	}
	defer log.Sync()

	// The listeners first: a taken port is the commonest mistake, and the
	// dial guard must know them.
	listener, err := listen("tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	defer listener.Close()
	var adminListener net.Listener
	if cfg.AdminListen != "" {
		if adminListener, err = listenAdmin(cfg.AdminListen); err != nil {
			return fmt.Errorf("admin_listen: %w", err)
		}
		defer adminListener.Close()
	}

	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	metrics := proxy.NewMetrics(registry)

	upstreams, defaultUpstream, err := newUpstreams(cfg, metrics, log, listener, adminListener)
	if err != nil {
		return err
	}
	defer upstreams.Close()
	registerUpstreams(registry, upstreams)
	rules, err := newRules(cfg)
	if err != nil {
		return err
	}
	store, err := openCache(cfg, log, func(name string) bool { return upstreams.Listed(upstream.Name(name)) })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	// After the data directory, where the socket may be: from now on it is there,
	// and nobody else's.
	socket, err := listenChanges(cfg, log)
	if err != nil {
		return fmt.Errorf("admin_socket: %w", err)
	}
	if socket != nil {
		defer socket.Close()
	}
	registerCache(registry, store)

	p, err := proxy.New(proxy.Options{
		Upstreams:       upstreams,
		Cache:           store,
		DefaultUpstream: defaultUpstream,
		ListedOnly:      cfg.Allow == "listed",
		Names:           cfg.Names,
		Prefetch:        map[string]proxy.Prefetch{"config": proxy.PrefetchConfig, "layers": proxy.PrefetchLayers}[cfg.Prefetch],
		Rules:           rules,
		Defaults:        rulesOf(cfg.Defaults),
		Metrics:         metrics,
		Logger:          log,
	})
	if err != nil {
		return err
	}
	defer p.Close()

	registryServer := newServer(p, log)
	failed := make(chan error, 3)
	go func() { failed <- registryServer.Serve(listener) }()
	asked := adminOptions(cfg, store, p, upstreams, registry, socket)
	var adminServers []*http.Server
	serveAdmin := func(l net.Listener, readOnly string) {
		opts := asked
		opts.Listener, opts.ReadOnly = l.Addr(), readOnly
		s := newServer(admin.New(opts), log)
		s.ReadTimeout = readHeaderTimeout // its bodies are small
		adminServers = append(adminServers, s)
		go func() { failed <- s.Serve(l) }()
	}
	if adminListener != nil {
		serveAdmin(adminListener, readOnly(cfg, adminListener, socket))
		if tcp, ok := adminListener.Addr().(*net.TCPAddr); ok && cfg.AdminChanges == "tcp" && !tcp.IP.IsLoopback() {
			log.Warn("admin_changes: tcp lets other hosts pin, evict and verify images: whoever can connect to admin_listen",
				zap.String("admin_listen", tcp.String()))
		}
	}
	if socket != nil {
		serveAdmin(socket, "")
	}
	log.Info("serving", zap.String("listen", listener.Addr().String()), zap.String("dir", cfg.Dir), zap.String("admin_socket", addressOf(socket)),
		zap.Int64("max_size", store.Stats().MaxBytes), zap.String("version", version))

	select {
	case <-ctx.Done():
		log.Info("shutting down")
	case err = <-failed:
	}
	// Shutdown closes the listener before it waits, so that clients are
	// refused and go to the registry itself.
	shutdown(registryServer, shutdownGrace)
	for _, s := range adminServers {
		shutdown(s, adminGrace)
	}
	return err
}

// shutdown waits so long for what is running, and cuts it then.
func shutdown(s *http.Server, grace time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		s.Close()
	}
}

// newServer is a server that speaks HTTP/1.1 only: a body that breaks off must
// be a closed connection.
func newServer(h http.Handler, log *zap.Logger) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	errorLog, err := zap.NewStdLogAt(log, zap.DebugLevel)
	if err != nil {
		panic(err) // the level is a constant
	}
	return &http.Server{
		Handler:           h,
		Protocols:         protocols,
		ReadHeaderTimeout: readHeaderTimeout,
		WriteTimeout:      writeTimeout,
		ConnState:         limitConnections(maxConnections()),
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          errorLog,
	}
}

// limitConnections closes connections at once that are too many: who is refused
// goes to the registry itself, who is left waiting does not.
func limitConnections(most int64) func(net.Conn, http.ConnState) {
	var open atomic.Int64
	return func(c net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			if open.Add(1) > most {
				c.Close() // and then its state is closed, too
			}
		case http.StateClosed, http.StateHijacked:
			open.Add(-1)
		}
	}
}

// maxConnections leaves three of four descriptors to files and registries: a
// client's download may take a file and several connections. A node's runtime has
// some ten, and each takes memory.
func maxConnections() int64 {
	const share, least, most = 4, 16, 1 << 12
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur > share*most {
		return most
	}
	return max(int64(limit.Cur)/share, least)
}

func newLogger(level string) (*zap.Logger, error) {
	l, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, fmt.Errorf("log_level: %q is none of debug, info, warn, error", level)
	}
	c := zap.NewProductionConfig()
	c.Level = zap.NewAtomicLevelAt(l)
	c.Sampling = nil // a line a request, and no line lost
	c.DisableStacktrace = true
	c.EncoderConfig.EncodeTime = zapcore.ISO8601TimeEncoder
	c.EncoderConfig.EncodeDuration = zapcore.StringDurationEncoder
	return c.Build()
}

func listen(network, addr string) (net.Listener, error) {
	l, err := net.Listen(network, addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s is taken by another process; choose another address, or stop that process", addr)
	}
	return l, err
}

// listenAdmin takes host:port or unix:/path.
func listenAdmin(addr string) (net.Listener, error) {
	path, ok := strings.CutPrefix(addr, unixPrefix)
	if !ok {
		return listen("tcp", addr)
	}
	return listenSocketAt(path)
}

// listenSocketAt makes the directory of a socket that the operator named.
func listenSocketAt(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	return listenSocket(path)
}

// listenChanges opens the admin socket; nil where there is none. Where no place
// can be found for it, tarn serves all the same.
func listenChanges(cfg Config, log *zap.Logger) (net.Listener, error) {
	switch {
	case cfg.AdminSocket == socketOff:
		return nil, nil
	case cfg.AdminSocket != "":
		return listenSocketAt(cfg.AdminSocket)
	case strings.HasPrefix(cfg.AdminListen, unixPrefix):
		return nil, nil // which is one
	}
	l, err := listenFirst(append(runPlaces(), realDir(cfg.Dir)))
	if err != nil {
		log.Warn("there is no place for the admin socket, over which images are pinned, evicted and verified: name one as admin_socket", zap.Error(err))
		return nil, nil
	}
	return l, nil
}

func addressOf(socket net.Listener) string {
	if socket == nil {
		return ""
	}
	return unixPrefix + socket.Addr().String()
}

// readOnly are the words for who asks the admin listener for a change; "" where it
// takes them.
func readOnly(cfg Config, l, socket net.Listener) string {
	switch {
	case cfg.AdminChanges == "tcp" || l.Addr().Network() == "unix":
		return ""
	case socket == nil:
		return "this listener is only for reading, and there is no admin socket for what changes something: set admin_socket in tarn's configuration, or admin_changes: tcp to allow it here"
	}
	return "this listener is only for reading; what changes something is asked for at " + addressOf(socket) +
		", by the user that tarn runs as: with sudo, or in tarn's pod (kubectl exec), tarn pin, unpin, evict and verify find it by themselves; admin_changes: tcp in tarn's configuration would allow it here"
}

func openCache(cfg Config, log *zap.Logger, listed func(upstream string) bool) (*cache.Cache, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("dir: %w; choose another with --dir", err)
	}
	os.Remove(filepath.Join(cfg.Dir, "stale.key")) // of an earlier tarn: it named credentials on the disk
	var fsys syscall.Statfs_t
	if err := syscall.Statfs(cfg.Dir, &fsys); err != nil {
		return nil, fmt.Errorf("dir: %w", err)
	}
	total := int64(fsys.Blocks) * fsys.Bsize
	store, err := cache.New(cache.Options{
		Dir:     cfg.Dir,
		MaxSize: cfg.MaxSize.Bytes(total),
		MinFree: cfg.MinFree.Bytes(total),
		Listed:  listed,
		Logger:  log,
	})
	switch {
	case errors.Is(err, cache.ErrForeign):
		return nil, fmt.Errorf("dir: %w; choose an empty directory with --dir", err)
	case errors.Is(err, cache.ErrInUse):
		return nil, fmt.Errorf("dir: %w; stop it, or choose another directory with --dir", err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return nil, fmt.Errorf("dir: %w; make it writable, or choose another with --dir", err)
	case err != nil:
		return nil, fmt.Errorf("dir: %w", err)
	}
	return store, nil
}

// newUpstreams lists the configured registries. The default upstream counts as
// listed.
func newUpstreams(cfg Config, metrics *proxy.Metrics, log *zap.Logger, listeners ...net.Listener) (*upstream.Client, upstream.Name, error) {
	defaultUpstream, err := upstream.ParseName(cfg.DefaultUpstream)
	if err != nil {
		return nil, "", fmt.Errorf("default_upstream: %w", err)
	}
	var listed []upstream.Config
	defaultListed := false
	for _, u := range cfg.Upstreams {
		c, err := upstreamConfig(u, cfg.Defaults)
		if err != nil {
			return nil, "", fmt.Errorf("upstream %s: %w", u.Name, err)
		}
		defaultListed = defaultListed || c.Name == defaultUpstream
		if c.Credentials != nil {
			// A secret may be mounted later, and who does not need it is
			// served meanwhile.
			if err := c.Credentials.Check(); err != nil {
				log.Error("the node's credentials cannot be read", zap.String("upstream", string(c.Name)), zap.Error(err))
			}
		}
		listed = append(listed, c)
	}
	if !defaultListed {
		listed = append(listed, upstream.Config{Name: defaultUpstream, HeadTimeout: cfg.Defaults.HeadTimeout})
	}
	client, err := upstream.New(upstream.Options{
		Listed:      listed,
		HeadTimeout: cfg.Defaults.HeadTimeout,
		Own:         ownAddresses(listeners),
		UserAgent:   "tarn/" + version,
		Observe:     metrics.Upstream,
	})
	return client, defaultUpstream, err
}

// newRules are who may have what from each listed registry.
func newRules(cfg Config) (map[upstream.Name]proxy.Rules, error) {
	rules := make(map[upstream.Name]proxy.Rules)
	for _, u := range cfg.Upstreams {
		name, err := upstream.ParseName(u.Name)
		if err != nil {
			return nil, fmt.Errorf("upstream %s: %w", u.Name, err)
		}
		if len(u.Share) > 0 && u.Credentials.DockerConfig == "" {
			return nil, fmt.Errorf("upstream %s: share: repositories are shared with the node's credentials; set credentials: too", u.Name)
		}
		r := rulesOf(u.UpstreamDefaults)
		r.TokenBroker, r.Share = u.TokenBroker, u.Share
		rules[name] = r
	}
	return rules, nil
}

func rulesOf(d UpstreamDefaults) proxy.Rules {
	return proxy.Rules{
		GrantTTL:      d.GrantTTL,
		MembershipTTL: d.MembershipTTL,
		StaleIfError:  d.StaleIfError,
		StaleForNode:  d.StaleFor == "node",
		Parallel:      d.Parallel,
	}
}

func ownAddresses(listeners []net.Listener) (own []netip.AddrPort) {
	for _, l := range listeners {
		if l == nil {
			continue
		}
		if tcp, ok := l.Addr().(*net.TCPAddr); ok {
			own = append(own, tcp.AddrPort())
		}
	}
	return own
}

func upstreamConfig(u Upstream, defaults UpstreamDefaults) (c upstream.Config, err error) {
	if c.Name, err = upstream.ParseName(u.Name); err != nil {
		return c, err
	}
	for _, e := range u.Endpoints {
		parsed, err := url.Parse(e.URL)
		if err != nil {
			return c, fmt.Errorf("endpoint %q: not a URL", e.URL)
		}
		c.Endpoints = append(c.Endpoints, upstream.Endpoint{URL: parsed, Trusted: e.Trusted})
	}
	c.HeadTimeout = cmp.Or(u.HeadTimeout, defaults.HeadTimeout)
	if u.Realm != "" {
		if c.Realm, err = url.Parse(u.Realm); err != nil {
			return c, errors.New("realm: not a URL")
		}
	}
	if u.Credentials.DockerConfig != "" {
		c.Credentials = upstream.NewDockerConfig(u.Credentials.DockerConfig, c.Name)
	}
	if u.CAFile == "" && u.CertFile == "" && u.KeyFile == "" && !u.InsecureSkipVerify {
		return c, nil
	}
	c.TLS = &tls.Config{InsecureSkipVerify: u.InsecureSkipVerify}
	if u.CAFile != "" {
		pem, err := os.ReadFile(u.CAFile)
		if err != nil {
			return c, fmt.Errorf("ca_file: %w", err)
		}
		c.TLS.RootCAs = x509.NewCertPool()
		if !c.TLS.RootCAs.AppendCertsFromPEM(pem) {
			return c, fmt.Errorf("ca_file: %s has no certificate in PEM form", u.CAFile)
		}
		// Its storage may be the same house's, or a cloud's.
		if c.ForeignRoots, err = x509.SystemCertPool(); err != nil {
			c.ForeignRoots = x509.NewCertPool()
		}
		c.ForeignRoots.AppendCertsFromPEM(pem)
	}
	if u.CertFile != "" || u.KeyFile != "" {
		cert, err := tls.LoadX509KeyPair(u.CertFile, u.KeyFile)
		if err != nil {
			return c, fmt.Errorf("cert_file, key_file: %w", err)
		}
		c.TLS.Certificates = []tls.Certificate{cert}
	}
	return c, nil
}

// registerCache shows the cache's figures as metrics.
func registerCache(registry *prometheus.Registry, store *cache.Cache) {
	for name, g := range map[string]struct {
		help  string
		value func(cache.Stats) int64
	}{
		"tarn_cache_used_bytes":    {"Bytes that blobs and index take on disk.", func(s cache.Stats) int64 { return s.UsedBytes }},
		"tarn_cache_pending_bytes": {"Bytes reserved for downloads that are running.", func(s cache.Stats) int64 { return s.PendingBytes }},
		"tarn_cache_max_bytes":     {"The bound, max_size.", func(s cache.Stats) int64 { return s.MaxBytes }},
		"tarn_cache_flights":       {"Downloads that are running.", func(s cache.Stats) int64 { return int64(s.Flights) }},
	} {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: g.help},
			func() float64 { return float64(g.value(store.Stats())) }))
	}
	for name, c := range map[string]struct {
		help  string
		value func(cache.Evicted) int64
	}{
		"tarn_cache_evictions_total":     {"Objects that had to make room.", func(e cache.Evicted) int64 { return e.Objects }},
		"tarn_cache_evicted_bytes_total": {"Bytes on disk of objects that had to make room.", func(e cache.Evicted) int64 { return e.Bytes }},
	} {
		registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: c.help},
			func() float64 { return float64(c.value(store.Stats().Evicted)) }))
	}
}

// registerUpstreams shows how the listed registries do, as metrics that name
// none.
func registerUpstreams(registry *prometheus.Registry, upstreams *upstream.Client) {
	for _, habit := range upstream.Habits {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "tarn_upstream_habits",
			Help:        "Listed registries that were seen to do what the specification does not have.",
			ConstLabels: prometheus.Labels{"habit": string(habit)},
		}, func() float64 {
			n := 0
			for _, h := range upstreams.Health() {
				if slices.Contains(h.Habits, habit) {
					n++
				}
			}
			return float64(n)
		}))
	}
	registry.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "tarn_upstream_hosts_failing",
			Help: "Hosts of listed registries that did not answer when they were asked last.",
		}, func() float64 {
			n := 0
			for _, h := range upstreams.Health() {
				n += len(h.Failing)
			}
			return float64(n)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "tarn_upstream_ratelimit_remaining",
			Help: "The fewest requests that a listed registry still grants, as it said last; -1 when none has said.",
		}, func() float64 {
			least := int64(-1)
			for _, h := range upstreams.Health() {
				if h.RateLimit != nil && (least < 0 || h.RateLimit.Remaining < least) {
					least = h.RateLimit.Remaining
				}
			}
			return float64(least)
		}),
	)
}

// status is the document of /api/v1/status.
type status struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Listen  string    `json:"listen"`
	Dir     string    `json:"dir"`
	// AdminSocket is where what changes something is asked for; "" for nowhere but
	// where the configuration says.
	AdminSocket string      `json:"adminSocket"`
	Cache       cache.Stats `json:"cache"`
	Index       any         `json:"index"`
	// Upstreams are the listed registries.
	Upstreams []upstream.Health `json:"upstreams"`
}

// adminOptions are the same for each admin listener.
func adminOptions(cfg Config, store *cache.Cache, p *proxy.Proxy, upstreams *upstream.Client, registry *prometheus.Registry, socket net.Listener) admin.Options {
	started := time.Now()
	return admin.Options{
		Registry: registry,
		Dir:      realDir(cfg.Dir),
		Store:    store,
		Parse:    p.ParseImage,
		Ask:      p.AskImage,
		Ready: func() (bool, []admin.Check) {
			// A disk that stores nothing is no reason to be taken out of
			// service: everything passes through.
			s := store.Stats()
			check := admin.Check{Name: "store", OK: s.Trouble == "", Detail: cmp.Or(s.Trouble, "objects are stored")}
			return true, []admin.Check{check}
		},
		Status: func() any {
			counts, err := store.Index().Counts()
			var index any = counts
			if err != nil {
				index = map[string]string{"error": err.Error()}
			}
			return status{version, started, cfg.Listen, cfg.Dir, addressOf(socket), store.Stats(), index, upstreams.Health()}
		},
	}
}
