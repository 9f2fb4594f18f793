// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// pullImage pulls by name, as the operator does.
func (d *tarnd) pullImage(ctx context.Context, name string, o PullOptions) (Pulled, error) {
	d.t.Helper()
	n, err := d.proxy.ParseImage(name)
	if err != nil {
		d.t.Fatal(err)
	}
	return d.proxy.Pull(ctx, n, o)
}

// indexOf stores an index of images for these platforms, os/architecture each.
func indexOf(r *registrytest.Registry, repository, tag string, images map[string]registrytest.Image) digest.Digest {
	ix := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	for platform, image := range images {
		os, arch, _ := strings.Cut(platform, "/")
		ix.Manifests = append(ix.Manifests, v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: image.Manifest, Size: int64(len(image.Body)), Platform: &v1.Platform{OS: os, Architecture: arch}})
	}
	body, err := json.Marshal(ix)
	if err != nil {
		panic(err)
	}
	return r.Manifest(repository, tag, ix.MediaType, body)
}

func (d *tarnd) holds(image registrytest.Image) bool {
	all := append([]digest.Digest{image.Manifest, image.Config}, image.Layers...)
	for _, one := range all {
		if !d.has(cache.ListedDomain, one) {
			return false
		}
	}
	return true
}

func TestAPullFetchesWhatTheNodeNeedsAndSaysWhatItCost(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	shared := random(1, 300_000)
	own := r.Image("team/app", "own", shared, random(2, 5_000_000))
	other := r.Image("team/app", "other", shared, random(3, 100_000))
	root := indexOf(r, "team/app", "v1", map[string]registrytest.Image{"linux/" + runtime.GOARCH: own, "plan9/mips": other})
	r.Reset()
	var mu sync.Mutex
	stored := map[digest.Digest]int{}
	report := func(o PulledObject) {
		mu.Lock()
		defer mu.Unlock()
		if o.Stored {
			stored[o.Digest]++
		}
	}
	first, err := d.pullImage(t.Context(), "lab.test/team/app:v1", PullOptions{Report: report})
	if err != nil || first.Digest != root || first.Objects != 5 || first.HereBytes != 0 || first.FetchedBytes != first.TotalBytes || first.TotalBytes < 5_300_000 {
		t.Fatalf("%+v, %v", first, err)
	}
	if !d.holds(own) || d.holds(other) || len(stored) != 5 {
		t.Errorf("the node's is here: %v, the other one: %v, %d objects were said to be stored", d.holds(own), d.holds(other), len(stored))
	}
	if n := r.Count("HEAD", "/manifests/v1"); n != 1 {
		t.Errorf("the tag was asked for %d times with HEAD", n)
	}
	if n := r.Count("GET", "/blobs/"+own.Layers[0].String()); n != 1 {
		t.Errorf("a layer was asked for %d times", n)
	}
	r.Reset()
	again, err := d.pullImage(t.Context(), "lab.test/team/app:v1", PullOptions{})
	if err != nil || again.FetchedBytes != 0 || again.HereBytes != again.TotalBytes || again.TotalBytes != first.TotalBytes {
		t.Errorf("again: %+v, %v", again, err)
	}
	if n := r.Count("GET", "/blobs/"); n != 0 || r.Count("HEAD", "/manifests/v1") != 1 {
		t.Errorf("again it asked for %d blobs: %v", n, r.Exchanges())
	}
	all, err := d.pullImage(t.Context(), "lab.test/team/app:v1", PullOptions{Platforms: []string{AllPlatforms}})
	if err != nil || !d.holds(other) || all.FetchedBytes < 100_000 || all.FetchedBytes > 110_000 {
		t.Errorf("all platforms: %+v, %v", all, err)
	}
	// And a client's pull is from the disk.
	d.get(manifestPath("team/app", "v1")).must(t, 200).mustSay(t, "Cache-Status", "tarn; fwd=stale; fwd-status=200; detail=confirmed")
	d.get(blobPath("team/app", own.Layers[1])).must(t, 200).mustSay(t, "Cache-Status", "tarn; hit")
}

