// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// A soak has everything go wrong at once, at random, for a while: a registry
// that fails, lies and dawdles, clients that leave, resume and read slowly, a
// disk that is full now and then, and a tarn that is killed. An oracle knows
// each object's bytes and each tag's history.
type soak struct {
	t      *testing.T
	i      image
	until  time.Time
	calm   atomic.Bool // nothing goes wrong any more
	killed atomic.Int64

	objects []v1.Descriptor
	history tagHistory
	counts  sync.Map // what happened, to *atomic.Int64
}

func (s *soak) count(what string) {
	n, _ := s.counts.LoadOrStore(what, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
}

func (s *soak) running() bool { return time.Now().Before(s.until) }

// tagHistory is which digests a tag meant, and when.
type tagHistory struct {
	mu     sync.Mutex
	meant  []digest.Digest
	begun  []time.Time // when the move to it began
	landed []time.Time // when that was over
}

// could tells whether the tag meant d at some moment between these two.
func (h *tagHistory) could(d digest.Digest, from, to time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for n, m := range h.meant {
		if m == d && !h.begun[n].After(to) && (n+1 >= len(h.landed) || !h.landed[n+1].Before(from)) {
			return true
		}
	}
	return false
}

// soakTime is what TARN_E2E_SOAK says, such as 10m.
func soakTime(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("TARN_E2E_SOAK")
	if text == "" {
		t.Skip("takes minutes: make soak")
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

const (
	soakDisk    = 48 << 20
	soakMaxSize = 24 << 20 // less than all objects
	soakTag     = "moving"
)

func TestSoak(t *testing.T) {
	r := newRegistry(t, nil)
	s := &soak{t: t}
	var files []file
	for n := range 18 {
		files = append(files, noise(fmt.Sprint("f", n), 2000<<(n%14), byte(n)))
	}
	s.i = pushSaying(t, "app/soak", "v1", "hello", files...)
	s.objects = slices.DeleteFunc(slices.Clone(s.i.objects), func(o v1.Descriptor) bool { return o.MediaType == v1.MediaTypeImageManifest })
	r.gate.chaos = s.misbehave
	dir := tmpfs(t, fmt.Sprint(soakDisk))
	settings := fmt.Sprintf("max_size: %d\ndefaults: {head_timeout: 2s, grant_ttl: 2s}\n", soakMaxSize)
	tarn := startTarn(t, dir, settings)

	length := soakTime(t)
	s.until = time.Now().Add(length)
	killsUntil := time.Now().Add(length * 2 / 3) // the last process is watched
	var all, killer sync.WaitGroup
	all.Go(s.moveTag)
	all.Go(func() { s.fillDisk(dir) })
	all.Go(func() { s.watchSpace(dir) })
	for range 8 {
		all.Go(s.client)
	}
	killer.Go(func() {
		for time.Now().Before(killsUntil) {
			s.sleep(time.Duration(1+rand.IntN(3)) * time.Second)
			s.reload(tarn)
			s.sleep(time.Duration(1+rand.IntN(3)) * time.Second)
			if rand.IntN(2) == 0 {
				s.killed.Add(1)
				tarn.kill(t)
				s.count("kills")
			} else {
				tarn.stop(t)
				s.count("restarts")
			}
			if rand.IntN(2) == 0 {
				os.RemoveAll(filepath.Join(dir, "blobs")) // all is cold
			}
			tarn = startTarn(t, dir, settings)
		}
	})
	killer.Wait()
	pid := tarn.cmd.Process.Pid
	s.sleep(length / 20) // warm
	middle := usage(t, pid)
	all.Go(func() {
		for s.running() {
			s.sleep(time.Second)
			s.reload(tarn)
		}
	})
	all.Wait()
	s.calm.Store(true)
	waitFor(t, "the downloads have ended", noFlights)
	for _, o := range s.objects {
		waitFor(t, "all is right in the end", func() error { _, err := get(s.i.repo, o); return err })
	}
	waitFor(t, "the downloads have ended", noFlights)
	http.DefaultClient.CloseIdleConnections()
	var end use
	waitFor(t, "tarn is where it began", func() error {
		end = usage(t, pid)
		if end.descriptors > 40 || end.goroutines > 60 || end.anonymous > 64<<20 {
			return fmt.Errorf("%+v, in the middle %+v", end, middle)
		}
		return nil
	})
	var said []string
	s.counts.Range(func(what, n any) bool {
		said = append(said, fmt.Sprintf("%v %d", what, n.(*atomic.Int64).Load()))
		return true
	})
	slices.Sort(said)
	t.Logf("%v: %s\nin the middle %+v\nin the end    %+v", length, strings.Join(said, ", "), middle, end)
	tarn.stop(t)
	checkFiles(t, dir)
}

// use is what a process holds.
type use struct {
	descriptors, goroutines int
	anonymous               int64 // bytes of memory
}

func usage(t *testing.T, pid int) (u use) {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	u.descriptors = len(entries)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	if _, rest, ok := strings.Cut(string(status), "RssAnon:"); ok {
		fmt.Sscan(rest, &u.anonymous)
		u.anonymous <<= 10
	}
	resp, err := http.Get("http://" + tarnAdminAddr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			u.goroutines, _ = strconv.Atoi(text)
		}
	}
	return u
}

// reload has what is being served go on under the rules that it came to.
func (s *soak) reload(tarn *process) {
	if err := tarn.cmd.Process.Signal(syscall.SIGHUP); err == nil {
		s.count("reloads")
	}
}

// sleep is for faults, which come when they come.
func (s *soak) sleep(d time.Duration) {
	timer := time.NewTimer(min(d, max(0, time.Until(s.until))))
	defer timer.Stop()
	<-timer.C
}

// misbehave is the registry.
func (s *soak) misbehave(w http.ResponseWriter, r *http.Request) bool {
	if s.calm.Load() || rand.IntN(3) > 0 {
		return false
	}
	switch what := rand.IntN(8); what {
	case 0:
		w.WriteHeader([]int{500, 502, 503, 429}[rand.IntN(4)])
	case 1:
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			conn.Close()
		}
	case 2: // silent for a while
		timer := time.NewTimer(time.Duration(rand.IntN(3000)) * time.Millisecond)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done():
		}
		return false
	default:
		if !strings.Contains(r.URL.Path, "/blobs/") || r.Method != http.MethodGet {
			return false
		}
		return s.spoil(w, r, what)
	}
	s.count("refusals")
	return true
}

