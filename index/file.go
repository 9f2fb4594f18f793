// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"tarn/internal/fault"
	"tarn/internal/regular"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sync/errgroup"
)

var (
	// ErrLocked: another process has the index open.
	ErrLocked = errors.New("index is in use by another process")
	// ErrBroken: the file is no index, or one from a newer tarn.
	ErrBroken = errors.New("index is broken")
	// errFull: the file would have to grow, and may not.
	errFull = errors.New("the index has no room to grow")
	// errInvalidVersion is an ErrBroken.
	errInvalidVersion = errors.New("version of the rows is not known to this tarn")
)

const (
	// version of the rows' format. Another one is not read.
	version = 4
	// growStep is how much a file beyond that size grows at a time. bbolt's own
	// 16 MiB is too much where the bound on the directory is small.
	growStep = 1 << 20
	// openTimeout is how long another process may take to let go of the file.
	openTimeout = time.Second
	// openings is how often a file is opened that the disk does not read, and
	// openPause how long the disk is given in between.
	openings  = 3
	openPause = 100 * time.Millisecond
)

// file is the bbolt file. It is for whoever opens the index, and then for one goroutine,
// the writer. Nothing of bbolt's is touched anywhere else, so that what it panics or
// faults on is caught in one place, and a lock that it leaves locked is nobody's.
type file struct {
	path, aside string
	steps       fault.Steps
	db          *bolt.DB // nil: there is none just now
	left        look     // what it looked like after the last transaction
	spoilt      bool     // it is broken, and kept for whoever looks into that
	limit       atomic.Int64
}

// look tells a file from another one, and from itself after somebody wrote to it.
// Times are only as fine as the kernel's clock ticks, so the first pages count, too,
// which change with each transaction.
type look struct {
	inode    uint64
	size     int64
	modified int64
	head     uint32 // the sum of bbolt's two meta pages
}

func (f *file) look() (l look, err error) {
	opened, err := regular.Open(f.path, os.O_RDONLY, 0)
	if err != nil {
		return l, err
	}
	defer opened.Close()
	info, err := opened.Stat()
	if err != nil {
		return l, err
	}
	head := make([]byte, 2*os.Getpagesize())
	n, err := opened.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return l, err
	}
	l = look{size: info.Size(), modified: info.ModTime().UnixNano(), head: crc32.ChecksumIEEE(head[:n])}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		l.inode = st.Ino
	}
	return l, nil
}

// changed tells whether somebody else has written to the file, or taken it away. Where
// that was done just when a transaction ended, before the look at what it left, bbolt
// finds its first pages to be none, or to speak of more pages than there are.
func (f *file) changed() error {
	now, err := f.look()
	switch {
	case errors.Is(err, os.ErrNotExist), err == nil && now != f.left && f.left != (look{}): // which it is where the last look failed
		return fmt.Errorf("%w: somebody else has changed the file", ErrBroken)
	case err != nil:
		return nil // where the disk does not tell, a transaction will
	}
	f.left = now
	return f.view(func(tx *bolt.Tx) error {
		if tx.Size() > now.size {
			return fmt.Errorf("%w: it was cut", ErrBroken)
		}
		return nil
	})
}

// guarded has what bbolt panics on, a page that is not what it should be, and what
// the memory map faults on, a file that was cut, be an ErrBroken.
func guarded(do func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", ErrBroken, p)
		}
	}()
	return do()
}

// open opens the file or makes a new one.
func (f *file) open() (err error) {
	for n := range openings {
		if n > 0 {
			time.Sleep(openPause)
		}
		if err = f.tryOpen(); !errors.Is(err, syscall.EIO) {
			break
		}
	}
	if err != nil {
		return err
	}
	if err = f.check(); err != nil {
		f.close()
		return err
	}
	f.left, err = f.look()
	f.limit.Store(f.left.size + nextGrowth(f.left.size))
	return err
}

// nextGrowth is what a file of that size may grow by next: bbolt doubles a small one,
// and adds growStep to a larger one.
func nextGrowth(size int64) int64 {
	const least = 64 << 10
	return min(size+least, 2*growStep)
}

