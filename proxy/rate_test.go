// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"tarn/internal/registrytest"
	"tarn/upstream"
)

// TestAnAuthorityThatDripsHoldsNobodyUp who can have the bytes from another endpoint.
func TestAnAuthorityThatDripsHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	r, mirror := registrytest.New(t), registrytest.New(t)
	blob := random(1, 3<<20)
	dgst := r.Blob("app", blob)
	mirror.Blob("app", blob)
	u, err := url.Parse(mirror.URL)
	if err != nil {
		t.Fatal(err)
	}
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" || !strings.Contains(req.URL.Path, "/blobs/") {
			return false
		}
		sized(w, len(blob))
		drip := time.NewTicker(500 * time.Millisecond)
		defer drip.Stop()
		for i := range blob {
			if _, err := w.Write(blob[i : i+1]); err != nil {
				break
			}
			w.(http.Flusher).Flush()
			select {
			case <-drip.C:
			case <-req.Context().Done():
				return true
			}
		}
		return true
	}
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, configure: func(c *upstream.Config) {
		c.Endpoints = append(c.Endpoints, upstream.Endpoint{URL: u})
	}})
	began := time.Now()
	d.get(blobPath("app", dgst)).mustBe(t, blob)
	if took := time.Since(began); took > time.Minute {
		t.Errorf("it took %v", took)
	}
	if mirror.Count("GET", "/blobs/") == 0 {
		t.Error("the other endpoint was not asked")
	}
}
