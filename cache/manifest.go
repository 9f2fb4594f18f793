// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"encoding/json"

	"tarn/blobstore"

	"github.com/opencontainers/go-digest"
)

// maxManifest is the size in bytes of the largest manifest that clients and
// registries accept.
const maxManifest = 4 << 20

// childrenOf returns what a manifest or an index leads to: its config, layers and
// manifests (OCI image-spec "Image Manifest", "Image Index", and Docker's of the
// same shape), but no subject. Anything else leads nowhere. Eviction goes by it
// and pins do; nobody is served by it.
func childrenOf(body []byte) (children []digest.Digest) {
	type descriptor struct {
		Digest digest.Digest `json:"digest"`
	}
	var m struct {
		Config    descriptor   `json:"config"`
		Layers    []descriptor `json:"layers"`
		Manifests []descriptor `json:"manifests"`
	}
	if json.Unmarshal(body, &m) != nil {
		return nil
	}
	seen := make(map[digest.Digest]bool)
	for _, list := range [][]descriptor{{m.Config}, m.Layers, m.Manifests} {
		for _, d := range list {
			if blobstore.CheckDigest(d.Digest) == nil && !seen[d.Digest] {
				seen[d.Digest] = true
				children = append(children, d.Digest)
			}
		}
	}
	return children
}
