// SPDX-License-Identifier: Apache-2.0

// Package index is the bbolt file that remembers what the blobs are: objects,
// what they lead to, tags, memberships, possessions and uses.
//
// Contract: objects and possessions are written at once, by Apply. Tags,
// memberships and uses are notes: they are read back at once,
// but written with the next Apply or Flush, uses with one a minute, so that
// answering a request costs no transaction; a crash loses at most the notes since then,
// and each of them is only a reason not to ask a registry again, or to keep
// one object rather than another. Values are copied out of bbolt's memory map
// before a transaction ends.
//
// Failure model: Open fails with ErrLocked when another process has the file,
// and with ErrBroken when it is no index or one from a newer tarn; the caller
// sets it aside then and rebuilds it from the blobs. The same may be found out
// later, since bbolt panics on a page that is not what it should be, and a file
// that was cut faults: from then on nothing is known and nothing can be written,
// until Renew. Any other error is the disk's.
//
// It never touches a blob, and never knows HTTP.
package index

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"tarn/internal/fault"
	"tarn/internal/regular"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

var (
	// ErrLocked: another process has the index open.
	ErrLocked = errors.New("index is in use by another process")
	// ErrBroken: the file is no index, or one from a newer tarn.
	ErrBroken = errors.New("index is broken")
	// ErrFull: the file would have to grow beyond its limit. Nothing was written.
	ErrFull = errors.New("index would grow beyond its limit")
)

// version of the rows' format. A higher one is not read.
const version = 4

var (
	metaBucket       = []byte("meta")
	objectBucket     = []byte("objects")
	tagBucket        = []byte("tags")
	membershipBucket = []byte("memberships")
	possessionBucket = []byte("possessions")
	useBucket        = []byte("uses")
	childrenBucket   = []byte("children")
	versionKey       = []byte("version")
	allBuckets       = [][]byte{metaBucket, objectBucket, tagBucket, membershipBucket, possessionBucket, useBucket, childrenBucket}
	// formerBuckets are those of earlier versions: who had a yes is not kept any more.
	formerBuckets     = [][]byte{[]byte("yeses"), []byte("challenges")}
	errInvalidVersion = errors.New("version of the rows is not known to this tarn")
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
// that the tag means Digest.
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

// RepositoryKey names a repository: the canonical upstream name, and the
// repository's name there.
type RepositoryKey struct {
	Upstream, Repository string
}

func (k RepositoryKey) bytes(rest ...string) []byte {
	b := make([]byte, 0, 128)
	b = append(b, k.Upstream...)
	b = append(b, 0)
	b = append(b, k.Repository...)
	for _, r := range rest {
		b = append(b, 0) // in none of the names, so that keys cannot run together
		b = append(b, r...)
	}
	return b
}

// TagKey is the key of a tag's row.
func (k RepositoryKey) TagKey(tag string) string { return string(k.bytes(tag)) }

// MembershipKey is the key of an object's row in this repository; kind is
// "manifests" or "blobs".
func (k RepositoryKey) MembershipKey(kind string, d digest.Digest) string {
	return string(k.bytes(kind, d.String()))
}

// Index is an open index. It is safe for concurrent use.
type Index struct {
	path  string
	steps fault.Steps
	limit atomic.Int64 // of the file, in bytes; 0: none

	// writing is held around each transaction that writes. bbolt has such a
	// lock, too, but one that a panic may leave locked.
	writing sync.Mutex

	// using is held for reading around each transaction; it guards what
	// follows.
	using  sync.RWMutex
	db     *bolt.DB
	broken error // why nothing is known any more; nil while all is well

	// mu guards the notes, which stand before the rows of the same key until
	// they are written. No transaction runs under it.
	mu          sync.Mutex
	tags        notes[Tag]
	memberships notes[*Membership] // nil: deleted
	uses        map[digest.Digest]Use
	usesFrom    time.Time // the first of uses, about
	applied     uint64    // how often notes were written and forgotten
	bounds      Bounds
}

// useInterval is for how long uses are gathered: each hit makes one, and
// writing those of many objects takes as long as serving them.
const useInterval = time.Minute

// growStep is how much a file beyond that size grows at a time. bbolt's own
// 16 MiB is too much where the bound on the directory is small.
const growStep = 1 << 20

// smallest is what a transaction that deletes one object may need at most.
const smallest = 64 << 10

// openTimeout is how long another process may take to let go of the file.
const openTimeout = time.Second

// Open opens the index or makes a new one. Each row is read once, so that a
// file that is damaged inside is found now and not in the middle of a request.
// Outside of tests, steps is nil.
func Open(path string, steps fault.Steps, bounds Bounds) (ix *Index, err error) {
	db, err := openDB(path, steps)
	if err != nil {
		return nil, err
	}
	ix = &Index{
		path:        path,
		steps:       steps,
		db:          db,
		tags:        notes[Tag]{now: make(map[string]Tag), most: maxTags},
		memberships: notes[*Membership]{now: make(map[string]*Membership), most: maxMemberships},
		bounds:      bounds,
		uses:        make(map[digest.Digest]Use),
	}
	if err := ix.check(); err != nil {
		db.Close()
		return nil, err
	}
	return ix, nil
}

// view runs a transaction that reads.
func (ix *Index) view(f func(*bolt.Tx) error) error {
	return ix.guarded(func(db *bolt.DB) error {
		tx, err := begin(db)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		return f(tx)
	})
}

// begin begins a transaction that reads. When bbolt panics there, on meta pages that are
// not what they should be, it leaves two locks behind, for which all others who read
// would wait for ever: they are unlocked, and whoever comes next panics, too.
func begin(db *bolt.DB) (tx *bolt.Tx, err error) {
	begun := false
	defer func() {
		if !begun {
			fields := reflect.ValueOf(db).Elem()
			(*sync.RWMutex)(fields.FieldByName("mmaplock").Addr().UnsafePointer()).RUnlock()
			(*sync.Mutex)(fields.FieldByName("metalock").Addr().UnsafePointer()).Unlock()
		}
	}()
	tx, err = db.Begin(false)
	begun = true
	return tx, err
}

// update runs one that writes.
func (ix *Index) update(f func(*bolt.Tx) error) error {
	ix.writing.Lock()
	defer ix.writing.Unlock()
	return ix.change(f)
}

// change is update for who holds writing.
func (ix *Index) change(f func(*bolt.Tx) error) error {
	err := ix.guarded(func(db *bolt.DB) error {
		db.MaxSize = int(ix.limit.Load())
		return ix.steps.Do("write index", func() error { return db.Update(f) })
	})
	if errors.Is(err, berrors.ErrMaxSizeReached) {
		return ErrFull
	}
	return err
}

func (ix *Index) guarded(f func(*bolt.DB) error) (err error) {
	ix.using.RLock()
	db, broken := ix.db, ix.broken
	ix.using.RUnlock()
	if broken != nil {
		return broken
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", ErrBroken, p)
			ix.using.Lock()
			defer ix.using.Unlock()
			if ix.db == db {
				ix.broken = err
			}
		}
	}()
	return f(db)
}

