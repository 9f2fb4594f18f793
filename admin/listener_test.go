// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// serve serves on a real listener, as the daemon does, and returns a client
// that connects to it whatever the URL says.
func serve(t *testing.T, network, address string) *http.Client {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(New(Options{
		Listener: l.Addr(),
		Registry: prometheus.NewRegistry(),
		Status:   func() any { return map[string]string{"private": "names"} },
	}))
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, l.Addr().String())
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func get(t *testing.T, c *http.Client, method, url string) *http.Response {
	t.Helper()
	req, err := http.NewRequest(method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

func TestOverASocketEveryNameIsFine(t *testing.T) {
	t.Parallel()
	c := serve(t, "unix", filepath.Join(t.TempDir(), "admin.sock"))
	for _, url := range []string{"http://tarn/api/v1/status", "http://localhost/metrics", "http://evil.example/api/v1/status"} {
		if resp := get(t, c, http.MethodGet, url); resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %s", url, resp.Status)
		}
	}
}

func TestOnEveryAddressNoNameButLocalhostIsFine(t *testing.T) {
	t.Parallel()
	c := serve(t, "tcp", "127.0.0.1:0")
	wild := serve(t, "tcp", ":0")
	for _, test := range []struct {
		host                string
		onLoopback, onEvery int
	}{
		{"localhost:5051", 200, 200},
		{"127.0.0.1:5051", 200, 200},
		{"[::1]:5051", 200, 200},
		{"192.0.2.7:5051", 403, 200}, // may be one of the node's
		{"[2001:db8::7]", 403, 200},
		{"evil.example:5051", 403, 403},
		{"192.0.2.7.evil.example", 403, 403},
		{"localhost.evil.example", 403, 403},
	} {
		url := "http://" + test.host + "/api/v1/status"
		if got := get(t, c, http.MethodGet, url).StatusCode; got != test.onLoopback {
			t.Errorf("on loopback, %s: %d", test.host, got)
		}
		if got := get(t, wild, http.MethodGet, url).StatusCode; got != test.onEvery {
			t.Errorf("on every address, %s: %d", test.host, got)
		}
	}
}

func TestMethodsAndPathsThatAreNotThere(t *testing.T) {
	t.Parallel()
	c := serve(t, "tcp", "127.0.0.1:0")
	for _, path := range []string{"/page.html", "/page/page.js", "/api/v1/", "/api/v1/status/", "/v2/", "/metrics/x", "/healthz/"} {
		resp := get(t, c, http.MethodGet, "http://localhost"+path)
		var body map[string]string
		if err := json.NewDecoder(resp.Body).Decode(&body); err != nil {
			t.Errorf("%s: not JSON: %v", path, err)
		}
		if resp.StatusCode != http.StatusNotFound || body["error"] == "" {
			t.Errorf("%s: %s %v", path, resp.Status, body)
		}
	}
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/api/v1/status", "/none"} {
		for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions} {
			resp := get(t, c, method, "http://localhost"+path)
			if resp.StatusCode != http.StatusMethodNotAllowed || resp.Header.Get("Allow") != "GET, HEAD" {
				t.Errorf("%s %s: %s, Allow %q", method, path, resp.Status, resp.Header.Get("Allow"))
			}
		}
		if path == "/none" {
			continue
		}
		resp := get(t, c, http.MethodHead, "http://localhost"+path)
		if resp.StatusCode != http.StatusOK || resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("HEAD %s: %s, Cache-Control %q", path, resp.Status, resp.Header.Get("Cache-Control"))
		}
	}
}