// spoil answers with a body that is cut, wrong, or not the range.
func (s *soak) spoil(w http.ResponseWriter, r *http.Request, what int) bool {
	_, hex, _ := strings.Cut(r.URL.Path, "/blobs/sha256:")
	n := slices.IndexFunc(s.objects, func(o v1.Descriptor) bool { return o.Digest.Encoded() == hex })
	if n < 0 {
		return false
	}
	in := r.Clone(r.Context()) // to the registry's address that has no faults
	in.URL.Scheme, in.URL.Host, in.RequestURI = "http", pushAddr, ""
	if what == 3 {
		in.Header.Del("Range") // it does not know ranges
	}
	resp, err := http.DefaultTransport.RoundTrip(in)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || len(body) == 0 {
		return false
	}
	for k, v := range resp.Header {
		w.Header()[k] = v
	}
	end := len(body)
	switch what {
	case 4, 5:
		end = rand.IntN(len(body)) // cut
		s.count("cuts")
	case 6:
		body[rand.IntN(len(body))] ^= 1
		s.count("lies")
	}
	w.WriteHeader(resp.StatusCode)
	for part := range slices.Chunk(body[:end], 64<<10) {
		if _, err := w.Write(part); err != nil {
			return true
		}
		if what == 7 { // slowly
			http.NewResponseController(w).Flush()
			s.sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
		}
	}
	if end < len(body) {
		panic(http.ErrAbortHandler)
	}
	return true
}

