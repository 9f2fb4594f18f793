// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"net/http"
	"runtime"
	"slices"
	"syscall"
	"time"

	"tarn/cache"
	"tarn/proxy"
	"tarn/upstream"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
)

// newRegistry has the metrics of the process itself.
func newRegistry() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registerBuild(registry)
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return registry
}

// newMetrics are the service for a Prometheus on the network: nothing but nameless
// metrics, whoever asks and under whatever name.
func newMetrics(registry *prometheus.Registry, log *zap.Logger, l net.Listener) service {
	const atOnce, connections = 2, 16 // a scrape costs more than it takes to ask for one
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(nameless{registry}, promhttp.HandlerOpts{MaxRequestsInFlight: atOnce}))
	s := newServer(mux, log)
	s.ConnState = limitConnections(connections)
	s.ReadTimeout = readHeaderTimeout // it takes no body
	return service{s, l, adminGrace}
}

// scraped is a collector whose values are taken together, at each scrape.
type scraped struct {
	descs   []*prometheus.Desc
	collect func(emit chan<- prometheus.Metric)
}

// Describe implements prometheus.Collector.
func (s scraped) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range s.descs {
		descs <- d
	}
}

// Collect implements prometheus.Collector.
func (s scraped) Collect(emit chan<- prometheus.Metric) { s.collect(emit) }

// reading is one figure of what is kept.
type reading struct {
	kind       prometheus.ValueType
	name, help string
	value      func(*kept) int64
}

// kept is what is known of the store and its filesystem at one scrape.
type kept struct {
	cache.Stats
	objects, grants int64
	fsys            syscall.Statfs_t // of zeros where the kernel does not say
}

var readings = []reading{
	{prometheus.GaugeValue, "tarn_cache_used_bytes", "Bytes that blobs and index take on disk.", func(k *kept) int64 { return k.UsedBytes }},
	{prometheus.GaugeValue, "tarn_cache_pending_bytes", "Bytes reserved for downloads: running, or broken off and kept to go on with.", func(k *kept) int64 { return k.PendingBytes }},
	{prometheus.GaugeValue, "tarn_cache_max_bytes", "The bound, max_size.", func(k *kept) int64 { return k.MaxBytes }},
	{prometheus.GaugeValue, "tarn_cache_objects", "Objects that are stored.", func(k *kept) int64 { return k.objects }},
	{prometheus.GaugeValue, "tarn_cache_downloads_in_flight", "Downloads that are running.", func(k *kept) int64 { return int64(k.Flights) }},
	{prometheus.CounterValue, "tarn_cache_evictions_total", "Objects that had to make room.", func(k *kept) int64 { return k.Evicted.Objects }},
	{prometheus.CounterValue, "tarn_cache_evicted_bytes_total", "Bytes on disk of objects that had to make room.", func(k *kept) int64 { return k.Evicted.Bytes }},
	{prometheus.GaugeValue, "tarn_cache_store_failing", "1 where the disk refused what was to be stored last, so that objects pass through; else 0.", func(k *kept) int64 {
		if k.Trouble != "" {
			return 1
		}
		return 0
	}},
	{prometheus.GaugeValue, "tarn_filesystem_free_bytes", "Bytes free for tarn on the filesystem of dir.", func(k *kept) int64 { return int64(k.fsys.Bavail) * k.fsys.Bsize }},
	{prometheus.GaugeValue, "tarn_filesystem_size_bytes", "Bytes of the filesystem of dir.", func(k *kept) int64 { return int64(k.fsys.Blocks) * k.fsys.Bsize }},
	{prometheus.GaugeValue, "tarn_grants", "Yeses of registries that are remembered, each to one credential in one repository.", func(k *kept) int64 { return k.grants }},
}

// registerCache shows what is kept in dir.
func registerCache(registry *prometheus.Registry, a *api, dir string) {
	all := scraped{}
	for _, r := range readings {
		all.descs = append(all.descs, prometheus.NewDesc(r.name, r.help, nil, nil))
	}
	all.collect = func(emit chan<- prometheus.Metric) {
		k := kept{Stats: a.cache.Stats(), objects: int64(a.cache.Index().Len()), grants: int64(a.grants())}
		if err := syscall.Statfs(dir, &k.fsys); err != nil {
			k.fsys = syscall.Statfs_t{}
		}
		for i, r := range readings {
			emit <- prometheus.MustNewConstMetric(all.descs[i], r.kind, float64(r.value(&k)))
		}
	}
	registry.MustRegister(all)
}

// registerCertificates shows when clients will believe tarn no longer, and go to the
// registries themselves.
func registerCertificates(registry *prometheus.Registry, c *certificates) {
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "tarn_certificate_expiry_timestamp_seconds",
		Help: "When the certificate of tls.cert_file ends, in seconds since 1970.",
	}, c.expiry))
}

var (
	byUpstream     = []string{"upstream"}
	habitsDesc     = prometheus.NewDesc("tarn_upstream_habits", "Listed registries that were seen to do what the specification does not have.", []string{"habit"}, nil)
	failingDesc    = prometheus.NewDesc("tarn_upstream_hosts_failing", "Hosts of a listed registry that gave no answer when they were asked last.", byUpstream, nil)
	inFlightDesc   = prometheus.NewDesc("tarn_upstream_requests_in_flight", "Requests that wait for a registry's headers, or for their turn.", byUpstream, nil)
	quotaLimitDesc = prometheus.NewDesc("tarn_upstream_ratelimit_limit", "The requests that a listed registry grants in its window, as it said last. Absent where it has not said, or its window has passed since.", byUpstream, nil)
	quotaLeftDesc  = prometheus.NewDesc("tarn_upstream_ratelimit_remaining", "The requests that it still grants, likewise.", byUpstream, nil)
)

// registerUpstreams shows how registries do: each listed one, and the others together.
func registerUpstreams(registry *prometheus.Registry, a *api) {
	registry.MustRegister(scraped{
		[]*prometheus.Desc{habitsDesc, failingDesc, inFlightDesc, quotaLimitDesc, quotaLeftDesc},
		func(emit chan<- prometheus.Metric) {
			upstreams := a.upstreams.Load()
			collectUpstreams(emit, upstreams.Health(), upstreams.StrangersInFlight(), time.Now())
		},
	})
}

func collectUpstreams(emit chan<- prometheus.Metric, listed []upstream.Health, strangersInFlight int, now time.Time) {
	gauge := func(d *prometheus.Desc, v float64, label string) {
		emit <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, label)
	}
	for _, habit := range upstream.Habits {
		n := 0
		for _, h := range listed {
			if slices.Contains(h.Habits, habit) {
				n++
			}
		}
		gauge(habitsDesc, float64(n), string(habit))
	}
	for _, h := range listed {
		name := string(h.Name)
		gauge(failingDesc, float64(len(h.Failing)), name)
		gauge(inFlightDesc, float64(h.InFlight), name)
		if h.RateLimit != nil && now.Before(h.RateLimit.Until()) {
			gauge(quotaLeftDesc, float64(h.RateLimit.Remaining), name)
			if h.RateLimit.Limit > 0 {
				gauge(quotaLimitDesc, float64(h.RateLimit.Limit), name)
			}
		}
	}
	gauge(inFlightDesc, float64(strangersInFlight), proxy.OtherUpstream)
}

// registerBuild shows which tarn this is.
func registerBuild(registry *prometheus.Registry) {
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "tarn_build_info", Help: "1, with the version as labels."}, []string{"version", "commit", "goversion"})
	g.WithLabelValues(version, commit, runtime.Version()).Set(1)
	registry.MustRegister(g)
}
