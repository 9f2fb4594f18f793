// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"

	"tarn/cache"
	"tarn/cache/store"
	"tarn/upstream"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// newRegistry has the metrics of the process itself.
func newRegistry() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return registry
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
			Help: "Hosts of listed registries that gave no answer when they were asked last.",
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
