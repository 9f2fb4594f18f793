// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Identity is who a request is made as when it carries no client's credential.
// What each shows to a registry is its own: nothing that one identity was given
// is ever sent for the other.
type Identity int

const (
	// Anonymous is everybody: no credential, or the token that a registry
	// gives to all.
	Anonymous Identity = iota
	// Node is the operator's credential for this registry.
	Node
)

// proof is what an identity shows in one repository, and how to come by the
// next one before the registry has to ask for it.
type proof struct {
	header    string            // the Authorization; "" for none
	expires   time.Time         // of a token; zero for what does not run out
	bearer    map[string]string // the challenge that it answers
	challenge []string          // the same, as the registry wrote it
	far       reach             // how far the registry's word reached then
	secret    Secret            // of the node, that it was made from
	own       bool              // the challenge was of /v2/, and knows no repository
	made      time.Time
	refused   bool // the registry said no to it
}

func (p proof) endsBefore(t time.Time) bool { return !p.expires.IsZero() && p.expires.Before(t) }

type proofKey struct {
	as Identity
	// host is an endpoint's, or the origin of a registry that redirects led to.
	host, repository string
}

// renewAfter is how often there is a new token for a repository where the last
// one was refused: it may have been opened meanwhile.
const renewAfter = 5 * time.Second

var (
	// errNoProof: there is nothing that this identity could show.
	errNoProof = errors.New("nothing to show")
	// ErrCredentials: the operator's credentials for this registry cannot be
	// had, or must not go where the registry sends for a token. It says what
	// to mend, and holds no secret.
	ErrCredentials = errors.New("credentials of the node")
)

// exchange asks the endpoint: with the client's credential verbatim, or as one
// of tarn's own identities, for which a challenge costs a token and one more
// try.
func (r *Registry) exchange(ctx context.Context, e Endpoint, req Request) (*Response, error) {
	if req.Authorization != "" {
		resp, _, err := r.try(ctx, e, req, req.Authorization)
		var status *StatusError
		if errors.As(err, &status) {
			status.Shown = true
		}
		return resp, r.withChallenge(ctx, e, err)
	}
	key := proofKey{req.As, e.URL.Host, req.Repository}
	shown, fresh := r.known(ctx, e, key)
	resp, from, err := r.try(ctx, e, req, shown.header)
	status, refused := refusal(err)
	if hidden, ok := r.hidden(ctx, e, req, shown, err); ok {
		status, refused = hidden, true
	}
	if !refused {
		if errors.As(err, &status) {
			status.Shown = shown.header != ""
		}
		return resp, err
	}
	if another := widened(shown, status.Challenge); another != nil {
		status.Challenge = another
	} else if status.Status == http.StatusForbidden || fresh || shown.header != "" && (status.insufficient || time.Since(shown.made) < renewAfter) {
		return nil, r.refused(ctx, e, key, shown, status)
	}
	challenge, own := status.Challenge, false
	if len(challenge) == 0 { // some say it at /v2/ only
		challenge, from, _ = r.baseChallenge(ctx, e)
		own = true
	}
	next, err := r.prove(ctx, e, key, challenge, from, own)
	switch {
	case errors.Is(err, errNoProof):
		return nil, r.refused(ctx, e, key, shown, status)
	case err != nil:
		return nil, err
	}
	resp, _, err = r.try(ctx, e, req, next.header)
	if status, ok := refusal(err); ok {
		if another := widened(next, status.Challenge); another != nil {
			if last, perr := r.prove(ctx, e, key, another, from, false); perr == nil {
				next = last
				resp, _, err = r.try(ctx, e, req, next.header)
			}
		}
	}
	if status, ok := refusal(err); ok {
		if req.As == Node {
			r.refusedSecret(key.repository)
		}
		return nil, r.refused(ctx, e, key, next, status)
	}
	if errors.As(err, &status) {
		status.Shown = true
	}
	return resp, err
}

