// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"tarn/blobstore"
	"tarn/index"
	"tarn/internal/manifest"
	"tarn/internal/regular"

	"github.com/opencontainers/go-digest"
)

// stray is a file under blobs/ that has no row.
type stray struct {
	digest digest.Digest
	info   fs.FileInfo
}

// open brings rows and files to agree as far as that takes no hashing: pending
// files of an earlier process are parked or go, rows without a file go. A file
// of another size than its row says is found when it is opened: looking at each
// would take most of the start. It returns the files
// without a row, which count as used from now on.
func (c *Cache) open() (strays []stray, err error) {
	if c.store, err = blobstore.Open(c.opts.Dir, c.opts.Steps); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.closeParked()
			c.store.Close()
		}
	}()
	left, deleted, err := c.store.Left()
	if err != nil {
		return nil, err
	}
	for _, d := range deleted {
		c.dropped.add(Key{Digest: d})
	}
	if err := c.openIndex(); err != nil {
		return nil, err
	}
	rows := make(map[digest.Digest]index.Object)
	c.index.Objects(func(d digest.Digest, o index.Object) { rows[d] = o })
	foreign, stored := 0, make(map[digest.Digest]int64, len(rows))
	err = c.store.Walk(func(d digest.Digest, e fs.DirEntry) error {
		if row, ok := rows[d]; ok {
			c.used += row.Alloc
			stored[d] = row.Alloc
			delete(rows, d)
			return nil
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("walk the blobs: %.100q: %w", e.Name(), bare(err))
		}
		c.used += blobstore.Allocated(info)
		if blobstore.CheckDigest(d) != nil {
			foreign++
			return nil
		}
		strays = append(strays, stray{d, info})
		return nil
	})
	if err != nil {
		c.cancel() // the index's writer must not wait for a committer that there is not
		return nil, errors.Join(err, c.index.Close())
	}
	gone := slices.Collect(maps.Keys(rows))
	c.index.Drop(gone...)
	// What has no row may make room like all others, and may be pinned.
	for _, s := range strays {
		stored[s.digest] = blobstore.Allocated(s.info)
		c.strays[s.digest] = true
	}
	c.restoreOrder(stored)
	c.measureOverhead()
	c.readPins()
	c.order.queue.Resume() // nobody else has it yet
	c.images.due = true
	parked := c.restoreAll(left)
	swept := len(deleted) + len(left) - parked
	if parked+swept+len(gone)+len(strays)+foreign > 0 {
		c.log.Sugar().Infow("reconciled the data directory",
			"pending_kept", parked, "pending_swept", swept, "rows_without_file", len(gone), "files_to_adopt", len(strays), "foreign_files", foreign)
	}
	return strays, nil
}

// bare is an error of a file without its path, which may be any bytes.
func bare(err error) error {
	var of *fs.PathError
	if errors.As(err, &of) {
		return of.Err
	}
	return err
}

// restoreAll parks what the flights of an earlier process left, as far as there
// is room, and returns how many files that is.
func (c *Cache) restoreAll(left []*blobstore.Pending) int {
	for _, l := range left {
		k, p, closed, err := restore(l)
		if _, stored := c.index.Object(k.Domain, k.Digest); err == nil && stored {
			err = errors.New("the object is stored")
		}
		if err == nil && (c.parked[k] != nil || len(c.parked) >= maxParked) {
			err = errors.New("there are others")
		}
		if err == nil {
			p.claim = claimFor(p.size)
			_, _, err = c.reserveFree(k.Domain, p.claim)
		}
		if err == nil && closed {
			if err = p.reopen(); err != nil {
				c.unreserve(k.Domain, p.claim)
			}
		}
		if err != nil {
			c.log.Sugar().Infow("a download that was broken off starts anew", "digest", l.Digest, "cause", err.Error())
			c.dropped.add(k)
			c.giveUpLeft(k.Domain, l)
			continue
		}
		if !closed {
			c.dropped.add(k)
		}
		c.parked[k] = &p
	}
	return len(c.parked)
}

