// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tarn/blobstore"
	"tarn/index"
	"tarn/internal/evict"

	"github.com/opencontainers/go-digest"
)

// What is stored goes when there is no room for what is to be stored, before the
// first byte of that is written. The order is evict.Queue's; this is what has it
// agree with rows and files.
//
// Who reads a stored object holds it, and so does a flight that was committed, for
// its readers. What is held is not chosen. The choice and the removal from the
// order are one step under the order's lock, so from then on nobody can hold
// it; then the row goes, in memory, then the file. Only the committer does that, so it
// never meets a commit of the same object.

// order is the queue of what is stored, and its lock, under which nothing else
// is taken or waited for.
type order struct {
	mu    sync.Mutex
	queue *evict.Queue[digest.Digest]
}

func newOrder() *order { return &order{queue: evict.New[digest.Digest]()} }

type lease = *evict.Entry[digest.Digest]

// holdStored returns the row of an object that the domain possesses, and holds
// its file. nil: it is not stored, or goes just now.
func (c *Cache) holdStored(k Key) (index.Object, lease) {
	row, ok := c.index.Object(k.Domain, k.Digest)
	if !ok {
		return row, nil
	}
	return row, c.hold(k.Digest)
}

func (c *Cache) hold(d digest.Digest) lease {
	c.order.mu.Lock()
	defer c.order.mu.Unlock()
	return c.order.queue.Hold(d)
}

// await holds also what is not in the order yet.
func (c *Cache) await(d digest.Digest) lease {
	c.order.mu.Lock()
	defer c.order.mu.Unlock()
	return c.order.queue.Await(d)
}

// letGo ends a hold. The bytes of a file that was removed meanwhile are free
// only now.
func (c *Cache) letGo(h lease) {
	if h == nil {
		return
	}
	c.order.mu.Lock()
	freed := c.order.queue.Release(h)
	c.order.mu.Unlock()
	if freed > 0 {
		c.addUsed(-freed)
	}
}

// noteUse counts a use.
func (c *Cache) noteUse(d digest.Digest) {
	c.order.mu.Lock()
	c.order.queue.Use(d)
	rank, ok := c.order.queue.Rank(d)
	c.order.mu.Unlock()
	if ok {
		c.noteRank(d, time.Now(), rank)
	}
}

// noteRank keeps a rank for the next process.
func (c *Cache) noteRank(d digest.Digest, used time.Time, r evict.Rank) {
	c.index.NoteUse(d, index.Use{Time: used, Uses: r.Uses, Priority: r.Priority, Lost: r.Lost})
}

// enter puts an object that has its row into the order, as used just now. It runs
// in the committer.
func (c *Cache) enter(d digest.Digest, alloc int64, children []digest.Digest) {
	c.order.mu.Lock()
	c.order.queue.Add(d, alloc)
	c.order.queue.Lead(d, children)
	rank, _ := c.order.queue.Rank(d)
	c.order.mu.Unlock()
	c.noteRank(d, time.Now(), rank)
	c.images.due = c.images.due || children != nil
	switch {
	case !c.pins.wanted[d]:
	case children != nil:
		c.pins.due = true // what it leads to is wanted, too
	default:
		c.pin(d)
	}
}

// leftOver has a file without a row, which the disk did not let go, make room before
// all others.
func (c *Cache) leftOver(d digest.Digest, alloc int64) {
	c.order.mu.Lock()
	defer c.order.mu.Unlock()
	c.order.queue.Add(d, alloc)
	c.order.queue.Lose(d)
}

// takenOff takes what has no file any more out of the order, where its bytes are
// not counted any more. It returns those that somebody holds, which count until he lets go.
func (c *Cache) takenOff(d digest.Digest) (held int64) {
	c.order.mu.Lock()
	defer c.order.mu.Unlock()
	before := c.order.queue.Lingering()
	c.order.queue.Remove(d)
	return c.order.queue.Lingering() - before
}

// forget takes an object whose file is gone out of the order and off the count
// of used bytes, where alloc is what it took. What somebody holds counts until he
// lets go of it.
func (c *Cache) forget(d digest.Digest, alloc int64) {
	c.order.mu.Lock()
	if _, known := c.order.queue.Rank(d); !known { // somebody may hold it all the same
		c.order.queue.Add(d, alloc)
	}
	alloc = c.order.queue.Remove(d)
	c.order.mu.Unlock()
	c.addUsed(-alloc)
	c.images.due = true
	if l := c.pins.leases[d]; l != nil {
		delete(c.pins.leases, d)
		c.letGo(l)
	}
}

