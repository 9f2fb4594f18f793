// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/publicsuffix"
)

// Token is what a token service gave, as distribution's "Token Authentication"
// has it.
type Token struct {
	Value string
	// Life is how long it holds from Issued on.
	Life   time.Duration
	Issued time.Time
}

// usableUntil leaves room for the way, so that a token does not run out on it.
func (t Token) usableUntil() time.Time { return t.Issued.Add(t.Life - min(tokenMargin, t.Life/2)) }

const (
	// defaultTokenLife is what a token service means that does not say
	// (distribution, "Token Authentication": 60 seconds).
	defaultTokenLife = 60 * time.Second
	// maxTokenLife bounds what one may claim.
	maxTokenLife = 24 * time.Hour
	// tokenMargin is how long before its end a token is not used any more.
	tokenMargin = 5 * time.Second
	// maxTokenBody bounds the answer of a token service; real ones are a
	// few KiB.
	maxTokenBody = 1 << 20
	// maxToken is the most that is kept of one.
	maxToken = 16 << 10
)

var (
	// errTokenRefused: the token service gives this identity nothing.
	errTokenRefused = errors.New("token service refuses")
	// ErrNoTokenService: the registry does not ask for Bearer tokens.
	ErrNoTokenService = errors.New("registry has no token service")
	// ErrBasic: it asks for passwords itself.
	ErrBasic = errors.New("registry takes passwords itself")
)

// tokenRequest is one question to a token service. At most one of
// authorization and refreshToken is set; none asks as anonymous.
type tokenRequest struct {
	realm         *url.URL
	service       string
	scopes        []string
	authorization string // Basic
	refreshToken  string
}

func (t tokenRequest) httpRequest(ctx context.Context) (*http.Request, error) {
	values := make(url.Values)
	if t.service != "" {
		values.Set("service", t.service)
	}
	u := *t.realm
	if t.refreshToken != "" {
		values.Set("grant_type", "refresh_token")
		values.Set("refresh_token", t.refreshToken)
		values.Set("client_id", "tarn")
		values.Set("scope", strings.Join(t.scopes, " "))
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(values.Encode()))
		if err == nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
		return req, err
	}
	values["scope"] = t.scopes
	q := u.Query()
	for k, v := range values {
		q[k] = v
	}
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err == nil && t.authorization != "" {
		req.Header.Set("Authorization", t.authorization)
	}
	return req, err
}

// fetchTokenFor asks the realm that an endpoint named.
func (r *Registry) fetchTokenFor(ctx context.Context, e Endpoint, t tokenRequest, far reach) (Token, error) {
	home := sameOrigin(t.realm, e.URL)
	if home {
		far = r.endpointReach()
	}
	return r.fetchToken(ctx, t, far, home)
}

// fetchToken asks the realm. With a credential it follows no redirect: that goes
// where it was said to go. Without one it does, never from https to http.
// oras-go's client for this refuses every realm on a private address under
// another host name than the registry's, listed or not, and looks names up past
// the dial guard; here the guard decides.
func (r *Registry) fetchToken(ctx context.Context, t tokenRequest, far reach, home bool) (Token, error) {
	name := func() question {
		return r.client.question(Request{Authorization: t.authorization + "\n" + t.refreshToken}, append([]string{"token", t.realm.String(), t.service}, t.scopes...)...)
	}
	return unlessLimited(r, name, func() (Token, error) { return r.askToken(ctx, t, far, home) })
}

// askToken asks, and reads the answer. A token is counted from the question on.
func (r *Registry) askToken(ctx context.Context, t tokenRequest, far reach, home bool) (Token, error) {
	issued := time.Now()
	resp, err := r.sendTokenRequest(ctx, t, far, home)
	if err != nil {
		return Token{}, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode >= 200 && resp.StatusCode < 300:
	case resp.StatusCode == http.StatusTooManyRequests:
		return Token{}, &StatusError{Status: resp.StatusCode, RetryAfter: retryAfter(resp.Header, time.Now())}
	case resp.StatusCode >= 400 && resp.StatusCode < 500:
		return Token{}, errTokenRefused
	default:
		return Token{}, &StatusError{Status: http.StatusBadGateway, TokenStatus: resp.StatusCode}
	}
	out, err := readToken(resp)
	if err != nil {
		return Token{}, fmt.Errorf("%w: the token service of %s sent %w", ErrProtocol, r.name, err)
	}
	out.Issued = issued
	return out, nil
}

