// SPDX-License-Identifier: Apache-2.0

// Package rights decides who may have what of the bytes that are here.
//
// Contract: storage is shared, rights are not. Only an answer of the authority,
// the registry's first endpoint, lets a byte out, to a question that carried this
// client's own credential, or that was put as anonymous, whose yes is everybody's.
// (While an authority cannot be asked, and the operator allows it, an earlier yes
// stands for one: see Stale.) Such an answer is Evidence, and Learn is the one
// function that takes it; the caller brings only last words, the answers to what
// the client itself asked. What each evidence makes, and what it ends, is this
// table, and besides only time ends anything:
//
//	                 from the authority's own origin    from where that redirected
//	Verified         grant, membership                  membership; anonymous: grant
//	Named            grant, membership                  membership; anonymous: grant
//	Sized            membership                         membership
//	Mute             nothing                            nothing
//	Unauthorised     ends the grant                     nothing
//	Forbidden        ends the grant, what had begun     nothing
//	NoTag            ends the grant, what had begun     nothing
//	TagGone          ends the grant, what had begun     nothing
//	NoObject         ends the membership, everybody's   nothing
//	Nothing          nothing                            nothing
//
// Named over a redirect is only what also says the size of the object, which is
// stored. An Unauthorised that is Denied ends what had begun, too. Where
// Unauthorised, Forbidden or TagGone answers anonymous, it ends besides all that
// anonymous was ever served in the repository.
//
// A grant is that the authority said yes to this credential in this repository;
// a membership, that it served this object in this repository, to somebody at
// one time and to anonymous at another. A stored byte goes out for both, or for
// an answer about that very object which makes the membership. What anonymous
// was granted and served is everybody's.
//
// Besides, each yes about an object is remembered for its asker as a claim, with
// the size that it said. It is good for the object that it was about: one that it
// proved, or one of exactly that size, also when that comes here only later. A
// sign-on page, which says 200 to everybody, has another size and names nothing.
//
// A yes counts from when its question was sent, never slides, and is remembered by
// nobody if a refusal was received since: the two may have crossed, and the
// refusal is newer. It serves the request that it answers.
//
// Failure model: everything here is bounded, and what is forgotten costs a
// question, or during an outage its help, never a right. Grants and claims live in memory only, under names
// that are an HMAC with a key that is new with each process; memberships are the
// index's.
//
// It never knows HTTP, never asks anybody, and never sees a byte of an object.
package rights

import (
	"sync"
	"time"

	"tarn/index"

	"github.com/opencontainers/go-digest"
)

// Says is what an answer of an authority says of the object that it was asked
// about.
type Says int

const (
	// Mute is any other yes. It is the first, and Verified the last that is one.
	Mute Says = iota
	// Sized: it says exactly the size of the object, which is stored, whoever it
	// was stored for.
	Sized
	// Named: it names the object's digest, or is a tag's, and names a digest. Over
	// a redirect it says the size of what is stored, too.
	Named
	// Verified: it brought the object's bytes, and they matched the digest.
	Verified
	// Unauthorised is a 401.
	Unauthorised
	// Forbidden is a 403 or 451.
	Forbidden
	// NoTag is a tag's 404 or 410.
	NoTag
	// TagGone is the same, of a tag that meant something before.
	TagGone
	// NoObject is an object's 404 or 410.
	NoObject
	// Nothing is every other answer, and none: it says nothing about rights.
	Nothing
)

// Evidence is one answer of an authority.
type Evidence struct {
	Says Says
	// Asked is when the question was sent.
	Asked time.Time
	// Redirected: the answer came from another origin than the authority's.
	Redirected bool
	// Size of the object in bytes, -1 where the answer does not say.
	Size int64
	// MediaType is what the authority calls the manifest.
	MediaType string
	// Challenge is how Unauthorised asks for a credential; Denied says that it
	// was a 403 to a token that everybody has.
	Challenge []string
	Denied    bool
}

// effect is what an evidence does.
type effect struct {
	grant        bool // for the credential in the repository
	anonymous    bool // the same, where that is anonymous
	member       bool
	endGrant     bool
	endBegun     bool // claims of the credential in the repository
	endAnonymous bool // memberships of anonymous in the repository, when it is anonymous that is told
	endMember    bool
}

