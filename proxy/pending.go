// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"sync"

	"tarn/index"

	"github.com/opencontainers/go-digest"
)

// pendingTags are tags whose manifest is not here yet. A row is only kept of a
// tag that means something on the disk, since anybody can ask for any number of
// others; but containerd asks for a tag with HEAD, and for the manifest by its
// digest a moment later. So what a tag was said to mean waits here for that.
type pendingTags struct {
	mu   sync.Mutex
	tags map[manifestKey]map[string]index.Tag // by tag
	n    int                                  // of all; at most maxPending
}

type manifestKey struct {
	index.RepositoryKey
	digest digest.Digest
}

// maxPending bounds them: past it all are forgotten, and a tag's next
// confirmation notes it.
const maxPending = 4096

func (p *pendingTags) add(k index.RepositoryKey, tag string, row index.Tag) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n >= maxPending || p.tags == nil {
		p.tags, p.n = make(map[manifestKey]map[string]index.Tag), 0
	}
	key := manifestKey{k, row.Digest}
	if p.tags[key] == nil {
		p.tags[key] = make(map[string]index.Tag)
	}
	if _, known := p.tags[key][tag]; !known {
		p.n++
	}
	p.tags[key][tag] = row
}

// take returns those of a manifest, which are not pending any more.
func (p *pendingTags) take(k index.RepositoryKey, d digest.Digest) map[string]index.Tag {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := manifestKey{k, d}
	tags := p.tags[key]
	p.n -= len(tags)
	delete(p.tags, key)
	return tags
}
