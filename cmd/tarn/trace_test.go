// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tarn/internal/evictsim"
	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// published has the objects of a trace in a registry.
type published struct {
	trace  *evictsim.Trace
	paths  []string // by object
	bodies [][]byte
}

// publish makes real images of the trace's, and has each object's size be what
// its file takes on disk.
func publish(t *testing.T, r *registrytest.Registry, tr *evictsim.Trace) *published {
	const block = 4096
	p := &published{trace: tr, paths: make([]string, len(tr.Objects)), bodies: make([][]byte, len(tr.Objects))}
	random := rand.NewChaCha8([32]byte{5})
	for i := range tr.Objects { // children come first
		o := &tr.Objects[i]
		var body []byte
		switch {
		case o.Children == nil:
			body = make([]byte, o.Size)
			random.Read(body)
			p.paths[i] = "blobs/" + r.Blob("app", body).String()
		default:
			var m struct {
				specs.Versioned
				MediaType string          `json:"mediaType"`
				Config    *v1.Descriptor  `json:"config,omitempty"`
				Layers    []v1.Descriptor `json:"layers,omitempty"`
				Manifests []v1.Descriptor `json:"manifests,omitempty"`
			}
			m.SchemaVersion = 2
			m.MediaType = v1.MediaTypeImageManifest
			for n, c := range o.Children {
				child := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(p.bodies[c]), Size: int64(len(p.bodies[c]))}
				switch {
				case tr.Objects[c].Children != nil:
					m.MediaType, child.MediaType = v1.MediaTypeImageIndex, v1.MediaTypeImageManifest
					m.Manifests = append(m.Manifests, child)
				case n == 0:
					child.MediaType = v1.MediaTypeImageConfig
					m.Config = &child
				default:
					m.Layers = append(m.Layers, child)
				}
			}
			var err error
			if body, err = json.Marshal(m); err != nil {
				t.Fatal(err)
			}
			p.paths[i] = "manifests/" + r.Manifest("app", "", m.MediaType, body).String()
		}
		p.bodies[i] = body
		o.Size = (int64(len(body)) + block - 1) / block * block
	}
	return p
}

// TestTheProgramEvictsAsTheSimulatorSays plays the trace of popular images to a
// tarn with room for 30 % of them.
func TestTheProgramEvictsAsTheSimulatorSays(t *testing.T) {
	if testing.Short() {
		t.Skip("says nothing under -race")
	}
	t.Parallel()
	const pulls, scale = 2500, 150
	r := registrytest.New(t)
	p := publish(t, r, evictsim.Zipf(pulls, scale))
	dir := t.TempDir()
	maxSize := p.trace.WorkingSet()*3/10 + 2<<20
	tarn := run(t, dir, "--upstream", "lab.test="+r.URL, "--max-size", fmt.Sprint(maxSize))
	var got evictsim.Result
	ask := func(object int, reference string) {
		req, err := http.NewRequest("GET", tarn.url+"/v2/app/"+reference+"?ns=lab.test", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", v1.MediaTypeImageIndex+", "+v1.MediaTypeImageManifest)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		n, err := io.Copy(io.Discard, resp.Body)
		if err != nil || resp.StatusCode != 200 || n != int64(len(p.bodies[object])) {
			t.Fatalf("%s: %s and %d bytes: %v", reference, resp.Status, n, err)
		}
		size := p.trace.Objects[object].Size
		got.Requests++
		got.Bytes += size
		if said := resp.Header.Get("Cache-Status"); strings.Contains(said, "hit") || strings.Contains(said, "confirmed") {
			got.Hits++
			got.BytesHit += size
		}
	}
	named := 0
	for i, e := range p.trace.Events {
		switch {
		case e.Tag > 0:
			r.Tag("app", fmt.Sprint("t", e.Tag), digest.FromBytes(p.bodies[e.Object]))
			named = e.Tag
		case named > 0:
			ask(e.Object, fmt.Sprint("manifests/t", named))
			named = 0
		default:
			ask(e.Object, p.paths[e.Object])
		}
		if i%1000 == 0 {
			r.Reset()
		}
	}
	var s struct {
		Cache struct {
			UsedBytes int64
			Evicted   struct{ Objects int64 }
		}
	}
	fetchJSON(t, tarn.admin+"/api/v1/status", &s)
	// The simulator has no index, which grows.
	blobs, err := taken(dir)
	if err != nil {
		t.Fatal(err)
	}
	room := maxSize - (s.Cache.UsedBytes - blobs)
	want := evictsim.Run(p.trace, evictsim.NewTarn(room), room)
	lru := evictsim.Run(p.trace, evictsim.NewLRU(room), room)
	t.Logf("%d pulls of %d MB into %d MB, %d objects evicted: %.4f of the bytes and %.4f of the requests; the simulator says %.4f and %.4f, of LRU %.4f and %.4f",
		pulls, p.trace.WorkingSet()>>20, room>>20, s.Cache.Evicted.Objects, got.ByteHitRatio(), got.HitRatio(), want.ByteHitRatio(), want.HitRatio(), lru.ByteHitRatio(), lru.HitRatio())
	for what, of := range map[string]func(evictsim.Result) float64{"bytes": evictsim.Result.ByteHitRatio, "requests": evictsim.Result.HitRatio} {
		if off := math.Abs(of(got) - of(want)); off > 0.02 {
			t.Errorf("of the %s, that is %.1f percentage points off", what, 100*off)
		}
	}
	if got.HitRatio() < lru.HitRatio()+0.05 { // of bytes, LRU is too near here
		t.Error("LRU would have done as well")
	}
}

// taken is what the blobs take on disk.
func taken(dir string) (n int64, err error) {
	entries, err := os.ReadDir(filepath.Join(dir, "blobs", "sha256"))
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			return 0, err
		}
		n += info.Sys().(*syscall.Stat_t).Blocks * 512
	}
	return n, err
}
