// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"crypto/sha256"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A registry that limits the rate of requests says so with a 429, and for how
// long. Until then nothing more is asked there with the same credential: each
// further request would only be refused, and some registries count them.

const (
	// defaultRetryAfter is for a 429 that does not say (RFC 6585 4): some
	// only mean that there are too many connections.
	defaultRetryAfter = time.Second
	// These bound what one may say.
	minRetryAfter = time.Second
	maxRetryAfter = time.Hour
	// maxLimited bounds how many credentials are remembered.
	maxLimited = 1024
)

// limited is the refusal that stands for this credential, nil when there is
// none.
func (r *Registry) limited(key [sha256.Size]byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	until, ok := r.limits[key]
	if !ok {
		return nil
	}
	left := time.Until(until)
	if left <= 0 {
		delete(r.limits, key)
		return nil
	}
	return &StatusError{Status: http.StatusTooManyRequests, RetryAfter: strconv.Itoa(int((left + time.Second - 1) / time.Second))}
}

// noteLimit takes a 429, if the error is one.
func (r *Registry) noteLimit(key [sha256.Size]byte, err error) {
	var status *StatusError
	if !errors.As(err, &status) || status.Status != http.StatusTooManyRequests {
		return
	}
	until := time.Now().Add(retryAfter(status.RetryAfter, time.Now()))
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.limits) >= maxLimited {
		clear(r.limits)
	}
	if until.After(r.limits[key]) { // of several that were on their way, the longest holds
		r.limits[key] = until
	}
}

// retryAfter reads the header: seconds, or a date (RFC 9110 10.2.3).
func retryAfter(header string, now time.Time) time.Duration {
	d := defaultRetryAfter
	if seconds, err := parseDecimal(strings.TrimSpace(header)); err == nil {
		d = time.Duration(min(seconds, int64(maxRetryAfter/time.Second))) * time.Second
	} else if errors.Is(err, strconv.ErrRange) {
		d = maxRetryAfter
	} else if date, err := http.ParseTime(header); err == nil {
		d = date.Sub(now)
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

// noteRate reads those headers, if there are any: "76;w=21600".
func (r *Registry) noteRate(h http.Header) {
	remaining, window, _ := strings.Cut(h.Get("Ratelimit-Remaining"), ";w=")
	left, err := parseDecimal(remaining)
	if err != nil {
		return
	}
	first, _, _ := strings.Cut(h.Get("Ratelimit-Limit"), ";")
	limit, _ := parseDecimal(first)
	if _, err := parseDecimal(window); err != nil {
		window = ""
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rate = RateLimit{Limit: limit, Remaining: left, Window: window, Seen: time.Now()}
}

// Health is how a registry does, for people.
type Health struct {
	Name Name `json:"name"`
	// Down are the hosts that are not asked now, since they failed.
	Down []HostDown `json:"down,omitempty"`
	// LimitedUntil is until when the registry's 429 holds for some credential.
	LimitedUntil *time.Time `json:"limitedUntil,omitempty"`
	RateLimit    *RateLimit `json:"rateLimit,omitempty"`
}

// HostDown is an endpoint's host, or a token service's.
type HostDown struct {
	Origin string    `json:"origin"`
	Since  time.Time `json:"since"`
	Cause  string    `json:"cause"`
}

// Health returns that of the listed registries, by name.
func (c *Client) Health() (all []Health) {
	for _, name := range slices.Sorted(maps.Keys(c.listed)) {
		all = append(all, c.listed[name].health())
	}
	return all
}

func (r *Registry) health() Health {
	h := Health{Name: r.name}
	r.mu.Lock()
	defer r.mu.Unlock()
	for origin, b := range r.breakers {
		b.mu.Lock()
		if !b.since.IsZero() {
			h.Down = append(h.Down, HostDown{Origin: origin, Since: b.since, Cause: b.cause.Error()})
		}
		b.mu.Unlock()
	}
	for _, until := range r.limits {
		if time.Until(until) > 0 && (h.LimitedUntil == nil || until.After(*h.LimitedUntil)) {
			h.LimitedUntil = &until
		}
	}
	if !r.rate.Seen.IsZero() {
		rate := r.rate
		h.RateLimit = &rate
	}
	return h
}

// askLimited is askHead, unless a 429 stands in the way. Lists are limited apart
// from what a pull needs: many registries count them so.
func (r *Registry) askLimited(ctx context.Context, e Endpoint, authority bool, timeout time.Duration, req Request) (*Response, error) {
	what := e.URL.Host
	if req.Kind != Manifest && req.Kind != Blob {
		what += " " + string(req.Kind)
	}
	key := r.client.asker(what, req)
	if err := r.limited(key); err != nil {
		return nil, err
	}
	resp, err := r.askHead(ctx, e, authority, timeout, req)
	return resp, r.orLimited(key, err)
}

// orLimited takes err, and is what tarn makes of it when that is a 429.
func (r *Registry) orLimited(key [sha256.Size]byte, err error) error {
	r.noteLimit(key, err)
	var status *StatusError
	if errors.As(err, &status) && status.Status == http.StatusTooManyRequests {
		if limited := r.limited(key); limited != nil {
			return limited
		}
	}
	return err
}