// moveTag has a tag mean one of two manifests, in turns.
func (s *soak) moveTag() {
	repo := repository(s.t, s.i.repo)
	other := pushManifest(s.t, s.i.repo, "other", nil)
	for n := 0; s.running(); n++ {
		target := []image{s.i, other}[n%2]
		begun := time.Now()
		s.history.mu.Lock()
		s.history.meant = append(s.history.meant, target.top.Digest)
		s.history.begun = append(s.history.begun, begun)
		s.history.mu.Unlock()
		if err := repo.Tag(s.t.Context(), target.top, soakTag); err != nil {
			s.t.Errorf("move the tag: %v", err)
			return
		}
		s.history.mu.Lock()
		s.history.landed = append(s.history.landed, time.Now())
		s.history.mu.Unlock()
		s.count("moves")
		s.sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
	}
}

// fillDisk takes all room for a second, now and then.
func (s *soak) fillDisk(dir string) {
	filler := filepath.Join(dir, "filler")
	defer os.Remove(filler)
	for s.running() {
		s.sleep(time.Duration(3+rand.IntN(5)) * time.Second)
		f, err := os.Create(filler)
		if err != nil {
			continue // there is no room for that even
		}
		io.Copy(f, zeros{})
		f.Close()
		s.count("full disks")
		s.sleep(time.Second)
		os.Remove(filler)
	}
}

// watchSpace holds what tarn takes to its bound. A walk is no snapshot: a file that
// has just been counted may go, and another one take its room before the walk comes
// by. So what counts is what two walks in a row have seen: all of that was there
// between them.
func (s *soak) watchSpace(dir string) {
	var most int64
	for before := blocksBelow(dir); s.running(); {
		s.sleep(20 * time.Millisecond)
		now, sum := blocksBelow(dir), int64(0)
		for inode, blocks := range now {
			sum += min(blocks, before[inode])
		}
		most, before = max(most, sum), now
	}
	s.t.Logf("at most %.1f MiB of %d were taken", float64(most)/(1<<20), soakMaxSize>>20)
	if most > soakMaxSize {
		s.t.Errorf("%d bytes are more than max_size, %d", most, soakMaxSize)
	}
}

// blocksBelow is what each file below the directory takes, in bytes, by its inode.
func blocksBelow(dir string) map[uint64]int64 {
	taken := make(map[uint64]int64)
	filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && !info.IsDir() && filepath.Base(path) != "filler" {
			stat := info.Sys().(*syscall.Stat_t)
			taken[stat.Ino] = stat.Blocks * 512
		}
		return nil
	})
	return taken
}

// client does what clients do until the soak is over.
func (s *soak) client() {
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	for s.running() {
		switch rand.IntN(4) {
		case 0:
			s.askTag(client)
		case 1:
			s.assemble(client, s.objects[rand.IntN(len(s.objects))], true)
		default:
			s.assemble(client, s.objects[rand.IntN(len(s.objects))], false)
		}
	}
}

// do sends a request, and holds its headers to their time.
func (s *soak) do(client *http.Client, method, path, span string) (*http.Response, error) {
	req, err := http.NewRequest(method, "http://"+tarnAddr+"/v2/"+s.i.repo+"/"+path+"?ns="+upstreamName, nil)
	if err != nil {
		return nil, err
	}
	if span != "" {
		req.Header.Set("Range", span)
	}
	begun := time.Now()
	resp, err := client.Do(req)
	if took := time.Since(begun); took > 10*time.Second {
		s.t.Errorf("%s %s: headers after %v", method, path, took)
	}
	return resp, err
}

func (s *soak) askTag(client *http.Client) {
	begun := time.Now()
	resp, err := s.do(client, http.MethodHead, "manifests/"+soakTag, "")
	if err != nil {
		s.count("connections that failed")
		s.sleep(20 * time.Millisecond)
		return
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		s.count(fmt.Sprint("tags ", resp.StatusCode))
		return
	}
	if d := digest.Digest(resp.Header.Get("Docker-Content-Digest")); !s.history.could(d, begun, time.Now()) {
		s.t.Errorf("a tag was answered with what it did not mean: %s", d)
	}
	s.count("tags 200")
}

