// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// token is an anonymous one: the right that a registry gives to everybody.
type token struct {
	value     string
	expires   time.Time
	challenge []string // of the 401 that it was fetched for
}

// header is the Authorization value, "" for no token.
func (t token) header() string {
	if t.value == "" {
		return ""
	}
	return "Bearer " + t.value
}

// errTokenRefused: the token service gives anonymous nothing.
var errTokenRefused = errors.New("token service refuses anonymous")

const (
	// defaultTokenLife is what a token service means that does not say
	// (distribution, "Token Authentication": 60 seconds).
	defaultTokenLife = 60 * time.Second
	// tokenMargin is how long before its end a token is not used any more,
	// so that it does not run out on the way.
	tokenMargin = 5 * time.Second
	// maxTokenBody bounds the answer of a token service; real ones are a
	// few KiB.
	maxTokenBody = 1 << 20
)

func tokenKey(e Endpoint, repository string) string { return e.URL.Host + "\x00" + repository }

func (r *Registry) cachedToken(e Endpoint, repository string) (token, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t, ok := r.tokens[tokenKey(e, repository)]
	if !ok || time.Now().After(t.expires) {
		return token{}, false
	}
	return t, true
}

func (r *Registry) dropToken(e Endpoint, repository string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.tokens, tokenKey(e, repository))
}

// anonymousToken fetches the token that the challenge asks for, once for all
// that wait for it. The fetch has a context of its own: whoever started it may
// leave.
func (r *Registry) anonymousToken(ctx context.Context, e Endpoint, repository string, bearer map[string]string, challenge []string, far reach) (token, error) {
	key := tokenKey(e, repository)
	done := r.fetching.DoChan(key, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.headTimeout)
		defer cancel()
		t, err := r.fetchToken(ctx, e, repository, bearer, far)
		if err != nil {
			return token{}, err
		}
		t.challenge = challenge
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.tokens) >= maxTokens {
			clear(r.tokens)
		}
		r.tokens[key] = t
		return t, nil
	})
	select {
	case res := <-done:
		return res.Val.(token), res.Err
	case <-ctx.Done():
		return token{}, context.Cause(ctx)
	}
}

// fetchToken asks the realm of a Bearer challenge without any credential, as
// distribution's "Token Authentication" has it. oras-go's client for this
// refuses every realm on a private address under another host name than the
// registry's, listed or not, and looks names up past the dial guard; here the
// guard decides.
func (r *Registry) fetchToken(ctx context.Context, e Endpoint, repository string, bearer map[string]string, far reach) (token, error) {
	realm, err := url.Parse(bearer["realm"])
	if err != nil || realm.Host == "" || realm.User != nil ||
		realm.Scheme != "https" && (realm.Scheme != "http" || e.URL.Scheme == "https") {
		return token{}, fmt.Errorf("%w: the challenge of %s has no usable realm", ErrProtocol, e.URL.Host)
	}
	q := realm.Query()
	if s := bearer["service"]; s != "" {
		q.Set("service", s)
	}
	q.Set("scope", cmp.Or(bearer["scope"], "repository:"+repository+":pull"))
	realm.RawQuery = q.Encode()
	hreq, err := http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), nil)
	if err != nil {
		return token{}, fmt.Errorf("%w: the challenge of %s has no usable realm", ErrProtocol, e.URL.Host)
	}
	if sameOrigin(realm, e.URL) {
		far = r.endpointReach()
	}
	resp, _, err := r.roundTrip(hreq, far)
	if err != nil {
		return token{}, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusOK:
	case resp.StatusCode == http.StatusTooManyRequests:
		return token{}, &StatusError{Status: resp.StatusCode, RetryAfter: resp.Header.Get("Retry-After")}
	case resp.StatusCode >= 400 && resp.StatusCode < 500:
		return token{}, errTokenRefused
	default:
		return token{}, &StatusError{Status: http.StatusBadGateway}
	}
	var body struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxTokenBody)).Decode(&body); err != nil {
		return token{}, fmt.Errorf("%w: the token service of %s sent no JSON", ErrProtocol, e.URL.Host)
	}
	value := cmp.Or(body.Token, body.AccessToken)
	if value == "" || strings.ContainsAny(value, "\r\n\x00") {
		return token{}, fmt.Errorf("%w: the token service of %s sent no token", ErrProtocol, e.URL.Host)
	}
	life := defaultTokenLife
	if body.ExpiresIn > 0 && body.ExpiresIn < int64((24*time.Hour)/time.Second) {
		life = time.Duration(body.ExpiresIn) * time.Second
	}
	return token{value: value, expires: time.Now().Add(life - min(tokenMargin, life/2))}, nil
}

// bearerChallenge returns the parameters of the first Bearer challenge with a
// realm (RFC 9110 11.6.1).
func bearerChallenge(challenges []string) (map[string]string, bool) {
	for _, c := range challenges {
		scheme, rest, _ := strings.Cut(strings.TrimSpace(c), " ")
		if !strings.EqualFold(scheme, "Bearer") {
			continue
		}
		if p := authParams(rest); p["realm"] != "" {
			return p, true
		}
	}
	return nil, false
}

// authParams reads name=value pairs, quoted or not, up to what is no pair.
func authParams(s string) map[string]string {
	params := make(map[string]string)
	for {
		s = strings.TrimLeft(s, " \t,")
		name, rest, ok := strings.Cut(s, "=")
		if !ok {
			return params
		}
		name = asciiLower(strings.TrimSpace(name))
		if strings.ContainsAny(name, " \t") { // the next challenge of a list
			return params
		}
		rest = strings.TrimLeft(rest, " \t")
		var value strings.Builder
		if strings.HasPrefix(rest, `"`) {
			i := 1
			for ; i < len(rest) && rest[i] != '"'; i++ {
				if rest[i] == '\\' && i+1 < len(rest) {
					i++
				}
				value.WriteByte(rest[i])
			}
			s = rest[min(i+1, len(rest)):]
		} else {
			end := strings.IndexAny(rest, " \t,")
			if end < 0 {
				end = len(rest)
			}
			value.WriteString(rest[:end])
			s = rest[end:]
		}
		if _, dup := params[name]; !dup {
			params[name] = value.String()
		}
	}
}
