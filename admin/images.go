// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"runtime"
	"slices"
	"time"

	"tarn/cache"
	"tarn/cache/store"
	"tarn/images"
	"tarn/proxy"
)

// imageAPI is what may be asked and told of what is stored.
type imageAPI struct {
	cache *cache.Cache
	parse func(string) (proxy.ImageName, error)
	ask   func(context.Context, proxy.ImageName) (proxy.Offered, error)
	fetch func(context.Context, proxy.ImageName, proxy.PullOptions) (proxy.Pulled, error)
	pulls chan struct{} // has one for each that is running
}

// Pinned is the answer to a pin.
type Pinned struct {
	Image string `json:"image"` // its canonical name
	images.Pin
	HereBytes  int64 `json:"hereBytes"`
	TotalBytes int64 `json:"totalBytes"` // as far as its manifests are here
	// Warning says why it is not known whether there is such an image.
	Warning string `json:"warning,omitempty"`
}

// Unpinned is the answer to unpinning.
type Unpinned struct {
	Image string `json:"image"`
	images.Pin
}

// Evicted is the answer to an eviction.
type Evicted struct {
	Image string `json:"image"`
	store.Evicted
}

// Order is what POST and DELETE are told.
type Order struct {
	Image string `json:"image,omitempty"`
	// Images of a pull, at most maxImages.
	Images []string `json:"images,omitempty"`
	// Pin has a pull pin what it fetches, and AsNode has it fail unless the repository
	// is shared.
	Pin    bool `json:"pin,omitempty"`
	AsNode bool `json:"asNode,omitempty"`
	// Platforms of a pin or a pull: none are this node's, "all" is all; at most maxPlatforms.
	Platforms []string `json:"platforms,omitempty"`
	// Rate of verifying, in bytes a second; 0 is as fast as the disk.
	Rate int64 `json:"rate,omitempty"`
}

const (
	maxOrder     = 256 << 10 // bytes: so many are maxImages names of twice the usual length
	maxPlatforms = 64        // an index has a dozen
	maxPlatform  = 64        // characters
	// allPlatforms is the word for all that an index has.
	allPlatforms = "all"
	// nodePlatform is what a pin keeps of an index when none is named.
	nodePlatform = runtime.GOOS + "/" + runtime.GOARCH
)

func readOrder(w http.ResponseWriter, r *http.Request) (o Order, ok bool) {
	// A page of another site cannot send this type unasked.
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		refuse(w, http.StatusUnsupportedMediaType, "unsupported_media_type", "the Content-Type must be application/json", "send it with Content-Type: application/json")
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
		invalid(w, "the body cannot be read: "+err.Error())
		return o, false
	}
	if len(o.Platforms) > maxPlatforms {
		invalid(w, fmt.Sprintf("%d platforms are named; %d is the most", len(o.Platforms), maxPlatforms))
		return o, false
	}
	for _, p := range o.Platforms {
		if len(p) > maxPlatform {
			invalid(w, fmt.Sprintf("a platform's name has %d characters; %d is the most", len(p), maxPlatform))
			return o, false
		}
	}
	if o.Rate < 0 {
		invalid(w, "rate is negative")
		return o, false
	}
	// All is read, and from now on it is listened whether the client leaves.
	http.NewResponseController(w).SetReadDeadline(time.Time{})
	return o, true
}

// named reads the image of an order.
func (i imageAPI) named(w http.ResponseWriter, r *http.Request) (o Order, n proxy.ImageName, ok bool) {
	if o, ok = readOrder(w, r); !ok {
		return o, n, false
	}
	n, err := i.parse(o.Image)
	if err != nil {
		invalid(w, err.Error())
		return o, n, false
	}
	return o, n, true
}

// maxFilters bounds how many images are asked for at once.
const maxFilters = 64

// list answers with all images, or with those that ?image= names and each kind of ?filter=
// lets pass.
func (i imageAPI) list(w http.ResponseWriter, r *http.Request) {
	all := i.cache.Images().List()
	query := r.URL.Query()
	asked := query["image"]
	if n := len(asked) + len(query["filter"]); n > maxFilters {
		invalid(w, fmt.Sprintf("%d images and filters are asked for; %d is the most", n, maxFilters))
		return
	}
	passes, err := parseFilters(query["filter"], time.Now())
	if err != nil {
		serveFailure(w, err)
		return
	}
	wanted := make([]bool, len(all))
	for _, s := range asked {
		n, err := i.parse(s)
		if err != nil {
			invalid(w, err.Error())
			return
		}
		found := false
		for j, image := range all {
			if means(n, image) {
				wanted[j], found = true, true
			}
		}
		if !found {
			serveFailure(w, notHere(n, all))
			return
		}
	}
	found := []images.Image{}
	for j, image := range all {
		if (len(asked) == 0 || wanted[j]) && passes(image) {
			found = append(found, image)
		}
	}
	serveJSON(w, http.StatusOK, map[string]any{"images": found})
}