// assemble reads an object, and goes on where it breaks off. What it has in the
// end is the object, or it has no end. There are two exceptions, which docs/SECURITY.md
// tells: a range of what passes through is the registry's own answer, and after a kill
// the next process does not know what had been refused. The client's own digest is for
// these.
func (s *soak) assemble(client *http.Client, o v1.Descriptor, slow bool) {
	var have bytes.Buffer
	killed := s.killed.Load()
	var answers []string // when, from where on, and what tarn says of it
	for range 6 {
		span := ""
		if have.Len() > 0 {
			span = fmt.Sprintf("bytes=%d-", have.Len())
		}
		resp, err := s.do(client, http.MethodGet, "blobs/"+o.Digest.String(), span)
		if err != nil {
			s.count("connections that failed")
			s.sleep(20 * time.Millisecond)
			return
		}
		want := http.StatusOK
		if span != "" {
			want = http.StatusPartialContent
		}
		if resp.StatusCode != want {
			resp.Body.Close()
			s.count(fmt.Sprint("blobs ", resp.StatusCode))
			if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent {
				s.t.Errorf("%q was answered with %d", span, resp.StatusCode)
			}
			return
		}
		before := have.Len()
		answers = append(answers, fmt.Sprint(time.Now().UTC().Format(time.StampMilli), " from ", before, ": ", resp.Header.Get("Cache-Status")))
		err = s.read(&have, resp.Body, slow)
		resp.Body.Close()
		switch {
		case errors.Is(err, errLeft):
			s.count("clients that left")
			return
		case err == nil && int64(have.Len()) < o.Size:
			s.t.Errorf("a clean end after %d bytes of %d", have.Len(), o.Size)
			return
		case int64(have.Len()) >= o.Size:
			switch {
			case digest.FromBytes(have.Bytes()) == o.Digest:
			case before > 0 && strings.Contains(answers[len(answers)-1], "fwd=bypass"):
				s.count("wrong bytes that a client joined to the registry's own range")
			case s.killed.Load() != killed:
				s.count("wrong bytes that a client joined across a kill")
			default:
				s.t.Errorf("%d wrong bytes, whole, of %s:\n%s\n%s", have.Len(), o.Digest, strings.Join(answers, "\n"), saidOf(o.Digest.Encoded()))
			}
			s.count("blobs whole")
			return
		}
		s.count("bodies cut")
	}
}

// saidOf is what the logs of the last processes say of an object.
func saidOf(what string) string {
	logs, _ := filepath.Glob(filepath.Join(work(), "tarn-*.log"))
	slices.SortFunc(logs, func(a, b string) int { return modified(a).Compare(modified(b)) })
	var said []string
	for _, log := range logs[max(0, len(logs)-3):] {
		said = append(said, log)
		text, _ := os.ReadFile(log)
		for line := range strings.Lines(string(text)) {
			if strings.Contains(line, what) || strings.Contains(line, "pending") || strings.Contains(line, "shutting down") {
				said = append(said, strings.TrimSpace(line))
			}
		}
	}
	return strings.Join(said[max(0, len(said)-60):], "\n")
}

func modified(file string) (at time.Time) {
	if info, err := os.Stat(file); err == nil {
		at = info.ModTime()
	}
	return at
}

var errLeft = errors.New("the client left")

func (s *soak) read(to *bytes.Buffer, body io.Reader, slow bool) error {
	if rand.IntN(10) == 0 {
		io.CopyN(to, body, rand.Int64N(1<<20))
		return errLeft
	}
	if !slow {
		_, err := io.Copy(to, body)
		return err
	}
	for {
		if _, err := io.CopyN(to, body, 256<<10); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		s.sleep(time.Duration(rand.IntN(30)) * time.Millisecond)
	}
}
