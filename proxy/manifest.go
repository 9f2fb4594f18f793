// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"mime"
	"strings"
	"sync"

	"tarn/internal/manifest"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const maxManifest = manifest.MaxSize

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
	shape string // what it looks like: an index, an image, or "" for neither
}

// shapeOf is what clients read a manifest of that type as, the name of OCI's: the
// two families call the same thing by different names. Any other type is its own.
func shapeOf(mediaType string) string {
	switch mediaType {
	case v1.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.list.v2+json":
		return v1.MediaTypeImageIndex
	case v1.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v2+json":
		return v1.MediaTypeImageManifest
	}
	return mediaType
}

// fits tells whether a manifest of that type may have the shape that its fields
// have: an index is never an image, and an image never an index.
func (m manifestInfo) fits(mediaType string) bool {
	is := shapeOf(mediaType)
	known := is == v1.MediaTypeImageIndex || is == v1.MediaTypeImageManifest
	return !known || m.shape == "" || m.shape == is
}

// parseManifest reads a manifest, or fails with an error that wraps
// errManifest.
func parseManifest(body []byte) (manifestInfo, error) {
	m, err := manifest.Parse(body)
	if err != nil {
		return manifestInfo{}, fmt.Errorf("%w: %w", errManifest, err)
	}
	info := manifestInfo{own: m.MediaType}
	isIndex, isImage := m.HasManifests, m.HasLayers || m.HasConfig
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
	if !info.fits(info.own) {
		return info, fmt.Errorf("%w: its mediaType is %q, and its fields are not", errManifest, info.own)
	}
	return info, nil
}

// typeAs returns the type to serve the manifest with where the authority calls
// it contentType. OCI's and Docker's names of one shape are each other's. A type
// of another shape than the body's would let one client see a manifest where
// another sees an index. What is no manifest's type gives way to the body.
func (m manifestInfo) typeAs(contentType string) (string, error) {
	switch {
	case manifestLike(contentType):
	case m.own == "" && m.shape == "":
		return "", fmt.Errorf("%w: it is neither an image nor an index", errManifest)
	default:
		return cmp.Or(m.own, m.shape), nil
	}
	if m.own != "" && shapeOf(m.own) != shapeOf(contentType) || !m.fits(contentType) {
		return "", fmt.Errorf("%w: it is %s, upstream calls it %s", errManifest, cmp.Or(m.own, m.shape), contentType)
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