// effects is the table of the package's comment.
var effects = [...]struct{ own, redirected effect }{
	Mute:         {},
	Sized:        {own: effect{member: true}, redirected: effect{member: true}},
	Named:        {own: effect{grant: true, anonymous: true, member: true}, redirected: effect{anonymous: true, member: true}},
	Verified:     {own: effect{grant: true, anonymous: true, member: true}, redirected: effect{anonymous: true, member: true}},
	Unauthorised: {own: effect{endGrant: true, endAnonymous: true}},
	Forbidden:    {own: effect{endGrant: true, endBegun: true, endAnonymous: true}},
	NoTag:        {own: effect{endGrant: true, endBegun: true}},
	TagGone:      {own: effect{endGrant: true, endBegun: true, endAnonymous: true}},
	NoObject:     {own: effect{endMember: true}},
	Nothing:      {},
}

func (e Evidence) effect() effect {
	if e.Redirected {
		return effects[e.Says].redirected
	}
	return effects[e.Says].own
}

// Terms are how far an authority's yes is believed.
type Terms struct {
	// Grant is how long a yes to a credential stands for further objects of
	// the repository; 0: each is asked about, and nothing may be finished.
	Grant time.Duration
	// Membership is how long the authority is believed to have what it had.
	Membership time.Duration
	// Stale is how old an answer may be that is given while the authority
	// cannot be asked. 0: none is.
	Stale time.Duration
	// StaleForNode: then every client of this node may have what somebody of
	// it was given.
	StaleForNode bool
}

// Object is a manifest or a blob. A question about a tag that was not answered
// with a digest has none.
type Object struct {
	Kind   string // the word of the URL: manifests or blobs
	Digest digest.Digest
}

// Yes is why a client may have an object.
type Yes struct {
	Asked     time.Time // when the question was sent
	MediaType string    // what this authority calls a manifest
	Size      int64     // what the answer said, -1 for nothing
	// Proved: whatever is stored under the digest is what the yes is for.
	Proved bool
	// Finishing: the yes is a while ago, and only lets a download end that it
	// began.
	Finishing bool
}

// Covers tells whether the yes is for an object of that size.
func (y Yes) Covers(size int64) bool { return y.Proved || y.Size >= 0 && y.Size == size }

const (
	// crossing is how long a refusal is remembered, at the least, as newer than a
	// yes that is on its way.
	crossing = time.Minute
	// skew is how far ahead of now a time may be that is believed: what is later is
	// from before the clock was set back.
	skew = time.Minute
	// maxRights bounds each of the tables.
	maxRights = 1 << 16
)

// Options of Rights. All are required.
type Options struct {
	Index *index.Index
	// Keep writes what was taken back, before anybody hears of it: a crash must
	// not bring it back.
	Keep  func()
	Terms func(upstream string) Terms
	Now   func() time.Time
}

// Rights are what the authorities have said. They are safe for concurrent use.
type Rights struct {
	opts  Options
	names names

	// mu guards what follows. Credentials and objects go by their names.
	mu     sync.Mutex
	grants map[string]grant
	claims claims
	// lastNo is when the last refusal of a credential or an object was received;
	// lastNoOfAll stands for those that were forgotten.
	lastNo      map[string]time.Time
	lastNoOfAll time.Time
	challenges  map[index.RepositoryKey]Refusal // of anonymous; at most maxRefusals
	closed      map[index.RepositoryKey]bool    // anonymous has no membership there; at most maxRights
	retired     bool                            // by Retire
}

// grant is kept past until for as long as a stale answer may rest on it.
type grant struct {
	asked, until time.Time
	repository   index.RepositoryKey
	as           string // what kind of credential
}

// New returns rights that know of no grant.
func New(opts Options) *Rights {
	return &Rights{
		opts:       opts,
		names:      newNames(),
		grants:     make(map[string]grant),
		claims:     newClaims(),
		lastNo:     make(map[string]time.Time),
		challenges: make(map[index.RepositoryKey]Refusal),
		closed:     make(map[index.RepositoryKey]bool),
	}
}

