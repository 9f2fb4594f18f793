// SPDX-License-Identifier: Apache-2.0

package index

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// noteInterval bounds how many notes a crash loses.
	noteInterval = 4 * time.Second
	// useInterval is for how long uses are gathered: each hit makes one, and
	// writing those of many objects takes as long as serving them.
	useInterval = time.Minute
	// rowsAWrite bounds a transaction: what waits for it does not wait long.
	rowsAWrite = 4096
	// fewRows may take what room there is even where the file may not grow.
	fewRows = 64
	// maxDirty bounds what is kept account of while a disk refuses all writes. Past
	// it all of the file is written afresh, when it can be.
	maxDirty = 1 << 17
)

// ErrClosed: what lies in the data directory is being closed. It is the error of the
// packages above as well.
var ErrClosed = errors.New("cache is closed")

// dirty names the rows that memory has otherwise than the file. A row is looked at
// when it is written, so the last word is always memory's.
type dirty struct {
	objects     map[digest.Digest]bool // true: it is new or gone, see changesOf
	tags        map[TagKey]struct{}
	memberships map[MembershipKey]struct{}
	uses        []digest.Digest
	usesFrom    time.Time // when uses were written last
	all         bool      // nobody knows which, so that all of them are to be written
}

func newDirty() dirty {
	return dirty{
		objects:     make(map[digest.Digest]bool),
		tags:        make(map[TagKey]struct{}),
		memberships: make(map[MembershipKey]struct{}),
		usesFrom:    time.Now(),
	}
}

func (d *dirty) object(name digest.Digest, anew bool) {
	d.objects[name] = d.objects[name] || anew
}

func (d *dirty) len() int { return len(d.objects) + len(d.tags) + len(d.memberships) + len(d.uses) }

// names are rows to be written.
type names struct {
	objects     []digest.Digest
	anew        map[digest.Digest]bool // which of them are new or gone
	tags        []TagKey
	memberships []MembershipKey
	uses        []digest.Digest
	taken       uint64 // how often something had been taken back by then
}

func (n *names) len() int { return len(n.objects) + len(n.tags) + len(n.memberships) + len(n.uses) }

// hurry has the writer write now.
func (ix *Index) hurry() {
	select {
	case ix.wake <- struct{}{}:
	default: // it will
	}
}

// Sync returns when all that was changed before is written, but for uses, or why it
// is not.
func (ix *Index) Sync() error {
	done := make(chan error, 1)
	select {
	case ix.syncs <- done:
		return <-done
	case <-ix.closed:
		return ErrClosed
	}
}

// Limit is how many bytes the file may have as long as Grow is not asked.
func (ix *Index) Limit() int64 { return ix.file.limit.Load() }

// run is the writer, the only goroutine that touches the file.
func (ix *Index) run() {
	defer close(ix.closed)
	tick := time.NewTicker(noteInterval)
	defer tick.Stop()
	for {
		select {
		case <-ix.wake:
			ix.flush(false)
		case <-tick.C:
			ix.flush(false)
		case done := <-ix.syncs:
			waiting := append(ix.waiting(), done)
			err := ix.flush(false)
			for _, done := range waiting {
				done <- err
			}
		case <-ix.closing:
			ix.failed = errors.Join(ix.flush(true), ix.file.close())
			return
		}
	}
}

// waiting are all others who wait for the next flush.
func (ix *Index) waiting() (all []chan error) {
	for {
		select {
		case done := <-ix.syncs:
			all = append(all, done)
		default:
			return all
		}
	}
}

// flush writes what is marked, uses only when they are due or all is wanted.
func (ix *Index) flush(all bool) error {
	err := ix.flushOnce(all)
	if errors.Is(err, ErrBroken) {
		ix.tell(err)
		ix.file.spoilt = true
		ix.markAll()
		if err = ix.flushOnce(all); errors.Is(err, ErrBroken) {
			ix.file.abandon() // the next one begins anew
			ix.markAll()
		}
	}
	ix.refused = err != nil
	ix.tell(err)
	return err
}

func (ix *Index) tell(err error) {
	if ix.opts.Trouble != nil {
		ix.opts.Trouble(err)
	}
}

func (ix *Index) markAll() {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	ix.dirty.all = true
}

