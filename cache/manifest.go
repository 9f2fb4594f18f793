// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"cmp"
	"os"

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

// childrenOf returns what a manifest leads to, nil for anything else.
func childrenOf(body []byte) (children []digest.Digest) {
	for _, d := range readManifest(body).Descriptors() {
		children = append(children, d.Digest)
	}
	return children
}

// storedManifest reads a manifest that is stored, or has no row yet. Anything else that
// is stored leads nowhere. It fails with ErrNotStored, with errChanged, and when the disk
// does not give it now.
func (c *Cache) storedManifest(d digest.Digest) (m manifest.Manifest, size int64, err error) {
	row, known := c.index.Row(d)
	switch {
	case !known && !c.isStray(d):
		return m, 0, ErrNotStored
	case known && (row.Size > manifest.MaxSize || c.index.ChildrenOf(d) == nil):
		return m, row.Size, nil
	}
	info, err := os.Lstat(c.store.Path(d))
	if err != nil {
		return m, row.Size, err
	}
	size = info.Size()
	if size > manifest.MaxSize {
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
	if !known && !manifest.Looks(body[:min(size, manifest.Prefix)], size) {
		return m, size, nil
	}
	return readManifest(body), size, nil
}

// leadsTooFar tells whether a manifest that is stored leads to more than is kept
// account of.
func (c *Cache) leadsTooFar(d digest.Digest) bool {
	row, ok := c.index.Row(d)
	if !ok || row.Size > manifest.MaxSize {
		return false
	}
	body, err := c.store.Read(d, row.Size)
	return err == nil && readManifest(body).Truncated
}
