// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"tarn/internal/registrytest"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

func TestTheNetworkReadsMetricsThatNameNothing(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	metrics := freePort(t)
	p := runWith(t, t.TempDir(), "metrics_listen: "+metrics+"\n"+upstreamsOf(r.URL))
	blob := []byte("a blob")
	d := r.Blob("team/app", blob)
	p.mustGet("/v2/team/app/blobs/"+d.String()+"?ns=lab.test", blob)
	get := func(method, path, host string) (int, string) {
		req, err := http.NewRequest(method, "http://"+metrics+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	var text string
	p.until("the request is counted", func() bool { // which is done once it is answered
		var status int
		if status, text = get("GET", "/metrics", "node7.corp.example:9000"); status != 200 {
			t.Fatalf("%d\n%s", status, text)
		}
		return strings.Contains(text, `tarn_requests_total{kind="blob",outcome="miss"} 1`)
	})
	if !strings.Contains(text, "tarn_cache_used_bytes") {
		t.Fatal(text)
	}
	for _, name := range []string{"lab.test", "team", d.Encoded(), "127.0.0.1", strings.TrimPrefix(r.URL, "http://"), p.dir} {
		if strings.Contains(text, name) {
			t.Errorf("it names %s", name)
		}
	}
	labels := make(map[string]bool)
	for _, m := range regexp.MustCompile(`[{,]([a-z_]+)="`).FindAllStringSubmatch(text, -1) {
		labels[m[1]] = true
	}
	for _, known := range append([]string{"le", "quantile"}, harmless...) {
		delete(labels, known)
	}
	if len(labels) > 0 {
		t.Errorf("labels that are not known to be harmless: %v", labels)
	}
	for _, path := range []string{"/", "/api/v1/status", "/api/v1/images", "/healthz", "/debug/pprof/", "/v2/", "/metrics/"} {
		if status, _ := get("GET", path, metrics); status != http.StatusNotFound {
			t.Errorf("GET %s: %d", path, status)
		}
	}
	for path, want := range map[string]int{"/metrics": http.StatusMethodNotAllowed, "/api/v1/reload": http.StatusNotFound} {
		if status, _ := get("POST", path, metrics); status != want {
			t.Errorf("POST %s: %d", path, status)
		}
	}
	// It is tarn's own, and no registry's.
	if got := p.status("/v2/metrics/manifests/v1?ns=" + metrics); got < 400 {
		t.Errorf("as a registry: %d", got)
	}
	p.terminate()
}

// TestAMetricThatNamesSomethingIsLeftOut: whoever adds one later.
func TestAMetricThatNamesSomethingIsLeftOut(t *testing.T) {
	t.Parallel()
	registry := newRegistry()
	named := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tarn_pulls_total", Help: "x"}, []string{"code", "repository"})
	registry.MustRegister(named)
	named.WithLabelValues("200", "secret/corp").Inc()
	for name, c := range map[string]struct {
		gatherer prometheus.Gatherer
		want     bool
	}{"the admin listener": {registry, true}, "the network": {nameless{registry}, false}} {
		w := httptest.NewRecorder()
		promhttp.HandlerFor(c.gatherer, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		if got := strings.Contains(w.Body.String(), "secret/corp"); got != c.want || !strings.Contains(w.Body.String(), "go_goroutines") {
			t.Errorf("%s: named %v", name, got)
		}
	}
}
