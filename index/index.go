// SPDX-License-Identifier: Apache-2.0

// Package index remembers what the blobs are: objects, what they lead to, tags,
// memberships, possessions and uses.
//
// Contract: every row is in memory, and what is read is read there. A bbolt file
// stands behind one goroutine, the writer, so that a restart knows them again:
// what changed is marked, and the writer puts marked rows into the file as they
// are by then, in batches. Objects are written at once, tags and memberships
// within noteInterval, uses within useInterval. A crash loses what was not written
// yet: of an object that lies on the disk it costs hashing it, and of everything
// else a question to a registry. What must not come back after a crash is written
// when Sync returns.
//
// Failure model: Open fails with ErrLocked when another process has the file,
// and with ErrBroken when it is no index or one of another version; the caller
// sets it aside then, and the rows are lost. A file that breaks later is set aside
// by the writer and written afresh from memory, and nobody who reads or notes
// learns of it: bbolt panics on a page that is not what it should be, a file that
// was cut faults, and whoever else writes to the file changes its size or time. A
// disk that refuses a write leaves the rows marked, for the next try.
//
// It never touches a blob, and never knows HTTP.
package index

import (
	"sync"
	"time"

	"tarn/internal/fault"

	"github.com/opencontainers/go-digest"
)

// Object is a stored file: the row of a digest.
type Object struct {
	Size    int64 // bytes of the file
	Alloc   int64 // bytes that it takes on disk
	Created time.Time
	// What it looked like when its bytes were hashed last, as stat has it,
	// times in nanoseconds since 1970; and when that was.
	Inode             uint64
	Modified, Changed int64
	Verified          time.Time
}

// Tag is a dated claim about an authority, never a pin: at Confirmed it said
// that the tag means Digest, or, where that is empty, nothing.
type Tag struct {
	Digest    digest.Digest
	Confirmed time.Time
	// Sequence orders the HEADs by when they were handed to the transport.
	// Only a higher one replaces a row.
	Sequence uint64
}

// Membership says that the authority served the object in that repository: to
// somebody at Time, and to anonymous at Anonymous, which is zero when it never
// did.
type Membership struct {
	Time      time.Time
	Anonymous time.Time
	// MediaType is the Content-Type that this authority gave a manifest.
	MediaType string
}

// Use is when an object was used last, and how it ranked then.
type Use struct {
	Time     time.Time
	Uses     int
	Priority float64
	// Lost: tags or manifests led to it, and none did any more.
	Lost bool
}

// A Possession is that a source domain delivered an object which was committed, with
// the object's row. Domain is "" where only the row is new.
type Possession struct {
	Digest digest.Digest
	Domain string
	Object Object
	// Children are what a manifest leads to. nil: what is known stays.
	Children []digest.Digest
}

// Options of an index. The zero value is an index without bounds.
type Options struct {
	// Steps is for tests, which have some of them fail.
	Steps fault.Steps
	// Listed tells whether the operator has named an upstream. nil: all are.
	Listed func(upstream string) bool
	// Rows bounds what tags and memberships take in memory, in bytes, about;
	// 0: 64 MiB, or a part of GOMEMLIMIT where that is less. Registries that
	// are not listed have a quarter of it.
	Rows int64
	// StrangersFile bounds what the rows of registries that are not listed take in
	// the file, in bytes, about; 0: as much as they may take in memory.
	StrangersFile int64
	// Aside is where a file that broke is kept.
	Aside string
	// Grow is asked by the writer before the file grows by n bytes; an error
	// leaves the rows unwritten for now. nil: it may always grow. Sync must not be
	// called under it.
	Grow func(n int64) error
	// Trouble is told by the writer what became of each write: nil, or why the
	// file does not say what memory says. It wraps ErrBroken when a broken file is
	// set aside. nil: nobody wants to know.
	Trouble func(error)
}

// Index is an open index. It is safe for concurrent use.
type Index struct {
	opts Options
	file *file // the writer's, after Open

	// To the writer.
	wake    chan struct{}   // something is to be written at once
	syncs   chan chan error // Sync waits for an answer
	closing chan struct{}   // closed by Close
	closed  chan struct{}   // closed by the writer when it ends
	once    sync.Once
	failed  error // of the writer's last write, before closed is
	refused bool  // the writer's: the last write failed

	// mu guards what follows. No transaction runs under it.
	mu           sync.RWMutex
	objects      byDigest[*object]
	repositories map[RepositoryKey]*repository
	rows         extent // of tags and memberships
	strangers    extent // of those, what registries that are not listed have
	leads        led    // by what manifests lead to
	types        types
	sequence     uint64 // the highest that a tag's row ever had
	taken        uint64 // how often something was taken back
	kept         uint64 // how much of that the file says
	dirty        dirty
}

