// SPDX-License-Identifier: Apache-2.0

package blobstore

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"

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
}

const journalSuffix = ".journal"

// Create opens a new pending file.
func (s *Store) Create(d digest.Digest) (*Pending, error) {
	if err := CheckDigest(d); err != nil {
		return nil, fmt.Errorf("create a pending file: %w", err)
	}
	name := strings.Replace(d.String(), ":", "-", 1) + ".*"
	f, err := os.CreateTemp(s.pendingDir(), name) // mode 0600
	if err != nil {
		return nil, fmt.Errorf("create a pending file: %w", err)
	}
	return &Pending{File: f, Digest: d, path: f.Name()}, nil
}

// Reopen opens the file once more, for reading, wherever it lies by now, or
// does not any more.
func (p *Pending) Reopen() (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", p.File.Fd()))
}

// Sync makes what was written to the file durable, so that a record may be
// noted of which a power cut takes nothing. The record itself may be lost in
// one: the journal is advisory.
func (p *Pending) Sync() error {
	if err := p.File.Sync(); err != nil {
		return fmt.Errorf("fsync a pending file: %w", err)
	}
	return nil
}

// Note appends a record to the journal. A record has no line feed.
func (p *Pending) Note(record []byte) error {
	if p.journal == nil {
		f, err := os.OpenFile(p.path+journalSuffix, os.O_CREATE|os.O_WRONLY|os.O_APPEND, fileMode)
		if err != nil {
			return fmt.Errorf("open a journal: %w", err)
		}
		p.journal = f
	}
	if _, err := p.journal.Write(frame(record)); err != nil {
		return fmt.Errorf("write a journal: %w", err)
	}
	return nil
}

// frame is a record as a line that says of itself whether it is whole.
func frame(record []byte) []byte {
	return fmt.Appendf(nil, "%08x %s\n", crc32.ChecksumIEEE(record), record)
}

// Discard deletes the pending file. Readers that have it open keep it.
func (p *Pending) Discard() {
	if p.path != "" {
		os.Remove(p.path) // left behind, it is found at the next start
		p.path = ""
		p.dropJournal()
	}
}

// Empty gives the room back and leaves the name, for Left to find. It tells
// whether there is one.
func (p *Pending) Empty() bool {
	if p.path == "" || p.File.Truncate(0) != nil {
		return false
	}
	p.dropJournal()
	return true
}

func (p *Pending) dropJournal() {
	if p.journal != nil {
		os.Remove(p.journal.Name())
	}
}

// Close closes what is open of it, and deletes nothing.
func (p *Pending) Close() error {
	err := p.File.Close()
	if p.journal != nil {
		err = errors.Join(err, p.journal.Close())
	}
	return err
}

// Left opens the pending files of an earlier process with what their journals
// say. Those without a journal cannot be continued: they are deleted, and only
// what they were meant to become is returned besides.
func (s *Store) Left() (left []*Pending, deleted []digest.Digest, err error) {
	entries, err := os.ReadDir(s.pendingDir())
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
		p := openLeft(path, d)
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
		if err := os.RemoveAll(filepath.Join(s.pendingDir(), e.Name())); err != nil {
			for _, p := range left {
				p.Close()
			}
			return nil, deleted, fmt.Errorf("sweep pending files: %w", err)
		}
	}
	return left, deleted, nil
}

// pendingDigest reads what Create wrote into a file's name.
func pendingDigest(name string) (digest.Digest, bool) {
	name, random, _ := strings.Cut(name, ".")
	alg, encoded, _ := strings.Cut(name, "-")
	d := digest.NewDigestFromEncoded(digest.Algorithm(alg), encoded)
	return d, CheckDigest(d) == nil && !strings.Contains(random, ".")
}

// openLeft returns nil when there is nothing to continue from.
func openLeft(path string, d digest.Digest) *Pending {
	data, err := os.ReadFile(path + journalSuffix)
	if err != nil {
		return nil
	}
	notes, whole := readNotes(data)
	if len(notes) == 0 {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	p := &Pending{File: f, Digest: d, Notes: notes, path: path}
	// What a crash tore must not be glued to the next record.
	if p.journal, err = os.OpenFile(path+journalSuffix, os.O_WRONLY|os.O_APPEND, 0); err == nil {
		err = p.journal.Truncate(int64(whole))
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
