// SPDX-License-Identifier: Apache-2.0

package history

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"tarn/internal/regular"
)

// The file has one JSON document a line: an entry, or a sum. When it has half of what
// both may have, it takes the place of the one before it.

const (
	// Most is the bound on both files, in bytes.
	Most = 8 << 20
	// least is what is worth a file.
	least = 64 << 10
	// flushEvery is how often what is settled is written.
	flushEvery = 5 * time.Second
	// maxLine is more than an entry takes, in bytes.
	maxLine = 16 << 10
	// Suffix is what the older file's name has besides.
	Suffix = ".old"
)

// File is where a history is kept.
type File struct {
	Path string
	// Most bounds both files, in bytes; less than 64 KiB is none at all.
	Most int64
	// Room makes room for so many bytes more, or fails. nil: there is room.
	Room func(n int64) error
}

// writer is the file's side of a history. The history's lock guards none of it.
type writer struct {
	file File
	mu   sync.Mutex // one at a time writes
	// written is the ID of the last entry that is in the file, and sum the start of
	// the last quarter that is.
	written int64
	sum     time.Time
	torn    bool // the last line may be half a line
	stop    chan struct{}
	stopped sync.WaitGroup
}

type line struct {
	*Entry
	Sum *Sum `json:"sum,omitempty"`
}

// Keep reads what an earlier process has kept, before anything else is added, and
// keeps the history there from now on, until Close.
func (h *History) Keep(f File) {
	if f.Most < least {
		return
	}
	h.writer.file = f
	h.mu.Lock()
	for _, path := range []string{f.Path + Suffix, f.Path} {
		h.read(path, f.Most)
	}
	h.writer.written = h.next - 1
	if n := len(h.day); n > 1 {
		h.writer.sum = h.day[n-2].Start
	}
	h.mu.Unlock()
	h.writer.torn = true // by a kill, perhaps
	h.writer.stop = make(chan struct{})
	h.writer.stopped.Go(h.flushLoop)
}

// read takes what can be read. Called with the lock.
func (h *History) read(path string, most int64) {
	f, err := regular.Open(path, os.O_RDONLY, 0)
	if err != nil {
		return
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, most))
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		l := line{Entry: &Entry{}}
		if json.Unmarshal(lines.Bytes(), &l) != nil {
			continue
		}
		switch {
		case l.Sum != nil:
			h.takeSum(*l.Sum)
		case !l.At.IsZero() && l.Count > 0:
			h.append(l.Entry)
		}
	}
}

// takeSum has the later of two sums of one quarter count: it goes on with the other.
func (h *History) takeSum(s Sum) {
	n := len(h.day)
	switch {
	case n > 0 && s.Start.Equal(h.day[n-1].Start):
		h.day[n-1] = s
	case n == 0 || s.Start.After(h.day[n-1].Start):
		*h.day.at(s.Start) = s
	}
}

func (h *History) flushLoop() {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for {
		select {
		case <-h.writer.stop:
			return
		case <-tick.C:
			h.flush(false)
		}
	}
}

// Close writes what is left.
func (h *History) Close() error {
	if h == nil || h.writer.stop == nil {
		return nil
	}
	close(h.writer.stop)
	h.writer.stopped.Wait()
	h.writer.stop = nil
	return h.flush(true)
}

// flush writes entries in which nothing more is counted, and quarters that have
// ended; or all. What cannot be written is tried again.
func (h *History) flush(all bool) error {
	w := &h.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	text, last, sum := h.settled(all)
	if len(text) == 0 {
		return nil
	}
	anew, err := w.write(text)
	if w.torn = err != nil; err != nil {
		return err
	}
	w.written, w.sum = last, sum
	if anew {
		w.sum = time.Time{} // all of them, the next time
	}
	return nil
}

// settled is what is to be written, and what will have been then.
func (h *History) settled(all bool) (text []byte, last int64, sum time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	last, sum = h.writer.written, h.writer.sum
	first := h.next - int64(len(h.entries))
	for i := max(0, last+1-first); i < int64(len(h.entries)); i++ {
		e := h.entries[i]
		if !all && h.now().Sub(e.At) < together {
			break
		}
		h.close(e)
		text = appendLine(text, line{Entry: e})
		last = e.ID
		if len(text) >= int(h.writer.file.Most/4) {
			break // the rest comes with the next
		}
	}
	for i, s := range h.day {
		ended := i+1 < len(h.day)
		if s.Start.After(sum) && (ended || all) {
			text = appendLine(text, line{Sum: &s})
			if ended {
				sum = s.Start
			}
		}
	}
	return text, last, sum
}

func appendLine(text []byte, l line) []byte {
	data, err := json.Marshal(l)
	if err != nil { // there is nothing in it that cannot be
		return text
	}
	return append(append(text, data...), '\n')
}

// write appends to the file, or begins it anew, after it has made room for that.
func (w *writer) write(text []byte) (anew bool, err error) {
	info, err := os.Lstat(w.file.Path)
	if err == nil && info.Size()+int64(len(text)) > w.file.Most/2 {
		if err := os.Rename(w.file.Path, w.file.Path+Suffix); err != nil {
			return false, err
		}
		anew = true
	}
	if w.torn {
		text = append([]byte{'\n'}, text...)
	}
	var size int64
	if err == nil && !anew {
		size = info.Size()
	}
	if more := blocks(size+int64(len(text))) - blocks(size); w.file.Room != nil && more > 0 {
		if err := w.file.Room(more); err != nil {
			return anew, err
		}
	}
	return anew, w.appendTo(text)
}

// blocks is what so many bytes take on a disk.
func blocks(n int64) int64 {
	const block = 4 << 10
	return (n + block - 1) / block * block
}

func (w *writer) appendTo(text []byte) error {
	f, err := regular.Open(w.file.Path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if _, err = f.Write(text); err == nil {
		return nil
	}
	// Half a line is of no use, and takes room.
	if terr := f.Truncate(info.Size()); terr != nil && !errors.Is(terr, fs.ErrInvalid) {
		err = errors.Join(err, terr)
	}
	return err
}
