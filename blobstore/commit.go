// SPDX-License-Identifier: Apache-2.0

package blobstore

import (
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// maxSyncs is how many files are written to disk at once.
const maxSyncs = 32

// Commit makes the pending files visible under their digests, all or some of
// them: errs has one entry for each. For n files of one algorithm the kernel
// sees, in this order,
//
//	fsync(pending/X) x n
//	rename(pending/X, blobs/sha256/H) x n
//	fsync(blobs/sha256)
//
// A crash before the rename leaves a pending file, which the next start goes on with
// or sweeps; after it, a
// whole file under its digest, since its bytes and its inode were on disk
// before. When the directory's fsync fails, every file of that directory is
// reported as failed and removed again: it might be gone after a crash, and a
// row must never be there without its file. An fsync that failed is never
// repeated, because the kernel has dropped the dirty pages by then.
func (s *Store) Commit(files []*Pending) (errs []error) {
	errs = make([]error, len(files))
	// At once, because the filesystem makes one write of its journal of them.
	var syncing errgroup.Group
	syncing.SetLimit(maxSyncs)
	for i, p := range files {
		syncing.Go(func() error {
			if err := s.steps.Do("fsync blob", p.File.Sync); err != nil {
				errs[i] = fmt.Errorf("fsync blob: %w", err)
				p.Discard()
			}
			return nil
		})
	}
	syncing.Wait()
	renamed := make(map[digest.Algorithm][]int)
	for i, p := range files {
		if errs[i] != nil {
			continue
		}
		if err := s.steps.Do("rename blob", func() error { return os.Rename(p.path, s.Path(p.Digest)) }); err != nil {
			errs[i] = fmt.Errorf("rename blob: %w", err)
			p.Discard()
			continue
		}
		p.path = ""
		p.dropJournal()
		renamed[p.Digest.Algorithm()] = append(renamed[p.Digest.Algorithm()], i)
	}
	for alg, indexes := range renamed {
		if err := s.steps.Do("fsync directory", s.blobs[alg].Sync); err != nil {
			for _, i := range indexes {
				errs[i] = errors.Join(fmt.Errorf("fsync blob directory: %w", err), s.Remove(files[i].Digest))
			}
		}
	}
	return errs
}