// Broken tells why nothing is known any more, nil while all is well.
func (ix *Index) Broken() error {
	ix.using.RLock()
	defer ix.using.RUnlock()
	return ix.broken
}

// Renew sets a broken file aside, and goes on with an empty one. The notes are
// kept.
func (ix *Index) Renew(aside string) error {
	err := ix.steps.Do("set index aside", func() error { return os.Rename(ix.path, aside) })
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("set the index aside: %w", err)
	}
	db, err := openDB(ix.path, ix.steps)
	if err != nil {
		return err
	}
	fresh := &Index{db: db, steps: ix.steps, bounds: ix.bounds}
	if err := fresh.check(); err != nil {
		db.Close()
		return err
	}
	ix.mu.Lock()
	ix.tags.rows, ix.memberships.rows = fresh.tags.rows, fresh.memberships.rows
	ix.mu.Unlock()
	ix.using.Lock()
	old := ix.db
	ix.db, ix.broken = db, nil
	ix.using.Unlock()
	// Nobody waits for it: what panicked may have left its locks, and then
	// the old map stays until the process ends.
	go closeBroken(old)
	return nil
}

func closeBroken(db *bolt.DB) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { recover() }()
	db.Close()
}

// openings is how often a file is opened that the disk does not read.
const openings = 3

func openDB(path string, steps fault.Steps) (db *bolt.DB, err error) {
	for n := range openings {
		if n > 0 {
			time.Sleep(openPause)
		}
		if db, err = tryOpenDB(path, steps); !errors.Is(err, syscall.EIO) {
			break
		}
	}
	return db, err
}

