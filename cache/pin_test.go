// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tarn/cache/store"
	"tarn/images"
	"tarn/index"
	"tarn/internal/manifest"
	"tarn/internal/regular"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestAPinReadsItsManifestsOnce, and not for each of its layers that comes.
func TestAPinReadsItsManifestsOnce(t *testing.T) {
	t.Parallel()
	var opened atomic.Int64
	c := withSteps(t, t.TempDir(), func(name string, do func() error) error {
		if name == "read blob" {
			opened.Add(1)
		}
		return do()
	})
	defer c.Close()
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"}); err != nil {
		t.Fatal(err)
	}
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest}
	var layers [][]byte
	for range 40 {
		layers = append(layers, randomBytes(1000))
		m.Layers = append(m.Layers, v1.Descriptor{Digest: digest.FromBytes(layers[len(layers)-1]), Size: 1000})
	}
	manifest, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	pullImage(t, c, "v1", 1, manifest)
	if err := c.store.Do(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	before := opened.Load()
	pullImage(t, c, "", 0, layers...)
	if n := opened.Load() - before; n > 4 {
		t.Errorf("%d files were opened to store %d", n, len(layers))
	}
	if err := c.store.Evict(1 << 40); err != nil {
		t.Fatal(err)
	}
	for i, l := range layers {
		if !c.has(l) {
			t.Errorf("layer %d was evicted", i)
		}
	}
}

// TestAPinOfImpossibleSizesIsRefused: what a manifest says of its layers is only said.
func TestAPinOfImpossibleSizesIsRefused(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 16<<20)
	defer c.Close()
	layer := func(name string, size int64) v1.Descriptor {
		return v1.Descriptor{Digest: digest.FromString(name), Size: size}
	}
	for i, layers := range [][]v1.Descriptor{
		{layer("a", math.MaxInt64)},
		{layer("a", math.MaxInt64), layer("b", math.MaxInt64), layer("c", 2)},
		{layer("a", math.MaxInt64-5000), layer("b", 5000)},
	} {
		body, err := json.Marshal(v1.Manifest{Config: layer("config", 10), Layers: layers})
		if err != nil {
			t.Fatal(err)
		}
		tag := fmt.Sprint("v", i)
		pullImage(t, c, tag, uint64(i+1), body)
		if _, err := c.images.Pin(images.Pin{Upstream: appKey.Upstream, Repository: appKey.Repository, Tag: tag}); !errors.Is(err, images.ErrPinsTooLarge) {
			t.Errorf("%d: pinned: %v", i, err)
		}
	}
	images := c.images.List()
	if len(images) != 3 {
		t.Fatal(len(images))
	}
	for _, i := range images {
		if i.TotalBytes < i.HereBytes {
			t.Errorf("%+v", i)
		}
	}
}

var appKey = index.RepositoryKey{Upstream: "lab.test", Repository: "app"}

// built is an image for two platforms, as a registry has it.
type built struct {
	index, manifest, other       []byte // other is the other platform's
	config                       []byte
	base, layer, otherLayer      []byte
	indexDigest, manifestDigest  digest.Digest
	layerDigest, otherLayerDigst digest.Digest
}

func buildImage(base []byte, size int) (b built) {
	describe := func(body []byte, p *v1.Platform) v1.Descriptor {
		return v1.Descriptor{MediaType: "x/y", Digest: digest.FromBytes(body), Size: int64(len(body)), Platform: p}
	}
	marshal := func(v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		return data
	}
	b.base, b.layer, b.otherLayer = base, randomBytes(size), randomBytes(size)
	b.config = marshal(v1.Image{Platform: v1.Platform{OS: "linux", Architecture: "amd64"}, Author: fmt.Sprint(size, b.layer[0])})
	b.manifest = marshal(v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: describe(b.config, nil), Layers: []v1.Descriptor{describe(base, nil), describe(b.layer, nil)}})
	b.other = marshal(v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: describe(b.config, nil), Layers: []v1.Descriptor{describe(base, nil), describe(b.otherLayer, nil)}})
	b.index = marshal(v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{
		describe(b.other, &v1.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}), describe(b.manifest, &v1.Platform{OS: "linux", Architecture: "amd64"}),
	}})
	b.indexDigest, b.manifestDigest = digest.FromBytes(b.index), digest.FromBytes(b.manifest)
	b.layerDigest, b.otherLayerDigst = digest.FromBytes(b.layer), digest.FromBytes(b.otherLayer)
	return b
}

// own is what a node of amd64 pulls of it.
func (b built) own() [][]byte { return [][]byte{b.index, b.manifest, b.config, b.base, b.layer} }

// pullImage gets these bodies, one after the other, and has the tag mean the index.
func pullImage(t *testing.T, c *Cache, tag string, sequence uint64, bodies ...[]byte) {
	t.Helper()
	for i, body := range bodies {
		req := parallelRequest(&origin{body: body}, "one")
		if body[0] == '{' {
			req.Check = func([]byte) error { return nil }
		}
		if got, err := readAll(c, req); err != nil || !bytes.Equal(got, body) {
			t.Fatalf("%d bytes: %v", len(got), err)
		}
		if i == 0 && tag != "" {
			c.NoteTag(appKey.TagKey(tag), index.Tag{Digest: digest.FromBytes(body), Sequence: sequence, Confirmed: time.Now()})
		}
	}
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
}

func evictOne(c *Cache, d digest.Digest) error {
	_, err := c.images.Evict(appKey, "", d)
	return err
}

func (c *Cache) has(body []byte) bool {
	_, ok := c.Has(Key{Domain: ListedDomain, Digest: digest.FromBytes(body)})
	return ok
}

// press has so many bytes pulled, by the MiB.
func press(t *testing.T, c *Cache, mib int) {
	t.Helper()
	for range mib {
		body := randomBytes(1 << 20)
		pullImage(t, c, "", 0, body)
	}
}

