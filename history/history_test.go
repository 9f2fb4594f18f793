// SPDX-License-Identifier: Apache-2.0

package history

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// clock is a time that a test moves, and that the flush loop looks at.
type clock struct{ t atomic.Int64 }

func (c *clock) now() time.Time          { return time.Unix(0, c.t.Load()).UTC() }
func (c *clock) forward(d time.Duration) { c.t.Add(int64(d)) }

func newClock() *clock {
	c := &clock{}
	c.t.Store(time.Date(2026, 3, 1, 8, 0, 0, 0, time.UTC).UnixNano())
	return c
}

func hit(c *clock, n int) Entry {
	return Entry{At: c.now(), Client: "containerd", Method: "GET", Upstream: "docker.io", Repository: fmt.Sprintf("library/app%d", n),
		Kind: "blobs", Digest: digest.FromString(fmt.Sprint(n)), Outcome: "hit", Status: 200, Bytes: 100}
}

func all(h *History) []Entry { return h.After(0, 1<<30) }

func TestWhatIsAlikeIsOneEntry(t *testing.T) {
	c := newClock()
	h := New(c.now)
	for range 5 {
		h.Add(hit(c, 1))
		c.forward(5 * time.Second)
	}
	other := hit(c, 1)
	other.Status = 206
	h.Add(other)
	c.forward(together)
	h.Add(hit(c, 1))
	got := all(h)
	if len(got) != 3 || got[0].Count != 5 || got[0].Bytes != 500 || got[0].Last.Sub(got[0].At) != 20*time.Second || got[1].Count != 1 || got[2].Count != 1 {
		t.Fatalf("%+v", got)
	}
}

func TestTheLastOnesWithinTheBound(t *testing.T) {
	c := newClock()
	h := New(c.now)
	for i := range 40_000 {
		e := hit(c, i)
		e.Detail = strings.Repeat("x", 1000)
		h.Add(e)
		c.forward(time.Second)
	}
	got := all(h)
	if h.kept.bytes+h.cheap.bytes > memory || len(got) == 0 || len(got) == 40_000 || int64(len(h.open)) > int64(len(got)) {
		t.Fatalf("%d entries of %d bytes, %d of them open", len(got), h.kept.bytes, len(h.open))
	}
	if last := got[len(got)-1]; last.ID != 40_000 || len(last.Detail) > maxDetail+3 {
		t.Fatalf("%+v", last)
	}
	if !h.Reach().Equal(got[0].At) {
		t.Fatalf("it reaches back to %v, and the first entry is of %v", h.Reach(), got[0].At)
	}
}

func TestWhyIsTheLastThatIsKnown(t *testing.T) {
	c := newClock()
	h := New(c.now)
	d := digest.FromString("object")
	is := func(want Cause) {
		t.Helper()
		if got := h.Why(d); got != want {
			t.Fatalf("%q, not %q", got, want)
		}
	}
	add := func(e Entry) {
		e.At, e.Digest, e.Kind = c.now(), d, "manifests"
		h.Add(e)
		c.forward(time.Minute)
	}
	is(NeverSeen)
	add(Entry{Method: "HEAD", Outcome: "miss", Status: 200, Before: digest.FromString("other")})
	is(Moved)
	add(Entry{Method: "GET", Outcome: "error", Status: 200})
	is(Unfinished)
	add(Entry{Method: "GET", Outcome: "refused", Status: 403})
	is(Unfinished)
	add(Entry{Method: "GET", Outcome: "miss", Status: 200})
	is(Lost)
	h.Went(d, 10, Evicted)
	is(Evicted)
	add(Entry{Method: "HEAD", Outcome: "miss", Status: 200, Before: digest.FromString("other")})
	is(Evicted)
	add(Entry{Method: "GET", Outcome: "hit", Status: 200})
	is(Lost)
}

