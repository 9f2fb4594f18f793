// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"io"
	"net/http"
	"strings"
)

// Exchange is one request to a host and what came of it, for who counts them.
type Exchange struct {
	Name   Name
	Listed bool
	Method string
	Cause  Cause
	Status int // 0 when there was no answer
}

// Cause is what an exchange was for.
type Cause string

const (
	ForTag       Cause = "tag"       // what a tag means
	ForRights    Cause = "authorise" // whether a client may have an object
	ForBytes     Cause = "fetch"     // the bytes of an object
	ForList      Cause = "list"      // tags or referrers, passed on
	ForRedirect  Cause = "redirect"  // any of these, where the registry sends elsewhere
	ForToken     Cause = "token"     // a token service
	ForChallenge Cause = "challenge" // /v2/, which says how one asks
)

// cause is what the request is for, by its form: who only asks whether a client may
// have something wants no more than its headers, or its first byte.
func (req Request) cause() Cause {
	switch {
	case !req.Kind.named():
		return ForList
	case !strings.Contains(req.Reference, ":"):
		return ForTag
	case req.Method == http.MethodHead, req.Offset == 0 && req.Length == 1:
		return ForRights
	}
	return ForBytes
}

// countedBody tells how many bytes came.
type countedBody struct {
	io.ReadCloser
	received func(n int)
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.received(n)
	}
	return n, err
}