func TestAPinKeepsAnImageThroughEverything(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 8<<20)
	defer func() { c.Close() }()
	one := buildImage(randomBytes(300_000), 700_000)
	pin := images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1", Platforms: []string{"linux/amd64"}}
	if tree, err := c.images.Pin(pin); err != nil || tree.Total != 0 {
		t.Fatalf("%+v: %v", tree, err)
	}
	mustKeep := func(what string, bodies ...[]byte) {
		t.Helper()
		for i, body := range bodies {
			if !c.has(body) {
				t.Errorf("%s: object %d is gone", what, i)
			}
		}
	}
	pullImage(t, c, "v1", 1, one.own()...) // after the pin
	pullImage(t, c, "", 0, one.other, one.otherLayer)
	press(t, c, 20)
	mustKeep("under pressure", one.own()...)
	if c.has(one.otherLayer) {
		t.Error("another platform's layer is kept")
	}
	if images := c.images.List(); len(images) != 1 || !images[0].Pinned || images[0].Used.IsZero() || images[0].HereBytes != images[0].TotalBytes-int64(len(one.otherLayer)) || !slices.Contains(images[0].Platforms, "linux/amd64") {
		t.Errorf("%+v", images)
	}

	reopen := func(spoil func()) {
		t.Helper()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		spoil()
		c = openChaos(t, dir, 8<<20)
		settle(t, "the adopter", func() bool { return c.Stats().Adopting == 0 })
	}
	reopen(func() {})
	press(t, c, 10)
	mustKeep("after a restart", one.own()...)
	reopen(func() {
		if err := os.Truncate(filepath.Join(dir, "index.db"), 3000); err != nil {
			t.Fatal(err)
		}
	})
	press(t, c, 10)
	mustKeep("without an index", one.own()...)

	two := buildImage(one.base, 600_000)
	pullImage(t, c, "v1", 2, two.own()...)
	press(t, c, 10)
	mustKeep("after the tag moved", two.own()...)
	if c.has(one.layer) {
		t.Error("what the tag meant before is kept")
	}
	if err := c.images.Unpin(pin); err != nil {
		t.Fatal(err)
	}
	if err := c.images.Unpin(pin); !errors.Is(err, images.ErrNotPinned) {
		t.Error(err)
	}
	press(t, c, 20)
	if c.has(two.layer) {
		t.Error("what is not pinned any more is kept")
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

func TestPinsThatWouldNotFitAreRefused(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 8<<20)
	defer c.Close()
	small, large := buildImage(randomBytes(300_000), 700_000), buildImage(randomBytes(300_000), 4<<20)
	// Of the large one, the manifests say what it has; the layers are not here.
	pullImage(t, c, "small", 1, small.own()...)
	pullImage(t, c, "large", 1, large.index, large.manifest, large.other)
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "small"}); err != nil {
		t.Fatal(err)
	}
	all := images.Pin{Upstream: "lab.test", Repository: "app", Tag: "large"}
	if _, err := c.images.Pin(all); !errors.Is(err, images.ErrPinsTooLarge) {
		t.Errorf("%v", err)
	}
	if pins := c.images.Pins(); len(pins) != 1 {
		t.Errorf("%v", pins)
	}
	all.Platforms = []string{"linux/arm64"}
	if tree, err := c.images.Pin(all); err != nil || tree.Total < 4<<20 || tree.Here > 10_000 {
		t.Errorf("%+v: %v", tree, err)
	}
	// Under another name it is the same bytes.
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Digest: large.indexDigest, Platforms: []string{"linux/arm64"}}); err != nil {
		t.Error(err)
	}
}

func TestEvictingAnImageLeavesWhatOthersHave(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	one := buildImage(randomBytes(300_000), 700_000)
	two := buildImage(one.base, 600_000)
	pullImage(t, c, "v1", 1, one.own()...)
	pullImage(t, c, "v2", 1, two.own()...)
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.images.Evict(appKey, "v1", ""); !errors.Is(err, images.ErrPinned) {
		t.Error(err)
	}
	if err := c.images.Unpin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"}); err != nil {
		t.Fatal(err)
	}
	reading, err := c.Open(t.Context(), Request{Key: Key{Domain: ListedDomain, Digest: one.layerDigest}, Reader: "two", Authorised: true})
	if err != nil {
		t.Fatal(err)
	}
	used := c.Stats().UsedBytes
	e, err := c.images.Evict(appKey, "v1", "")
	if err != nil || e.Objects != 4 {
		t.Errorf("%+v: %v", e, err)
	}
	for i, body := range one.own() {
		if shared := i == 3; c.has(body) != shared {
			t.Errorf("object %d is there: %v", i, !shared)
		}
	}
	if now := c.Stats().UsedBytes; used-now >= int64(len(one.layer)) {
		t.Error("what is read does not count")
	}
	reading.Close()
	if now := c.Stats().UsedBytes; used-now < int64(len(one.layer)) {
		t.Error("what is read no more counts still")
	}
	for _, body := range two.own() {
		if !c.has(body) {
			t.Error("something of another image is gone")
		}
	}
	if _, err := c.images.Evict(appKey, "v1", ""); !errors.Is(err, images.ErrNotHere) {
		t.Error(err)
	}
	pullImage(t, c, "v1", 2, one.own()...) // and all is as before
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

