// SPDX-License-Identifier: Apache-2.0

package blobstore

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"tarn/internal/fault"
	"tarn/internal/regular"

	"github.com/opencontainers/go-digest"
)

// Pending is a file that is being filled, perhaps with a journal beside it that
// says what of it was. The file may be read and written through File by several
// goroutines at once, and stays readable after Commit or Discard until it is
// closed. The methods are for one goroutine at a time.
type Pending struct {
	File   *os.File
	Digest digest.Digest // what it is meant to become
	// Notes are the records of the journal as Left found it.
	Notes [][]byte

	path    string   // "" after Commit or Discard
	journal *os.File // nil before the first Note
	dropped bool     // the journal was removed
	steps   fault.Steps
}

const (
	journalSuffix = ".journal"
	// maxJournal is what is read of one: many times what a flight writes.
	maxJournal = 1 << 20
)

// Create opens a new pending file.
func (s *Store) Create(d digest.Digest) (*Pending, error) {
	if err := CheckDigest(d); err != nil {
		return nil, fmt.Errorf("create a pending file: %w", err)
	}
	name := strings.Replace(d.String(), ":", "-", 1) + ".*"
	var f *os.File
	err := s.steps.Do("create pending", func() (err error) { f, err = os.CreateTemp(s.pendingDir(), name); return err }) // mode 0600
	if err != nil {
		return nil, fmt.Errorf("create a pending file: %w", err)
	}
	return &Pending{File: f, Digest: d, path: f.Name(), steps: s.steps}, nil
}

// Reopen opens the file once more, for reading, wherever it lies by now, or
// does not any more.
func (p *Pending) Reopen() (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", p.File.Fd()))
}

// WriteAt implements io.WriterAt.
func (p *Pending) WriteAt(b []byte, off int64) (n int, err error) {
	if p.steps == nil { // a function for each piece would be waste
		return p.File.WriteAt(b, off)
	}
	err = p.steps.Do("write pending", func() (err error) { n, err = p.File.WriteAt(b, off); return err })
	return n, err
}

// Sync makes what was written to the file durable, so that a record may be
// noted of which a power cut takes nothing. The record itself may be lost in
// one: the journal is advisory.
func (p *Pending) Sync() error {
	if err := p.steps.Do("fsync pending", p.File.Sync); err != nil {
		return fmt.Errorf("fsync a pending file: %w", err)
	}
	return nil
}

// Note appends a record to the journal. A record has no line feed.
func (p *Pending) Note(record []byte) error {
	if p.journal == nil {
		err := p.steps.Do("create journal", func() (err error) {
			p.journal, err = regular.Open(p.path+journalSuffix, os.O_CREATE|os.O_WRONLY|os.O_APPEND, fileMode)
			return err
		})
		if err != nil {
			return fmt.Errorf("open a journal: %w", err)
		}
	}
	err := p.steps.Do("write journal", func() error { _, err := p.journal.Write(frame(record)); return err })
	if err != nil {
		return fmt.Errorf("write a journal: %w", err)
	}
	return nil
}

// frame is a record as a line that says of itself whether it is whole.
func frame(record []byte) []byte {
	return fmt.Appendf(nil, "%08x %s\n", crc32.ChecksumIEEE(record), record)
}

// Discard deletes the pending file. Readers that have it open keep it. After an
// error it may be called again, also on one that is closed; what is left in the
// end is found at the next start.
func (p *Pending) Discard() error {
	if p.path != "" {
		if err := remove(p.steps, "remove pending", p.path); err != nil {
			return fmt.Errorf("remove a pending file: %w", err)
		}
		p.path = ""
	}
	return p.dropJournal()
}

// Gone tells whether nothing is left to Discard.
func (p *Pending) Gone() bool { return p.path == "" && (p.journal == nil || p.dropped) }

func (p *Pending) dropJournal() error {
	if p.journal != nil && !p.dropped {
		if err := remove(p.steps, "remove journal", p.journal.Name()); err != nil {
			return fmt.Errorf("remove a journal: %w", err)
		}
		p.dropped = true
	}
	return nil
}

