// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"syscall"
	"time"

	"tarn/blobstore"
	"tarn/index"

	"github.com/opencontainers/go-digest"
)

// A file on the disk may be changed by hand, by another program or by the disk
// itself, and what goes out must be what the digest says all the same. A row
// remembers what the file looked like when its bytes were last hashed. A file
// that still looks so, and was hashed not too long ago, goes out by sendfile. Any
// other is suspect: it is read by a flight, whose source is the file itself, so
// that its readers are held to the same rule as those of a download; then the
// row vouches for it again, or it is dropped and fetched anew.

const (
	// vouchedFor is how long a file is believed that looks unchanged. The
	// scrubber comes by more often than that.
	vouchedFor = 30 * 24 * time.Hour
	scrubAfter = 7 * 24 * time.Hour
	// scrubRate is how fast it reads, in bytes a second: a full disk of 50 GiB
	// takes an hour and a half a week.
	scrubRate = 10 << 20
	// scrubEvery is how often it looks for something to do.
	scrubEvery = 10 * time.Minute
)

// errChanged is an ErrBroken: the file on the disk is not what it was.
var errChanged = fmt.Errorf("%w: the file on the disk was changed", ErrBroken)

// describe enters in a row what the file looks like, hashed now.
func describe(row index.Object, info fs.FileInfo) index.Object {
	look := blobstore.LookOf(info)
	row.Inode, row.Modified, row.Changed = look.Inode, look.Modified, look.Changed
	row.Verified = time.Now()
	return row
}

// looksAs tells whether the file looks as the row has it.
func looksAs(row index.Object, info fs.FileInfo) bool {
	look := blobstore.LookOf(info)
	return info.Size() == row.Size && look.Inode == row.Inode && look.Modified == row.Modified && look.Changed == row.Changed
}

// vouched tells whether the file may go out without being hashed. A clock that
// was set is no reason for doubt either way, but for what it makes old.
func vouched(row index.Object, info fs.FileInfo) bool {
	return looksAs(row, info) && time.Since(row.Verified) < vouchedFor
}

// suspect is a file that is stored and must be hashed before it goes out.
type suspect struct {
	file *os.File
	info fs.FileInfo
	row  index.Object
	held lease
}

// forgo closes a stored file.
func (c *Cache) forgo(s *suspect) {
	s.file.Close()
	c.letGo(s.held)
}

// recheck is the life of a flight whose source is its file.
func (f *flight) recheck(s *suspect) {
	c := f.cache
	defer c.flying.Done()
	f.mu.Lock()
	f.state = feeding
	f.changed.Broadcast()
	for f.disk == nil && f.hashed < f.size && f.ctx.Err() == nil {
		f.hashPiece()
	}
	unread := f.disk
	f.mu.Unlock()
	switch {
	case f.ctx.Err() != nil:
		f.end(failed, ErrClosed)
	case unread != nil:
		c.noteTrouble(unread)
		f.drop(s.info, unread)
	case digest.NewDigest(f.key.Digest.Algorithm(), f.hash) != f.key.Digest:
		f.drop(s.info, errChanged)
	default:
		f.mu.Lock()
		f.state = verified
		f.changed.Broadcast()
		f.mu.Unlock()
		f.leaveTable() // before it waits: who comes now looks at the file again
		c.tell(finding{digest: f.key.Digest, info: s.info, sound: true})
		f.cancel()
	}
}

// drop ends a flight whose file is not what it should be, after the file. Nobody is
// fed any more before ranges are refused: see end.
func (f *flight) drop(info fs.FileInfo, cause error) {
	f.mu.Lock()
	f.state = ending
	f.mu.Unlock()
	done := make(chan struct{})
	if f.cache.tell(finding{digest: f.key.Digest, info: info, done: done}) {
		<-done
	}
	f.end(failed, fmt.Errorf("%w: %w", errChanged, cause))
}

// distrust remembers a file that is not what it should be, or that the disk does
// not read. It is as good as gone from then on, and goes when the disk lets it.
func (c *Cache) distrust(d digest.Digest, info fs.FileInfo) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bad[d] = blobstore.LookOf(info)
}

func (c *Cache) isBad(d digest.Digest, info fs.FileInfo) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	look, ok := c.bad[d]
	return ok && look == blobstore.LookOf(info)
}

// dropBad tries again to remove what is distrusted. It runs in the committer.
func (c *Cache) dropBad() {
	c.mu.Lock()
	all := maps.Clone(c.bad)
	c.mu.Unlock()
	for d := range all {
		info, err := os.Lstat(c.store.Path(d))
		if err == nil && c.isBad(d, info) {
			c.drop(d)
			continue
		}
		c.mu.Lock()
		delete(c.bad, d) // it is gone, or another one has come in its place
		c.mu.Unlock()
	}
}

// storedFile is the content of an object that is complete on the disk. The cache
// hears of it when the disk does not read it.
type storedFile struct {
	file   *os.File
	failed func()
}

func (s *storedFile) Read(p []byte) (int, error) {
	n, err := s.file.Read(p)
	s.Failed(err)
	return n, err
}

func (s *storedFile) Seek(offset int64, whence int) (int64, error) {
	return s.file.Seek(offset, whence)
}

// Section returns the file, for who has the kernel send its bytes, and as many as
// were asked for.
func (s *storedFile) Section(most int64) (*os.File, int64, error) { return s.file, most, nil }

// Failed is told how sending a Section has ended.
func (s *storedFile) Failed(err error) {
	if errors.Is(err, syscall.EIO) {
		s.failed()
	}
}