func (ix *Index) flushOnce(all bool) error {
	ix.mu.Lock()
	anew := ix.dirty.all || ix.refused && ix.dirty.len() > maxDirty
	if anew { // whatever is marked is among all
		ix.unmark(ix.dirty.uses)
		ix.dirty = newDirty()
	}
	ix.mu.Unlock()
	if anew || ix.file.db == nil {
		if err := ix.writeAnew(); err != nil {
			ix.markAll()
			return err
		}
	}
	if err := ix.file.changed(); err != nil {
		return err
	}
	return ix.writeMarked(all)
}

func (ix *Index) writeMarked(all bool) error {
	n := ix.take(all)
	if err := ix.writeNames(n); err != nil {
		return err
	}
	ix.mu.Lock()
	defer ix.mu.Unlock()
	ix.kept = max(ix.kept, n.taken)
	return nil
}

// take returns what is marked, which is not marked any more.
func (ix *Index) take(all bool) (n names) {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	d := &ix.dirty
	n.anew, n.taken = d.objects, ix.taken
	for name := range d.objects {
		n.objects = append(n.objects, name)
	}
	for k := range d.tags {
		n.tags = append(n.tags, k)
	}
	for k := range d.memberships {
		n.memberships = append(n.memberships, k)
	}
	uses, from := d.uses, d.usesFrom
	age := time.Since(from)
	if all || age >= useInterval || age < 0 || len(uses) > maxDirty/2 {
		n.uses, uses, from = uses, nil, time.Now()
		ix.unmark(n.uses)
	}
	*d = newDirty()
	d.uses, d.usesFrom = uses, from
	return n
}

// sort has rows that lie together be written together: each page that a transaction
// touches is written anew.
func (n *names) sort() {
	slices.Sort(n.objects)
	slices.SortFunc(n.tags, func(a, b TagKey) int {
		return cmp.Or(a.RepositoryKey.compare(b.RepositoryKey), strings.Compare(a.Tag, b.Tag))
	})
	slices.SortFunc(n.memberships, func(a, b MembershipKey) int {
		return cmp.Or(a.RepositoryKey.compare(b.RepositoryKey), strings.Compare(a.Kind, b.Kind), strings.Compare(string(a.Digest), string(b.Digest)))
	})
	slices.Sort(n.uses)
}

func (k RepositoryKey) compare(other RepositoryKey) int {
	return cmp.Or(strings.Compare(k.Upstream, other.Upstream), strings.Compare(k.Repository, other.Repository))
}

// unmark is called with the lock.
func (ix *Index) unmark(uses []digest.Digest) {
	for _, name := range uses {
		if o, ok := ix.objects.get(name); ok {
			o.use.marked = false
		}
	}
}

// putBack marks what could not be written.
func (ix *Index) putBack(n names) {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	for _, name := range n.objects {
		ix.dirty.object(name, n.anew[name])
	}
	for _, k := range n.tags {
		ix.dirty.tags[k] = struct{}{}
	}
	for _, k := range n.memberships {
		ix.dirty.memberships[k] = struct{}{}
	}
	for _, name := range n.uses {
		if o, ok := ix.objects.get(name); ok && !o.use.marked {
			o.use.marked = true
			ix.dirty.uses = append(ix.dirty.uses, name)
		}
	}
}

// writeNames writes rows, in as many transactions as they take. What is not written
// is marked again.
func (ix *Index) writeNames(n names) error {
	n.sort()
	for n.len() > 0 {
		part, rest := n.cut(rowsAWrite)
		if err := ix.writePart(part); err != nil {
			ix.putBack(rest)
			return err
		}
		n = rest
	}
	return nil
}

// writePart writes rows in one transaction, or, where the file would have to grow
// for it and may not, in several, each of which can use the pages that the one
// before it has freed.
func (ix *Index) writePart(n names) error {
	changes, sequence := ix.changes(n)
	err := ix.file.apply(changes, sequence)
	for errors.Is(err, errFull) { // a step at a time: something may have to go for each
		if gerr := ix.grow(growStep); gerr != nil {
			err = fmt.Errorf("%w: %w", err, gerr)
			break
		}
		changes, sequence = ix.changes(n)
		err = ix.file.apply(changes, sequence)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errFull) && n.len() > fewRows:
		first, second := n.cut(n.len() / 2)
		if err := ix.writePart(first); err != nil {
			ix.putBack(second)
			return err
		}
		return ix.writePart(second)
	}
	ix.putBack(n)
	return fmt.Errorf("write the index: %w", err)
}