const (
	indexName  = "index.db"
	brokenName = "index.db.broken"
)

// openIndex opens the index. A broken one is set aside, over the one that was
// set aside before, so that however often it happens the disk holds two.
func (c *Cache) openIndex() error {
	path := filepath.Join(c.opts.Dir, indexName)
	ix, err := c.openMarked(path)
	// The directory is ours, so nobody who has it locked is a tarn.
	if errors.Is(err, index.ErrBroken) || errors.Is(err, index.ErrLocked) {
		c.log.Sugar().Errorw("the index is set aside and rebuilt from the blobs", "cause", err.Error(), "kept_as", brokenName)
		rerr := c.opts.Steps.Do("set index aside", func() error { return os.Rename(path, filepath.Join(c.opts.Dir, brokenName)) })
		if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			return errors.Join(err, rerr)
		}
		ix, err = index.Open(path, c.indexOptions())
	}
	if err != nil {
		return err
	}
	c.index = ix
	return nil
}

// indexOptions have registries that are not listed fill no more of the index than a
// part of their share of the room.
func (c *Cache) indexOptions() index.Options {
	return index.Options{
		Steps:         c.opts.Steps,
		Listed:        c.opts.Listed,
		StrangersFile: c.opts.MaxSize / strangersShare / 2,
		Aside:         filepath.Join(c.opts.Dir, brokenName),
		Grow:          c.growIndex,
		Trouble:       c.noteIndexTrouble,
	}
}

// maxOpenings in a row may end with the process before an index is believed to
// be what ends it.
const maxOpenings = 2

// openMarked opens the index, unless the last processes to do so did not
// survive it. The marker counts them.
func (c *Cache) openMarked(path string) (*index.Index, error) {
	marker := path + ".opening"
	tries, _ := regular.Read(marker, maxOpenings)
	var ix *index.Index
	err := fmt.Errorf("%w: opening it has ended %d processes", index.ErrBroken, len(tries))
	if len(tries) < maxOpenings {
		// Without a marker it is as it was.
		c.opts.Steps.Do("write marker", func() error { return regular.Replace(marker, append(tries, '.'), 0o600) })
		ix, err = index.Open(path, c.indexOptions())
	}
	c.opts.Steps.Do("remove marker", func() error { return os.Remove(marker) })
	return ix, err
}

// expect enters strays that adoptAll is to be started with, unless the cache is
// being closed.
func (c *Cache) expect(strays []stray) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	for _, s := range strays {
		c.strays[s.digest] = true
	}
	c.adopt += len(strays)
	c.flying.Add(1)
	return true
}

// strayFile opens a file that nobody has looked at yet, for who may have what
// the listed registries deliver: they are believed to have delivered it.
func (c *Cache) strayFile(req Request) *suspect {
	if !c.isStray(req.Digest) || req.Domain != ListedDomain || !req.Authorised {
		return nil
	}
	held := c.await(req.Digest)
	file, err := c.store.Open(req.Digest)
	if err != nil {
		c.letGo(held)
		return nil
	}
	info, err := file.Stat()
	s := &suspect{file, info, index.Object{}, held}
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		c.forgo(s)
		return nil
	}
	s.row.Size = info.Size()
	return s
}

// adoption is a stray whose bytes were read.
type adoption struct {
	stray
	sound    bool            // they are what the name says
	children []digest.Digest // if it is a manifest
	done     chan struct{}   // closed when it has a row, or none for good
}

func (c *Cache) isStray(d digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.strays[d]
}

// unstray takes a file off the strays, and tells whether it was one: whoever
// does that sees to its bytes, and nobody else.
func (c *Cache) unstray(d digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.strays[d]
	delete(c.strays, d)
	return was
}