// hidden: some registries say 404 or 403 to who shows nothing, and what they want
// at /v2/ only, where most clients ask first.
func (r *Registry) hidden(ctx context.Context, e Endpoint, req Request, shown proof, err error) (*StatusError, bool) {
	var status *StatusError
	if shown.header != "" || !errors.As(err, &status) || status.Foreign ||
		status.Status != http.StatusNotFound && status.Status != http.StatusForbidden {
		return nil, false
	}
	challenge, _, cerr := r.baseChallenge(ctx, e)
	if _, bearer := bearerChallenge(challenge); cerr != nil || !bearer {
		return nil, false
	}
	return &StatusError{Status: http.StatusUnauthorized}, true
}

// widened is the challenge for what was shown and what is wanted besides, nil
// when nothing else is wanted.
func widened(shown proof, challenge []string) []string {
	bearer, ok := bearerChallenge(challenge)
	if !ok || shown.bearer == nil || shown.own || bearer["realm"] != shown.bearer["realm"] {
		return nil
	}
	had := strings.Fields(shown.bearer["scope"])
	all := had
	for _, s := range strings.Fields(bearer["scope"]) {
		if !slices.Contains(all, s) {
			all = append(slices.Clip(all), s)
		}
	}
	if len(all) == len(had) || len(all) > maxScopes {
		return nil
	}
	return []string{fmt.Sprintf(`Bearer realm="%s",service="%s",scope="%s"`, bearer["realm"], bearer["service"], strings.Join(all, " "))}
}

// refusal is a registry's own 401 or 403.
func refusal(err error) (status *StatusError, ok bool) {
	return status, errors.As(err, &status) && !status.Foreign && (status.Status == http.StatusUnauthorized || status.Status == http.StatusForbidden)
}

// refused is what is said of a refusal. Where a token was shown, a credential of
// the client's own may do better, with a token for the challenge that came
// without one; and a later request has a new token.
func (r *Registry) refused(ctx context.Context, e Endpoint, key proofKey, shown proof, status *StatusError) error {
	if shown.header != "" {
		r.mu.Lock()
		if p, ok := r.proofs[key]; ok && p.header == shown.header {
			p.refused = true
			r.proofs[key] = p
		}
		r.mu.Unlock()
	}
	if len(shown.challenge) == 0 {
		return r.withChallenge(ctx, e, status)
	}
	return &StatusError{
		Status: http.StatusUnauthorized, Challenge: shown.challenge, Shown: shown.header != "",
		Denied: status.Status == http.StatusForbidden,
	}
}

// known returns what the identity showed last, renewed when it has run out;
// fresh tells that it was. A token service that does not answer now is heard
// about after the registry's next challenge.
func (r *Registry) known(ctx context.Context, e Endpoint, key proofKey) (p proof, fresh bool) {
	r.mu.Lock()
	p = r.proofs[key]
	r.mu.Unlock()
	if key.as == Node {
		// What the operator replaced or took away is not shown any more.
		if secret, err := r.secret(ctx, key.repository); err != nil || secret != p.secret {
			return proof{}, false
		}
	}
	if again := p.refused && time.Since(p.made) >= renewAfter; !again && !p.endsBefore(time.Now()) {
		return p, false
	}
	p, err := r.prove(ctx, e, key, p.challenge, p.far, p.own)
	return p, err == nil
}

// prove finds what answers the challenge, once for all that wait for it. It has
// a context of its own: whoever started it may leave.
func (r *Registry) prove(ctx context.Context, e Endpoint, key proofKey, challenge []string, far reach, own bool) (proof, error) {
	done := r.proving.DoChan(fmt.Sprint(key), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.headTimeout)
		defer cancel()
		p, err := r.newProof(ctx, e, key, challenge, far, own)
		if err != nil {
			r.mu.Lock()
			defer r.mu.Unlock()
			delete(r.proofs, key)
			return proof{}, err
		}
		r.keep(key, p)
		return p, nil
	})
	select {
	case res := <-done:
		return res.Val.(proof), res.Err
	case <-ctx.Done():
		return proof{}, context.Cause(ctx)
	}
}

// keep remembers a proof.
func (r *Registry) keep(key proofKey, p proof) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.listed && len(r.proofs) >= maxStrangerProofs || len(r.proofs) >= maxProofs {
		clear(r.proofs)
	}
	r.proofs[key] = p
}

