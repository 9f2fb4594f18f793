// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"
)

// TestALayersPartsAreAskedForAtOnce: of a registry that has shown to be slow, where the
// manifest told the size, and only where a refusal would not cost as many questions.
func TestALayersPartsAreAskedForAtOnce(t *testing.T) {
	t.Parallel()
	for _, ttl := range []time.Duration{0, time.Minute} {
		t.Run(fmt.Sprintf("grants live %s", ttl), func(t *testing.T) {
			t.Parallel()
			r := registrytest.New(t)
			rules := DefaultRules()
			rules.GrantTTL, rules.Parallel = ttl, 4
			d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, rules: &rules})
			const size, asMany = 13_000_000, 3
			first, second := random(1, size), random(2, size)
			img := r.Image("app", "v1", first, second)
			var asked, before atomic.Int64
			more, all := make(chan struct{}), make(chan struct{})
			openAll := sync.OnceFunc(func() { close(all) })
			r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
				switch {
				case strings.HasSuffix(req.URL.Path, img.Layers[0].String()):
					if n := asked.Add(1); n == 1 { // it begins, and then nothing comes for a while
						end := 4 << 20
						w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", end-1, size))
						w.Header().Set("Content-Length", fmt.Sprint(end))
						w.WriteHeader(http.StatusPartialContent)
						w.Write(first[:1])
						w.(http.Flusher).Flush()
						<-more
						w.Write(first[1:end])
						return true
					} else if n == 2 {
						close(more)
					}
				case strings.HasSuffix(req.URL.Path, img.Layers[1].String()):
					n := before.Add(1)
					if ttl == 0 {
						w.WriteHeader(http.StatusNotFound)
						return true
					}
					if n == asMany {
						openAll()
					}
					<-all
				}
				return false
			}
			d.get(manifestPath("app", "v1")).must(t, 200)
			d.get(blobPath("app", img.Layers[0])).must(t, 200).mustBe(t, first)
			if ttl > 0 {
				d.get(blobPath("app", img.Layers[1])).must(t, 200).mustBe(t, second)
			} else if d.get(blobPath("app", img.Layers[1])).must(t, 404); before.Load() != 1 {
				t.Errorf("a refusal took %d questions", before.Load())
			}
		})
	}
}

// TestAFirewallThatLetsNoPartPass is asked for all by whichever question is the first,
// where several parts are asked for at once.
func TestAFirewallThatLetsNoPartPass(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	body := random(1, 300_000)
	dgst := r.Blob("app", body)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Header.Get("Range") != "" {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return false
	}
	f := d.fetcherFor("app", "", dgst, nil)
	for _, off := range []int64{100_000, 0} { // in whatever order they come
		if _, _, err := f.fetch(t.Context(), off, 100_000); !errors.Is(err, cache.ErrRange) {
			t.Errorf("from byte %d: %v", off, err)
		}
	}
}
