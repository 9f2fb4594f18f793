// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	pictures "image"
	"image/color"
	"image/png"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// limitLink lets so many bytes of an object a second through to tarn, until it is stopped.
func limitLink(t *testing.T, r *registry, object v1.Descriptor, perSecond int64) (stop func()) {
	t.Helper()
	v, done := holdBack(r, object, 0), make(chan struct{})
	tick := time.NewTicker(10 * time.Millisecond)
	go func() { // ends with stop
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				v.open(perSecond / 100)
			}
		}
	}()
	return func() { close(done) }
}

// cpu is the time that a process has taken of all cores.
func (p *process) cpu(t *testing.T) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, fields, _ := bytes.Cut(b, []byte(") ")) // proc(5): utime and stime, in hundredths of a second
	var ticks [2]int64
	for i := range ticks {
		if _, err := fmt.Sscan(string(bytes.Fields(fields)[11+i]), &ticks[i]); err != nil {
			t.Fatal(err)
		}
	}
	return time.Duration(ticks[0]+ticks[1]) * 10 * time.Millisecond
}

// TestThePageCostsAPullNothing compares pulls over a limited link with the page open,
// and without, in turns. TARN_E2E_PAGE_COST has it pull a gibibyte five times each.
func TestThePageCostsAPullNothing(t *testing.T) {
	length, seconds, rounds, most := int64(64<<20), int64(4), 1, 0.2 // of a core: a small machine has other things to do
	if os.Getenv("TARN_E2E_PAGE_COST") != "" {
		length, seconds, rounds, most = 1<<30, 10, 5, 0.02
	}
	r := newRegistry(t, nil)
	tarn := startTarn(t, folder(t, work(), "data"), "")
	seed := byte(0)
	pull := func() (took, spent time.Duration) {
		seed++
		content := make([]byte, length)
		rand.NewChaCha8([32]byte{seed}).Read(content)
		object := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(content), Size: length}
		push(t, repository(t, "app"), object, content)
		stop := limitLink(t, r, object, length/seconds)
		defer stop()
		began, before := time.Now(), tarn.cpu(t)
		if _, err := get("app", object); err != nil {
			t.Error(err)
		}
		return time.Since(began), tarn.cpu(t) - before
	}
	share := func(took, spent time.Duration) float64 { return spent.Seconds() / took.Seconds() }
	var without, with []float64
	for range rounds {
		took, spent := pull()
		without = append(without, share(took, spent))
		t.Logf("without the page: %.2f s, %.2f s of processor time, %.1f%% of a core", took.Seconds(), spent.Seconds(), 100*share(took, spent))
		look(t, "cost.mjs", nil, map[string]func(){"pull": func() {
			took, spent = pull()
			with = append(with, share(took, spent))
			t.Logf("with the page:    %.2f s, %.2f s of processor time, %.1f%% of a core", took.Seconds(), spent.Seconds(), 100*share(took, spent))
		}})
	}
	if len(with) != len(without) {
		t.FailNow() // and the script has said why
	}
	// The lowest of each: what else runs on the machine only adds.
	extra := slices.Min(with) - slices.Min(without)
	t.Logf("the page costs tarn %.1f%% of a core", 100*extra)
	if extra > most {
		t.Errorf("that is more than %.1f%%", 100*most)
	}
}

// TestThePictureInTheDocs is made where TARN_E2E_PAGE_PICTURE names its file.
func TestThePictureInTheDocs(t *testing.T) {
	file := os.Getenv("TARN_E2E_PAGE_PICTURE")
	if file == "" {
		t.Skip("TARN_E2E_PAGE_PICTURE names no file")
	}
	r, dir := newRegistry(t, nil), folder(t, "/run", "tarn") // which nothing outlives, as all of /run
	startTarn(t, dir, "").stop(t)
	writeFile(t, filepath.Join(dir, "decisions.jsonl"), sums(t, time.Now()))
	startTarn(t, dir, "")
	r.quota("200;w=21600", "163;w=21600")
	c := ctr{startContainerd(t), "default"}
	for _, i := range [][2]string{{"web/shop", "1.4.2"}, {"team/payments", "v2"}, {"base/alpine", "3.22"}} {
		mustPull(t, c, pushSaying(t, i[0], i[1], i[0]).ref())
	}
	object := noise("model", 64<<20, 1)
	model := pushManifest(t, "data/model", "amd64", nil, object)
	model.tag = "2026-11"
	pushTag(t, model)
	v := holdBack(r, model.objects[2], 16<<20)
	done := make(chan error, 1)
	shot := filepath.Join(t.TempDir(), "page.png")
	look(t, "picture.mjs", []string{shot}, map[string]func(){
		"begin the pull": func() { go func() { done <- c.pull(t.Context(), model.ref()) }() },
		"let more come":  func() { v.open(32 << 20) },
		"let all come": func() {
			v.open(64 << 20)
			if err := <-done; err != nil {
				t.Error(err)
			}
		},
	})
	v.open(64 << 20) // also where the script failed
	small := paletted(t, shot)
	if len(small) > 150<<10 {
		t.Errorf("the picture has %d bytes", len(small))
	}
	writeFile(t, file, string(small))
}

// sums are those of a day of pulls, as tarn keeps them.
func sums(t *testing.T, now time.Time) string {
	t.Helper()
	var lines strings.Builder
	noise := rand.New(rand.NewChaCha8([32]byte{1}))
	for i := range 96 {
		start := now.Truncate(15 * time.Minute).Add(time.Duration(i-96) * 15 * time.Minute).UTC()
		day := math.Sin(math.Pi * float64(i) / 96)
		busy := int64(day*day*60+noise.Float64()*20) << 20
		line, err := json.Marshal(map[string]any{"sum": map[string]any{"start": start, "requests": i, "fromDiskBytes": 9 * busy, "fromRegistryBytes": busy / 2, "receivedBytes": busy / 2}})
		if err != nil {
			t.Fatal(err)
		}
		lines.Write(append(line, '\n'))
	}
	return lines.String()
}

// paletted is a picture with its 256 commonest colours only.
func paletted(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	full, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[color.Color]int{}
	bounds := full.Bounds()
	for y := range bounds.Dy() {
		for x := range bounds.Dx() {
			seen[full.At(x, y)]++
		}
	}
	common := slices.SortedFunc(maps.Keys(seen), func(a, b color.Color) int { return seen[b] - seen[a] })
	small := pictures.NewPaletted(bounds, common[:min(256, len(common))])
	nearest := map[color.Color]uint8{}
	for y := range bounds.Dy() {
		for x := range bounds.Dx() {
			c := full.At(x, y)
			n, known := nearest[c]
			if !known {
				n = uint8(small.Palette.Index(c))
				nearest[c] = n
			}
			small.SetColorIndex(x, y, n)
		}
	}
	var out bytes.Buffer
	encoder := png.Encoder{CompressionLevel: png.BestCompression}
	if err := encoder.Encode(&out, small); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
