// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"tarn/index"
	"tarn/internal/regular"
)

// trouble is what the disk refuses, and what the log says of it.
type trouble struct {
	mu     sync.Mutex
	disk   error // the disk's last refusal to store; nil after the next success
	index  error // why the index's file does not say what memory says
	said   error // what the log says of the disk
	saidAt time.Time
}

// troublePause is how long the log says nothing of trouble that comes and goes.
const troublePause = time.Minute

// NoteTrouble remembers whether the disk stores, nil when it does. The log speaks of
// a change only.
func (s *Store) NoteTrouble(err error) {
	s.trouble.mu.Lock()
	s.trouble.disk = err
	s.trouble.mu.Unlock()
	s.sayTrouble()
}

// sayTrouble logs a change, unless it came within troublePause of the last one: then
// the committer, which calls it at each tick, says it later.
func (s *Store) sayTrouble() {
	t := &s.trouble
	t.mu.Lock()
	err, before := t.disk, t.said
	if (err == nil) == (before == nil) || time.Since(t.saidAt) < troublePause {
		t.mu.Unlock()
		return
	}
	t.said, t.saidAt = err, time.Now()
	t.mu.Unlock()
	switch {
	case err != nil && before == nil:
		s.log.Sugar().Warnw("objects pass through without being stored", "cause", err.Error())
	case err == nil && before != nil:
		s.log.Sugar().Infow("objects are stored again", "was", before.Error())
	}
}

// noteIndexTrouble is told how each write of the index has ended, by its writer.
func (s *Store) noteIndexTrouble(err error) {
	s.trouble.mu.Lock()
	before := s.trouble.index
	s.trouble.index = err
	s.trouble.mu.Unlock()
	switch log := s.log.Sugar(); {
	case errors.Is(err, index.ErrBroken):
		log.Errorw("the index is set aside and written afresh from memory", "cause", err.Error(), "kept_as", brokenName)
	case err != nil && before == nil:
		log.Warnw("the index is not written: a restart would not know what is new", "cause", err.Error())
	case err == nil && before != nil:
		log.Infow("the index is written again", "was", before.Error())
	}
}

// probe finds out whether a disk that refused stores again, when nobody downloads
// anything that would tell. It runs in the committer.
func (s *Store) probe() {
	s.trouble.mu.Lock()
	refused := s.trouble.disk
	s.trouble.mu.Unlock()
	if refused == nil {
		return
	}
	path := filepath.Join(s.opts.Dir, probeName)
	if err := s.opts.Steps.Do("probe", func() error { return regular.Replace(path, make([]byte, fsBlock), 0o600) }); err != nil {
		os.Remove(path)
		return
	}
	if os.Remove(path) != nil {
		return
	}
	if _, _, err := s.tryReserve(index.ListedDomain, 0); err == nil {
		s.NoteTrouble(nil)
	}
}
