// SPDX-License-Identifier: Apache-2.0

// Package store is what is kept: the only owner of "row and file agree".
//
// These hold at every moment, a crash included:
//
//  1. A row implies a file of that size, and vouches for its bytes as long as
//     it looks as it did when they were hashed. (A start sees that there is a file;
//     one that was changed is found when somebody opens it, see verify.go.)
//  2. A file without a row is adopted, after hashing, or removed, after a start.
//     Where the disk does not let go of one, it is the first to be evicted.
//  3. All that the directory takes (blobs, pending files, the index and its next
//     growth, small files, what was removed and is being read still), plus what
//     reservations have yet to write, is at most MaxSize.
//  4. A file is visible under its digest only when it is complete, verified and
//     fsynced; deletion goes row first, in memory, then file.
//  5. No lock is held across I/O.
//  6. A tag row is a dated claim about the authority, never a pin.
//
// Contract: one goroutine, the committer, is the only one that changes what lies
// under blobs/, and whoever wants something changed has it done there, see Do. An
// object is possessed by the source domains that delivered it, and by no other.
// Who reads something holds it, and what is held is not evicted.
//
// Failure model: a disk that refuses a commit loses that object, and the next one
// who asks fetches it again. A file that is not what its digest says is dropped
// before its last bytes go out. An index that breaks is written afresh, and one that cannot be
// read at a start is set aside, and the blobs are adopted.
//
// It never asks anybody for an object, and never knows who may have one.
package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"tarn/blobstore"
	"tarn/index"
	"tarn/internal/fault"
	"tarn/internal/regular"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"
)

var (
	// ErrInUse: another process has the data directory.
	ErrInUse = errors.New("data directory is in use by another tarn")
	// ErrForeign: the data directory has somebody else's files, or a layout that
	// this tarn does not know.
	ErrForeign = errors.New("data directory is not tarn's")
	// ErrClosed: the store is being closed.
	ErrClosed = index.ErrClosed
	// ErrNotStored: there is no such object.
	ErrNotStored = errors.New("not stored")
	// errNoRoom: the bound or the filesystem's minimum of free space is reached.
	errNoRoom = errors.New("no room")
	// errChanged: the file on the disk is not what it was.
	errChanged = errors.New("the file on the disk was changed")
)

// Why an object is stored no more.
type Why int

const (
	ForRoom    Why = iota // something else wanted its room
	OnRequest             // somebody had it removed
	NotAsItWas            // its file was not as it was stored
)

// Options of a store.
type Options struct {
	// Dir is the data directory; one process at a time.
	Dir string
	// MaxSize is the bound in bytes on what the directory takes.
	MaxSize int64
	// MinFree is how many bytes of the filesystem are always left free.
	MinFree int64
	// MinFreeInodes is how many files can always still be made on the filesystem, where
	// that counts them.
	MinFreeInodes int64
	// Listed tells whether the operator has named an upstream: others have only a
	// part of what tarn keeps account of. nil: all are.
	Listed func(upstream string) bool
	// Went is told of each object that is stored no more, why, and how many bytes it
	// has. The committer calls it, and waits for it. nil: nobody wants to know.
	Went func(d digest.Digest, size int64, why Why)
	// Logger is for what happens in the background. nil logs nothing.
	Logger *zap.Logger
	// Steps is for tests, which have some of them fail.
	Steps fault.Steps
}

// Hooks are called by the committer, and by Start for what is there already. Those
// that are nil are not.
type Hooks struct {
	// Entered: an object has its row now; children are what a manifest leads to.
	Entered func(d digest.Digest, children []digest.Digest)
	// Gone: an object is stored no more, and nobody is to hold it as that.
	Gone func(d digest.Digest)
	// Changed: a stored file was found to have other bytes than before, and is
	// dropped. Anybody may call it.
	Changed func(d digest.Digest)
	// Untagged: tags are forgotten. Anybody may call it.
	Untagged func()
	// Follow comes before something goes, and after something has come: what holds
	// objects for what tags mean looks whether they mean something else now.
	Follow func()
	// Tick comes every few seconds, and once at the end.
	Tick func()
	// Spare gives up a pending file that nobody is filling, where all of those make
	// up for what is short; of registries that are not listed only, if so asked. It
	// is called by whoever reserves. It tells whether there is more room now.
	Spare func(strangersOnly bool, short int64) bool
}

// Store is an open data directory. It is safe for concurrent use.
type Store struct {
	opts  Options
	log   *zap.Logger
	hooks Hooks
	lock  *os.File
	blobs *blobstore.Store
	index *index.Index

	order     *order
	hot       *hot
	room      room
	doubts    doubts
	trouble   trouble
	committer committer

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	working sync.WaitGroup // adopter and scrubber
	// verifying: one at a time reads all that is stored.
	verifying sync.Mutex
}