func TestARestartRemembers(t *testing.T) {
	c := newClock()
	f := File{Path: filepath.Join(t.TempDir(), "decisions"), Most: Most}
	h := New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	for i := range 10 {
		h.Add(hit(c, i))
	}
	h.Received(7)
	c.forward(time.Hour)
	h.Add(hit(c, 10))
	h.Received(5)
	if err := h.flush(false); err != nil {
		t.Fatal(err)
	}
	if n := count(t, f.Path); n != 10+1 { // what is not settled is not written, and of sums those that have ended
		t.Fatalf("%d lines", n)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	reach := h.Reach()
	// A power cut may leave half a line.
	tear(t, f.Path, `{"id":99,"at":"2026-`)
	for round := range 3 {
		h = New(c.now)
		<-h.Load(f.Path)
		h.Keep(f)
		if got := all(h); len(got) != 11+round {
			t.Fatalf("%d entries after a restart, not %d: %+v", len(got), 11+round, got)
		}
		if total := Total(h.Day()); total.Received != 12 || total.Requests != 11+int64(round) {
			t.Fatalf("%+v", total)
		}
		if got := h.Reach(); !got.Equal(reach) {
			t.Fatalf("it reaches back to %v, not %v", got, reach)
		}
		h.Add(hit(c, 20+round))
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func count(t *testing.T, path string) int {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(strings.TrimLeft(string(data), "\n"), "\n")
}

func tear(t *testing.T, path, half string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(half); err != nil {
		t.Fatal(err)
	}
}

// TestWhatComesWhileThePastIsReadComesAfterIt, also after another restart.
func TestWhatComesWhileThePastIsReadComesAfterIt(t *testing.T) {
	c := newClock()
	f := File{Path: filepath.Join(t.TempDir(), "decisions"), Most: Most}
	h := New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	for i := range 3000 {
		h.Add(hit(c, i))
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	h = New(c.now)
	done := h.Load(f.Path)
	h.Keep(f)
	h.Add(hit(c, 5000))
	h.Add(hit(c, 5000))
	<-done
	h.Add(hit(c, 5000)) // which is counted in what came meanwhile
	got := all(h)
	if len(got) != 3001 || got[3000].Repository != "library/app5000" || got[3000].Count != 3 || got[0].Repository != "library/app0" || got[3000].ID != 3001 {
		t.Errorf("%d entries, the last is %+v", len(got), got[len(got)-1])
	}
	if n := Total(h.Day()).Requests; n != 3003 {
		t.Errorf("%d requests in the day", n)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	h = New(c.now)
	<-h.Load(f.Path)
	if n := len(all(h)); n != 3001 {
		t.Errorf("%d entries after another restart", n)
	}
}

func TestTheFilesHaveABound(t *testing.T) {
	c := newClock()
	var asked int64
	dir := t.TempDir()
	f := File{Path: filepath.Join(dir, "decisions"), Most: least, Room: func(n int64) error { asked += n; return nil }}
	h := New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	h.Received(3)
	for i := range 2000 {
		h.Add(hit(c, i))
		c.forward(time.Minute)
		if err := h.flush(false); err != nil {
			t.Fatal(err)
		}
		var taken int64
		for _, path := range []string{f.Path, f.Path + suffix} {
			if info, err := os.Stat(path); err == nil {
				taken += info.Size()
			}
		}
		if taken > f.Most {
			t.Fatalf("%d bytes of %d after %d entries", taken, f.Most, i)
		}
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	again := New(c.now)
	<-again.Load(f.Path)
	again.Keep(f)
	defer again.Close()
	if got := all(again); len(got) < 20 || got[len(got)-1].Repository != "library/app1999" {
		t.Fatalf("%d entries", len(got))
	}
	if a, b := Total(h.Day()), Total(again.Day()); a != b {
		t.Fatalf("the day is %+v after a restart, and was %+v", b, a)
	}
	if asked < least/2 {
		t.Fatalf("room was made for %d bytes", asked)
	}
}

func TestWithoutRoomNothingIsWrittenAndNothingLost(t *testing.T) {
	c := newClock()
	full := errors.New("no room")
	f := File{Path: filepath.Join(t.TempDir(), "decisions"), Most: Most, Room: func(int64) error { return full }}
	h := New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	h.Add(hit(c, 1))
	c.forward(time.Minute)
	if err := h.flush(false); !errors.Is(err, full) {
		t.Fatal(err)
	}
	if _, err := os.Stat(f.Path); err == nil {
		t.Fatal("there is a file")
	}
	h.writer.file.Room = nil
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if n := count(t, f.Path); n != 2 {
		t.Fatalf("%d lines", n)
	}
}

func TestALinkIsNotFollowed(t *testing.T) {
	c := newClock()
	dir := t.TempDir()
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := File{Path: filepath.Join(dir, "decisions"), Most: Most}
	if err := os.Symlink(other, f.Path); err != nil {
		t.Fatal(err)
	}
	h := New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	h.Add(hit(c, 1))
	if err := h.Close(); err == nil {
		t.Fatal("no error")
	}
	if data, _ := os.ReadFile(other); string(data) != "mine" {
		t.Fatalf("%q", data)
	}
}

func TestADay(t *testing.T) {
	c := newClock()
	h := New(c.now)
	for i := range 48 * 4 {
		e := hit(c, i)
		h.Add(e)
		e.Outcome = "miss"
		h.Add(e)
		h.Received(50)
		h.Went(e.Digest, 1, Evicted)
		c.forward(quarter)
	}
	day := h.Day()
	if len(day) > quarters || len(day) < quarters-1 {
		t.Fatalf("%d quarters", len(day))
	}
	want := Sum{Start: day[0].Start, Requests: 2 * int64(len(day)), FromDisk: 100 * int64(len(day)), FromRegistry: 100 * int64(len(day)), Received: 50 * int64(len(day))}
	if got := Total(day); got != want {
		t.Fatalf("%+v, not %+v", got, want)
	}
}

// What a hit costs: below a microsecond.
func BenchmarkAdd(b *testing.B) {
	for _, distinct := range []int{1, 1000, 1_000_000} {
		b.Run(fmt.Sprintf("of %d", distinct), func(b *testing.B) {
			c := newClock()
			h := New(c.now)
			entries := make([]Entry, min(distinct, 100_000))
			for i := range entries {
				entries[i] = hit(c, i)
			}
			b.ReportAllocs()
			for i := range b.N {
				e := entries[i%len(entries)]
				e.At = c.now()
				if i%1000 == 0 {
					c.forward(time.Second)
				}
				h.Add(e)
			}
		})
	}
}

// What a full history takes: at most 16 MiB.
func TestTheMemoryOfAFullHistory(t *testing.T) {
	taken := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	c := newClock()
	for name, detail := range map[string]string{"short entries": "", "long entries": strings.Repeat("x", 1000)} {
		before := taken()
		h := New(c.now)
		for i := range 150_000 {
			e := hit(c, i)
			e.Detail = detail
			h.Add(e) // all of them within the time in which more of the same would be counted
		}
		grown := taken() - before
		t.Logf("%s: %d entries take %d bytes", name, len(h.kept.entries)+len(h.cheap.entries), grown)
		if grown > 16<<20 || grown < memory/4 {
			t.Errorf("%s: %d entries take %d bytes", name, len(h.kept.entries)+len(h.cheap.entries), grown)
		}
		runtime.KeepAlive(h)
	}
}

// denied is what anybody can bring about, by a name that he makes up.
func denied(c *clock, n int) Entry {
	return Entry{At: c.now(), Client: "other", Method: "GET", Upstream: "docker.io", Repository: fmt.Sprintf("made/up%d", n), Kind: "manifests", Tag: "v1",
		Outcome: "refused", Status: 403, Cause: Refused}
}

func TestMadeUpNamesPushOutNothingThatWasServed(t *testing.T) {
	c := newClock()
	f := File{Path: filepath.Join(t.TempDir(), "decisions"), Most: Most}
	h := New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	const served = 2000
	for i := range served {
		h.Add(hit(c, i))
	}
	for i := range 100_000 {
		e := denied(c, i)
		if i%2 == 0 { // or by a registry of his own
			e.Upstream, e.Unlisted, e.Outcome, e.Status, e.Cause = fmt.Sprintf("r%d.example", i), true, "miss", 200, NeverSeen
		}
		h.Add(e)
		if c.forward(10 * time.Millisecond); i%100 == 0 {
			if err := h.flush(false); err != nil {
				t.Fatal(err)
			}
		}
	}
	honest := func(h *History) int {
		return len(h.Find(func(e *Entry) bool { return !e.cheap() }, 1<<30))
	}
	if n := honest(h); n != served {
		t.Errorf("%d entries of %d are left", n, served)
	}
	if got := all(h); got[len(got)-1].Repository != "made/up99999" || h.kept.bytes+h.cheap.bytes > memory {
		t.Errorf("the last of them is %+v, of %d and %d bytes", got[len(got)-1], h.kept.bytes, h.cheap.bytes)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	again := New(c.now)
	<-again.Load(f.Path)
	again.Keep(f)
	defer again.Close()
	if n := honest(again); n != served {
		t.Errorf("after a restart %d entries of %d are left", n, served)
	}
	if info, err := os.Stat(f.Path); err != nil || info.Size() > Most {
		t.Errorf("%v, %v", info, err)
	}
}

func TestWhatIsNoLineIsLeftOut(t *testing.T) {
	c := newClock()
	f := File{Path: filepath.Join(t.TempDir(), "decisions"), Most: Most}
	h := New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	h.Add(hit(c, 1))
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	for _, garbage := range []string{strings.Repeat("x", 10*maxLine) + "\n", "\x00\xff\n", "{}\n[]\nnull\n", `{"sum":{}}` + "\n", "half"} {
		tear(t, f.Path, garbage)
		h = New(c.now)
		<-h.Load(f.Path)
		h.Keep(f)
		before := len(all(h))
		c.forward(time.Minute)
		h.Add(hit(c, before+1))
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		h = New(c.now)
		<-h.Load(f.Path)
		h.Keep(f)
		if got := len(all(h)); before == 0 || got != before+1 {
			t.Errorf("%d entries before %.20q, and %d after it", before, garbage, got)
		}
		h.Close()
	}
}

func TestAFileThatIsMuchTooLargeIsReplaced(t *testing.T) {
	c := newClock()
	f := File{Path: filepath.Join(t.TempDir(), "decisions"), Most: Most}
	if err := os.WriteFile(f.Path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(f.Path, 10<<30); err != nil { // a hole takes no room here
		t.Fatal(err)
	}
	tear(t, f.Path, "\n"+`{"id":1,"at":"2026-03-01T07:00:00Z","count":1,"outcome":"hit","bytes":1}`+"\n")
	h := New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	h.Add(hit(c, 1))
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(f.Path); err != nil || info.Size() > Most {
		t.Fatalf("%v, %v", info.Size(), err)
	}
	h = New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	defer h.Close()
	if got := all(h); len(got) != 2 {
		t.Fatalf("%+v", got)
	}
}

func TestAClockThatWasAhead(t *testing.T) {
	c := newClock()
	f := File{Path: filepath.Join(t.TempDir(), "decisions"), Most: Most}
	h := New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	h.Add(hit(c, 1))
	c.forward(10 * 365 * 24 * time.Hour) // until the time server has answered
	h.Add(hit(c, 2))
	c.forward(-10 * 365 * 24 * time.Hour)
	h.Add(hit(c, 3))
	c.forward(time.Minute)
	if err := h.flush(false); err != nil {
		t.Fatal(err)
	}
	if n := count(t, f.Path); n < 3 {
		t.Errorf("%d lines: what came after it waits for that time", n)
	}
	c.forward(48 * time.Hour)
	h.Add(hit(c, 4))
	if got := Total(h.Day()).Requests; got != 1 {
		t.Errorf("%d requests in a day of one", got)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	tear(t, f.Path, `{"sum":{"start":"2036-02-27T08:00:00Z","requests":1000}}`+"\n") // by one that was killed then
	h = New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	defer h.Close()
	if got := Total(h.Day()).Requests; got != 1 {
		t.Errorf("%d requests in a day of one, after a restart", got)
	}
}

func TestTroubleIsSaidOnce(t *testing.T) {
	c := newClock()
	var said []error
	f := File{Path: filepath.Join(t.TempDir(), "decisions"), Most: Most, Trouble: func(err error) { said = append(said, err) }}
	if err := os.Mkdir(f.Path, 0o700); err != nil {
		t.Fatal(err)
	}
	h := New(c.now)
	<-h.Load(f.Path)
	h.Keep(f)
	for i := range 3 {
		h.Add(hit(c, i))
		c.forward(time.Minute)
		if err := h.flush(false); err == nil {
			t.Fatal("a directory was written to")
		}
	}
	if err := os.Remove(f.Path); err != nil {
		t.Fatal(err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if len(said) != 2 || said[0] == nil || said[1] != nil {
		t.Fatalf("%v", said)
	}
	if n := count(t, f.Path); n != 3+1 {
		t.Fatalf("%d lines", n)
	}
}
