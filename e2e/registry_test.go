// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"oras.land/oras-go/v2/registry/remote"
)

// The network namespace is ours alone, so the ports can be fixed, and each test
// starts what listens on them anew.
const (
	upstreamName = "upstream.test" // the registry's name in image references

	tarnAddr      = "127.0.0.1:5050"
	tarnAdminAddr = "127.0.0.1:5051"

	pushAddr      = "127.0.0.1:5000" // where the tests push; nothing is recorded
	forTarnAddr   = "127.0.0.1:5001" // where tarn asks
	forOthersAddr = "127.0.0.1:5002" // where containerd asks when it goes around tarn
)

// route says at which address of the registry a request arrived.
type route string

const (
	byTarn   route = "by tarn"
	pastTarn route = "past tarn"
)

// request is one that the registry got.
type request struct {
	route  route
	method string
	path   string // without "/v2/"
	span   string // the Range header
	status int
	body   int64 // bytes of the body that were sent
}

func (r request) String() string {
	s := r.method + " " + r.path
	if r.span != "" {
		s += " (" + r.span + ")"
	}
	return s
}

// registry is a real registry, seen at three addresses. It records what it is
// asked at two of them, and can be told to misbehave there.
type registry struct {
	app http.Handler

	mu          sync.Mutex
	requests    []*request
	refuseBlobs bool
	brake       *brake
	refused     bool   // everybody, of everything
	limit, left string // what it says of its quota; "" for nothing
	gate        *gate
}

// The registry logs each request; our record is what counts.
func init() { logrus.SetLevel(logrus.ErrorLevel) }

// newRegistry starts an empty registry for one test. Everybody may push to it,
// at an address of its own; who may pull is up to protect, nil for everybody.
func newRegistry(t *testing.T, protect configuration.Auth) *registry {
	t.Helper()
	storage := folder(t, work(), "registry")
	open := newApp(t, storage, nil)
	r := &registry{app: open}
	if protect != nil {
		r.app = newApp(t, storage, protect)
	}
	serve(t, pushAddr, open)
	r.gate = newGate(t, forTarnAddr, r.recorded(byTarn))
	serve(t, forOthersAddr, r.recorded(pastTarn))
	return r
}

// newApp is distribution over this folder.
func newApp(t *testing.T, storage string, protect configuration.Auth) http.Handler {
	t.Helper()
	config := &configuration.Configuration{
		Version: "0.1",
		Storage: configuration.Storage{
			"filesystem":  configuration.Parameters{"rootdirectory": storage},
			"maintenance": configuration.Parameters{"uploadpurging": map[any]any{"enabled": false}},
		},
		Auth: protect,
	}
	config.HTTP.Secret = "only for these tests"
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	return handlers.NewApp(ctx, config)
}

// quota has the registry say so of the requests that it grants, as Docker Hub does.
func (r *registry) quota(limit, left string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.limit, r.left = limit, left
}

// serve answers at addr until the test is over.
func serve(t *testing.T, addr string, h http.Handler) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: h}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Errorf("close the server at %s: %v", addr, err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("the server at %s ended with %v", addr, err)
		}
	})
}

// recorded is the registry behind a record of its requests.
func (r *registry) recorded(way route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		rec := &request{
			route:  way,
			method: req.Method,
			path:   strings.TrimPrefix(req.URL.Path, "/v2/"),
			span:   req.Header.Get("Range"),
		}
		// Recorded before it is answered: who has the answer can rely on the
		// record.
		r.mu.Lock()
		r.requests = append(r.requests, rec)
		refuse, brake, refused := r.refuseBlobs, r.brake, r.refused
		if r.left != "" {
			w.Header().Set("Ratelimit-Limit", r.limit)
			w.Header().Set("Ratelimit-Remaining", r.left)
		}
		r.mu.Unlock()

		rw := &recorder{ResponseWriter: w, registry: r, rec: rec}
		if refused {
			rw.Header().Set("WWW-Authenticate", `Basic realm="the tests"`)
			http.Error(rw, "refused by the tests", http.StatusUnauthorized)
			return
		}
		if strings.Contains(rec.path, "/blobs/") {
			if refuse {
				http.Error(rw, "the tests have switched off blobs", http.StatusServiceUnavailable)
				return
			}
			if brake != nil && way == byTarn && req.Method == http.MethodGet && strings.HasSuffix(rec.path, brake.object.String()) {
				rw.brake, rw.gone = brake, req.Context().Done()
				fmt.Sscanf(rec.span, "bytes=%d-", &rw.from)
			}
		}
		r.app.ServeHTTP(rw, req)
	})
}

