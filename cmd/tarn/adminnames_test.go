// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"tarn/internal/registrytest"
)

// TestNoNameIsToldAtThePort, whatever is asked there, where admin_names: socket; nor where
// what changes something may be asked for at it.
func TestNoNameIsToldAtThePort(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	image := r.Image("team/discreet", "hush", noises(1, 1000)[0])
	p := runWith(t, t.TempDir(), "admin_names: socket\nadmin_changes: tcp\n", "--upstream", "lab.test="+r.URL)
	p.pull("team/discreet", "hush", append(image.Layers, image.Config)...)
	p.until("it is told at the socket", func() bool {
		out, _, _ := p.tell("images", "-o", "wide")
		return strings.Contains(out, "team/discreet")
	})
	ask := func(method, path, body string) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, method, p.admin+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		said := make([]byte, 64<<10)
		n, err := io.ReadAtLeast(resp.Body, said, 1)
		if path != "/api/v1/events" {
			var rest []byte
			rest, err = io.ReadAll(resp.Body)
			said, n = append(said[:n], rest...), n+len(rest)
		}
		if err != nil {
			t.Errorf("%s %s: %v", method, path, err)
		}
		if bytes.Contains(said[:n], []byte("discreet")) || bytes.Contains(said[:n], []byte("hush")) {
			t.Errorf("%s %s %s says %s", method, path, body, said[:n])
		}
	}
	var listing struct {
		Paths []struct{ Method, Path string }
	}
	fetchJSON(t, p.admin+"/api/v1", &listing)
	if len(listing.Paths) < 15 {
		t.Fatalf("there is only %v", listing)
	}
	begins := image.Manifest.String()[:len("sha256:")+12]
	for _, one := range listing.Paths {
		path := strings.Replace(one.Path, "{ref...}", begins, 1)
		for _, body := range []string{"", `{"image": "` + begins + `"}`, `{"image": "` + image.Manifest.String() + `"}`, `{"images": ["` + begins + `"]}`} {
			ask(one.Method, path, body)
		}
	}
	for _, path := range []string{"/", "/readyz", "/healthz", "/metrics", "/api/v1/images?image=" + begins, "/api/v1/explain?image=" + image.Manifest.String()} {
		ask("GET", path, "")
	}
}
