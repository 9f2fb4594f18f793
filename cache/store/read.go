// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"tarn/index"

	"github.com/opencontainers/go-digest"
)

// A File is a stored object that is open, and held: in memory, or as a file. Close it.
type File struct {
	Size int64
	// Body is all of it, where it is small. Nobody writes to it.
	Body []byte
	// File is open where there is no Body.
	File *os.File
	// Suspect: it is to be hashed before its last bytes leave, see Hashed.
	Suspect bool
	// Info is what the file looked like.
	Info fs.FileInfo

	store  *Store
	digest digest.Digest
	held   Lease
	used   bool
}

// Lease is what holds a File that has no Body, for who closes the file and releases
// that himself.
func (f *File) Lease() Lease { return f.held }

// Use has Close count a use of it: until then it is held, and its rank is nobody's
// affair.
func (f *File) Use() { f.used = true }

// Close lets go of it.
func (f *File) Close() {
	if f.File != nil {
		f.File.Close()
	}
	if f.used {
		f.store.releaseUsed(f.digest, f.held)
	} else {
		f.store.Release(f.held)
	}
}

// Read implements io.Reader, of a File that has no Body. The store hears of it when
// the disk does not read it.
func (f *File) Read(p []byte) (int, error) {
	n, err := f.File.Read(p)
	f.Failed(err)
	return n, err
}

// Seek implements io.Seeker, of a File that has no Body.
func (f *File) Seek(offset int64, whence int) (int64, error) { return f.File.Seek(offset, whence) }

// Section returns the file, for who has the kernel send its bytes, and as many as
// were asked for.
func (f *File) Section(most int64) (*os.File, int64, error) { return f.File, most, nil }

// Failed is told how sending a Section has ended.
func (f *File) Failed(err error) {
	if errors.Is(err, syscall.EIO) {
		f.store.doubts.distrust(f.digest, f.Info)
		f.store.dropSoon(f.digest)
	}
}

// Has tells whether a domain possesses the object, and its size.
func (s *Store) Has(domain string, d digest.Digest) (size int64, ok bool) {
	o, ok := s.index.Object(domain, d)
	return o.Size, ok
}

// Stored tells whether a domain possesses the object, and its file is there.
func (s *Store) Stored(domain string, d digest.Digest) bool {
	if _, ok := s.index.Object(domain, d); !ok {
		return false
	}
	held := s.hold(d)
	defer s.Release(held)
	_, ok := s.sound(d)
	return ok && held != nil
}

// Open opens an object that the domain possesses. nil: it does not, or the object goes
// just now, or its file is not as its row says.
func (s *Store) Open(domain string, d digest.Digest) *File {
	if body := s.hot.get(hotKey{domain, d}); body != nil {
		return &File{Size: int64(len(body)), Body: body, store: s, digest: d}
	}
	row, ok := s.index.Object(domain, d)
	if !ok {
		return nil
	}
	held := s.hold(d)
	if held == nil {
		return nil
	}
	small := row.Size <= maxHotObject && row.Size > 0
	if small {
		if body := s.readSmall(hotKey{domain, d}, row.Size); body != nil {
			s.Release(held)
			return &File{Size: row.Size, Body: body, store: s, digest: d}
		}
	}
	file, info, err := s.openFile(d, row)
	if err != nil {
		s.Release(held)
		if errors.Is(err, errChanged) {
			s.changed(d) // before anybody is given something else in its place
		}
		if !lacksDescriptors(err) {
			s.dropSoon(d)
		}
		return nil
	}
	f := &File{Size: row.Size, File: file, Info: info, Suspect: small || !vouched(row, info), store: s, digest: d, held: held}
	if s.doubts.isBad(d, info) {
		f.Close()
		return nil
	}
	return f
}

// readSmall reads what is kept in memory. It is hashed once, since from then on the
// file is not looked at again; nil when it is not what its digest says.
func (s *Store) readSmall(k hotKey, size int64) []byte {
	body, err := s.blobs.Read(k.digest, size)
	if err != nil || k.digest.Algorithm().FromBytes(body) != k.digest {
		return nil
	}
	s.hot.put(k, body)
	if _, ok := s.index.Object(k.domain, k.digest); !ok {
		s.hot.drop(k.digest) // it was removed meanwhile
	}
	return body
}

// OpenStray opens a file that nobody has looked at yet, for who may have what
// the listed registries deliver: they are believed to have delivered it. nil: there is
// none.
func (s *Store) OpenStray(d digest.Digest) *File {
	if !s.doubts.isStray(d) {
		return nil
	}
	held := s.await(d)
	file, err := s.blobs.Open(d)
	if err != nil {
		s.Release(held)
		return nil
	}
	info, err := file.Stat()
	f := &File{File: file, Info: info, Suspect: true, store: s, digest: d, held: held}
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		f.Close()
		return nil
	}
	f.Size = info.Size()
	return f
}

// lacksDescriptors: an error says nothing of the file.
func lacksDescriptors(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

func (s *Store) openFile(d digest.Digest, row index.Object) (*os.File, os.FileInfo, error) {
	file, err := s.blobs.Open(d)
	if err != nil {
		return nil, nil, err
	}
	info, err := file.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Size() != row.Size) {
		err = fmt.Errorf("%w: %s has %d bytes, its row says %d", errChanged, d, info.Size(), row.Size)
	}
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return file, info, nil
}

// IsHere tells whether an object is stored, if only as a file, whoever delivered it,
// and its size as far as that is known.
func (s *Store) IsHere(d digest.Digest) (size int64, ok bool) {
	row, known := s.index.Row(d)
	return row.Size, known || s.doubts.isStray(d)
}

// ReadAll returns what is stored under a digest, if only as a file, and checks it. It
// is for small objects: what has more than most bytes is returned as none, with its
// size. It fails with ErrNotStored, and when the file is not what it was, or the disk
// does not give it now.
func (s *Store) ReadAll(d digest.Digest, most int64) (body []byte, size int64, err error) {
	row, known := s.index.Row(d)
	switch {
	case !known && !s.doubts.isStray(d):
		return nil, 0, ErrNotStored
	case known && row.Size > most:
		return nil, row.Size, nil
	}
	info, err := os.Lstat(s.blobs.Path(d))
	if err != nil {
		return nil, row.Size, err
	}
	if size = info.Size(); size > most {
		return nil, size, nil
	}
	if body, err = s.blobs.Read(d, size); err != nil {
		return nil, size, err
	}
	if d.Algorithm().FromBytes(body) != d {
		if known {
			s.changed(d)
			s.doubts.distrust(d, info)
			s.dropSoon(d)
		}
		return nil, size, errChanged
	}
	return body, size, nil
}