func (ix *Index) grow(n int64) error {
	ix.file.limit.Add(n) // first, so that whoever counts meanwhile counts it
	if ix.opts.Grow == nil {
		return nil
	}
	err := ix.opts.Grow(n)
	if err != nil {
		ix.file.limit.Add(-n)
	}
	return err
}

// changes are what the rows are now.
func (ix *Index) changes(n names) (all []change, sequence uint64) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	for _, d := range n.objects {
		o, _ := ix.objects.get(d)
		all = append(all, changesOf(d, o, n.anew[d] || o == nil)...)
	}
	for _, k := range n.tags {
		c := change{bucket: tagBucket, key: k.bytes()}
		if r := ix.repositories[k.RepositoryKey]; r != nil {
			if t, ok := r.tags[k.Tag]; ok {
				c.value = t.encode()
			}
		}
		all = append(all, c)
	}
	for _, k := range n.memberships {
		c := change{bucket: membershipBucket, key: k.bytes()}
		if m, ok := ix.membership(k); ok {
			c.value = m.encode()
		}
		all = append(all, c)
	}
	for _, d := range n.uses {
		if o, ok := ix.objects.get(d); ok {
			all = append(all, change{bucket: useBucket, key: []byte(d), value: o.use.encode()})
		}
	}
	return all, ix.sequence
}

// cut parts the names after so many.
func (n names) cut(most int) (first, rest names) {
	first.anew, rest.anew = n.anew, n.anew
	first.objects, rest.objects = cut(n.objects, &most)
	first.tags, rest.tags = cut(n.tags, &most)
	first.memberships, rest.memberships = cut(n.memberships, &most)
	first.uses, rest.uses = cut(n.uses, &most)
	return first, rest
}

func cut[T any](all []T, most *int) (first, rest []T) {
	n := min(len(all), *most)
	*most -= n
	return all[:n], all[n:]
}

// writeAnew empties the file, or begins another one, and writes all rows into it. What is
// changed meanwhile is marked, as ever, and is written afterwards; who waits for
// that in Sync is not made to wait for all of it.
func (ix *Index) writeAnew() error {
	if err := ix.file.empty(); err != nil {
		return err
	}
	for part := range ix.everything() {
		if err := errors.Join(ix.writeNames(part), ix.answerSyncs()); err != nil {
			return err
		}
	}
	return nil
}

// everything names all rows, some thousands at a time.
func (ix *Index) everything() iter.Seq[names] {
	return func(yield func(names) bool) {
		all := names{anew: make(map[digest.Digest]bool)}
		ix.each(func(d digest.Digest, _ *object) {
			all.objects = append(all.objects, d)
			all.anew[d] = true
		})
		ix.mu.RLock()
		repositories := slices.SortedFunc(maps.Keys(ix.repositories), RepositoryKey.compare)
		ix.mu.RUnlock()
		all.sort()
		for len(repositories) > 0 || all.len() > 0 {
			for all.len() < rowsAWrite && len(repositories) > 0 {
				ix.namesOf(repositories[0], &all)
				repositories = repositories[1:]
			}
			var part names
			if part, all = all.cut(rowsAWrite); !yield(part) {
				return
			}
		}
	}
}

// namesOf adds the rows of a repository.
func (ix *Index) namesOf(k RepositoryKey, n *names) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	r := ix.repositories[k]
	if r == nil {
		return
	}
	for tag := range r.tags {
		n.tags = append(n.tags, k.TagKey(tag))
	}
	for _, kind := range []string{manifests, blobs} {
		for d := range r.members(kind).all() {
			n.memberships = append(n.memberships, k.MembershipKey(kind, d))
		}
	}
}

// answerSyncs writes what was changed meanwhile, for who waits for that: what is not
// in the file yet is not in its way.
func (ix *Index) answerSyncs() error {
	waiting := ix.waiting()
	if len(waiting) == 0 {
		return nil
	}
	err := ix.writeMarked(false)
	for _, done := range waiting {
		done <- err
	}
	return err
}
