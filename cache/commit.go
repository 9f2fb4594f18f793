// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"errors"
	"io/fs"
	"os"
	"time"

	"tarn/blobstore"
	"tarn/index"

	"github.com/opencontainers/go-digest"
)

const (
	// commitWindow is how long the first verified flight of a batch may wait
	// for others: nobody waits for a commit, and a pull has a dozen objects.
	commitWindow = 50 * time.Millisecond
	maxBatch     = 512
	// noteInterval bounds how far the list of images is behind, and is how often
	// all is done that nobody waits for.
	noteInterval = 4 * time.Second
)

// commitLoop is the only goroutine that changes what lies under blobs/, and so
// the only place where rows and files can come apart. For each batch:
//
//	fsync the files, rename them, fsync the directory   (blobstore.Commit)
//	enter the rows, in memory; the index's writer has them in its file soon
//
// A crash before that leaves a file without a row, which the next start adopts.
// What goes, goes the other way round: the row in memory first, then the file.
// A crash may leave a row in the index's file then, which the next start drops.
func (c *Cache) commitLoop() {
	defer close(c.committed)
	notes := time.NewTicker(noteInterval)
	defer notes.Stop()
	c.keepBounds() // which may have been others for the last process
	c.layOut()
	for {
		select {
		case f := <-c.verified:
			batch, waits := c.gather(f)
			c.commit(batch)
			if waits != nil {
				c.provide(waits, true)
			}
		case d := <-c.drops:
			c.drop(d)
		case a := <-c.adoptions:
			c.settle(a)
		case f := <-c.findings:
			c.take(f)
		case s := <-c.shortages:
			c.provide(s, true)
		case f := <-c.calls:
			f()
		case <-notes.C:
			c.retryRemovals()
			c.dropBad()
			c.probe()
			c.untag(c.index.Trim())
			c.followTags()
			if c.pins.partly != nil {
				c.repin()
			}
			if c.pins.unwritten {
				c.writePins()
			}
			c.layOut()
			c.measureOverhead()
			c.keepBounds()
			c.sayTrouble()
		case <-c.done:
			for { // what was verified before the last flight landed
				select {
				case f := <-c.verified:
					batch, _ := c.gather(f)
					c.commit(batch)
				default:
					c.followTags()
					if c.pins.unwritten {
						c.writePins()
					}
					c.layOut()
					return
				}
			}
		}
	}
}

// followTags has pins and list follow the tags that moved.
func (c *Cache) followTags() {
	if c.tagMoved.Swap(false) {
		c.repinIfDue()
		c.images.due = true
	}
}

// gather waits a little for more flights to commit together, but not when somebody
// waits for room: of what is committed, some may go.
func (c *Cache) gather(first *flight) (batch []*flight, waits *shortage) {
	batch = []*flight{first}
	window := time.NewTimer(commitWindow)
	defer window.Stop()
	for len(batch) < maxBatch {
		select {
		case f := <-c.verified:
			batch = append(batch, f)
		case s := <-c.shortages:
			if !c.provide(s, false) {
				return batch, s
			}
		case <-window.C:
			return batch, nil
		case <-c.ctx.Done():
			return batch, nil
		}
	}
	return batch, nil
}

