// SPDX-License-Identifier: Apache-2.0

package images

import (
	"cmp"
	"errors"
	"math"
	"slices"
	"strings"

	"tarn/blobstore"
	"tarn/cache/store"
	"tarn/internal/manifest"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// What is read of a manifest here is for eviction, pins and lists; nobody is
// served by it.

// readManifest returns an empty one for anything else.
func readManifest(body []byte) manifest.Manifest {
	m, err := manifest.Parse(body)
	if err != nil {
		return manifest.Manifest{}
	}
	return m
}

// mediaTypeOf is what a manifest says of itself, or else what it looks like.
func mediaTypeOf(m manifest.Manifest) string {
	if len(m.Manifests) > 0 {
		return cmp.Or(m.MediaType, v1.MediaTypeImageIndex)
	}
	return cmp.Or(m.MediaType, v1.MediaTypeImageManifest)
}

// storedManifest reads a manifest that is stored, or has no row yet. Anything else that
// is stored leads nowhere. It fails with store.ErrNotStored, and when the file is not
// what it was, or the disk does not give it now.
func (im *Images) storedManifest(d digest.Digest) (m manifest.Manifest, size int64, err error) {
	row, known := im.store.Index().Row(d)
	if known && !im.store.Index().Leads(d) {
		return m, row.Size, nil
	}
	body, size, err := im.store.ReadAll(d, manifest.MaxSize)
	if body == nil || !known && !manifest.Looks(body[:min(size, manifest.Prefix)], size) {
		return m, size, err
	}
	return readManifest(body), size, nil
}

// leadsTooFar tells whether a manifest that is stored leads to more than is kept
// account of.
func (im *Images) leadsTooFar(d digest.Digest) bool {
	body, _, err := im.store.ReadAll(d, manifest.MaxSize)
	return err == nil && readManifest(body).Truncated
}

// Tree is an image as far as its manifests are here.
type Tree struct {
	// Here and Total are bytes: of what is stored, and of all of it. Of an index
	// they count the manifests that are here, or all that were asked for.
	Here, Total int64
	// Platforms that there is something of.
	Platforms []string
	sizes     map[digest.Digest]int64
	err       error           // a manifest that is here cannot be read
	others    []string        // platforms of an index that has none of those asked for
	barren    []digest.Digest // named as manifests, and here, and lead nowhere
}

// Look walks from a digest over the manifests that are here, to these platforms of an
// index, or to all; where it has none of them, to what is here of the others.
func (im *Images) Look(d digest.Digest, platforms []string) Tree {
	t := im.tree(d, platforms)
	if len(t.others) > 0 {
		t = im.tree(d, nil)
	}
	return t
}

// Objects are all that it leads to, as far as that is known, with their sizes.
func (t Tree) Objects() map[digest.Digest]int64 { return t.sizes }

// tree walks from a digest over the manifests that are here, to these platforms
// of an index, or to all.
func (im *Images) tree(root digest.Digest, platforms []string) Tree {
	w := walk{im: im, root: root, platforms: platforms}
	w.sizes = make(map[digest.Digest]int64)
	if blobstore.CheckDigest(root) == nil {
		w.manifest(root, 0, nil)
	}
	if w.some {
		w.others = nil
	}
	return w.Tree
}

// walk is a tree on its way.
type walk struct {
	Tree
	im        *Images
	root      digest.Digest
	platforms []string // of an index; none: all
	some      bool     // the index has some of those
}

// seen tells whether an object was looked at, or no more are.
func (w *walk) seen(d digest.Digest) bool {
	_, seen := w.sizes[d]
	return seen || len(w.sizes) >= maxTree
}

func (w *walk) enter(d digest.Digest, size int64) {
	w.sizes[d] = size
	w.Total = addSizes(w.Total, size)
}

// leaf enters what is not read: of files without a row, nobody knows what they are.
func (w *walk) leaf(child manifest.Descriptor) {
	if w.seen(child.Digest) {
		return
	}
	size := child.Size
	if here, ok := w.im.store.IsHere(child.Digest); ok {
		size = cmp.Or(here, size) // of a file without a row, it is not known
		w.Here += size
	}
	w.enter(child.Digest, size)
}

// manifest enters a manifest and what it leads to; an index says for which platform it
// is, and how large.
func (w *walk) manifest(d digest.Digest, size int64, platform *manifest.Platform) {
	if w.seen(d) {
		return
	}
	m, stored, err := w.im.storedManifest(d)
	switch {
	case err == nil:
		size = stored
		w.Here += size
	case !errors.Is(err, store.ErrNotStored):
		w.err = err
	}
	w.enter(d, size)
	if err != nil {
		return
	}
	if platform != nil && len(w.Platforms) < maxPlatforms {
		w.Platforms = append(w.Platforms, platformName(*platform))
	}
	children := m.Descriptors()
	if children == nil {
		w.barren = append(w.barren, d)
	}
	for _, child := range children {
		if len(m.Manifests) > 0 {
			w.ofIndex(d, child)
		} else {
			w.leaf(child)
		}
	}
	if platform == nil && m.Config.Digest != "" && d == w.root {
		if p, ok := w.im.configPlatform(m.Config); ok {
			w.Platforms = append(w.Platforms, platformName(p))
		}
	}
}

// ofIndex enters what an index names, if it is for one of the platforms.
func (w *walk) ofIndex(index digest.Digest, child manifest.Descriptor) {
	if !w.wants(child.Platform) {
		if index == w.root && child.Platform.OS != "unknown" { // as attestations have it
			w.others = append(w.others, platformName(*child.Platform))
		}
		return
	}
	w.some = true
	if _, here := w.im.store.IsHere(child.Digest); here || len(w.platforms) > 0 {
		w.manifest(child.Digest, child.Size, child.Platform)
	} else {
		w.sizes[child.Digest] = child.Size // a pin keeps it when it comes
	}
}

func (w *walk) wants(platform *manifest.Platform) bool {
	return platform == nil || len(w.platforms) == 0 || slices.ContainsFunc(w.platforms, func(p string) bool {
		name, p := plainArm64(platformName(*platform)), plainArm64(p)
		return name == p || strings.HasPrefix(name, p+"/")
	})
}

// maxTree bounds what one image leads to: a manifest of the most descriptors is within
// it, and an index may have as many such manifests.
const maxTree = 1 << 15

// plainArm64: v8 is what arm64 is without a variant.
func plainArm64(platform string) string {
	if name, ok := strings.CutSuffix(platform, "/v8"); ok && strings.HasSuffix(name, "/arm64") {
		return name
	}
	return platform
}

// addSizes adds what a manifest may only claim.
func addSizes(a, b int64) int64 {
	if b > math.MaxInt64-a {
		return math.MaxInt64
	}
	return a + b
}

// platformName is for people, too: what a manifest says is not for their terminal.
func platformName(p manifest.Platform) string {
	name := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		name += "/" + p.Variant
	}
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f {
			return '?'
		}
		return r
	}, name)
}

// configPlatform reads what an image's config says that it runs on.
func (im *Images) configPlatform(config manifest.Descriptor) (p manifest.Platform, ok bool) {
	if _, stored := im.store.Index().Row(config.Digest); !stored {
		return p, false
	}
	body, _, err := im.store.ReadAll(config.Digest, manifest.MaxSize)
	if err != nil || len(body) == 0 {
		return p, false
	}
	p = manifest.ParsePlatform(body)
	return p, p.OS != ""
}
