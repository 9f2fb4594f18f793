// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"runtime"
	"time"

	"tarn/cache"
	"tarn/index"

	"github.com/opencontainers/go-digest"
)

// images is what may be asked and told of what is stored.
type images struct {
	store *cache.Cache
	parse func(string) (k index.RepositoryKey, tag string, d digest.Digest, err error)
}

// register serves what reads, and what changes something unless it says where that
// is done.
func (i images) register(mux *http.ServeMux, readOnly string) {
	mux.HandleFunc("GET /api/v1/images", i.list)
	mux.HandleFunc("GET /api/v1/pins", i.pins)
	for pattern, change := range map[string]http.HandlerFunc{
		"POST /api/v1/pins":   i.pin,
		"DELETE /api/v1/pins": i.unpin,
		"POST /api/v1/evict":  i.evict,
		"POST /api/v1/verify": i.verify,
	} {
		if readOnly != "" {
			change = func(w http.ResponseWriter, _ *http.Request) {
				serveJSON(w, http.StatusForbidden, failure(readOnly))
			}
		}
		mux.HandleFunc(pattern, change)
	}
}

// Pinned is the answer to a pin.
type Pinned struct {
	cache.Pin
	HereBytes  int64 `json:"hereBytes"`
	TotalBytes int64 `json:"totalBytes"` // as far as its manifests are here
}

// Order is what POST and DELETE are told.
type Order struct {
	Image string `json:"image,omitempty"`
	// Platforms of a pin: none are this node's, "all" is all.
	Platforms []string `json:"platforms,omitempty"`
	// Rate of verifying, in bytes a second; 0 is as fast as the disk.
	Rate int64 `json:"rate,omitempty"`
}

const maxOrder = 64 << 10

func readOrder(w http.ResponseWriter, r *http.Request) (o Order, ok bool) {
	// A page of another site cannot send this type unasked.
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		serveJSON(w, http.StatusUnsupportedMediaType, failure("the Content-Type must be application/json"))
		return o, false
	}
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxOrder))
	dec.DisallowUnknownFields()
	err := dec.Decode(&o)
	if err == nil {
		if _, more := dec.Token(); more != io.EOF {
			err = errors.New("there is something behind it")
		}
	}
	if err != nil {
		serveJSON(w, http.StatusBadRequest, failure("the body cannot be read: "+err.Error()))
		return o, false
	}
	if o.Rate < 0 {
		serveJSON(w, http.StatusBadRequest, failure("rate is negative"))
		return o, false
	}
	// All is read, and from now on it is listened whether the client leaves.
	http.NewResponseController(w).SetReadDeadline(time.Time{})
	return o, true
}

// named reads the image of an order.
func (i images) named(w http.ResponseWriter, r *http.Request) (o Order, p cache.Pin, ok bool) {
	if o, ok = readOrder(w, r); !ok {
		return o, p, false
	}
	k, tag, d, err := i.parse(o.Image)
	if err != nil {
		serveJSON(w, http.StatusBadRequest, failure(err.Error()))
		return o, p, false
	}
	return o, cache.Pin{Upstream: k.Upstream, Repository: k.Repository, Tag: tag, Digest: d}, true
}

func serveFailure(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	switch {
	case errors.Is(err, cache.ErrNotStored), errors.Is(err, cache.ErrNotPinned):
		status = http.StatusNotFound
	case errors.Is(err, cache.ErrVerifying), errors.Is(err, cache.ErrPinned), errors.Is(err, cache.ErrPinsTooLarge), errors.Is(err, cache.ErrShared):
		status = http.StatusConflict
	case errors.Is(err, cache.ErrNoPin):
		status = http.StatusBadRequest
	case errors.Is(err, cache.ErrClosed):
		status = http.StatusServiceUnavailable
	}
	serveJSON(w, status, failure(err.Error()))
}

func (i images) list(w http.ResponseWriter, _ *http.Request) {
	all, err := i.store.Images()
	if err != nil {
		serveFailure(w, err)
		return
	}
	if all == nil {
		all = []cache.Image{}
	}
	serveJSON(w, http.StatusOK, map[string]any{"images": all})
}

func (i images) pins(w http.ResponseWriter, _ *http.Request) {
	pins := i.store.Pins()
	if pins == nil {
		pins = []cache.Pin{}
	}
	serveJSON(w, http.StatusOK, map[string]any{"pins": pins})
}

func (i images) pin(w http.ResponseWriter, r *http.Request) {
	o, p, ok := i.named(w, r)
	if !ok {
		return
	}
	switch {
	case len(o.Platforms) == 0:
		p.Platforms = []string{runtime.GOOS + "/" + runtime.GOARCH}
	case len(o.Platforms) > 1 || o.Platforms[0] != "all":
		p.Platforms = o.Platforms
	}
	t, err := i.store.Pin(p)
	if err != nil {
		serveFailure(w, err)
		return
	}
	serveJSON(w, http.StatusOK, Pinned{p, t.Here, t.Total})
}

func (i images) unpin(w http.ResponseWriter, r *http.Request) {
	_, p, ok := i.named(w, r)
	if !ok {
		return
	}
	if err := i.store.Unpin(p); err != nil {
		serveFailure(w, err)
		return
	}
	serveJSON(w, http.StatusOK, p)
}

func (i images) evict(w http.ResponseWriter, r *http.Request) {
	_, p, ok := i.named(w, r)
	if !ok {
		return
	}
	e, err := i.store.EvictImage(index.RepositoryKey{Upstream: p.Upstream, Repository: p.Repository}, p.Tag, p.Digest)
	if err != nil {
		serveFailure(w, err)
		return
	}
	serveJSON(w, http.StatusOK, e)
}

// Verified is a line of the answer to verify: the last one says that it is done,
// or why not.
type Verified struct {
	cache.Verification
	Done  bool   `json:"done"`
	Error string `json:"error,omitempty"`
}

const (
	reportEvery   = 100 * time.Millisecond
	reportTimeout = time.Minute // a client that takes no report for so long is gone
)

// verify answers with a line now and then while it reads the disk. It ends when
// the client leaves.
func (i images) verify(w http.ResponseWriter, r *http.Request) {
	o, ok := readOrder(w, r)
	if !ok {
		return
	}
	control := http.NewResponseController(w)
	lines := json.NewEncoder(w)
	var last time.Time
	send := func(v Verified) {
		if last.IsZero() {
			w.Header().Set("Content-Type", "application/x-ndjson")
		}
		last = time.Now()
		control.SetWriteDeadline(last.Add(reportTimeout))
		lines.Encode(v) // who has left has ended the context
		control.Flush()
	}
	v, err := i.store.Verify(r.Context(), o.Rate, func(v cache.Verification) {
		if time.Since(last) >= reportEvery {
			send(Verified{Verification: v})
		}
	})
	if errors.Is(err, cache.ErrVerifying) {
		serveFailure(w, err)
		return
	}
	end := Verified{Verification: v, Done: err == nil}
	if err != nil {
		end.Error = fmt.Sprintf("verify: %v", err)
	}
	send(end)
}
