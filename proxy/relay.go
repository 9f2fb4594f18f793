// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"tarn/upstream"
)

// serveRelayed passes tags/list and referrers on, with the client's rights and
// uncached: they are lists, and a list that is old is wrong.
func (p *Proxy) serveRelayed(ctx context.Context, w *response, r *http.Request, q *request) error {
	// The body may take longer than the headers.
	life, cancel := context.WithCancel(r.Context())
	defer cancel()
	stop := context.AfterFunc(ctx, cancel)
	start := time.Now()
	resp, _, err := p.ask(life, q, q.method, q.reference(), part{})
	w.waits.since(stepFirstByte, start)
	if !stop() && err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if q.kind == upstream.Referrers && (lacksReferrers(err) || err == nil && resp.Web()) {
		if err == nil {
			resp.Body.Close()
		}
		return &upstream.StatusError{Status: http.StatusNotFound}
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	h := w.Header()
	// Whatever it is called, clients read it as JSON, and browsers must not read it
	// as anything else.
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	if strings.HasPrefix(resp.MediaType, "application/") && strings.HasSuffix(resp.MediaType, "json") {
		h.Set("Content-Type", resp.MediaType)
	}
	list := io.Reader(resp.Body)
	if strings.Contains(strings.ToLower(resp.Encoding), "gzip") {
		resp.Size = -1
		if q.method == http.MethodGet {
			if list, err = gzip.NewReader(resp.Body); err != nil {
				return fmt.Errorf("%w: a list that is not gzip", upstream.ErrProtocol)
			}
		}
	}
	if v := resp.Header.Values("OCI-Filters-Applied"); len(v) > 0 {
		h["Oci-Filters-Applied"] = v
	}
	if link := q.rewriteLink(resp.Header.Values("Link")); link != "" {
		h.Set("Link", link)
	}
	if resp.Size >= 0 {
		h.Set("Content-Length", fmt.Sprint(resp.Size))
	} else if q.method == http.MethodGet && !r.ProtoAtLeast(1, 1) {
		return errNoLength
	}
	w.detail(outcomeBypassed, "fwd=bypass; fwd-status=200", "list")
	w.slow = true
	w.WriteHeader(http.StatusOK)
	_, err = io.Copy(w, list)
	return aborted(err)
}

// lacksReferrers tells whether a registry says, in whatever words, that it does
// not have the referrers API (distribution-spec "Listing Referrers"): clients go
// on to the referrers tag then. Who is refused for want of a credential, or of
// patience, must hear that: a verifier must not read "no signature" out of it.
func lacksReferrers(err error) bool {
	var status *upstream.StatusError
	if !errors.As(err, &status) {
		return false
	}
	switch status.Status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests:
		return false
	case http.StatusNotImplemented, http.StatusHTTPVersionNotSupported:
		return true
	}
	return status.Status >= 400 && status.Status < 500 || status.Web && status.Status >= 500
}

// rewriteLink turns the upstream's link to the next page (RFC 8288, and
// distribution-spec "Listing Tags") into one that leads back through tarn, in
// the form that the client used. Only the query of the target is taken over,
// and no other relation than next.
func (q *request) rewriteLink(lines []string) string {
	for _, link := range oneLink.FindAllStringSubmatch(strings.Join(lines, ","), -1) {
		u, err := url.Parse(link[1])
		if err != nil || !relNext.MatchString(link[2]) && anyRel.MatchString(link[2]) {
			continue
		}
		query := passedOn(q.kind, u.Query())
		if query == nil {
			query = make(url.Values)
		}
		if q.ns != "" {
			query.Set("ns", q.ns)
		}
		back := url.URL{
			Path:     q.link(q.kind, q.reference()),
			RawQuery: query.Encode(),
		}
		return "<" + back.String() + `>; rel="next"`
	}
	return ""
}

var (
	oneLink = regexp.MustCompile(`<([^>]*)>((?:[^,"]|"[^"]*")*)`)
	relNext = regexp.MustCompile(`(?i);\s*rel\s*=\s*["']?([^"';]*\s)?next(\s[^"';]*)?["']?\s*(;|$)`)
	anyRel  = regexp.MustCompile(`(?i);\s*rel\s*=`)
)
