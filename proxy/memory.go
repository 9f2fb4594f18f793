// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"fmt"
	"io"
	"net/http"

	"tarn/upstream"

	"github.com/distribution/distribution/v3/registry/api/errcode"
	"golang.org/x/sync/semaphore"
)

// Manifests are read whole, to see what they are, and anybody can have tarn read
// very many large ones at once. So those above smallManifest share a bounded
// memory, what registries that are not listed send a smaller one; what is more
// waits for its turn. It is given back once the manifest was looked at: what is
// sent comes from the file, however slowly a client takes it.
const (
	smallManifest  = 64 << 10
	manifestMemory = 64 << 20
)

type memory struct{ listed, others *semaphore.Weighted }

func newMemory() memory {
	return memory{semaphore.NewWeighted(manifestMemory), semaphore.NewWeighted(manifestMemory / 2)}
}

var errBusy = &apiError{http.StatusServiceUnavailable, errcode.ErrorCodeUnavailable,
	"tarn reads as many large manifests as it has memory for"}

func (m memory) of(listed bool) *semaphore.Weighted {
	if listed {
		return m.listed
	}
	return m.others
}

// hold takes so much of the memory; the caller gives it back.
func (p *Proxy) hold(ctx context.Context, name upstream.Name, n int64) (release func(), err error) {
	m := p.memory.of(p.upstreams.Listed(name))
	if m.Acquire(ctx, n) != nil {
		return nil, errBusy
	}
	return func() { m.Release(n) }, nil
}

// holdSent is for a manifest that is sent from memory, as slowly as its client
// takes it: it does not wait for others of that kind.
func (p *Proxy) holdSent(name upstream.Name, n int64) (release func(), err error) {
	m := p.memory.of(p.upstreams.Listed(name))
	switch {
	case n <= smallManifest:
		return func() {}, nil
	case !m.TryAcquire(n):
		return nil, errBusy
	}
	return func() { m.Release(n) }, nil
}

// readManifest reads a manifest of that size, -1 for one that nobody knows, and
// holds memory for it until release is called, which is never nil.
func (p *Proxy) readManifest(ctx context.Context, name upstream.Name, r io.Reader, size int64) (data []byte, release func(), err error) {
	release = func() {}
	if size > maxManifest {
		return nil, release, fmt.Errorf("%w: it has %d bytes, of at most %d", errManifest, size, maxManifest)
	}
	body := &limitedBody{io.NopCloser(r), maxManifest}
	if size < 0 {
		if data, err = io.ReadAll(io.LimitReader(body, smallManifest)); err != nil || len(data) < smallManifest {
			return data, release, err
		}
		size = maxManifest
	}
	if size > smallManifest {
		taken, err := p.hold(ctx, name, size)
		if err != nil {
			return nil, release, err
		}
		release = taken
	}
	rest, err := io.ReadAll(body)
	return append(data, rest...), release, err
}
