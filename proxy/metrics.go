// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"tarn/upstream"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the proxy's counters. They name listed registries, which the operator
// chose, and no image. The zero of it, a nil pointer, counts nothing.
type Metrics struct {
	requests *prometheus.CounterVec
	sent     *prometheus.CounterVec
	duration *prometheus.HistogramVec
	asked    *prometheus.CounterVec
	received *prometheus.CounterVec
	clients  clients

	// mu guards series, by the label upstream. What a reload takes out of the
	// configuration stays: counters that vanish read as a restart.
	mu     sync.Mutex
	series map[string]*series
}

// OtherUpstream stands for all registries that are not listed: their names are
// clients' to choose.
const OtherUpstream = "other"

// kind is what a request was for.
type kind uint8

const (
	kindNone kind = iota // nothing that tarn serves
	kindBase             // /v2/ itself
	kindTag              // a manifest by its tag
	kindManifest
	kindBlob
	kindList // tags/list
	kindReferrers
	kindToken
	numKinds
)

var kindNames = [numKinds]string{"none", "base", "tag", "manifest", "blob", "list", "referrers", "token"}

func (q *request) metricKind() kind {
	switch {
	case q == nil || !q.base && q.kind == "":
		return kindNone
	case q.base:
		return kindBase
	case q.kind == upstream.Manifest && q.tag != "":
		return kindTag
	case q.kind == upstream.Manifest:
		return kindManifest
	case q.kind == upstream.Blob:
		return kindBlob
	case q.kind == upstream.Tags:
		return kindList
	case q.kind == tokenRoute:
		return kindToken
	}
	return kindReferrers
}

// outcome is what a request came to.
type outcome uint8

const (
	outcomeNone      outcome = iota // tarn's own answer, such as /v2/
	outcomeHit                      // from the disk
	outcomeConfirmed                // a tag, from the disk after the registry's answer
	outcomeMiss                     // from the registry, and kept, or a HEAD of what is not here
	outcomeJoined                   // from another client's download
	outcomeStale                    // from the disk, while the registry is away
	outcomeBypassed                 // passed through, and not kept
	outcomeRefused                  // 4xx
	outcomeError                    // 5xx, or a body that broke off
	numOutcomes
)

var outcomeNames = [numOutcomes]string{"none", "hit", "confirmed", "miss", "joined", "stale", "bypassed", "refused", "error"}

// series are the counters of one upstream, each made when it is first needed: most
// never are, and a request that was counted before looks none of its labels up.
type series struct {
	metrics  *Metrics
	upstream string
	cells    [numKinds][numOutcomes]atomic.Pointer[cell]
}

type cell struct {
	requests, sent prometheus.Counter
	duration       prometheus.Observer
}

// NewMetrics registers the counters.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	labels := []string{"kind", "upstream", "outcome"}
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tarn_requests_total",
			Help: "Requests of clients.",
		}, labels),
		sent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tarn_client_sent_bytes_total",
			Help: "Bytes of bodies sent to clients, counted when the answer has ended.",
		}, labels),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "tarn_request_duration_seconds",
			Help:    "Seconds from a request's arrival to its response headers, without the body.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 9},
		}, labels),
		asked: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tarn_upstream_requests_total",
			Help: "Requests to registries, redirect targets and token services, by what for (cause) and status code (0: no answer).",
		}, []string{"upstream", "method", "cause", "code"}),
		received: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tarn_upstream_received_bytes_total",
			Help: "Bytes of bodies received from registries, redirect targets and token services, as they come.",
		}, []string{"upstream", "cause"}),
		series: make(map[string]*series),
	}
	reg.MustRegister(m.requests, m.sent, m.duration, m.asked, m.received, &m.clients)
	return m
}

// of returns the counters of an upstream; nil where nobody counts.
func (m *Metrics) of(label string) *series {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.series[label]
	if s == nil {
		s = &series{metrics: m, upstream: label}
		m.series[label] = s
	}
	return s
}

func (s *series) cell(k kind, o outcome) *cell {
	at := &s.cells[k][o]
	if c := at.Load(); c != nil {
		return c
	}
	labels := []string{kindNames[k], s.upstream, outcomeNames[o]}
	c := &cell{ // another one's is of the same counters
		requests: s.metrics.requests.WithLabelValues(labels...),
		sent:     s.metrics.sent.WithLabelValues(labels...),
		duration: s.metrics.duration.WithLabelValues(labels...),
	}
	at.Store(c)
	return c
}

// count takes one request that has ended.
func (s *series) count(k kind, o outcome, bytes int64, headers time.Duration) {
	if s == nil {
		return
	}
	c := s.cell(k, o)
	c.requests.Inc()
	c.sent.Add(float64(bytes))
	c.duration.Observe(headers.Seconds())
}

func (m *Metrics) client(userAgent string, at time.Time) {
	if m != nil {
		m.clients.note(userAgent, at)
	}
}

// LastRequests are the kinds of clients that have asked since the start, the latest
// first.
func (m *Metrics) LastRequests() []LastRequest { return m.clients.last() }

// Upstream is for upstream.Options.Observe.
func (m *Metrics) Upstream(e upstream.Exchange) (received func(n int)) {
	if m == nil {
		return nil
	}
	label := OtherUpstream
	if e.Listed {
		label = string(e.Name)
	}
	m.asked.WithLabelValues(label, e.Method, string(e.Cause), codeLabel(e.Status)).Inc()
	bytes := m.received.WithLabelValues(label, string(e.Cause))
	return func(n int) { bytes.Add(float64(n)) }
}

// codeLabel bounds the codes that a registry may make up.
func codeLabel(status int) string {
	if status != 0 && http.StatusText(status) == "" {
		return "unknown"
	}
	return strconv.Itoa(status)
}

// counted are the series of a proxy's upstreams, which are read without a lock.
type counted struct {
	listed map[upstream.Name]*series
	other  *series
}

func newCounted(m *Metrics, listed []upstream.Name) counted {
	c := counted{listed: make(map[upstream.Name]*series), other: m.of(OtherUpstream)}
	for _, name := range listed {
		c.listed[name] = m.of(string(name))
	}
	return c
}

// of returns the series of the request's upstream.
func (c counted) of(name upstream.Name) *series {
	if s, ok := c.listed[name]; ok {
		return s
	}
	return c.other
}
