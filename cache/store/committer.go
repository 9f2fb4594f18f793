// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"io/fs"
	"os"
	"sync"
	"time"

	"tarn/blobstore"
	"tarn/index"

	"github.com/opencontainers/go-digest"
)

const (
	// commitWindow is how long the first object of a batch may wait for others:
	// nobody waits for a commit, and a pull has a dozen objects.
	commitWindow = 50 * time.Millisecond
	maxBatch     = 512
	// tickInterval is how often all is done that nobody waits for.
	tickInterval = 4 * time.Second
)

// committer is how others reach the goroutine that changes what lies under blobs/.
type committer struct {
	calls chan func()   // to be run there
	woken chan struct{} // there is something in landed
	done  chan struct{} // closed by Close when nobody lands anything more
	ended chan struct{} // closed by the committer when it ends

	mu     sync.Mutex
	landed []Landing
}

func newCommitter() committer {
	return committer{calls: make(chan func()), woken: make(chan struct{}, 1), done: make(chan struct{}), ended: make(chan struct{})}
}

// waiting tells whether there is something to commit.
func (c *committer) waiting() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.landed) > 0
}

// take returns what is to be committed next.
func (c *committer) take() (batch []Landing) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := min(len(c.landed), maxBatch)
	batch, c.landed = c.landed[:n:n], c.landed[n:]
	return batch
}

// A Landing is a pending file that is complete and verified.
type Landing struct {
	Domain      string
	Digest      digest.Digest
	Pending     *blobstore.Pending
	Size, Claim int64
	// Children are what a manifest leads to.
	Children []digest.Digest
	// Done is called once, by the committer, when the object is stored or dropped:
	// either way its readers keep the open file. held is theirs until the last has
	// gone, nil where there is no file; claim is what is claimed for the file still.
	Done func(held Lease, claim int64)
}

// Land hands a file over to be stored.
func (s *Store) Land(l Landing) {
	c := &s.committer
	c.mu.Lock()
	c.landed = append(c.landed, l)
	c.mu.Unlock()
	select {
	case c.woken <- struct{}{}:
	default: // it is awake
	}
}

// Do has f run in the committer, and returns its error, or ErrClosed.
func (s *Store) Do(f func() error) error {
	done := make(chan error, 1)
	select {
	case s.committer.calls <- func() { done <- f() }:
		return <-done
	case <-s.ctx.Done():
		return ErrClosed
	}
}

// commitLoop is the committer.
func (s *Store) commitLoop() {
	c := &s.committer
	defer close(c.ended)
	tick := time.NewTicker(tickInterval)
	defer tick.Stop()
	var window <-chan time.Time // nil while there is nothing to commit
	s.keepBounds()              // which may have been others for the last process
	s.housekeep(false)
	for {
		select {
		case <-c.woken:
			if window == nil {
				window = time.After(commitWindow)
			}
		case <-window:
			window = nil
			if s.commit(); c.waiting() { // others have their turn in between
				window = time.After(0)
			}
		case f := <-c.calls:
			f()
		case <-tick.C:
			s.housekeep(true)
		case <-c.done:
			for c.waiting() {
				s.commit()
			}
			s.follow()
			s.housekeep(false)
			return
		}
	}
}

// housekeep does what nobody waits for, all of it or what others have to do.
func (s *Store) housekeep(all bool) {
	if all {
		s.retryRemovals()
		s.dropBad()
		s.probe()
		s.untag(s.index.Trim())
	}
	s.follow()
	s.noteUses()
	if s.hooks.Tick != nil {
		s.hooks.Tick()
	}
	if all {
		s.measureOverhead()
		s.keepBounds()
		s.sayTrouble()
	}
}

// Housekeep does now what is done every few seconds.
func (s *Store) Housekeep() error { return s.Do(func() error { s.housekeep(true); return nil }) }

// commit stores a batch of what has landed:
//
//	fsync the files, rename them, fsync the directory   (blobstore.Commit)
//	enter the rows, in memory; the index's writer has them in its file soon
//
// A crash before that leaves a file without a row, which the next start adopts. What
// goes, goes the other way round: the row in memory first, then the file. A crash
// may leave a row in the index's file then, which the next start drops.
func (s *Store) commit() {
	s.follow()
	s.commitBatch(s.committer.take())
	s.follow()
	s.keepBounds()
}

// landing is one of a batch.
type landing struct {
	Landing
	counted int64       // bytes that count of what lies in its place
	hashed  fs.FileInfo // what it looked like, soon after it was hashed
	row     index.Object
	stored  bool
}

// commitBatch stores a batch. What cannot be stored is dropped: the next who asks
// fetches it again.
func (s *Store) commitBatch(batch []Landing) {
	var rows []index.Possession
	var files []*blobstore.Pending
	var fresh []*landing                      // one for each file
	lands := make(map[digest.Digest]*landing) // those
	all := make([]*landing, 0, len(batch))
	for _, l := range batch {
		one := &landing{Landing: l}
		all = append(all, one)
		if row, ok := s.sound(l.Digest); ok {
			rows = append(rows, index.Possession{Digest: l.Digest, Domain: l.Domain, Object: row, Children: l.Children})
		} else if lands[l.Digest] == nil { // else it is of another domain: one file, two possessions
			one.counted = s.countedOf(l.Digest)
			one.hashed, _ = l.Pending.File.Stat()
			lands[l.Digest] = one
			fresh, files = append(fresh, one), append(files, l.Pending)
		}
	}
	for i, err := range s.blobs.Commit(files) {
		if err == nil {
			err = fresh[i].describe(s.blobs.Path(fresh[i].Digest))
		}
		if err != nil {
			s.NoteTrouble(err)
		}
	}
	for _, l := range all {
		if file := lands[l.Digest]; file != nil && file.stored {
			rows = append(rows, index.Possession{Digest: l.Digest, Domain: l.Domain, Object: file.row, Children: file.Children})
		}
	}
	s.index.Put(rows...)
	s.measureOverhead()
	s.account(fresh)
	for _, l := range all {
		if l.stored {
			s.doubts.unstray(l.Digest) // if one lay there
			s.enter(l.Digest, l.row.Alloc, l.Children)
			l.Done(s.await(l.Digest), l.Claim)
		} else {
			l.Done(nil, l.Claim)
		}
	}
}