// openPause is how long a disk is given in between.
const openPause = 100 * time.Millisecond

func tryOpenDB(path string, steps fault.Steps) (db *bolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { // bbolt's, on a page that is not what it should be
		if p := recover(); p != nil {
			db, err = nil, fmt.Errorf("%w: %v", ErrBroken, p)
		}
	}()
	err = steps.Do("open index", func() (err error) {
		db, err = bolt.Open(path, 0o600, &bolt.Options{
			Timeout:      openTimeout,
			OpenFile:     regular.Open,
			FreelistType: bolt.FreelistMapType,
		})
		return err
	})
	if err != nil && db != nil {
		db.Close()
	}
	switch {
	case err == nil:
		db.AllocSize = growStep
		return db, nil
	case errors.Is(err, berrors.ErrTimeout):
		return nil, ErrLocked
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return nil, fmt.Errorf("%w: %w", ErrBroken, err)
	case slices.ContainsFunc(notTheFile, func(no error) bool { return errors.Is(err, no) }):
		return nil, fmt.Errorf("open the index: %w", err)
	default:
		// bbolt has no sentinel for a file that is too short or cut.
		return nil, fmt.Errorf("%w: %w", ErrBroken, err)
	}
}

// notTheFile are errors that say nothing of the index itself.
var notTheFile = []error{
	os.ErrPermission, os.ErrNotExist, syscall.EROFS, syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM,
}

