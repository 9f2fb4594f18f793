// SPDX-License-Identifier: Apache-2.0

// Package blobstore keeps content-addressed files, laid out as in an OCI image
// layout (image-spec "Image Layout"): blobs/<algorithm>/<encoded>, and beside
// them a directory of pending files.
//
// Contract: a file under blobs/ got there by Commit, which has fsynced it
// before the rename, or by a stranger's hand. Whoever calls Commit has checked
// the digest. Commit and Remove of one digest are not to run at the same time;
// the caller sees to that.
//
// Failure model: every method returns the error of the system call, wrapped
// with what was being done. A Commit discards the files that it fails for, all of a
// directory that cannot be synced, and does not touch the others. A crash at any point leaves files
// that are whole under blobs/, and anything at all under pending/.
//
// It never hashes, never decides what to delete, never knows an index.
package blobstore

import (
	_ "crypto/sha256" // the two registered algorithms (image-spec "Registered Algorithms")
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"syscall"

	"tarn/internal/fault"
	"tarn/internal/regular"

	"github.com/opencontainers/go-digest"
)

// algorithms are the ones that objects may be named by.
var algorithms = []digest.Algorithm{digest.SHA256, digest.SHA512}

// CheckDigest tells whether d is well formed and of one of algorithms. Only
// such a digest becomes part of a path.
func CheckDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return err
	}
	for _, a := range algorithms {
		if d.Algorithm() == a {
			return nil
		}
	}
	return digest.ErrDigestUnsupported
}

// Store is a directory of blobs. It is safe for concurrent use, but see the
// package on Commit and Remove.
type Store struct {
	dir   string
	steps fault.Steps
	// blobs are the open directories: to make a commit durable takes no
	// descriptor, of which there may be none left but by commits.
	blobs map[digest.Algorithm]*os.File
}

const (
	// dirMode keeps other users of the node out: what is here may be private
	// to a registry's users.
	dirMode  = 0o700
	fileMode = 0o600
)

// Open makes the directories that are missing and returns the store. Outside of
// tests, steps is nil.
func Open(dir string, steps fault.Steps) (*Store, error) {
	s := &Store{dir, steps, make(map[digest.Algorithm]*os.File)}
	for _, sub := range []string{s.algDir(digest.SHA256), s.algDir(digest.SHA512), s.pendingDir()} {
		if err := steps.Do("make directory", func() error { return os.MkdirAll(sub, dirMode) }); err != nil {
			return nil, fmt.Errorf("open the blob store: %w", err)
		}
	}
	for _, sub := range []string{s.blobsDir(), s.pendingDir()} { // openDir does not see a link in the middle
		info, err := os.Lstat(sub)
		if err == nil && !info.IsDir() {
			err = fmt.Errorf("%s is no directory, but %s: remove it", filepath.Base(sub), info.Mode().Type())
		}
		if err != nil {
			return nil, fmt.Errorf("open the blob store: %w", err)
		}
	}
	for _, a := range algorithms {
		d, err := openDir(s.algDir(a))
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("open the blob store: %w", err)
		}
		s.blobs[a] = d
	}
	return s, nil
}

// Close lets go of the directories. Nothing is committed after it.
func (s *Store) Close() error {
	var errs []error
	for _, d := range s.blobs {
		errs = append(errs, d.Close())
	}
	return errors.Join(errs...)
}

func (s *Store) blobsDir() string                 { return filepath.Join(s.dir, "blobs") }
func (s *Store) algDir(a digest.Algorithm) string { return filepath.Join(s.blobsDir(), a.String()) }
func (s *Store) pendingDir() string               { return filepath.Join(s.dir, "pending") }

// Directories are all that the store has, its own first.
func (s *Store) Directories() []string {
	dirs := []string{s.dir, s.blobsDir(), s.pendingDir()}
	for _, a := range algorithms {
		dirs = append(dirs, s.algDir(a))
	}
	return dirs
}

// Path is where the blob lies, or would.
func (s *Store) Path(d digest.Digest) string {
	return filepath.Join(s.algDir(d.Algorithm()), d.Encoded())
}

// openFlags are for what somebody may have put in a blob's place.
const openFlags = os.O_RDONLY | regular.Flags

