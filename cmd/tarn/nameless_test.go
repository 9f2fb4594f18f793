// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"tarn/upstream"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// scrape is what a Prometheus reads there.
func scrape(t *testing.T, g prometheus.Gatherer) string {
	t.Helper()
	w := httptest.NewRecorder()
	promhttp.HandlerFor(g, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatal(w.Body.String())
	}
	return w.Body.String()
}

func TestWithoutNamesAllRegistriesAreOne(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	labels := []string{"kind", "upstream"}
	counter := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tarn_requests_total", Help: "x"}, labels)
	histogram := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "tarn_request_duration_seconds", Help: "x", Buckets: []float64{1, 5}}, labels)
	registry.MustRegister(counter, histogram)
	for i, name := range []string{"a.corp", "b.corp", "c.corp"} {
		counter.WithLabelValues("blob", name).Add(float64(i + 1))
		histogram.WithLabelValues("blob", name).Observe(float64(i * 3))
	}
	counter.WithLabelValues("tag", "a.corp").Inc()
	for range 2 { // and nothing of the registry's own is changed
		text := scrape(t, nameless{registry})
		for _, want := range []string{
			`tarn_requests_total{kind="blob"} 6`, `tarn_requests_total{kind="tag"} 1`,
			`tarn_request_duration_seconds_bucket{kind="blob",le="1"} 1`, `tarn_request_duration_seconds_bucket{kind="blob",le="5"} 2`,
			`tarn_request_duration_seconds_bucket{kind="blob",le="+Inf"} 3`, `tarn_request_duration_seconds_sum{kind="blob"} 9`,
			`tarn_request_duration_seconds_count{kind="blob"} 3`,
		} {
			if !strings.Contains(text, want+"\n") {
				t.Errorf("it lacks %s:\n%s", want, text)
			}
		}
		if strings.Contains(text, "corp") {
			t.Errorf("it names one:\n%s", text)
		}
	}
	if text := scrape(t, registry); !strings.Contains(text, `tarn_requests_total{kind="blob",upstream="b.corp"} 2`) {
		t.Errorf("the other listener lost a name:\n%s", text)
	}
}

func TestQuotasAreTheLeastWithoutNamesAndAbsentWhereNobodySays(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	quota := func(left int64, ago time.Duration, window string) *upstream.RateLimit {
		return &upstream.RateLimit{Limit: 100, Remaining: left, Window: window, Seen: now.Add(-ago)}
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(scraped{[]*prometheus.Desc{habitsDesc, failingDesc, inFlightDesc, quotaLimitDesc, quotaLeftDesc}, func(emit chan<- prometheus.Metric) {
		collectUpstreams(emit, []upstream.Health{
			{Name: "a.corp", RateLimit: quota(76, time.Hour, "21600"), InFlight: 2},
			{Name: "b.corp", RateLimit: quota(5, time.Minute, "")},
			{Name: "c.corp", RateLimit: quota(0, 7*time.Hour, "21600"), Failing: make([]upstream.HostFailing, 2)},
			{Name: "d.corp"},
		}, 3, now)
	}})
	named, without := scrape(t, registry), scrape(t, nameless{registry})
	for _, want := range []string{
		`tarn_upstream_ratelimit_remaining{upstream="a.corp"} 76`, `tarn_upstream_ratelimit_remaining{upstream="b.corp"} 5`,
		`tarn_upstream_hosts_failing{upstream="c.corp"} 2`, `tarn_upstream_hosts_failing{upstream="d.corp"} 0`,
		`tarn_upstream_requests_in_flight{upstream="a.corp"} 2`, `tarn_upstream_requests_in_flight{upstream="other"} 3`,
	} {
		if !strings.Contains(named, want+"\n") {
			t.Errorf("it lacks %s:\n%s", want, named)
		}
	}
	for _, name := range []string{"c.corp", "d.corp"} {
		if strings.Contains(named, `remaining{upstream="`+name) {
			t.Errorf("%s has a quota:\n%s", name, named)
		}
	}
	for _, want := range []string{"tarn_upstream_ratelimit_remaining 5", "tarn_upstream_ratelimit_limit 100", "tarn_upstream_hosts_failing 2", "tarn_upstream_requests_in_flight 5"} {
		if !strings.Contains(without, want+"\n") {
			t.Errorf("without names it lacks %s:\n%s", want, without)
		}
	}
}