func TestVerifyFindsWhatIsBadAndWhatIsMissing(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	var bodies [][]byte
	for i := range 10 {
		bodies = append(bodies, randomBytes(100_000+i))
	}
	pullImage(t, c, "", 0, bodies...)
	if err := flip(c.store.Path(digest.FromBytes(bodies[3])), bodies[3], 5); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(c.store.Path(digest.FromBytes(bodies[4]))); err != nil {
		t.Fatal(err)
	}
	reports := 0
	v, err := c.store.Verify(t.Context(), 0, func(store.Verification) { reports++ })
	if err != nil || !slices.Equal(v.Bad, []digest.Digest{digest.FromBytes(bodies[3])}) || !slices.Equal(v.Missing, []digest.Digest{digest.FromBytes(bodies[4])}) || v.Files != 10 || reports < 10 {
		t.Errorf("%+v, %d reports: %v", v, reports, err)
	}
	for i, body := range bodies {
		if c.has(body) == (i == 3 || i == 4) {
			t.Errorf("%d is there: %v", i, c.has(body))
		}
	}
	if v, err := c.store.Verify(t.Context(), 0, func(store.Verification) {}); err != nil || len(v.Bad)+len(v.Missing) > 0 || v.Files != 8 {
		t.Errorf("%+v: %v", v, err)
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

// TestDamagedPinsAreKept: what says something holds, and nothing is lost, however
// often it happens.
func TestDamagedPinsAreKept(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, store.PinsName)
	d := digest.FromString("x")
	sound := `{"upstream":"lab.test","repository":"app","tag":"v1","platforms":["linux/amd64"]}`
	var damaged []string
	for _, c := range []struct {
		text   string
		pinned int
		sound  bool
	}{
		{text: `[{"upstream":`}, {text: ``}, {text: "\x00\x00"}, {text: `null`}, {text: `{}`}, {text: `[` + sound + `] x`},
		{text: `[1, ` + sound + `]`, pinned: 1}, {text: `[null, ` + sound + `, {}]`, pinned: 1},
		{text: `[` + sound + `, {"upstream":"lab.test","repository":"app","tagg":"v1"}]`, pinned: 1},
		{text: `[` + sound + `, {"upstraem":"lab.test","repository":"app","tag":"v1"}]`, pinned: 1},
		{text: `[` + sound + `, {"upstream":"lab.test","repo":"app","tag":"v1"}]`, pinned: 1},
		{text: `[` + sound + `, {"upstream":"lab.test","repository":"app","digest":"sha256:zz"}]`, pinned: 1},
		{text: `[` + sound + `, {"upstream":"lab.test","repository":"app","tag":"v2","digest":"` + d.String() + `"}]`, pinned: 1},
		{text: `[` + sound + `, {"upstream":"lab.test","repository":"app","tag":"v2","platforms":[""]}]`, pinned: 1},
		{text: `[` + sound + `, {"upstream":"lab.test","repository":"app","digest":"` + d.String() + `"}]`, pinned: 2, sound: true},
		{text: `[]`, sound: true},
	} {
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if !c.sound {
			damaged = append(damaged, c.text)
		}
		for range 2 { // the second one finds what the first one wrote
			ca := openChaos(t, dir, 1<<30)
			if n := len(ca.images.Pins()); n != c.pinned {
				t.Errorf("%s: %d pins, not %d", c.text, n, c.pinned)
			}
			ca.Close()
		}
	}
	kept, err := filepath.Glob(path + ".broken" + "*")
	if err != nil || len(kept) != len(damaged) {
		t.Errorf("%d files are kept of %d: %v", len(kept), len(damaged), err)
	}
	for _, name := range kept {
		if text, err := os.ReadFile(name); err != nil || !slices.Contains(damaged, string(text)) {
			t.Errorf("%s says %q: %v", name, text, err)
		}
	}
}

// TestPinsThatCannotBeReadStay: a disk that does not give them just now is no
// reason to write that there are none.
func TestPinsThatCannotBeReadStay(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, store.PinsName)
	if err := os.Mkdir(path, 0o700); err != nil { // which no read gets anything of
		t.Fatal(err)
	}
	c := openChaos(t, dir, 1<<30)
	defer c.Close()
	p := images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"}
	if _, err := c.images.Pin(p); !errors.Is(err, regular.ErrNot) || !strings.Contains(err.Error(), "restart") {
		t.Error(err)
	}
	if n := len(c.images.Pins()); n != 0 {
		t.Errorf("%d pins are held that are written nowhere", n)
	}
	if err := c.images.Unpin(p); !errors.Is(err, regular.ErrNot) {
		t.Error(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || slices.ContainsFunc(entries, func(e os.DirEntry) bool { return strings.Contains(e.Name(), ".broken") }) {
		t.Errorf("%v: %v", entries, err)
	}
}

func TestWhatIsNoPinIsRefused(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	for _, p := range []images.Pin{
		{}, {Upstream: "lab.test", Repository: "app"}, {Upstream: "lab.test", Tag: "v1"},
		{Upstream: "lab.test", Repository: "app", Digest: "sha256:zz"},
		{Upstream: "lab.test", Repository: "app", Tag: "v1", Platforms: []string{"amd64"}},
		{Upstream: "lab.test", Repository: "app", Tag: "v1", Platforms: []string{"linux/arm64/v8/x"}},
		{Upstream: "lab.test", Repository: "app", Tag: "v1", Platforms: []string{"linux/"}},
	} {
		if _, err := c.images.Pin(p); !errors.Is(err, images.ErrNoPin) || len(c.images.Pins()) > 0 {
			t.Errorf("%+v: %v", p, err)
		}
	}
}

// TestNamesOfPlatformsArePrintable: a manifest says them, and they come to a terminal.
func TestNamesOfPlatformsArePrintable(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	b := buildImage(randomBytes(1000), 1000)
	ix, err := json.Marshal(v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{
		{Digest: b.manifestDigest, Size: int64(len(b.manifest)), Platform: &v1.Platform{OS: "linux", Architecture: "\x1b[2J\nfake", Variant: "\u202e"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	pullImage(t, c, "v1", 1, ix, b.manifest)
	images := c.images.List()
	if len(images) != 1 || !slices.Equal(images[0].Platforms, []string{"linux/?[2J?fake/?"}) {
		t.Errorf("%+v", images)
	}
}

// TestTheDirectoryIsAnImageLayout, without tarn's doing anything when it ends.
func TestTheDirectoryIsAnImageLayout(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<30)
	defer c.Close()
	one := buildImage(randomBytes(300_000), 700_000)
	listed := func(want map[string]digest.Digest) func() bool {
		return func() bool {
			data, err := os.ReadFile(filepath.Join(dir, "index.json"))
			var ix v1.Index
			if err != nil || json.Unmarshal(data, &ix) != nil || len(ix.Manifests) != len(want) {
				return false
			}
			for _, m := range ix.Manifests {
				if want[m.Annotations[v1.AnnotationRefName]] != m.Digest || m.MediaType != v1.MediaTypeImageIndex || m.Size != int64(len(one.index)) {
					return false
				}
			}
			return true
		}
	}
	settle(t, "an empty list", listed(nil))
	pullImage(t, c, "v1", 1, one.own()...)
	c.NoteTag(appKey.TagKey("v2"), index.Tag{Digest: one.indexDigest, Sequence: 1, Confirmed: time.Now()})
	settle(t, "the list", listed(map[string]digest.Digest{"lab.test/app:v1": one.indexDigest, "lab.test/app:v2": one.indexDigest}))
	if _, err := c.images.Evict(appKey, "v1", ""); err != nil {
		t.Fatal(err)
	}
	settle(t, "the list without it", listed(nil))
	var layout v1.ImageLayout
	if data, err := os.ReadFile(filepath.Join(dir, "oci-layout")); err != nil || json.Unmarshal(data, &layout) != nil || layout.Version != v1.ImageLayoutVersion {
		t.Errorf("%+v %v", layout, err)
	}
}

// TestEverythingThatChangesTheStoreAtOnce: readers, moving tags, pins, evictions by
// hand and verifying, with little room. In the end all is accounted for, and only
// pins hold anything.
func TestEverythingThatChangesTheStoreAtOnce(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 4<<20)
	defer c.Close()
	base := randomBytes(300_000)
	all := make([]built, 6)
	for i := range all {
		all[i] = buildImage(base, 700_000+i)
	}
	var sequence atomic.Uint64
	var busy sync.WaitGroup
	const rounds = 60
	many := func(n int, do func(r *rand.Rand)) {
		for who := range n {
			busy.Go(func() {
				r := rand.New(rand.NewPCG(uint64(who), 9))
				for range rounds {
					do(r)
				}
			})
		}
	}
	tag := func(r *rand.Rand) string { return fmt.Sprint("v", r.IntN(3)) }
	many(4, func(r *rand.Rand) {
		i := all[r.IntN(len(all))]
		key, n := appKey.TagKey(tag(r)), index.Tag{Digest: i.indexDigest, Sequence: sequence.Add(1), Confirmed: time.Now()}
		c.NoteTag(key, n)
		for _, body := range i.own() {
			req := parallelRequest(&origin{body: body}, "one")
			if body[0] == '{' {
				req.Check = func([]byte) error { return nil }
			}
			if got, err := readAll(c, req); err != nil || !bytes.Equal(got, body) {
				t.Errorf("%d bytes of %d: %v", len(got), len(body), err)
			}
			c.NoteTag(key, n)
		}
	})
	many(1, func(r *rand.Rand) {
		p := images.Pin{Upstream: "lab.test", Repository: "app", Tag: tag(r), Platforms: []string{"linux/amd64"}}
		if _, err := c.images.Pin(p); err != nil && !errors.Is(err, images.ErrPinsTooLarge) {
			t.Error(err)
		}
		p.Tag = tag(r)
		if err := c.images.Unpin(p); err != nil && !errors.Is(err, images.ErrNotPinned) {
			t.Error(err)
		}
	})
	many(1, func(r *rand.Rand) {
		if _, err := c.images.Evict(appKey, tag(r), ""); err != nil && !errors.Is(err, images.ErrNotHere) && !errors.Is(err, images.ErrPinned) {
			t.Error(err)
		}
		c.images.List()
	})
	many(1, func(*rand.Rand) {
		if v, err := c.store.Verify(t.Context(), 0, func(store.Verification) {}); err != nil || len(v.Bad)+len(v.Missing) > 0 {
			t.Errorf("%+v: %v", v, err)
		}
	})
	busy.Wait()
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	for _, p := range c.images.Pins() {
		if err := c.images.Unpin(p); err != nil {
			t.Error(err)
		}
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
	var rows int64
	c.Index().Objects(func(_ digest.Digest, o index.Object) { rows += o.Alloc })
	settle(t, "all holds", func() bool { return c.store.Evictable() == rows })
	if s := c.Stats(); s.UsedBytes+s.PendingBytes > s.MaxBytes || s.Trouble != "" && !strings.Contains(s.Trouble, "no room") {
		t.Errorf("%+v", s)
	}
	t.Logf("%+v", c.Stats())
}

// TestAPinKeepsLayersThatWereThereFirst, before the manifests that lead to them,
// under an index of an index.
func TestAPinKeepsLayersThatWereThereFirst(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 6<<20)
	defer c.Close()
	one := buildImage(randomBytes(300_000), 500_000)
	outer := fmt.Appendf(nil, `{"schemaVersion": 2, "manifests": [{"digest": %q, "size": %d, "mediaType": "x/y"}]}`, one.indexDigest, len(one.index))
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Digest: digest.FromBytes(outer), Platforms: []string{"linux/amd64"}}); err != nil {
		t.Fatal(err)
	}
	pullImage(t, c, "", 0, one.layer, one.base, one.config, one.manifest, one.index, outer)
	press(t, c, 15)
	for i, body := range append(one.own(), outer) {
		if !c.has(body) {
			t.Errorf("object %d is gone", i)
		}
	}
	if c.Stats().Evicted.Objects == 0 {
		t.Error("nothing had to go")
	}
}

// TestTheListFollowsATagThatAPinHasSeenFirst: pins are looked through again for
// other reasons, too.
func TestTheListFollowsATagThatAPinHasSeenFirst(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	one := buildImage(randomBytes(300_000), 700_000)
	pullImage(t, c, "v1", 1, one.own()...)
	listed := func(what string) func() bool {
		return func() bool {
			data, err := os.ReadFile(filepath.Join(c.store.Dir(), store.ListName))
			return err == nil && bytes.Contains(data, []byte(what))
		}
	}
	settle(t, "the list", listed("lab.test/app:v1"))
	c.NoteTag(appKey.TagKey("v2"), index.Tag{Digest: one.indexDigest, Sequence: 2, Confirmed: time.Now()})
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"}); err != nil {
		t.Fatal(err)
	}
	settle(t, "the list with both", listed("lab.test/app:v2"))
}

// TestTheListSaysWhatEachRegistryCallsAnImage: none has a say in what another's is.
func TestTheListSaysWhatEachRegistryCallsAnImage(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	b := buildImage(randomBytes(1000), 1000)
	foreign := index.RepositoryKey{Upstream: "a.test", Repository: "x"}
	types := map[string]string{"a.test/x:v1": "application/vnd.other+json", "lab.test/app:v1": v1.MediaTypeImageIndex}
	c.Index().NoteMembership(foreign.MembershipKey("manifests", b.indexDigest), index.Membership{Time: time.Now(), MediaType: types["a.test/x:v1"]})
	c.Index().NoteMembership(appKey.MembershipKey("manifests", b.indexDigest), index.Membership{Time: time.Now(), MediaType: types["lab.test/app:v1"]})
	pullImage(t, c, "v1", 1, b.own()...)
	c.NoteTag(foreign.TagKey("v1"), index.Tag{Digest: b.indexDigest, Sequence: 1, Confirmed: time.Now()})
	var list v1.Index
	settle(t, "the list", func() bool {
		data, err := os.ReadFile(filepath.Join(c.store.Dir(), store.ListName))
		return err == nil && json.Unmarshal(data, &list) == nil && len(list.Manifests) == len(types)
	})
	for _, d := range list.Manifests {
		if name := d.Annotations[v1.AnnotationRefName]; d.MediaType != types[name] {
			t.Errorf("%s is %s, not %s", name, d.MediaType, types[name])
		}
	}
}

// TestAPinHoldsWhileAManifestCannotBeRead: that it leads nowhere now says nothing.
func TestAPinHoldsWhileAManifestCannotBeRead(t *testing.T) {
	t.Parallel()
	for name, cause := range map[string]error{"no descriptors": syscall.EMFILE, "the disk": syscall.EIO} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var failing atomic.Bool
			c := withSteps(t, t.TempDir(), func(name string, do func() error) error {
				if name == "read blob" && failing.Load() {
					return cause
				}
				return do()
			})
			defer c.Close()
			one := buildImage(randomBytes(3000), 70_000)
			pullImage(t, c, "v1", 1, one.own()...)
			p := images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"}
			if _, err := c.images.Pin(p); err != nil {
				t.Fatal(err)
			}
			other := images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v2"}
			if _, err := c.images.Pin(other); err != nil {
				t.Fatal(err)
			}
			failing.Store(true)
			if err := errors.Join(c.images.Unpin(other), c.store.Evict(1<<40)); err != nil { // all pins are looked at
				t.Fatal(err)
			}
			if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Digest: one.indexDigest}); !errors.Is(err, cause) {
				t.Errorf("a pin of what cannot be read: %v", err)
			}
			failing.Store(false)
			for i, b := range one.own() {
				if !c.has(b) {
					t.Errorf("object %d of a pinned image was evicted", i)
				}
			}
			if err := c.images.Unpin(p); err != nil {
				t.Error(err)
			}
			if err := c.store.Evict(1 << 40); err != nil || c.has(one.layer) {
				t.Errorf("it is held for ever: %v", err)
			}
		})
	}
}