func (f *file) tryOpen() error {
	var db *bolt.DB
	err := guarded(func() error {
		return f.steps.Do("open index", func() (err error) {
			db, err = bolt.Open(f.path, 0o600, &bolt.Options{
				Timeout:      openTimeout,
				OpenFile:     regular.Open,
				FreelistType: bolt.FreelistMapType,
			})
			return err
		})
	})
	if err != nil && db != nil {
		db.Close()
	}
	switch {
	case err == nil:
		db.AllocSize = growStep
		f.db = db
		return nil
	case errors.Is(err, ErrBroken):
		return err
	case errors.Is(err, berrors.ErrTimeout):
		return ErrLocked
	case slices.ContainsFunc(notTheFile, func(no error) bool { return errors.Is(err, no) }):
		return fmt.Errorf("open the index: %w", err)
	default:
		// bbolt has no sentinel for a file that is too short or cut.
		return fmt.Errorf("%w: %w", ErrBroken, err)
	}
}

// notTheFile are errors that say nothing of the index itself.
var notTheFile = []error{
	os.ErrPermission, os.ErrNotExist, syscall.EROFS, syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM,
}

// check makes the buckets of a new file, or looks for those of one that is not. It
// writes only where it must: a disk may be full.
func (f *file) check() error {
	fresh, former := false, false
	err := f.view(func(tx *bolt.Tx) error {
		fresh = tx.Bucket(metaBucket) == nil
		for _, name := range formerBuckets {
			former = former || tx.Bucket(name) != nil
		}
		return nil
	})
	switch {
	case err == nil && fresh:
		err = f.update(create)
	case err == nil && former:
		f.update(func(tx *bolt.Tx) error { return dropBuckets(tx, formerBuckets) }) // a disk that refuses it now is asked again at the next start
	}
	if err != nil {
		return err
	}
	return f.view(func(tx *bolt.Tx) error {
		for _, name := range allBuckets {
			if tx.Bucket(name) == nil {
				return fmt.Errorf("%w: it has no bucket %s", ErrBroken, name)
			}
		}
		if v := tx.Bucket(metaBucket).Get(versionKey); len(v) != 8 || binary.BigEndian.Uint64(v) != version {
			return fmt.Errorf("%w: %w", ErrBroken, errInvalidVersion)
		}
		return nil
	})
}

func dropBuckets(tx *bolt.Tx, names [][]byte) error {
	for _, name := range names {
		if tx.Bucket(name) != nil {
			if err := tx.DeleteBucket(name); err != nil {
				return err
			}
		}
	}
	return nil
}

func create(tx *bolt.Tx) error {
	for _, name := range allBuckets {
		if _, err := tx.CreateBucket(name); err != nil {
			return fmt.Errorf("%w: %w", ErrBroken, err)
		}
	}
	return tx.Bucket(metaBucket).Put(versionKey, binary.BigEndian.AppendUint64(nil, version))
}

func (f *file) view(do func(*bolt.Tx) error) error {
	return guarded(func() error { return f.db.View(do) })
}

func (f *file) update(do func(*bolt.Tx) error) error {
	err := guarded(func() error {
		f.db.MaxSize = int(f.limit.Load())
		return f.steps.Do("write index", func() error { return f.db.Update(do) })
	})
	if errors.Is(err, berrors.ErrMaxSizeReached) {
		err = errFull
	}
	var lerr error
	f.left, lerr = f.look()
	if err == nil && lerr == nil { // more room may have been made than was needed
		f.limit.Store(min(f.limit.Load(), f.left.size+nextGrowth(f.left.size)))
	}
	return err
}

// close closes the file.
func (f *file) close() error {
	db := f.db
	f.db = nil
	if db == nil {
		return nil
	}
	return guarded(db.Close)
}

// abandon closes a file that bbolt has panicked on. Nobody waits for it: bbolt may have
// left a lock locked that its closing takes, and then the descriptor and the map stay
// until the process ends.
func (f *file) abandon() {
	if f.db != nil {
		go closeBroken(f.db)
		f.db = nil
	}
}

func closeBroken(db *bolt.DB) { guarded(db.Close) }