// sendTokenRequest returns the token service's answer, whatever its status, after the
// redirects that may be followed. far is how far the realm may reach, and no redirect
// reaches further than the host that sent it.
func (r *Registry) sendTokenRequest(ctx context.Context, t tokenRequest, far reach, home bool) (*http.Response, error) {
	hreq, err := t.httpRequest(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: the challenge of %s has no usable realm", ErrProtocol, r.name)
	}
	for hop := 0; ; hop++ {
		resp, at, err := r.roundTrip(hreq, ForToken, strings.Join(t.scopes, " "), far, home)
		if err != nil {
			return nil, err
		}
		next, err := redirectTarget(hreq.URL, resp)
		if next == nil && err == nil || t.authorization != "" || t.refreshToken != "" {
			return resp, nil
		}
		drain(resp.Body)
		if err != nil {
			return nil, err
		}
		if hop == maxRedirects {
			return nil, fmt.Errorf("%w: the token service of %s redirects more than %d times", ErrProtocol, r.name, maxRedirects)
		}
		reached := reachPublic
		if r.listed {
			reached = reachFrom(at)
		}
		if far = min(far, reached); home && sameOrigin(next, t.realm) {
			far = r.endpointReach()
		} else {
			home = false
		}
		if hreq, err = http.NewRequestWithContext(ctx, http.MethodGet, next.String(), nil); err != nil {
			return nil, fmt.Errorf("%w: the token service of %s redirects to no URL", ErrProtocol, r.name)
		}
	}
}

// readToken reads what a token service sent with a 2xx. Its error says what that was.
func readToken(resp *http.Response) (Token, error) {
	var body struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   any    `json:"expires_in"`
	}
	plain := io.Reader(resp.Body)
	if strings.Contains(asciiLower(resp.Header.Get("Content-Encoding")), "gzip") {
		unzipped, err := gzip.NewReader(resp.Body)
		if err != nil {
			return Token{}, errors.New("no JSON")
		}
		plain = unzipped
	}
	if err := json.NewDecoder(io.LimitReader(plain, maxTokenBody)).Decode(&body); err != nil {
		return Token{}, errors.New("no JSON")
	}
	out := Token{Value: cmp.Or(body.Token, body.AccessToken), Life: defaultTokenLife}
	if out.Value == "" || strings.IndexFunc(out.Value, func(c rune) bool { return c <= ' ' || c >= 0x7f }) >= 0 {
		return Token{}, errors.New("no token")
	}
	if len(out.Value) > maxToken {
		return Token{}, fmt.Errorf("a token of %d bytes, of at most %d", len(out.Value), maxToken)
	}
	// Some write it as a string, some with a fraction.
	if life, err := strconv.ParseFloat(fmt.Sprint(body.ExpiresIn), 64); err == nil && life > 0 {
		out.Life = time.Duration(min(life, maxTokenLife.Seconds()) * float64(time.Second))
	}
	return out, nil
}