// check makes the buckets of a new file, or reads every row. It writes only
// where it must: a disk may be full.
func (ix *Index) check() error {
	fresh, former := false, false
	err := ix.view(func(tx *bolt.Tx) error {
		fresh = tx.Bucket(metaBucket) == nil
		for _, name := range formerBuckets {
			former = former || tx.Bucket(name) != nil
		}
		return nil
	})
	switch {
	case err == nil && fresh:
		err = ix.update(create)
	case err == nil && former:
		ix.update(dropFormer) // a disk that refuses it now is asked again at the next start
	}
	if err != nil {
		return err
	}
	return ix.view(func(tx *bolt.Tx) error {
		for _, name := range allBuckets {
			if tx.Bucket(name) == nil {
				return fmt.Errorf("%w: it has no bucket %s", ErrBroken, name)
			}
		}
		if v := tx.Bucket(metaBucket).Get(versionKey); len(v) != 8 || binary.BigEndian.Uint64(v) != version {
			return fmt.Errorf("%w: %w", ErrBroken, errInvalidVersion)
		}
		for _, name := range allBuckets {
			into := map[string]row{
				string(objectBucket): &Object{}, string(tagBucket): &Tag{}, string(membershipBucket): &Membership{}, string(useBucket): &Use{},
			}[string(name)]
			count := map[string]*extent{string(tagBucket): &ix.tags.rows, string(membershipBucket): &ix.memberships.rows}[string(name)]
			err := tx.Bucket(name).ForEach(func(k, v []byte) error {
				if into != nil && into.decode(v) != nil {
					return fmt.Errorf("%w: the row %.300q of %s is none", ErrBroken, k, name)
				}
				if count != nil {
					*count = count.with(ix.extentOf(k))
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func dropFormer(tx *bolt.Tx) error {
	for _, name := range formerBuckets {
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

// Close writes the notes and closes the file.
func (ix *Index) Close() error {
	if ix.Broken() != nil {
		return nil // the next start sets it aside
	}
	err := ix.Flush(true)
	if ix.Broken() != nil {
		return nil // bbolt may wait for itself
	}
	return errors.Join(err, ix.db.Close())
}

// Objects calls f for each object. f must not call the index.
func (ix *Index) Objects(f func(digest.Digest, Object)) error {
	return ix.view(func(tx *bolt.Tx) error {
		return tx.Bucket(objectBucket).ForEach(func(k, v []byte) error {
			var o Object
			if err := o.decode(v); err != nil {
				return fmt.Errorf("row of object %.300q: %w", k, err)
			}
			f(digest.Digest(k), o)
			return nil
		})
	})
}

// Uses calls f for each object whose use was written. f must not call the index.
func (ix *Index) Uses(f func(digest.Digest, Use)) error {
	return ix.view(func(tx *bolt.Tx) error {
		return tx.Bucket(useBucket).ForEach(func(k, v []byte) error {
			var u Use
			if err := u.decode(v); err != nil {
				return fmt.Errorf("row of use %.300q: %w", k, err)
			}
			f(digest.Digest(k), u)
			return nil
		})
	})
}

// Children calls f for each object that leads to others. f must not call the
// index.
func (ix *Index) Children(f func(digest.Digest, []digest.Digest)) error {
	return ix.view(func(tx *bolt.Tx) error {
		c := tx.Bucket(childrenBucket).Cursor()
		for k, v := c.First(); k != nil; {
			d := digest.Digest(k)
			var children []digest.Digest
			children, k, v = readChildren(c, d, v)
			f(d, children)
		}
		return nil
	})
}

// ChildrenOf returns what an object leads to.
func (ix *Index) ChildrenOf(d digest.Digest) (children []digest.Digest) {
	ix.view(func(tx *bolt.Tx) error {
		c := tx.Bucket(childrenBucket).Cursor()
		if k, v := c.Seek([]byte(d)); string(k) == string(d) {
			children, _, _ = readChildren(c, d, v)
		}
		return nil
	})
	return children
}

// childrenARow bounds a row: bbolt copies what lies beside it in a page when one is
// deleted, and there must be room for that in a full store. The first row's key is
// the digest, and that of a further one its number besides.
const childrenARow = 512

// readChildren returns the children in the row where the cursor is, v, and in those
// that continue it, and the row behind them.
func readChildren(c *bolt.Cursor, d digest.Digest, v []byte) (children []digest.Digest, behind, value []byte) {
	prefix := append([]byte(d), 0)
	for {
		children = append(children, decodeChildren(v)...)
		behind, v = c.Next()
		if !bytes.HasPrefix(behind, prefix) {
			return children, behind, v
		}
	}
}

func putChildren(b *bolt.Bucket, d digest.Digest, children []digest.Digest) error {
	key := []byte(d)
	n := uint32(0)
	for part := range slices.Chunk(children, childrenARow) {
		if err := b.Put(key, encodeChildren(part)); err != nil {
			return err
		}
		n++
		key = binary.BigEndian.AppendUint32(append([]byte(d), 0), n)
	}
	return nil
}

// Use returns when an object was used last.
func (ix *Index) Use(d digest.Digest) (u Use, ok bool) {
	ix.mu.Lock()
	u, ok = ix.uses[d]
	ix.mu.Unlock()
	if !ok {
		ok = ix.get(useBucket, string(d), &u)
	}
	return u, ok
}

// Tags calls f for each tag, with the parts of its key, in no order.
func (ix *Index) Tags(f func(k RepositoryKey, tag string, t Tag)) error {
	ix.mu.Lock()
	notes := maps.Clone(ix.tags.now)
	ix.mu.Unlock()
	each := func(key string, t Tag) {
		if parts := strings.Split(key, "\x00"); len(parts) == 3 {
			f(RepositoryKey{parts[0], parts[1]}, parts[2], t)
		}
	}
	for key, t := range notes {
		each(key, t)
	}
	return ix.view(func(tx *bolt.Tx) error {
		return tx.Bucket(tagBucket).ForEach(func(k, v []byte) error {
			if _, noted := notes[string(k)]; noted {
				return nil
			}
			var t Tag
			if err := t.decode(v); err != nil {
				return fmt.Errorf("row of tag %.300q: %w", k, err)
			}
			each(string(k), t)
			return nil
		})
	})
}

// Object returns the row of d if the source domain possesses it.
func (ix *Index) Object(domain string, d digest.Digest) (o Object, ok bool) {
	key := []byte(d)
	err := ix.view(func(tx *bolt.Tx) error {
		v := tx.Bucket(objectBucket).Get(key)
		if v == nil || tx.Bucket(possessionBucket).Get(possessionKey(domain, d)) == nil {
			return nil
		}
		ok = true
		return o.decode(v)
	})
	return o, ok && err == nil
}

// Row returns the row of d, whoever possesses it.
func (ix *Index) Row(d digest.Digest) (o Object, ok bool) {
	ok = ix.get(objectBucket, string(d), &o)
	return o, ok
}

// possessionKey starts with the digest, so that all of an object's lie
// together.
func possessionKey(domain string, d digest.Digest) []byte {
	k := append([]byte(d), 0)
	return append(k, domain...)
}

// Tag returns the last confirmation of a tag.
func (ix *Index) Tag(key string) (t Tag, ok bool) {
	ix.mu.Lock()
	t, ok = ix.tags.now[key]
	ix.mu.Unlock()
	if ok {
		return t, true
	}
	ok = ix.get(tagBucket, key, &t)
	return t, ok
}

// Membership returns what is known of an object in a repository.
func (ix *Index) Membership(key string) (m Membership, ok bool) {
	ix.mu.Lock()
	note, noted := ix.memberships.now[key]
	ix.mu.Unlock()
	if noted {
		if note == nil {
			return Membership{}, false
		}
		return *note, true
	}
	ok = ix.get(membershipBucket, key, &m)
	return m, ok
}

func (ix *Index) get(bucket []byte, key string, into row) (ok bool) {
	err := ix.view(func(tx *bolt.Tx) error {
		v := tx.Bucket(bucket).Get([]byte(key))
		if v == nil {
			return nil
		}
		ok = true
		return into.decode(v)
	})
	return ok && err == nil
}

// maxNotes bounds each kind of note that waits to be written, for a disk that
// refuses all writes. Past it, what is not noted costs a question.
const maxNotes = 1 << 17

// NoteTag takes the confirmation unless one with a higher sequence is known, or there
// are too many tags. It returns what the tag meant before, and whether it was taken.
func (ix *Index) NoteTag(key string, t Tag) (before digest.Digest, taken bool) {
	var old Tag
	var ok bool
	ix.readThenLock(func() { old, ok = ix.Tag(key) })
	defer ix.mu.Unlock()
	if note, noted := ix.tags.now[key]; noted {
		old, ok = note, true // another one came in between
	} else if !ix.mayNote(ok, len(ix.tags.now), ix.tags.all(), ix.tags.most, key) {
		return "", false
	}
	if ok && old.Sequence >= t.Sequence {
		return "", false
	}
	ix.tags.set(key, t, ix.extentOf([]byte(key)))
	return old.Digest, true
}

// readThenLock reads what is known, notes and rows, and returns with the lock:
// nothing that was written in between is missing from what was read, save what
// is a note still.
func (ix *Index) readThenLock(read func()) {
	for {
		ix.mu.Lock()
		applied := ix.applied
		ix.mu.Unlock()
		read()
		ix.mu.Lock()
		if ix.applied == applied {
			return
		}
		ix.mu.Unlock()
	}
}

// NoteMembership takes what an authority said, unless there is too much of that; what
// is known already and newer stays.
func (ix *Index) NoteMembership(key string, m Membership) {
	if len(m.MediaType) > maxMediaType {
		m.MediaType = ""
	}
	var old Membership
	var ok bool
	// A deletion that was noted and written since would be undone by what was
	// read before it.
	ix.readThenLock(func() { old, ok = ix.Membership(key) })
	defer ix.mu.Unlock()
	if ok && old.MediaType == m.MediaType && !newer(m.Time, old.Time) && (m.Anonymous.IsZero() || !newer(m.Anonymous, old.Anonymous)) {
		return
	}
	if note, noted := ix.memberships.now[key]; noted {
		if ok = note != nil; ok {
			old = *note
		}
	} else if !ix.mayNote(ok, len(ix.memberships.now), ix.memberships.all(), ix.memberships.most, key) {
		return
	}
	if ok {
		if old.Time.After(m.Time) && !newer(m.Time, old.Time) {
			m.Time, m.MediaType = old.Time, old.MediaType
		}
		if m.Anonymous.IsZero() || old.Anonymous.After(m.Anonymous) && !newer(m.Anonymous, old.Anonymous) {
			m.Anonymous = old.Anonymous
		}
	}
	ix.memberships.set(key, &m, ix.extentOf([]byte(key)))
}

// DeleteMembership forgets what the authority took back. It tells whether there
// was something to forget; only what is flushed is forgotten for good.
func (ix *Index) DeleteMembership(key string) bool {
	if _, ok := ix.Membership(key); !ok {
		return false
	}
	ix.mu.Lock()
	defer ix.mu.Unlock()
	ix.memberships.set(key, nil, ix.extentOf([]byte(key)))
	return true
}

// renewal is how much newer what an authority said must be to be worth a row: a
// burst writes one.
const renewal = time.Second

// newer tells whether a moment is worth a row in place of the old one: it is a
// little later, or so much earlier that the clock was set back.
func newer(t, old time.Time) bool {
	d := t.Sub(old)
	return d >= renewal || d < -time.Minute
}

// Pruning says from before when rows are of no use any more.
type Pruning struct {
	Memberships time.Time
	Tags        time.Time // of what is not stored
}

// Prune drops what is of no use any more. It returns what the dropped tags meant.
func (ix *Index) Prune(p Pruning) (untagged []digest.Digest, err error) {
	type found struct{ key, value []byte }
	old := make(map[string][]found)
	meant := make(map[string]digest.Digest) // by tags that go
	err = ix.view(func(tx *bolt.Tx) error {
		find := func(name []byte, before time.Time, when func(k, v []byte) (time.Time, error)) {
			tx.Bucket(name).ForEach(func(k, v []byte) error {
				if t, err := when(k, v); err == nil && t.Before(before) {
					old[string(name)] = append(old[string(name)], found{bytes.Clone(k), bytes.Clone(v)})
				}
				return nil
			})
		}
		find(membershipBucket, p.Memberships, func(k, v []byte) (time.Time, error) {
			var m Membership
			err := m.decode(v)
			if m.Anonymous.After(m.Time) {
				m.Time = m.Anonymous
			}
			return m.Time, err
		})
		objects := tx.Bucket(objectBucket)
		find(tagBucket, p.Tags, func(k, v []byte) (time.Time, error) {
			var t Tag
			err := t.decode(v)
			if t.Digest == "" || objects.Get([]byte(t.Digest)) != nil {
				return p.Tags, err // it stays
			}
			if err == nil && t.Confirmed.Before(p.Tags) {
				meant[string(k)] = t.Digest
			}
			return t.Confirmed, err
		})
		return nil
	})
	if err != nil || len(old) == 0 {
		return nil, err
	}
	ix.writing.Lock() // no note is written before it is looked at below
	defer ix.writing.Unlock()
	gone := make(map[string]extent)
	err = ix.change(func(tx *bolt.Tx) error {
		for name, rows := range old {
			b := tx.Bucket([]byte(name))
			for _, r := range rows {
				if !bytes.Equal(b.Get(r.key), r.value) {
					delete(meant, string(r.key)) // it was written meanwhile
				} else if err := b.Delete(r.key); err != nil {
					return err
				} else {
					gone[name] = gone[name].with(ix.extentOf(r.key))
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	// Who noted a tag meanwhile has heard what it meant before.
	ix.mu.Lock()
	defer ix.mu.Unlock()
	ix.applied++
	ix.tags.rows = ix.tags.rows.without(gone[string(tagBucket)])
	ix.memberships.rows = ix.memberships.rows.without(gone[string(membershipBucket)])
	for key, d := range meant {
		if _, noted := ix.tags.now[key]; !noted {
			untagged = append(untagged, d)
		}
	}
	return untagged, nil
}

// NoteUse remembers that an object was used.
func (ix *Index) NoteUse(d digest.Digest, u Use) {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	if len(ix.uses) == 0 {
		ix.usesFrom = u.Time
	}
	if len(ix.uses) < maxNotes {
		ix.uses[d] = u
	}
}

// LastSequence is the highest one that a tag's row ever had.
func (ix *Index) LastSequence() (seq uint64, err error) {
	err = ix.view(func(tx *bolt.Tx) error {
		seq = tx.Bucket(tagBucket).Sequence()
		return nil
	})
	return seq, err
}

// A Stored object is one that was committed: its row, and the source domain
// that delivered it; "" where only the row is new.
type Stored struct {
	Digest digest.Digest
	Domain string
	Object Object
	// Children are what a manifest leads to. nil: what is known stays.
	Children []digest.Digest
}

// Apply writes objects and their possessions, and drops objects with theirs, all in
// one transaction. It takes the notes along that are due, if there is room for them
// as well.
func (ix *Index) Apply(put []Stored, drop []digest.Digest) error {
	if n := ix.due(false); n.len() <= notesAWrite { // else they are for a Flush
		err := ix.write(put, drop, n)
		if err == nil {
			ix.wrote(n)
		}
		if !errors.Is(err, ErrFull) {
			return err
		}
	}
	return ix.write(put, drop, batch{})
}

// notesAWrite bounds a transaction: what waits for it does not wait long, and what
// there is no room for is not all done again.
const notesAWrite = 4096

// usesDue is called with the lock.
func (ix *Index) usesDue() bool {
	age := time.Since(ix.usesFrom)
	return len(ix.uses) > maxNotes/2 || len(ix.uses) > 0 && (age >= useInterval || age < 0)
}

// batch is what waits to be written, copied.
type batch struct {
	tags        map[string]Tag
	memberships map[string]*Membership
	uses        map[digest.Digest]Use
}

// due returns the notes that are to be written now, or all.
func (ix *Index) due(all bool) batch {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	n := batch{
		tags:        maps.Clone(ix.tags.now),
		memberships: maps.Clone(ix.memberships.now),
	}
	if all || ix.usesDue() {
		n.uses = maps.Clone(ix.uses)
	}
	return n
}

func (n batch) len() int {
	return len(n.tags) + len(n.memberships) + len(n.uses)
}

// parts are as many notes as a transaction takes, each of rows that lie together.
func (n batch) parts() (parts []batch) {
	for part := range inParts(n.tags) {
		parts = append(parts, batch{tags: part})
	}
	for part := range inParts(n.memberships) {
		parts = append(parts, batch{memberships: part})
	}
	for part := range inParts(n.uses) {
		parts = append(parts, batch{uses: part})
	}
	return parts
}

func inParts[K cmp.Ordered, V any](m map[K]V) iter.Seq[map[K]V] {
	return func(yield func(map[K]V) bool) {
		for keys := range slices.Chunk(slices.Sorted(maps.Keys(m)), notesAWrite) {
			part := make(map[K]V, len(keys))
			for _, k := range keys {
				part[k] = m[k]
			}
			if !yield(part) {
				return
			}
		}
	}
}

// sorted is in the order of the keys: bbolt takes many new rows in another order in
// quadratic time.
func sorted[K cmp.Ordered, V any](m map[K]V) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}

func (ix *Index) write(put []Stored, drop []digest.Digest, n batch) error {
	ix.writing.Lock()
	defer ix.writing.Unlock()
	ix.refresh(n)
	ix.mu.Lock()
	tags, memberships := ix.tags.rows, ix.memberships.rows
	ix.mu.Unlock()
	err := ix.change(func(tx *bolt.Tx) error {
		if err := dropObjects(tx, drop); err != nil {
			return err
		}
		objects, possessions := tx.Bucket(objectBucket), tx.Bucket(possessionBucket)
		for _, s := range put {
			if err := objects.Put([]byte(s.Digest), s.Object.encode()); err != nil {
				return err
			}
			if s.Children != nil {
				if err := putChildren(tx.Bucket(childrenBucket), s.Digest, s.Children); err != nil {
					return err
				}
			}
			if s.Domain == "" {
				continue
			}
			if err := possessions.Put(possessionKey(s.Domain, s.Digest), appendTime(s.Object.Created)); err != nil {
				return err
			}
		}
		return ix.writeBatch(tx, n, &tags, &memberships)
	})
	if err != nil {
		return fmt.Errorf("write the index: %w", err)
	}

	// What was noted anew meanwhile stays a note.
	ix.mu.Lock()
	defer ix.mu.Unlock()
	ix.applied++
	ix.tags.rows, ix.memberships.rows = tags, memberships
	ix.tags.forget(n.tags, ix.extentOf)
	ix.memberships.forget(n.memberships, ix.extentOf)
	forget(ix.uses, n.uses)
	return nil
}

// refresh has the notes be as they are now: what another transaction has written since
// they were looked at, such as what an authority took back, is not written over. It is
// called with writing held, so that they are the last word until they are forgotten.
func (ix *Index) refresh(n batch) {
	ix.mu.Lock()
	defer ix.mu.Unlock()
	refresh(n.tags, ix.tags.now)
	refresh(n.memberships, ix.memberships.now)
	refresh(n.uses, ix.uses)
}

func refresh[K comparable, V any](some, now map[K]V) {
	for k := range some {
		if v, ok := now[k]; ok {
			some[k] = v
		} else {
			delete(some, k)
		}
	}
}

func dropObjects(tx *bolt.Tx, drop []digest.Digest) error {
	for _, d := range drop {
		for _, bucket := range [][]byte{objectBucket, useBucket, childrenBucket} {
			if err := tx.Bucket(bucket).Delete([]byte(d)); err != nil {
				return err
			}
		}
		prefix := append([]byte(d), 0)
		for _, bucket := range [][]byte{possessionBucket, childrenBucket} {
			c := tx.Bucket(bucket).Cursor()
			for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Seek(prefix) {
				if err := c.Delete(); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// Flush writes the notes that are due, or all, if there are any.
func (ix *Index) Flush(all bool) error {
	n := ix.due(all)
	parts := []batch{n}
	switch {
	case n.len() == 0:
		return nil
	case n.len() > notesAWrite:
		parts = n.parts()
	}
	for _, part := range parts {
		if err := ix.write(nil, nil, part); err != nil {
			return err
		}
	}
	ix.wrote(n)
	return nil
}

// wrote has the time of the uses begin again, when all that were due are written.
func (ix *Index) wrote(n batch) {
	if n.uses != nil {
		ix.mu.Lock()
		defer ix.mu.Unlock()
		ix.usesFrom = time.Now()
	}
}

// writeBatch writes notes, but no rows beyond the bounds, and counts what it writes.
func (ix *Index) writeBatch(tx *bolt.Tx, n batch, tags, memberships *extent) error {
	tb, mb := tx.Bucket(tagBucket), tx.Bucket(membershipBucket)
	more := func(b *bolt.Bucket, key string, rows *extent, most int64) bool {
		if b.Get([]byte(key)) != nil {
			return true
		}
		one := ix.extentOf([]byte(key))
		if !ix.within(*rows, one, most, tags.with(*memberships)) {
			return false
		}
		*rows = rows.with(one)
		return true
	}
	for key, t := range sorted(n.tags) {
		if !more(tb, key, tags, ix.tags.most) {
			continue
		}
		if err := tb.Put([]byte(key), t.encode()); err != nil {
			return err
		}
		if t.Sequence > tb.Sequence() {
			if err := tb.SetSequence(t.Sequence); err != nil {
				return err
			}
		}
	}
	for key, m := range sorted(n.memberships) {
		if m == nil && mb.Get([]byte(key)) != nil {
			*memberships = memberships.without(ix.extentOf([]byte(key)))
		} else if m != nil && !more(mb, key, memberships, ix.memberships.most) {
			continue
		}
		var err error
		if m == nil {
			err = mb.Delete([]byte(key))
		} else {
			err = mb.Put([]byte(key), m.encode())
		}
		if err != nil {
			return err
		}
	}
	objects, ub := tx.Bucket(objectBucket), tx.Bucket(useBucket)
	for d, u := range sorted(n.uses) {
		if objects.Get([]byte(d)) == nil {
			continue // dropped meanwhile
		}
		if err := ub.Put([]byte(d), u.encode()); err != nil {
			return err
		}
	}
	return nil
}

func appendTime(t time.Time) []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(t.UnixNano()))
}

// forget deletes from m what is still as it was written.
func forget[K, V comparable](m, written map[K]V) {
	for k, v := range written {
		if m[k] == v {
			delete(m, k)
		}
	}
}

// Counts are numbers of rows.
type Counts struct {
	Objects, Tags, Memberships, Possessions int
}

// Counts counts the rows. It walks the pages and is meant for people.
func (ix *Index) Counts() (c Counts, err error) {
	err = ix.view(func(tx *bolt.Tx) error {
		c.Objects = tx.Bucket(objectBucket).Stats().KeyN
		c.Tags = tx.Bucket(tagBucket).Stats().KeyN
		c.Memberships = tx.Bucket(membershipBucket).Stats().KeyN
		c.Possessions = tx.Bucket(possessionBucket).Stats().KeyN
		return nil
	})
	return c, err
}

// Confine bounds the file to what it takes now and its next growth, and returns that
// in bytes: bbolt doubles a small file and adds growStep to a larger one. What needs
// more fails with ErrFull from then on.
func (ix *Index) Confine() int64 {
	info, err := os.Stat(ix.path)
	if err != nil {
		return ix.limit.Load()
	}
	size := info.Size()
	limit := size + min(size+smallest, 2*growStep)
	ix.limit.Store(limit)
	return limit
}

// Widen lets the file grow by n bytes more.
func (ix *Index) Widen(n int64) { ix.limit.Add(n) }
