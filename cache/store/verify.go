// SPDX-License-Identifier: Apache-2.0

package store

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"tarn/blobstore"
	"tarn/index"
	"tarn/internal/manifest"

	"github.com/opencontainers/go-digest"
)

// A file on the disk may be changed by hand, by another program or by the disk
// itself, and what goes out must be what the digest says all the same. A row
// remembers what the file looked like when its bytes were last hashed. A file
// that still looks so, and was hashed not too long ago, goes out by sendfile. Any
// other is suspect: whoever reads it hashes it, and says here what came out. Then the
// row vouches for it again, or it is dropped.

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

// Hashed says what hashing a stored file has shown, which looked like info, and
// returns when the committer has taken that in. When the store is being closed, it is
// lost: the file is still suspect at the next start.
func (s *Store) Hashed(d digest.Digest, info fs.FileInfo, sound bool) {
	var children []digest.Digest
	if sound && s.doubts.isStray(d) {
		children = s.readChildren(d, info.Size())
	}
	s.Do(func() error { s.settleHash(d, info, sound, children); return nil })
}

// readChildren reads what a stored manifest leads to, nil for anything else.
func (s *Store) readChildren(d digest.Digest, size int64) []digest.Digest {
	if size > manifest.MaxSize {
		return nil
	}
	body, _ := s.blobs.Read(d, size) // without it, it leads nowhere
	if !manifest.Looks(body[:min(len(body), manifest.Prefix)], size) {
		return nil
	}
	return manifest.Children(body)
}

// changed says that a stored file was not what it should be.
func (s *Store) changed(d digest.Digest) {
	if s.hooks.Changed != nil {
		s.hooks.Changed(d)
	}
}

// settleHash runs in the committer: the row vouches for a sound file, and goes with
// one that is not, unless another file has come in its place.
func (s *Store) settleHash(d digest.Digest, was fs.FileInfo, sound bool, children []digest.Digest) {
	if !sound {
		s.changed(d) // whatever lies there by now: somebody may have its bytes
	}
	row, ok := s.index.Row(d)
	info, err := os.Lstat(s.blobs.Path(d))
	if err == nil && blobstore.LookOf(info) != blobstore.LookOf(was) {
		return
	}
	if !sound {
		s.doubts.distrust(d, was) // also where it cannot be removed
	}
	domain := ""
	if !ok { // a stray that somebody asked for before its turn
		if err != nil || !s.doubts.isStray(d) {
			return
		}
		domain, row = index.ListedDomain, index.Object{Size: info.Size(), Alloc: blobstore.Allocated(info), Created: time.Now()}
	}
	if sound && err == nil {
		s.index.Put(index.Possession{Digest: d, Domain: domain, Object: describe(row, info), Children: children})
		if !ok {
			s.doubts.unstray(d)
			s.enter(d, row.Alloc, children)
			s.follow()
		}
		return
	}
	s.doubts.unstray(d)
	s.remove(d, row, NotAsItWas)
	s.log.Sugar().Errorw("a file on the disk was changed or has gone, and is dropped", "digest", d)
}

// hashes tells whether the file's bytes are what its name says. It reads rate
// bytes a second, or as fast as it can when that is 0, and reports each piece. The file
// is held meanwhile, like anybody's who reads.
func (s *Store) hashes(ctx context.Context, d digest.Digest, rate int64, report func(n int)) (bool, error) {
	held := s.await(d)
	defer s.Release(held)
	f, err := s.blobs.Open(d)
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

// scrub hashes what was not hashed for long, slowly, all the time: what decays
// on the disk is found also where nobody asks for it.
func (s *Store) scrub() {
	tick := time.NewTicker(scrubEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
			s.Scrub(time.Now(), scrubRate)
		}
	}
}

// Scrub hashes what was not hashed within a week of now, rate bytes a second, or as
// fast as it can when that is 0. It ends with the store.
func (s *Store) Scrub(now time.Time, rate int64) {
	var due []digest.Digest
	s.index.Objects(func(d digest.Digest, o index.Object) {
		if now.Sub(o.Verified) >= scrubAfter || o.Verified.After(now.Add(scrubAfter)) { // or the clock was set back
			due = append(due, d)
		}
	})
	for _, d := range due {
		if _, err := s.verify(s.ctx, d, rate, nil); s.ctx.Err() != nil {
			return
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.NoteTrouble(err)
		}
	}
}

// verify hashes a stored file and has the committer take in what came out. A
// file that is gone is fs.ErrNotExist: who asks for it finds out.
func (s *Store) verify(ctx context.Context, d digest.Digest, rate int64, report func(n int)) (sound bool, err error) {
	info, err := os.Lstat(s.blobs.Path(d))
	if err != nil {
		return false, err
	}
	if sound, err = s.hashes(ctx, d, rate, report); err != nil && !errors.Is(err, syscall.EIO) {
		return false, err
	}
	s.Hashed(d, info, sound)
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
func (s *Store) Verify(ctx context.Context, rate int64, report func(Verification)) (v Verification, err error) {
	if !s.verifying.TryLock() {
		return v, ErrVerifying
	}
	defer s.verifying.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.ctx, func() { cancel(ErrClosed) })()
	var all []digest.Digest
	started := time.Now()
	s.index.Objects(func(d digest.Digest, o index.Object) {
		all = append(all, d)
		v.OfBytes += o.Size
	})
	v.OfFiles = len(all)
	v.Bad, v.Missing = []digest.Digest{}, []digest.Digest{}
	for _, d := range all {
		sound, err := s.verify(ctx, d, rate, func(n int) {
			v.Bytes += int64(n)
			report(v)
		})
		row, known := s.index.Row(d)
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
			s.Do(func() error { s.drop(d); return nil })
		}
		v.Files++
		report(v)
	}
	return v, nil
}