// TestAManifestThatCameAsABlobLeadsToItsLayers: whoever asks first may ask so.
func TestAManifestThatCameAsABlobLeadsToItsLayers(t *testing.T) {
	t.Parallel()
	for _, domain := range []string{ListedDomain, "unlisted.example"} {
		t.Run(domain, func(t *testing.T) {
			t.Parallel()
			c := openChaos(t, t.TempDir(), 1<<30)
			defer c.Close()
			one := buildImage(randomBytes(3000), 70_000)
			for _, m := range [][]byte{one.index, one.manifest} {
				r := parallelRequest(&origin{body: m}, "somebody")
				r.Domain = domain
				if _, err := readAll(c, r); err != nil {
					t.Fatal(err)
				}
			}
			settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
			pullImage(t, c, "v1", 1, one.own()...)
			if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1", Platforms: []string{"linux/amd64"}}); err != nil {
				t.Fatal(err)
			}
			if err := c.store.Evict(1 << 40); err != nil || !c.has(one.layer) {
				t.Errorf("a layer of what is pinned is gone: %v", err)
			}
		})
	}
}

// TestAPinHoldsWhatComesBack: a disk did not let go of the damaged one, and lost the next.
func TestAPinHoldsWhatComesBack(t *testing.T) {
	t.Parallel()
	var failing atomic.Value
	failing.Store("")
	c := withSteps(t, t.TempDir(), func(name string, do func() error) error {
		if name == failing.Load() {
			return syscall.EIO
		}
		return do()
	})
	defer c.Close()
	body := randomBytes(100_000)
	req := storedBy(t, c, &origin{body: body})
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Digest: req.Digest}); err != nil {
		t.Fatal(err)
	}
	if err := flip(c.store.Path(req.Digest), body, 100); err != nil {
		t.Fatal(err)
	}
	failing.Store("remove blob")
	if v, err := c.store.Verify(t.Context(), 0, func(store.Verification) {}); err != nil || len(v.Bad) != 1 {
		t.Fatal(v, err)
	}
	failing.Store("fsync directory")
	if _, err := readAll(c, parallelRequest(&origin{body: body}, "one")); err != nil {
		t.Fatal(err)
	}
	settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
	failing.Store("")
	storedBy(t, c, &origin{body: body})
	if err := landed(c); err != nil {
		t.Error(err)
	}
	if err := c.store.Evict(1 << 40); err != nil || !c.has(body) {
		t.Errorf("what is pinned was evicted: %v", err)
	}
}

