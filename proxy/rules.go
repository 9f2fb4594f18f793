// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"time"

	"tarn/rights"
	"tarn/upstream"
)

// Rules say how far an authority's yes is believed, and by whom, and how it is
// asked for bytes.
type Rules struct {
	// GrantTTL is how long a yes to a credential is believed for further
	// objects of the repository. 0 means asking for each.
	GrantTTL time.Duration
	// MembershipTTL is how long the authority is believed to have what it
	// had. 0 means asking every time.
	MembershipTTL time.Duration
	// StaleIfError is how old an answer may be that is given while the
	// authority cannot be asked. 0 means that none is.
	StaleIfError time.Duration
	// StaleForNode gives such an answer to every client of this node that
	// somebody of it was given, while the authority cannot be reached or
	// answers nobody.
	StaleForNode bool
	// Parallel is how many connections one large blob is fetched over.
	Parallel int
	// TokenBroker passes clients' credentials on to the token service.
	TokenBroker bool
	// Share are patterns (path.Match) of repositories that every client of
	// this node may have, with the node's credential.
	Share []string
}

// ruleset is what the operator said of each upstream.
type ruleset struct {
	listed  map[upstream.Name]Rules
	others  Rules
	brokers bool // some upstream has a token broker
}

func newRuleset(listed map[upstream.Name]Rules, others Rules) ruleset {
	s := ruleset{listed: listed, others: others}
	for _, r := range listed {
		s.brokers = s.brokers || r.TokenBroker
	}
	return s
}

func (s ruleset) of(name upstream.Name) Rules {
	if r, ok := s.listed[name]; ok {
		return r
	}
	return s.others
}

// longest is how long any upstream's answers are of use: while it cannot be asked, and
// as memberships.
func (s ruleset) longest() (stale, membership time.Duration) {
	stale, membership = s.others.StaleIfError, s.others.MembershipTTL
	for _, r := range s.listed {
		stale, membership = max(stale, r.StaleIfError), max(membership, r.MembershipTTL)
	}
	return stale, membership
}

func (p *Proxy) rules(name upstream.Name) Rules { return p.ruleset.of(name) }

// terms are the rules as far as they are about rights.
func (p *Proxy) terms(name string) rights.Terms {
	r := p.rules(upstream.Name(name))
	return rights.Terms{Grant: r.GrantTTL, Membership: r.MembershipTTL, Stale: r.StaleIfError, StaleForNode: r.StaleForNode}
}
