// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"io"
	"net/http"
	"runtime"
	"sync"
	"time"

	"tarn/cache"
	"tarn/internal/manifest"
	"tarn/upstream"
)

// Prefetch is what of an image is fetched before the client asks, when its
// manifest was.
type Prefetch int

const (
	PrefetchOff    Prefetch = iota
	PrefetchConfig          // and of an index, the manifest of this node's platform
	PrefetchLayers          // all that the node needs of the image
)

const (
	// maxAhead is how many objects are fetched ahead at once; each may use as
	// many connections as any other.
	maxAhead = 4
	// maxAheadBytes bounds what is fetched ahead of one image: more than that
	// is wanted by nobody in a hurry.
	maxAheadBytes = 4 << 30
	// maxAheadObjects bounds their number, and how deep an index may lie in
	// another.
	maxAheadObjects = 256
	maxAheadDepth   = 2
	// aheadTime is how long one object may keep others from their turn.
	aheadTime = time.Minute
)

// ahead is what is fetched ahead of clients; Wait for it.
type ahead struct {
	sync.WaitGroup
	what  Prefetch
	slots chan struct{} // one is taken by each object
}

func newAhead(what Prefetch) *ahead {
	return &ahead{what: what, slots: make(chan struct{}, maxAhead)}
}

// enter waits for an object's turn, as long as patience. ok is false when it did not
// come.
func (a *ahead) enter(ctx context.Context, patience time.Duration) (leave func(), ok bool) {
	select {
	case a.slots <- struct{}{}:
		return func() { <-a.slots }, true
	case <-ctx.Done():
	case <-time.After(patience):
	}
	return nil, false
}

// fetchAhead begins with what the manifest refers to. It is asked for with the
// credential of the client that has just been given the manifest, object by
// object, and each GET is its own authorisation; where a yes is not believed
// for a while, nothing is fetched ahead.
func (p *Proxy) fetchAhead(q *request, manifest []byte) {
	if p.ahead.what == PrefetchOff || q.method != http.MethodGet || p.rules(q.upstream).GrantTTL <= 0 {
		return
	}
	p.ahead.Go(func() { p.fetchImage(q, manifest, maxAheadDepth) })
}

func (p *Proxy) fetchImage(q *request, body []byte, depth int) {
	m, err := manifest.Parse(body)
	if err != nil {
		return
	}
	if d, ok := ownPlatform(m.Manifests); ok && depth > 0 {
		if data := p.fetchOne(q, upstream.Manifest, d); data != nil {
			p.fetchImage(q, data, depth-1)
		}
		return
	}
	wanted := []manifest.Descriptor{m.Config}
	if p.ahead.what == PrefetchLayers {
		wanted = append(wanted, m.Layers...)
	}
	left := int64(maxAheadBytes)
	for _, d := range wanted[:min(len(wanted), maxAheadObjects)] {
		if d.Digest == "" || d.Size <= 0 || d.Size > left {
			continue
		}
		left -= d.Size
		p.ahead.Go(func() { p.fetchOne(q, upstream.Blob, d) })
	}
}

// ownPlatform is the entry of an index for this node.
func ownPlatform(manifests []manifest.Descriptor) (manifest.Descriptor, bool) {
	for _, d := range manifests {
		if d.Platform != nil && d.Platform.OS == "linux" && d.Platform.Architecture == runtime.GOARCH && d.Digest != "" {
			return d, true
		}
	}
	return manifest.Descriptor{}, false
}

// fetchOne fetches an object unless it is here or on its way, and returns the
// bytes of a manifest.
func (p *Proxy) fetchOne(q *request, kind upstream.Kind, d manifest.Descriptor) []byte {
	leave, ok := p.ahead.enter(p.ctx, p.rules(q.upstream).GrantTTL)
	if !ok {
		return nil
	}
	defer leave()
	if !p.rights.Granted(q.asker) { // it may have ended while others had their turn
		return nil
	}
	one := *q
	one.size = d.Size
	one.kind, one.tag, one.digest = kind, "", d.Digest
	one.span = span{}
	if _, here := p.cache.Size(p.key(&one, d.Digest)); here && kind == upstream.Blob {
		return nil
	}
	ctx, cancel := context.WithTimeout(p.ctx, headerDeadline)
	defer cancel()
	o, _, _, err := p.openDigest(ctx, &response{timing: timing{start: time.Now()}}, &one)
	if err != nil {
		return nil
	}
	defer o.Close()
	defer context.AfterFunc(p.ctx, o.Interrupt)()
	defer time.AfterFunc(aheadTime, o.Interrupt).Stop()
	switch {
	case kind == upstream.Manifest:
		data, err := io.ReadAll(io.LimitReader(o.Content, maxManifest))
		if err != nil {
			return nil
		}
		return data
	case o.Source == cache.Fetched:
		o.Wait()
	}
	return nil
}
