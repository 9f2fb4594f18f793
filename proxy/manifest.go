// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxManifest is what containerd takes at most, and what distribution-spec
// "Pushing Manifests" has registries support at least.
const maxManifest = 4 << 20

type body = io.ReadCloser

// limitedBody fails past its limit rather than end there: a cut manifest is
// none.
type limitedBody struct {
	io.ReadCloser
	left int64
}

func (b *limitedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, fmt.Errorf("%w: it has more than %d bytes", errManifest, maxManifest)
	}
	return n, err
}

// generic tells whether a Content-Type says nothing about a manifest, so that
// the body's own mediaType stands.
func generic(mediaType string) bool {
	switch mediaType {
	case "", "text/plain", "application/octet-stream", "binary/octet-stream", "application/json":
		return true
	}
	return false
}

// manifestLike tells whether a Content-Type may be a manifest's.
func manifestLike(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.") && strings.HasSuffix(mediaType, "json")
}

// schema1 manifests are signed inside: their digest is not that of their
// bytes, so they cannot be cached by it.
func schema1(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.docker.distribution.manifest.v1+")
}

// schema1Type is the usual one.
const schema1Type = "application/vnd.docker.distribution.manifest.v1+prettyjws"

// errSchema1 ends a flight that cannot be one.
var errSchema1 = errors.New("schema 1 manifest")

// manifestInfo is what a manifest's own bytes say about its type.
type manifestInfo struct {
	own   string // its mediaType, "" for none
	shape string // what it looks like, for when nobody says
}

// parseManifest reads a manifest, or fails with an error that wraps
// errManifest.
func parseManifest(body []byte) (manifestInfo, error) {
	var m struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Layers    json.RawMessage `json:"layers"`
		Config    json.RawMessage `json:"config"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return manifestInfo{}, fmt.Errorf("%w: it is no JSON object", errManifest)
	}
	info := manifestInfo{own: m.MediaType}
	isIndex, isImage := m.Manifests != nil, m.Layers != nil || m.Config != nil
	switch {
	case isIndex && isImage:
		return info, fmt.Errorf("%w: it is an index and an image at once", errManifest)
	case info.own != "" && !manifestLike(info.own):
		return info, fmt.Errorf("%w: its mediaType is %q", errManifest, info.own)
	case isIndex:
		info.shape = v1.MediaTypeImageIndex
	case isImage:
		info.shape = v1.MediaTypeImageManifest
	}
	return info, nil
}

// typeAs returns the type to serve the manifest with where the authority calls
// it contentType. A type that the body and the registry do not agree on would
// let one client see a manifest where another sees an index.
func (m manifestInfo) typeAs(contentType string) (string, error) {
	switch {
	case generic(contentType) && m.own == "" && m.shape == "":
		return "", fmt.Errorf("%w: it is neither an image nor an index", errManifest)
	case generic(contentType):
		return cmp.Or(m.own, m.shape), nil
	case m.own != "" && m.own != contentType:
		return "", fmt.Errorf("%w: its mediaType is %q, upstream calls it %q", errManifest, m.own, contentType)
	case !manifestLike(contentType):
		return "", fmt.Errorf("%w: upstream calls it %q", errManifest, contentType)
	}
	return contentType, nil
}

// manifestInfos remembers what stored manifests say, so that a hit need not be
// parsed again. What a digest names never changes; the map is bounded by
// starting anew.
type manifestInfos struct {
	mu    sync.Mutex
	infos map[digest.Digest]manifestInfo
}

const maxManifestInfos = 8192

func (t *manifestInfos) get(d digest.Digest) (m manifestInfo, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m, ok = t.infos[d]
	return m, ok
}

func (t *manifestInfos) put(d digest.Digest, m manifestInfo) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.infos == nil || len(t.infos) >= maxManifestInfos {
		t.infos = make(map[digest.Digest]manifestInfo)
	}
	t.infos[d] = m
}

// accepts tells whether the client's Accept lines take the type. No line takes
// all.
func accepts(lines []string, mediaType string) bool {
	if len(lines) == 0 {
		return true
	}
	major, _, _ := strings.Cut(mediaType, "/")
	for _, line := range lines {
		for part := range strings.SplitSeq(line, ",") {
			mt, _, err := mime.ParseMediaType(part)
			if err != nil {
				continue
			}
			if mt == mediaType || mt == "*/*" || mt == major+"/*" {
				return true
			}
		}
	}
	return false
}