// NoteTag takes what the authority says of a tag, unless it has said something
// later. What only that tag meant is the first to be evicted.
//
// A tag that was not known, of what is neither here nor on its way, is not noted:
// nothing could be done with it, and there is no end to such tags. Whoever fetches
// what it means notes it again, as often as he likes.
func (c *Cache) NoteTag(key index.TagKey, t index.Tag) {
	if _, known := c.index.Tag(key); !known && !c.comes(key, t.Digest) {
		return
	}
	before, taken := c.index.NoteTag(key, t)
	if !taken || before == t.Digest {
		return
	}
	c.tagMoved.Store(true)
	c.order.mu.Lock()
	if t.Digest != "" {
		c.order.queue.Tag(t.Digest)
	}
	if before == "" {
		c.order.mu.Unlock()
		return
	}
	c.order.queue.Untag(before)
	rank, ok := c.order.queue.Rank(before)
	c.order.mu.Unlock()
	if ok && rank.Lost {
		u, _ := c.index.Use(before)
		c.noteRank(before, u.Time, rank)
	}
}

// comes tells whether what a tag means is here, or on its way from its registry.
func (c *Cache) comes(tag index.TagKey, d digest.Digest) bool {
	if c.isHere(d) {
		return true
	}
	domain := ListedDomain
	if !c.listed(tag.Upstream) {
		domain = tag.Upstream
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flights[Key{domain, d}] != nil
}

// Prune drops what the index need not know any more.
func (c *Cache) Prune(p index.Pruning) { c.untag(c.index.Prune(p)) }

// untag has the order know that tags are forgotten, with what they meant.
func (c *Cache) untag(meant []digest.Digest) {
	c.order.mu.Lock()
	defer c.order.mu.Unlock()
	for _, d := range meant {
		if d != "" {
			c.order.queue.Untag(d)
		}
	}
}

// shortage is a reservation that needs room.
type shortage struct {
	domain  string
	n       int64
	done    chan error
	settled atomic.Bool // it has its answer, or nobody waits for it any more
}

// roomPatience is how long a download waits for room before it passes by: a disk
// may take its time, and the client's is short.
const roomPatience = 2 * time.Second

// reserveByEvicting has the committer make room for n more bytes and claim it.
func (c *Cache) reserveByEvicting(domain string, n int64) error {
	s := &shortage{domain: domain, n: n, done: make(chan error, 1)}
	patience := time.NewTimer(roomPatience)
	defer patience.Stop()
	select {
	case c.shortages <- s:
	case <-patience.C:
		return fmt.Errorf("%w: the disk is slow to make any", errNoRoom)
	case <-c.ctx.Done():
		return ErrClosed
	}
	select {
	case err := <-s.done:
		return err
	case <-patience.C:
		if s.settled.CompareAndSwap(false, true) {
			return fmt.Errorf("%w: the disk is slow to make any", errNoRoom)
		}
		return <-s.done
	}
}

const (
	// maxRounds bounds how often room is made for one reservation: a filesystem
	// may take its time to count what was deleted as free, and must not have
	// all go for it.
	maxRounds = 3
	// slackShare of the bound is made free besides, one part in so many, so that
	// not every reservation of a full store waits for the committer.
	slackShare = 100
	maxSlack   = 64 << 20
)

// provide makes room and claims it, in the committer. It tells whether whoever
// waits has an answer; unless it is the last try, no is none.
func (c *Cache) provide(s *shortage, last bool) bool {
	err := c.claimByEvicting(s.domain, s.n)
	if err != nil && !last {
		return false
	}
	if s.settled.CompareAndSwap(false, true) {
		s.done <- err
	} else if err == nil {
		c.unreserve(s.domain, s.n) // he has left
	}
	return true
}

func (c *Cache) claimByEvicting(domain string, n int64) error {
	for round := 0; ; round++ {
		short, share, err := c.tryReserve(domain, n)
		if short <= 0 || share || round == maxRounds || c.mayGo() < short {
			return err
		}
		if everr := c.evict(short + min(c.opts.MaxSize/slackShare, maxSlack)); everr != nil {
			return fmt.Errorf("%w, and nothing can be evicted: %w", err, everr)
		}
	}
}

// expand makes room for n bytes more of what is neither a blob nor pending. They
// count until that is measured again. It runs in the committer.
func (c *Cache) expand(n int64) error {
	n = roundUp(n)
	if err := c.claimByEvicting(ListedDomain, n); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.claim(ListedDomain, -n)
	c.overhead += n
	c.ahead += n
	return nil
}

// mayGo is how many bytes could be evicted.
func (c *Cache) mayGo() int64 {
	c.order.mu.Lock()
	defer c.order.mu.Unlock()
	return c.order.queue.Free()
}

// keepBounds runs in the committer, now and then: others write to the disk, the
// index grows, and the bound may be lower than it was.
func (c *Cache) keepBounds() {
	short, _, err := c.tryReserve(ListedDomain, 0)
	switch {
	case short <= 0:
		return
	case c.mayGo() == 0:
		c.noteTrouble(fmt.Errorf("%w: %d bytes over the bounds, and what is stored is all pinned or being read", err, short))
		return
	}
	before := c.Stats().Evicted
	if err := c.evict(short); err != nil {
		c.noteTrouble(err)
	}
	after := c.Stats().Evicted
	if after == before {
		return
	}
	c.log.Sugar().Infow("evicted what was over the bounds", "objects", after.Objects-before.Objects, "bytes", after.Bytes-before.Bytes)
}

// evict frees so many bytes, or all that may go. It runs in the committer.
func (c *Cache) evict(short int64) error {
	for short > 0 {
		c.followTags() // what they pin does not go
		victims := c.choose(short)
		if len(victims) == 0 {
			return nil
		}
		freed, err := c.evictAll(victims)
		if err != nil {
			return err
		}
		short -= freed
	}
	return nil
}

// choose takes what goes first, as many bytes, or a batch.
func (c *Cache) choose(short int64) (victims []digest.Digest) {
	c.order.mu.Lock()
	defer c.order.mu.Unlock()
	q := c.order.queue
	for free := q.Free(); len(victims) < maxBatch && free-q.Free() < short; {
		d, ok := q.Take()
		if !ok {
			break
		}
		victims = append(victims, d)
	}
	return victims
}

// evictAll evicts what was taken: the row, then the file. What cannot go stays in
// the order. It runs in the committer.
func (c *Cache) evictAll(victims []digest.Digest) (freed int64, failed error) {
	c.images.due = true
	c.index.Drop(victims...)
	c.hot.drop(victims...) // with the rows gone, nobody brings them back
	var gone Evicted
	for _, d := range victims {
		err := failed
		if err == nil {
			err = c.store.Remove(d)
		}
		failed = err
		c.order.mu.Lock()
		if err != nil {
			c.order.queue.PutBack(d)
		} else {
			gone.Bytes += c.order.queue.Evict(d)
			gone.Objects++
		}
		c.order.mu.Unlock()
		if err == nil {
			c.unstray(d) // whoever adopts finds that it has gone
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.used -= gone.Bytes
	c.evicted.Objects += gone.Objects
	c.evicted.Bytes += gone.Bytes
	return gone.Bytes, failed
}

// Evicted is what had to make room since the start.
type Evicted struct {
	Objects int64 `json:"objects"`
	Bytes   int64 `json:"bytes"`
}

// restoreOrder enters what is stored, with the bytes that it takes, as it was
// ranked when it was used last.
func (c *Cache) restoreOrder(stored map[digest.Digest]int64) {
	type ranked struct {
		d digest.Digest
		u index.Use
	}
	var known []ranked
	c.index.Uses(func(d digest.Digest, u index.Use) {
		if _, ok := stored[d]; ok {
			known = append(known, ranked{d, u})
		}
	})
	slices.SortFunc(known, func(a, b ranked) int { return a.u.Time.Compare(b.u.Time) })
	c.order.mu.Lock()
	defer c.order.mu.Unlock()
	q := c.order.queue
	for _, k := range known {
		q.Restore(k.d, stored[k.d], evict.Rank{Uses: k.u.Uses, Priority: k.u.Priority})
		delete(stored, k.d)
	}
	for d, alloc := range stored {
		q.Restore(d, alloc, evict.Rank{})
	}
	c.index.Children(q.Lead)
	c.index.Tags(func(_ index.TagKey, t index.Tag) {
		if t.Digest != "" {
			q.Tag(t.Digest)
		}
	})
	for _, k := range known {
		if k.u.Lost {
			q.Lose(k.d)
		}
	}
}

const (
	// growth is what directories and small files may take more of before the
	// overhead is measured again.
	growth = 64 << 10
	// smallGrowth of that is a small file's that is written anew: room for what it
	// takes now is kept besides.
	smallGrowth = growth / 4
)

// measureOverhead takes what all but blobs and pending files takes on disk now.
func (c *Cache) measureOverhead() {
	var taken int64
	limit := c.index.Limit()
	take := func(path string) (n int64) {
		if info, err := os.Lstat(path); err == nil {
			n = blobstore.Allocated(info)
		}
		taken += n
		return n
	}
	for _, dir := range c.store.Directories() {
		take(dir)
	}
	ahead := int64(growth)
	entries, _ := os.ReadDir(c.opts.Dir) // as far as it can be read
	for _, e := range entries {
		switch path := filepath.Join(c.opts.Dir, e.Name()); {
		case !e.Type().IsRegular():
		case e.Name() == indexName:
			ahead += max(0, limit-take(path))
		case e.Name() == pinsName || e.Name() == listName:
			ahead += take(path)
		default:
			take(path)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.overhead, c.ahead = taken+ahead, ahead
}
