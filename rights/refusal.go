// SPDX-License-Identifier: Apache-2.0

package rights

import (
	"strings"
	"time"

	"tarn/index"
)

// Refusal is a 401 that anonymous was answered with in a repository. It answers
// further requests without a credential for a moment, since containerd's HEAD
// and GET each start with one, and tells during an outage how a password is
// shown. No other refusal ever answers anything but the request that it was for.
type Refusal struct {
	Challenge []string
	Denied    bool
	received  time.Time
}

const (
	// refusedFor is how long it answers further requests.
	refusedFor = 5 * time.Second
	// maxRefusals bounds them, and maxChallenge the bytes of each.
	maxRefusals  = 256
	maxChallenge = 4 << 10
)

// noteRefusal is called with the lock.
func (r *Rights) noteRefusal(k index.RepositoryKey, refusal Refusal, now time.Time, stale time.Duration) {
	delete(r.challenges, k)
	size := 0
	for _, c := range refusal.Challenge {
		size += len(c)
	}
	if size > maxChallenge {
		return
	}
	if len(r.challenges) >= maxRefusals {
		for old, one := range r.challenges {
			if now.Sub(one.received) >= max(refusedFor, stale) {
				delete(r.challenges, old)
			}
		}
		if len(r.challenges) >= maxRefusals {
			clear(r.challenges)
		}
	}
	r.challenges[k] = refusal
}

// Refused returns the 401 that anonymous was answered with here a moment ago.
func (r *Rights) Refused(a Asker) (Refusal, bool) {
	if !a.anonymous() {
		return Refusal{}, false
	}
	now := r.opts.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	one, ok := r.challenges[a.repository]
	return one, ok && now.Sub(one.received) < refusedFor
}

// Stale tells whether the asker may have the object while its authority cannot
// be asked, and how old that is. away says that its host cannot be reached, or
// answers nobody. Where it may not, a challenge may say how to show a password.
func (r *Rights) Stale(a Asker, o Object, away bool) (y Yes, age time.Duration, challenge string, ok bool) {
	terms, now := r.opts.Terms(a.repository.Upstream), r.opts.Now()
	within := func(t time.Time) bool {
		d := now.Sub(t)
		return !t.IsZero() && d >= 0 && d < terms.Stale
	}
	if terms.Stale <= 0 {
		return Yes{}, 0, "", false
	}
	m, _ := r.opts.Index.Membership(a.key(o))
	y = Yes{MediaType: m.MediaType, Size: -1, Proved: true}
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.grants[a.name]
	switch {
	case within(m.Anonymous):
		return y, now.Sub(m.Anonymous), "", true
	case !a.anonymous() && a.lasts() && within(g.asked) && within(m.Time):
		return y, max(now.Sub(g.asked), now.Sub(m.Time)), "", true
	case terms.StaleForNode && away && within(m.Time):
		return y, now.Sub(m.Time), "", true
	}
	if one, known := r.challenges[a.repository]; known && a.anonymous() && within(one.received) {
		for _, c := range one.Challenge {
			if scheme, _, _ := strings.Cut(c, " "); strings.EqualFold(scheme, "Basic") {
				return Yes{}, 0, c, false
			}
		}
	}
	return Yes{}, 0, "", false
}
