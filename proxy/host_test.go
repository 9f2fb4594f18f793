// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
)

// spoken sends a request as it is written and returns the answer.
func (d *tarnd) spoken(text string) answer {
	d.t.Helper()
	c, err := net.Dial("tcp", d.Listener.Addr().String())
	if err != nil {
		d.t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		d.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		d.t.Fatalf("%q: %v", text, err)
	}
	defer resp.Body.Close()
	a := answer{status: resp.StatusCode, header: resp.Header}
	a.body, a.err = io.ReadAll(resp.Body)
	return a
}

func TestTarnAnswersToItsOwnNamesOnly(t *testing.T) {
	t.Parallel()
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	short, _, _ := strings.Cut(host, ".")
	d := start(t, setup{names: []string{"mirror.corp.example", "Tarn.tarn.SVC.:5050"}})
	for name, want := range map[string]int{
		"127.0.0.1:5050": 200, "127.0.0.1": 200, "10.1.2.3:80": 200, "[::1]:5050": 200, "[::1]": 200, "[fe80::1%eth0]:1": 200,
		"localhost": 200, "LocalHost:5050": 200, "localhost.:5050": 200,
		"tarn": 200, "tarn:80": 200, host: 200, strings.ToUpper(host) + ":5050": 200, short + ".": 200,
		"mirror.corp.example": 200, "MIRROR.corp.example.:9": 200, "tarn.tarn.svc": 200, "tarn.tarn.svc:443": 200, "": 200,

		"evil.test": 421, "evil.test:5050": 421, "localhost.evil.test": 421, "127.0.0.1.evil.test": 421, "127.0.0.1.nip.io:5050": 421,
		"x.mirror.corp.example": 421, "corp.example": 421, "tarn.evil.test": 421, "tarn.tarn.svc.evil.test": 421, "evil.test:127.0.0.1": 421,
		"[localhost]": 421, "[evil.test]:5050": 421, "evil": 421, ".": 421, ":": 421, strings.Repeat("a.", 4000) + "b": 421,
	} {
		for _, path := range []string{"/v2/", "/v2", "/nothing"} {
			a := d.spoken(fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", path, name))
			if path == "/nothing" && want == 200 {
				a.must(t, 404)
				continue
			}
			if a.status != want {
				t.Errorf("%.40s of %.60q: %d %.300s", path, name, a.status, a.body)
			}
			if want == 421 && (!strings.Contains(string(a.body), "add it to names:") || !strings.Contains(string(a.body), `{"errors":[{"code":"DENIED"`) || len(a.body) > 1000) {
				t.Errorf("%.60q: the answer has %d bytes: %.1000s", name, len(a.body), a.body)
			}
		}
	}
	// RFC 9112 3.2.2: of an absolute URI, it is the URI's host that counts.
	for text, want := range map[string]int{
		"GET http://tarn:80/v2/ HTTP/1.1\r\nHost: tarn\r\n":           200,
		"GET http://127.0.0.1:5050/v2/ HTTP/1.1\r\nHost: tarn\r\n":    200,
		"GET http://evil.test/v2/ HTTP/1.1\r\nHost: tarn\r\n":         421,
		"GET http://tarn/v2/ HTTP/1.1\r\nHost: evil.test\r\n":         200,
		"GET /v2/ HTTP/1.0\r\n":                                       200,
		"GET /v2/ HTTP/1.0\r\nHost: evil.test\r\n":                    421,
		"POST /v2/app/blobs/uploads/ HTTP/1.1\r\nHost: evil.test\r\n": 421,
		"OPTIONS /v2/ HTTP/1.1\r\nHost: evil.test\r\n":                421,
	} {
		if a := d.spoken(text + "Connection: close\r\n\r\n"); a.status != want {
			t.Errorf("%q: %d %s", text, a.status, a.body)
		}
	}
}

func TestPagesOfOtherSitesAreRefused(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	img := r.Image("app", "v1", random(1, 1000))
	path, own := manifestPath("app", "v1"), d.Listener.Addr().String()
	for _, c := range []struct {
		headers []string
		want    int
	}{
		{nil, 200},
		{[]string{"Origin", "http://" + own}, 200},
		{[]string{"Origin", "https://" + own}, 200}, // by what speaks TLS in front of tarn
		{[]string{"Sec-Fetch-Site", "none"}, 200},
		{[]string{"Sec-Fetch-Site", "same-origin"}, 200},
		{[]string{"Origin", "http://evil.test"}, 403},
		{[]string{"Origin", "http://127.0.0.1:1"}, 403}, // another process's page
		{[]string{"Origin", "http://localhost"}, 403},
		{[]string{"Origin", "null"}, 403},
		{[]string{"Origin", "file://" + own}, 403},
		{[]string{"Origin", "http://" + own, "Origin", "http://evil.test"}, 403},
		{[]string{"Sec-Fetch-Site", "cross-site"}, 403},
		{[]string{"Origin", "http://" + own, "Sec-Fetch-Site", "cross-site"}, 403},
	} {
		a := d.get(path, c.headers...)
		if a.status != c.want {
			t.Errorf("%q: %d %s", c.headers, a.status, a.body)
		}
		if c.want == 403 && (strings.Contains(string(a.body), "layers") || !strings.Contains(string(a.body), "other web sites")) {
			t.Errorf("%q: %s", c.headers, a.body)
		}
	}
	d.get(path).mustBe(t, img.Body)
	r.Reset()
	d.get(path, "Origin", "http://evil.test").must(t, 403)
	if n := len(r.Exchanges()); n != 0 {
		t.Errorf("a page had the registry asked %d times", n)
	}
}

func TestNamesThatNoHostHasAreRefused(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", ".", ":5050", "http://tarn", "tarn/x", "*.corp", "tärn.example", "a b", strings.Repeat("a", 254), "[::1]:1"} {
		if err := CheckHost(name); err == nil {
			t.Errorf("%q is taken", name)
		}
	}
}

// FuzzHost: nothing is answered but addresses and the names that are known.
func FuzzHost(f *testing.F) {
	for _, s := range []string{"localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:5", "evil", "127.0.0.1.nip.io", "[localhost]", ":", "a:b:c", "[::1", "::1", "1.2.3.4:"} {
		f.Add(s)
	}
	known := hosts{"localhost": {}, "mirror.corp": {}}
	f.Fuzz(func(t *testing.T, s string) {
		if s == "" || !known.own(s) {
			return
		}
		name := s
		if h, _, err := net.SplitHostPort(s); err == nil {
			name = h
		}
		name = strings.ToLower(strings.TrimSuffix(name, "."))
		if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err != nil && name != "localhost" && name != "mirror.corp" {
			t.Fatalf("%q is answered", s)
		}
	})
}
