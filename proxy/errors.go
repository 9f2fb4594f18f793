// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"tarn/cache"
	"tarn/upstream"

	"github.com/distribution/distribution/v3/registry/api/errcode"
)

var (
	v2ErrTag    = errcode.ErrorCodeTagInvalid
	v2ErrDigest = errcode.ErrorCodeDigestInvalid
	errDenied   = errcode.ErrorCodeDenied
)

// apiError is an answer that tarn gives on its own account.
type apiError struct {
	status  int
	code    errcode.ErrorCode
	message string
}

func (e *apiError) Error() string { return e.message }

func badName(message string) error {
	return &apiError{http.StatusBadRequest, errcode.ErrorCodeNameInvalid, message}
}

var (
	errNoRoute = &apiError{http.StatusNotFound, errcode.ErrorCodeNameUnknown,
		"no such path: tarn serves manifests, blobs, tags/list and referrers under /v2/"}
	errMethod = &apiError{http.StatusMethodNotAllowed, errcode.ErrorCodeUnsupported,
		"tarn only serves pulls: GET and HEAD"}
	errNotAllowed = &apiError{http.StatusNotFound, errcode.ErrorCodeNameUnknown,
		"this registry is not listed in tarn's configuration, and allow is set to listed"}
	errNoLength = &apiError{http.StatusBadGateway, errcode.ErrorCodeUnavailable,
		"upstream did not say how long the object is, and HTTP/1.0 cannot be answered without"}
)

// errManifest is wrapped by what is wrong with a manifest that matches its
// digest: the registry says it is something that it is not.
var errManifest = errors.New("manifest refused")

// rangeError is for a part that the object does not have. size is the Content-Range
// that says how long the object is (RFC 9110 15.5.17), "" for a part that cannot be
// read.
type rangeError struct{ size string }

func (e *rangeError) Error() string { return "no such range" }

// answerFor maps an error to the status, code and message of the answer. It is
// the only place that does. The message of an upstream's refusal depends on
// the kind of request and the status alone, so that it tells nobody what is cached.
func answerFor(q *request, err error) (status int, e errcode.Error) {
	var api *apiError
	var part *rangeError
	var refused *upstream.StatusError
	var host *upstream.HostError
	unavailable := errcode.ErrorCodeUnavailable
	switch {
	case errors.As(err, &api):
		return api.status, api.code.WithMessage(api.message)
	case errors.As(err, &part):
		return http.StatusRequestedRangeNotSatisfiable, errcode.ErrorCodeRangeInvalid.WithMessage("the object has no such range")
	case errors.As(err, &refused):
		return refusal(q, refused)
	case errors.Is(err, cache.ErrDropped):
		return http.StatusBadGateway, unavailable.WithMessage(cache.ErrDropped.Error())
	case errors.Is(err, cache.ErrBroken):
		return http.StatusBadGateway, unavailable.WithMessage("upstream sent a body that is not what its digest says")
	case errors.Is(err, errManifest):
		return http.StatusBadGateway, errcode.ErrorCodeManifestInvalid.WithMessage(err.Error())
	case errors.As(err, &host):
		return hostTrouble(host)
	case errors.Is(err, upstream.ErrTimeout), errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout, unavailable.WithMessage("upstream did not answer in time")
	case errors.Is(err, upstream.ErrCredentials):
		// Says which file, program or key of the configuration to mend, without what a
		// program wrote.
		var brief interface{ Brief() string }
		if errors.As(err, &brief) {
			return http.StatusBadGateway, unavailable.WithMessage(brief.Brief())
		}
		return http.StatusBadGateway, unavailable.WithMessage(err.Error())
	case errors.Is(err, upstream.ErrUnreachable):
		return http.StatusBadGateway, unavailable.WithMessage("upstream cannot be reached")
	case errors.Is(err, upstream.ErrProtocol):
		return http.StatusBadGateway, unavailable.WithMessage("upstream answered what no registry answers")
	case errors.Is(err, cache.ErrClosed), errors.Is(err, context.Canceled):
		return http.StatusServiceUnavailable, unavailable.WithMessage("tarn is shutting down")
	default:
		return http.StatusInternalServerError, errcode.ErrorCodeUnknown.WithMessage("internal error, see tarn's log")
	}
}

