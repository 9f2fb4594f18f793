// SPDX-License-Identifier: Apache-2.0

// Package cache owns the agreement of row and file: hits, flights, space,
// eviction, commits, and reconciling at start.
//
// These hold at every moment, a crash included:
//
//  1. A row implies a file of that size, and vouches for its bytes as long as
//     it looks as it did when they were hashed. (New sees to the file; one that
//     was changed is found when it is opened, see recheck.go.)
//  2. A file without a row is adopted, after hashing, or removed, after a start.
//  3. Allocated bytes of blobs, pending files and index, plus what reservations
//     have yet to write, are at most MaxSize.
//  4. A file is visible under its digest only when it is complete, verified and
//     fsynced; deletion goes row first, then file.
//  5. No lock is held across I/O.
//  6. A tag row is a dated claim about the authority, never a pin.
//
// Contract: Open gives an object's bytes, from the disk, from a flight that is
// on its way, or from one that it starts. Rights are the caller's business: an
// object that is there, stored or in flight, is only handed to a request that
// says it is Authorised, and otherwise the request's own Fetch is what asks.
// Objects are shared within a source domain and never across two.
//
// Failure model: the last bytes of an object leave only after its digest
// matched, so a reader of wrong bytes is cut short. When the disk or the bound
// is in the way, the object passes through: each reader has an upstream stream
// of its own, or, of a range, the source's own answer, which is not verified.
// Errors of a Fetch come back as they are.
//
// It never knows HTTP, and never asks anybody but through a Fetch.
package cache

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
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
	// ErrAuthorise: the object is here, and the request has not said that it
	// may have it.
	ErrAuthorise = errors.New("the object is cached: authorise first")
	// ErrRefused is what a Fetch wraps when the refusal concerns its own
	// credential only, so that others who wait must ask for themselves.
	ErrRefused = errors.New("refused")
	// ErrLimited is what a Fetch wraps when its own credential is to wait:
	// others may ask for themselves, and it may ask again.
	ErrLimited = errors.New("limited")
	// ErrBroken: the source sent something else than what the digest names,
	// or stopped in the middle.
	ErrBroken = errors.New("broken body")
	// ErrRange is what a Fetch wraps when the source answers with neither the
	// bytes that were asked for nor the whole object.
	ErrRange = errors.New("not the range that was asked for")
	// ErrDropped: bytes of this object that somebody may have were dropped a short
	// while ago; what is wanted now must not be joined to them. See dropped.go.
	ErrDropped = errors.New("an earlier part of this object may be wrong: read it from the start")
)

// ListedDomain is the source domain that all listed upstreams share. It is no
// legal registry name, so that no registry can claim it.
const ListedDomain = "*"

// Key names an object as one source domain delivered it.
type Key struct {
	Domain string
	Digest digest.Digest
}

// Fetch opens the object at its source from byte off on, n bytes, or to the
// end when n is negative; fewer only where the object ends. A source that does
// not honour ranges may give all of it instead, and says so in Info. The
// context covers the body too. It may be called again, and by several
// goroutines at once, for as long as the flight lasts; whether it may still ask
// is its own affair.
type Fetch func(ctx context.Context, off, n int64) (io.ReadCloser, Info, error)

// Info is what a source says of a body.
type Info struct {
	Size   int64 // of the whole object in bytes, -1 when it does not say
	Offset int64 // first byte of the body
	End    int64 // byte after the body's last, 0 when that is the object's
	// From is the name of the one that sent it, for people; "" when it has none.
	From string
	// Elsewhere has the next Fetch ask another one than this body came from, and
	// tells whether there is one. nil: there is none.
	Elsewhere func() bool
	// Doubtful: nothing tells yet that what was answered is the object at all.
	Doubtful bool
}

func (i Info) end() int64 {
	if i.End > 0 {
		return i.End
	}
	return i.Size
}

// sound tells whether it is the description of a part of an object.
func (i Info) sound() bool {
	if i.Size < 0 {
		return i.Offset == 0
	}
	return 0 <= i.Offset && i.Offset <= i.end() && i.end() <= i.Size
}

