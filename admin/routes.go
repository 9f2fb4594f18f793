// SPDX-License-Identifier: Apache-2.0

package admin

import (
	_ "embed"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Whatever may be asked is in one table: from it come the list that /api/v1 gives, the
// methods that a path takes, and the words for a path that there is not. What is new is
// an entry here and one in openapi.yaml, which a test holds to what is answered.

// route is one thing that may be asked.
type route struct {
	Method string `json:"method"`
	Path   string `json:"path"` // as http.ServeMux has it
	About  string `json:"about"`
	// Changes something, or costs much: it is asked for over the socket, unless the
	// operator widens that.
	Changes bool             `json:"changes"`
	serve   http.HandlerFunc // nil: this listener has none
}

//go:embed openapi.yaml
var openAPI []byte

// routes are those that this listener has.
func (o Options) routes() []route {
	all := []route{
		{"GET", "/api/v1/openapi.yaml", "this API, as OpenAPI describes it", false, serveOpenAPI},
		{"GET", "/api/v1/status", "version, store, clients and registries", false, o.document(o.Status)},
		{"GET", "/api/v1/upstreams", "the registries that are listed, and others in trouble", false, o.document(o.Upstreams)},
		{"GET", "/api/v1/process", "what a bug report has of the process; over the socket only", false, o.processes()},
		{"POST", "/api/v1/reload", "read the configuration and the certificates anew", true, o.reloads()},
	}
	if o.Registry != nil {
		all = append(all, route{"GET", "/metrics", "for Prometheus", false, promhttp.HandlerFor(o.Registry, promhttp.HandlerOpts{}).ServeHTTP})
	}
	if o.Explain != nil {
		all = append(all, route{"GET", "/api/v1/explain", "what is there and here of ?image=, and what happened to it", false, o.explain})
	}
	if o.History != nil {
		all = append(all, route{"GET", "/api/v1/decisions", "what became of the last requests, the latest first", false, o.decisions})
	}
	if o.Status != nil && o.Store != nil && o.History != nil {
		all = append(all, route{"GET", eventsPath, "what the page shows, as it changes", false, newFeed(o.live, o.Closing).serve})
	}
	if o.Store != nil {
		i := imageAPI{o.Store, o.Parse, o.Ask, o.Pull, make(chan struct{}, maxPulls)}
		all = append(all,
			route{"GET", "/api/v1/flights", "the downloads that are running, or broke off", false, i.flights},
			route{"GET", "/api/v1/images", "the images that are here; ?image= and ?filter= choose", false, i.list},
			route{"GET", "/api/v1/images/{ref...}", "one image, by its name or digest", false, i.one},
			route{"GET", "/api/v1/pins", "the images that are kept", false, i.pins},
			route{"POST", "/api/v1/pins", "keep an image", true, i.pin},
			route{"DELETE", "/api/v1/pins", "let an image be evicted again", true, i.unpin},
			route{"POST", "/api/v1/pull", "fetch images into the store; answers line by line", true, i.pull},
			route{"POST", "/api/v1/evict", "remove an image from the store", true, i.evict},
			route{"POST", "/api/v1/verify", "check each stored file; answers line by line", true, i.verify},
		)
	}
	all = slices.DeleteFunc(all, func(r route) bool { return r.serve == nil })
	if o.NamesElsewhere != "" {
		for i := range all {
			if slices.Contains(naming, all[i].Path) {
				all[i].serve = func(w http.ResponseWriter, _ *http.Request) {
					refuse(w, http.StatusForbidden, "names_elsewhere", o.NamesElsewhere, "ask over the admin socket, as the user that tarn runs as")
				}
			}
		}
	}
	slices.SortStableFunc(all, func(a, b route) int { return strings.Compare(a.Path, b.Path) })
	return all
}

// eventsPath is the only one of which an answer that reads does not end by itself.
const eventsPath = "/api/v1/events"

// naming are the paths whose answers name repositories, perhaps private ones: also of
// whom to evict, where somebody names the beginning of a digest.
var naming = []string{"/api/v1/evict", "/api/v1/images", "/api/v1/images/{ref...}", "/api/v1/pins", "/api/v1/explain", "/api/v1/decisions"}

// document serves what a function returns; nil where there is none.
func (o Options) document(of func() any) http.HandlerFunc {
	if of == nil {
		return nil
	}
	return func(w http.ResponseWriter, _ *http.Request) { serveJSON(w, http.StatusOK, of()) }
}

func (o Options) processes() http.HandlerFunc {
	if o.Process == nil {
		return nil
	}
	return o.process
}

func (o Options) reloads() http.HandlerFunc {
	if o.Reload == nil {
		return nil
	}
	return o.reload
}

func serveOpenAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/yaml; charset=utf-8")
	w.Write(openAPI)
}