// hostTrouble tells why a host gave no answer, and what whoever runs tarn can do
// about what tarn refused.
func hostTrouble(e *upstream.HostError) (int, errcode.Error) {
	unavailable := errcode.ErrorCodeUnavailable
	switch {
	case errors.Is(e, upstream.ErrGuard):
		return http.StatusBadGateway, errDenied.WithMessage(fmt.Sprintf("tarn does not ask %s: %s; %s", e.Host, e.Brief(), e.Advice))
	case errors.Is(e, upstream.ErrTimeout):
		return http.StatusGatewayTimeout, unavailable.WithMessage(fmt.Sprintf("upstream %s did not answer in time: %s", e.Host, e.Brief()))
	}
	return http.StatusBadGateway, unavailable.WithMessage(fmt.Sprintf("upstream %s cannot be reached: %s", e.Host, e.Brief()))
}

// refusal keeps 401, 403 and 404, which clients act upon. What is left of 4xx
// means something only between tarn and the registry, and a 429 would make
// podman sleep and containerd hammer.
func refusal(q *request, e *upstream.StatusError) (int, errcode.Error) {
	switch e.Status {
	case http.StatusUnauthorized:
		return e.Status, errcode.ErrorCodeUnauthorized.WithMessage("upstream requires authentication")
	case http.StatusForbidden:
		return e.Status, errcode.ErrorCodeDenied.WithMessage("upstream denies access")
	case http.StatusNotFound:
		code := errcode.ErrorCodeNameUnknown
		switch q.kind {
		case upstream.Manifest:
			code = errcode.ErrorCodeManifestUnknown
		case upstream.Blob:
			code = errcode.ErrorCodeBlobUnknown
		case upstream.Referrers:
			// NAME_UNKNOWN would say that the repository does not exist, and
			// keep clients from the referrers tag.
			code = errcode.ErrorCodeUnsupported
		}
		return e.Status, code.WithMessage("upstream does not have it")
	case http.StatusTooManyRequests:
		return http.StatusServiceUnavailable, errcode.ErrorCodeTooManyRequests.WithMessage("upstream limits the rate of requests")
	default:
		return http.StatusBadGateway, errcode.ErrorCodeUnavailable.WithMessage(e.Error())
	}
}

// serveError answers with the error's OCI JSON (distribution-spec "Error
// Codes").
func serveError(w http.ResponseWriter, q *request, err error) {
	status, e := answerFor(q, err)
	h := w.Header()
	var refused *upstream.StatusError
	if errors.As(err, &refused) {
		if status == http.StatusUnauthorized {
			h["Www-Authenticate"] = refused.Challenge
		}
		if refused.RetryAfter > 0 && status == http.StatusServiceUnavailable {
			h.Set("Retry-After", strconv.FormatInt(int64((refused.RetryAfter+time.Second-1)/time.Second), 10))
		}
	}
	if status == http.StatusMethodNotAllowed {
		h.Set("Allow", "GET, HEAD")
	}
	body, jerr := json.Marshal(errcode.Errors{e})
	if jerr != nil {
		body = []byte(`{"errors":[]}`)
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", fmt.Sprint(len(body)))
	for _, name := range []string{"ETag", "Docker-Content-Digest", "Content-Range", "Accept-Ranges", "Link", "Age", "X-Content-Type-Options"} {
		h.Del(name)
	}
	var part *rangeError
	if errors.As(err, &part) && part.size != "" {
		h.Set("Content-Range", part.size)
	}
	w.WriteHeader(status)
	w.Write(body)
}