// Close closes what is open of it, and deletes nothing.
func (p *Pending) Close() error {
	err := p.File.Close()
	if p.journal != nil {
		err = errors.Join(err, p.journal.Close())
	}
	return err
}

// PendingBytes is what all pending files and their journals take on disk, as far as
// they can be looked at.
func (s *Store) PendingBytes() (n int64) {
	entries, _ := os.ReadDir(s.pendingDir())
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			n += Allocated(info)
		}
	}
	return n
}

// Left opens the pending files of an earlier process with what their journals
// say. Those without a journal cannot be continued: they are deleted, and only
// what they were meant to become is returned besides.
func (s *Store) Left() (left []*Pending, deleted []digest.Digest, err error) {
	var entries []fs.DirEntry
	err = s.steps.Do("list pending", func() (err error) { entries, err = os.ReadDir(s.pendingDir()); return err })
	if err != nil {
		return nil, nil, fmt.Errorf("look for pending files: %w", err)
	}
	kept := make(map[string]bool) // journals
	for _, e := range entries {
		path := filepath.Join(s.pendingDir(), e.Name())
		d, ok := pendingDigest(e.Name())
		if !ok || !e.Type().IsRegular() {
			continue
		}
		p := s.openLeft(path, d)
		if p == nil {
			deleted = append(deleted, d)
			continue
		}
		kept[e.Name()], kept[e.Name()+journalSuffix] = true, true
		left = append(left, p)
	}
	for _, e := range entries {
		if kept[e.Name()] {
			continue
		}
		if err := s.steps.Do("sweep pending", func() error { return os.RemoveAll(filepath.Join(s.pendingDir(), e.Name())) }); err != nil {
			for _, p := range left {
				p.Close()
			}
			return nil, deleted, fmt.Errorf("sweep pending files: %.100q: %w", e.Name(), bare(err))
		}
	}
	return left, deleted, nil
}

// bare is an error of a file without its path, which may be any bytes.
func bare(err error) error {
	var of *fs.PathError
	if errors.As(err, &of) {
		return of.Err
	}
	return err
}

// pendingDigest reads what Create wrote into a file's name.
func pendingDigest(name string) (digest.Digest, bool) {
	name, random, _ := strings.Cut(name, ".")
	alg, encoded, _ := strings.Cut(name, "-")
	d := digest.NewDigestFromEncoded(digest.Algorithm(alg), encoded)
	return d, CheckDigest(d) == nil && !strings.Contains(random, ".")
}

// openLeft returns nil when there is nothing to continue from.
func (s *Store) openLeft(path string, d digest.Digest) *Pending {
	var data []byte
	err := s.steps.Do("read journal", func() (err error) { data, err = regular.Read(path+journalSuffix, maxJournal); return err })
	if err != nil {
		return nil
	}
	notes, whole := readNotes(data)
	if len(notes) == 0 {
		return nil
	}
	var f *os.File
	err = s.steps.Do("open pending", func() (err error) { f, err = regular.Open(path, os.O_RDWR, 0); return err })
	if err != nil {
		return nil
	}
	p := &Pending{File: f, Digest: d, Notes: notes, path: path, steps: s.steps}
	// What a crash tore must not be glued to the next record.
	if p.journal, err = regular.Open(path+journalSuffix, os.O_WRONLY|os.O_APPEND, 0); err == nil {
		err = s.steps.Do("cut journal", func() error { return p.journal.Truncate(int64(whole)) })
	}
	if err != nil {
		p.Close()
		return nil
	}
	return p
}

// readNotes returns the records up to the first that is not as it was written,
// and how many bytes they take.
func readNotes(data []byte) (notes [][]byte, whole int) {
	for line := range bytes.Lines(data) {
		_, record, ok := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
		if !ok || !bytes.Equal(frame(record), line) {
			break
		}
		notes = append(notes, record)
		whole += len(line)
	}
	return notes, whole
}