// adoptAll hashes the strays, one after the other, and has the committer take
// them in or remove them. Requests are served meanwhile; one for a stray
// fetches it and finds the same bytes. What the disk does not read is tried again, later
// each time.
func (c *Cache) adoptAll(strays []stray) {
	defer c.flying.Done()
	n := len(strays)
	strays = c.adoptOnce(strays)
	for pause := firstAdoptPause; len(strays) > 0; pause = min(2*pause, lastAdoptPause) {
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
			strays = c.adoptOnce(strays)
		case <-c.ctx.Done():
			timer.Stop()
			return
		}
	}
	if c.ctx.Err() != nil {
		return
	}
	c.log.Sugar().Infow("adopted files without a row", "files", n)
}

const (
	firstAdoptPause = time.Second
	lastAdoptPause  = 10 * time.Minute
)

// adoptOnce returns those that cannot be read now.
func (c *Cache) adoptOnce(strays []stray) (unread []stray) {
	for _, s := range strays {
		sound, err := c.hashes(c.ctx, s.digest, 0, nil)
		if c.ctx.Err() != nil {
			return nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			// It may be sound. Its bytes count.
			c.log.Sugar().Warnw("could not read a file without a row", "digest", s.digest, "cause", err.Error())
			unread = append(unread, s)
			continue
		}
		a := adoption{stray: s, sound: sound, done: make(chan struct{})}
		if size := s.info.Size(); sound && size <= manifest.MaxSize {
			body, _ := c.store.Read(s.digest, size) // without it, it leads nowhere
			if manifest.Looks(body[:min(len(body), manifest.Prefix)], size) {
				a.children = childrenOf(body)
			}
		}
		select {
		case c.adoptions <- a:
			<-a.done
		case <-c.ctx.Done():
			return nil
		}
	}
	return unread
}

// hashes tells whether the file's bytes are what its name says. It reads rate
// bytes a second, or as fast as it can when that is 0, and reports each piece. The file
// is held meanwhile, like anybody's who reads.
func (c *Cache) hashes(ctx context.Context, d digest.Digest, rate int64, report func(n int)) (bool, error) {
	held := c.await(d)
	defer c.letGo(held)
	f, err := c.store.Open(d)
	if errors.Is(err, syscall.ELOOP) || errors.Is(err, syscall.ENXIO) {
		return false, nil // a link, or a socket
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return false, err // there is no end to some
	}
	v := d.Verifier()
	buf := make([]byte, 1<<20)
	for ctx.Err() == nil {
		n, err := f.Read(buf)
		v.Write(buf[:n])
		if report != nil {
			report(n)
		}
		if rate > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(time.Duration(int64(n) * int64(time.Second) / rate)):
			}
		}
		if err == io.EOF {
			return v.Verified(), nil
		}
		if err != nil {
			return false, err
		}
	}
	return false, ctx.Err()
}

// settle runs in the committer: it adopts a sound stray for the listed domain,
// since nobody knows any more who delivered it, and removes another.
func (c *Cache) settle(a adoption) {
	defer close(a.done)
	c.adoptOne(a)
	c.unstray(a.digest) // only now, so that who asks meanwhile finds the one or the other
	c.mu.Lock()
	c.adopt--
	c.mu.Unlock()
	c.repinIfDue()
}

func (c *Cache) adoptOne(a adoption) {
	row, known := c.index.Row(a.digest)
	alloc := blobstore.Allocated(a.info)
	switch {
	case known && a.sound: // a flight of any domain has stored it meanwhile, or a request has had it looked at
		alloc = row.Alloc
	case known || !c.isStray(a.digest): // it has gone, and another one may have come
		return
	case a.sound:
		row = describe(index.Object{Size: a.info.Size(), Alloc: alloc, Created: time.Now()}, a.info)
	default:
		if err := c.store.Remove(a.digest); err != nil {
			c.noteTrouble(fmt.Errorf("remove a stray file: %w", err))
			c.leftOver(a.digest, alloc)
		} else {
			c.forget(a.digest, alloc)
		}
		return
	}
	c.index.Put(index.Stored{Digest: a.digest, Domain: ListedDomain, Object: row, Children: a.children})
	c.enter(a.digest, alloc, a.children)
}

func (c *Cache) addUsed(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.used += n
}
