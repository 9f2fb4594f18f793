// SPDX-License-Identifier: Apache-2.0

package rights

import (
	"time"

	"tarn/index"
)

// A claim is what the authority answered this credential about one object. For
// grant_ttl it stands for another question of the same; and whoever has begun to
// download may finish: containerd asks for the ranges of a large layer one by
// one, and after the first has nowhere else to go.

const (
	// finishFor is how long after the yes a download that it began may go on.
	finishFor = 10 * time.Minute
	// finishIdle ends it earlier, when nobody is downloading any more.
	finishIdle = 30 * time.Second
	// onePiece is what is sent in one piece: nobody has a part of it.
	onePiece = 64 << 10
)

// claims by the asker's name, then by the object.
type claims struct {
	by      map[string]map[index.MembershipKey]*claim
	n       int       // at most maxRights
	expired time.Time // when those that had ended were last looked for
}

type claim struct {
	yes   Yes
	until time.Time // for another question
	begun bool
	open  int       // answers that are being sent
	idle  time.Time // since when there is none
}

func newClaims() claims { return claims{by: make(map[string]map[index.MembershipKey]*claim)} }

// ended tells whether the claim is worth nothing any more.
func (c *claim) ended(now time.Time) bool {
	if now.Before(c.until) || c.open > 0 {
		return false
	}
	return !c.begun || !now.Before(c.yes.Asked.Add(finishFor)) || now.Sub(c.idle) >= finishIdle
}

// find returns the claim, a new one if there is none and room; nil without.
func (cs *claims) find(asker string, object index.MembershipKey, now time.Time) *claim {
	if c := cs.by[asker][object]; c != nil {
		return c
	}
	if cs.n >= maxRights {
		cs.expire(now)
	}
	if cs.n >= maxRights {
		return nil
	}
	if cs.by[asker] == nil {
		cs.by[asker] = make(map[index.MembershipKey]*claim)
	}
	c := &claim{}
	cs.by[asker][object] = c
	cs.n++
	return c
}

// expire looks at all of them, and so not often.
func (cs *claims) expire(now time.Time) {
	if since := now.Sub(cs.expired); since >= 0 && since < time.Second {
		return
	}
	cs.expired = now
	for asker, objects := range cs.by {
		for object, c := range objects {
			if c.ended(now) {
				delete(objects, object)
				cs.n--
			}
		}
		if len(objects) == 0 {
			delete(cs.by, asker)
		}
	}
}

func (cs *claims) drop(asker string) {
	cs.n -= len(cs.by[asker])
	delete(cs.by, asker)
}

// stands returns the yes, if it stands for another question or lets a download
// end. refused says that there was a refusal since: it costs a question, and only
// what had begun goes on.
func (c *claim) stands(resumes, refused bool, now time.Time) (Yes, bool) {
	switch {
	case now.Before(c.until) && !refused:
		return c.yes, true
	case resumes && c.begun && (c.open > 0 || now.Sub(c.idle) < finishIdle) && now.Before(c.yes.Asked.Add(finishFor)):
		y := c.yes
		y.Finishing = true
		return y, true
	}
	return Yes{}, false
}

// claim notes a yes about an object, and until when it stands for another question.
// Called with the lock.
func (r *Rights) claim(a Asker, key index.MembershipKey, is claim, terms Terms, now time.Time) {
	y := is.yes
	if terms.Grant <= 0 || !now.Before(y.Asked.Add(max(terms.Grant, finishFor))) || !y.Proved && y.Size < 0 {
		return
	}
	c := r.claims.find(a.name, key, now)
	if c == nil || c.yes.Asked.After(y.Asked) || c.yes.Proved && !y.Proved && !c.ended(now) {
		return
	}
	c.yes, c.until = y, is.until
}

// Begin notes that an answer to the asker is being sent, of an object of that
// size (-1: not known), which may be finished with further ranges. The caller
// calls end after it.
func (r *Rights) Begin(a Asker, o Object, y Yes, size int64) (end func()) {
	if r.opts.Terms(a.repository.Upstream).Grant <= 0 || o.Digest == "" || size >= 0 && size <= onePiece || !y.Proved && y.Size < 0 {
		return func() {}
	}
	key := a.key(o)
	r.mu.Lock()
	defer r.mu.Unlock()
	crossed := r.crossed(y.Asked, a.name, key.String())
	if crossed && r.claims.by[a.name][key] == nil {
		return func() {} // a refusal has ended what could be finished
	}
	c := r.claims.find(a.name, key, r.opts.Now())
	if c == nil {
		return func() {}
	}
	if !y.Finishing && !crossed && !c.yes.Asked.After(y.Asked) && (y.Proved || !c.yes.Proved) {
		c.yes = y
	}
	c.begun = true
	c.open++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		c.open--
		c.idle = r.opts.Now()
	}
}

// Sending counts the answers that are being sent of what may be finished. It is for
// tests.
func (r *Rights) Sending() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, objects := range r.claims.by {
		for _, c := range objects {
			n += c.open
		}
	}
	return n
}