// TestDamagedPinsThatCannotBeKeptAreNotWrittenOver.
func TestDamagedPinsThatCannotBeKeptAreNotWrittenOver(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, store.PinsName)
	const kept = 100 // of damaged files
	for n := range kept + 1 {
		name := path + ".broken"
		if n > 0 {
			name = fmt.Sprintf("%s.%d", name, n)
		}
		if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	damaged := []byte(`[{"upstream":"lab.test","repository":"app","tag":"v1"}, {"upst":1}]`)
	if err := os.WriteFile(path, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	c := openChaos(t, dir, 1<<30)
	defer c.Close()
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v2"}); !errors.Is(err, os.ErrExist) {
		t.Error(err)
	}
	c.Index().NoteTag(appKey.TagKey("v1"), index.Tag{Digest: digest.FromString("x"), Sequence: 1, Confirmed: time.Now()})
	c.images.TagMoved()
	if err := c.store.Housekeep(); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(path); err != nil || !bytes.Equal(text, damaged) {
		t.Errorf("%s: %v", text, err)
	}
}

// TestEvictingManyLayersIsOneTransaction: whoever waits for the disk waits for that.
func TestEvictingManyLayersIsOneTransaction(t *testing.T) {
	t.Parallel()
	var written atomic.Int64
	c := withSteps(t, t.TempDir(), func(name string, do func() error) error {
		if name == "write index" {
			written.Add(1)
		}
		return do()
	})
	defer c.Close()
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest}
	layers := make([][]byte, 40)
	for i := range layers {
		layers[i] = randomBytes(1000)
		m.Layers = append(m.Layers, v1.Descriptor{Digest: digest.FromBytes(layers[i]), Size: 1000})
	}
	manifest, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	pullImage(t, c, "v1", 1, append([][]byte{manifest}, layers...)...)
	if err := c.Index().Sync(); err != nil {
		t.Fatal(err)
	}
	before := written.Load()
	if e, err := c.images.Evict(appKey, "v1", ""); err != nil || e.Objects != 41 {
		t.Errorf("%+v: %v", e, err)
	}
	if n := written.Load() - before; n > 2 { // a tick may come in between
		t.Errorf("%d transactions", n)
	}
}