// empty drops all rows. A file that is broken is kept for whoever looks into that, and
// there is another one in its place: a start must not find the old one, which may say
// what was taken back since.
func (f *file) empty() error {
	if !f.spoilt && f.db != nil {
		return f.update(func(tx *bolt.Tx) error { return errors.Join(dropBuckets(tx, allBuckets), create(tx)) })
	}
	f.abandon()
	err := f.steps.Do("set index aside", func() error {
		if !f.spoilt { // a stump, which could not be opened
			return os.Remove(f.path)
		}
		return os.Rename(f.path, f.aside)
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("set the index aside: %w", err)
	}
	f.spoilt = false
	if err := f.open(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(f.path))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// apply has the file say what changes say.
func (f *file) apply(changes []change, sequence uint64) error {
	// bbolt takes many new rows in another order in quadratic time.
	slices.SortStableFunc(changes, change.compare)
	return f.update(func(tx *bolt.Tx) error {
		for _, c := range changes {
			b := tx.Bucket(c.bucket)
			var err error
			switch {
			case c.value != nil:
				err = b.Put(c.key, c.value)
			default:
				if err = b.Delete(c.key); err == nil && c.under {
					err = deleteUnder(b, joined(string(c.key), ""))
				}
			}
			if err != nil {
				return err
			}
		}
		if tags := tx.Bucket(tagBucket); sequence > tags.Sequence() {
			return tags.SetSequence(sequence)
		}
		return nil
	})
}

func deleteUnder(b *bolt.Bucket, prefix []byte) error {
	c := b.Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Seek(prefix) {
		if err := c.Delete(); err != nil {
			return err
		}
	}
	return nil
}

// load reads every row, so that a file that is damaged inside is found now. Objects
// and all else are read by two goroutines, since a start waits for it.
func (ix *Index) load() error {
	var loading errgroup.Group
	loading.Go(func() error { return ix.file.view(ix.loadObjects) })
	loading.Go(func() error { return ix.file.view(ix.loadRepositories) })
	return loading.Wait()
}

// forEach calls f for each row of a bucket, and says which one was none.
func forEach(tx *bolt.Tx, bucket []byte, f func(k, v []byte) error) error {
	return tx.Bucket(bucket).ForEach(func(k, v []byte) error {
		if err := f(k, v); err != nil {
			return fmt.Errorf("%w: the row %.300q of %s: %w", ErrBroken, k, bucket, err)
		}
		return nil
	})
}

func (ix *Index) loadObjects(tx *bolt.Tx) error {
	err := forEach(tx, objectBucket, func(k, v []byte) error {
		o := &object{}
		if err := o.row.decode(v); err != nil {
			return err
		}
		if !ix.objects.put(digest.Digest(k), o) {
			return errRow
		}
		return nil
	})
	if err != nil {
		return err
	}
	// Of what has no object, nothing is known any more.
	of := func(k []byte) (o *object, rest []byte) {
		d, rest, _ := bytes.Cut(k, []byte{0})
		o, _ = ix.objects.get(digest.Digest(d))
		return o, rest
	}
	err = errors.Join(
		forEach(tx, possessionBucket, func(k, _ []byte) error {
			if o, domain := of(k); o != nil {
				o.possess(string(domain))
			}
			return nil
		}),
		forEach(tx, childrenBucket, func(k, v []byte) error {
			if o, _ := of(k); o != nil {
				o.children = append(o.children, packDigests(decodeChildren(v))...)
			}
			return nil
		}),
		forEach(tx, useBucket, func(k, v []byte) error {
			var u use
			err := u.decode(v)
			if o, _ := of(k); o != nil {
				o.use = u
			}
			return err
		}))
	for o := range ix.objects.values() {
		if ix.leads.count(o, 1); ix.leads.full() {
			ix.leads.count(o, -1)
			o.children = nil
		}
	}
	return err
}

func (ix *Index) loadRepositories(tx *bolt.Tx) error {
	ix.sequence = tx.Bucket(tagBucket).Sequence()
	// Keys are in order, so that a repository's rows lie together.
	var k RepositoryKey
	var r *repository
	enter := func(upstream, name string) {
		if r == nil || upstream != k.Upstream || name != k.Repository {
			k = RepositoryKey{strings.Clone(upstream), strings.Clone(name)}
			if ix.repositories[k] == nil {
				ix.count(k, repositoryExtent(k))
			}
			r = ix.repository(k)
		}
	}
	return errors.Join(
		forEach(tx, tagBucket, func(key, v []byte) error {
			parts := strings.Split(string(key), "\x00")
			var t Tag
			if err := t.decode(v); err != nil || len(parts) != 3 {
				return errRow
			}
			enter(parts[0], parts[1])
			r.tags[strings.Clone(parts[2])] = t
			ix.count(k, tagExtent(k.TagKey(parts[2])))
			ix.sequence = max(ix.sequence, t.Sequence)
			return nil
		}),
		forEach(tx, membershipBucket, func(key, v []byte) error {
			parts := strings.Split(string(key), "\x00")
			var m Membership
			if err := m.decode(v); err != nil || len(parts) != 4 {
				return errRow
			}
			enter(parts[0], parts[1])
			m.MediaType = ix.types.keep(m.MediaType, ix.isStranger(k))
			if r.setMembership(parts[2], digest.Digest(parts[3]), m) {
				ix.count(k, membershipExtent(k, parts[2]))
			}
			return nil
		}))
}