const dirMode = 0o700

// Open opens the data directory and reconciles rows and files, as far as that takes no
// hashing. Nothing is changed before Start.
func Open(opts Options) (s *Store, left []*blobstore.Pending, deleted []digest.Digest, err error) {
	if opts.Logger == nil {
		opts.Logger = zap.NewNop()
	}
	if err := os.MkdirAll(opts.Dir, dirMode); err != nil {
		return nil, nil, nil, fmt.Errorf("data directory: %w", err)
	}
	if err := checkDir(opts.Dir); err != nil {
		return nil, nil, nil, err
	}
	lock, err := lockDir(opts.Dir)
	if err != nil {
		return nil, nil, nil, err
	}
	s = &Store{
		opts:      opts,
		log:       opts.Logger,
		lock:      lock,
		hot:       newHot(),
		order:     newOrder(),
		doubts:    newDoubts(),
		committer: newCommitter(),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if left, deleted, err = s.open(); err != nil {
		s.cancel() // the index's writer must not wait for a committer that there is not
		for _, l := range left {
			l.Close()
		}
		if s.index != nil {
			err = errors.Join(err, s.index.Close())
		}
		if s.blobs != nil {
			s.blobs.Close()
		}
		lock.Close()
		return nil, nil, nil, err
	}
	return s, left, deleted, nil
}

// open returns what an earlier process has left pending. A file of another size than
// its row says is found when it is opened: looking at each would take most of the
// start.
func (s *Store) open() (left []*blobstore.Pending, deleted []digest.Digest, err error) {
	if s.blobs, err = blobstore.Open(s.opts.Dir, s.opts.Steps); err != nil {
		return nil, nil, err
	}
	if left, deleted, err = s.blobs.Left(); err != nil {
		return nil, nil, err
	}
	// A large directory takes as long to read as half of its rows.
	var blobs blobstore.Listing
	var listing sync.WaitGroup
	var lerr error
	listing.Go(func() { blobs, lerr = s.blobs.List() })
	err = s.openIndex()
	listing.Wait()
	if err := cmp.Or(err, lerr); err != nil {
		return left, nil, err
	}
	if err := s.reconcile(blobs); err != nil {
		return left, nil, err
	}
	return left, deleted, nil
}

// reconcile drops rows without a file, and remembers files without a row.
func (s *Store) reconcile(blobs blobstore.Listing) error {
	rows := s.index.Len()
	foreign, found, stored := 0, 0, make(map[digest.Digest]int64, rows)
	err := blobs.Walk(func(d digest.Digest, e fs.DirEntry) error {
		if row, ok := s.index.Row(d); ok {
			s.room.used += row.Alloc
			stored[d] = row.Alloc
			found++
			return nil
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("walk the blobs: %.100q: %w", e.Name(), bare(err))
		}
		alloc := blobstore.Allocated(info)
		s.room.used += alloc
		if blobstore.CheckDigest(d) != nil {
			foreign++
			return nil
		}
		// What has no row may make room like all others, and may be pinned.
		stored[d] = alloc
		s.doubts.strays[d] = info
		return nil
	})
	if err != nil {
		return err
	}
	var gone []digest.Digest
	if found < rows {
		s.index.Objects(func(d digest.Digest, _ index.Object) {
			if _, there := stored[d]; !there {
				gone = append(gone, d)
			}
		})
		s.index.Drop(gone...)
	}
	s.restoreOrder(stored)
	s.measureOverhead()
	if n := len(gone) + len(s.doubts.strays) + foreign; n > 0 {
		s.log.Sugar().Infow("reconciled the data directory",
			"rows_without_file", len(gone), "files_to_adopt", len(s.doubts.strays), "foreign_files", foreign)
	}
	return nil
}

// Start begins the background work. What is to be held before anything can be evicted
// is held by then.
func (s *Store) Start(hooks Hooks) {
	s.hooks = hooks
	s.order.queue.Resume() // nobody else has it yet
	go s.commitLoop()
	s.working.Go(s.scrub)
	if strays := s.doubts.all(); len(strays) > 0 {
		s.working.Go(func() { s.adoptAll(strays) })
	}
}

// Close stores what has landed and closes the index. Nobody lands or reserves anything
// any more when it is called.
func (s *Store) Close() error {
	s.cancel()
	s.working.Wait()
	close(s.committer.done)
	<-s.committer.ended
	return errors.Join(s.index.Close(), s.blobs.Close(), s.lock.Close())
}

// bare is an error of a file without its path, which may be any bytes.
func bare(err error) error {
	var of *fs.PathError
	if errors.As(err, &of) {
		return of.Err
	}
	return err
}

// lockPatience is how long the one before may take to let go of the directory: a
// process that is ending, or a child of it that is just beginning.
const lockPatience = time.Second

// lockDir takes the directory for this process; the kernel lets go of it when
// the process ends, however it ends.
func lockDir(dir string) (*os.File, error) {
	f, err := regular.Open(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if errors.Is(err, regular.ErrNot) {
		return nil, fmt.Errorf("%s in the data directory: %w: remove it", lockName, err)
	}
	if err != nil {
		return nil, fmt.Errorf("data directory is not writable: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	for end := time.Now().Add(lockPatience); errors.Is(err, syscall.EWOULDBLOCK) && time.Now().Before(end); {
		time.Sleep(lockPatience / 50)
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrInUse, dir)
		}
		return nil, fmt.Errorf("lock the data directory: %w", err)
	}
	return f, nil
}

// openIndex opens the index. A broken one is set aside, over the one that was
// set aside before, so that however often it happens the disk holds two.
func (s *Store) openIndex() error {
	path := filepath.Join(s.opts.Dir, indexName)
	ix, err := s.openMarked(path)
	// The directory is ours, so nobody who has it locked is a tarn.
	if errors.Is(err, index.ErrBroken) || errors.Is(err, index.ErrLocked) {
		s.log.Sugar().Errorw("the index is set aside and rebuilt from the blobs", "cause", err.Error(), "kept_as", brokenName)
		rerr := s.opts.Steps.Do("set index aside", func() error { return os.Rename(path, filepath.Join(s.opts.Dir, brokenName)) })
		if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			return errors.Join(err, rerr)
		}
		ix, err = index.Open(path, s.indexOptions())
	}
	if err != nil {
		return err
	}
	s.index = ix
	return nil
}

