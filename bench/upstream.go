// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// upstream is a synthetic registry: images of any size that cost no memory, and
// a link that is as slow as one wants it.
type upstream struct {
	addr   string
	server *http.Server

	// How it answers; to be set while nobody asks.
	latency  time.Duration // before each answer
	rate     int64         // bytes a second on each connection; 0 for no bound
	redirect bool          // blobs are elsewhere
	// tagExpires is the X-Accel-Expires of tags, for nginx: "@1" has it ask
	// each time, "1" believe for a second.
	tagExpires string

	mu      sync.Mutex
	tags    map[string]*content // by repository:tag
	objects map[string]*content // by digest

	// Counters since the last reset.
	requests, heads, manifests, blobs, sent atomic.Int64

	base   []byte
	states map[int]hash.Hash // after the first n bytes of base
}

// trailerSize bytes at its end tell one layer from another.
const trailerSize = 16

// content is what an object has: the beginning of base, and a trailer of its
// own; or just the trailer.
type content struct {
	base      []byte
	trailer   []byte
	digest    string
	mediaType string
}

func (c *content) size() int64 { return int64(len(c.base) + len(c.trailer)) }

func (c *content) open() io.ReadSeeker {
	if len(c.base) == 0 {
		return bytes.NewReader(c.trailer)
	}
	return io.NewSectionReader(c, 0, c.size())
}

// ReadAt implements io.ReaderAt.
func (c *content) ReadAt(p []byte, off int64) (n int, err error) {
	if off < int64(len(c.base)) {
		n = copy(p, c.base[off:])
	}
	if at := off + int64(n) - int64(len(c.base)); at >= 0 && n < len(p) {
		n += copy(p[n:], c.trailer[min(at, int64(len(c.trailer))):])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func newUpstream(largest int) (*upstream, error) {
	u := &upstream{
		tags:       make(map[string]*content),
		objects:    make(map[string]*content),
		states:     make(map[int]hash.Hash),
		base:       make([]byte, largest),
		tagExpires: "@1",
	}
	rand.NewChaCha8([32]byte{1}).Read(u.base)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	u.addr = l.Addr().String()
	u.server = &http.Server{Handler: u}
	go u.server.Serve(l)
	return u, nil
}

func (u *upstream) add(c *content) *content {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.objects[c.digest] = c
	return c
}

// layer is a blob that nobody has seen before.
func (u *upstream) layer(size int) *content {
	prefix := size - trailerSize
	u.mu.Lock()
	h := u.states[prefix]
	if h == nil {
		h = sha256.New()
		h.Write(u.base[:prefix])
		u.states[prefix] = h
	}
	u.mu.Unlock()
	h, err := h.(hash.Cloner).Clone()
	if err != nil {
		panic(err)
	}
	c := &content{base: u.base[:prefix], trailer: fmt.Appendf(nil, "%016x", rand.Uint64()), mediaType: "application/octet-stream"}
	h.Write(c.trailer)
	c.digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
	return u.add(c)
}

// small is a blob or manifest with just this text.
func (u *upstream) small(text []byte, mediaType string) *content {
	sum := sha256.Sum256(text)
	return u.add(&content{trailer: text, digest: "sha256:" + hex.EncodeToString(sum[:]), mediaType: mediaType})
}

type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
}

type image struct {
	repository, tag string
	manifest        *content
	blobs           []*content // the config first
}

func (i image) bytes() (n int64) {
	for _, b := range i.blobs {
		n += b.size()
	}
	return n + i.manifest.size()
}

const manifestType = "application/vnd.oci.image.manifest.v1+json"

// image is one that nobody has seen before.
func (u *upstream) image(repository string, layers, size int) image {
	i := image{repository: repository, tag: fmt.Sprintf("v%x", rand.Uint32())}
	i.blobs = append(i.blobs, u.small(fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","created":"%016x"}`, rand.Uint64()), "application/octet-stream"))
	var m struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}
	m.SchemaVersion, m.MediaType = 2, manifestType
	m.Config = descriptor{"application/vnd.oci.image.config.v1+json", i.blobs[0].digest, i.blobs[0].size()}
	for range layers {
		l := u.layer(size)
		i.blobs = append(i.blobs, l)
		m.Layers = append(m.Layers, descriptor{"application/vnd.oci.image.layer.v1.tar+gzip", l.digest, l.size()})
	}
	text, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	i.manifest = u.small(text, manifestType)
	u.mu.Lock()
	u.tags[repository+":"+i.tag] = i.manifest
	u.mu.Unlock()
	return i
}

func (u *upstream) reset() {
	for _, n := range []*atomic.Int64{&u.requests, &u.heads, &u.manifests, &u.blobs, &u.sent} {
		n.Store(0)
	}
}

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u.requests.Add(1)
	if u.latency > 0 {
		time.Sleep(u.latency)
	}
	rest, elsewhere := strings.CutPrefix(r.URL.Path, "/elsewhere/")
	if !elsewhere {
		rest = strings.TrimPrefix(r.URL.Path, "/v2/")
		if rest == "" {
			w.Write([]byte("{}"))
			return
		}
	}
	name, reference := rest, ""
	if i := strings.LastIndexByte(rest, '/'); i >= 0 {
		name, reference = rest[:i], rest[i+1:]
	}
	if r.Method == http.MethodHead {
		u.heads.Add(1)
	}
	repository, isManifest := strings.CutSuffix(name, "/manifests")
	u.mu.Lock()
	c := u.objects[reference]
	if isManifest && !strings.Contains(reference, ":") {
		c = u.tags[repository+":"+reference]
	}
	u.mu.Unlock()
	switch {
	case c == nil:
		http.NotFound(w, r)
		return
	case isManifest:
		u.manifests.Add(1)
		if !strings.Contains(reference, ":") {
			w.Header().Set("X-Accel-Expires", u.tagExpires)
		}
	case u.redirect && !elsewhere:
		http.Redirect(w, r, "/elsewhere/"+rest, http.StatusTemporaryRedirect)
		return
	default:
		u.blobs.Add(1)
	}
	h := w.Header()
	h.Set("Content-Type", c.mediaType)
	h.Set("Docker-Content-Digest", c.digest)
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	h.Set("ETag", `"`+c.digest+`"`)
	http.ServeContent(&slowWriter{ResponseWriter: w, u: u, from: time.Now()}, r, "", time.Time{}, c.open())
}

// slowWriter keeps to the rate, and counts.
type slowWriter struct {
	http.ResponseWriter
	u    *upstream
	from time.Time
	n    int64
}

func (w *slowWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.count(n)
	return n, err
}

func (w *slowWriter) count(n int) {
	w.n += int64(n)
	w.u.sent.Add(int64(n))
	if w.u.rate > 0 {
		due := w.from.Add(time.Duration(float64(w.n) / float64(w.u.rate) * float64(time.Second)))
		time.Sleep(time.Until(due))
	}
}

// ReadFrom saves the copying through small buffers, so that the upstream is not
// what is measured.
func (w *slowWriter) ReadFrom(src io.Reader) (total int64, err error) {
	buf := bufs.Get().(*[]byte)
	defer bufs.Put(buf)
	for {
		n, rerr := src.Read(*buf)
		if n > 0 {
			m, werr := w.Write((*buf)[:n])
			total += int64(m)
			if werr != nil {
				return total, werr
			}
		}
		if rerr == io.EOF {
			return total, nil
		}
		if rerr != nil {
			return total, rerr
		}
	}
}

var bufs = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}
