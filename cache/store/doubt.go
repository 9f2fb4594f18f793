// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"sync"
	"time"

	"tarn/blobstore"
	"tarn/index"

	"github.com/opencontainers/go-digest"
)

// doubts are the files under blobs/ of which a row says nothing, or something that
// is not so.
type doubts struct {
	mu     sync.Mutex
	strays map[digest.Digest]fs.FileInfo    // without a row, and not hashed yet
	left   int                              // how many of them are yet to be adopted
	bad    map[digest.Digest]blobstore.Look // not to be used
	later  map[digest.Digest]bool           // to be looked at by the committer
}

func newDoubts() doubts {
	return doubts{
		strays: make(map[digest.Digest]fs.FileInfo),
		bad:    make(map[digest.Digest]blobstore.Look),
		later:  make(map[digest.Digest]bool),
	}
}

// stray is a file under blobs/ that has no row.
type stray struct {
	digest digest.Digest
	info   fs.FileInfo
}

// all are the strays that are to be adopted.
func (ds *doubts) all() (all []stray) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	for d, info := range ds.strays {
		all = append(all, stray{d, info})
	}
	ds.left = len(all)
	return all
}

func (ds *doubts) adopting() int {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	return ds.left
}

func (ds *doubts) settled() {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.left--
}

func (ds *doubts) isStray(d digest.Digest) bool {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	_, ok := ds.strays[d]
	return ok
}

// unstray takes a file off the strays, and tells whether it was one: whoever
// does that sees to its bytes, and nobody else.
func (ds *doubts) unstray(d digest.Digest) bool {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	_, was := ds.strays[d]
	delete(ds.strays, d)
	return was
}

// distrust remembers a file that is not what it should be, or that the disk does
// not read. It is as good as gone from then on, and goes when the disk lets it.
func (ds *doubts) distrust(d digest.Digest, info fs.FileInfo) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.bad[d] = blobstore.LookOf(info)
}

func (ds *doubts) isBad(d digest.Digest, info fs.FileInfo) bool {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	look, ok := ds.bad[d]
	return ok && look == blobstore.LookOf(info)
}

// maxLater bounds what the committer is to look at.
const maxLater = 4096

func (ds *doubts) dropLater(d digest.Digest) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	if len(ds.later) < maxLater {
		ds.later[d] = true
	}
}

// dropBad looks at what readers found, and tries again to remove what is distrusted. It
// runs in the committer.
func (s *Store) dropBad() {
	ds := &s.doubts
	ds.mu.Lock()
	later, bad := ds.later, maps.Clone(ds.bad)
	ds.later = make(map[digest.Digest]bool)
	ds.mu.Unlock()
	for d := range later {
		s.drop(d)
	}
	for d := range bad {
		info, err := os.Lstat(s.blobs.Path(d))
		if err == nil && ds.isBad(d, info) {
			s.drop(d)
			continue
		}
		ds.mu.Lock()
		delete(ds.bad, d) // it is gone, or another one has come in its place
		ds.mu.Unlock()
	}
}

const (
	firstAdoptPause = time.Second
	lastAdoptPause  = 10 * time.Minute
)

// adoptAll hashes the strays, one after the other, and has the committer take
// them in or remove them. Requests are served meanwhile; one for a stray
// fetches it and finds the same bytes. What the disk does not read is tried again, later
// each time.
func (s *Store) adoptAll(strays []stray) {
	n := len(strays)
	strays = s.adoptOnce(strays)
	for pause := firstAdoptPause; len(strays) > 0; pause = min(2*pause, lastAdoptPause) {
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
			strays = s.adoptOnce(strays)
		case <-s.ctx.Done():
			timer.Stop()
			return
		}
	}
	if s.ctx.Err() != nil {
		return
	}
	s.log.Sugar().Infow("adopted files without a row", "files", n)
}

// adoptOnce returns those that cannot be read now.
func (s *Store) adoptOnce(strays []stray) (unread []stray) {
	for _, one := range strays {
		sound, err := s.hashes(s.ctx, one.digest, 0, nil)
		if s.ctx.Err() != nil {
			return nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			// It may be sound. Its bytes count.
			s.log.Sugar().Warnw("could not read a file without a row", "digest", one.digest, "cause", err.Error())
			unread = append(unread, one)
			continue
		}
		var children []digest.Digest
		if sound {
			children = s.readChildren(one.digest, one.info.Size())
		}
		if s.Do(func() error { s.settle(one, sound, children); return nil }) != nil {
			return nil
		}
	}
	return unread
}

// settle runs in the committer: it adopts a sound stray for the listed domain,
// since nobody knows any more who delivered it, and removes another.
func (s *Store) settle(one stray, sound bool, children []digest.Digest) {
	s.adopt(one, sound, children)
	s.doubts.unstray(one.digest) // only now, so that who asks meanwhile finds the one or the other
	s.doubts.settled()
	s.follow()
}

func (s *Store) adopt(one stray, sound bool, children []digest.Digest) {
	alloc := blobstore.Allocated(one.info)
	switch _, known := s.index.Row(one.digest); {
	case known || !s.doubts.isStray(one.digest):
		// It has gone, and a flight, of whatever domain, may have put another one in
		// its place; or a request has had it looked at.
		return
	case !sound:
		s.changed(one.digest)
		if err := s.blobs.Remove(one.digest); err != nil {
			s.NoteTrouble(fmt.Errorf("remove a stray file: %w", err))
			s.leftOver(one.digest, alloc)
		} else {
			s.forget(one.digest, alloc)
		}
		return
	}
	row := describe(index.Object{Size: one.info.Size(), Alloc: alloc, Created: time.Now()}, one.info)
	s.index.Put(index.Possession{Digest: one.digest, Domain: index.ListedDomain, Object: row, Children: children})
	s.enter(one.digest, alloc, children)
}
