// SPDX-License-Identifier: Apache-2.0

package blobstore

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Pending is a file that is being filled. It may be read and written through
// File by several goroutines at once, and stays readable after Commit or
// Discard until it is closed.
type Pending struct {
	File   *os.File
	Digest digest.Digest // what it is meant to become
	path   string        // "" after Commit or Discard
}

// Create opens a new pending file.
func (s *Store) Create(d digest.Digest) (*Pending, error) {
	name := strings.Replace(d.String(), ":", "-", 1) + ".*"
	f, err := os.CreateTemp(s.pendingDir(), name) // mode 0600
	if err != nil {
		return nil, fmt.Errorf("create a pending file: %w", err)
	}
	return &Pending{File: f, Digest: d, path: f.Name()}, nil
}

// Discard deletes the pending file. Readers that have it open keep it.
func (p *Pending) Discard() {
	if p.path != "" {
		os.Remove(p.path) // left behind, it is swept at the next start
		p.path = ""
	}
}

// Commit makes the pending files visible under their digests, all or some of
// them: errs has one entry for each. For n files of one algorithm the kernel
// sees, in this order,
//
//	fsync(pending/X) x n
//	rename(pending/X, blobs/sha256/H) x n
//	fsync(blobs/sha256)
//
// A crash before the rename leaves a pending file, which is swept; after it, a
// whole file under its digest, since its bytes and its inode were on disk
// before. When the directory's fsync fails, every file of that directory is
// reported as failed and removed again: it might be gone after a crash, and a
// row must never be there without its file. An fsync that failed is never
// repeated, because the kernel has dropped the dirty pages by then.
func (s *Store) Commit(files []*Pending) (errs []error) {
	errs = make([]error, len(files))
	for i, p := range files {
		if err := p.File.Sync(); err != nil {
			errs[i] = fmt.Errorf("fsync blob: %w", err)
			p.Discard()
		}
	}
	renamed := make(map[digest.Algorithm][]int)
	for i, p := range files {
		if errs[i] != nil {
			continue
		}
		if err := os.Rename(p.path, s.Path(p.Digest)); err != nil {
			errs[i] = fmt.Errorf("rename blob: %w", err)
			p.Discard()
			continue
		}
		p.path = ""
		renamed[p.Digest.Algorithm()] = append(renamed[p.Digest.Algorithm()], i)
	}
	for alg, indexes := range renamed {
		if err := syncDir(s.algDir(alg)); err != nil {
			for _, i := range indexes {
				errs[i] = errors.Join(fmt.Errorf("fsync blob directory: %w", err), s.Remove(files[i].Digest))
			}
		}
	}
	return errs
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
