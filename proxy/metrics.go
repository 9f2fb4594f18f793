// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"strconv"
	"time"

	"tarn/upstream"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the proxy's counters. They name no image. The zero of it, a nil
// pointer, counts nothing.
type Metrics struct {
	requests *prometheus.CounterVec
	bytes    *prometheus.CounterVec
	headers  *prometheus.HistogramVec
	upstream *prometheus.CounterVec
	clients  clients
}

// NewMetrics registers the counters.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tarn_requests_total",
			Help: "Requests of clients, by route, outcome (hit, confirmed, miss, bypass, error, none) and status code.",
		}, []string{"route", "outcome", "code"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tarn_response_bytes_total",
			Help: "Bytes of bodies sent to clients, by outcome.",
		}, []string{"outcome"}),
		headers: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "tarn_response_header_seconds",
			Help:    "Seconds from a request's arrival to its response headers, by route and outcome.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 9},
		}, []string{"route", "outcome"}),
		upstream: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tarn_upstream_requests_total",
			Help: "Requests to registries, redirect targets and token services, by method and status code (0: no answer).",
		}, []string{"method", "code"}),
	}
	reg.MustRegister(m.requests, m.bytes, m.headers, m.upstream)
	m.clients.register(reg)
	return m
}

func (m *Metrics) request(route, outcome string, status int, bytes int64, headers time.Duration) {
	if m == nil {
		return
	}
	m.requests.WithLabelValues(route, outcome, strconv.Itoa(status)).Inc()
	m.bytes.WithLabelValues(outcome).Add(float64(bytes))
	m.headers.WithLabelValues(route, outcome).Observe(headers.Seconds())
}

func (m *Metrics) client(userAgent string, at time.Time) {
	if m != nil {
		m.clients.note(userAgent, at)
	}
}

// LastRequests are the kinds of clients that have asked since the start, the latest
// first.
func (m *Metrics) LastRequests() []LastRequest { return m.clients.last() }

// Upstream is for upstream.Options.Observe. The registry's name is no label:
// clients choose it.
func (m *Metrics) Upstream(_ upstream.Name, method string, status int) {
	if m == nil {
		return
	}
	m.upstream.WithLabelValues(method, strconv.Itoa(status)).Inc()
}