// finding is what hashing a stored file has shown.
type finding struct {
	digest digest.Digest
	info   fs.FileInfo // what the file looked like
	sound  bool
	done   chan struct{} // closed when it was taken in; nil: nobody waits
}

// tell hands a finding to the committer. Of a cache that is being closed, it is
// lost: the file is still suspect at the next start.
func (c *Cache) tell(f finding) bool {
	select {
	case c.findings <- f:
		return true
	case <-c.ctx.Done():
		return false
	}
}

// take runs in the committer: the row vouches for a sound file, and goes with
// one that is not, unless another file has come in its place.
func (c *Cache) take(f finding) {
	if f.done != nil {
		defer close(f.done)
	}
	row, ok := c.index.Row(f.digest)
	info, err := os.Lstat(c.store.Path(f.digest))
	if err == nil && blobstore.LookOf(info) != blobstore.LookOf(f.info) {
		return
	}
	if !f.sound {
		c.distrust(f.digest, f.info) // also where it cannot be removed
		// Who has bytes of it is not known: it went out while it looked unchanged,
		// and perhaps from an earlier process, which was killed.
		c.dropped.add(Key{Digest: f.digest})
	}
	domain := ""
	if !ok { // a stray that somebody asked for before its turn
		if err != nil || !c.isStray(f.digest) {
			return
		}
		domain, row = ListedDomain, index.Object{Size: info.Size(), Alloc: blobstore.Allocated(info), Created: time.Now()}
	}
	if f.sound && err == nil {
		c.index.Put(index.Stored{Digest: f.digest, Domain: domain, Object: describe(row, info)})
		if !ok {
			c.unstray(f.digest)
			c.enter(f.digest, row.Alloc, nil)
			c.repinIfDue()
		}
		return
	}
	c.unstray(f.digest)
	c.remove([]index.Stored{{Digest: f.digest, Object: row}})
	c.log.Sugar().Errorw("a file on the disk was changed, and is dropped", "digest", f.digest)
}

// scrub hashes what was not hashed for long, slowly, all the time: what decays
// on the disk is found also where nobody asks for it.
func (c *Cache) scrub() {
	defer c.flying.Done()
	tick := time.NewTicker(scrubEvery)
	defer tick.Stop()
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-tick.C:
			c.scrubOnce(time.Now(), scrubRate)
		}
	}
}

// scrubOnce hashes what was not hashed within scrubAfter of now.
func (c *Cache) scrubOnce(now time.Time, rate int64) {
	var due []digest.Digest
	c.index.Objects(func(d digest.Digest, o index.Object) {
		if now.Sub(o.Verified) >= scrubAfter || o.Verified.After(now.Add(scrubAfter)) { // or the clock was set back
			due = append(due, d)
		}
	})
	for _, d := range due {
		if _, err := c.verify(c.ctx, d, rate, nil); c.ctx.Err() != nil {
			return
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			c.noteTrouble(err)
		}
	}
}

// verify hashes a stored file and has the committer take in what came out. A
// file that is gone is fs.ErrNotExist: who asks for it finds out.
func (c *Cache) verify(ctx context.Context, d digest.Digest, rate int64, report func(n int)) (sound bool, err error) {
	info, err := os.Lstat(c.store.Path(d))
	if err != nil {
		return false, err
	}
	if sound, err = c.hashes(ctx, d, rate, report); err != nil && !errors.Is(err, syscall.EIO) {
		return false, err
	}
	done := make(chan struct{})
	if c.tell(finding{digest: d, info: info, sound: sound, done: done}) {
		<-done
	}
	return sound, nil
}

// ErrVerifying: it is being done already.
var ErrVerifying = errors.New("what is stored is being verified already")

// Verification is how far Verify has come.
type Verification struct {
	Files   int             `json:"files"`
	Bytes   int64           `json:"bytes"`
	OfFiles int             `json:"ofFiles"`
	OfBytes int64           `json:"ofBytes"`
	Bad     []digest.Digest `json:"bad"`     // other bytes than the digest says, or unreadable: dropped
	Missing []digest.Digest `json:"missing"` // rows without a file: dropped
}

// Verify hashes every stored file, rate bytes a second or as fast as it can when
// that is 0, and drops what is not what its digest says. It reports after each
// MiB or file. Errors: the context's,
// ErrClosed, ErrVerifying, and want of descriptors.
func (c *Cache) Verify(ctx context.Context, rate int64, report func(Verification)) (v Verification, err error) {
	if !c.verifying.TryLock() {
		return v, ErrVerifying
	}
	defer c.verifying.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.ctx, func() { cancel(ErrClosed) })()
	var all []digest.Digest
	started := time.Now()
	c.index.Objects(func(d digest.Digest, o index.Object) {
		all = append(all, d)
		v.OfBytes += o.Size
	})
	v.OfFiles = len(all)
	v.Bad, v.Missing = []digest.Digest{}, []digest.Digest{}
	for _, d := range all {
		sound, err := c.verify(ctx, d, rate, func(n int) {
			v.Bytes += int64(n)
			report(v)
		})
		row, known := c.index.Row(d)
		switch {
		case ctx.Err() != nil:
			return v, context.Cause(ctx)
		case err == nil && sound:
		case errors.Is(err, fs.ErrNotExist) && (!known || row.Created.After(started)): // it was evicted meanwhile
		case lacksDescriptors(err):
			return v, err
		case errors.Is(err, fs.ErrNotExist):
			v.Missing = append(v.Missing, d)
		default:
			v.Bad = append(v.Bad, d)
		}
		if err != nil {
			c.inCommitter(func() error { c.drop(d); return nil })
		}
		v.Files++
		report(v)
	}
	return v, nil
}
