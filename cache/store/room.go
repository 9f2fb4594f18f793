// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"tarn/blobstore"
	"tarn/index"
)

// room is what counts against the bound, in bytes.
type room struct {
	mu        sync.Mutex
	used      int64 // allocated by blobs and by strangers' files under blobs/
	claimed   int64 // reserved for pending files, written or not
	made      int64 // all that was ever claimed
	strangers int64 // of claimed, by registries that are not listed
	overhead  int64 // of the index and of all else in the directory, their next growth included
	ahead     int64 // that growth
	evicted   Evicted
	removals  []removal // to be tried again
}

// Evicted is what had to make room since the start.
type Evicted struct {
	Objects int64 `json:"objects"`
	Bytes   int64 `json:"bytes"`
}

// fsBlock is what files are rounded up to on the usual filesystems.
const fsBlock = 4096

func roundUp(n int64) int64 { return (n + fsBlock - 1) / fsBlock * fsBlock }

// OnDisk is what a file of so many bytes takes, about; a size may be anything that
// somebody claims.
func OnDisk(size int64) int64 { return roundUp(min(size, math.MaxInt64-fsBlock)) }

// StrangersShare is which part of the room, one in so many, may be claimed by
// what registries that are not listed announce, which they need not send, and by
// what the index has of them.
const StrangersShare = index.StrangersShare

// claim is called with the lock.
func (r *room) claim(domain string, n int64) {
	r.claimed += n
	r.made += max(0, n)
	if domain != index.ListedDomain {
		r.strangers += n
	}
}

// addUsed counts so many bytes more of what is stored.
func (r *room) addUsed(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.used += n
}

// Reserve claims room for n more bytes of a pending file before any of them is
// written. The caller gives the claim back with Unreserve or Discard, or lands the
// file. Pending files that nobody fills make room, and then what is stored. It fails
// with errNoRoom.
func (s *Store) Reserve(domain string, n int64) error {
	short, share, err := s.reserveFree(domain, n)
	if short > 0 && !share && n <= s.opts.MaxSize {
		return s.reserveByEvicting(domain, roundUp(n))
	}
	return err
}

// ReserveFree is Reserve with nothing evicted.
func (s *Store) ReserveFree(domain string, n int64) error {
	_, _, err := s.reserveFree(domain, n)
	return err
}

// reserveFree returns besides what tryReserve does.
func (s *Store) reserveFree(domain string, n int64) (short int64, share bool, err error) {
	if n < 0 || n > s.opts.MaxSize { // before any sum: it may be as large as a number gets
		return n, false, fmt.Errorf("%w: %d bytes are more than max_size, %d", errNoRoom, n, s.opts.MaxSize)
	}
	for {
		short, share, err := s.tryReserve(domain, roundUp(n))
		if short <= 0 || s.hooks.Spare == nil || !s.hooks.Spare(share, short) {
			return short, share, err
		}
	}
}

// errMinFree is the errNoRoom of the filesystem.
var errMinFree = fmt.Errorf("%w on the filesystem", errNoRoom)

// tryReserve returns besides by how many bytes it falls short, and whether that
// is by the share of registries that are not listed.
func (s *Store) tryReserve(domain string, n int64) (short int64, share bool, err error) {
	// What is claimed may be written already, and is not free any more. That takes a
	// look at each file, and is asked only where it makes the difference.
	if short, share, err = s.tryWith(domain, n, func() int64 { return 0 }); errors.Is(err, errMinFree) {
		short, share, err = s.tryWith(domain, n, s.blobs.PendingBytes)
	}
	return short, share, err
}

func (s *Store) tryWith(domain string, n int64, pending func() int64) (short int64, share bool, err error) {
	// In this order, whatever is written, given up or committed meanwhile counts as
	// not free rather than as free.
	r, opts := &s.room, s.opts
	r.mu.Lock()
	claimed, made := r.claimed, r.made
	r.mu.Unlock()
	unwritten := max(0, claimed-pending())
	free, inodes, err := s.blobs.Free()
	if err != nil {
		return 0, false, err
	}
	if short := s.shortOfInodes(n, inodes); short > 0 {
		return short, false, fmt.Errorf("%w: %d files can be made there still, and %d are to be left", errMinFree, inodes, opts.MinFreeInodes)
	}
	rows := s.index.StrangersBytes()
	r.mu.Lock()
	defer r.mu.Unlock()
	unwritten += r.made - made
	if short := opts.MinFree - (free - unwritten - r.ahead - n); short > 0 {
		return short, false, fmt.Errorf("%w: %d bytes more would leave less than %d free", errMinFree, n, opts.MinFree)
	}
	if short := r.used + r.overhead + r.claimed + n - opts.MaxSize; short > 0 {
		return short, false, fmt.Errorf("%w: %d bytes more would pass max_size, %d", errNoRoom, n, opts.MaxSize)
	}
	if short := r.strangers + rows + n - opts.MaxSize/StrangersShare; short > 0 && domain != index.ListedDomain {
		return short, true, fmt.Errorf("%w: %d bytes more would pass the share of registries that are not listed", errNoRoom, n)
	}
	r.claim(domain, n)
	return 0, false, nil
}

// shortOfInodes is how many bytes must go, so that with them as many files go as there
// are inodes too few: by the average, since what goes is chosen by what it is worth.
func (s *Store) shortOfInodes(n, free int64) int64 {
	const perDownload = 2 // its file and its journal
	missing := s.opts.MinFreeInodes - free
	if n > 0 {
		missing += perDownload
	}
	if s.opts.MinFreeInodes <= 0 || free < 0 || missing <= 0 {
		return 0
	}
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	return missing * max(fsBlock, s.room.used/max(1, int64(s.index.Len())))
}

