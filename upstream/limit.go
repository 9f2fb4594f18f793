// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A 429 is the answer to that question of that credential. The same one is not
// put again before its Retry-After, since it would only be refused, and some
// registries count it; nothing else is held back. A token service's is that
// token's.

const (
	// defaultRetryAfter is for a 429 that does not say (RFC 6585 4): some
	// only mean that there are too many connections.
	defaultRetryAfter = time.Second
	// These bound what one may say.
	minRetryAfter = time.Second
	maxRetryAfter = time.Minute
	// maxLimited bounds how many questions are remembered.
	maxLimited = 1024
	// momentsFrom: a Retry-After of so many seconds or more is no delay but a
	// moment, in seconds since 1970. As a delay it would be 32 years.
	momentsFrom = 1_000_000_000
)

// question names what is asked with which credential, in a form that is worth
// nothing elsewhere.
type question [sha256.Size]byte

func (c *Client) question(req Request, parts ...string) (q question) {
	h := hmac.New(sha256.New, c.key[:])
	fmt.Fprintf(h, "%q %d %q", parts, req.As, req.Authorization)
	h.Sum(q[:0])
	return q
}

// unlessLimited asks, unless a 429 that the same question was answered with
// still holds. The question is only named where there are any.
func unlessLimited[T any](r *Registry, name func() question, ask func() (T, error)) (T, error) {
	r.mu.Lock()
	some := len(r.limits) > 0
	r.mu.Unlock()
	if some {
		if err := r.limited(name()); err != nil {
			var none T
			return none, err
		}
	}
	resp, err := ask()
	var status *StatusError
	if errors.As(err, &status) && status.Status == http.StatusTooManyRequests {
		q := name()
		r.limit(q, status.RetryAfter)
		if longest := r.limited(q); longest != nil { // of several that were on their way
			err = longest
		}
	}
	return resp, err
}

// limited is the refusal that stands for this question, nil when there is none.
func (r *Registry) limited(q question) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	until, ok := r.limits[q]
	if !ok {
		return nil
	}
	left := time.Until(until)
	if left <= 0 {
		delete(r.limits, q)
		return nil
	}
	return &StatusError{Status: http.StatusTooManyRequests, RetryAfter: left}
}

func (r *Registry) limit(q question, d time.Duration) {
	now := time.Now()
	until := now.Add(min(max(d, minRetryAfter), maxRetryAfter))
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.limits) >= maxLimited {
		maps.DeleteFunc(r.limits, func(_ question, t time.Time) bool { return !t.After(now) })
	}
	if len(r.limits) >= maxLimited {
		clear(r.limits)
	}
	if until.After(r.limits[q]) {
		r.limits[q] = until
	}
}

// retryAfter reads the header: seconds, a date (RFC 9110 10.2.3), or, as some
// registries write it, a moment in seconds since 1970. Moments are told by the
// server's own clock, where it says what that is. 0 means that it does not say.
func retryAfter(h http.Header, now time.Time) time.Duration {
	text := strings.TrimSpace(h.Get("Retry-After"))
	if text == "" {
		return 0
	}
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		now = date
	}
	d := defaultRetryAfter
	seconds, err := parseDecimal(text)
	switch {
	case errors.Is(err, strconv.ErrRange):
		d = maxRetryAfter
	case err == nil && seconds >= momentsFrom:
		d = time.Unix(seconds, 0).Sub(now)
	case err == nil:
		d = time.Duration(min(seconds, int64(maxRetryAfter/time.Second))) * time.Second
	default:
		if date, err := http.ParseTime(text); err == nil {
			d = date.Sub(now)
		}
	}
	return min(max(d, minRetryAfter), maxRetryAfter)
}

// RateLimit is what a registry said last of the requests that it grants, in
// the headers that Docker Hub sends.
type RateLimit struct {
	Limit     int64     `json:"limit"`
	Remaining int64     `json:"remaining"`
	Window    string    `json:"window,omitempty"` // seconds, as it came
	Seen      time.Time `json:"seen"`
}

// hubWindow is Docker Hub's, for who does not say.
const hubWindow = 6 * time.Hour

// Until is when what it said says nothing any more: whoever asked nothing for a whole
// window is granted all again.
func (r RateLimit) Until() time.Time {
	window := hubWindow
	if seconds, err := strconv.ParseInt(r.Window, 10, 32); err == nil {
		window = time.Duration(seconds) * time.Second
	}
	return r.Seen.Add(window)
}

// noteRate reads those headers, if there are any: "76;w=21600".
func (r *Registry) noteRate(h http.Header) {
	remaining, window, _ := strings.Cut(h.Get("Ratelimit-Remaining"), ";w=")
	left, err := parseDecimal(remaining)
	if err != nil {
		return
	}
	first, _, _ := strings.Cut(h.Get("Ratelimit-Limit"), ";")
	limit, _ := parseDecimal(first)
	if n, err := parseDecimal(window); err != nil || strconv.FormatInt(n, 10) != window {
		window = ""
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rate = RateLimit{Limit: limit, Remaining: left, Window: window, Seen: time.Now()}
}

// Health returns that of the listed registries, by name.
func (c *Client) Health() (all []Health) {
	all = []Health{} // a list also when it is empty
	for _, name := range slices.Sorted(maps.Keys(c.listed)) {
		all = append(all, c.listed[name].health())
	}
	return all
}