// scopes are what a token is asked for: what the challenge says, or the
// repository itself where that knows none.
func scopes(bearer map[string]string, repository string, own bool) []string {
	if said := strings.Fields(bearer["scope"]); len(said) > 0 && !own {
		return said[:min(len(said), maxScopes)]
	}
	return []string{"repository:" + repository + ":pull"}
}

// maxScopes is more than any pull needs.
const maxScopes = 16

// tokenElsewhere is what is shown at a registry that redirects led to.
func (r *Registry) tokenElsewhere(u *url.URL, repository string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.proofs[proofKey{Anonymous, u.Scheme + "://" + u.Host, repository}]
	if p.endsBefore(time.Now()) {
		return ""
	}
	return p.header
}

// proveElsewhere answers the challenge of a registry that redirects led to, as
// every client does: with a token for everybody of that registry's own service.
// Nothing of the endpoint's is shown there, and the service is reached no
// further than the redirect was.
func (r *Registry) proveElsewhere(ctx context.Context, e Endpoint, req Request, authorization string, resp *answer, far reach) (*answer, reach, error) {
	key := proofKey{Anonymous, resp.at.Scheme + "://" + resp.at.Host, req.Repository}
	r.mu.Lock()
	last := r.proofs[key]
	r.mu.Unlock()
	challenge := cleanChallenges(resp.Header)
	bearer, ok := bearerChallenge(challenge)
	if !ok || challengeSize(challenge) > maxChallenge || resp.shown && time.Since(last.made) < renewAfter {
		return resp, far, nil
	}
	realm, err := realmOf(resp.at, bearer["realm"])
	if err != nil {
		return resp, far, nil
	}
	ask := tokenRequest{realm: realm, service: bearer["service"], scopes: scopes(bearer, req.Repository, false)}
	t, err := r.fetchToken(ctx, ask, far, false)
	if errors.Is(err, errTokenRefused) {
		return resp, far, nil
	}
	resp.Body.Close()
	if err != nil {
		return nil, far, err
	}
	r.keep(key, proof{header: "Bearer " + t.Value, expires: t.usableUntil(), made: time.Now()})
	r.Saw(Redirected)
	return r.follow(ctx, e, req, authorization)
}

func (r *Registry) newProof(ctx context.Context, e Endpoint, key proofKey, challenge []string, far reach, own bool) (proof, error) {
	if challengeSize(challenge) > maxChallenge {
		return proof{}, errNoProof
	}
	p := proof{challenge: challenge, far: far, own: own, made: time.Now()}
	bearer, isBearer := bearerChallenge(challenge)
	var secret Secret
	if key.as == Node {
		var err error
		if secret, err = r.secret(ctx, key.repository); err != nil {
			return proof{}, err
		}
		p.secret = secret
		switch {
		case secret == Secret{}:
			return proof{}, errNoProof
		case secret.RegistryToken != "":
			p.header = "Bearer " + secret.RegistryToken
			return p, nil
		case !isBearer && hasBasic(challenge):
			p.header = secret.basic()
			return p, nil
		}
	}
	if !isBearer {
		return proof{}, errNoProof
	}
	p.bearer = bearer
	realm, err := realmOf(e.URL, bearer["realm"])
	if err != nil {
		return proof{}, err
	}
	ask := tokenRequest{realm: realm, service: bearer["service"], scopes: scopes(bearer, key.repository, own)}
	if key.as == Node {
		if !r.pinned(realm) {
			return proof{}, fmt.Errorf("%w: %s sends for a token to %s, where they may not go; if that is its token service, set realm: %s://%s%s",
				ErrCredentials, r.name, realm.Host, realm.Scheme, realm.Host, realm.Path)
		}
		ask.refreshToken = secret.IdentityToken
		if secret.IdentityToken == "" {
			ask.authorization = secret.basic()
		}
	}
	t, err := r.fetchTokenFor(ctx, e, ask, far)
	switch {
	case errors.Is(err, errTokenRefused):
		if key.as == Node {
			r.refusedSecret(key.repository)
		}
		return proof{}, errNoProof
	case err != nil:
		return proof{}, err
	}
	p.header, p.expires = "Bearer "+t.Value, t.usableUntil()
	return p, nil
}

