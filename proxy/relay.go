// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
)

// relayed are the upstream's headers that pass with a list.
var relayed = []string{"Content-Type", "OCI-Filters-Applied"}

// serveRelayed passes tags/list and referrers on, with the client's rights and
// uncached: they are lists, and a list that is old is wrong.
func (p *Proxy) serveRelayed(ctx context.Context, w *response, r *http.Request, q *request) error {
	// The body may take longer than the headers.
	life, cancel := context.WithCancel(r.Context())
	defer cancel()
	stop := context.AfterFunc(ctx, cancel)
	resp, _, err := p.ask(life, q, q.method, q.reference(), false, 0)
	if !stop() && err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	h := w.Header()
	for _, name := range relayed {
		if v := resp.Header.Values(name); len(v) > 0 {
			h[http.CanonicalHeaderKey(name)] = v
		}
	}
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", "application/json")
	}
	for _, l := range resp.Header.Values("Link") {
		if link := q.rewriteLink(l); link != "" {
			h.Add("Link", link)
		}
	}
	if resp.Size >= 0 {
		h.Set("Content-Length", fmt.Sprint(resp.Size))
	} else if q.method == http.MethodGet && !r.ProtoAtLeast(1, 1) {
		return errNoLength
	}
	w.detail("fwd=bypass; fwd-status=200", "list")
	w.WriteHeader(http.StatusOK)
	_, err = io.Copy(w, resp.Body)
	return aborted(err)
}

// rewriteLink turns the upstream's link to the next page (RFC 8288, and
// distribution-spec "Listing Tags") into one that leads back through tarn, in
// the form that the client used. Only the query of the target is taken over.
func (q *request) rewriteLink(link string) string {
	target, params, ok := strings.Cut(strings.TrimSpace(link), ">")
	target, open := strings.CutPrefix(target, "<")
	if !ok || !open {
		return ""
	}
	u, err := url.Parse(target)
	if err != nil {
		return ""
	}
	query := passedOn(q.kind, u.Query())
	if query == nil {
		query = make(url.Values)
	}
	if q.ns != "" {
		query.Set("ns", q.ns)
	}
	back := url.URL{
		Path:     q.prefix + q.named + "/" + string(q.kind) + "/" + q.reference(),
		RawQuery: query.Encode(),
	}
	if strings.ContainsAny(params, "\r\n") {
		return ""
	}
	return "<" + back.String() + ">" + params
}