func TestAPullSaysWhyNotAndWhatToDo(t *testing.T) {
	t.Parallel()
	r, d, _ := withNode(t, "Bearer", "platform/*")
	r.Image("private/app", "v1", random(1, 1000))
	r.Image("platform/base", "v1", random(2, 1000))
	whole := r.Image("open/app", "v1", random(3, 1000))
	partly := r.Image("open/app", "partly", random(4, 1000))
	r.Delete("open/app", "blobs", partly.Layers[0])
	wrong := r.Image("open/app", "wrong", random(5, 200_000))
	r.Image("open/app", "huge", random(6, 1000))
	huge := fmt.Sprintf(`{"schemaVersion":2,"config":{"digest":%q},"layers":[{"digest":%q,"size":%d}]}`, whole.Config, whole.Layers[0], int64(1)<<60)
	r.Manifest("open/app", "huge", v1.MediaTypeImageManifest, []byte(huge))
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if strings.HasSuffix(req.URL.Path, wrong.Layers[0].String()) {
			w.Header().Set("Content-Length", "200000")
			w.Write(random(7, 200_000))
			return true
		}
		return false
	}
	for name, c := range map[string]struct {
		image string
		o     PullOptions
		code  string // "" for none
		says  []string
	}{
		"what is private":           {image: "lab.test/private/app:v1", code: "unauthorized", says: []string{"lab.test answers 401", "share: of the upstream lab.test"}},
		"what is shared":            {image: "lab.test/platform/base:v1"},
		"what is shared, as node":   {image: "lab.test/platform/base:v1", o: PullOptions{AsNode: true}},
		"what is not, as node":      {image: "lab.test/open/app:v1", o: PullOptions{AsNode: true}, code: "not_shared", says: []string{"share:", "--as-node"}},
		"no tag":                    {image: "lab.test/open/app:v9", code: "not_found", says: []string{"no such image", "typing error"}},
		"a layer is missing":        {image: "lab.test/open/app:partly", code: "not_found"},
		"another thing comes":       {image: "lab.test/open/app:wrong", code: "wrong_bytes", says: []string{"lab.test sent something else"}},
		"another platform":          {image: "lab.test/open/app:v1", o: PullOptions{Platforms: []string{"linux/s390x"}}, code: "no_platform", says: []string{"it is for linux/amd64", "s390x"}},
		"larger than the disk":      {image: "lab.test/open/app:huge", code: "too_large", says: []string{"max_size"}},
		"a registry that is away":   {image: "gone.test/app:v1", code: "unreachable", says: []string{"gone.test"}},
		"the beginning of a digest": {image: "lab.test/open/app@" + whole.Manifest.String()[:20], code: "invalid"},
		"a digest":                  {image: "lab.test/open/app@" + whole.Manifest.String()},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := d.pullImage(t.Context(), c.image, c.o)
			var pe *PullError
			if c.code == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.As(err, &pe) || pe.Code != c.code || pe.Next == "" {
				t.Fatalf("%+v", err)
			}
			for _, want := range c.says {
				if !strings.Contains(pe.Error()+"; "+pe.Next, want) {
					t.Errorf("%q, %q does not say %q", pe.Error(), pe.Next, want)
				}
			}
		})
	}
}

func TestWhoLeavesAPullEndsItsDownloadAndTheNextGoesOn(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	layer := random(1, 20<<20)
	image := r.Image("team/app", "v1", layer)
	ended := make(chan struct{})
	var once sync.Once
	var whole atomic.Bool
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if whole.Load() || !strings.HasSuffix(req.URL.Path, image.Layers[0].String()) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
		w.Write(layer[:10<<20])
		http.NewResponseController(w).Flush()
		<-req.Context().Done() // no more comes, until tarn hangs up
		once.Do(func() { close(ended) })
		panic(http.ErrAbortHandler)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	half10 := func(o PulledObject) {
		if o.Kind == "layer" && o.Bytes >= 9<<20 {
			cancel()
		}
	}
	cost, err := d.pullImage(ctx, "lab.test/team/app:v1", PullOptions{Report: half10})
	var pe *PullError
	if !errors.As(err, &pe) || pe.Code != "canceled" || cost.FetchedBytes < 9<<20 {
		t.Fatalf("%+v, %+v", cost, err)
	}
	select {
	case <-ended:
	case <-time.After(5 * time.Second): // one that brings nothing is given up after 10
		t.Fatal("the download goes on")
	}
	eventually(t, "the download is parked", func() bool {
		s := d.cache.Stats()
		return s.Flights == 0 && s.Parked == 1
	})
	whole.Store(true)
	r.Reset()
	rest, err := d.pullImage(t.Context(), "lab.test/team/app:v1", PullOptions{})
	if err != nil || rest.HereBytes < 9<<20 || rest.FetchedBytes > 11<<20+1000 || !d.holds(image) {
		t.Errorf("%+v, %v", rest, err)
	}
	for _, e := range r.Exchanges() {
		if strings.HasSuffix(e.Path, image.Layers[0].String()) && (e.Range == "" || strings.HasPrefix(e.Range, "bytes=0-")) {
			t.Errorf("it was asked for from the start: %+v", e)
		}
	}
}

