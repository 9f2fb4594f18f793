// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"errors"
	"net/http"

	"tarn/cache/store"
	"tarn/images"
	"tarn/proxy"
)

// Failure is the answer to what is not done: what is wrong, one word of it for programs,
// and what to do next. A code keeps its meaning for as long as the API has its version;
// there may be more of them.
type Failure struct {
	Message string `json:"error"`
	Code    string `json:"code"`
	Next    string `json:"next"`
}

// The codes that stand for a status rather than for an error.
const (
	codeInvalid  = "invalid"
	codeReadOnly = "read_only"
)

func refuse(w http.ResponseWriter, status int, code, message, next string) {
	serveJSON(w, status, Failure{message, code, next})
}

// invalid answers what cannot be read.
func invalid(w http.ResponseWriter, message string) {
	refuse(w, http.StatusBadRequest, codeInvalid, message, "mend the request: /api/v1/openapi.yaml says what it takes")
}

// failures are the errors that have a code of their own, the first that matches counts.
var failures = []struct {
	is     error
	status int
	code   string
	next   string
}{
	{images.ErrNotHere, http.StatusNotFound, "not_here", "tarn images lists what is here"},
	{images.ErrNotPinned, http.StatusNotFound, "not_pinned", "tarn pin lists what is pinned"},
	{proxy.ErrNoImage, http.StatusNotFound, "not_found", "look for a typing error in its name or tag"},
	{store.ErrVerifying, http.StatusConflict, "busy", "wait until that has ended, or end it where it was begun"},
	{errPulling, http.StatusConflict, "busy", "wait until one of them has ended"},
	{images.ErrPinned, http.StatusConflict, "pinned", "unpin it first: tarn unpin"},
	{images.ErrPinsTooLarge, http.StatusConflict, "too_large", "unpin something, or raise max_size"},
	{images.ErrShared, http.StatusConflict, "shared", "evict the image that it belongs to"},
	{errSeveral, http.StatusConflict, "ambiguous", "name one of them"},
	{images.ErrNoPin, http.StatusBadRequest, codeInvalid, "name an image and platforms that it is for"},
	{proxy.ErrNotAsked, http.StatusBadRequest, "not_listed", "list the registry under upstreams: in tarn's configuration"},
	{errNoFilter, http.StatusBadRequest, codeInvalid, "tarn images --help says which filters there are"},
	{store.ErrClosed, http.StatusServiceUnavailable, "closing", "ask again when tarn has been started anew"},
}

// failureOf is the answer to an error, and its status.
func failureOf(err error) (int, Failure) {
	for _, f := range failures {
		if errors.Is(err, f.is) {
			return f.status, Failure{err.Error(), f.code, f.next}
		}
	}
	return http.StatusInternalServerError, Failure{err.Error(), "failed", "tarn's log may say more"}
}

func serveFailure(w http.ResponseWriter, err error) {
	status, f := failureOf(err)
	serveJSON(w, status, f)
}