// Open opens a blob for reading. The error wraps fs.ErrNotExist when there is
// none.
func (s *Store) Open(d digest.Digest) (*os.File, error) {
	var f *os.File
	err := s.steps.Do("open blob", func() (err error) { f, err = os.OpenFile(s.Path(d), openFlags, 0); return err })
	return f, err
}

// Read returns a small blob whole, in as few system calls as there can be. One
// that has another size is an error.
func (s *Store) Read(d digest.Digest, size int64) (body []byte, err error) {
	err = s.steps.Do("read blob", func() (err error) { body, err = read(s.Path(d), size); return err })
	if err != nil {
		return nil, fmt.Errorf("read a blob: %w", err)
	}
	return body, nil
}

func read(path string, size int64) ([]byte, error) {
	fd, err := syscall.Open(path, openFlags|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(fd)
	buf := make([]byte, size+1)
	n, err := syscall.Read(fd, buf)
	if err == nil && int64(n) != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, err
	}
	return buf[:n], nil
}

// Remove deletes a blob. Readers that have it open keep it.
func (s *Store) Remove(d digest.Digest) error {
	if err := remove(s.steps, "remove blob", s.Path(d)); err != nil {
		return fmt.Errorf("remove blob: %w", err)
	}
	return nil
}

// remove deletes a file. Only one that is there afterwards is an error.
func remove(steps fault.Steps, step, path string) error {
	err := steps.Do(step, func() error { return os.Remove(path) })
	if err != nil {
		if _, gone := os.Lstat(path); errors.Is(gone, fs.ErrNotExist) {
			return nil
		}
	}
	return err
}

// Listing is what was under blobs/ when it was made: the entries of each algorithm's
// directory.
type Listing map[digest.Algorithm][]fs.DirEntry

// List reads the directories.
func (s *Store) List() (Listing, error) {
	l := make(Listing, len(algorithms))
	for _, a := range algorithms {
		err := s.steps.Do("list blobs", func() (err error) { l[a], err = readDir(s.algDir(a)); return err })
		if err != nil {
			return nil, fmt.Errorf("list the blobs: %w", err)
		}
	}
	return l, nil
}

// Walk calls f for each regular file with what its name would be as a digest, which
// the caller is to check before it believes it, and for each other entry with an empty
// digest; in no order. It stops at f's first error.
func (l Listing) Walk(f func(d digest.Digest, e fs.DirEntry) error) error {
	for a, entries := range l {
		for _, e := range entries {
			var d digest.Digest
			if e.Type().IsRegular() {
				d = digest.Digest(string(a) + ":" + e.Name())
			}
			if err := f(d, e); err != nil {
				return err
			}
		}
	}
	return nil
}

func openDir(path string) (*os.File, error) {
	return os.OpenFile(path, openFlags|syscall.O_DIRECTORY, 0)
}

// readDir is os.ReadDir without the sorting.
func readDir(path string) ([]fs.DirEntry, error) {
	dir, err := openDir(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.ReadDir(-1)
}

// Free returns the bytes of the filesystem that this user may still write, and how
// many files may still be made, -1 where the filesystem does not count them.
func (s *Store) Free() (bytes, inodes int64, err error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(s.dir, &st); err != nil {
		return 0, 0, fmt.Errorf("statfs %s: %w", s.dir, err)
	}
	inodes = -1
	if st.Files > 0 {
		inodes = int64(min(st.Ffree, math.MaxInt64))
	}
	return int64(st.Bavail) * st.Bsize, inodes, nil
}

// Look is what tells a file from another one under the same name, and from
// itself before it was written to: times are nanoseconds since 1970.
type Look struct {
	Inode             uint64
	Modified, Changed int64
}

// LookOf returns what the file looked like.
func LookOf(info fs.FileInfo) (l Look) {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		l = Look{st.Ino, st.Mtim.Nano(), st.Ctim.Nano()}
	}
	return l
}

// Allocated is what a file takes on disk, in bytes.
func Allocated(info fs.FileInfo) int64 {
	const statBlock = 512 // the unit of st_blocks, whatever the filesystem's block size
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * statBlock
	}
	return info.Size()
}
