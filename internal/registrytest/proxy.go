// SPDX-License-Identifier: Apache-2.0

package registrytest

import (
	"bytes"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
)

// Proxy is an egress proxy. It notes what it can read, and connects to one
// registry whatever host it is told. Its fields may be set before the first request.
type Proxy struct {
	*httptest.Server
	to       string // host:port
	Password string // USER:PASSWORD that it wants; "" for none
	Refuse   int    // the status of each answer; 0 for connecting

	mu     sync.Mutex
	hosts  []string // that it was told
	passed bytes.Buffer
}

// NewProxy starts one by httptest.NewServer or NewTLSServer; to is the host:port that it
// connects to.
func NewProxy(t testing.TB, to string, start func(http.Handler) *httptest.Server) *Proxy {
	f := &Proxy{to: to}
	f.Server = start(f)
	t.Cleanup(f.Close)
	return f
}

// Told are the hosts that it was told, of CONNECT with their port.
func (f *Proxy) Told() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.hosts)
}

// SawAny tells whether one of the words went through it in the clear.
func (f *Proxy) SawAny(words ...string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.ContainsFunc(words, func(word string) bool { return bytes.Contains(f.passed.Bytes(), []byte(word)) })
}

// Write takes what it can read.
func (f *Proxy) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.passed.Write(p)
}

// ServeHTTP connects, or passes on what comes without TLS.
func (f *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	host := r.URL.Host
	if r.Method == http.MethodConnect {
		host = r.Host
	}
	f.mu.Lock()
	f.hosts = append(f.hosts, host)
	f.mu.Unlock()
	status := f.Refuse
	if want := "Basic " + base64.StdEncoding.EncodeToString([]byte(f.Password)); f.Password != "" && r.Header.Get("Proxy-Authorization") != want {
		status = http.StatusProxyAuthRequired
	}
	r.Header.Del("Proxy-Authorization")
	if status != 0 {
		w.WriteHeader(status)
		return
	}
	r.Write(f) // what it can read
	conn, err := net.Dial("tcp", f.to)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer conn.Close()
	if r.Method != http.MethodConnect {
		r.Header.Set("Connection", "close")
		if err := r.Write(conn); err != nil {
			return
		}
		client, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer client.Close()
		io.Copy(client, conn)
		return
	}
	client, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer client.Close()
	io.WriteString(client, "HTTP/1.1 200 OK\r\n\r\n")
	go func() {
		io.Copy(conn, io.TeeReader(client, f))
		conn.Close()
	}()
	io.Copy(client, conn)
}