// listing is the answer of /api/v1.
type listing struct {
	Version string  `json:"version"`
	Paths   []route `json:"paths"`
}

// newMux serves the routes, the list of them, and 404 with their names.
func (o Options) newMux(routes []route) *http.ServeMux {
	mux := http.NewServeMux()
	for _, r := range routes {
		serve := r.serve
		if r.Changes && o.ReadOnly != "" {
			serve = func(w http.ResponseWriter, _ *http.Request) {
				refuse(w, http.StatusForbidden, codeReadOnly, o.ReadOnly, "ask over the admin socket, as the user that tarn runs as")
			}
		} else if !r.Changes && r.Path != eventsPath {
			serve = inTurn(serve)
		}
		mux.HandleFunc(r.Method+" "+r.Path, serve)
	}
	mux.HandleFunc("GET /{$}", pageFile("index.html"))
	for _, name := range []string{"page.css", "page.js", "dom.js", "stream.js", "worker.js", "icon.svg"} {
		mux.HandleFunc("GET /"+name, pageFile(name))
	}
	mux.HandleFunc("GET /api/v1", func(w http.ResponseWriter, _ *http.Request) {
		serveJSON(w, http.StatusOK, listing{o.Version, routes})
	})
	var names []string
	for _, r := range routes {
		if name, ok := strings.CutPrefix(r.Path, "/api/v1/"); ok && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		refuse(w, http.StatusNotFound, "no_such_path", "no such path; there are / for people, /healthz, /readyz, /metrics and below /api/v1: "+strings.Join(names, ", "), "GET /api/v1 lists what there is")
	})
	return mux
}

// allowed are the methods that a path takes. One that there is not takes those by which
// anybody looks whether it is there.
func allowed(routes []route, path string) string {
	var methods []string
	for _, r := range routes {
		under, below := strings.CutSuffix(r.Path, "{ref...}")
		switch {
		case r.Path != path && !(below && strings.HasPrefix(path, under)):
		case r.Method == http.MethodGet:
			methods = append(methods, http.MethodGet, http.MethodHead)
		default:
			methods = append(methods, r.Method)
		}
	}
	if len(methods) == 0 {
		return "GET, HEAD"
	}
	return strings.Join(methods, ", ")
}

// maxURI bounds a path with its query, in bytes: 64 images' names of usual length are
// less. net/http has its own, wider bound for all headers, and answers 431.
const maxURI = 16 << 10

// checked refuses what no path takes, in words.
func checked(routes []route, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n := len(r.RequestURI); n > maxURI {
			refuse(w, http.StatusRequestURITooLong, "uri_too_long", fmt.Sprintf("path and query have %d bytes; %d is the most", n, maxURI), "ask for less at once")
			return
		}
		if methods := allowed(routes, r.URL.Path); !slices.Contains(strings.Split(methods, ", "), r.Method) {
			w.Header().Set("Allow", methods)
			refuse(w, http.StatusMethodNotAllowed, "method_not_allowed", "only "+methods, "GET /api/v1 lists what there is, and with which method")
			return
		}
		next.ServeHTTP(w, r)
	})
}
