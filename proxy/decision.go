// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"strings"

	"tarn/cache"
	"tarn/history"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// told is what a request's way tells of it besides its answer, for people to look up.
type told struct {
	asked         string        // the method by which the registry was asked last, "" where it was not
	meant, before digest.Digest // what a tag means, and what it meant where that was another
	away          error         // why the answer is stale
	unproven      bool          // the yes was not about what is here
}

// remember has the history know what became of a request for a manifest or a blob.
func (p *Proxy) remember(w *response, r *http.Request, q *request, ended outcome) {
	if p.history == nil || q.base || q.kind != upstream.Manifest && q.kind != upstream.Blob {
		return
	}
	e := history.Entry{
		At:         p.now().Add(-w.headers),
		Client:     clientName(r.UserAgent()),
		Method:     q.method,
		Upstream:   string(q.upstream),
		Unlisted:   !p.names.listed(q.upstream),
		Repository: q.repository,
		Kind:       string(q.kind),
		Tag:        q.tag,
		Digest:     cmp.Or(q.digest, w.told.meant),
		Before:     w.told.before,
		Outcome:    outcomeNames[ended],
		Status:     w.status,
		Asked:      w.told.asked,
		Shared:     w.collapsed,
		Bytes:      w.bytes,
	}
	if e.Asked == "" && w.fetcher.fetched() {
		e.Asked = http.MethodGet // for the bytes, of which it was known who may have them
	}
	e.Cause, e.Detail = p.why(w, r, e)
	p.history.Add(e)
}

// why says why the bytes did not come from the disk, in a word and, where there are
// some, in the words that the client was told.
func (p *Proxy) why(w *response, r *http.Request, e history.Entry) (history.Cause, string) {
	switch {
	case w.err != nil:
		return whyFailed(w, r)
	case w.told.away != nil:
		cause, _ := whyError(w.told.away)
		return cause, errorWords(w.request, w.told.away)
	case w.told.unproven:
		return history.Unproven, ""
	}
	switch e.Outcome {
	case "joined":
		return history.Fetching, ""
	case "miss":
		cause := p.history.Why(e.Digest)
		if cause == history.NeverSeen && e.Before != "" {
			cause = history.Moved
		}
		return cause, ""
	case "bypassed":
		_, detail, _ := strings.Cut(w.cacheStatus, "detail=")
		if detail != "not-storable" {
			return history.NotStorable, detail
		}
		return history.DiskTrouble, cmp.Or(p.cache.Stats().Trouble, "there is no room for it")
	}
	return "", ""
}

// whyFailed is for an answer that is an error, or broke off.
func whyFailed(w *response, r *http.Request) (history.Cause, string) {
	if r.Context().Err() != nil {
		return history.Gone, ""
	}
	cause, known := whyError(w.err)
	if !known && errors.Is(w.err, errAborted) {
		return history.Broken, ""
	}
	return cause, errorWords(w.request, w.err)
}

// whyError is an error in a word, if it is one that is known.
func whyError(err error) (history.Cause, bool) {
	var api *apiError
	var part *rangeError
	var refused *upstream.StatusError
	switch {
	case errors.Is(err, errNotAllowed), errors.Is(err, upstream.ErrGuard):
		return history.NotAllowed, true
	case errors.As(err, &api), errors.As(err, &part):
		return history.BadRequest, true
	case errors.As(err, &refused):
		switch {
		case refused.Status == http.StatusTooManyRequests:
			return history.Limited, true
		case refused.Status >= http.StatusInternalServerError:
			return history.Away, true
		}
		return history.Refused, true
	case errors.Is(err, cache.ErrBroken), errors.Is(err, cache.ErrDropped), errors.Is(err, errManifest), errors.Is(err, upstream.ErrProtocol):
		return history.Broken, true
	case errors.Is(err, upstream.ErrTimeout), errors.Is(err, upstream.ErrUnreachable), errors.Is(err, upstream.ErrCredentials), errors.Is(err, context.DeadlineExceeded):
		return history.Away, true
	case errors.Is(err, cache.ErrClosed), errors.Is(err, context.Canceled):
		return history.Closing, true
	}
	return history.Internal, false
}

// errorWords are what a client was told.
func errorWords(q *request, err error) string {
	_, e := answerFor(q, err)
	return e.Message
}