// describe takes what was committed into the row.
func (l *landing) describe(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	l.row = describe(index.Object{Size: l.Size, Alloc: blobstore.Allocated(info), Created: time.Now()}, info)
	if !sameBytes(l.hashed, info) {
		l.row.Verified = time.Unix(0, 0) // it is hashed again when it is asked for
	}
	l.stored = true
	return nil
}

// account counts what a batch has put under blobs/, and takes that off what was
// claimed.
func (s *Store) account(fresh []*landing) {
	var grown int64
	for _, l := range fresh {
		now := l.row.Alloc
		if !l.stored { // a disk that failed may have left anything there
			now = s.inPlaceOf(l.Digest)
		}
		grown += now - l.counted
		switch _, known := s.index.Row(l.Digest); {
		case l.stored:
		case now == 0:
			grown += s.takenOff(l.Digest)
		case !known && !s.doubts.isStray(l.Digest):
			s.leftOver(l.Digest, now)
		}
	}
	r := &s.room
	r.mu.Lock()
	defer r.mu.Unlock()
	r.used += grown
	for _, l := range fresh {
		if !l.stored {
			continue
		}
		r.claim(l.Domain, -roundUp(l.Claim)) // its bytes are counted as used now
		l.Claim = 0
		if !l.Pending.Gone() { // its journal is left
			l.Claim = journalRoom
			r.claim(l.Domain, roundUp(l.Claim))
		}
	}
}

// journalRoom is what a journal takes at most.
const journalRoom = 64 << 10

// sameBytes tells whether a file was not written to since it looked as before.
func sameBytes(before, info fs.FileInfo) bool {
	if before == nil {
		return false
	}
	b, l := blobstore.LookOf(before), blobstore.LookOf(info) // renaming counts as a change
	return before.Size() == info.Size() && b.Inode == l.Inode && b.Modified == l.Modified
}

// countedOf is how many bytes are counted of what lies, or should lie, under a digest.
func (s *Store) countedOf(d digest.Digest) int64 {
	if row, ok := s.index.Row(d); ok {
		return row.Alloc
	}
	s.order.mu.Lock()
	defer s.order.mu.Unlock()
	size, _ := s.order.queue.Size(d)
	return size
}

// inPlaceOf is how many bytes are to be counted of that.
func (s *Store) inPlaceOf(d digest.Digest) int64 {
	if row, ok := s.index.Row(d); ok {
		return row.Alloc
	}
	info, err := os.Lstat(s.blobs.Path(d))
	if err != nil {
		return 0
	}
	return blobstore.Allocated(info)
}

// sound tells whether the digest has a row, of whichever domain, and a file
// to it.
func (s *Store) sound(d digest.Digest) (index.Object, bool) {
	row, ok := s.index.Row(d)
	if !ok {
		return row, false
	}
	file, info, err := s.openFile(d, row)
	if err != nil {
		return row, lacksDescriptors(err) // then nothing is known
	}
	file.Close()
	return row, !s.doubts.isBad(d, info)
}

// drop forgets an object whose file is missing or of another size, row first. It runs
// in the committer.
func (s *Store) drop(d digest.Digest) {
	row, ok := s.index.Row(d)
	if _, sound := s.sound(d); !ok || sound {
		return // it was replaced meanwhile
	}
	s.remove(d, row, NotAsItWas)
	s.log.Sugar().Warnw("dropped an object whose file was not as it was stored", "digest", d)
}

// dropSoon has the committer look at an object whose file is not as its row says.
// Nobody waits for it: where the committer has other things to do, the next reader
// finds it again.
func (s *Store) dropSoon(d digest.Digest) {
	select {
	case s.committer.calls <- func() { s.drop(d) }:
	default:
		s.doubts.dropLater(d)
	}
}

// Remove takes objects away that are stored, and tells how many have gone. It runs in
// the committer.
func (s *Store) Remove(ds []digest.Digest) (gone Evicted, failed error) {
	for _, d := range ds {
		row, ok := s.index.Row(d)
		if !ok {
			continue
		}
		if err := s.remove(d, row, OnRequest); err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		gone.Objects++
		gone.Bytes += row.Alloc
	}
	return gone, failed
}

// remove takes an object away, row first. What the disk does not let go of makes room
// before all others.
func (s *Store) remove(d digest.Digest, row index.Object, why Why) error {
	s.index.Drop(d)
	s.went(d, row.Size, why)
	s.hot.drop(d) // with the row gone, nobody brings it back
	if err := s.blobs.Remove(d); err != nil {
		s.leftOver(d, row.Alloc)
		s.NoteTrouble(err)
		return err
	}
	s.forget(d, row.Alloc)
	return nil
}
