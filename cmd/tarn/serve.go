// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"tarn/admin"
	"tarn/cache"
	"tarn/cache/store"
	"tarn/history"
	"tarn/proxy"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
)

func newServeCommand() *cobra.Command {
	var flags serveFlags
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon",
		Long: `Run the daemon. Every setting has a default; the configuration file and,
before it, the flags change them. SIGTERM and SIGINT close the listener at once
and let running answers finish; a second SIGINT does not. SIGHUP, or tarn reload,
has the file and the certificates read anew.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// Before anything that takes a while: the default of SIGHUP is the end.
			hangup := make(chan os.Signal, 1)
			signal.Notify(hangup, syscall.SIGHUP)
			defer signal.Stop(hangup)
			cfg, err := flags.config()
			if err != nil {
				return err
			}
			ctx, stop := untilSignal(cmd.Context())
			defer stop()
			return serve(ctx, cfg, &flags, hangup)
		},
	}
	flags.register(cmd.Flags())
	return cmd
}

// serve runs until the context ends. It loads the configuration anew, from the same
// flags, for each hangup.
func serve(ctx context.Context, cfg Config, flags *serveFlags, hangup <-chan os.Signal) (err error) {
	log, level, err := newLogger(cfg.LogLevel)
	if err != nil {
		return err
	}
	defer log.Sync()
	limitMemory(log)
	manager := newNotifier(log)
	var certs *certificates // nil: plain http
	if cfg.TLS.CertFile != "" {
		if certs, err = newCertificates(cfg.TLS, log); err != nil {
			return err
		}
	}
	// The listeners first: a taken port is the commonest mistake, and the
	// dial guard must know them.
	ls, err := listenAll(cfg)
	if err != nil {
		return err
	}
	defer ls.close()

	registry := newRegistry()
	a := &api{metrics: proxy.NewMetrics(registry), history: history.New(time.Now), log: log, own: []net.Listener{ls.clients, ls.admin, ls.metrics}}
	if err := a.open(cfg); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.close()) }()
	// After the data directory, where the socket may be: from now on it is there,
	// and nobody else's.
	socket, err := listenChanges(cfg, log)
	if err != nil {
		return fmt.Errorf("admin_socket: %w", err)
	}
	defer closeListener(socket)
	registerCache(registry, a, cfg.Dir)
	registerUpstreams(registry, a)

	r := &reloader{load: flags.config, file: flags.file, log: log, level: level, certs: certs, api: a, manager: manager, cfg: cfg}
	defer r.follow(hangup)()
	server := newServer(a, log)
	if certs != nil {
		registerCertificates(registry, certs)
		server.TLSConfig = certs.config()
		server.ConnState = limitConnections(maxConnections(connectionMemory + handshakeMemory))
	}
	services := []service{{server, ls.clients, shutdownGrace}}
	services = append(services, newAdmins(cfg, adminOptions(cfg, a, r, registry, socket), log, ls.admin, socket)...)
	if ls.metrics != nil {
		services = append(services, newMetrics(registry, log, ls.metrics))
	}
	log.Info("serving", zap.String("listen", ls.clients.Addr().String()), zap.Bool("tls", certs != nil), zap.String("admin_listen", addressAt(ls.admin)), zap.String("admin_socket", addressOf(socket)),
		zap.String("dir", cfg.Dir), zap.String("config", cmp.Or(flags.file, "none: every setting has its default")),
		zap.Int64("max_size", a.cache.Stats().MaxBytes), zap.String("version", version))
	defer startGivingBack()()
	defer manager.watch(ctx, ls.clients.Addr(), certs != nil)()
	return serveAll(ctx, log, manager, services, a.running.Load)
}

// whyGone are the store's words in the history's.
var whyGone = map[store.Why]history.Cause{store.ForRoom: history.Evicted, store.OnRequest: history.Removed, store.NotAsItWas: history.Changed}

// openCache opens the data directory, where the history is kept, too.
func openCache(cfg Config, log *zap.Logger, listed func(upstream string) bool, past *history.History) (*cache.Cache, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("dir: %w; choose another with --dir", err)
	}
	os.Remove(filepath.Join(cfg.Dir, "stale.key")) // of an earlier tarn: it named credentials on the disk
	var fsys syscall.Statfs_t
	if err := syscall.Statfs(cfg.Dir, &fsys); err != nil {
		return nil, fmt.Errorf("dir: %w", err)
	}
	total := int64(fsys.Blocks) * fsys.Bsize
	if bound := cfg.MaxSize.Bytes(total); bound > total {
		// One configuration is for nodes of many sizes.
		log.Warn("max_size is more than the filesystem of dir has; min_free holds all the same",
			zap.Int64("max_size", bound), zap.Int64("filesystem", total), zap.String("dir", cfg.Dir))
	}
	path := filepath.Join(cfg.Dir, store.HistoryName)
	past.Load(path) // beside the index
	c, err := cache.New(cache.Options{
		Dir:           cfg.Dir,
		MaxSize:       cfg.MaxSize.Bytes(total),
		MinFree:       cfg.MinFree.Bytes(total),
		MinFreeInodes: cfg.MinFreeInodes.Bytes(int64(min(fsys.Files, math.MaxInt64))),
		Listed:        listed,
		Went:          func(d digest.Digest, size int64, why store.Why) { past.Went(d, size, whyGone[why]) },
		Logger:        log,
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
	past.Keep(history.File{
		Path:    path,
		Most:    min(history.Most, c.Stats().MaxBytes/historyShare),
		Room:    c.Store().Grow,
		Trouble: func(err error) { tellOfHistory(log, path, err) },
	})
	return c, nil
}

// tellOfHistory says that what became of requests cannot be written, or can again.
func tellOfHistory(log *zap.Logger, path string, err error) {
	if err == nil {
		log.Info("what became of requests is written again", zap.String("file", path))
		return
	}
	log.Warn("what became of requests cannot be written: a restart will not know it; have the file be one that tarn may write, or make room", zap.String("file", path), zap.Error(err))
}

// historyShare of the bound is the history's at most, one part in so many.
const historyShare = 256

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
	// Clients is one sentence on who pulls through this tarn, and LastRequests when
	// each kind of client asked last.
	Clients      string              `json:"clients"`
	LastRequests []proxy.LastRequest `json:"lastRequests"`
	// Day is what was served within a day.
	Day history.Sum `json:"day"`
	// Upstreams are the listed registries.
	Upstreams []upstream.Health `json:"upstreams"`
	// Unlisted are other registries in trouble, the last few.
	Unlisted []upstream.Health `json:"unlisted"`
}

// upstreamList is the document of /api/v1/upstreams, and a part of the status.
type upstreamList struct {
	// Upstreams are the listed registries.
	Upstreams []upstream.Health `json:"upstreams"`
	// Unlisted are other registries in trouble, the last few.
	Unlisted []upstream.Health `json:"unlisted"`
}

// newAdmins are the services for people and probes: at the admin listener and at the
// socket, where there are such.
func newAdmins(cfg Config, opts admin.Options, log *zap.Logger, listener, socket net.Listener) (services []service) {
	if listener != nil {
		warnOfChanges(cfg, log, listener)
		opts.NamesElsewhere = namesElsewhere(cfg, listener, socket)
		services = append(services, newAdmin(opts, log, listener, readOnly(cfg, listener, socket)))
		opts.NamesElsewhere = ""
	}
	if socket != nil {
		services = append(services, newAdmin(opts, log, socket, ""))
	}
	return services
}

// newAdmin answers people and probes at the listener; readOnly is what admin.Options
// has of it.
func newAdmin(opts admin.Options, log *zap.Logger, l net.Listener, readOnly string) service {
	closing := make(chan struct{})
	opts.Listener, opts.ReadOnly, opts.Closing = l.Addr(), readOnly, closing
	s := newServer(admin.New(opts), log)
	s.RegisterOnShutdown(sync.OnceFunc(func() { close(closing) }))
	s.ReadTimeout = readHeaderTimeout // its bodies are small
	return service{s, l, adminGrace}
}

// warnOfChanges tells the operator that other hosts may change what is cached.
func warnOfChanges(cfg Config, log *zap.Logger, l net.Listener) {
	if tcp, ok := l.Addr().(*net.TCPAddr); ok && cfg.AdminChanges == "tcp" && !tcp.IP.IsLoopback() {
		log.Warn("admin_changes: tcp lets other hosts pin, evict and verify images: whoever can connect to admin_listen",
			zap.String("admin_listen", tcp.String()))
	}
}

// adminOptions are the same for each admin listener.
func adminOptions(cfg Config, a *api, r *reloader, registry *prometheus.Registry, socket net.Listener) admin.Options {
	started, store := time.Now(), a.cache
	return admin.Options{
		Registry: registry,
		Dir:      realDir(cfg.Dir),
		Store:    store,
		Parse:    a.parseImage,
		Ask:      a.askImage,
		Pull:     a.pullImage,
		Version:  version,
		Reload:   r.reload,
		Explain:  a.explain,
		History:  a.history,
		Process:  func() any { return newProcessReport(r.file) },
		Ready: func() (bool, []admin.Check) {
			// A disk that stores nothing is no reason to be taken out of
			// service: everything passes through.
			s := store.Stats()
			return true, []admin.Check{
				{Name: "store", OK: s.Trouble == "", Detail: cmp.Or(s.Trouble, "objects are stored")},
				{Name: "clients", OK: true, Detail: describeClients(a.lastRequests(), history.Total(a.history.Day()), started, time.Now())},
			}
		},
		Upstreams: func() any {
			upstreams := a.upstreams.Load()
			return upstreamList{upstreams.Health(), upstreams.Strangers()}
		},
		Status: func() any {
			last, upstreams, day := a.lastRequests(), a.upstreams.Load(), history.Total(a.history.Day())
			return status{version, started, cfg.Listen, cfg.Dir, addressOf(socket), store.Stats(), store.Index().Counts(),
				describeClients(last, day, started, time.Now()), last, day, upstreams.Health(), upstreams.Strangers()}
		},
	}
}
