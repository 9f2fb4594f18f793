// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"encoding/json"
	"os"

	"tarn/blobstore"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxManifest is the size in bytes of the largest manifest that clients and
// registries accept.
const maxManifest = 4 << 20

// manifest is what is read of a manifest or an index (OCI image-spec "Image
// Manifest", "Image Index", and Docker's of the same shape). Eviction, pins and
// lists go by it; nobody is served by it.
type manifest struct {
	MediaType string          `json:"mediaType"`
	Config    v1.Descriptor   `json:"config"`
	Layers    []v1.Descriptor `json:"layers"`
	Manifests []v1.Descriptor `json:"manifests"`
}

// parseManifest returns an empty one for anything else.
func parseManifest(body []byte) (m manifest) {
	if json.Unmarshal(body, &m) != nil {
		return manifest{}
	}
	return m
}

// descriptors are all that it leads to, but no subject.
func (m manifest) descriptors() (all []v1.Descriptor) {
	seen := make(map[digest.Digest]bool)
	for _, list := range [][]v1.Descriptor{{m.Config}, m.Layers, m.Manifests} {
		for _, d := range list {
			if blobstore.CheckDigest(d.Digest) == nil && !seen[d.Digest] && d.Size >= 0 {
				seen[d.Digest] = true
				all = append(all, d)
			}
		}
	}
	return all
}

// isIndex tells an index from a manifest.
func (m manifest) isIndex() bool { return len(m.Manifests) > 0 }

// mediaType is what it says of itself, or else what it looks like.
func (m manifest) mediaType() string {
	switch {
	case m.MediaType != "":
		return m.MediaType
	case m.isIndex():
		return v1.MediaTypeImageIndex
	}
	return v1.MediaTypeImageManifest
}

// childrenOf returns what a manifest leads to, nil for anything else.
func childrenOf(body []byte) (children []digest.Digest) {
	for _, d := range parseManifest(body).descriptors() {
		children = append(children, d.Digest)
	}
	return children
}

// storedManifest reads a manifest that is stored, or has no row yet. Anything else that
// is stored leads nowhere. It fails with ErrNotStored, with errChanged, and when the disk
// does not give it now.
func (c *Cache) storedManifest(d digest.Digest) (m manifest, size int64, err error) {
	row, known := c.index.Row(d)
	switch {
	case !known && !c.isStray(d):
		return m, 0, ErrNotStored
	case known && (row.Size > maxManifest || c.index.ChildrenOf(d) == nil):
		return m, row.Size, nil
	}
	info, err := os.Lstat(c.store.Path(d))
	if err != nil {
		return m, row.Size, err
	}
	size = info.Size()
	if size > maxManifest {
		return m, size, nil
	}
	body, err := c.store.Read(d, size)
	if err != nil {
		return m, size, err
	}
	if d.Algorithm().FromBytes(body) != d {
		if known {
			c.distrust(d, info)
			c.dropSoon(d)
		}
		return m, size, errChanged
	}
	return parseManifest(body), size, nil
}
