// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"tarn/proxy"
)

// Each of these has somebody pull besides, so that what is said of the next pull can be
// compared with what became of one.

func page(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html")
	fmt.Fprint(w, "<html>log in</html>")
}

func limits(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Retry-After", "30")
	w.WriteHeader(http.StatusTooManyRequests)
}

var (
	hoursStale     = proxy.Rules{GrantTTL: time.Minute, MembershipTTL: 24 * time.Hour, StaleIfError: 2 * time.Hour}
	hoursStaleNode = proxy.Rules{GrantTTL: time.Minute, MembershipTTL: 24 * time.Hour, StaleIfError: 2 * time.Hour, StaleForNode: true}
)

const (
	allHere   = "All of {m1} is here (linux/amd64, 195.9KiB)"
	failsHere = "A pull by tag fails here, and the client asks the registry itself."
	isClosed  = "upstream {host} cannot be reached: it ended the connection without an answer"
	checkPort = "check that a registry answers at this host and port, and the scheme (http or https)"
)

var sloppy = []story{
	{
		name: "a sign-on page, which nothing stands for", options: options{rules: hoursStale},
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.answer(page)
			n.get("GET", "/v2/app/manifests/v1")
		},
		state:    Away,
		verdict:  "reg.corp answers what is no image: manifest refused: it is no JSON object. " + allHere + ", as the registry confirmed just now.",
		next:     failsHere,
		who:      oneYes,
		happened: []string{"containerd: v1; the registry was asked with HEAD; answered with 502: what came was not what the digest says, or broke off (manifest refused: it is no JSON object)"},
	},
	{
		name: "limited, which is no outage for every client", options: options{rules: hoursStaleNode},
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.answer(limits)
			n.get("GET", "/v2/app/manifests/v1")
		},
		state: Stale, served: true,
		verdict:  "stale: reg.corp cannot be asked (upstream limits the rate of requests). " + allHere + ", as the registry confirmed just now.",
		next:     "Until {until} v1 is answered from here, marked as stale, to who was given it before; after that a pull fails here, and the client asks the registry itself.",
		who:      oneYes,
		happened: []string{"containerd: v1 is {m1}; the registry was asked with HEAD; 560B from the disk, stale: the registry limits requests (upstream limits the rate of requests)"},
	},
	{
		name: "away for every client", options: options{rules: hoursStaleNode},
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.registry.CloseClientConnections()
			n.registry.Listener.Close()
			n.get("GET", "/v2/app/manifests/v1", "Authorization", "Bearer somebodys")
		},
		state: Stale, served: true,
		verdict:  "stale: reg.corp cannot be asked (upstream {host} cannot be reached: connection refused). " + allHere + ", as the registry confirmed just now.",
		next:     "Until {until} v1 is answered from here, marked as stale, to every client of this node; after that a pull fails here, and the client asks the registry itself.",
		who:      oneYes,
		advice:   "check that the registry runs, and the endpoint's host and port",
		happened: []string{"containerd: v1 is {m1}; the registry was asked with HEAD; 560B from the disk, stale: the registry could not be asked (upstream {host} cannot be reached: connection refused)"},
	},
	{
		name: "away, and the clock was set back", options: options{rules: hoursStale},
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.forward(-time.Hour)
			n.away()
			n.get("GET", "/v2/app/manifests/v1")
		},
		state:    Away,
		verdict:  "reg.corp cannot be asked: " + isClosed + ". " + allHere + ", as the registry confirmed just now.",
		next:     failsHere,
		who:      oneYes,
		advice:   checkPort,
		happened: []string{"containerd: v1; the registry was asked with HEAD; answered with 502: the registry could not be asked (" + isClosed + ")"},
	},
	{
		name: "away, by digest", image: "reg.corp/app@{m1 whole}",
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.away()
			n.get("GET", "/v2/app/manifests/"+i.one.Manifest.String())
		},
		state:    Away,
		verdict:  "reg.corp cannot be asked: " + isClosed + ". " + allHere + ".",
		next:     "For about a minute after the registry has said yes to a client, that one has it from here; then a pull fails here, and the client asks the registry itself. stale_if_error, in tarn's configuration, has what was confirmed last served meanwhile.",
		who:      oneYes,
		advice:   checkPort,
		happened: []string{"containerd: manifest {m1}; the registry was not asked; 560B from the disk"},
	},
	{
		name: "stale, by digest", image: "reg.corp/app@{m1 whole}", options: options{rules: hoursStale},
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.forward(10 * time.Minute)
			n.away()
			n.get("GET", "/v2/app/manifests/"+i.one.Manifest.String())
		},
		state: Stale, served: true,
		verdict:  "stale: reg.corp cannot be asked (" + isClosed + "). " + allHere + ".",
		next:     "Until {until} {m1} is answered from here, marked as stale, to who was given it before; after that a pull fails here, and the client asks the registry itself.",
		who:      toAnybody,
		advice:   checkPort,
		happened: []string{"containerd: manifest {m1}; the registry was asked with GET; 560B from the disk, stale: the registry could not be asked (" + isClosed + ")"},
	},
	{
		name: "HEAD is not allowed",
		happens: func(n *node, i *pair) {
			n.hook(func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method == http.MethodHead {
					w.WriteHeader(http.StatusMethodNotAllowed)
				}
				return r.Method == http.MethodHead
			})
			n.pull("app", "v1", i.one)
		},
		state: Current, served: true,
		verdict: "current: at reg.corp v1 is {m1} now, and all of it is here (linux/amd64, 195.9KiB).",
		next:    "The next pull asks the registry with a HEAD, and with a GET since that says too little there, what the tag means and who may have it, and has its bytes from this node's disk.",
		who:     oneYes,
	},
	{
		name: "the token service is broken",
		happens: func(n *node, _ *pair) {
			n.answer(func(w http.ResponseWriter, r *http.Request) {
				if strings.HasPrefix(r.URL.Path, "/token") {
					w.WriteHeader(http.StatusInternalServerError)
					return
				}
				w.Header().Set("WWW-Authenticate", `Bearer realm="`+n.registry.URL+`/token?secret=canary",service="x"`)
				w.WriteHeader(http.StatusUnauthorized)
			})
			n.get("GET", "/v2/app/manifests/v1")
		},
		state:    Away,
		verdict:  "reg.corp cannot be asked: the upstream's token service answered 500. Nothing of it is here.",
		next:     failsHere + " stale_if_error, in tarn's configuration, has what was confirmed last served meanwhile.",
		who:      forEachSays,
		happened: []string{"containerd: v1; the registry was asked with HEAD; answered with 502: the registry could not be asked (the upstream's token service answered 500)"},
	},
	{
		name: "deleted at the registry",
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.status(http.StatusNotFound)
			n.get("GET", "/v2/app/manifests/v1")
		},
		state:   Missing,
		verdict: "no such image: reg.corp says 404 for v1. Nothing is here by that name.",
		next:    "A pull is told the same: some registries say so also to who may not have it.",
		who:     forEachSays,
	},
}