// recorder completes the record of a request while it is answered. It hides
// io.ReaderFrom, so every byte comes by Write.
type recorder struct {
	http.ResponseWriter
	registry *registry
	rec      *request
	brake    *brake
	from     int64 // first byte that was asked for
	gone     <-chan struct{}
}

func (w *recorder) WriteHeader(status int) {
	w.registry.mu.Lock()
	w.rec.status = status
	w.registry.mu.Unlock()
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(p []byte) (int, error) {
	w.registry.mu.Lock()
	if w.rec.status == 0 {
		w.rec.status = http.StatusOK // as net/http does
	}
	w.rec.body += int64(len(p))
	sent := w.from + w.rec.body
	w.registry.mu.Unlock()
	n, err := w.ResponseWriter.Write(p)
	if w.brake != nil && err == nil && sent >= w.brake.after {
		if err := http.NewResponseController(w.ResponseWriter).Flush(); err != nil {
			return n, err
		}
		w.brake.pulled.Do(func() { close(w.brake.reached) })
		select {
		case <-w.brake.release:
		case <-w.gone:
			return n, errors.New("the client has gone")
		}
	}
	return n, err
}

// brake stops all bodies of one blob on their way to tarn behind its first
// bytes, until it is released.
type brake struct {
	object  digest.Digest
	after   int64
	pulled  sync.Once
	reached chan struct{} // closed when one is there
	release chan struct{} // closed by the test
}

// stopMidway puts a brake on a blob.
func (r *registry) stopMidway(object digest.Digest, after int64) *brake {
	b := &brake{object: object, after: after, reached: make(chan struct{}), release: make(chan struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.brake = b
	return b
}

// refuseAll makes both recorded addresses answer 401 to everybody, as a registry
// does to tokens that have run out.
func (r *registry) refuseAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refused = true
}

// switchBlobsOff makes both recorded addresses answer 503 to every request for
// a blob.
func (r *registry) switchBlobsOff(off bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refuseBlobs = off
}

// take returns what was recorded since the last time.
func (r *registry) take() []request {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]request, len(r.requests))
	for i, rec := range r.requests {
		out[i] = *rec
	}
	r.requests = nil
	return out
}

// wantRequests fails the test unless exactly these requests came by tarn since
// the last take, in any order, and none past it.
func (r *registry) wantRequests(t *testing.T, what string, want ...string) {
	t.Helper()
	var got []string
	for _, req := range r.take() {
		if req.route == pastTarn {
			t.Errorf("%s: containerd asked the registry past tarn: %s", what, req)
			continue
		}
		got = append(got, req.method+" "+req.path) // small objects are asked for in one part
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s: the registry was asked\n\t%s\nwant\n\t%s", what, strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// wantFromDisk fails the test unless the registry was asked, since the last
// take, what the tag means, and nothing else.
func (r *registry) wantFromDisk(t *testing.T, what string, i image) {
	t.Helper()
	r.wantRequests(t, what, i.headTag())
}

// wantBodyBytes fails the test unless, in these requests by tarn, each object's
// bytes crossed exactly once.
func wantBodyBytes(t *testing.T, what string, requests []request, objects []v1.Descriptor) {
	t.Helper()
	got := map[digest.Digest]int64{}
	for _, req := range requests {
		if req.route == byTarn && req.method == http.MethodGet {
			got[digest.Digest(req.path[strings.LastIndex(req.path, "/")+1:])] += req.body
		}
	}
	want := map[digest.Digest]int64{}
	for _, o := range objects {
		want[o.Digest] = o.Size
	}
	if !maps.Equal(got, want) {
		t.Errorf("%s: bytes from the registry by object\n\t%v\nwant\n\t%v", what, got, want)
	}
}

// repository is where tests push to.
func repository(t *testing.T, name string) *remote.Repository {
	t.Helper()
	repo, err := remote.NewRepository(pushAddr + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	repo.PlainHTTP = true
	return repo
}

// push stores one object.
func push(t *testing.T, repo *remote.Repository, desc v1.Descriptor, content []byte) {
	t.Helper()
	if err := repo.Push(t.Context(), desc, bytes.NewReader(content)); err != nil {
		t.Fatalf("push %s %s: %v", desc.MediaType, desc.Digest, err)
	}
}
