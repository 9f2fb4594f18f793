// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func handler(ready bool) http.Handler {
	return New(Options{
		Listener: &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3), Port: 5051},
		Registry: prometheus.NewRegistry(),
		Ready:    func() (bool, []Check) { return ready, []Check{{Name: "store", OK: ready, Detail: "why"}} },
		Status:   func() any { return map[string]string{"private": "names"} },
	})
}

func ask(t *testing.T, s *httptest.Server, method, path string, headers map[string]string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, s.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range headers {
		req.Header.Set(k, v)
		if k == "Host" {
			req.Host = v
		}
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.Header.Get("X-Content-Type-Options") != "nosniff" || resp.Header.Get("Content-Security-Policy") == "" {
		t.Errorf("%s %s: headers %v", method, path, resp.Header)
	}
	return resp.StatusCode, string(body)
}

func TestWhoMayAsk(t *testing.T) {
	s := httptest.NewServer(handler(true))
	defer s.Close()
	for _, c := range []struct {
		path    string
		headers map[string]string
		want    int
	}{
		{"/api/v1/status", nil, 200},
		{"/metrics", nil, 200},
		{"/api/v1/status", map[string]string{"Host": "localhost:5051"}, 200},
		{"/api/v1/status", map[string]string{"Host": "[::1]:5051"}, 200},
		{"/api/v1/status", map[string]string{"Host": "10.1.2.3:5051"}, 200},
		{"/api/v1/status", map[string]string{"Host": "10.1.2.4:5051"}, 403},
		{"/api/v1/status", map[string]string{"Host": "evil.example"}, 403},
		{"/api/v1/status", map[string]string{"Host": "localhost.evil.example"}, 403},
		{"/api/v1/status", map[string]string{"Host": "127.0.0.1.nip.io"}, 403},
		{"/metrics", map[string]string{"Host": "evil.example"}, 403},
		{"/api/v1/status", map[string]string{"Origin": "http://localhost:5051"}, 200},
		{"/api/v1/status", map[string]string{"Origin": "https://evil.example"}, 403},
		{"/api/v1/status", map[string]string{"Origin": "null"}, 403},
		{"/api/v1/status", map[string]string{"Origin": "file://localhost"}, 403},
		{"/api/v1/status", map[string]string{"Sec-Fetch-Site": "cross-site"}, 403},
		{"/api/v1/status", map[string]string{"Sec-Fetch-Site": "same-origin"}, 200},
		{"/healthz", map[string]string{"Host": "evil.example"}, 200},
		{"/readyz", map[string]string{"Host": "10.9.9.9"}, 200},
		{"/nothing", nil, 404},
		{"/nothing", map[string]string{"Host": "evil.example"}, 403},
	} {
		status, body := ask(t, s, "GET", c.path, c.headers)
		if status != c.want || status != 200 && strings.Contains(body, "names") {
			t.Errorf("%s %v: %d %s", c.path, c.headers, status, body)
		}
	}
	if status, _ := ask(t, s, "POST", "/api/v1/status", nil); status != 405 {
		t.Errorf("POST: %d", status)
	}
}

func TestReadyzSaysWhyNot(t *testing.T) {
	s := httptest.NewServer(handler(false))
	defer s.Close()
	if status, body := ask(t, s, "GET", "/readyz", nil); status != 503 || !strings.Contains(body, "why") {
		t.Errorf("%d %s", status, body)
	}
}

func TestASocketHasNoHostToCheck(t *testing.T) {
	s := httptest.NewServer(New(Options{Listener: &net.UnixAddr{Name: "/x"}, Status: func() any { return "names" }}))
	defer s.Close()
	if status, _ := ask(t, s, "GET", "/api/v1/status", map[string]string{"Host": "anything"}); status != 200 {
		t.Error(status)
	}
}

// FuzzHost: no host but localhost and addresses passes.
func FuzzHost(f *testing.F) {
	for _, s := range []string{"localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:5", "evil", "127.0.0.1.nip.io", "[localhost]", ":"} {
		f.Add(s)
	}
	own := netip.MustParseAddr("10.1.2.3")
	f.Fuzz(func(t *testing.T, s string) {
		if !ownHost(s, own) {
			return
		}
		host := s
		if h, _, err := net.SplitHostPort(s); err == nil {
			host = h
		}
		if strings.EqualFold(host, "localhost") {
			return
		}
		a, err := netip.ParseAddr(strings.Trim(host, "[]"))
		if err != nil || !a.Unmap().IsLoopback() && a.Unmap() != own {
			t.Fatalf("%q passes", s)
		}
	})
}
