// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// maxRedirects is how many hops a request may take. Registries need one, with
// a CDN in front two.
const maxRedirects = 5

// answer is the final response of a chain of redirects.
type answer struct {
	*http.Response
	// foreign: it came from another origin than the endpoint's, so it is
	// not the registry's own word.
	foreign bool
	at      *url.URL  // where it came from
	shown   bool      // a token for that place was shown there
	sent    time.Time // when the first request of the chain went out
}

// follow sends the request and follows its redirects by hand, HEAD as well:
// with the Range, with the Authorization only as long as the origin is the
// endpoint's, never from https to http. It returns besides how far the word
// of this endpoint reaches, from the address that it was found at.
func (r *Registry) follow(ctx context.Context, e Endpoint, req Request, authorization string) (*answer, reach, error) {
	u := req.url(e)
	word, home := reachPublic, true
	sent := time.Now()
	for hop := 0; ; hop++ {
		hreq, err := req.httpRequest(ctx, u)
		if err != nil {
			return nil, word, err
		}
		// Who was sent elsewhere does not come home again: what a foreign host
		// names there is not the registry's word, and gets no credential.
		home = home && sameOrigin(u, e.URL)
		far := word
		if home {
			far = r.endpointReach()
			if authorization != "" {
				hreq.Header.Set("Authorization", authorization)
			}
		}
		shown := false
		if !home {
			if token := r.tokenElsewhere(u, req.Repository); token != "" {
				hreq.Header.Set("Authorization", token)
				shown = true
			}
		}
		cause := req.cause()
		if hop > 0 {
			cause = ForRedirect
		}
		resp, at, err := r.roundTrip(hreq, cause, req.Repository, far, home)
		if err != nil {
			return nil, word, err
		}
		if home {
			r.noteRate(resp.Header)
		}
		switch {
		case r.listed && hop == 0:
			word = reachFrom(at)
		case r.listed:
			word = min(word, reachFrom(at)) // nor does it reach further than its own host may
		}
		next, err := redirectTarget(u, resp)
		if err != nil {
			resp.Body.Close()
			return nil, word, err
		}
		if next == nil {
			return &answer{Response: resp, foreign: !home, at: u, shown: shown, sent: sent}, word, nil
		}
		drain(resp.Body)
		if hop == maxRedirects {
			return nil, word, fmt.Errorf("%w: more than %d redirects", ErrProtocol, maxRedirects)
		}
		u = next
	}
}

// redirectTarget returns where the response sends the client, nil when it is
// no redirect.
func redirectTarget(from *url.URL, resp *http.Response) (*url.URL, error) {
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	default:
		return nil, nil
	}
	to, err := from.Parse(resp.Header.Get("Location"))
	if err != nil || resp.Header.Get("Location") == "" {
		return nil, fmt.Errorf("%w: a redirect of %s without a usable Location", ErrProtocol, from.Host)
	}
	switch {
	case to.Scheme != "https" && to.Scheme != "http", to.Host == "":
		return nil, fmt.Errorf("%w: %s redirects to something that is not http", ErrProtocol, from.Host)
	case from.Scheme == "https" && to.Scheme == "http":
		return nil, fmt.Errorf("%w: %s redirects from https to http", ErrProtocol, from.Host)
	}
	to.User = nil
	to.Fragment = ""
	return to, nil
}

// sameOrigin compares scheme, host and port (RFC 6454 4).
func sameOrigin(a, b *url.URL) bool {
	return a.Scheme == b.Scheme && strings.EqualFold(a.Hostname(), b.Hostname()) && originPort(a) == originPort(b)
}

func originPort(u *url.URL) string {
	if p := u.Port(); p != "" {
		return p
	}
	if u.Scheme == "http" {
		return "80"
	}
	return "443"
}

// drain reads what little a redirect says, so that its connection can be used
// again.
func drain(body io.ReadCloser) {
	const little = 16 << 10
	io.CopyN(io.Discard, body, little)
	body.Close()
}
