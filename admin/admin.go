// SPDX-License-Identifier: Apache-2.0

// Package admin is the listener for people and probes: health, metrics and
// JSON for curl.
//
// Contract: what only reads is answered on each listener; what changes something, or
// costs much, where Options.ReadOnly is empty, which is on a socket that only tarn's
// own user may open, unless the operator widens that. /healthz and /readyz answer whoever asks, since they tell nothing
// that is worth hiding; everything else only who asks for this host by name or
// address, so that a web page elsewhere cannot read it through a browser (DNS
// rebinding, cross-site requests). Names of private images may appear here and
// nowhere else.
//
// Failure model: a request that may not be answered gets 403 with what to do;
// nothing here waits for a registry but a pin, for 9 s at most.
//
// What changes something takes JSON, which a page of another site cannot send
// unasked. A reload reads what the operator wrote, never what was sent. It never serves a blob.
package admin

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	"tarn/cache"
	"tarn/explain"
	"tarn/history"
	"tarn/proxy"

	"github.com/prometheus/client_golang/prometheus"
)

// Check is one line of /readyz.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// Options of the handler. Listener is required.
type Options struct {
	// Listener is the address that is listened on: its own IP address is a
	// host by which it may be asked.
	Listener net.Addr
	// Registry has the metrics. nil serves none.
	Registry *prometheus.Registry
	// Ready says whether registry requests are served, and what is to be
	// known of it. nil means ready.
	Ready func() (bool, []Check)
	// Version is this tarn's, which each answer names. "" names none.
	Version string
	// Status is the document of /api/v1/status. nil serves none.
	Status func() any
	// Upstreams is the document of /api/v1/upstreams. nil serves none.
	Upstreams func() any
	// ReadOnly says, to who asks this listener to change something, where that is
	// done. "" means here.
	ReadOnly string
	// NamesElsewhere says, to who asks this listener for what names images, where that
	// is told. "" means here.
	NamesElsewhere string
	// Dir is the data directory, by which this tarn is told from another one. ""
	// means that it is not.
	Dir string
	// Store has the images, and Parse reads their names as people write them. nil
	// serves none.
	Store *cache.Cache
	Parse func(string) (proxy.ImageName, error)
	// Reload reads the configuration anew, and says what became of it; an error
	// says why nothing did. nil serves none.
	Reload func() (Reloaded, error)
	// Explain explains an image that has a repository, and History is what happened.
	// nil serves none.
	Explain func(context.Context, proxy.ImageName) explain.Explanation
	History *history.History
	// Process is the document of /api/v1/process, which is served over a socket only.
	// nil serves none.
	Process func() any
	// Closing is closed when this listener is being stopped: streams of events, which
	// have no end of their own, end then. nil never is.
	Closing <-chan struct{}
	// Ask has the registry say what there is of an image that is to be pinned, as
	// proxy.AskImage does. nil asks nobody.
	Ask func(context.Context, proxy.ImageName) (proxy.Offered, error)
	// Pull fetches an image into the store, as Proxy.Pull does. nil fetches none.
	Pull func(context.Context, proxy.ImageName, proxy.PullOptions) (proxy.Pulled, error)
}

// New returns the handler.
func New(opts Options) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		ready, checks := true, []Check{}
		if opts.Ready != nil {
			ready, checks = opts.Ready()
		}
		status := http.StatusOK
		if !ready {
			status = http.StatusServiceUnavailable
		}
		serveJSON(w, status, map[string]any{"ready": ready, "checks": checks})
	})
	routes := opts.routes()
	mux.Handle("/", guard(opts.Listener, meant(opts.Dir, opts.newMux(routes))))
	return headers(opts.Version, checked(routes, mux))
}

// Reloaded is the answer to a reload.
type Reloaded struct {
	// NeedsRestart are the keys of the configuration that have changed, and count
	// only after a restart.
	NeedsRestart []string `json:"needsRestart"`
}

func (o Options) reload(w http.ResponseWriter, r *http.Request) {
	// Whoever can connect to a port could have all that was learnt forgotten, again
	// and again, also where he may pin and evict.
	if o.Listener.Network() != "unix" {
		refuse(w, http.StatusForbidden, codeReadOnly, "a reload is asked for over the admin socket only, by the user that tarn runs as, or with SIGHUP", "tarn reload, or send SIGHUP")
		return
	}
	if _, ok := readOrder(w, r); !ok {
		return
	}
	done, err := o.Reload()
	if err != nil {
		refuse(w, http.StatusUnprocessableEntity, "invalid_configuration", err.Error(), "mend the configuration, and reload again; all stays as it was")
		return
	}
	serveJSON(w, http.StatusOK, done)
}

func serveJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.Encode(v) // the client may have gone
}

// VersionHeader says which tarn answers, for commands of another one.
const VersionHeader = "Tarn-Version"

func headers(version string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("Cache-Control", "no-store")
		if version != "" {
			h.Set(VersionHeader, version)
		}
		next.ServeHTTP(w, r)
	})
}

// guard refuses what a browser sends on behalf of another site. Over a unix
// socket there is no such thing.
func guard(listener net.Addr, next http.Handler) http.Handler {
	var own netip.Addr
	tcp, ok := listener.(*net.TCPAddr)
	if ok {
		own = tcp.AddrPort().Addr().Unmap()
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if ok {
			if !ownHost(r.Host, own) {
				refuse(w, http.StatusForbidden, "wrong_host", "ask for localhost or an address of this listener, not for another host name", "use http://127.0.0.1 with the port of admin_listen")
				return
			}
			if !ownOrigin(r.Header, own) {
				refuse(w, http.StatusForbidden, "wrong_origin", "requests of other web sites are refused", "open the address of admin_listen itself")
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// DirHeader names the data directory of the tarn that is meant, where somebody means
// a certain one: on a node with two, the socket in /run/tarn is one's only.
const DirHeader = "Tarn-Dir"

// meant refuses what was meant for another tarn.
func meant(dir string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if other := r.Header.Get(DirHeader); other != "" && dir != "" && other != dir {
			refuse(w, http.StatusMisdirectedRequest, "other_daemon", "this is the tarn whose data directory is "+dir, "name the one that is meant with --admin or --dir")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// ownHost tells whether a Host header means this listener: localhost, a
// loopback address, or the listener's own address; of one that listens on all
// addresses, any address, since an attacker's name is what rebinding needs.
func ownHost(hostport string, own netip.Addr) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	a, err := netip.ParseAddr(strings.Trim(host, "[]"))
	if err != nil {
		return false
	}
	a = a.Unmap()
	return a.IsLoopback() || a == own || own.IsUnspecified()
}

func ownOrigin(h http.Header, own netip.Addr) bool {
	if h.Get("Sec-Fetch-Site") == "cross-site" {
		return false
	}
	for _, o := range h.Values("Origin") {
		u, err := url.Parse(o)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || !ownHost(u.Host, own) {
			return false
		}
	}
	return true
}