// indexOptions have registries that are not listed fill no more of the index than a
// part of their share of the room.
func (s *Store) indexOptions() index.Options {
	return index.Options{
		Steps:         s.opts.Steps,
		Listed:        s.opts.Listed,
		StrangersFile: s.opts.MaxSize / StrangersShare / 2,
		Aside:         filepath.Join(s.opts.Dir, brokenName),
		Grow:          s.growIndex,
		Trouble:       s.noteIndexTrouble,
	}
}

// maxOpenings in a row may end with the process before an index is believed to
// be what ends it.
const maxOpenings = 2

// openMarked opens the index, unless the last processes to do so did not
// survive it. The marker counts them.
func (s *Store) openMarked(path string) (*index.Index, error) {
	marker := path + ".opening"
	tries, _ := regular.Read(marker, maxOpenings)
	var ix *index.Index
	err := fmt.Errorf("%w: opening it has ended %d processes", index.ErrBroken, len(tries))
	if len(tries) < maxOpenings {
		// Without a marker it is as it was.
		s.opts.Steps.Do("write marker", func() error { return regular.Replace(marker, append(tries, '.'), 0o600) })
		ix, err = index.Open(path, s.indexOptions())
	}
	s.opts.Steps.Do("remove marker", func() error { return os.Remove(marker) })
	return ix, err
}

// Index is where tags and memberships are noted. Objects are the store's.
func (s *Store) Index() *index.Index { return s.index }

// Path is where an object lies, or would.
func (s *Store) Path(d digest.Digest) string { return s.blobs.Path(d) }

// Dir is the data directory.
func (s *Store) Dir() string { return s.opts.Dir }

// MaxSize is the bound in bytes on what the directory takes.
func (s *Store) MaxSize() int64 { return s.opts.MaxSize }

// Listed tells whether the operator has named an upstream.
func (s *Store) Listed(upstream string) bool {
	return s.opts.Listed == nil || s.opts.Listed(upstream)
}

// Create opens a pending file, for which room was reserved.
func (s *Store) Create(d digest.Digest) (*blobstore.Pending, error) { return s.blobs.Create(d) }

// Stats are for people and metrics.
type Stats struct {
	UsedBytes    int64   // all but what is pending, the index's next growth included
	BlobBytes    int64   // of that, what is stored
	PendingBytes int64   // reserved for what is pending
	Adopting     int     // files without a row, being hashed
	Removing     int     // pending files that the disk does not let go of
	Evicted      Evicted // since the start
	// Trouble is why the disk last refused to store something, or to say so in the
	// index; nil when the last attempt went well.
	Trouble error
}

// Stats returns a snapshot.
func (s *Store) Stats() Stats {
	r := &s.room
	r.mu.Lock()
	out := Stats{UsedBytes: r.used + r.overhead, BlobBytes: r.used, PendingBytes: r.claimed, Removing: len(r.removals), Evicted: r.evicted}
	r.mu.Unlock()
	out.Adopting = s.doubts.adopting()
	t := &s.trouble
	t.mu.Lock()
	defer t.mu.Unlock()
	out.Trouble = cmp.Or(t.disk, t.index)
	return out
}
