// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

var (
	// ErrTimeout: no headers within the head timeout, or no byte of the
	// body for bodyIdle.
	ErrTimeout = errors.New("upstream timed out")
	// ErrUnreachable: name resolution, connect, TLS, or the connection broke.
	ErrUnreachable = errors.New("upstream unreachable")
	// ErrProtocol: the registry answered what no registry may answer.
	ErrProtocol = errors.New("upstream answered nonsense")
	// ErrRange is an ErrProtocol: a part was asked for, and the answer is
	// neither that part nor the whole. The whole may well be had.
	ErrRange = fmt.Errorf("%w: not the range that was asked for", ErrProtocol)
)

// StatusError is a registry's own answer other than 200 and 206.
type StatusError struct {
	Status int
	// Challenge are the WWW-Authenticate headers of a 401, without their
	// error parameters, which speak of a request that the client never sent.
	Challenge []string
	// RetryAfter is what a 429 or 503 asks for, between a second and a minute;
	// 0 when it does not say.
	RetryAfter time.Duration

	// Denied: the registry itself said 403 to a token that tarn came by, and
	// the status is a 401 so that a client's own credential may do better.
	Denied bool
	// Shown: a credential or token was shown with the request that was refused.
	Shown bool
	// Foreign: a redirect target said it, which is nobody's word on rights.
	Foreign bool
	// TokenStatus is what the token service answered, where that is why there is no
	// answer of the registry's; Status is 502 then.
	TokenStatus int
	// Web: the body is a page for people. A registry that lacks an API often
	// answers with one.
	Web bool

	insufficient bool // RFC 6750 3.1: the token is good, but not for this
}

func (e *StatusError) Error() string {
	if e.TokenStatus != 0 {
		return fmt.Sprintf("the upstream's token service answered %d", e.TokenStatus)
	}
	return fmt.Sprintf("upstream answered %d", e.Status)
}

func challengeSize(challenge []string) (n int) {
	for _, c := range challenge {
		n += len(c)
	}
	return n
}

// Response is a registry's 200 or 206.
type Response struct {
	Header http.Header
	// Body has the bytes from Offset on; for a HEAD it is empty.
	Body io.ReadCloser
	// Size of the whole object in bytes, -1 when the registry did not say.
	Size int64
	// Offset is the first byte of the body: the one that was asked for, or
	// 0 when the registry does not honour Range. End is the byte after its
	// last, -1 when the registry did not say.
	Offset, End int64
	// Digest is what the registry says this is, "" when it does not or when
	// what it says is no digest.
	Digest digest.Digest
	// MediaType is the Content-Type without its parameters, "" when it is none
	// of at most maxMediaType characters (RFC 6838 4.2).
	MediaType string
	// Encoding is the Content-Encoding, although identity was asked for; ""
	// for none. A digest names the bytes, whatever they are labelled.
	Encoding string
	// Redirected: it came from where the endpoint redirected to, another
	// origin.
	Redirected bool
	// Authority: it is the first endpoint's answer, which is the registry's
	// word; another's is bytes only.
	Authority bool
}

// refusesRange tells whether a status is one that servers answer a Range with
// which they do not want: 416 where there is no such byte, and what those say
// that do not know the header's form.
func refusesRange(req Request, status int) bool {
	switch status {
	case http.StatusRequestedRangeNotSatisfiable, http.StatusBadRequest, http.StatusNotImplemented:
		return req.ranged()
	}
	return false
}