// Request asks for an object.
type Request struct {
	Key
	// Reader names who reads, such as repository and credential: only the answer to
	// his own question is his, see Wait.
	Reader string
	// Source names who the Fetch asks. Several of one domain may be asked for
	// the same object; the failures of one are nothing to who asks another.
	Source string
	// Offset is the first byte that is wanted, and Length how many; 0: all that
	// follow.
	Offset, Length int64
	// Ranged: the reader asked for a part, also if that begins at byte 0. It
	// may be asking for the others at the same time.
	Ranged bool
	// Authorised: the authority has said yes to this reader.
	Authorised bool
	// Wait is for who is not Authorised. When the same Reader's question is
	// on its way, as a Fetch that has not answered yet, its answer is waited
	// for: a refusal is this request's too, and after a yes the error is
	// ErrAuthorise as ever, but the caller may know more by then.
	Wait bool
	// Fetch asks the source with this reader's credential.
	Fetch Fetch
	// Ahead has all of the object asked for as soon as its size is known: the
	// right may end before the download does, and an answer that was begun is
	// read to its end.
	Ahead bool
	// Parallel is how many answers of the source a flight may have open at
	// once; with 1 or less it asks for all bytes in one.
	Parallel int
	// Verified is called when the bytes that the Fetch may have brought are the
	// object's, before any reader has the last of them. nil means nobody wants
	// to know.
	Verified func()
	// Check looks at the verified bytes before they are stored; its error
	// fails the flight. nil checks nothing. It is for manifests, which the
	// Fetch has bounded, since it is given the whole body.
	Check func(body []byte) error
}

// Options of a cache.
type Options struct {
	// Dir is the data directory; one process at a time.
	Dir string
	// MaxSize is the bound in bytes on what the directory takes.
	MaxSize int64
	// MinFree is how many bytes of the filesystem are always left free.
	MinFree int64
	// Listed tells whether the operator has named an upstream: others have only a
	// part of what tarn keeps account of. nil: all are.
	Listed func(upstream string) bool
	// Logger is for what happens in the background. nil logs nothing.
	Logger *zap.Logger
	// Steps is for tests, which have some of them fail.
	Steps fault.Steps
}

// Cache is an open data directory. It is safe for concurrent use.
type Cache struct {
	opts    Options
	log     *zap.Logger
	lock    *os.File
	store   *blobstore.Store
	index   *index.Index
	dropped *dropped
	hot     *hot
	order   *order
	pins    pins
	images  imageList
	// verifying: one at a time reads all that is stored.
	verifying sync.Mutex
	// tagMoved: a tag means something else than before, and neither the pins nor
	// the list of images follow yet.
	tagMoved atomic.Bool

	ctx       context.Context // ends with Close: flights live on it, not on a request's
	cancel    context.CancelFunc
	flying    sync.WaitGroup // flights and the adopter
	done      chan struct{}  // closed when all flights have landed
	committed chan struct{}  // closed by the committer, which outlives them, when it ends

	verified  chan *flight       // to the committer
	drops     chan digest.Digest // to the committer: a row whose file is not as it says
	adoptions chan adoption      // to the committer
	findings  chan finding       // to the committer
	shortages chan *shortage     // to the committer
	calls     chan func()        // to the committer

	// mu guards what follows. It is taken after no other lock, and a
	// flight's lock never inside it.
	mu        sync.Mutex
	closed    bool
	flights   map[Key]*flight
	parked    map[Key]*partial // files that a flight left, for the next one
	passing   recent           // what does not fit
	mixed     recent           // what came together wrong
	used      int64            // allocated bytes of blobs and strangers' files under blobs/
	claimed   int64            // reserved for pending files, written or not
	made      int64            // all that was ever claimed
	strangers int64            // of that, by registries that are not listed
	removals  []removal        // to be tried again
	overhead  int64            // bytes of the index and of all else in the directory, their next growth included
	ahead     int64            // that growth
	evicted   Evicted
	adopt     int                              // files yet to be adopted
	strays    map[digest.Digest]bool           // those
	bad       map[digest.Digest]blobstore.Look // files under blobs/ that are not to be used
	trouble   error                            // the disk's last refusal; nil after the next success
	unwritten error                            // why the index's file does not say what memory says
	said      error                            // what the log says of that
	saidAt    time.Time
}

// ErrInUse: another process has the data directory.
var ErrInUse = errors.New("data directory is in use by another tarn")

// ErrForeign: the data directory has somebody else's files, or a layout that this
// tarn does not know.
var ErrForeign = errors.New("data directory is not tarn's")

const dirMode = 0o700

