// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"encoding/json"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestAnImageIsFetchedAheadOnceAndOnlyForWhoMayHaveIt(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name            string
		prefetch        Prefetch
		ttl             time.Duration
		config, layers  bool
		method, user    string
		index, refusing bool
	}{
		{name: "off", ttl: time.Minute},
		{name: "the config", prefetch: PrefetchConfig, ttl: time.Minute, config: true},
		{name: "the layers", prefetch: PrefetchLayers, ttl: time.Minute, config: true, layers: true},
		{name: "of an index this node's image", prefetch: PrefetchLayers, ttl: time.Minute, index: true, config: true, layers: true},
		{name: "nothing for a HEAD", prefetch: PrefetchLayers, ttl: time.Minute, method: "HEAD"},
		{name: "nothing where each is to be asked for", prefetch: PrefetchLayers},
		{name: "nothing that the registry refuses", prefetch: PrefetchLayers, ttl: time.Minute, refusing: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := registrytest.New(t)
			rules := DefaultRules()
			rules.GrantTTL = c.ttl
			d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, rules: &rules, prefetch: c.prefetch})
			img := r.Image("app", "v1", random(1, 300_000), random(2, 400_000), random(3, 100))
			other := r.Image("app", "other", random(4, 1000))
			tag := "v1"
			if c.index {
				index, err := json.Marshal(v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{
					{MediaType: v1.MediaTypeImageManifest, Digest: other.Manifest, Size: int64(len(other.Body)), Platform: &v1.Platform{OS: "plan9", Architecture: runtime.GOARCH}},
					{MediaType: v1.MediaTypeImageManifest, Digest: img.Manifest, Size: int64(len(img.Body)), Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}},
				}})
				if err != nil {
					t.Fatal(err)
				}
				tag = "index"
				r.Manifest("app", tag, v1.MediaTypeImageIndex, index)
			}
			r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
				if c.refusing && strings.Contains(req.URL.Path, "/blobs/") {
					w.WriteHeader(http.StatusForbidden)
					return true
				}
				return false
			}
			if c.method == "HEAD" {
				d.head(manifestPath("app", tag)).must(t, 200)
			} else {
				d.get(manifestPath("app", tag)).must(t, 200)
			}
			want := map[digest.Digest]bool{img.Config: c.config}
			for _, l := range img.Layers {
				want[l] = c.layers
			}
			for o, fetched := range want {
				if fetched {
					d.stored(cache.ListedDomain, o)
				}
			}
			d.proxy.ahead.Wait()
			gets := 0
			for o, fetched := range want {
				if d.has(cache.ListedDomain, o) != fetched {
					t.Errorf("%s is here: %v", o, !fetched)
				}
				if fetched {
					gets++
				}
			}
			if n := r.Count("GET", "/blobs/"); n != gets && !c.refusing {
				t.Errorf("%d GETs of blobs, not %d", n, gets)
			}
			if d.has(cache.ListedDomain, other.Config) {
				t.Error("what is for another platform was fetched")
			}
			r.Reset()
			if c.layers { // and the client finds it there
				d.get(blobPath("app", img.Layers[0])).must(t, 200).mustSay(t, "Cache-Status", "tarn; hit")
				d.get(manifestPath("app", tag)).must(t, 200)
				d.proxy.ahead.Wait()
				if n := r.Count("GET", ""); n != 0 {
					t.Errorf("%d GETs", n)
				}
			}
		})
	}
}

// TestFetchingAheadIsBounded by number, by what the manifest says of the sizes,
// by what can be stored, and by the client's right.
func TestFetchingAheadIsBounded(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, prefetch: PrefetchLayers})
	push := func(tag string, layers ...v1.Descriptor) {
		config := []byte(`{"of":"` + tag + `"}`)
		m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Layers: layers,
			Config: v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: r.Blob("app", config), Size: int64(len(config))}}
		m.SchemaVersion = 2
		data, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		r.Manifest("app", tag, m.MediaType, data)
	}
	pull := func(tag string) {
		r.Reset()
		d.get(manifestPath("app", tag)).must(t, 200)
		d.proxy.ahead.Wait()
		eventually(t, "nothing is on its way", func() bool { return d.cache.Stats().Flights == 0 })
	}
	var many []v1.Descriptor
	for n := range 2 * maxAheadObjects {
		b := random(uint64(n), 100)
		many = append(many, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: r.Blob("app", b), Size: int64(len(b))})
	}
	push("many", many...)
	pull("many")
	if n := r.Count("GET", "/blobs/"); n != maxAheadObjects {
		t.Errorf("%d GETs of blobs", n)
	}
	lied := random(1, 5_000_000)
	push("lie", v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: r.Blob("app", lied), Size: 1})
	pull("lie")
	if d.has(cache.ListedDomain, digest.FromBytes(lied)) {
		t.Error("5 MB were fetched for a layer that is said to have 1 byte")
	}
	push("sha384", v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.SHA384.FromString("x"), Size: 1})
	pull("sha384")
	if n := r.Count("GET", "/blobs/sha384"); n != 0 || d.cache.Stats().Trouble != "" {
		t.Errorf("%d GETs of what cannot be stored; %+v", n, d.cache.Stats())
	}
	// What waited for its turn until the right had ended is left.
	for range maxAhead {
		d.proxy.ahead.slots <- struct{}{}
	}
	push("late", many[maxAheadObjects])
	r.Reset()
	d.get(manifestPath("app", "late")).must(t, 200)
	d.advance(2 * time.Minute)
	for range maxAhead {
		<-d.proxy.ahead.slots
	}
	d.proxy.ahead.Wait()
	if n := r.Count("GET", "/blobs/"); n != 0 {
		t.Errorf("%d GETs after the grant had ended", n)
	}
}
