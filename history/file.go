// SPDX-License-Identifier: Apache-2.0

package history

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tarn/internal/regular"
)

// The file has one JSON document a line: an entry, or a sum. When it has most of what it
// may have, the last of what is in memory is written anew, and takes its place.

const (
	// Most is the bound on the file and the one that takes its place, in bytes.
	Most = 8 << 20
	// full and anew are how many eighths of that a file has at most, and begins with
	// when it is written anew: both are there for a moment.
	full, anew = 5, 8 - full
	// least is what is worth a file.
	least = 64 << 10
	// flushEvery is how often what is settled is written.
	flushEvery = 5 * time.Second
	// maxLine is more than an entry takes, in bytes.
	maxLine = 16 << 10
	// suffix is what the name has besides of a file that is to take the other's place.
	suffix = ".new"
)

// File is where a history is kept.
type File struct {
	Path string
	// Most bounds what it takes, in bytes; less than 64 KiB is none at all.
	Most int64
	// Room makes room for so many bytes more, or fails. nil: there is room.
	Room func(n int64) error
	// Trouble hears that nothing can be written, once, and nil when it can again. nil
	// hears nothing.
	Trouble func(error)
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
	failing bool // so it was said
	loading atomic.Bool
	stop    chan struct{}
	stopped sync.WaitGroup
}

type line struct {
	*Entry
	Sum *Sum `json:"sum,omitempty"`
}

// Load reads in the background what an earlier process has kept, and puts it before what
// has been added meanwhile; nobody waits for the disk. done is closed when that has been
// done. Until then nothing is written.
func (h *History) Load(path string) (done <-chan struct{}) {
	ended := make(chan struct{})
	h.writer.loading.Store(true)
	h.writer.stopped.Go(func() {
		defer close(ended)
		past := New(h.now)
		past.read(path, Most)
		h.precede(past)
		h.writer.loading.Store(false)
	})
	return ended
}

// precede has the past come before what is here.
func (h *History) precede(past *History) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.writer.written = past.next - 1
	if n := len(past.day); n > 1 {
		h.writer.sum = past.day[n-2].Start
	}
	since := slices.Collect(h.backward())
	slices.Reverse(since)
	for _, e := range since {
		past.append(e)
	}
	for _, s := range h.day {
		t := past.day.at(s.Start)
		start := t.Start
		*t = Total([]Sum{*t, s})
		t.Start = start
	}
	h.kept, h.cheap, h.next, h.day = past.kept, past.cheap, past.next, past.day
}

// Keep keeps the history in a file from now on, until Close.
func (h *History) Keep(f File) {
	if f.Most < least {
		return
	}
	h.writer.file = f
	os.Remove(f.Path + suffix) // of a process that was killed
	h.writer.torn = true       // by that, perhaps
	h.writer.stop = make(chan struct{})
	h.writer.stopped.Go(h.flushLoop)
}

// read takes what can be read of the end of a file. Nobody else has the history yet.
func (h *History) read(path string, most int64) {
	f, err := regular.Open(path, os.O_RDONLY, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Size() > most {
		f.Seek(-most, io.SeekEnd) // into a line, perhaps, which is left out then
	}
	lines := bufio.NewReaderSize(io.LimitReader(f, most), maxLine)
	for {
		text, err := lines.ReadSlice('\n')
		if err == nil {
			h.take(text)
			continue
		}
		for errors.Is(err, bufio.ErrBufferFull) { // no line of ours: on to the next
			_, err = lines.ReadSlice('\n')
		}
		if err != nil {
			return
		}
	}
}

// take takes a line, if it is one.
func (h *History) take(text []byte) {
	l := line{Entry: &Entry{}}
	if json.Unmarshal(text, &l) != nil {
		return
	}
	// A clock that was ahead once would have its sums be the latest for ever.
	ahead := h.now().Add(maxAhead)
	switch {
	case l.Sum != nil:
		if l.Sum.Start.Before(ahead) {
			h.takeSum(*l.Sum)
		}
	case !l.At.IsZero() && l.At.Before(ahead) && l.Count > 0:
		h.append(l.Entry)
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
	if w.loading.Load() {
		return nil
	}
	text, last, sum := h.settled(all)
	if len(text) == 0 {
		return nil
	}
	err := w.write(text, h.snapshot)
	if w.torn = err != nil; err == nil {
		w.written, w.sum = last, sum
	}
	if w.file.Trouble != nil && w.failing != (err != nil) {
		w.failing = err != nil
		w.file.Trouble(err)
	}
	return err
}

// settled is what is to be written, and what will have been then.
func (h *History) settled(all bool) (text []byte, last int64, sum time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	last, sum = h.writer.written, h.writer.sum
	var fresh []*Entry
	for e := range h.backward() {
		if e.ID <= last {
			break
		}
		fresh = append(fresh, e)
	}
	for _, e := range slices.Backward(fresh) {
		// A clock that was set back makes an entry of times to come.
		if !all && h.now().Sub(e.At).Abs() < together {
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

// snapshot are the last entries that were written, and all sums, as many bytes as a file
// may begin with.
func (h *History) snapshot() (text []byte) {
	h.mu.Lock()
	day := slices.Clone(h.day)
	written := h.writer.written
	entries := slices.Collect(h.backward())
	h.mu.Unlock()
	for _, s := range day {
		text = appendLine(text, line{Sum: &s})
	}
	var lines [][]byte
	left := int(h.writer.file.Most/8*anew) - len(text)
	for _, e := range entries {
		if e.ID > written {
			continue
		}
		one := appendLine(nil, line{Entry: e}) // in which nothing more is counted: nobody changes it
		if left -= len(one); left < 0 {
			break
		}
		lines = append(lines, one)
	}
	slices.Reverse(lines)
	return append(text, bytes.Join(lines, nil)...)
}

func appendLine(text []byte, l line) []byte {
	data, err := json.Marshal(l)
	if err != nil { // there is nothing in it that cannot be
		return text
	}
	return append(append(text, data...), '\n')
}

// write appends to the file. One that would have too much is replaced before, by what
// snapshot returns.
func (w *writer) write(text []byte, snapshot func() []byte) error {
	var size int64
	info, err := os.Lstat(w.file.Path)
	if err == nil {
		size = info.Size()
	}
	if size+int64(len(text)) > w.file.Most/8*full {
		begin := snapshot()
		if err := w.room(0, int64(len(begin))); err != nil {
			return err
		}
		if err := w.replace(begin); err != nil {
			return err
		}
		size, w.torn = int64(len(begin)), false
	}
	if w.torn {
		text = append([]byte{'\n'}, text...)
	}
	if err := w.room(size, int64(len(text))); err != nil {
		return err
	}
	return w.appendTo(text)
}

// room makes room for what a file of that size grows by.
func (w *writer) room(size, n int64) error {
	more := blocks(size+n) - blocks(size)
	if w.file.Room == nil || more <= 0 {
		return nil
	}
	return w.file.Room(more)
}

// replace has the text take the file's place. It need not be durable: what a power cut
// leaves is the file before it, or lines that can be read and others that are left out.
func (w *writer) replace(text []byte) error {
	path := w.file.Path + suffix
	os.Remove(path)
	f, err := regular.Open(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(path, w.file.Path)
	}
	if err != nil {
		os.Remove(path)
	}
	return err
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