// newResponse reads an answer. It fails with a *StatusError, with ErrRange, and with
// ErrProtocol.
func newResponse(req Request, a *answer) (*Response, error) {
	if !req.ranged() {
		// All of it, by other names.
		first, last, size, err := parseContentRange(a.Header.Get("Content-Range"))
		if a.StatusCode == http.StatusNonAuthoritativeInfo ||
			a.StatusCode == http.StatusPartialContent && (a.Header.Get("Content-Range") == "" || err == nil && first == 0 && last == size-1) {
			a.StatusCode = http.StatusOK
		}
	}
	if a.StatusCode != http.StatusOK && a.StatusCode != http.StatusPartialContent {
		return nil, newStatusError(req, a)
	}
	r := &Response{
		Header:     a.Header,
		Body:       a.Body,
		Size:       a.ContentLength,
		End:        a.ContentLength,
		MediaType:  mediaTypeOf(a.Header),
		Redirected: a.foreign,
	}
	if enc := a.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		r.Encoding = enc
	}
	if d, err := digest.Parse(a.Header.Get("Docker-Content-Digest")); err == nil {
		r.Digest = d
	}
	if a.StatusCode == http.StatusPartialContent {
		first, last, size, err := parseContentRange(a.Header.Get("Content-Range"))
		want := size
		if req.Length > 0 {
			want = min(want, req.Offset+req.Length)
		}
		if err != nil || !req.ranged() || first != req.Offset || last != want-1 ||
			a.ContentLength >= 0 && a.ContentLength != want-first {
			return nil, ErrRange
		}
		r.Offset, r.End, r.Size = first, want, size
	}
	return r, nil
}

// newStatusError is what an answer says that is neither a 200 nor a 206: a *StatusError,
// or, where the status is none that a registry means the object with, ErrRange or
// ErrProtocol.
func newStatusError(req Request, a *answer) error {
	if refusesRange(req, a.StatusCode) {
		return fmt.Errorf("%w, but %d", ErrRange, a.StatusCode)
	}
	if a.foreign && a.StatusCode < 400 {
		return fmt.Errorf("%w: the redirect target answered %d", ErrProtocol, a.StatusCode)
	}
	e := &StatusError{Status: a.StatusCode, Foreign: a.foreign, Web: isWeb(mediaTypeOf(a.Header))}
	switch a.StatusCode {
	case http.StatusUnauthorized:
		if a.foreign {
			break // how to show a credential elsewhere
		}
		if e.Challenge = cleanChallenges(a.Header); challengeSize(e.Challenge) > maxChallenge {
			e.Challenge = nil
		}
		for _, c := range a.Header.Values("WWW-Authenticate") {
			_, rest, _ := strings.Cut(strings.TrimSpace(c), " ")
			e.insufficient = e.insufficient || authParams(rest)["error"] == "insufficient_scope"
		}
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		e.RetryAfter = retryAfter(a.Header, time.Now())
	}
	return e
}

// maxMediaType is the longest name of a media type (RFC 6838 4.2).
const maxMediaType = 255

// mediaTypeOf reads the Content-Type.
func mediaTypeOf(h http.Header) string {
	text := h.Get("Content-Type")
	if len(text) > 4*maxMediaType {
		return ""
	}
	mt, _, err := mime.ParseMediaType(text)
	if err != nil || len(mt) > maxMediaType {
		return ""
	}
	return mt
}

// isWeb tells whether a body of that type is a page for people.
func isWeb(mediaType string) bool {
	return mediaType == "text/html" || mediaType == "application/xhtml+xml"
}

// Web tells whether the body is a page for people.
func (r *Response) Web() bool { return isWeb(r.MediaType) }

// parseContentRange reads "bytes first-last/size" (RFC 9110 14.4); a range
// whose total is unknown is an error here.
func parseContentRange(s string) (first, last, size int64, err error) {
	bad := func() (int64, int64, int64, error) {
		return 0, 0, 0, fmt.Errorf("Content-Range %q", s)
	}
	rest, ok := strings.CutPrefix(s, "bytes ")
	if !ok {
		return bad()
	}
	span, total, ok := strings.Cut(rest, "/")
	if !ok {
		return bad()
	}
	from, to, ok := strings.Cut(span, "-")
	if !ok {
		return bad()
	}
	var errs [3]error
	first, errs[0] = parseDecimal(from)
	last, errs[1] = parseDecimal(to)
	size, errs[2] = parseDecimal(total)
	if errors.Join(errs[:]...) != nil || first > last || last >= size {
		return bad()
	}
	return first, last, size, nil
}