// withChallenge completes a 401 that came without a challenge by the one of
// the endpoint's /v2/, where clients look for it (distribution-spec "API").
func (r *Registry) withChallenge(ctx context.Context, e Endpoint, err error) error {
	var status *StatusError
	if !errors.As(err, &status) || status.Status != http.StatusUnauthorized || len(status.Challenge) > 0 {
		return err
	}
	challenge, _, cerr := r.baseChallenge(ctx, e)
	if cerr != nil || len(challenge) == 0 {
		return err
	}
	return &StatusError{Status: http.StatusUnauthorized, Challenge: challenge, Shown: status.Shown}
}

// baseChallengeFor is how long what /v2/ said is believed: a refused client
// comes back within it.
const baseChallengeFor = 5 * time.Second

// baseChallenge is what the endpoint's /v2/ asks for, nothing when it is open,
// and how far its word reaches.
func (r *Registry) baseChallenge(ctx context.Context, e Endpoint) ([]string, reach, error) {
	key := e.URL.Host
	r.mu.Lock()
	known, ok := r.bases[key]
	r.mu.Unlock()
	if ok && time.Since(known.when) < baseChallengeFor {
		return known.challenge, known.far, nil
	}
	hreq, err := http.NewRequestWithContext(ctx, http.MethodGet, e.URL.JoinPath("/v2/").String(), nil)
	if err != nil {
		return nil, reachPublic, fmt.Errorf("%w: %s has no /v2/", ErrProtocol, e.URL.Host)
	}
	resp, at, err := r.roundTrip(hreq, ForChallenge, "", r.endpointReach(), true)
	if err != nil {
		return nil, reachPublic, err
	}
	resp.Body.Close()
	known = base{when: time.Now(), far: reachPublic}
	if r.listed {
		known.far = reachFrom(at)
	}
	if resp.StatusCode == http.StatusUnauthorized {
		if known.challenge = cleanChallenges(resp.Header); challengeSize(known.challenge) > maxChallenge {
			return nil, reachPublic, fmt.Errorf("%w: %s has a challenge of more than %d bytes", ErrProtocol, e.URL.Host, maxChallenge)
		}
	}
	r.mu.Lock()
	r.bases[key] = known
	r.mu.Unlock()
	return known.challenge, known.far, nil
}

type base struct {
	challenge []string
	far       reach
	when      time.Time
}

// realmOf parses the realm of a Bearer challenge: https, or http where the
// registry itself is.
func realmOf(at *url.URL, realm string) (*url.URL, error) {
	u, err := url.Parse(realm)
	if err != nil || u.Host == "" || u.User != nil ||
		u.Scheme != "https" && (u.Scheme != "http" || at.Scheme == "https") {
		return nil, fmt.Errorf("%w: the challenge of %s has no usable realm", ErrProtocol, at.Host)
	}
	return u, nil
}

// hasBasic tells whether a Basic challenge is among them.
func hasBasic(challenges []string) bool {
	for _, c := range apart(challenges) {
		scheme, _, _ := strings.Cut(strings.TrimSpace(c), " ")
		if strings.EqualFold(scheme, "Basic") {
			return true
		}
	}
	return false
}

// Secret is a credential of the node for one registry; the zero value is none.
// Which of the fields count is said by docker's config.json: a RegistryToken
// goes to the registry as it is, an IdentityToken is shown to the token service,
// and else the user's name and password are.
type Secret struct {
	Username, Password string
	IdentityToken      string
	RegistryToken      string
}

func (s Secret) basic() string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(s.Username+":"+s.Password))
}

// secret is the node's, the zero value when there is none for this repository.
func (r *Registry) secret(ctx context.Context, repository string) (Secret, error) {
	if r.credentials == nil {
		return Secret{}, nil
	}
	secret, err := r.credentials.Get(ctx, string(r.name)+"/"+repository)
	if err == nil || errors.Is(err, ErrCredentials) { // and not that nobody waits
		r.mu.Lock()
		r.ailing = err
		r.mu.Unlock()
	}
	return secret, err
}

// refusedSecret: what was shown last did not do. It may have been replaced.
func (r *Registry) refusedSecret(repository string) {
	if r.credentials != nil {
		r.credentials.Forget(string(r.name) + "/" + repository)
	}
}

// HasNode tells whether the operator gave credentials for this registry.
func (r *Registry) HasNode() bool { return r.credentials != nil }
