// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// Kind is the part of the distribution API that a request is for; it is the
// word that stands in the URL.
type Kind string

const (
	Manifest  Kind = "manifests"
	Blob      Kind = "blobs"
	Tags      Kind = "tags"
	Referrers Kind = "referrers"
)

// Request is one question to a registry.
type Request struct {
	Method     string // GET or HEAD
	Repository string
	Kind       Kind
	Reference  string // a tag or a digest; "list" for Tags
	Query      url.Values
	Accept     []string
	// Authorization is a client's; it goes to the authority as it is. "" asks
	// as As says.
	Authorization string
	As            Identity
	// Offset is the first byte wanted, Length how many, 0 for all that follow.
	// Both 0 mean the whole object, without a Range.
	Offset, Length int64
	// Endpoint is which one is asked. 0 is the authority; another is asked for
	// an object by its digest only, and only by who has the authority's yes.
	Endpoint int
	// Budget is the time to the headers; 0, and what is more than the
	// registry's HeadTimeout, is that.
	Budget time.Duration
}

// ranged tells whether only a part is asked for.
func (req Request) ranged() bool {
	return req.Method == http.MethodGet && (req.Offset > 0 || req.Length > 0)
}

// Registry is one upstream. It is safe for concurrent use.
type Registry struct {
	name        Name
	listed      bool
	client      *Client
	endpoints   []Endpoint
	pool        pool // to the endpoints
	foreign     pool // to redirect targets and token services
	proxies     *proxies
	headTimeout time.Duration

	realm       *url.URL    // where passwords may go; nil: the authority's own domain
	credentials Credentials // of the node; nil for none

	proving  singleflight.Group // by proofKey
	asking   gate
	warnings *budget

	// mu guards what follows.
	mu     sync.Mutex
	proofs map[proofKey]proof     // at most maxProofs
	bases  map[string]base        // what /v2/ said, by host: one an endpoint
	hosts  map[string]*host       // by origin; at most maxHosts
	habits map[Habit]bool         // what it was seen to do
	limits map[question]time.Time // until when a 429 holds; at most maxLimited
	ailing error                  // why the node's credentials were not to be had last; nil for nothing
	rate   RateLimit              // what the authority said last; zero when it never did
}

const (
	maxProofs = 1024
	// Of registries that are not listed there are many, and what they send is
	// a stranger's: 256 times 16 proofs of 20 KiB at most.
	maxStrangerProofs = 16
	maxChallenge      = 4 << 10
)

// Endpoints are those that can be asked, the authority first. They are not to be
// changed.
func (r *Registry) Endpoints() []Endpoint { return r.endpoints }

// Trusts tells whether that endpoint may see credentials. The authority may.
func (r *Registry) Trusts(endpoint int) bool { return endpoint == 0 || r.endpoints[endpoint].Trusted }

// HeadTimeout is how long the registry may take for its response headers.
func (r *Registry) HeadTimeout() time.Duration { return r.headTimeout }

// Do asks one endpoint and returns its 200 or 206; everything else is an error.
// The context covers the body too; the time to the headers is bounded besides.
// The caller closes the body.
//
// What an endpoint says that is not the authority is nobody's word, be it a yes
// or a no: it is there for the bytes that a digest names. One that is not trusted
// is asked as anonymous, whatever the request says.
func (r *Registry) Do(ctx context.Context, req Request) (*Response, error) {
	e := r.endpoints[req.Endpoint]
	if req.Endpoint > 0 && !strings.Contains(req.Reference, ":") {
		return nil, fmt.Errorf("%w: only the authority is asked for what no digest names", ErrProtocol)
	}
	if !r.Trusts(req.Endpoint) {
		req.Authorization, req.As = "", Anonymous
	}
	timeout := r.headTimeout
	if req.Budget > 0 {
		timeout = min(timeout, req.Budget)
	}
	name := func() question {
		return r.client.question(req, e.URL.String(), req.Method, req.Repository, string(req.Kind), req.Reference, req.Query.Encode())
	}
	resp, err := unlessLimited(r, name, func() (*Response, error) { return r.ask(ctx, e, timeout, req) })
	if err != nil {
		return nil, err
	}
	resp.Authority = req.Endpoint == 0
	return resp, nil
}