// Retire has no yes remembered any more: other rights take the place of these, under
// other terms. Each answer that is still to come serves the request that it answers,
// a refusal ends what the index has, and a download that began may be finished by
// who is here still.
func (r *Rights) Retire() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.retired = true
}

// Learn takes an answer of the authority to a question of this asker about the
// object, and returns the yes that it is, if it is one.
func (r *Rights) Learn(a Asker, o Object, e Evidence) Yes {
	does := e.effect()
	if e.Says > Verified {
		if does.endGrant || does.endMember {
			r.end(a, o, e, does)
		}
		return Yes{Size: -1}
	}
	y := Yes{Asked: e.Asked, MediaType: e.MediaType, Size: e.Size, Proved: does.member}
	terms, now := r.opts.Terms(a.repository.Upstream), r.opts.Now()
	until := e.Asked.Add(terms.Grant)
	if end, ok := tokenEnd(a.Credential.Authorization); ok && end.Before(until) {
		until = end
	}
	key := a.key(o)
	r.mu.Lock()
	asker := !r.crossed(e.Asked, a.name)
	object := asker && o.Digest != "" && !r.crossed(e.Asked, key.String())
	member := object && does.member
	if object {
		r.claim(a, key, claim{yes: y, until: until}, terms, now)
	}
	if member && a.anonymous() {
		delete(r.closed, a.repository)
	}
	if asker && (does.grant || does.anonymous && a.anonymous()) {
		r.granted(a, grant{e.Asked, until, a.repository, a.Credential.Kind()}, terms, now)
	}
	r.mu.Unlock()
	if member {
		r.member(a, o, key, e)
	}
	return y
}

// member notes that the authority served the object. A refusal that is received after
// Learn looked, and before the index has the row, finds nothing to delete: so Learn
// looks again, and deletes it itself.
func (r *Rights) member(a Asker, o Object, key index.MembershipKey, e Evidence) {
	m := index.Membership{Time: e.Asked}
	if o.Kind == manifests {
		m.MediaType = e.MediaType
	}
	if a.anonymous() {
		m.Anonymous = e.Asked
	}
	r.opts.Index.NoteMembership(key, m)
	r.mu.Lock()
	object, asker := r.crossed(e.Asked, key.String()), a.anonymous() && r.crossed(e.Asked, a.name)
	r.mu.Unlock()
	taken := false
	switch {
	case object:
		taken = r.opts.Index.DeleteMembership(key)
	case asker:
		taken = r.opts.Index.CloseRepository(a.repository)
	}
	if taken {
		r.opts.Keep()
	}
}

const manifests = "manifests"

// granted notes a yes to a credential. Called with the lock.
func (r *Rights) granted(a Asker, g grant, terms Terms, now time.Time) {
	keep := g.until
	if stale := g.asked.Add(terms.Stale); a.lasts() && stale.After(keep) {
		keep = stale
	}
	if a.anonymous() {
		delete(r.challenges, a.repository)
	}
	if !now.Before(keep) || r.grants[a.name].asked.After(g.asked) {
		return
	}
	if _, known := r.grants[a.name]; !known && len(r.grants) >= maxRights {
		for name, old := range r.grants {
			if !now.Before(old.until) {
				delete(r.grants, name)
			}
		}
		if len(r.grants) >= maxRights {
			clear(r.grants)
		}
	}
	r.grants[a.name] = g
}

