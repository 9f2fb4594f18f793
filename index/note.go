// SPDX-License-Identifier: Apache-2.0

package index

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// Put enters objects that were committed. The bbolt file has them soon.
func (ix *Index) Put(put ...Possession) {
	if len(put) == 0 {
		return
	}
	ix.mu.Lock()
	for _, p := range put {
		ix.put(p)
	}
	ix.mu.Unlock()
	ix.hurry()
}

// put is called with the lock.
func (ix *Index) put(p Possession) {
	o, known := ix.objects.get(p.Digest)
	if !known {
		o = &object{}
		if !ix.objects.put(p.Digest, o) {
			return
		}
	}
	o.row = p.Object.pack()
	ix.leads.count(o, -1)
	if p.Domain != "" {
		o.possess(p.Domain)
	}
	if p.Children != nil {
		o.children = packDigests(p.Children)
	}
	if ix.leads.count(o, 1); ix.leads.full() {
		ix.leads.count(o, -1)
		o.children = nil
	}
	ix.dirty.object(p.Digest, !known || p.Children != nil)
}

// Drop forgets objects, and with them who possesses them, what they lead to and
// when they were used. The bbolt file has their rows until the writer comes by: a row
// whose blob is gone means nothing. It returns what it forgot, for Put.
func (ix *Index) Drop(gone ...digest.Digest) (was []Possession) {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	for _, d := range gone {
		o, known := ix.objects.get(d)
		if !known {
			continue
		}
		for _, domain := range o.domains {
			was = append(was, Possession{d, domain, o.row.unpack(), unpackDigests(o.children)})
		}
		ix.leads.count(o, -1)
		ix.objects.delete(d)
		ix.dirty.object(d, true)
	}
	return was
}

// NoteUse remembers that an object was used, if it is stored.
func (ix *Index) NoteUse(d digest.Digest, u Use) {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	o, ok := ix.objects.get(d)
	if !ok {
		return
	}
	marked := o.use.marked
	o.use = u.pack()
	o.use.marked = true
	if !marked {
		ix.dirty.uses = append(ix.dirty.uses, d)
	}
}

// NoteTag takes the confirmation unless one with a higher sequence is known, or there
// are too many tags. It returns what the tag meant before, and whether it was taken.
func (ix *Index) NoteTag(k TagKey, t Tag) (before digest.Digest, taken bool) {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	var old Tag
	known := false
	if r := ix.repositories[k.RepositoryKey]; r != nil {
		old, known = r.tags[k.Tag]
	}
	if known && old.Sequence >= t.Sequence || !known && !ix.mayAdd(k.RepositoryKey, tagExtent(k)) {
		return "", false
	}
	ix.repository(k.RepositoryKey).tags[k.Tag] = t
	ix.sequence = max(ix.sequence, t.Sequence)
	ix.dirty.tags[k] = struct{}{}
	if t.Digest == "" {
		ix.taken++
	}
	return old.Digest, true
}

// NoteMembership takes what an authority said, unless there is too much of that; what
// is known already and newer stays.
func (ix *Index) NoteMembership(k MembershipKey, m Membership) {
	if _, n := parse(k.Digest); n == 0 {
		return
	}
	ix.mu.Lock()
	defer ix.mu.Unlock()
	m.MediaType = ix.types.keep(m.MediaType, ix.isStranger(k.RepositoryKey))
	old, known := ix.membership(k)
	switch {
	case !known && !ix.mayAdd(k.RepositoryKey, membershipExtent(k.RepositoryKey, k.Kind)):
		return
	case known && old.MediaType == m.MediaType && !newer(m.Time, old.Time) && (m.Anonymous.IsZero() || !newer(m.Anonymous, old.Anonymous)):
		return
	}
	if known {
		if old.Time.After(m.Time) && !newer(m.Time, old.Time) {
			m.Time, m.MediaType = old.Time, old.MediaType
		}
		if m.Anonymous.IsZero() || old.Anonymous.After(m.Anonymous) && !newer(m.Anonymous, old.Anonymous) {
			m.Anonymous = old.Anonymous
		}
	}
	ix.setMembership(k, m)
}

// setMembership is called with the lock.
func (ix *Index) setMembership(k MembershipKey, m Membership) {
	ix.repository(k.RepositoryKey).setMembership(k.Kind, k.Digest, m)
	ix.dirty.memberships[k] = struct{}{}
}

// renewal is how much newer what an authority said must be to be worth a row: a
// burst writes one.
const renewal = time.Second

// newer tells whether a moment is worth a row in place of the old one: it is a
// little later, or so much earlier that the clock was set back.
func newer(t, old time.Time) bool {
	d := t.Sub(old)
	return d >= renewal || d < -time.Minute
}

// DeleteMembership forgets what the authority took back. It tells whether there
// was something to forget; only after Sync is it forgotten for good.
func (ix *Index) DeleteMembership(k MembershipKey) bool {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	_, known := ix.membership(k)
	if known {
		ix.taken++
		ix.deleteMembership(k)
	}
	return known
}

// deleteMembership is called with the lock.
func (ix *Index) deleteMembership(k MembershipKey) {
	r := ix.repositories[k.RepositoryKey]
	r.deleteMembership(k.Kind, k.Digest)
	ix.count(k.RepositoryKey, membershipExtent(k.RepositoryKey, k.Kind).negative())
	ix.leave(k.RepositoryKey, r)
	ix.dirty.memberships[k] = struct{}{}
}

// Owes tells whether something that was taken back may not be in the file yet: who
// hears of a refusal waits for Sync then, whoever has had it forgotten.
func (ix *Index) Owes() bool {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	return ix.kept < ix.taken
}

// CloseRepository forgets what anonymous was served in a repository, because its
// authority does not let anonymous in any more. It tells whether there was
// something to forget; only after Sync is it forgotten for good.
func (ix *Index) CloseRepository(k RepositoryKey) (forgot bool) {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	r := ix.repositories[k]
	if r == nil {
		return false
	}
	for _, kind := range []string{manifests, blobs} {
		members := r.members(kind)
		for _, d := range members.where(func(m membership) bool { return m.anonymous != 0 }) {
			m, _ := members.get(d)
			members.put(d, membership{time: m.time})
			ix.dirty.memberships[k.MembershipKey(kind, d)] = struct{}{}
			forgot = true
		}
	}
	if forgot {
		ix.taken++
	}
	return forgot
}
