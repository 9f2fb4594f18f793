// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"net/http"
	"time"

	"tarn/blobstore"
	"tarn/cache"
	"tarn/history"
	"tarn/rights"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// What people who look up an image are told of it that only the proxy knows. Nothing
// here is stored, and no right comes from it.

// Inquiry is what an authority says of an image now.
type Inquiry struct {
	// As is whom it was asked as: anonymous, or node where the repository is shared.
	As string `json:"as"`
	// Asked is when, and Method how: HEAD, or where a registry says too little to
	// that, GET.
	Asked  time.Time     `json:"asked,omitzero"`
	Method string        `json:"method,omitempty"`
	Digest digest.Digest `json:"digest,omitempty"`
	// Status is that of a refusal, Cause why there is no digest, and Error the same in
	// words; Advice is what to do about it, where there is something.
	Status int           `json:"status,omitempty"`
	Cause  history.Cause `json:"cause,omitempty"`
	Error  string        `json:"error,omitempty"`
	Advice string        `json:"advice,omitempty"`
	// MayBeStale: what was said before may stand for such an answer, where the operator
	// allows that; Away: with stale_for: node, for every client of this node.
	MayBeStale bool `json:"-"`
	Away       bool `json:"-"`
}

// Inquire asks the authority what an image is now, as anonymous, or as the node where
// the repository is shared.
func (p *Proxy) Inquire(ctx context.Context, n ImageName) (i Inquiry) {
	ctx, cancel := context.WithTimeout(ctx, headerDeadline)
	defer cancel()
	q := &request{method: http.MethodGet, kind: upstream.Manifest, upstream: upstream.Name(n.Repository.Upstream), repository: n.Repository.Repository, tag: n.Tag, digest: n.Digest}
	req := upstream.Request{Method: http.MethodHead, Repository: q.repository, Kind: upstream.Manifest, Reference: n.Tag + n.Digest.String(), Accept: defaultAccept}
	i.As, i.Asked = "anonymous", p.now()
	if p.shared(q) {
		i.As, req.As = "node", upstream.Node
	}
	i.Digest, i.Method = "", req.Method
	registry := p.upstreams.Registry(q.upstream)
	ask := func() (digest.Digest, error) {
		resp, err := registry.Do(ctx, req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		if blobstore.CheckDigest(resp.Digest) == nil || req.Method == http.MethodHead {
			return resp.Digest, nil
		}
		c, err := p.readBody(ctx, q, resp)
		if err != nil {
			return "", err
		}
		return c.digest, nil
	}
	d, err := ask()
	var refused *upstream.StatusError
	if blobstore.CheckDigest(d) != nil && (err == nil || errors.As(err, &refused) && isNo(err)) {
		req.Method, i.Method = http.MethodGet, http.MethodGet
		d, err = ask()
	}
	if err == nil && n.Digest != "" {
		d = n.Digest
	}
	if err == nil {
		i.Digest = d
		return i
	}
	var host *upstream.HostError
	i.Cause, _ = whyError(err)
	i.Error = errorWords(q, err)
	i.MayBeStale, i.Away = staleCause(err) != "", p.away(q, err)
	if errors.As(err, &refused) {
		i.Status = refused.Status
	}
	if errors.As(err, &host) {
		i.Advice = host.Advice
	}
	return i
}

// Access is who may have what of an image, as far as that is known here.
type Access struct {
	// Allowed: tarn asks that registry; Listed: the operator has named it.
	Allowed bool `json:"allowed"`
	Listed  bool `json:"listed"`
	// Shared: every client of this node may have it, with the node's credential.
	Shared bool `json:"shared"`
	// Anonymous is when anonymous was served the manifest last, as far as is known.
	Anonymous time.Time `json:"anonymous,omitzero"`
	// Served is when anybody was.
	Served time.Time `json:"-"`
	// Remembered are those who need not be asked about again for further objects of
	// the repository.
	Remembered []rights.Remembered `json:"remembered"`
	// GrantTTL is how long each such yes stands, StaleIfError how old an answer may be
	// that is given while the registry cannot be asked, both in seconds. StaleForNode:
	// such an answer is for every client of this node.
	GrantTTL     float64 `json:"grantTtlSeconds"`
	StaleIfError float64 `json:"staleIfErrorSeconds"`
	StaleForNode bool    `json:"staleForNode,omitempty"`
}

// Access tells who may have an image whose manifest is d.
func (p *Proxy) Access(n ImageName, d digest.Digest) Access {
	name := upstream.Name(n.Repository.Upstream)
	q := &request{upstream: name, repository: n.Repository.Repository}
	rules := p.rules(name)
	m, _ := p.cache.Index().Membership(n.Repository.MembershipKey(string(upstream.Manifest), d))
	return Access{
		Allowed:      p.names.listed(name) || !p.names.listedOnly,
		Listed:       p.names.listed(name),
		Shared:       p.shared(q),
		Anonymous:    m.Anonymous,
		Served:       m.Time,
		Remembered:   p.rights.Remembered(n.Repository),
		GrantTTL:     rules.GrantTTL.Seconds(),
		StaleIfError: rules.StaleIfError.Seconds(),
		StaleForNode: rules.StaleForNode,
	}
}

// Coming tells whether an object is on its way from the registry.
func (p *Proxy) Coming(name upstream.Name, d digest.Digest) bool {
	return p.cache.Flies(cache.Key{Domain: p.sourceDomain(name), Digest: d})
}
