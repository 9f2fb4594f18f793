// SPDX-License-Identifier: Apache-2.0

// Package registrytest has registries for tests: a small one whose answers can
// be scripted, for faults, and the real distribution registry in process. Both
// count what they are asked, and neither is ever reached by anything but
// loopback.
package registrytest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Exchange is one request that a registry received.
type Exchange struct {
	Method, Path, Range, Authorization string
}

// Registry is a scriptable registry. Its fields may be set before the first
// request, its methods called at any time.
type Registry struct {
	*httptest.Server
	// Hook sees each request first, and handles it when it returns true.
	Hook func(w http.ResponseWriter, r *http.Request) bool
	// NoRange makes it ignore Range.
	NoRange bool
	// Access says who may pull what. nil means everybody everything.
	Access *Access
	// Latency is added to each answer.
	Latency time.Duration

	mu      sync.Mutex
	tags    map[string]digest.Digest // by "repository:tag"
	objects map[string]object        // by "repository/kind/digest"
	log     []Exchange
}

type object struct {
	body      []byte
	mediaType string
}

// New starts a registry on loopback, without TLS.
func New(t testing.TB) *Registry {
	r := newRegistry()
	r.Server = httptest.NewServer(http.HandlerFunc(r.serve))
	t.Cleanup(r.Server.Close)
	return r
}

// NewTLS starts one with TLS.
func NewTLS(t testing.TB) *Registry {
	r := newRegistry()
	r.Server = httptest.NewTLSServer(http.HandlerFunc(r.serve))
	t.Cleanup(r.Server.Close)
	return r
}

func newRegistry() *Registry {
	return &Registry{tags: make(map[string]digest.Digest), objects: make(map[string]object)}
}

// Address is host:port.
func (r *Registry) Address() string { return r.Listener.Addr().String() }

// Endpoint is the registry's URL.
func (r *Registry) Endpoint() *url.URL {
	u, err := url.Parse(r.URL)
	if err != nil {
		panic(err)
	}
	return u
}

// Blob stores a blob.
func (r *Registry) Blob(repository string, body []byte) digest.Digest {
	return r.put(repository, "blobs", body, "application/octet-stream")
}

// Manifest stores a manifest, under a tag unless that is "".
func (r *Registry) Manifest(repository, tag, mediaType string, body []byte) digest.Digest {
	d := r.put(repository, "manifests", body, mediaType)
	if tag != "" {
		r.Tag(repository, tag, d)
	}
	return d
}

// Tag moves a tag.
func (r *Registry) Tag(repository, tag string, d digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tags[repository+":"+tag] = d
}

// Delete removes an object.
func (r *Registry) Delete(repository, kind string, d digest.Digest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.objects, repository+"/"+kind+"/"+d.String())
}

func (r *Registry) put(repository, kind string, body []byte, mediaType string) digest.Digest {
	d := digest.FromBytes(body)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.objects[repository+"/"+kind+"/"+d.String()] = object{body, mediaType}
	return d
}

// Image is what Image stored.
type Image struct {
	Manifest digest.Digest
	Body     []byte
	Config   digest.Digest
	Layers   []digest.Digest
}

// Image stores an image with these layers.
func (r *Registry) Image(repository, tag string, layers ...[]byte) Image {
	var img Image
	config := []byte(fmt.Sprintf(`{"architecture":"amd64","os":"linux","created":%q}`, repository+":"+tag))
	img.Config = r.Blob(repository, config)
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: img.Config, Size: int64(len(config))},
	}
	for _, l := range layers {
		d := r.Blob(repository, l)
		img.Layers = append(img.Layers, d)
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: v1.MediaTypeImageLayerGzip, Digest: d, Size: int64(len(l))})
	}
	body, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	img.Body = body
	img.Manifest = r.Manifest(repository, tag, m.MediaType, body)
	return img
}

// Exchanges are the requests so far.
func (r *Registry) Exchanges() []Exchange {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Exchange(nil), r.log...)
}

// Reset forgets the requests so far.
func (r *Registry) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = nil
}

// Count counts the requests with that method whose path contains the text.
func (r *Registry) Count(method, contains string) int {
	n := 0
	for _, e := range r.Exchanges() {
		if e.Method == method && strings.Contains(e.Path, contains) {
			n++
		}
	}
	return n
}

// Questions counts the GETs of one byte, by which tarn asks about a blob that it
// has.
func (r *Registry) Questions() (n int) {
	for _, e := range r.Exchanges() {
		if e.Method == http.MethodGet && e.Range == "bytes=0-0" {
			n++
		}
	}
	return n
}

func (r *Registry) serve(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	r.log = append(r.log, Exchange{req.Method, req.URL.Path, req.Header.Get("Range"), req.Header.Get("Authorization")})
	r.mu.Unlock()
	if r.Latency > 0 {
		late := time.NewTimer(r.Latency)
		defer late.Stop()
		<-late.C
	}
	if r.Access != nil && !r.Access.admit(w, req) {
		return
	}
	if r.Hook != nil && r.Hook(w, req) {
		return
	}
	r.Answer(w, req)
}

// Answer is what the registry does without a Hook.
func (r *Registry) Answer(w http.ResponseWriter, req *http.Request) {
	rest, ok := strings.CutPrefix(req.URL.Path, "/v2/")
	if !ok || rest == "" {
		w.WriteHeader(http.StatusOK)
		return
	}
	i := strings.LastIndexByte(rest, '/')
	name, ref := rest[:max(i, 0)], rest[i+1:]
	j := strings.LastIndexByte(name, '/')
	if i < 0 || j < 0 {
		http.NotFound(w, req)
		return
	}
	repository, kind := name[:j], name[j+1:]
	r.mu.Lock()
	d := digest.Digest(ref)
	if kind == "manifests" && !strings.Contains(ref, ":") {
		d = r.tags[repository+":"+ref]
	}
	o, ok := r.objects[repository+"/"+kind+"/"+d.String()]
	r.mu.Unlock()
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", o.mediaType)
	w.Header().Set("Docker-Content-Digest", d.String())
	if r.NoRange {
		req.Header.Del("Range")
	}
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(o.body))
}

// Loopback is for upstream.Options.Connect: it fails the test when anything
// but loopback is to be reached.
func Loopback(t testing.TB) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		ap, err := netip.ParseAddrPort(addr)
		if err != nil || !ap.Addr().IsLoopback() {
			t.Errorf("a test would have connected to %s", addr)
			return nil, fmt.Errorf("no connection to %s in tests", addr)
		}
		return (&net.Dialer{}).DialContext(ctx, network, addr)
	}
}
