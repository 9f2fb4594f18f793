// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"net/http"
	"slices"

	"tarn/cache"
	"tarn/cache/store"
	"tarn/upstream"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/zap"
)

// newRegistry has the metrics of the process itself.
func newRegistry() *prometheus.Registry {
	registry := prometheus.NewRegistry()
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

// nameless leaves out each metric with a label that is not known to name nothing.
type nameless struct{ prometheus.Gatherer }

// harmless labels have values of tarn's own choice, or of a standard's.
var harmless = []string{"route", "outcome", "code", "method", "habit", "client", "version"}

func (n nameless) Gather() ([]*dto.MetricFamily, error) {
	all, err := n.Gatherer.Gather()
	return slices.DeleteFunc(all, func(f *dto.MetricFamily) bool {
		return slices.ContainsFunc(f.Metric, func(m *dto.Metric) bool {
			return slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return !slices.Contains(harmless, l.GetName()) })
		})
	}), err
}

// registerCache shows the cache's figures as metrics.
func registerCache(registry *prometheus.Registry, c *cache.Cache) {
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
			func() float64 { return float64(g.value(c.Stats())) }))
	}
	for name, n := range map[string]struct {
		help  string
		value func(store.Evicted) int64
	}{
		"tarn_cache_evictions_total":     {"Objects that had to make room.", func(e store.Evicted) int64 { return e.Objects }},
		"tarn_cache_evicted_bytes_total": {"Bytes on disk of objects that had to make room.", func(e store.Evicted) int64 { return e.Bytes }},
	} {
		registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: n.help},
			func() float64 { return float64(n.value(c.Stats().Evicted)) }))
	}
}

// registerCertificates shows when clients will believe tarn no longer, and go to the
// registries themselves.
func registerCertificates(registry *prometheus.Registry, c *certificates) {
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "tarn_certificate_expiry_timestamp_seconds",
		Help: "When the certificate of tls.cert_file ends, in seconds since 1970.",
	}, c.expiry))
}

// registerUpstreams shows how the listed registries do, as metrics that name
// none.
func registerUpstreams(registry *prometheus.Registry, health func() []upstream.Health) {
	for _, habit := range upstream.Habits {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "tarn_upstream_habits",
			Help:        "Listed registries that were seen to do what the specification does not have.",
			ConstLabels: prometheus.Labels{"habit": string(habit)},
		}, func() float64 {
			n := 0
			for _, h := range health() {
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
			Help: "Hosts of listed registries that gave no answer when they were asked last.",
		}, func() float64 {
			n := 0
			for _, h := range health() {
				n += len(h.Failing)
			}
			return float64(n)
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "tarn_upstream_ratelimit_remaining",
			Help: "The fewest requests that a listed registry still grants, as it said last; -1 when none has said.",
		}, func() float64 {
			least := int64(-1)
			for _, h := range health() {
				if h.RateLimit != nil && (least < 0 || h.RateLimit.Remaining < least) {
					least = h.RateLimit.Remaining
				}
			}
			return float64(least)
		}),
	)
}
