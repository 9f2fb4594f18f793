// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"tarn/upstream"

	"github.com/distribution/distribution/v3/registry/api/errcode"
	"github.com/gorilla/mux"
)

// The token broker is for clients that learn how to authenticate from /v2/
// alone, and there see tarn, not the registry: podman, skopeo, crane, older
// dockerd. /v2/ sends them to tarn's own /token, which passes their credential
// to the token service of the one registry that their scopes name, and nothing
// else anywhere. It keeps nothing, and what it hands out is the registry's own
// token, or, where the registry takes passwords itself, the client's own password
// sealed (seal.go), so that the registry still decides on each request.
//
// It is off by default, because such clients keep the secret under tarn's
// address: whoever they are talked into naming as a registry must not get it.
// So it serves listed registries only, one a request, and only their pinned
// token service; see mayPass for the rest of that.

const (
	// markerToken is for clients that want a token and have no credential.
	// It means "no Authorization" to tarn, and is never passed on.
	markerToken = "tarn-anonymous"
	// markerLife is how long it is said to hold.
	markerLife = 5 * time.Minute
	// maxTokenForm bounds the body of a POST.
	maxTokenForm = 64 << 10
	tokenRoute   = upstream.Kind("token")
)

// withoutMarker reads an Authorization header.
func withoutMarker(authorization string) string {
	if scheme, token, _ := strings.Cut(authorization, " "); strings.EqualFold(scheme, "Bearer") && strings.TrimSpace(token) == markerToken {
		return ""
	}
	return authorization
}