// New opens the data directory, reconciles rows and files, and starts the
// background work.
func New(opts Options) (*Cache, error) {
	if opts.Logger == nil {
		opts.Logger = zap.NewNop()
	}
	if err := os.MkdirAll(opts.Dir, dirMode); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := checkDir(opts.Dir); err != nil {
		return nil, err
	}
	lock, err := lockDir(opts.Dir)
	if err != nil {
		return nil, err
	}
	c := &Cache{
		opts:      opts,
		log:       opts.Logger,
		lock:      lock,
		dropped:   newDropped(),
		hot:       newHot(),
		order:     newOrder(),
		verified:  make(chan *flight, maxBatch),
		drops:     make(chan digest.Digest, maxBatch),
		adoptions: make(chan adoption),
		findings:  make(chan finding),
		shortages: make(chan *shortage),
		calls:     make(chan func()),
		done:      make(chan struct{}),
		committed: make(chan struct{}),
		flights:   make(map[Key]*flight),
		parked:    make(map[Key]*partial),
		passing:   make(recent),
		mixed:     make(recent),
		strays:    make(map[digest.Digest]bool),
		bad:       make(map[digest.Digest]blobstore.Look),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	strays, err := c.open()
	if err != nil {
		c.cancel()
		lock.Close()
		return nil, err
	}
	go c.commitLoop()
	c.flying.Add(1)
	go c.scrub()
	if len(strays) > 0 && c.expect(strays) {
		go c.adoptAll(strays)
	}
	return c, nil
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

// Close ends the flights, writes what is verified, and closes the index. A
// second one does nothing.
func (c *Cache) Close() error {
	c.mu.Lock()
	closed := c.closed
	c.closed = true
	c.mu.Unlock()
	if closed {
		return nil
	}
	c.cancel()
	c.flying.Wait()
	c.closeParked()
	close(c.done)
	<-c.committed
	c.leaveDropped()
	return errors.Join(c.index.Close(), c.store.Close(), c.lock.Close())
}

// listed tells whether the operator has named an upstream.
func (c *Cache) listed(upstream string) bool {
	return c.opts.Listed == nil || c.opts.Listed(upstream)
}

// Index is where tags and memberships are noted. Objects are the cache's.
func (c *Cache) Index() *index.Index { return c.index }

// Has tells whether the object is stored, and its size.
func (c *Cache) Has(k Key) (size int64, ok bool) {
	o, ok := c.index.Object(k.Domain, k.Digest)
	return o.Size, ok
}

// Size is the object's, where it is stored, or as the source of a flight has
// said.
func (c *Cache) Size(k Key) (size int64, ok bool) {
	if size, ok := c.Has(k); ok {
		return size, true
	}
	c.mu.Lock()
	f, p := c.flights[k], c.parked[k]
	c.mu.Unlock()
	switch {
	case p != nil:
		return p.size, true
	case f == nil:
		return 0, false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.size, f.size >= 0
}

// Source tells where an object came from.
type Source int

const (
	Hit     Source = iota // complete and verified before this request
	Fetched               // this request started the flight
	Joined                // this request joined a flight
	Passed                // not storable: a stream of its own
)

// Object is an open object. It is for one goroutine; Close it.
type Object struct {
	// Size in bytes, -1 while the source has not said.
	Size   int64
	Source Source
	// Doubtful: it is what another reader is being sent, and nothing tells yet that
	// it is the object. Who knows its size can compare that.
	Doubtful bool
	// Content reads it. It has a method Section where the kernel may send it.
	// Seeking to the end is only possible when Size is known.
	Content io.ReadSeeker

	close     func()
	interrupt func() // nil when nothing can wait
	wait      func() // nil when there is nothing to wait for
}

// Rereadable tells whether Content can be read from the start again, because it
// lies in a file.
func (o *Object) Rereadable() bool {
	_, forward := o.Content.(*stream)
	return !forward
}

// Wait returns when nothing more is coming of a flight, or after Interrupt.
func (o *Object) Wait() {
	if o.wait != nil {
		o.wait()
	}
}

// Close ends the reading. A flight goes on without its readers.
func (o *Object) Close() { o.close() }

// Interrupt ends a Read that waits for a flight, and all later ones. Any
// goroutine may call it, before Close.
func (o *Object) Interrupt() {
	if o.interrupt != nil {
		o.interrupt()
	}
}

// Open returns the object as soon as its size is known (or known to be
// unknown); one that is small enough to be held back altogether, not before it
// is verified. ctx bounds only that; reading ends with Interrupt. Errors:
// ErrAuthorise, ErrDropped, ErrBroken, the context's, and those of the Fetch.
func (c *Cache) Open(ctx context.Context, req Request) (*Object, error) {
	// Each round either ends or follows a refusal that was somebody else's.
	for changed := false; ; {
		o, s, err := c.openStored(req)
		if o != nil || err != nil {
			return o, err
		}
		if s == nil && req.relayed() && c.passes(req.Key) {
			return c.openRelay(ctx, req, ownAnswer{})
		}
		f, leader, err := c.join(req, s)
		if err != nil {
			return nil, err
		}
		if !leader && req.Authorised && f.supersede(req) {
			continue
		}
		if !leader && !req.Authorised {
			err := ErrAuthorise
			if req.Wait {
				err = f.answer(ctx, req.Reader)
			}
			f.release()
			return nil, err
		}
		o, err = f.open(ctx, req, leader)
		switch {
		case errors.Is(err, errChanged) && !changed:
			changed = true // and now it is fetched
		case errors.Is(err, errStoredMeanwhile):
			if !req.Authorised {
				return nil, ErrAuthorise
			}
		case leader || err == nil || ctx.Err() != nil || errors.Is(err, ErrDropped):
			return o, err
		case errors.Is(err, ErrRefused), errors.Is(err, ErrLimited), f.othersAffair(req):
			// It was somebody else's affair.
		default:
			return o, err
		}
	}
}

// openStored returns the object when it is stored, or a file that must be hashed
// again, for the flight that does, or neither. What it returns is held, so that
// it is not evicted meanwhile.
func (c *Cache) openStored(req Request) (*Object, *suspect, error) {
	if body := c.hot.get(req.Key); body != nil {
		o, err := c.hit(req, int64(len(body)), bytes.NewReader(body), func() {})
		return o, nil, err
	}
	row, held := c.holdStored(req.Key)
	if held == nil {
		return nil, c.strayFile(req), nil
	}
	small := row.Size <= maxHotObject && row.Size > 0
	if small {
		// Hashed once, since from now on the file is not looked at again.
		body, err := c.store.Read(req.Digest, row.Size)
		if err == nil && req.Digest.Algorithm().FromBytes(body) == req.Digest {
			c.hot.put(req.Key, body)
			if _, ok := c.index.Row(req.Digest); !ok {
				c.hot.drop(req.Digest) // it was removed by hand meanwhile
			}
			c.letGo(held)
			o, err := c.hit(req, row.Size, bytes.NewReader(body), func() {})
			return o, nil, err
		}
	}
	file, info, err := c.openFile(req.Digest, row)
	if err != nil {
		c.letGo(held)
		if !lacksDescriptors(err) {
			c.dropSoon(req.Digest)
		}
		return nil, nil, nil
	}
	s := &suspect{file, info, row, held}
	if c.isBad(req.Digest, info) {
		c.forgo(s)
		return nil, nil, nil
	}
	switch {
	case !small && vouched(row, info):
		content := &storedFile{file, func() {
			c.distrust(req.Digest, info)
			c.dropSoon(req.Digest)
		}}
		o, err := c.hit(req, row.Size, content, func() { c.forgo(s) })
		return o, nil, err
	case !req.Authorised:
		c.forgo(s)
		return nil, nil, ErrAuthorise
	}
	return nil, s, nil
}

// dropSoon has the committer look at an object whose file is not as its row says.
func (c *Cache) dropSoon(d digest.Digest) {
	select {
	case c.drops <- d:
	default: // the next reader finds it again
	}
}

// lacksDescriptors: an error says nothing of the file.
func lacksDescriptors(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// hit is what is stored, for who may have it.
func (c *Cache) hit(req Request, size int64, content io.ReadSeeker, close func()) (*Object, error) {
	var err error
	switch {
	case !req.Authorised:
		err = ErrAuthorise
	case c.dropped.refuses(req.Key, req.Offset):
		err = ErrDropped
	}
	if err != nil {
		close()
		return nil, err
	}
	if req.Offset == 0 { // the other parts of it are the same use
		c.noteUse(req.Digest)
	}
	return &Object{Size: size, Source: Hit, Content: content, close: close}, nil
}

func (c *Cache) openFile(d digest.Digest, row index.Object) (*os.File, os.FileInfo, error) {
	file, err := c.store.Open(d)
	if err != nil {
		return nil, nil, err
	}
	info, err := file.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Size() != row.Size) {
		err = fmt.Errorf("%s has %d bytes, its row says %d", d, info.Size(), row.Size)
	}
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return file, info, nil
}

// Stats are for people and metrics.
type Stats struct {
	UsedBytes    int64   `json:"usedBytes"`    // all but what is pending, the index's next growth included
	PendingBytes int64   `json:"pendingBytes"` // reserved for flights, and for what they left to go on with
	MaxBytes     int64   `json:"maxBytes"`
	Flights      int     `json:"flights"`
	Parked       int     `json:"parked"`   // downloads that broke off, and go on when they are asked for
	Adopting     int     `json:"adopting"` // files without a row, being hashed
	Evicted      Evicted `json:"evicted"`
	// Trouble is why the disk last refused to store something, "" when the
	// last attempt went well.
	Trouble string `json:"trouble,omitempty"`
}

// Stats returns a snapshot.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Stats{
		UsedBytes:    c.used + c.overhead,
		PendingBytes: c.claimed,
		MaxBytes:     c.opts.MaxSize,
		Flights:      len(c.flights),
		Parked:       len(c.parked),
		Adopting:     c.adopt,
		Evicted:      c.evicted,
	}
	if err := cmp.Or(c.trouble, c.unwritten); err != nil {
		s.Trouble = err.Error()
	}
	return s
}