// TestAPullThatIsLeftTakesNothingFromAClient: who reads the same object has it whole.
func TestAPullThatIsLeftTakesNothingFromAClient(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	layer := random(1, 8<<20)
	image := r.Image("team/app", "v1", layer)
	goOn := make(chan struct{})
	var first sync.Once
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.HasSuffix(req.URL.Path, image.Layers[0].String()) {
			return false
		}
		held := false
		first.Do(func() { held = true })
		if !held {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
		w.Write(layer[:4<<20])
		http.NewResponseController(w).Flush()
		select {
		case <-req.Context().Done():
		case <-goOn:
		}
		panic(http.ErrAbortHandler)
	}
	defer close(goOn)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pulled := make(chan error, 1)
	go func() {
		_, err := d.pullImage(ctx, "lab.test/team/app:v1", PullOptions{})
		pulled <- err
	}()
	key := cache.Key{Domain: cache.ListedDomain, Digest: image.Layers[0]}
	downloading := func(readers int) bool {
		for _, p := range d.cache.Progress() {
			if p.Key == key && p.Here > 0 && p.Readers >= readers {
				return true
			}
		}
		return false
	}
	eventually(t, "the pull has begun", func() bool { return downloading(1) })
	got := make(chan answer, 1)
	go func() { got <- d.get(blobPath("team/app", image.Layers[0])) }()
	eventually(t, "a client has joined", func() bool { return downloading(2) })
	cancel()
	if err := <-pulled; err == nil {
		t.Error("the pull did not end")
	}
	(<-got).mustBe(t, layer)
}

// TestAPullThatTheDiskDoesNotTakeIsAnError, while a client would have the bytes all the same.
func TestAPullThatTheDiskDoesNotTakeIsAnError(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, maxSize: 16 << 20})
	kept := r.Image("team/app", "kept", random(1, 8<<20))
	r.Image("team/app", "v1", random(2, 12<<20))
	if _, err := d.pullImage(t.Context(), "lab.test/team/app:kept", PullOptions{}); err != nil {
		t.Fatal(err)
	}
	// Who reads it keeps it from making room.
	reader, err := d.cache.Open(t.Context(), cache.Request{Key: cache.Key{Domain: cache.ListedDomain, Digest: kept.Layers[0]}, Authorised: true, Fetch: notNow})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	_, err = d.pullImage(t.Context(), "lab.test/team/app:v1", PullOptions{})
	var pe *PullError
	if !errors.As(err, &pe) || pe.Code != "not_stored" || !strings.Contains(pe.Error(), "no room") {
		t.Errorf("%v", err)
	}
}

// TestAPullOfThousandsOfManifestsEndsEarly: what each of them leads to is in memory until
// all are read, and an index may have ten thousand that have as many layers each.
func TestAPullOfThousandsOfManifestsEndsEarly(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	const layers, manifests = 1500, 20
	ix := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	for i := range manifests {
		m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
		for j := range layers {
			m.Layers = append(m.Layers, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromString(fmt.Sprint(i, j)), Size: 1})
		}
		body, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		ix.Manifests = append(ix.Manifests, v1.Descriptor{MediaType: m.MediaType, Digest: r.Manifest("app", "", m.MediaType, body), Size: int64(len(body)), Platform: &v1.Platform{OS: "linux", Architecture: "mips"}})
	}
	body, err := json.Marshal(ix)
	if err != nil {
		t.Fatal(err)
	}
	r.Manifest("app", "v1", ix.MediaType, body)
	_, err = d.pullImage(t.Context(), "lab.test/app:v1", PullOptions{Platforms: []string{"linux/mips"}})
	var said *PullError
	if !errors.As(err, &said) || said.Code != "invalid_image" || !strings.Contains(err.Error(), "more than 4096 objects") {
		t.Error(err)
	}
	if n := r.Count("GET", "/manifests/sha256:"); n > 2+maxPulled/layers {
		t.Errorf("%d manifests were fetched", n)
	}
}