// TestAnImageOfAnIndexIsEvictedWithIt, and not alone.
func TestAnImageOfAnIndexIsEvictedWithIt(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	one := buildImage(randomBytes(3000), 7000)
	pullImage(t, c, "v1", 1, one.own()...)
	c.NoteTag(appKey.TagKey("v1-amd64"), index.Tag{Digest: one.manifestDigest, Sequence: 2, Confirmed: time.Now()})
	if e, err := c.images.Evict(appKey, "v1-amd64", ""); !errors.Is(err, images.ErrShared) || e.Objects != 0 || !c.has(one.manifest) {
		t.Errorf("%+v: %v", e, err)
	}
	if e, err := c.images.Evict(appKey, "v1", ""); err != nil || e.Objects != 1 || !c.has(one.layer) {
		t.Errorf("the index: %+v: %v", e, err)
	}
	if e, err := c.images.Evict(appKey, "v1-amd64", ""); err != nil || e.Objects != 4 {
		t.Errorf("and then alone: %+v: %v", e, err)
	}
}

// TestV8IsWhatArm64Is without a variant, either way.
func TestV8IsWhatArm64Is(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	one := buildImage(randomBytes(3000), 7000) // says linux/arm64/v8
	plain, err := json.Marshal(v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{
		{Digest: digest.FromBytes(one.other), Size: int64(len(one.other)), Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	pullImage(t, c, "v8", 1, one.index, one.other, one.otherLayer)
	pullImage(t, c, "plain", 1, plain)
	for _, tag := range []string{"v8", "plain"} {
		for _, platform := range []string{"linux/arm64", "linux/arm64/v8"} {
			p := images.Pin{Upstream: "lab.test", Repository: "app", Tag: tag, Platforms: []string{platform}}
			if tree, err := c.images.Pin(p); err != nil || tree.Here < int64(len(one.other)+len(one.otherLayer)) {
				t.Errorf("%s is not %s: %+v, %v", tag, platform, tree, err)
			}
			if err := c.images.Unpin(p); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestVerifyEndsWithTheCache.
func TestVerifyEndsWithTheCache(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	const files = 12 // it may be at the next ones before it hears of the end
	for range files {
		storedBy(t, c, &origin{body: randomBytes(1 << 20)})
	}
	closed := make(chan error, 1)
	v, err := c.store.Verify(t.Context(), 0, func(v store.Verification) {
		if v.Files == 1 && v.Bytes == 1<<20 {
			go func() { closed <- c.Close() }()
			<-c.flights.Closing()
		}
	})
	if !errors.Is(err, store.ErrClosed) || v.Files >= files {
		t.Errorf("%+v: %v", v, err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// TestPinsOverALowerBoundCanBeRemoved, one after the other, and until then the disk's
// trouble says so.
func TestPinsOverALowerBoundCanBeRemoved(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 64<<20)
	var pins []images.Pin
	for i := range 4 {
		tag := fmt.Sprint("v", i)
		pullImage(t, c, tag, uint64(i+1), buildImage(randomBytes(900_000), 900_000).own()...)
		pins = append(pins, images.Pin{Upstream: "lab.test", Repository: "app", Tag: tag})
		if _, err := c.images.Pin(pins[i]); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	const bound = 3 << 20
	c = openChaos(t, dir, bound)
	defer c.Close()
	settle(t, "trouble", func() bool { return strings.Contains(c.Stats().Trouble, "pinned") })
	if list, err := os.ReadFile(filepath.Join(dir, store.ListName)); err != nil || bytes.Count(list, []byte(":v")) != len(pins) {
		t.Errorf("%s: %v", list, err)
	}
	for _, p := range pins {
		if err := c.images.Unpin(p); err != nil {
			t.Error(err)
		}
	}
	settle(t, "the bound", func() bool { return directory(dir) <= bound })
	if err := c.store.Do(func() error { return nil }); err != nil { // files go before they are counted off
		t.Error(err)
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
}

// TestUnpinningIsDoneWhenItCannotBeWritten, and written when it can.
func TestUnpinningIsDoneWhenItCannotBeWritten(t *testing.T) {
	t.Parallel()
	var failing atomic.Bool
	dir := t.TempDir()
	c := withSteps(t, dir, func(name string, do func() error) error {
		if failing.Load() && name == "write pins" {
			return syscall.ENOSPC
		}
		return do()
	})
	defer c.Close()
	one := buildImage(randomBytes(1000), 70_000)
	pullImage(t, c, "v1", 1, one.own()...)
	p := images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"}
	if _, err := c.images.Pin(p); err != nil {
		t.Fatal(err)
	}
	failing.Store(true)
	if err := c.images.Unpin(p); !errors.Is(err, syscall.ENOSPC) || len(c.images.Pins()) != 0 {
		t.Errorf("%v: %v", c.images.Pins(), err)
	}
	if err := c.store.Evict(1 << 40); err != nil || c.has(one.layer) {
		t.Errorf("it is held still: %v", err)
	}
	failing.Store(false)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(dir, store.PinsName)); err != nil || string(text) != "[]" {
		t.Errorf("%s: %v", text, err)
	}
}

// TestRoomForDamagedPinsIsNotMadeOfPins: of a full store, what is pinned would go first,
// since its tag has moved.
func TestRoomForDamagedPinsIsNotMadeOfPins(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 64<<20)
	one := buildImage(randomBytes(300_000), 700_000)
	pullImage(t, c, "v1", 1, one.own()...)
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Digest: one.indexDigest}); err != nil {
		t.Fatal(err)
	}
	pullImage(t, c, "v1", 2, buildImage(randomBytes(300_000), 700_000).own()...)
	press(t, c, 10)
	full := c.Stats().UsedBytes
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, store.PinsName)
	text, err := os.ReadFile(path)
	if err == nil {
		text = append(bytes.Replace(text, []byte("["), []byte(`[{"upstream": 1},`), 1), bytes.Repeat([]byte(" "), 100_000)...)
		err = os.WriteFile(path, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	c = openChaos(t, dir, full)
	defer c.Close()
	for i, b := range one.own() {
		if !c.has(b) {
			t.Errorf("object %d of what is pinned was evicted", i)
		}
	}
	if len(c.images.Pins()) != 1 || c.Stats().Evicted.Objects == 0 {
		t.Errorf("%v, %+v", c.images.Pins(), c.Stats())
	}
}

// TestAPinThatCannotBeReadHoldsNoOther.
func TestAPinThatCannotBeReadHoldsNoOther(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	one, two := buildImage(randomBytes(3000), 70_000), buildImage(randomBytes(3000), 7000)
	pullImage(t, c, "v1", 1, one.own()...)
	pullImage(t, c, "v2", 2, two.own()...)
	for _, tag := range []string{"v1", "v2"} {
		if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: tag}); err != nil {
			t.Fatal(err)
		}
	}
	if err := flip(c.store.Path(two.indexDigest), two.index, 10); err != nil {
		t.Fatal(err)
	}
	if err := c.images.Unpin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"}); err != nil {
		t.Fatal(err)
	}
	if err := c.store.Evict(1 << 40); err != nil || c.has(one.layer) {
		t.Errorf("what is not pinned is held: %v", err)
	}
	if !c.has(two.layer) {
		t.Error("what is pinned was evicted")
	}
	settle(t, "the changed file has gone", func() bool { return !c.has(two.index) })
}

// TestTheListNamesWhatCouldNotBeReadOnce, in its next turn.
func TestTheListNamesWhatCouldNotBeReadOnce(t *testing.T) {
	t.Parallel()
	var failing atomic.Bool
	dir := t.TempDir()
	c := withSteps(t, dir, func(name string, do func() error) error {
		if name == "read blob" && failing.Load() {
			return syscall.EIO
		}
		return do()
	})
	defer c.Close()
	named := func() (yes bool) {
		if err := c.store.Housekeep(); err != nil {
			t.Fatal(err)
		}
		list, err := os.ReadFile(filepath.Join(dir, store.ListName))
		return err == nil && bytes.Contains(list, []byte("lab.test/app:v1"))
	}
	failing.Store(true)
	pullImage(t, c, "v1", 1, buildImage(randomBytes(3000), 7000).own()...)
	if named() {
		t.Error("it was not put to the test")
	}
	failing.Store(false)
	if !named() {
		t.Error("it is missing still")
	}
}

// TestAnOrphanHoldsNoImage: an index whose tag has moved is in no list.
func TestAnOrphanHoldsNoImage(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	one := buildImage(randomBytes(3000), 7000)
	pullImage(t, c, "v1", 1, one.own()...)
	pullImage(t, c, "v1-amd64", 2, one.manifest)
	pullImage(t, c, "v1", 3, buildImage(one.base, 8000).own()...)
	if e, err := c.images.Evict(appKey, "v1-amd64", ""); err != nil || e.Objects != 3 || c.has(one.layer) || !c.has(one.base) {
		t.Errorf("%+v: %v", e, err)
	}
}

// TestAPinOfTooManyObjectsIsRefused: what is not walked would not be held.
func TestAPinOfTooManyObjectsIsRefused(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<40)
	defer c.Close()
	leadTo := func(name string, n int) v1.Index {
		var all v1.Index
		for i := range n {
			all.Manifests = append(all.Manifests, v1.Descriptor{Digest: digest.FromString(fmt.Sprint(name, i)), Size: 1})
		}
		return all
	}
	marshal := func(v v1.Index) []byte {
		body, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return body
	}
	alone := marshal(leadTo("alone", manifest.MaxDescriptors+1))
	var parts [][]byte
	var together v1.Index
	for i := range (1<<15)/manifest.MaxDescriptors + 1 {
		parts = append(parts, marshal(leadTo(fmt.Sprint("part", i, "-"), manifest.MaxDescriptors)))
		together.Manifests = append(together.Manifests, v1.Descriptor{Digest: digest.FromBytes(parts[i]), Size: int64(len(parts[i]))})
	}
	within := marshal(v1.Index{Manifests: []v1.Descriptor{{Digest: digest.FromBytes(alone), Size: int64(len(alone))}}})
	for name, bodies := range map[string][][]byte{
		"one manifest": {alone}, "a manifest within an index": {within, alone}, "many manifests": append([][]byte{marshal(together)}, parts...),
	} {
		pullImage(t, c, "", 0, bodies...)
		if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Digest: digest.FromBytes(bodies[0])}); !errors.Is(err, images.ErrPinsTooLarge) || len(c.images.Pins()) != 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Digest: digest.FromBytes(parts[0])}); err != nil {
		t.Errorf("as many as there may be: %v", err)
	}
}

