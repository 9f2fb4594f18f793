// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"time"

	"tarn/index"
	"tarn/internal/regular"
)

// maxFlights bounds the descriptors of what waits to be committed: a disk that
// is slower than the link must not use them up.
// What registries that are not listed send may be a part of them, one in
// strangersShare.
const maxFlights = 2048

var errTooMany = errors.New("too many objects wait for the disk")

// errNoRoom: the bound or the filesystem's minimum of free space is reached.
var errNoRoom = errors.New("no room")

const (
	// unknownStep is reserved at a time for a body without a length.
	unknownStep = 64 << 20
	// fsBlock is what files are rounded up to on the usual filesystems.
	fsBlock = 4096
)

// claimFor is the room that an object of this size takes while it is pending.
func claimFor(size int64) int64 {
	switch {
	case size < 0:
		return unknownStep
	case size > tailHold && size < math.MaxInt64-journalRoom: // what it leaves has a journal
		return size + journalRoom
	}
	return size
}

// strangersShare is which part of the room, one in so many, may be claimed by
// what registries that are not listed announce, which they need not send, and by
// what the index has of them.
const strangersShare = 4

// reserve claims room for n more bytes of a pending file before any of them is
// written. The caller gives the claim back with unreserve, or has the
// committer turn it into a stored file's bytes. Parked files make room, and then
// what is stored.
func (c *Cache) reserve(domain string, n int64) error {
	short, share, err := c.reserveFree(domain, n)
	if short > 0 && !share && n <= c.opts.MaxSize {
		return c.reserveByEvicting(domain, roundUp(n))
	}
	return err
}

// reserveFree is reserve with nothing evicted. It returns besides what tryReserve
// does.
func (c *Cache) reserveFree(domain string, n int64) (short int64, share bool, err error) {
	if n < 0 || n > c.opts.MaxSize { // before any sum: it may be as large as a number gets
		return n, false, fmt.Errorf("%w: %d bytes are more than max_size, %d", errNoRoom, n, c.opts.MaxSize)
	}
	for {
		short, share, err := c.tryReserve(domain, roundUp(n))
		if short <= 0 || !c.dropParked(share, short) {
			return short, share, err
		}
	}
}

// errMinFree is the errNoRoom of the filesystem.
var errMinFree = fmt.Errorf("%w on the filesystem", errNoRoom)

// tryReserve returns besides by how many bytes it falls short, and whether that
// is by the share of registries that are not listed.
func (c *Cache) tryReserve(domain string, n int64) (short int64, share bool, err error) {
	// What is claimed may be written already, and is not free any more. That takes a
	// look at each file, and is asked only where it makes the difference.
	if short, share, err = c.tryWith(domain, n, func() int64 { return 0 }); errors.Is(err, errMinFree) {
		short, share, err = c.tryWith(domain, n, c.store.PendingBytes)
	}
	return short, share, err
}

func (c *Cache) tryWith(domain string, n int64, pending func() int64) (short int64, share bool, err error) {
	// In this order, whatever is written, given up or committed meanwhile counts as
	// not free rather than as free.
	c.mu.Lock()
	claimed, made := c.claimed, c.made
	c.mu.Unlock()
	unwritten := max(0, claimed-pending())
	free, _, err := c.store.Free()
	if err != nil {
		return 0, false, err
	}
	rows := c.index.StrangersBytes()
	c.mu.Lock()
	defer c.mu.Unlock()
	unwritten += c.made - made
	if short := c.opts.MinFree - (free - unwritten - c.ahead - n); short > 0 {
		return short, false, fmt.Errorf("%w: %d bytes more would leave less than %d free", errMinFree, n, c.opts.MinFree)
	}
	if short := c.used + c.overhead + c.claimed + n - c.opts.MaxSize; short > 0 {
		return short, false, fmt.Errorf("%w: %d bytes more would pass max_size, %d", errNoRoom, n, c.opts.MaxSize)
	}
	if short := c.strangers + rows + n - c.opts.MaxSize/strangersShare; short > 0 && domain != ListedDomain {
		return short, true, fmt.Errorf("%w: %d bytes more would pass the share of registries that are not listed", errNoRoom, n)
	}
	c.claim(domain, n)
	return 0, false, nil
}

// claim is called with the lock.
func (c *Cache) claim(domain string, n int64) {
	c.claimed += n
	c.made += max(0, n)
	if domain != ListedDomain {
		c.strangers += n
	}
}

func (c *Cache) unreserve(domain string, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.claim(domain, -roundUp(n))
}

func roundUp(n int64) int64 { return (n + fsBlock - 1) / fsBlock * fsBlock }

// troublePause is how long the log says nothing of trouble that comes and goes.
const troublePause = time.Minute

// noteTrouble remembers whether the disk stores. It speaks on a change only.
func (c *Cache) noteTrouble(err error) {
	c.mu.Lock()
	c.trouble = err
	c.mu.Unlock()
	c.sayTrouble()
}

// sayTrouble is for the committer, too, which speaks of what has changed too soon
// after it had the last time.
func (c *Cache) sayTrouble() {
	c.mu.Lock()
	err, before := c.trouble, c.said
	if (err == nil) == (before == nil) || time.Since(c.saidAt) < troublePause {
		c.mu.Unlock()
		return
	}
	c.said, c.saidAt = err, time.Now()
	c.mu.Unlock()
	switch {
	case err != nil && before == nil:
		c.log.Sugar().Warnw("objects pass through without being stored", "cause", err.Error())
	case err == nil && before != nil:
		c.log.Sugar().Infow("objects are stored again", "was", before.Error())
	}
}

// noteIndexTrouble is told how each write of the index has ended, by its writer.
func (c *Cache) noteIndexTrouble(err error) {
	c.mu.Lock()
	before := c.unwritten
	c.unwritten = err
	c.mu.Unlock()
	switch log := c.log.Sugar(); {
	case errors.Is(err, index.ErrBroken):
		log.Errorw("the index is set aside and written afresh from memory", "cause", err.Error(), "kept_as", brokenName)
	case err != nil && before == nil:
		log.Warnw("the index is not written: a restart would not know what is new", "cause", err.Error())
	case err == nil && before != nil:
		log.Infow("the index is written again", "was", before.Error())
	}
}

// growIndex makes room for what the index grows by. Its writer waits for it, and once
// the committer has ended, it is the only one that changes anything.
func (c *Cache) growIndex(n int64) error {
	err := c.inCommitter(func() error { return c.expand(n) })
	if errors.Is(err, ErrClosed) {
		select {
		case <-c.committed:
			return c.expand(n)
		default:
		}
	}
	return err
}

// probe finds out whether a disk that refused stores again, when nobody downloads
// anything that would tell. It runs in the committer.
func (c *Cache) probe() {
	c.mu.Lock()
	trouble := c.trouble
	c.mu.Unlock()
	if trouble == nil {
		return
	}
	path := filepath.Join(c.opts.Dir, ".probe")
	if err := c.opts.Steps.Do("probe", func() error { return regular.Replace(path, make([]byte, fsBlock), 0o600) }); err != nil {
		os.Remove(path)
		return
	}
	if os.Remove(path) != nil {
		return
	}
	if _, _, err := c.tryReserve(ListedDomain, 0); err == nil {
		c.noteTrouble(nil)
	}
}