// commit stores the batch. A flight that cannot be stored is dropped: its
// readers keep the open file, and the next request fetches it again.
func (c *Cache) commit(batch []*flight) {
	c.followTags()
	var (
		files []*blobstore.Pending
		rows  []index.Stored
		fresh []*flight // one for each file
	)
	now := time.Now()
	inBatch := make(map[digest.Digest]*flight)
	var twins []*flight // the same digest from two domains: one file, two possessions
	for _, f := range batch {
		if row, ok := c.stored(f.key.Digest); ok {
			rows = append(rows, index.Stored{Digest: f.key.Digest, Domain: f.key.Domain, Object: row})
			continue
		}
		if inBatch[f.key.Digest] != nil {
			twins = append(twins, f)
			continue
		}
		inBatch[f.key.Digest] = f
		files = append(files, f.pending)
		fresh = append(fresh, f)
	}
	var trouble error
	var stored []*flight
	var grown int64
	// Bytes that count of what lies in their places, before and after.
	replaced, placed := make([]int64, len(fresh)), make(map[*flight]int64)
	hashed := make([]fs.FileInfo, len(fresh)) // what they look like, soon after
	for i, f := range fresh {
		replaced[i] = c.countedOf(f.key.Digest)
		hashed[i], _ = f.pending.File.Stat()
	}
	for i, err := range c.store.Commit(files) {
		f := fresh[i]
		if err != nil {
			trouble = err
			continue
		}
		info, err := os.Lstat(c.store.Path(f.key.Digest))
		if err != nil {
			trouble = err
			continue
		}
		row := describe(index.Object{Size: f.size, Alloc: blobstore.Allocated(info), Created: now}, info)
		if !sameBytes(hashed[i], info) {
			row.Verified = time.Unix(0, 0) // it is hashed again when it is asked for
		}
		rows = append(rows, index.Stored{Digest: f.key.Digest, Domain: f.key.Domain, Object: row, Children: f.children})
		for _, t := range twins {
			if t.key.Digest == f.key.Digest {
				rows = append(rows, index.Stored{Digest: t.key.Digest, Domain: t.key.Domain, Object: row})
			}
		}
		placed[f] = row.Alloc
		c.unstray(f.key.Digest) // if one lay there
		stored = append(stored, f)
	}
	c.index.Put(rows...)
	if trouble != nil {
		c.noteTrouble(trouble)
	}
	c.measureOverhead()
	for i, f := range fresh {
		now, ok := placed[f]
		if !ok { // a disk that failed may have left anything there
			now = c.inPlaceOf(f.key.Digest)
		}
		grown += now - replaced[i]
		if ok {
			continue
		}
		if now == 0 {
			grown += c.takenOff(f.key.Digest)
		} else if _, known := c.index.Row(f.key.Digest); !known && !c.isStray(f.key.Digest) {
			c.leftOver(f.key.Digest, now)
		}
	}
	for _, f := range stored {
		c.enter(f.key.Digest, placed[f], f.children)
		f.held = c.await(f.key.Digest) // for its readers, until the last has gone
	}
	c.repinIfDue()
	c.mu.Lock()
	c.used += grown
	for _, f := range stored {
		c.claim(f.key.Domain, -roundUp(f.claim)) // its bytes are counted as used now
		f.claim = 0                              // nobody else looks at it before the table's reference is back
		if !f.pending.Gone() {
			f.claim = journalRoom
			c.claim(f.key.Domain, roundUp(f.claim))
		}
	}
	c.mu.Unlock()
	c.keepBounds() // the index may have grown
	for _, f := range batch {
		f.leaveTable()
		if p := c.takeParked(f.key); p != nil {
			c.discard(f.key, p)
		}
	}
}

// sameBytes tells whether a file was not written to since it looked as before.
func sameBytes(before, info fs.FileInfo) bool {
	if before == nil {
		return false
	}
	b, l := blobstore.LookOf(before), blobstore.LookOf(info) // renaming counts as a change
	return before.Size() == info.Size() && b.Inode == l.Inode && b.Modified == l.Modified
}

// countedOf is how many bytes are counted of what lies, or should lie, under a digest.
func (c *Cache) countedOf(d digest.Digest) int64 {
	if row, ok := c.index.Row(d); ok {
		return row.Alloc
	}
	c.order.mu.Lock()
	defer c.order.mu.Unlock()
	size, _ := c.order.queue.Size(d)
	return size
}

// inPlaceOf is how many bytes are to be counted of that.
func (c *Cache) inPlaceOf(d digest.Digest) int64 {
	if row, ok := c.index.Row(d); ok {
		return row.Alloc
	}
	info, err := os.Lstat(c.store.Path(d))
	if err != nil {
		return 0
	}
	return blobstore.Allocated(info)
}

// stored tells whether the digest has a row, of whichever domain, and a file
// to it.
func (c *Cache) stored(d digest.Digest) (index.Object, bool) {
	row, ok := c.index.Row(d)
	if !ok {
		return row, false
	}
	file, info, err := c.openFile(d, row)
	if err != nil {
		return row, lacksDescriptors(err) // then nothing is known
	}
	file.Close()
	return row, !c.isBad(d, info)
}

// drop forgets an object whose file is missing or of another size, row first.
func (c *Cache) drop(d digest.Digest) {
	row, ok := c.index.Row(d)
	if _, sound := c.stored(d); !ok || sound {
		return // it was replaced meanwhile
	}
	c.remove([]index.Stored{{Digest: d, Object: row}})
	c.log.Sugar().Warnw("dropped an object whose file was not as it was stored", "digest", d)
}

// remove takes objects away, rows first. What the disk does not let go of makes room
// before all others.
func (c *Cache) remove(objects []index.Stored) (gone Evicted, failed error) {
	for _, o := range objects {
		c.index.Drop(o.Digest)
		c.hot.drop(o.Digest) // with the row gone, nobody brings it back
		if err := c.store.Remove(o.Digest); err != nil {
			c.leftOver(o.Digest, o.Object.Alloc)
			c.noteTrouble(err)
			failed = errors.Join(failed, err)
			continue
		}
		c.forget(o.Digest, o.Object.Alloc)
		gone.Objects++
		gone.Bytes += o.Object.Alloc
	}
	return gone, failed
}