// Unreserve gives a claim back.
func (s *Store) Unreserve(domain string, n int64) {
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	s.room.claim(domain, -roundUp(n))
}

// Room is how many bytes could be stored if all that is went.
func (s *Store) Room() (int64, error) {
	free, _, err := s.blobs.Free()
	r := &s.room
	r.mu.Lock()
	defer r.mu.Unlock()
	return min(s.opts.MaxSize-r.overhead, r.used+free-r.ahead-s.opts.MinFree), err
}

// Discard deletes a pending file and gives back what was claimed for it. What the disk
// does not let go of counts until it does.
func (s *Store) Discard(domain string, p *blobstore.Pending, claim int64) {
	r := removal{domain, p, claim}
	if err := r.try(s); err != nil {
		s.NoteTrouble(err)
		s.room.mu.Lock()
		defer s.room.mu.Unlock()
		s.room.removals = append(s.room.removals, r)
	}
}

// DiscardLeft deletes what an earlier process left. Until it is gone it counts.
func (s *Store) DiscardLeft(domain string, p *blobstore.Pending) {
	var claim int64
	if info, err := p.File.Stat(); err == nil {
		claim = blobstore.Allocated(info)
	}
	s.room.mu.Lock()
	s.room.claim(domain, roundUp(claim))
	s.room.mu.Unlock()
	s.Discard(domain, p, claim)
	p.Close()
}

// removal is a pending file that the disk did not let go of.
type removal struct {
	domain  string
	pending *blobstore.Pending
	claim   int64 // its bytes count until it is gone
}

func (r removal) try(s *Store) error {
	err := r.pending.Discard()
	if err == nil {
		s.Unreserve(r.domain, r.claim)
	}
	return err
}

// retryRemovals runs in the committer.
func (s *Store) retryRemovals() {
	s.room.mu.Lock()
	due := s.room.removals
	s.room.removals = nil
	s.room.mu.Unlock()
	due = slices.DeleteFunc(due, func(r removal) bool { return r.try(s) == nil })
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	s.room.removals = append(s.room.removals, due...)
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
func (s *Store) measureOverhead() {
	var taken int64
	limit := s.index.Limit()
	take := func(path string) (n int64) {
		if info, err := os.Lstat(path); err == nil {
			n = blobstore.Allocated(info)
		}
		taken += n
		return n
	}
	for _, dir := range s.blobs.Directories() {
		take(dir)
	}
	ahead := int64(growth)
	entries, _ := os.ReadDir(s.opts.Dir) // as far as it can be read
	for _, e := range entries {
		switch path := filepath.Join(s.opts.Dir, e.Name()); {
		case !e.Type().IsRegular():
		case e.Name() == indexName:
			ahead += max(0, limit-take(path))
		case e.Name() == PinsName || e.Name() == ListName:
			ahead += take(path)
		default:
			take(path)
		}
	}
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	s.room.overhead, s.room.ahead = taken+ahead, ahead
}

// Expand makes room for n bytes more of what is neither a blob nor pending. They
// count until that is measured again. It runs in the committer, before Start, or in the
// index's writer when the committer has ended.
func (s *Store) Expand(n int64) error {
	n = roundUp(n)
	if err := s.claimByEvicting(index.ListedDomain, n); err != nil {
		return err
	}
	r := &s.room
	r.mu.Lock()
	defer r.mu.Unlock()
	r.claim(index.ListedDomain, -n)
	r.overhead += n
	r.ahead += n
	return nil
}

// Grow makes room for n bytes more in a small file of the directory that is not the
// store's own. It waits for the committer.
func (s *Store) Grow(n int64) error { return s.Do(func() error { return s.Expand(n) }) }

// growIndex makes room for what the index grows by. Its writer waits for it, and once
// the committer has ended, it is the only one that changes anything.
func (s *Store) growIndex(n int64) error {
	err := s.Do(func() error { return s.Expand(n) })
	if errors.Is(err, ErrClosed) {
		select {
		case <-s.committer.ended:
			return s.Expand(n)
		default:
		}
	}
	return err
}

// WriteFile replaces a small file of the directory as one step. For much more than the
// file takes now it makes room; less is always there. What is not durable may be empty
// after a power cut, and is what the next start writes anyway. It runs in the
// committer, or before Start.
func (s *Store) WriteFile(what, name string, data []byte, durable bool) error {
	path := filepath.Join(s.opts.Dir, name)
	more := roundUp(int64(len(data))) - smallGrowth
	if info, err := os.Lstat(path); err == nil {
		more -= blobstore.Allocated(info)
	}
	if more > 0 {
		if err := s.Expand(more); err != nil {
			return err
		}
	}
	defer s.measureOverhead()
	return s.replace(what, path, data, durable)
}

func (s *Store) replace(what, path string, data []byte, durable bool) error {
	steps, temporary := s.opts.Steps, path+".new"
	err := steps.Do("write "+what, func() error {
		if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		f, err := os.OpenFile(temporary, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		if _, err = f.Write(data); durable {
			err = errors.Join(err, f.Sync())
		}
		return errors.Join(err, f.Close())
	})
	if err == nil {
		err = steps.Do("rename "+what, func() error { return os.Rename(temporary, path) })
	}
	if err != nil {
		os.Remove(temporary)
		return err
	}
	if durable {
		err = steps.Do("fsync for "+what, func() error { return syncDir(s.opts.Dir) })
	}
	return err
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