// serveBase answers /v2/. Which credential is wanted depends on the repository,
// so tarn asks for none itself, unless there is a broker to send clients to.
func (p *Proxy) serveBase(w *response, r *http.Request, q *request) error {
	h := w.Header()
	broker := q.ns == "" && (q.upstream == "" && p.ruleset.brokers || p.rules(q.upstream).TokenBroker)
	scheme, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if broker && !strings.EqualFold(scheme, "Bearer") {
		if err := challengeToken(w, r, q); err != nil {
			return err
		}
		return &apiError{http.StatusUnauthorized, errcode.ErrorCodeUnauthorized,
			"get a token for one repository: its scope is repository:REGISTRY/NAME:pull"}
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", "2")
	w.WriteHeader(http.StatusOK)
	if q.method == http.MethodGet {
		w.Write([]byte("{}"))
	}
	return nil
}

// isToken tells whether a path is /token, or /token behind a registry's name.
func isToken(r *http.Request, _ *mux.RouteMatch) bool {
	path := r.URL.EscapedPath()
	return strings.HasSuffix(path, "/token") && strings.Count(path, "/") <= 2
}

// serveToken answers /token, as distribution's "Token Authentication" has it.
func (p *Proxy) serveToken(rw http.ResponseWriter, r *http.Request) {
	w := rw.(*response)
	q := &request{method: r.Method, kind: tokenRoute}
	w.request = q
	if err := p.answerToken(w, r, q); err != nil {
		w.fail(q, err)
	}
}

func (p *Proxy) answerToken(w *response, r *http.Request, q *request) error {
	ctx, cancel := context.WithTimeout(r.Context(), headerDeadline)
	defer cancel()
	ask, err := parseTokenRequest(w, r)
	if err != nil {
		return err
	}
	head := strings.Trim(strings.TrimSuffix(r.URL.Path, "token"), "/")
	name, repositories, err := p.names.parseScopes(head, ask.scopes)
	if err != nil {
		return err
	}
	q.upstream = name
	if ask.authorization == "" && ask.refreshToken == "" {
		return writeToken(w, upstream.Token{Value: markerToken, Life: markerLife, Issued: p.now()})
	}
	switch {
	case name == "" && len(ask.scopes) > 0:
		return badToken("a credential needs scopes that say which registry it is for, as in repository:ghcr.io/org/app:pull")
	case name == "":
		return badToken("a credential needs a scope that says which registry it is for: tarn itself has no login, put it into the client's auth file")
	case !p.rules(name).TokenBroker:
		return badToken(fmt.Sprintf("tarn takes no credential for %s: set token_broker: true for that upstream in its configuration, or use none", name))
	}
	t, err := p.upstreams.Registry(name).ClientToken(ctx, repositories, ask.authorization, ask.refreshToken)
	switch {
	case errors.Is(err, upstream.ErrBasic) && ask.authorization != "":
		return writeToken(w, p.sealer.seal(name, ask.authorization, p.now()))
	case errors.Is(err, upstream.ErrNoTokenService), errors.Is(err, upstream.ErrBasic):
		return writeToken(w, upstream.Token{Value: markerToken, Life: markerLife, Issued: p.now()})
	case err != nil:
		return err
	}
	return writeToken(w, t)
}

func writeToken(w *response, t upstream.Token) error {
	body, err := json.Marshal(map[string]any{
		"token":        t.Value,
		"access_token": t.Value,
		"expires_in":   int64(t.Life / time.Second),
		"issued_at":    t.Issued.UTC().Format(time.RFC3339),
	})
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", fmt.Sprint(len(body)))
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	_, err = w.Write(body)
	return aborted(err)
}

func badToken(message string) error {
	return &apiError{http.StatusBadRequest, errDenied, message}
}

// tokenRequest is what a client asks of /token: with a Basic credential, with a
// refresh token, or with neither.
type tokenRequest struct {
	scopes        []string
	authorization string
	refreshToken  string
}

// parseTokenRequest reads both forms: GET with a query and Basic, and the POST
// of OAuth 2 (RFC 6749 4.3, 6).
func parseTokenRequest(w http.ResponseWriter, r *http.Request) (t tokenRequest, err error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return t, badToken("the query string cannot be parsed")
	}
	if len(r.Header.Values("Authorization")) > 1 {
		return t, badToken("more than one Authorization header")
	}
	user, password, basic := r.BasicAuth()
	if r.Header.Get("Authorization") != "" && !basic {
		return t, badToken("only Basic credentials are taken here")
	}
	if r.Method == http.MethodPost {
		if mt, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mt != "application/x-www-form-urlencoded" {
			return t, badToken("a POST must be application/x-www-form-urlencoded")
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxTokenForm)
		if err := r.ParseForm(); err != nil {
			return t, badToken("the form cannot be parsed")
		}
		values = r.PostForm
		switch grant := values.Get("grant_type"); grant {
		case "password":
			user, password = values.Get("username"), values.Get("password")
			if strings.Contains(user, ":") {
				return t, badToken("a user's name has no colon")
			}
		case "refresh_token":
			t.refreshToken = values.Get("refresh_token")
			user, password = "", ""
		default:
			return t, badToken("grant_type must be password or refresh_token")
		}
	}
	if user != "" || password != "" {
		t.authorization = "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
	}
	for _, s := range values["scope"] {
		t.scopes = append(t.scopes, strings.Fields(s)...)
	}
	return t, nil
}

// maxScopes is more than any image has repositories.
const maxScopes = 64

// parseScopes returns the one registry that all scopes are for, and the
// repositories as that registry calls them. It is "" when there are none, or
// none says which: a secret is for nobody by default. head is what the path
// named, if anything.
func (n names) parseScopes(head string, scopes []string) (name upstream.Name, repositories []string, err error) {
	implied := false
	if len(scopes) > maxScopes {
		return "", nil, badToken("too many scopes")
	}
	for _, s := range scopes {
		kind, rest, ok := strings.Cut(s, ":")
		i := strings.LastIndexByte(rest, ':')
		if !ok || kind != "repository" || i < 0 {
			return "", nil, badToken("a scope must be repository:REGISTRY/NAME:pull")
		}
		for action := range strings.SplitSeq(rest[i+1:], ",") {
			if action != "pull" {
				return "", nil, badToken("tarn only serves pulls: the only action of a scope is pull")
			}
		}
		q := &request{}
		if err := n.parseUpstream(q, head, rest[:i], nil); err != nil {
			return "", nil, err
		}
		if err := q.completeRepository(); err != nil {
			return "", nil, err
		}
		if name != "" && q.upstream != name {
			return "", nil, badToken("the scopes are for two registries; a token is for one")
		}
		name, implied = q.upstream, implied || q.form == formDefault
		if !slices.Contains(repositories, q.repository) {
			repositories = append(repositories, q.repository)
		}
	}
	if implied {
		name = ""
	}
	return name, repositories, nil
}