// ClientToken is for a client that was sent to tarn for its token: it passes
// the client's own credential to the token service of this registry, for
// pulling from these repositories, and keeps nothing. authorization is Basic;
// or refreshToken is set in its place.
//
// Errors: ErrNoTokenService; ErrBasic; ErrCredentials when the registry names a token
// service that is not the one it may have; a *StatusError with 401 when the
// service refuses.
func (r *Registry) ClientToken(ctx context.Context, repositories []string, authorization, refreshToken string) (Token, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, r.headTimeout, ErrTimeout)
	defer cancel()
	e := r.endpoints[0]
	challenge, far, err := r.baseChallenge(ctx, e)
	if err != nil {
		return Token{}, err
	}
	bearer, ok := bearerChallenge(challenge)
	switch {
	case !ok && hasBasic(challenge):
		return Token{}, ErrBasic
	case !ok:
		return Token{}, ErrNoTokenService
	}
	realm, err := realmOf(e.URL, bearer["realm"])
	if err != nil {
		return Token{}, err
	}
	if !r.pinned(realm) {
		return Token{}, fmt.Errorf("%w: %s sends for a token to %s, which is neither its own domain nor what realm: says in tarn's configuration",
			ErrCredentials, r.name, realm.Host)
	}
	ask := tokenRequest{realm: realm, service: bearer["service"], authorization: authorization, refreshToken: refreshToken}
	for _, repository := range repositories {
		ask.scopes = append(ask.scopes, "repository:"+repository+":pull")
	}
	t, err := r.fetchTokenFor(ctx, e, ask, far)
	if errors.Is(err, errTokenRefused) {
		return Token{}, &StatusError{Status: http.StatusUnauthorized, Shown: true}
	}
	return t, err
}

// pinned tells whether this realm may see a password that was given to tarn:
// it is what the operator said, or https on the authority's own registrable
// domain. A registry that is listed with http on loopback may have its realm
// there, too.
func (r *Registry) pinned(realm *url.URL) bool {
	authority := r.endpoints[0].URL
	switch {
	case r.realm != nil:
		return sameOrigin(realm, r.realm) && realm.Path == r.realm.Path
	case realm.Scheme == "http":
		return r.listed && authority.Scheme == "http" && isLoopback(authority.Hostname()) && isLoopback(realm.Hostname())
	default:
		return sameSite(realm.Hostname(), authority.Hostname())
	}
}

// sameSite tells whether two hosts are one, or under one registrable domain.
func sameSite(a, b string) bool {
	a, b = asciiLower(strings.TrimSuffix(a, ".")), asciiLower(strings.TrimSuffix(b, "."))
	if a == b {
		return true
	}
	if _, err := netip.ParseAddr(a); err == nil {
		return false
	}
	da, errA := publicsuffix.EffectiveTLDPlusOne(a)
	db, errB := publicsuffix.EffectiveTLDPlusOne(b)
	return errA == nil && errB == nil && da == db
}

// CheckRealm says what is wrong with the URL of a token service that passwords
// go to, if anything.
func CheckRealm(u *url.URL) error {
	switch {
	case u == nil || u.Hostname() == "":
		return errors.New("not a URL, as in https://auth.example/token")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return errors.New("user info, query and fragment have no place here")
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http" && isLoopback(u.Hostname()):
		return nil
	}
	return errors.New("must be https, since passwords go there (http only on loopback)")
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// bearerChallenge returns the parameters of the first Bearer challenge with a
// realm (RFC 9110 11.6.1).
func bearerChallenge(challenges []string) (map[string]string, bool) {
	for _, c := range apart(challenges) {
		scheme, rest := c, ""
		if i := strings.IndexAny(c, " \t"); i >= 0 {
			scheme, rest = c[:i], c[i+1:]
		}
		if !strings.EqualFold(scheme, "Bearer") {
			continue
		}
		if p := authParams(rest); p["realm"] != "" {
			return p, true
		}
	}
	return nil, false
}

// apart splits lines of several challenges (RFC 9110 11.6.1).
func apart(lines []string) (all []string) {
	for _, line := range lines {
		start := len(all)
		for _, part := range splitParams(line) {
			part = strings.TrimSpace(part)
			head, _, pair := strings.Cut(part, "=")
			if len(all) == start || !pair && part != "" || strings.ContainsAny(strings.TrimSpace(head), " \t") {
				all = append(all, part)
				continue
			}
			all[len(all)-1] += "," + part
		}
	}
	return all
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