// Open reads the index, or makes a new one, and starts the writer.
func Open(path string, opts Options) (*Index, error) {
	if opts.Rows == 0 {
		opts.Rows = defaultRows()
	}
	ix := &Index{
		opts:         opts,
		wake:         make(chan struct{}, 1),
		syncs:        make(chan chan error),
		closing:      make(chan struct{}),
		closed:       make(chan struct{}),
		objects:      newByDigest[*object](),
		repositories: make(map[RepositoryKey]*repository),
		types:        newTypes(),
		dirty:        newDirty(),
	}
	ix.file = &file{path: path, aside: opts.Aside, steps: opts.Steps}
	if err := ix.file.open(); err != nil {
		return nil, err
	}
	if err := ix.load(); err != nil {
		ix.file.close()
		return nil, err
	}
	go ix.run()
	return ix, nil
}

// Close has everything written, ends the writer and closes the file. A second one
// does nothing.
func (ix *Index) Close() error {
	ix.once.Do(func() { close(ix.closing) })
	<-ix.closed
	return ix.failed
}

// Object returns the row of d if the source domain possesses it.
func (ix *Index) Object(domain string, d digest.Digest) (Object, bool) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	o, ok := ix.objects.get(d)
	if !ok || !o.possessed(domain) {
		return Object{}, false
	}
	return o.row.unpack(), true
}

// Row returns the row of d, whoever possesses it.
func (ix *Index) Row(d digest.Digest) (Object, bool) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	o, ok := ix.objects.get(d)
	if !ok {
		return Object{}, false
	}
	return o.row.unpack(), true
}

// Use returns when an object that is stored was used last, as far as that was noted.
func (ix *Index) Use(d digest.Digest) (Use, bool) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	o, ok := ix.objects.get(d)
	if !ok || !o.use.known() {
		return Use{}, false
	}
	return o.use.unpack(), true
}

// Leads tells whether an object leads to others.
func (ix *Index) Leads(d digest.Digest) bool {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	o, ok := ix.objects.get(d)
	return ok && len(o.children) > 0
}

// ChildrenOf returns what an object leads to.
func (ix *Index) ChildrenOf(d digest.Digest) []digest.Digest {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	o, ok := ix.objects.get(d)
	if !ok {
		return nil
	}
	return unpackDigests(o.children)
}

// Tag returns the last confirmation of a tag.
func (ix *Index) Tag(k TagKey) (Tag, bool) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	r := ix.repositories[k.RepositoryKey]
	if r == nil {
		return Tag{}, false
	}
	t, ok := r.tags[k.Tag]
	return t, ok
}

// Membership returns what is known of an object in a repository.
func (ix *Index) Membership(k MembershipKey) (Membership, bool) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	return ix.membership(k)
}

// membership is Membership for who holds the lock.
func (ix *Index) membership(k MembershipKey) (Membership, bool) {
	r := ix.repositories[k.RepositoryKey]
	if r == nil {
		return Membership{}, false
	}
	return r.membership(k.Kind, k.Digest)
}

// Objects calls f for each object. f must not call the index.
func (ix *Index) Objects(f func(digest.Digest, Object)) {
	ix.each(func(d digest.Digest, o *object) { f(d, o.row.unpack()) })
}

// Children calls f for each object that leads to others. f must not call the
// index.
func (ix *Index) Children(f func(digest.Digest, []digest.Digest)) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	for _, d := range ix.objects.where(func(o *object) bool { return len(o.children) > 0 }) {
		o, _ := ix.objects.get(d)
		f(d, unpackDigests(o.children))
	}
}

func (ix *Index) each(f func(digest.Digest, *object)) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	for d, o := range ix.objects.all() {
		f(d, o)
	}
}

// Tags calls f for each tag, in no order. f must not call the index.
func (ix *Index) Tags(f func(TagKey, Tag)) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	for k, r := range ix.repositories {
		for name, t := range r.tags {
			f(TagKey{k, name}, t)
		}
	}
}

// LastSequence is the highest one that a tag's row ever had.
func (ix *Index) LastSequence() uint64 {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	return ix.sequence
}

// Len is how many objects there are.
func (ix *Index) Len() int {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	return ix.objects.len()
}

// Counts are numbers of rows.
type Counts struct {
	Objects     int `json:"objects"`
	Tags        int `json:"tags"`
	Memberships int `json:"memberships"`
	Possessions int `json:"possessions"`
}

// Counts counts the rows. It looks at each of them and is meant for people.
func (ix *Index) Counts() (c Counts) {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	for _, o := range ix.objects.all() {
		c.Objects++
		c.Possessions += len(o.domains)
	}
	for _, r := range ix.repositories {
		c.Tags += len(r.tags)
		c.Memberships += r.manifests.len() + r.blobs.len()
	}
	return c
}

// StrangersBytes is about what the rows of registries that are not listed take in
// the file.
func (ix *Index) StrangersBytes() int64 {
	ix.mu.RLock()
	defer ix.mu.RUnlock()
	return ix.strangers.file
}
