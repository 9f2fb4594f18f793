// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"tarn/cache"
	"tarn/internal/registrytest"
)

// TestARangeThatThereIsNotIsAnErrorLikeAllOthers, wherever the object is.
func TestARangeThatThereIsNotIsAnErrorLikeAllOthers(t *testing.T) {
	t.Parallel()
	const size = 300_000
	blob := random(1, size)
	parts := func(size int) map[string]string {
		return map[string]string{
			fmt.Sprintf("bytes=%d-", size):              fmt.Sprintf("bytes */%d", size),
			fmt.Sprintf("bytes=%d-%d", size+5, size+10): fmt.Sprintf("bytes */%d", size),
			"lines=1-2": "",
		}
	}
	refused := func(t *testing.T, d *tarnd, path, header, contentRange string) {
		t.Helper()
		a := d.get(path, "Range", header).must(t, 416)
		for name, want := range map[string]string{
			"Content-Range": contentRange, "Content-Type": "application/json", "Content-Length": fmt.Sprint(len(a.body)),
			"Docker-Content-Digest": "", "ETag": "", "Accept-Ranges": "", "X-Content-Type-Options": "",
			"Cache-Status": "tarn; fwd=miss; fwd-status=416",
		} {
			if got := a.header.Get(name); got != want {
				t.Errorf("%s: %s: %q, want %q", header, name, got, want)
			}
		}
		var said struct {
			Errors []struct{ Code, Message string }
		}
		if err := json.Unmarshal(a.body, &said); err != nil || len(said.Errors) != 1 || said.Errors[0].Code != "RANGE_INVALID" || said.Errors[0].Message == "" {
			t.Errorf("%s: %s", header, a.body)
		}
	}
	all := func(t *testing.T, d *tarnd, path string, size int) {
		t.Helper()
		for header, contentRange := range parts(size) {
			refused(t, d, path, header, contentRange)
		}
	}
	t.Run("cold", func(t *testing.T) {
		t.Parallel()
		for header, contentRange := range parts(size) {
			r, d := one(t)
			refused(t, d, blobPath("app", r.Blob("app", blob)), header, contentRange)
		}
		for i := range 3 {
			r, d := one(t)
			img := r.Image("app", "v1", blob)
			size := len(img.Body)
			header := fmt.Sprintf("bytes=%d-", size+i)
			refused(t, d, manifestPath("app", []string{"v1", img.Manifest.String()}[i%2]), header, fmt.Sprintf("bytes */%d", size))
		}
	})
	t.Run("warm", func(t *testing.T) {
		t.Parallel()
		r, d := one(t)
		img := r.Image("app", "v1", blob)
		pull := blobPath("app", img.Layers[0])
		d.get(pull).mustBe(t, blob)
		d.get(manifestPath("app", "v1")).mustBe(t, img.Body)
		d.stored(cache.ListedDomain, img.Layers[0])
		d.stored(cache.ListedDomain, img.Manifest)
		all(t, d, pull, size)
		for _, reference := range []string{"v1", img.Manifest.String()} {
			all(t, d, manifestPath("app", reference), len(img.Body))
		}
		// What counts before the range (RFC 9110 13.2.2).
		past := fmt.Sprintf("bytes=%d-", size)
		d.get(pull, "Range", past, "If-None-Match", `"`+img.Layers[0].String()+`"`).must(t, 304)
		d.get(pull, "Range", past, "If-Range", `"another"`).mustBe(t, blob)
	})
	t.Run("in flight", func(t *testing.T) {
		t.Parallel()
		r, d := one(t)
		dgst := r.Blob("app", blob)
		begun, goOn := make(chan struct{}), make(chan struct{})
		var once sync.Once
		r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			if req.Method != "GET" || strings.HasPrefix(req.Header.Get("Range"), "bytes=0-0") {
				return false
			}
			sized(w, size)
			w.Write(blob[:size/2])
			w.(http.Flusher).Flush()
			once.Do(func() { close(begun) })
			<-goOn
			w.Write(blob[size/2:])
			return true
		}
		done := make(chan answer)
		go func() { done <- d.get(blobPath("app", dgst)) }()
		<-begun
		all(t, d, blobPath("app", dgst), size)
		close(goOn)
		(<-done).mustBe(t, blob)
	})
	t.Run("passing through", func(t *testing.T) {
		t.Parallel()
		r := registrytest.New(t)
		d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, maxSize: 1})
		dgst := r.Blob("app", blob)
		d.get(blobPath("app", dgst)).mustBe(t, blob).mustSay(t, "Cache-Status", "tarn; fwd=bypass; fwd-status=200; detail=not-storable")
		all(t, d, blobPath("app", dgst), size)
	})
}
