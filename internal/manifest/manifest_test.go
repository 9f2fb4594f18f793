// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

const (
	imageType = "application/vnd.oci.image.manifest.v1+json"
	layerType = "application/vnd.oci.image.layer.v1.tar+gzip"
)

var (
	d1 = digest.FromString("one")
	d2 = digest.FromString("two")
	d3 = digest.SHA512.FromString("three")
)

func TestAManifestSaysWhatItLeadsTo(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 300)
	for name, c := range map[string]struct {
		body string
		want Manifest
	}{
		"an image": {
			fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"digest":%q,"size":3},"layers":[{"mediaType":%q,"digest":%q,"size":5,"annotations":{"a":"b"}}],"subject":{"digest":%q}}`, imageType, d1, layerType, d2, d3),
			Manifest{MediaType: imageType, HasConfig: true, HasLayers: true, Config: Descriptor{Digest: d1, Size: 3}, Layers: []Descriptor{{Digest: d2, Size: 5}}},
		},
		"an index": {
			fmt.Sprintf(`{"manifests":[{"digest":%q,"size":1,"platform":{"os":"linux","architecture":"arm64","variant":"v8"}},{"digest":%q,"size":2}]}`, d1, d3),
			Manifest{HasManifests: true, Manifests: []Descriptor{{Digest: d1, Size: 1, Platform: &Platform{"linux", "arm64", "v8"}}, {Digest: d3, Size: 2}}},
		},
		"fields without anything":     {`{"manifests":null,"layers":[],"config":null}`, Manifest{HasLayers: true}},
		"a field that comes twice":    {fmt.Sprintf(`{"layers":[{"digest":%q}],"layers":[{"digest":%q}]}`, d1, d2), Manifest{HasLayers: true, Layers: []Descriptor{{Digest: d2}}}},
		"what cannot be a blob's":     {fmt.Sprintf(`{"layers":[{"digest":"sha256:../../etc"},{"digest":%q,"size":-1},{"digest":%q}]}`, d1, d2), Manifest{HasLayers: true, Layers: []Descriptor{{Digest: d2}}}},
		"no list":                     {`{"layers":{"a":1}}`, Manifest{HasLayers: true, Truncated: true}},
		"no descriptors":              {fmt.Sprintf(`{"config":{"digest":%q},"layers":[0,0]}`, d1), Manifest{HasConfig: true, HasLayers: true, Truncated: true}},
		"a layer of no media type":    {fmt.Sprintf(`{"layers":[{"mediaType":"%s/x","digest":%q}]}`, long, d2), Manifest{HasLayers: true, Layers: []Descriptor{{Digest: d2}}}},
		"a platform that has no name": {fmt.Sprintf(`{"manifests":[{"digest":%q,"platform":{"os":%q}}]}`, d1, long), Manifest{HasManifests: true, Manifests: []Descriptor{{Digest: d1, Platform: &Platform{OS: long[:maxPlatformPart]}}}}},
		"something else":              {`{"a":1}`, Manifest{}},
	} {
		if got, err := Parse([]byte(c.body)); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func TestWhatIsNoManifestIsAnError(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]error{
		"":                             errNotJSON,
		"[]":                           errNotJSON,
		`{"layers":[`:                  errNotJSON,
		`{"mediaType":5}`:              errMediaType,
		`{"mediaType":"x"}`:            errMediaType,
		`{"mediaType":"a/b; c=d"}`:     errMediaType,
		`{"mediaType":"a/\u001b[31m"}`: errMediaType,
		`{"mediaType":"a/` + strings.Repeat("b", maxMediaType) + `"}`: errMediaType,
		`{"a":"` + strings.Repeat("b", MaxSize) + `"}`:                errNotJSON,
	} {
		if m, err := Parse([]byte(body)); !errors.Is(err, want) || !reflect.DeepEqual(m, Manifest{}) {
			t.Errorf("%.40q: %v", body, err)
		}
	}
	if m, err := Parse([]byte(`{"mediaType":"a/` + strings.Repeat("b", maxMediaType-2) + `"}`)); err != nil || len(m.MediaType) != maxMediaType {
		t.Errorf("the longest one: %v", err)
	}
}

// TestAManifestBeyondTheBoundLeadsToNothing, and a part of it to no less.
func TestAManifestBeyondTheBoundLeadsToNothing(t *testing.T) {
	t.Parallel()
	layers := func(n int) []byte {
		one := fmt.Sprintf(`{"digest":%q},`, d1)
		return []byte(`{"config":` + strings.TrimSuffix(one, ",") + `,"layers":[` + strings.TrimSuffix(strings.Repeat(one, n), ",") + `]}`)
	}
	if m, err := Parse(layers(MaxDescriptors - 1)); err != nil || m.Truncated || len(m.Layers) != MaxDescriptors-1 || len(m.Descriptors()) != 1 {
		t.Errorf("as many as there may be: %d, %v, %v", len(m.Layers), m.Truncated, err)
	}
	if m, err := Parse(layers(MaxDescriptors)); err != nil || !m.Truncated || m.Descriptors() != nil || !m.HasLayers {
		t.Errorf("one more: %d, %v, %v", len(m.Layers), m.Truncated, err)
	}
}

func TestAConfigSaysWhatItRunsOn(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 300)
	for config, want := range map[string]Platform{
		`{"os":"linux","architecture":"arm","variant":"v7","rootfs":{}}`: {"linux", "arm", "v7"},
		`{"os":"` + long + `"}`: {OS: long[:maxPlatformPart]},
		`{"os":5}`:              {},
		`{"layers":[]}`:         {},
		`[`:                     {},
	} {
		if got := ParsePlatform([]byte(config)); got != want {
			t.Errorf("%s: %+v", config, got)
		}
	}
}

// hostile are bodies of the largest size that are made to cost much.
func hostile() map[string][]byte {
	fill := func(begin, piece, end string) []byte {
		n := (MaxSize - len(begin) - len(end)) / len(piece)
		return []byte(begin + strings.TrimSuffix(strings.Repeat(piece, n), ",") + end)
	}
	return map[string][]byte{
		"zeros":              fill(`{"layers":[`, `0,`, `]}`),
		"empty objects":      fill(`{"layers":[`, `{},`, `]}`),
		"lists of them":      fill(`{"a":1,`, `"layers":[{},{},{},{},{},{},{},{}],`, `}`),
		"empty lists":        fill(`{"a":1,`, `"layers":[],`, `}`),
		"a media type":       fill(`{"mediaType":"a/`, `b`, `"}`),
		"a descriptor's":     fill(`{"layers":[{"digest":"`+d1.String()+`","mediaType":"a/`, `b`, `"}]}`),
		"a digest":           fill(`{"layers":[{"digest":"sha256:`, `b`, `"}]}`),
		"annotations":        fill(`{"layers":[{"annotations":{"a":"a"`, `,"a":"b"`, `}}]}`),
		"nesting":            fill(`{"layers":[`, `[`, ``),
		"unknown fields":     fill(`{"layers":[{"a":1`, `,"b":2`, `}]}`),
		"a platform's parts": fill(`{"manifests":[{"digest":"`+d1.String()+`","platform":{"os":"`, `b`, `"}}]}`),
	}
}

func TestReadingAHostileManifestTakesLittleMemory(t *testing.T) {
	for name, body := range hostile() {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		m, err := Parse(body)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 6*MaxSize {
			t.Errorf("%s: %d bytes were allocated", name, n)
		}
		for range 2 {
			runtime.GC()
		}
		runtime.ReadMemStats(&after)
		if n := int64(after.HeapAlloc) - int64(before.HeapAlloc); n > 1<<20 {
			t.Errorf("%s: %d bytes are kept", name, n)
		}
		runtime.KeepAlive(m)
		t.Log(name, m.Truncated, err)
	}
}

func TestOnlyWhatBeginsLikeAManifestIsLookedAtAsOne(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]bool{
		`{"schemaVersion":2,`:                       true,
		"\n\t{ \"mediaType\" : \"":                  true,
		`{"x":{"schemaVersion":[1]},"manifests":[{`: true,
		`{"ANNOTATIONS":{`:                          true,
		`{"x":{"schemaVersion":2},"y":`:             false,
		`{"x":"layers","y":["config"],`:             false,
		`{"x":{"layers":`:                           false,
		`{"architecture":"amd64","os":"linux"}`:     false,
		`{}`:                                        false,
		`["config"]`:                                false,
		`"config"`:                                  false,
		"\x1f\x8b":                                  false,
		"":                                          false,
	} {
		if got := Looks([]byte(body), 1000); got != want {
			t.Errorf("%q: %v", body, got)
		}
	}
	if manifest := []byte(`{"schemaVersion":2,`); Looks(manifest, MaxSize+1) || !Looks(manifest, MaxSize) {
		t.Error("its size makes no difference")
	}
}

// FuzzParse: whatever the body, what comes out is within the bounds, and the same
// for the same bytes in another order of spaces.
func FuzzParse(f *testing.F) {
	f.Add([]byte(fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"digest":%q,"size":3},"layers":[{"digest":%q,"size":5}]}`, imageType, d1, d2)))
	f.Add([]byte(fmt.Sprintf(`{"manifests":[{"digest":%q,"platform":{"os":"linux","architecture":"amd64"}}]}`, d3)))
	f.Add([]byte(`{"layers":[0,{}],"config":[]}`))
	f.Add([]byte(`{"mediaType":"a/b","mediaType":5}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		m, err := Parse(body)
		if err != nil {
			if !reflect.DeepEqual(m, Manifest{}) || !errors.Is(err, errNotJSON) && !errors.Is(err, errMediaType) {
				t.Fatalf("%+v, %v", m, err)
			}
			return
		}
		if m.MediaType != "" && !ValidMediaType(m.MediaType) {
			t.Errorf("media type %q", m.MediaType)
		}
		all := m.Descriptors()
		if len(all) > MaxDescriptors || m.Truncated && all != nil {
			t.Errorf("%d descriptors, truncated %v", len(all), m.Truncated)
		}
		for _, d := range all {
			if d.Digest.Validate() != nil || d.Size < 0 {
				t.Errorf("%+v", d)
			}
		}
		spaced := append([]byte("\n "), body...)
		if again, err := Parse(append(bytes.Clone(spaced), ' ')); len(spaced) < MaxSize && (err != nil || !reflect.DeepEqual(again, m)) {
			t.Errorf("%+v, and with spaces %+v, %v", m, again, err)
		}
		Looks(body[:min(len(body), Prefix)], int64(len(body)))
	})
}
