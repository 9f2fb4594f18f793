// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"tarn/cache"

	"github.com/opencontainers/go-digest"
)

// The figures of one run are meant to be compared with each other: what tarn
// costs over a plain file server, and what a confirmed tag costs over asking
// the registry oneself.

func fetchAll(b *testing.B, url string, headers ...string) {
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		b.Fatal(err)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 200 {
		b.Fatal(resp.Status, err)
	}
}

func BenchmarkCachedBlob(b *testing.B) {
	const size = 64 << 20
	r, d := one(b)
	blob := random(1, size)
	dgst := r.Blob("app", blob)
	fetchAll(b, d.URL+blobPath("app", dgst))
	d.stored(cache.ListedDomain, dgst)
	path := filepath.Join(d.options.dir, "blobs", "sha256", dgst.Encoded())
	static := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", blobType)
		http.ServeFile(w, r, path)
	}))
	b.Cleanup(static.Close)
	for name, url := range map[string]string{"sendfile": static.URL, "tarn": d.URL + blobPath("app", dgst)} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				fetchAll(b, url)
			}
		})
	}
}

func BenchmarkManifest(b *testing.B) {
	r, d := one(b)
	img := r.Image("app", "v1", random(1, 1000))
	fetchAll(b, d.URL+manifestPath("app", "v1"))
	d.stored(cache.ListedDomain, img.Manifest)
	for name, url := range map[string]string{
		"direct":          r.URL + "/v2/app/manifests/v1",
		"confirmed tag":   d.URL + manifestPath("app", "v1"),
		"cached digest":   d.URL + manifestPath("app", img.Manifest.String()),
		"tarn's own /v2/": d.URL + "/v2/",
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				fetchAll(b, url)
			}
		})
	}
	b.Run("confirmed tag in parallel", func(b *testing.B) {
		r.Reset()
		b.ReportAllocs()
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				fetchAll(b, d.URL+manifestPath("app", "v1"))
			}
		})
		b.ReportMetric(float64(r.Count("HEAD", ""))/float64(b.N), "HEAD/op")
	})
}

// routed are requests on their way to the handler that answers them.
func routed(t testing.TB) (requests map[string]*http.Request, way func(*http.Request)) {
	router := newRouter(func(_ http.ResponseWriter, r *http.Request) {
		if _, err := testNames.parse(r); err != nil {
			t.Error(err)
		}
	})
	return map[string]*http.Request{
		"tag, ns":        mustRequest(t, "/v2/library/hello/manifests/latest?ns=docker.io"),
		"digest, path":   mustRequest(t, "/v2/ghcr.io/org/app/blobs/"+sum),
		"digest, prefix": mustRequest(t, "/ghcr.io/v2/org/app/blobs/"+sum),
	}, func(r *http.Request) { route(router, nil, r) }
}

func BenchmarkRoute(b *testing.B) {
	requests, way := routed(b)
	for name, r := range requests {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				way(r)
			}
		})
	}
}

// BenchmarkRefusal asks, interleaved, for an object that is cached and for one
// that is not, with a credential that may have neither: the two must look the
// same to who measures. The registry takes 20 ms.
func BenchmarkRefusal(b *testing.B) {
	const rounds = 1000
	r, d := private(b, "Basic", setup{})
	cached, cold := r.Blob("private/app", random(1, 300_000)), r.Blob("private/app", random(2, 300_000))
	d.get(blobPath("private/app", cached), r.Access.Login("private/app", "a")...).must(b, 200)
	d.stored(cache.ListedDomain, cached)
	other := r.Access.Login("private/app", "b")
	r.Latency = 20 * time.Millisecond
	for _, method := range []string{"GET", "HEAD"} {
		b.Run(method, func(b *testing.B) {
			for b.Loop() {
				took := make(map[digest.Digest][]time.Duration)
				r.Reset()
				for range rounds {
					for _, dgst := range []digest.Digest{cached, cold} {
						start := time.Now()
						d.do(method, blobPath("private/app", dgst), other...).must(b, 403)
						took[dgst] = append(took[dgst], time.Since(start))
					}
				}
				var medians [2]time.Duration
				for i, dgst := range []digest.Digest{cached, cold} {
					slices.Sort(took[dgst])
					medians[i] = took[dgst][rounds/2]
				}
				b.ReportMetric(float64(medians[0].Microseconds()), "us-cached")
				b.ReportMetric(float64(medians[1].Microseconds()), "us-cold")
				b.ReportMetric(float64((medians[0] - medians[1]).Abs().Microseconds()), "us-apart")
				b.ReportMetric(float64(len(r.Exchanges()))/(2*rounds), "upstream/op")
			}
		})
	}
}
