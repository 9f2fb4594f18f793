// SPDX-License-Identifier: Apache-2.0

package registrytest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// Access says who may pull what from a Registry. Its fields may be set before
// the first request, its methods called at any time. The user "" is anonymous,
// and a user's password is Password(user). Every secret has the word canary in
// it, so that a test can look for what leaked.
type Access struct {
	// Scheme is Basic or Bearer.
	Scheme string
	// Service is the token service of Bearer.
	Service *httptest.Server
	// Life of a token.
	Life time.Duration
	// Challenge overrides the WWW-Authenticate header of refusals.
	Challenge func(repository string) string

	mu      sync.Mutex
	allowed map[string]map[string]bool // by repository, then user
	tokens  map[string]issued
	log     []TokenExchange
}

// TokenExchange is one request that a token service received.
type TokenExchange struct {
	Method, Authorization, Scope, Form string
}

type issued struct {
	user  string
	scope string
	until time.Time
}

// NewAccess starts a token service on loopback, for Bearer. Nobody may have
// anything yet.
func NewAccess(t testing.TB, scheme string) *Access {
	a := &Access{Scheme: scheme, Life: 5 * time.Minute, allowed: make(map[string]map[string]bool), tokens: make(map[string]issued)}
	a.Service = httptest.NewServer(http.HandlerFunc(a.serveToken))
	t.Cleanup(a.Service.Close)
	return a
}

// Password of a user.
func Password(user string) string { return "canary-password-of-" + user }

// Basic is the Authorization header of a user.
func Basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// Allow lets the user pull from the repository.
func (a *Access) Allow(repository, user string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.allowed[repository] == nil {
		a.allowed[repository] = make(map[string]bool)
	}
	a.allowed[repository][user] = true
}

// Revoke takes that back at once, for tokens that are out, too.
func (a *Access) Revoke(repository, user string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.allowed[repository], user)
}

// Login is what a client of that user sends: nothing for anonymous, a new token
// for Bearer.
func (a *Access) Login(repository, user string) (headers []string) {
	switch {
	case user == "":
		return nil
	case a.Scheme == "Basic":
		return []string{"Authorization", Basic(user, Password(user))}
	}
	return []string{"Authorization", "Bearer " + a.issue(user, "repository:"+repository+":pull")}
}

func (a *Access) issue(user, scope string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	token := fmt.Sprintf("canary-token-%d-of-%s", len(a.tokens), user)
	a.tokens[token] = issued{user, scope, time.Now().Add(a.Life)}
	return token
}

// Exchanges are the requests of the token service so far.
func (a *Access) Exchanges() []TokenExchange {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]TokenExchange(nil), a.log...)
}

// admit answers 401 or 403 to who may not pull.
func (a *Access) admit(w http.ResponseWriter, r *http.Request) bool {
	repository, _ := splitPath(r.URL.Path)
	user, known := a.who(r.Header.Get("Authorization"), repository)
	a.mu.Lock()
	ok := known && (a.allowed[repository][user] || a.allowed[repository][""])
	a.mu.Unlock()
	if ok {
		return true
	}
	if known && user != "" && a.Scheme == "Basic" {
		w.WriteHeader(http.StatusForbidden)
		return false
	}
	challenge := `Basic realm="lab"`
	if a.Scheme == "Bearer" {
		challenge = fmt.Sprintf(`Bearer realm="%s/token",service="lab"`, a.Service.URL)
		if repository != "" {
			challenge += fmt.Sprintf(`,scope="repository:%s:pull"`, repository)
		}
		if r.Header.Get("Authorization") != "" {
			challenge += `,error="insufficient_scope"`
		}
	}
	if a.Challenge != nil {
		challenge = a.Challenge(repository)
	}
	if challenge != "" {
		w.Header().Set("WWW-Authenticate", challenge)
	}
	w.WriteHeader(http.StatusUnauthorized)
	return false
}

// splitPath finds the repository in /v2/<repository>/<kind>/<reference>.
func splitPath(path string) (repository string, ok bool) {
	parts := strings.Split(strings.TrimPrefix(path, "/v2/"), "/")
	if len(parts) < 3 {
		return "", false
	}
	return strings.Join(parts[:len(parts)-2], "/"), true
}

func (a *Access) who(authorization, repository string) (user string, known bool) {
	if authorization == "" {
		return "", a.Scheme == "Basic" // Bearer wants a token even for what is public
	}
	scheme, value, _ := strings.Cut(authorization, " ")
	if a.Scheme == "Basic" {
		u, p, ok := parseBasic(authorization)
		return u, scheme == "Basic" && ok && p == Password(u)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	t, ok := a.tokens[value]
	return t.user, ok && scheme == "Bearer" && time.Now().Before(t.until) &&
		strings.Contains(" "+t.scope+" ", " repository:"+repository+":pull ")
}

func parseBasic(authorization string) (user, password string, ok bool) {
	r := http.Request{Header: http.Header{"Authorization": {authorization}}}
	return r.BasicAuth()
}

// serveToken is distribution's "Token Authentication", with GET and with the
// POST of OAuth 2.
func (a *Access) serveToken(w http.ResponseWriter, r *http.Request) {
	r.ParseForm()
	user, password, basic := r.BasicAuth()
	if r.Method == http.MethodPost {
		switch r.PostForm.Get("grant_type") {
		case "password":
			user, password, basic = r.PostForm.Get("username"), r.PostForm.Get("password"), true
		case "refresh_token":
			user, _ = strings.CutPrefix(r.PostForm.Get("refresh_token"), "canary-identity-of-")
			password, basic = Password(user), true
		}
	}
	scope := strings.Join(r.Form["scope"], " ")
	a.mu.Lock()
	a.log = append(a.log, TokenExchange{r.Method, r.Header.Get("Authorization"), scope, r.PostForm.Encode()})
	a.mu.Unlock()
	if basic && password != Password(user) {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	json.NewEncoder(w).Encode(map[string]any{"token": a.issue(user, scope), "expires_in": int(a.Life / time.Second)})
}