// TestALargeBlobThatIsNoManifestIsNotReadAsOne, however it begins.
func TestALargeBlobThatIsNoManifestIsNotReadAsOne(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	d := digest.FromString("layer")
	for body, want := range map[string]int{
		`{"config":{},"layers":[{"digest":"` + d.String() + `"}]}`:                                              1,
		`{"a":1,"layers":[{"digest":"` + d.String() + `"}],"b":2}`:                                              1,
		`{"a":{"layers":1},"b":"` + strings.Repeat("x", 1000) + `","layers":[{"digest":"` + d.String() + `"}]}`: 0,
	} {
		if _, err := readAll(c, parallelRequest(&origin{body: []byte(body)}, "one")); err != nil {
			t.Fatal(err)
		}
		settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
		if got := c.Index().ChildrenOf(digest.FromString(body)); len(got) != want {
			t.Errorf("%.40s leads to %v", body, got)
		}
	}
}

// TestAPinOfNothingIsRefused: the index that is here has nothing for the platform.
func TestAPinOfNothingIsRefused(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	pullImage(t, c, "v1", 1, buildImage(randomBytes(1000), 1000).own()...)
	p := images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1", Platforms: []string{"linux/s390x"}}
	if _, err := c.images.Pin(p); !errors.Is(err, images.ErrNoPin) || !strings.Contains(err.Error(), "linux/arm64/v8, linux/amd64") || len(c.images.Pins()) != 0 {
		t.Error(err)
	}
	p.Platforms = append(p.Platforms, "linux/arm64")
	if _, err := c.images.Pin(p); err != nil {
		t.Error(err)
	}
}