// parseDecimal is ParseInt for digits only: no sign, no underscore.
func parseDecimal(s string) (int64, error) {
	if s == "" || s[0] < '0' || s[0] > '9' {
		return 0, strconv.ErrSyntax
	}
	return strconv.ParseInt(s, 10, 64)
}

// cleanChallenges returns the challenges of a 401 without the parameters that
// speak of the request (RFC 6750 3): the client never sent that one. Realm,
// service and scope stay as they are.
func cleanChallenges(h http.Header) []string {
	var out []string
	for _, c := range h.Values("WWW-Authenticate") {
		scheme, params, _ := strings.Cut(strings.TrimSpace(c), " ")
		var kept []string
		for _, p := range splitParams(params) {
			name, _, _ := strings.Cut(p, "=")
			switch asciiLower(strings.TrimSpace(name)) {
			case "error", "error_description", "error_uri":
			default:
				kept = append(kept, p)
			}
		}
		if c := strings.TrimSpace(scheme + " " + strings.TrimSpace(strings.Join(kept, ","))); c != "" {
			out = append(out, c)
		}
	}
	return out
}

// splitParams splits at the commas that are in no quotes.
func splitParams(s string) []string {
	var parts []string
	start, quoted := 0, false
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && quoted:
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == ',' && !quoted:
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

// bodyIdle is how long a body may bring nothing. It is long against a slow
// registry, and short for who waits: what is missing is asked for again.
const bodyIdle = 10 * time.Second

// headerDeadline ends an exchange whose headers, all hops and tokens included,
// do not come in time; afterwards it watches over the body.
type headerDeadline struct {
	ctx    context.Context // the exchange's own
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

func withHeaderDeadline(parent context.Context, d time.Duration) (context.Context, *headerDeadline) {
	ctx, cancel := context.WithCancelCause(parent)
	h := &headerDeadline{ctx: ctx, cancel: cancel}
	h.timer = time.AfterFunc(d, func() { cancel(ErrTimeout) })
	return ctx, h
}

// explain replaces the transport's view of an end that we caused.
func (h *headerDeadline) explain(err error) error {
	h.timer.Stop()
	var status *StatusError
	var silent *HostError
	if errors.As(err, &status) || errors.As(err, &silent) && errors.Is(err, ErrTimeout) {
		return err // which says more
	}
	switch cause := context.Cause(h.ctx); {
	case errors.Is(cause, ErrTimeout):
		return fmt.Errorf("%w: nothing came in time", ErrTimeout)
	case errors.Is(cause, context.DeadlineExceeded):
		return fmt.Errorf("%w: %w", ErrTimeout, cause)
	case cause != nil && !errors.Is(cause, context.Canceled):
		return cause
	case h.ctx.Err() != nil && errors.Is(err, context.Canceled):
		return context.Canceled
	}
	return err
}

// arrived turns the deadline into the body's idle limit.
func (h *headerDeadline) arrived(body io.ReadCloser) io.ReadCloser {
	h.timer.Stop()
	idle := time.AfterFunc(bodyIdle, func() { h.cancel(ErrTimeout) })
	idle.Stop() // until the first Read
	return &idleBody{deadline: h, body: body, timer: idle}
}

// idleBody ends when a Read brings nothing for bodyIdle. Time between two
// Reads does not count: that is the reader's affair.
type idleBody struct {
	deadline *headerDeadline
	body     io.ReadCloser
	timer    *time.Timer
	close    sync.Once
}

func (b *idleBody) Read(p []byte) (int, error) {
	b.timer.Reset(bodyIdle)
	n, err := b.body.Read(p)
	b.timer.Stop()
	if err != nil && err != io.EOF {
		err = b.deadline.explain(unreachable("body", err))
	}
	return n, err
}

func (b *idleBody) Close() error {
	b.close.Do(func() {
		b.timer.Stop()
		b.deadline.cancel(nil)
		b.body.Close()
	})
	return nil
}

// unreachable wraps an error of the transport without the URL that it may
// carry.
func unreachable(what string, err error) error {
	if errors.Is(err, ErrGuard) {
		return err
	}
	return fmt.Errorf("%w: %s: %w", ErrUnreachable, what, err)
}