// ask puts the request to one endpoint: with the caller's credential, or as
// anonymous, where a Bearer challenge costs a token and one more try.
func (r *Registry) ask(ctx context.Context, e Endpoint, timeout time.Duration, req Request) (*Response, error) {
	ctx, headers := withHeaderDeadline(ctx, timeout)
	leave, err := r.asking.enter(ctx, req.Repository)
	if err != nil {
		headers.cancel(nil)
		return nil, headers.explain(err)
	}
	defer leave()
	resp, err := r.exchange(ctx, e, req)
	if err != nil {
		headers.cancel(nil)
		return nil, headers.explain(err)
	}
	resp.Body = headers.arrived(resp.Body)
	return resp, nil
}

// endpointReach is how far the registry's own endpoints may be.
func (r *Registry) endpointReach() reach {
	if r.listed {
		return reachAny
	}
	return reachPublic
}

// try sends the request once, follows its redirects, and turns the answer
// into a Response or an error. Where it was sent to a registry that wants a
// token, it shows one that everybody has there. Any other answer of a redirect
// target that refuses is nobody's word: signed URLs expire, and some refuse
// HEAD. It is tried once more from the registry's URL, as a GET.
func (r *Registry) try(ctx context.Context, e Endpoint, req Request, authorization string) (*Response, reach, error) {
	resp, from, err := r.follow(ctx, e, req, authorization)
	if err == nil && resp.foreign && resp.StatusCode == http.StatusUnauthorized {
		resp, from, err = r.proveElsewhere(ctx, e, req, authorization, resp, from)
	}
	if err == nil && resp.foreign && resp.StatusCode >= 400 && resp.StatusCode < 500 && resp.StatusCode != http.StatusTooManyRequests && req.Kind.named() {
		resp.Body.Close()
		again := req
		again.Method = http.MethodGet
		if req.Method == http.MethodHead && req.Kind == Blob {
			again.Length = 1
		}
		resp, from, err = r.follow(ctx, e, again, authorization)
		if err == nil && resp.foreign && resp.StatusCode >= 400 && !relayed(req.Kind, resp.StatusCode) {
			resp.Body.Close()
			if again.ranged() && resp.StatusCode < 500 {
				// Whatever it means, the whole may be had there.
				return nil, from, fmt.Errorf("%w, but %d from the redirect target", ErrRange, resp.StatusCode)
			}
			return nil, from, fmt.Errorf("%w: the redirect target answered %d twice", ErrProtocol, resp.StatusCode)
		}
		if err == nil && req.Method == http.MethodHead {
			resp.Body.Close()
			resp.Body = http.NoBody
		}
		req = again
	}
	if err != nil {
		return nil, from, err
	}
	out, err := newResponse(req, resp)
	if err != nil {
		resp.Body.Close()
		return nil, from, err
	}
	if out.Encoding != "" {
		r.Saw(Labelled)
	}
	return out, from, nil
}

// relayed tells whether what a redirect target says is told to clients: a 404 of
// a registry, which its name redirects to, and that one may ask less often.
func relayed(k Kind, status int) bool {
	return status == http.StatusTooManyRequests || status == http.StatusNotFound && k != Blob
}

// named tells whether requests of this kind name an object.
func (k Kind) named() bool { return k == Manifest || k == Blob }

// url of a request at an endpoint. Repository and reference were parsed before
// they came here and need no escaping, but it costs nothing to be sure.
func (req Request) url(e Endpoint) *url.URL {
	u := *e.URL
	u.Path = strings.TrimSuffix(u.Path, "/") + "/v2/" + req.Repository + "/" + string(req.Kind) + "/" + req.Reference
	u.RawPath = ""
	u.RawQuery = req.Query.Encode()
	return &u
}

func (req Request) httpRequest(ctx context.Context, u *url.URL) (*http.Request, error) {
	hreq, err := http.NewRequestWithContext(ctx, req.Method, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is no URL to ask", ErrProtocol, u.Host)
	}
	if len(req.Accept) > 0 {
		hreq.Header["Accept"] = req.Accept
	}
	hreq.Header.Set("Accept-Encoding", "identity")
	if req.ranged() {
		last := ""
		if req.Length > 0 {
			last = strconv.FormatInt(req.Offset+req.Length-1, 10)
		}
		hreq.Header.Set("Range", "bytes="+strconv.FormatInt(req.Offset, 10)+"-"+last)
	}
	return hreq, nil
}