// TestWhatMustStayFreeIsNoRoomForPins.
func TestWhatMustStayFreeIsNoRoomForPins(t *testing.T) {
	t.Parallel()
	c, err := New(Options{Dir: t.TempDir(), MaxSize: 1 << 50, MinFree: 1 << 50})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Digest: digest.FromString("x")}); !errors.Is(err, images.ErrPinsTooLarge) {
		t.Error(err)
	}
}

// TestTheDirectoryIsMarkedWhenTheDiskIsBack.
func TestTheDirectoryIsMarkedWhenTheDiskIsBack(t *testing.T) {
	t.Parallel()
	var failing atomic.Bool
	failing.Store(true)
	dir := t.TempDir()
	c := withSteps(t, dir, func(name string, do func() error) error {
		if failing.Load() && (name == "write layout" || name == "write list") {
			return syscall.ENOSPC
		}
		return do()
	})
	defer c.Close()
	if err := c.store.Do(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, store.LayoutName)); err == nil {
		t.Error("it was not put to the test")
	}
	failing.Store(false)
	settle(t, "both files", func() bool {
		_, err := os.Stat(filepath.Join(dir, store.LayoutName))
		_, lerr := os.Stat(filepath.Join(dir, store.ListName))
		return err == nil && lerr == nil
	})
}

// TestOneVerifyAtATime: two would take twice what one may.
func TestOneVerifyAtATime(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	storedBy(t, c, &origin{body: randomBytes(1 << 20)})
	once := sync.OnceFunc(func() {
		if _, err := c.store.Verify(t.Context(), 0, func(store.Verification) {}); !errors.Is(err, store.ErrVerifying) {
			t.Error(err)
		}
	})
	for range 2 {
		if v, err := c.store.Verify(t.Context(), 0, func(store.Verification) { once() }); err != nil || v.Files != 1 {
			t.Errorf("%+v: %v", v, err)
		}
	}
}

// TestVerifyKeepsItsRate.
func TestVerifyKeepsItsRate(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	for range 4 {
		storedBy(t, c, &origin{body: randomBytes(1 << 20)})
	}
	begun := time.Now()
	if _, err := c.store.Verify(t.Context(), 8<<20, func(store.Verification) {}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took < 450*time.Millisecond {
		t.Errorf("4 MiB at 8 MiB a second took %v", took)
	}
}

// TestAnImageThatIsWrittenTwiceIsPinnedForBoth, also while it cannot be read.
func TestAnImageThatIsWrittenTwiceIsPinnedForBoth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := openChaos(t, dir, 1<<30)
	one := buildImage(randomBytes(3000), 7000)
	pullImage(t, c, "v1", 1, append(one.own(), one.other, one.otherLayer)...)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	const entry = `{"upstream":"lab.test","repository":"app","tag":"v1","platforms":["linux/%s"]}`
	if err := os.WriteFile(filepath.Join(dir, store.PinsName), fmt.Appendf(nil, "["+entry+","+entry+"]", "amd64", "arm64"), 0o600); err != nil {
		t.Fatal(err)
	}
	c = openChaos(t, dir, 1<<30)
	defer c.Close()
	if err := evictOne(c, one.manifestDigest); !errors.Is(err, images.ErrPinned) || !strings.Contains(err.Error(), "as lab.test/app:v1") {
		t.Error(err)
	}
	if err := flip(c.store.Path(one.indexDigest), one.index, 10); err != nil {
		t.Fatal(err)
	}
	other := images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v2"}
	_, err := c.images.Pin(other)
	if err := errors.Join(err, c.images.Unpin(other), c.store.Evict(1<<40)); err != nil || !c.has(one.layer) || !c.has(one.otherLayer) { // all pins are looked at
		t.Errorf("a layer was evicted: %v", err)
	}
}

// TestAGoodManifestIsNotDropped for what was read before it came.
func TestAGoodManifestIsNotDropped(t *testing.T) {
	t.Parallel()
	var armed atomic.Bool
	var c *Cache
	one := buildImage(randomBytes(3000), 7000)
	c = withSteps(t, t.TempDir(), func(name string, do func() error) error {
		err := do()
		if name == "read blob" && armed.CompareAndSwap(true, false) {
			if err := evictOne(c, one.indexDigest); err != nil { // and it is fetched anew
				t.Error(err)
			}
			req := parallelRequest(&origin{body: one.index}, "two")
			if got, err := readAll(c, req); err != nil || !bytes.Equal(got, one.index) {
				t.Error(err)
			}
			waitStored(t, c, req.Key)
		}
		return err
	})
	defer c.Close()
	pullImage(t, c, "v1", 1, one.own()...)
	if err := c.store.Housekeep(); err != nil {
		t.Fatal(err)
	}
	if err := flip(c.store.Path(one.indexDigest), one.index, 10); err != nil {
		t.Fatal(err)
	}
	armed.Store(true)
	c.images.List()
	for range 2 { // what it has told the committer is done by then
		if err := c.store.Housekeep(); err != nil {
			t.Fatal(err)
		}
	}
	if armed.Load() || !c.has(one.index) {
		t.Error("the good one was dropped")
	}
}
