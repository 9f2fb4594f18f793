// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"tarn/upstream"

	"github.com/prometheus/client_golang/prometheus"
)

// counts are the metrics of a family: by the values of its labels, in the order of
// the labels' names.
func (d *tarnd) counts(family string) map[string]float64 {
	families, err := d.metrics.Gather()
	if err != nil {
		d.t.Fatal(err)
	}
	all := make(map[string]float64)
	for _, f := range families {
		if f.GetName() != family {
			continue
		}
		for _, m := range f.Metric {
			var values []string
			for _, l := range m.Label {
				values = append(values, l.GetValue())
			}
			all[strings.Join(values, " ")] = m.Counter.GetValue() + float64(m.Histogram.GetSampleCount())
		}
	}
	return all
}

func TestRequestsAreCountedByKindOutcomeAndUpstream(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	layer := random(1, 50_000)
	img := r.Image("app", "v1", layer)
	blob := random(2, 300_000)
	big := r.Blob("app", blob)
	proceed := make(chan struct{})
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		switch {
		case strings.HasSuffix(req.URL.Path, "/tags/list"):
			w.Write([]byte(`{"name":"app","tags":["v1"]}`))
			return true
		case strings.Contains(req.URL.Path, big.String()):
			w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
			w.Write(blob[:len(blob)/2])
			http.NewResponseController(w).Flush()
			<-proceed
			w.Write(blob[len(blob)/2:])
			return true
		}
		return false
	}
	d.get("/v2/").must(t, 200)
	d.get(manifestPath("app", "v1")).must(t, 200) // miss
	d.stored("*", img.Manifest)
	d.get(manifestPath("app", "v1")).must(t, 200)                  // confirmed
	d.get(manifestPath("app", img.Manifest.String())).must(t, 200) // hit
	d.get(blobPath("app", img.Layers[0])).must(t, 200)             // miss
	d.stored("*", img.Layers[0])
	d.head(blobPath("app", img.Layers[0])).must(t, 200)             // hit
	d.get(manifestPath("app", "none")).must(t, 404)                 // refused
	d.get("/v2/app/tags/list?ns="+lab).must(t, 200)                 // bypassed
	d.get("/v2/app/manifests/v1?ns=one-of-nobody").must(t, 502)     // no such host
	d.get("/v2/app/manifests/v1?ns=another-of-nobody").must(t, 502) // no such host
	d.get("/nothing").must(t, 404)
	var half []*http.Response
	for range 2 { // each has its headers before the next one comes
		resp, err := http.Get(d.URL + blobPath("app", big))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		half = append(half, resp)
	}
	close(proceed)
	for _, resp := range half {
		if body, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(body, blob) {
			t.Errorf("%d bytes, %v", len(body), err)
		}
	}

	want := map[string]float64{
		"base none other": 1, "none refused other": 1,
		"tag miss lab.test": 1, "tag confirmed lab.test": 1, "tag refused lab.test": 1, "tag error other": 2,
		"manifest hit lab.test": 1, "blob hit lab.test": 1, "list bypassed lab.test": 1,
	}
	eventually(t, "all are counted", func() bool { // once they have been answered
		got := d.counts("tarn_requests_total")
		blobs := got["blob miss lab.test"] + got["blob joined lab.test"] + got["blob hit lab.test"]
		return blobs == 4 && got["list bypassed lab.test"] == 1
	})
	got := d.counts("tarn_requests_total")
	if got["blob miss lab.test"] != 2 || got["blob joined lab.test"] != 1 {
		t.Errorf("blobs: %v", got)
	}
	delete(got, "blob miss lab.test")
	delete(got, "blob joined lab.test")
	if !maps.Equal(got, want) {
		t.Errorf("counted %v\nand not %v", got, want)
	}
	if h := d.counts("tarn_request_duration_seconds"); h["tag confirmed lab.test"] != 1 {
		t.Errorf("%v", h)
	}
	if n := d.counts("tarn_client_sent_bytes_total")["tag confirmed lab.test"]; n != float64(len(img.Body)) {
		t.Errorf("%v bytes, of %d", n, len(img.Body))
	}
	if n := d.counts("tarn_upstream_received_bytes_total")["fetch lab.test"]; n != float64(len(img.Body)+len(layer)+300_000) {
		t.Errorf("%v bytes came", n)
	}
	asked := d.counts("tarn_upstream_requests_total")
	if asked["tag 200 HEAD lab.test"] != 2 || asked["tag 404 HEAD lab.test"] != 1 || asked["list 200 GET lab.test"] != 1 || asked["tag 0 HEAD other"] != 2 {
		t.Errorf("%v", asked)
	}
	d.namesNothing("one-of-nobody", "another-of-nobody", "app", img.Manifest.Encoded())
}

// namesNothing: no metric has any of these.
func (d *tarnd) namesNothing(names ...string) {
	d.t.Helper()
	families, err := d.metrics.Gather()
	if err != nil {
		d.t.Fatal(err)
	}
	for _, name := range names {
		if strings.Contains(fmt.Sprint(families), name) {
			d.t.Errorf("a metric names %s", name)
		}
	}
}

// TestCodesThatARegistryMakesUpAreOne bounds the series.
func TestCodesThatARegistryMakesUpAreOne(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	code := 600
	r.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		code++
		w.WriteHeader(code)
		return true
	}
	for range 50 {
		d.get(manifestPath("app", "v1"))
	}
	if n := len(d.counts("tarn_upstream_requests_total")); n > 4 {
		t.Errorf("%d series", n)
	}
}

// TestTheNextProxyCountsOn: a reload makes another one of the same Metrics.
func TestTheNextProxyCountsOn(t *testing.T) {
	t.Parallel()
	m := NewMetrics(prometheus.NewRegistry())
	first := newCounted(m, []upstream.Name{"a.test"})
	second := newCounted(m, []upstream.Name{"b.test", "a.test"})
	if first.of("a.test") != second.of("a.test") || first.of("b.test") != second.other {
		t.Error("the series of one name are two")
	}
	if (*Metrics)(nil).of("a.test") != nil {
		t.Error("nobody counts")
	}
}

func BenchmarkCount(b *testing.B) {
	m := NewMetrics(prometheus.NewRegistry())
	c := newCounted(m, []upstream.Name{"ghcr.io", "docker.io", "quay.io"})
	b.ReportAllocs()
	for b.Loop() {
		c.of("docker.io").count(kindBlob, outcomeHit, 1000, time.Millisecond)
	}
}
