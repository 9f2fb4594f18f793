// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"time"

	"tarn/cache"
	"tarn/index"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// Who may have what. Storage is shared, rights are not: the authority is asked
// about this client, with the client's own credential, for each tag and each
// cached object; only an object that nobody has here is asked for by the GET
// that fetches it. Three kinds of fact are kept apart:
//
//	grant       "yes" to one credential for one repository. None is
//	            remembered yet: every request asks.
//	membership  the authority served this digest in this repository, as
//	            manifest or blob, to anonymous or to some credential.
//	possession  a source domain delivered all bytes of a digest, verified.
//	            The cache keeps it; bytes of one domain never serve another.

// sourceDomain is whose deliveries may serve this upstream. The operator vouches
// for the listed ones together; a stranger vouches for itself only.
func (p *Proxy) sourceDomain(name upstream.Name) string {
	if p.upstreams.Listed(name) {
		return cache.ListedDomain
	}
	return string(name)
}

// mayPass tells whether an Authorization, or a challenge that asks for one, may
// pass between this client and the upstream. Clients that find tarn by a path
// keep their secrets under tarn's own address, and would hand them to whatever
// registry the path names; containerd's credential is the image host's.
func (p *Proxy) mayPass(q *request) bool {
	return p.upstreams.Listed(q.upstream) || q.form == formNS
}

// credential is the Authorization that the upstream may see, "" for anonymous.
func (p *Proxy) credential(q *request) string {
	if p.mayPass(q) {
		return q.authorization
	}
	return ""
}

// reader names repository and credential, for the rule that nobody joins bytes
// of two generations. It is keyed, so that no credential lies in memory in a
// form that is worth something elsewhere.
func (p *Proxy) reader(q *request) string {
	m := hmac.New(sha256.New, p.readerKey[:])
	for _, s := range []string{string(q.upstream), q.repository, p.credential(q)} {
		fmt.Fprintf(m, "%d:%s", len(s), s)
	}
	return string(m.Sum(nil))
}

func repositoryKey(q *request) index.RepositoryKey {
	return index.RepositoryKey{Upstream: string(q.upstream), Repository: q.repository}
}

// ask puts the client's question for an object or a tag to the authority, with
// the client's own credential, and notes what the answer says about
// membership. What it refuses is an error that serveError understands.
func (p *Proxy) ask(ctx context.Context, q *request, method, reference string, authorised bool, offset int64) (*upstream.Response, error) {
	resp, err := p.upstreams.Registry(q.upstream).Do(ctx, upstream.Request{
		Method:        method,
		Repository:    q.repository,
		Kind:          q.kind,
		Reference:     reference,
		Query:         q.query,
		Accept:        p.acceptFor(q, reference),
		Authorization: p.credential(q),
		Offset:        offset,
		Authorised:    authorised,
	})
	d := digest.Digest(reference)
	isObject := d.Validate() == nil && (q.kind == upstream.Manifest || q.kind == upstream.Blob)
	if err == nil {
		if isObject {
			p.noteMembership(q, d, resp.Sent, resp.Anonymous, resp.MediaType)
		}
		return resp, nil
	}
	var refused *upstream.StatusError
	if isObject && errors.As(err, &refused) && refused.Status == http.StatusNotFound {
		p.cache.Index().DeleteMembership(repositoryKey(q).MembershipKey(string(q.kind), d))
	}
	return nil, p.ownWords(q, err)
}

// acceptFor is what the upstream is told. A digest names its bytes whatever is
// accepted, and a flight is for everybody: they are asked for with all types.
func (p *Proxy) acceptFor(q *request, reference string) []string {
	switch {
	case q.kind == upstream.Blob:
		return nil
	case q.kind != upstream.Manifest:
		return q.accept
	case reference == q.tag && len(q.accept) > 0:
		return q.accept
	default:
		return defaultAccept
	}
}

func (p *Proxy) noteMembership(q *request, d digest.Digest, sent time.Time, anonymous bool, mediaType string) {
	if q.kind != upstream.Manifest {
		mediaType = ""
	}
	p.cache.Index().NoteMembership(repositoryKey(q).MembershipKey(string(q.kind), d),
		index.Membership{Time: sent, Anonymous: anonymous, MediaType: mediaType})
}

// ownWords replaces a refusal whose challenge may not pass.
func (p *Proxy) ownWords(q *request, err error) error {
	var refused *upstream.StatusError
	if !errors.As(err, &refused) || p.mayPass(q) ||
		refused.Status != http.StatusUnauthorized && refused.Status != http.StatusForbidden {
		return err
	}
	return &apiError{http.StatusForbidden, errDenied, fmt.Sprintf(
		"%s refuses anonymous, and tarn passes credentials by path only to listed registries: add \"upstreams: [{name: %q}]\" to its configuration",
		q.upstream, q.upstream)}
}

// fetch is how a flight opens the object: a GET with this client's credential.
// A refusal is marked as one that concerns this credential only. With until it
// becomes known what the authority said, for the client that started the
// flight.
func (p *Proxy) fetch(q *request, d digest.Digest, authorised bool, said *upstream.Response) cache.Fetch {
	return func(ctx context.Context, off, _ int64) (body, cache.Info, error) {
		resp, err := p.ask(ctx, q, http.MethodGet, d.String(), authorised, off)
		if err != nil {
			return nil, cache.Info{}, refusedAlone(err)
		}
		if q.kind == upstream.Manifest {
			if schema1(resp.MediaType) {
				resp.Body.Close()
				return nil, cache.Info{}, fmt.Errorf("%w: %w", cache.ErrRefused, errSchema1)
			}
			if resp.Size > maxManifest {
				resp.Body.Close()
				return nil, cache.Info{}, fmt.Errorf("%w: it has %d bytes, of at most %d", errManifest, resp.Size, maxManifest)
			}
			resp.Body = &limitedBody{resp.Body, maxManifest}
		}
		if said != nil {
			*said = *resp
		}
		return resp.Body, cache.Info{Size: resp.Size, Offset: resp.Offset}, nil
	}
}

// refusedAlone marks a 4xx as the affair of the credential that asked.
func refusedAlone(err error) error {
	var refused *upstream.StatusError
	var api *apiError
	if errors.As(err, &api) || errors.As(err, &refused) && refused.Status < 500 {
		return fmt.Errorf("%w: %w", cache.ErrRefused, err)
	}
	return err
}