// one answers with one image, whose name is the rest of the path, as it is or with its
// slashes encoded.
func (i imageAPI) one(w http.ResponseWriter, r *http.Request) {
	n, err := i.parse(r.PathValue("ref"))
	if err != nil {
		invalid(w, err.Error())
		return
	}
	all := i.cache.Images().List()
	if n.Bare {
		n, err = bare(n, all, false)
	}
	var found []images.Image
	for _, image := range all {
		if err == nil && means(n, image) && !slices.ContainsFunc(found, func(f images.Image) bool { return f.Digest == image.Digest }) {
			found = append(found, image)
		}
	}
	switch {
	case err == nil && len(found) == 0:
		err = notHere(n, all)
	case len(found) > 1:
		err = several(n, found)
	}
	if err != nil {
		serveFailure(w, err)
		return
	}
	serveJSON(w, http.StatusOK, found[0])
}

func (i imageAPI) pins(w http.ResponseWriter, _ *http.Request) {
	pins := i.cache.Images().Pins()
	if pins == nil {
		pins = []images.Pin{}
	}
	serveJSON(w, http.StatusOK, map[string]any{"pins": pins})
}

func (i imageAPI) pin(w http.ResponseWriter, r *http.Request) {
	o, n, ok := i.named(w, r)
	if !ok {
		return
	}
	n, err := i.toPin(n)
	if err != nil {
		serveFailure(w, err)
		return
	}
	warning, err := i.checked(r.Context(), n, o.Platforms)
	if err != nil {
		serveFailure(w, err)
		return
	}
	p := withPlatforms(pinOf(n), o.Platforms)
	t, err := i.cache.Images().Pin(p)
	if err != nil {
		serveFailure(w, err)
		return
	}
	serveJSON(w, http.StatusOK, Pinned{n.String(), p, t.Here, t.Total, warning})
}

// withPlatforms is a pin for these platforms of an index, or this node's.
func withPlatforms(p images.Pin, platforms []string) images.Pin {
	switch {
	case len(platforms) == 0:
		p.Platforms = []string{nodePlatform}
	case !slices.Contains(platforms, allPlatforms):
		p.Platforms = platforms
	}
	return p
}

func (i imageAPI) unpin(w http.ResponseWriter, r *http.Request) {
	_, n, ok := i.named(w, r)
	if !ok {
		return
	}
	p, err := i.toUnpin(n)
	if err == nil {
		err = i.cache.Images().Unpin(p)
	}
	if err != nil {
		serveFailure(w, err)
		return
	}
	serveJSON(w, http.StatusOK, Unpinned{p.String(), p})
}

func (i imageAPI) evict(w http.ResponseWriter, r *http.Request) {
	_, n, ok := i.named(w, r)
	if !ok {
		return
	}
	n, err := i.toEvict(n)
	if err != nil {
		serveFailure(w, err)
		return
	}
	e, err := i.cache.Images().Evict(n.Repository, n.Tag, n.Digest)
	if errors.Is(err, images.ErrNotHere) {
		err = notHere(n, i.cache.Images().List())
	}
	if err != nil {
		serveFailure(w, err)
		return
	}
	serveJSON(w, http.StatusOK, Evicted{n.String(), e})
}

// Verified is a line of the answer to verify: the last one says that it is done,
// or why not.
type Verified struct {
	store.Verification
	Done  bool   `json:"done"`
	Error string `json:"error,omitempty"`
}

const (
	reportEvery   = 100 * time.Millisecond
	reportTimeout = time.Minute // a client that takes no report for so long is gone
)

// verify answers with a line now and then while it reads the disk. It ends when
// the client leaves.
func (i imageAPI) verify(w http.ResponseWriter, r *http.Request) {
	o, ok := readOrder(w, r)
	if !ok {
		return
	}
	out := &lines{control: http.NewResponseController(w), to: json.NewEncoder(w)}
	var last time.Time
	send := func(v Verified) {
		if last.IsZero() {
			w.Header().Set("Content-Type", "application/x-ndjson")
		}
		last = time.Now()
		out.send(v)
	}
	v, err := i.cache.Store().Verify(r.Context(), o.Rate, func(v store.Verification) {
		if time.Since(last) >= reportEvery {
			send(Verified{Verification: v})
		}
	})
	if errors.Is(err, store.ErrVerifying) {
		serveFailure(w, err)
		return
	}
	end := Verified{Verification: v, Done: err == nil}
	if err != nil {
		end.Error = fmt.Sprintf("verify: %v", err)
	}
	send(end)
}
