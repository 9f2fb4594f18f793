// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
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
	// Authorised says that the authority has said yes to what this request
	// is for, so that the other endpoints may serve the bytes.
	Authorised bool
	// Endpoint is which of the endpoints is asked first, counted round; it is
	// for who is Authorised and had trouble with the one before.
	Endpoint int
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
	headTimeout time.Duration

	realm       *url.URL      // where passwords may go; nil: the authority's own domain
	credentials *DockerConfig // of the node; nil for none

	proving singleflight.Group // by proofKey

	// mu guards what follows.
	mu       sync.Mutex
	proofs   map[proofKey]proof  // at most maxProofs
	bases    map[string]base     // what /v2/ said, by host: one an endpoint
	breakers map[string]*breaker // by origin: the endpoints' and token services'; at most maxBreakers
	// served are repository+credential pairs whose GET of a blob succeeded
	// lately: the evidence that a refused HEAD is the registry's habit.
	served      map[[sha256.Size]byte]time.Time // at most maxServed
	headRefused map[Kind]bool                   // HEAD of an object is refused where GET is not
	limits      map[[sha256.Size]byte]time.Time // until when a credential's 429 holds; at most maxLimited
	rate        RateLimit                       // what the authority said last; zero when it never did
}

const (
	maxProofs = 1024
	// Of registries that are not listed there are many, and what they send is
	// a stranger's: 256 times 16 proofs of 20 KiB at most.
	maxStrangerProofs = 16
	maxChallenge      = 4 << 10
	maxServed         = 1024
	servedFor         = 10 * time.Minute
	// earlyTimeout is what an endpoint gets while another one is left.
	earlyTimeout = 3 * time.Second
)

// Name is the canonical name.
func (r *Registry) Name() Name { return r.name }

// Listed tells whether the operator named this registry.
func (r *Registry) Listed() bool { return r.listed }

// Endpoints is how many there are.
func (r *Registry) Endpoints() int { return len(r.endpoints) }

// HeadTimeout is how long the registry may take for its response headers.
func (r *Registry) HeadTimeout() time.Duration { return r.headTimeout }

// Do asks the registry and returns its 200 or 206; everything else is an
// error. The context covers the body too; the time to the headers is bounded
// besides. The caller closes the body.
//
// Only a request that is Authorised, and by digest, moves on from an authority
// that cannot be reached, is too late or answers 5xx to the next endpoints; no
// 4xx of it does. What those say but the bytes is nobody's word: when none of
// them has the object, the error is the authority's.
func (r *Registry) Do(ctx context.Context, req Request) (*Response, error) {
	endpoints := r.endpoints[:1]
	if req.Authorised && strings.Contains(req.Reference, ":") {
		endpoints = r.endpoints
	}
	var first error
	for n := range endpoints {
		i := (req.Endpoint + n) % len(endpoints)
		e, ask := endpoints[i], req
		if i > 0 && !e.Trusted {
			ask.Authorization, ask.As = "", Anonymous
		}
		timeout := r.headTimeout
		if n < len(endpoints)-1 {
			timeout = min(timeout, earlyTimeout)
		}
		resp, err := r.askLimited(ctx, e, i == 0, timeout, ask)
		if err == nil {
			resp.Authority, resp.Endpoint = i == 0, i
			return resp, nil
		}
		if first == nil || i == 0 {
			first = err
		}
		if i == 0 && !movesOn(err) || ctx.Err() != nil {
			break
		}
	}
	return nil, first
}

func movesOn(err error) bool {
	var status *StatusError
	if errors.As(err, &status) {
		return status.Status >= 500
	}
	return errors.Is(err, ErrUnreachable) || errors.Is(err, ErrTimeout)
}

// askHead is ask, for registries that refuse HEAD of an object where they
// grant GET (405, or for blobs like ECR Public 401 and 403 to the very
// credential that may GET): those are asked with a GET that is closed after
// its headers.
func (r *Registry) askHead(ctx context.Context, e Endpoint, authority bool, timeout time.Duration, req Request) (*Response, error) {
	key := r.client.asker(req.Repository, req)
	isObject := (req.Kind == Blob || req.Kind == Manifest) && strings.Contains(req.Reference, ":")
	if !isObject || !authority {
		return r.ask(ctx, e, timeout, req)
	}
	if req.Method == http.MethodGet {
		resp, err := r.ask(ctx, e, timeout, req)
		if err == nil && req.Kind == Blob {
			r.noteServed(key)
		}
		return resp, err
	}
	r.mu.Lock()
	refuses := r.headRefused[req.Kind]
	r.mu.Unlock()
	if !refuses {
		resp, err := r.ask(ctx, e, timeout, req)
		var status *StatusError
		if !errors.As(err, &status) {
			return resp, err
		}
		switch status.Status {
		case http.StatusMethodNotAllowed:
			// Also when this GET is refused: how often is asked must not
			// tell what another has.
			r.mu.Lock()
			r.headRefused[req.Kind] = true
			r.mu.Unlock()
		case http.StatusUnauthorized, http.StatusForbidden:
			r.mu.Lock()
			when, seen := r.served[key]
			r.mu.Unlock()
			if req.Kind != Blob || !seen || time.Since(when) > servedFor {
				return nil, err
			}
		default:
			return nil, err
		}
	}
	req.Method = http.MethodGet
	resp, err := r.ask(ctx, e, timeout, req)
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	resp.Body = http.NoBody
	r.mu.Lock()
	r.headRefused[req.Kind] = true
	r.mu.Unlock()
	return resp, nil
}

// asker names a credential at a place, a repository or a host, in a form that is
// worth nothing elsewhere.
func (c *Client) asker(place string, req Request) (sum [sha256.Size]byte) {
	h := hmac.New(sha256.New, c.key[:])
	fmt.Fprintf(h, "%q %d %q", place, req.As, req.Authorization)
	h.Sum(sum[:0])
	return sum
}

func (r *Registry) noteServed(key [sha256.Size]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.served) >= maxServed {
		clear(r.served)
	}
	r.served[key] = time.Now()
}

// ask puts the request to one endpoint: with the caller's credential, or as
// anonymous, where a Bearer challenge costs a token and one more try.
func (r *Registry) ask(ctx context.Context, e Endpoint, timeout time.Duration, req Request) (*Response, error) {
	ctx, headers := withHeaderDeadline(ctx, timeout)
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
// into a Response or an error. An answer of a redirect target that refuses is
// nobody's word: signed URLs expire, and some refuse HEAD. It is tried once
// more from the registry's URL, as a GET.
func (r *Registry) try(ctx context.Context, e Endpoint, req Request, authorization string) (*Response, reach, error) {
	resp, from, err := r.follow(ctx, e, req, authorization)
	if err == nil && resp.foreign && resp.StatusCode >= 400 && resp.StatusCode < 500 {
		resp.Body.Close()
		again := req
		again.Method = http.MethodGet
		resp, from, err = r.follow(ctx, e, again, authorization)
		if err == nil && resp.foreign && resp.StatusCode >= 400 {
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
	}
	if err != nil {
		return nil, from, err
	}
	out, err := newResponse(req, resp)
	if err != nil {
		resp.Body.Close()
		return nil, from, err
	}
	out.Anonymous = req.Authorization == "" && req.As == Anonymous
	return out, from, nil
}

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
