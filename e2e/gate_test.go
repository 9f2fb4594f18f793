// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"net"
	"net/http"
	"sync"
	"testing"
)

// gate stands where tarn asks the registry, and can be in the way.
type gate struct {
	addr   string
	server *http.Server
	app    http.Handler

	// chaos sees each request first that is let through, and tells whether it
	// has answered. It is set before the first.
	chaos func(w http.ResponseWriter, r *http.Request) bool

	mu      sync.Mutex
	mode    string
	over    chan struct{} // closed when the mode ends
	l       net.Listener  // nil while connections are refused
	serving sync.WaitGroup
}

// What a gate can do besides letting through.
const (
	refuses = "refuses"
	hangs   = "hangs"
	resets  = "resets"
	says500 = "says 500"
	says502 = "says 502"
	says429 = "says 429"
)

var outages = []string{refuses, hangs, resets, says500, says502, says429}

func newGate(t *testing.T, addr string, app http.Handler) *gate {
	t.Helper()
	g := &gate{addr: addr, app: app, over: make(chan struct{})}
	g.server = &http.Server{Handler: g}
	g.set(t, "")
	t.Cleanup(func() {
		g.set(t, "")
		if err := g.server.Close(); err != nil {
			t.Errorf("close the gate: %v", err)
		}
		g.serving.Wait()
	})
	return g
}

// set changes what becomes of requests; those that hang are let through.
func (g *gate) set(t *testing.T, mode string) {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.over)
	g.mode, g.over = mode, make(chan struct{})
	switch {
	case mode == refuses && g.l != nil:
		g.l.Close()
		g.l = nil
	case mode != refuses && g.l == nil:
		l, err := net.Listen("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		g.l = l
		g.serving.Go(func() { g.server.Serve(l) })
	}
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	mode, over := g.mode, g.over
	g.mu.Unlock()
	switch mode {
	case hangs:
		select {
		case <-over:
		case <-r.Context().Done():
		}
	case refuses, resets: // the first on a connection from before
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	case says500:
		w.WriteHeader(http.StatusInternalServerError)
	case says502:
		w.WriteHeader(http.StatusBadGateway)
	case says429:
		w.WriteHeader(http.StatusTooManyRequests)
	default:
		if g.chaos == nil || !g.chaos(w, r) {
			g.app.ServeHTTP(w, r)
		}
	}
}
