// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"sync"

	"tarn/index"
	"tarn/internal/manifest"

	"github.com/opencontainers/go-digest"
)

// sizes are what manifests that were served a while ago say of their layers, for who
// asks for one of these next. They are the words of whoever pushed to that repository:
// a wrong one costs its own readers a few questions. The map is bounded by starting
// anew.
type sizes struct {
	mu    sync.Mutex
	sizes map[sizeKey]int64 // bytes
}

type sizeKey struct {
	repository index.RepositoryKey
	layer      digest.Digest
}

const (
	maxSizes = 4096
	// leastSize is that of a layer whose size is worth to be known: smaller ones come
	// with the first question.
	leastSize = 4 << 20
	// maxLayers is how many of an image are noted; runtimes take some 500 at most.
	maxLayers = 512
)

// note takes what a manifest says.
func (s *sizes) note(k index.RepositoryKey, body []byte) {
	m, err := manifest.Parse(body)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range m.Layers[:min(len(m.Layers), maxLayers)] {
		if l.Digest == "" || l.Size <= leastSize {
			continue
		}
		if s.sizes == nil || len(s.sizes) >= maxSizes {
			s.sizes = make(map[sizeKey]int64)
		}
		s.sizes[sizeKey{k, l.Digest}] = l.Size
	}
}

// of is the size of a layer, 0 where nobody knows it.
func (s *sizes) of(k index.RepositoryKey, d digest.Digest) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sizes[sizeKey{k, d}]
}