// end takes back what a refusal ends.
func (r *Rights) end(a Asker, o Object, e Evidence, does effect) {
	now, taken := r.opts.Now(), false
	stale := r.opts.Terms(a.repository.Upstream).Stale
	key := a.key(o)
	r.mu.Lock()
	if does.endMember {
		// Some registries say it also where they mean 403, and then it costs
		// those who have the object a question.
		r.refuse(key.String(), now)
	}
	if does.endGrant {
		r.refuse(a.name, now)
		delete(r.grants, a.name)
	}
	if does.endBegun || does.endGrant && e.Denied {
		r.claims.drop(a.name)
	}
	if e.Says == Unauthorised && a.anonymous() {
		r.noteRefusal(a.repository, Refusal{Challenge: e.Challenge, Denied: e.Denied, received: now}, now, stale)
	}
	closes := does.endAnonymous && a.anonymous() && !r.closed[a.repository]
	if closes {
		if len(r.closed) >= maxRights {
			clear(r.closed)
		}
		r.closed[a.repository] = true
	}
	r.mu.Unlock()
	if does.endMember {
		taken = r.opts.Index.DeleteMembership(key)
	}
	if closes && r.opts.Index.CloseRepository(a.repository) {
		taken = true
	}
	if taken || r.opts.Index.Owes() { // whoever has had it forgotten may not have kept that yet
		r.opts.Keep()
	}
}

// refuse notes when a refusal was received. Called with the lock.
func (r *Rights) refuse(name string, now time.Time) {
	if len(r.lastNo) >= maxRights {
		for k, t := range r.lastNo {
			if now.Sub(t) > crossing {
				delete(r.lastNo, k)
			}
		}
		if len(r.lastNo) >= maxRights {
			clear(r.lastNo)
			r.lastNoOfAll = now
		}
	}
	r.lastNo[name] = now
}

// crossed tells whether a refusal of one of the names was received after a yes
// was asked for. Called with the lock.
func (r *Rights) crossed(asked time.Time, names ...string) bool {
	for _, name := range names {
		if !r.lastNo[name].Before(asked) {
			return true
		}
	}
	return r.retired || !r.lastNoOfAll.Before(asked)
}

// Entitled tells whether the asker may have the object without another
// question. size is asked for that of the object as it is here, stored or on its
// way, -1 where it is not, if it matters. resumes says that only a part is wanted
// which begins above byte 0.
func (r *Rights) Entitled(a Asker, o Object, size func() int64, resumes bool) (y Yes, ok bool) {
	terms, now := r.opts.Terms(a.repository.Upstream), r.opts.Now()
	if terms.Grant <= 0 {
		return Yes{}, false
	}
	key := a.key(o)
	m, _ := r.opts.Index.Membership(key)
	lives := func(served time.Time) bool {
		age := now.Sub(served)
		return !served.IsZero() && age < terms.Membership && age > -skew
	}
	y = Yes{MediaType: m.MediaType, Size: -1, Proved: true}
	r.mu.Lock()
	own, everybody := r.grants[a.name], r.grants[a.everybody]
	var claimed Yes
	has := false
	if c := r.claims.by[a.name][key]; c != nil {
		claimed, has = c.stands(resumes, r.crossed(c.yes.Asked, a.name, key.String()), now)
	}
	r.mu.Unlock()
	if now.Before(own.until) && lives(m.Time) && !a.anonymous() {
		y.Asked = own.asked
		return y, true
	}
	// What was served to a credential may be nothing for anonymous, also where
	// anonymous may have other things.
	if now.Before(everybody.until) && lives(m.Anonymous) {
		y.Asked = everybody.asked
		return y, true
	}
	if !has {
		return Yes{}, false
	}
	if here := size(); here >= 0 && claimed.Covers(here) {
		return claimed, true
	}
	return Yes{}, false
}

// Granted tells whether a yes for the repository is believed still.
func (r *Rights) Granted(a Asker) bool {
	now := r.opts.Now()
	if r.opts.Terms(a.repository.Upstream).Grant <= 0 {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return now.Before(r.grants[a.name].until) || now.Before(r.grants[a.everybody].until)
}

// Grants is how many yeses of registries are remembered, each to one credential in one
// repository; some may have ended.
func (r *Rights) Grants() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.grants)
}

// Had tells whether the authority said yes to the asker before, as far as is
// remembered, so that its no about a tag is news: to anonymous about the object
// that the tag meant, to a credential anywhere in the repository.
func (r *Rights) Had(a Asker, o Object) bool {
	if a.anonymous() {
		m, _ := r.opts.Index.Membership(a.key(o))
		return !m.Anonymous.IsZero()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.grants[a.name]
	return ok
}
