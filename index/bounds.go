// SPDX-License-Identifier: Apache-2.0

package index

import (
	"cmp"
	"runtime/debug"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Anybody who has a registry of his own can have tarn hear of any number of tags
// and objects. Their rows have a bound, and those of registries that are not listed
// a smaller one, so that they fill only their own part. Trim has the oldest go
// before the bound is reached; what comes faster than that is not noted. Either
// costs a question.
const (
	// usualRows is what nodes have of tags and memberships many times over, in
	// bytes of memory: some 600,000 rows.
	usualRows = 64 << 20
	// StrangersShare is which part of whatever is bounded, one in so many, registries
	// that are not listed may have.
	StrangersShare = 4
	// trimAt is how full it is when the oldest go, and trimTo how full it is then,
	// in eighths.
	trimAt, trimTo = 7, 6

	// What a row takes in memory, about: a map of Go's is two thirds full.
	membershipBytes = 96
	typeBytes       = 96  // of a manifest, besides
	tagBytes        = 288 // with the text of its digest
	repositoryBytes = 1024
	// rowUnit is how many bytes of a key count as a row of the file: a name can be
	// several times as long as any that is usual.
	rowUnit = 256
	// rowRoom is how many bytes of the file a row is taken for, its value and what
	// bbolt's pages leave free included.
	rowRoom = 2 * rowUnit
	// maxMediaType is how long one may be (RFC 6838 4.2).
	maxMediaType = 255
)

// defaultRows leaves most of a small memory to what requests take.
func defaultRows() int64 {
	const share = 32
	return min(usualRows, debug.SetMemoryLimit(-1)/share)
}

// extent is what rows take, in bytes.
type extent struct{ memory, file int64 }

func (e extent) plus(more extent) extent { return extent{e.memory + more.memory, e.file + more.file} }
func (e extent) negative() extent        { return extent{-e.memory, -e.file} }

func tagExtent(k TagKey) extent {
	return extent{tagBytes + int64(len(k.Tag)), fileRoom(k.RepositoryKey, len(k.Tag))}
}

func membershipExtent(k RepositoryKey, kind string) extent {
	const kindAndDigest = len(manifests) + len("sha256:") + 64
	e := extent{membershipBytes, fileRoom(k, kindAndDigest)}
	if kind == manifests {
		e.memory += typeBytes
	}
	return e
}

func fileRoom(k RepositoryKey, rest int) int64 {
	return rowRoom * (1 + int64(len(k.Upstream)+len(k.Repository)+rest)/rowUnit)
}

func repositoryExtent(k RepositoryKey) extent {
	return extent{memory: repositoryBytes + int64(len(k.Upstream)+len(k.Repository))}
}

// led is what the packed digests take, in bytes, that manifests lead to: of those that a
// listed registry has delivered, and of those that others have alone.
type led struct{ listed, strangers int64 }

const (
	// maxLed bounds what listed manifests lead to, and maxStrangersLed others: a
	// million digests, of which a manifest has a dozen, and a quarter of that. What
	// comes after so many leads nowhere.
	maxLed          = 33 << 20
	maxStrangersLed = maxLed / StrangersShare
)

// count enters what an object leads to, or takes it off.
func (l *led) count(o *object, sign int64) {
	if o.possessed(ListedDomain) {
		l.listed += sign * int64(len(o.children))
	} else {
		l.strangers += sign * int64(len(o.children))
	}
}

func (l *led) full() bool { return l.listed > maxLed || l.strangers > maxStrangersLed }

// types are the media types that are kept: a registry may make up any number of them,
// and there are not many.
type types struct {
	known     map[string]string
	strangers int
}

const maxTypes = 1024

func newTypes() types { return types{known: make(map[string]string)} }

// keep returns the one string that stands for a media type, "" where there are too
// many: then it is read from the manifest.
func (t *types) keep(mediaType string, stranger bool) string {
	if len(mediaType) > maxMediaType {
		return ""
	}
	one, known := t.known[mediaType]
	switch {
	case known:
		return one
	case len(t.known) >= maxTypes, stranger && t.strangers >= maxTypes/StrangersShare:
		return ""
	case stranger:
		t.strangers++
	}
	t.known[mediaType] = mediaType
	return mediaType
}

func (ix *Index) isStranger(k RepositoryKey) bool {
	return ix.opts.Listed != nil && !ix.opts.Listed(k.Upstream)
}

// excess is by how much rows are beyond so many eighths of the bounds, all of them
// and strangers' alone.
func (ix *Index) excess(taken, strangers extent, eighths int64) (all, theirs extent) {
	beyond := func(n, bound int64) int64 { return max(0, n-bound/8*eighths) }
	all.memory = beyond(taken.memory, ix.opts.Rows)
	theirs.memory = beyond(strangers.memory, ix.opts.Rows/StrangersShare)
	if bound := ix.opts.StrangersFile; bound > 0 {
		theirs.file = beyond(strangers.file, bound)
	}
	return all, theirs
}

// mayAdd counts a row more of a repository, unless there are too many. Called with
// the lock.
func (ix *Index) mayAdd(k RepositoryKey, row extent) bool {
	if ix.repositories[k] == nil {
		row = row.plus(repositoryExtent(k))
	}
	strangers := ix.strangers
	if ix.isStranger(k) {
		strangers = strangers.plus(row)
	}
	taken := ix.rows.plus(row)
	if all, theirs := ix.excess(taken, strangers, 8); all != (extent{}) || theirs != (extent{}) && ix.isStranger(k) {
		return false
	}
	ix.rows, ix.strangers = taken, strangers
	ix.repository(k)
	return true
}

// count is called with the lock.
func (ix *Index) count(k RepositoryKey, row extent) {
	ix.rows = ix.rows.plus(row)
	if ix.isStranger(k) {
		ix.strangers = ix.strangers.plus(row)
	}
}

// repository returns that of the key. Called with the lock.
func (ix *Index) repository(k RepositoryKey) *repository {
	r := ix.repositories[k]
	if r == nil {
		r = newRepository()
		ix.repositories[k] = r
	}
	return r
}

// leave forgets a repository of which nothing is known any more. Called with the
// lock.
func (ix *Index) leave(k RepositoryKey, r *repository) {
	if r.empty() {
		delete(ix.repositories, k)
		ix.count(k, repositoryExtent(k).negative())
	}
}

// Relist counts anew what registries that are not listed have: Options.Listed says
// something else than before.
func (ix *Index) Relist() {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	ix.strangers = extent{}
	for k, r := range ix.repositories {
		if !ix.isStranger(k) {
			continue
		}
		theirs := repositoryExtent(k)
		for name := range r.tags {
			theirs = theirs.plus(tagExtent(k.TagKey(name)))
		}
		for _, kind := range []string{manifests, blobs} {
			n, one := int64(r.members(kind).len()), membershipExtent(k, kind)
			theirs = theirs.plus(extent{n * one.memory, n * one.file})
		}
		ix.strangers = ix.strangers.plus(theirs)
	}
}

// Disown drops the memberships of these upstreams: who said what they rest on has no
// say there any more. Its caller has that kept (Sync).
func (ix *Index) Disown(upstream func(string) bool) {
	ix.forget(func(k RepositoryKey, _ int64) bool { return upstream(k.Upstream) },
		func(TagKey, Tag) bool { return false })
}

// Pruning says from before when rows are of no use any more.
type Pruning struct {
	Memberships time.Time
	Tags        time.Time // of what is not stored
}

// Prune drops what is of no use any more. It returns what the dropped tags meant.
func (ix *Index) Prune(p Pruning) (untagged []digest.Digest) {
	return ix.forget(func(_ RepositoryKey, latest int64) bool {
		return latest < nanos(p.Memberships)
	}, func(k TagKey, t Tag) bool {
		if t.Digest == "" || !t.Confirmed.Before(p.Tags) {
			return false
		}
		_, stored := ix.objects.get(t.Digest)
		return !stored
	})
}

// Trim drops the oldest rows when there is not room for many more. It returns what
// the dropped tags meant.
func (ix *Index) Trim() (untagged []digest.Digest) {
	for _, strangersOnly := range []bool{true, false} {
		before := ix.overdue(strangersOnly)
		if before == 0 {
			continue
		}
		whose := func(k RepositoryKey) bool { // and no more than that, where many are as old
			return (!strangersOnly || ix.isStranger(k)) && ix.over(strangersOnly, trimTo) != (extent{})
		}
		untagged = append(untagged, ix.forget(func(k RepositoryKey, latest int64) bool {
			return latest < before && whose(k)
		}, func(k TagKey, t Tag) bool {
			return nanos(t.Confirmed) < before && whose(k.RepositoryKey)
		})...)
	}
	return untagged
}

// over is the excess of registries that are not listed, or of all. Called with the
// lock.
func (ix *Index) over(strangersOnly bool, eighths int64) extent {
	all, theirs := ix.excess(ix.rows, ix.strangers, eighths)
	if strangersOnly {
		return theirs
	}
	return all
}

// overdue is the time before which rows are to go, those of registries that are
// not listed or all, 0 when there is room enough.
func (ix *Index) overdue(strangersOnly bool) (before int64) {
	type aged struct {
		time int64
		extent
	}
	var rows []aged
	ix.mu.RLock()
	left := ix.over(strangersOnly, trimTo)
	if ix.over(strangersOnly, trimAt) == (extent{}) {
		ix.mu.RUnlock()
		return 0
	}
	for k, r := range ix.repositories {
		if strangersOnly && !ix.isStranger(k) {
			continue
		}
		for name, t := range r.tags {
			rows = append(rows, aged{nanos(t.Confirmed), tagExtent(k.TagKey(name))})
		}
		for _, kind := range []string{manifests, blobs} {
			one := membershipExtent(k, kind)
			for m := range r.members(kind).values() {
				rows = append(rows, aged{m.latest(), one})
			}
		}
	}
	ix.mu.RUnlock()
	slices.SortFunc(rows, func(a, b aged) int { return cmp.Compare(a.time, b.time) })
	for _, r := range rows {
		if left.memory <= 0 && left.file <= 0 {
			break
		}
		before = r.time + 1
		left = left.plus(r.negative())
	}
	return before
}

// forget drops the rows that are old, and still are when it comes to that. It
// returns what the tags among them meant.
func (ix *Index) forget(oldMembership func(k RepositoryKey, latest int64) bool, oldTag func(TagKey, Tag) bool) (untagged []digest.Digest) {
	var memberships []MembershipKey
	var tags []TagKey
	ix.mu.RLock()
	for k, r := range ix.repositories {
		for _, kind := range []string{manifests, blobs} {
			old := func(m membership) bool { return oldMembership(k, m.latest()) }
			for _, d := range r.members(kind).where(old) {
				memberships = append(memberships, k.MembershipKey(kind, d))
			}
		}
		for name, t := range r.tags {
			if key := k.TagKey(name); oldTag(key, t) {
				tags = append(tags, key)
			}
		}
	}
	ix.mu.RUnlock()
	ix.mu.Lock()
	defer ix.mu.Unlock()
	if len(memberships)+len(tags) > 0 {
		ix.taken++ // an authority may take back what is not known here any more
		ix.hurry()
	}
	for _, k := range memberships {
		r := ix.repositories[k.RepositoryKey]
		if r == nil {
			continue
		}
		if m, ok := r.members(k.Kind).get(k.Digest); ok && oldMembership(k.RepositoryKey, m.latest()) {
			ix.deleteMembership(k)
		}
	}
	for _, k := range tags {
		r := ix.repositories[k.RepositoryKey]
		if r == nil {
			continue
		}
		if t, ok := r.tags[k.Tag]; ok && oldTag(k, t) {
			untagged = append(untagged, t.Digest)
			delete(r.tags, k.Tag)
			ix.count(k.RepositoryKey, tagExtent(k).negative())
			ix.leave(k.RepositoryKey, r)
			ix.dirty.tags[k] = struct{}{}
		}
	}
	return untagged
}
