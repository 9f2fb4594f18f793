// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"net/http"

	"tarn/internal/probe"
	"tarn/upstream"
)

// probeName is a registry that there is not: tarn answers for it, and asks nobody.
const probeName = upstream.Name(probe.Registry)

// serveProbe answers from memory with the image that proves that a pull came here.
// It is never stored, counted or logged as a request.
func (p *Proxy) serveProbe(w *response, r *http.Request, q *request) error {
	if p.instance != "" {
		w.Header().Set(probe.InstanceHeader, p.instance)
	}
	o, found := probe.Index(), q.tag != ""
	switch {
	case q.base:
		w.WriteHeader(http.StatusOK)
		return nil
	case q.kind == upstream.Blob, q.kind == upstream.Manifest && q.tag == "":
		o, found = probe.Find(q.digest)
	}
	if !found {
		return &upstream.StatusError{Status: http.StatusNotFound}
	}
	w.cacheStatus = probe.CacheStatus
	w.Header().Set("Content-Type", o.MediaType)
	setDigest(w.Header(), o.Digest)
	quoteCondition(r)
	return serveContent(w, r, bytes.NewReader(o.Content))
}
