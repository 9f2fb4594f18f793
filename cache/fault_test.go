// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tarn/blobstore"
	"tarn/cache/store"
	"tarn/images"
	"tarn/index"
	"tarn/internal/fault"

	"github.com/opencontainers/go-digest"
)

// The fault table: each step that a commit or a recovery takes on the disk
// fails, or fails and takes effect nevertheless, or the process dies before or
// behind it, or from it on the disk refuses everything. Each time all pulls are
// right, at once and after a restart, nothing whole is fetched again, and each
// byte on the disk is accounted for.

// A script is what a process does with a data directory. It returns what went
// wrong that must not.
type script struct {
	name    string
	own     []string // the steps that no script before it has; nil: all but those of the image layout
	prepare func(t *testing.T, dir string)
	run     func(dir string, steps fault.Steps, mend func() bool) error
}

var scripts = []script{
	{"commit", nil, func(*testing.T, string) {}, func(dir string, steps fault.Steps, mend func() bool) error { return pullAll(dir, steps, mend, true) }},
	{"recover", nil, leaveBehind, func(dir string, steps fault.Steps, mend func() bool) error { return pullAll(dir, steps, mend, false) }},
	{"recover without an index", nil, func(t *testing.T, dir string) {
		leaveBehind(t, dir)
		if err := os.Truncate(filepath.Join(dir, "index.db"), 3000); err != nil {
			t.Fatal(err)
		}
	}, func(dir string, steps fault.Steps, mend func() bool) error { return pullAll(dir, steps, mend, false) }},
	{"evict", []string{"write index", "remove blob", "rename blob", "write list", "rename list", "write layout", "rename layout"}, func(*testing.T, string) {}, pullIntoLittleRoom},
	{"pin", []string{"write pins", "rename pins", "write index"}, func(*testing.T, string) {}, pinAndUnpin},
}

// pinAndUnpin pins what is there, and unpins some of it. What it is told was done
// is so, for the next process as well.
func pinAndUnpin(dir string, steps fault.Steps, mend func() bool) error {
	c, err := New(Options{Dir: dir, MaxSize: 1 << 30, Steps: steps})
	if err != nil {
		return fmt.Errorf("%w: %w", errNoStart, err)
	}
	defer func() { c.Close() }()
	one, two := images.Pin{Upstream: "lab.test", Repository: "app", Digest: digest.FromBytes(pulledBodies()[0])}, images.Pin{Upstream: "lab.test", Repository: "app", Digest: digest.FromBytes(pulledBodies()[1])}
	for _, body := range pulledBodies()[:2] {
		if got, err := readAll(c, parallelRequest(&origin{body: body}, "one")); err != nil || !bytes.Equal(got, body) {
			return fmt.Errorf("%d bytes: %w", len(got), err)
		}
	}
	if err := rest(c, func() bool { return c.Stats().Flights == 0 }); err != nil {
		return err
	}
	_, err1 := c.images.Pin(one)
	_, err2 := c.images.Pin(two)
	err3 := c.images.Unpin(one)
	told := c.images.Pins()
	mend()
	c.store.Housekeep()
	if err := landed(c); err != nil {
		return err
	}
	if err := c.Close(); err != nil && steps == nil {
		return err
	}
	next, err := New(Options{Dir: dir, MaxSize: 1 << 30})
	if err != nil {
		return err
	}
	c = next
	// One that failed may have taken effect.
	if now := c.images.Pins(); err1 == nil && err2 == nil && err3 == nil && !slices.EqualFunc(now, told, samePin) {
		return fmt.Errorf("pinned is %v, and was said to be %v", now, told)
	}
	if steps == nil && (len(told) != 1 || !samePin(told[0], two)) {
		return fmt.Errorf("pinned is %v", told)
	}
	return nil
}

// pullIntoLittleRoom has room for one of the large images at a time.
func pullIntoLittleRoom(dir string, steps fault.Steps, mend func() bool) error {
	bodies := pulledBodies()
	c, err := New(Options{Dir: dir, MaxSize: int64(len(bodies[2])) + 2<<20, Steps: steps})
	if err != nil {
		return fmt.Errorf("%w: %w", errNoStart, err)
	}
	defer c.Close()
	for _, i := range []int{0, 1, 2, 3, 2} {
		if got, err := readAll(c, parallelRequest(&origin{body: bodies[i]}, "one")); err != nil || !bytes.Equal(got, bodies[i]) {
			return fmt.Errorf("image %d: %d bytes: %w", i, len(got), err)
		}
		if err := rest(c, settled(c)); err != nil {
			return err
		}
	}
	if !mend() && steps == nil && c.Stats().Evicted.Objects < 2 {
		return fmt.Errorf("nothing was evicted: %+v", c.Stats())
	}
	c.store.Housekeep()
	return landed(c)
}

// pulledBodies are the objects of the scripts, the same in each process: held back
// altogether, in one piece, noted in a journal, and that which breaks off.
var pulledBodies = sync.OnceValue(func() (bodies [][]byte) {
	for i, size := range []int{3000, 200_000, 2*minSegment + 1_500_000, 2*minSegment + 1_000_000} {
		body := make([]byte, size)
		rand.NewChaCha8([32]byte{byte(i), 7}).Read(body)
		bodies = append(bodies, body)
	}
	return bodies
})

const breaksOff = 3 // of images

// pullAll opens the directory and reads all images, and then has the disk
// mended, which tells whether it had to be. If broken is set, one's source breaks off and is gone.
func pullAll(dir string, steps fault.Steps, mend func() bool, broken bool) error {
	c, err := New(Options{Dir: dir, MaxSize: 1 << 30, Steps: steps})
	if err != nil {
		return fmt.Errorf("%w: %w", errNoStart, err)
	}
	defer c.Close()
	for i, body := range pulledBodies() {
		o := &origin{body: body}
		if i == breaksOff && broken {
			o.answer = func(n int, off, _ int64) (io.ReadCloser, Info, error) {
				if n == 0 {
					return io.NopCloser(io.MultiReader(o.part(0, 3<<20), failing{})), Info{Size: int64(len(body))}, nil
				}
				return nil, Info{}, fmt.Errorf("%w: gone", ErrRefused)
			}
			readAll(c, parallelRequest(o, "one"))
			continue
		}
		if got, err := readAll(c, parallelRequest(o, "one")); err != nil || !bytes.Equal(got, body) {
			return fmt.Errorf("image %d: %d bytes: %w", i, len(got), err)
		}
	}
	if err := rest(c, settled(c)); err != nil {
		return err
	}
	if mend() {
		c.store.Housekeep() // sooner than by itself
	}
	return landed(c)
}

func samePin(a, b images.Pin) bool { return a.String() == b.String() }

// errNoStart: a process whose disk fails as it starts may end with an error,
// and is started again.
var errNoStart = errors.New("no start")

// landed waits until the cache has done what it had to, and has it accounted
// for what is on the disk. What the evictor removes while the disk is read is
// read again.
func landed(c *Cache) error {
	if err := rest(c, func() bool {
		s := c.store.Stats()
		return c.Stats().Flights+s.Adopting+s.Removing == 0
	}); err != nil {
		return err
	}
	// The committer may be between a file and its bytes, on a machine that has other
	// work; what is counted wrong stays so.
	var blobs, pending int64
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 100 {
		var err error
		if blobs, pending, err = taken(c.store.Dir()); err != nil {
			return err
		}
		c.Index().Objects(func(d digest.Digest, row index.Object) {
			if _, err := os.Stat(c.store.Path(d)); err != nil {
				blobs += row.Alloc // it counts until somebody finds out
			}
		})
		if s := c.store.Stats(); s.BlobBytes == blobs && pending <= s.PendingBytes {
			break
		}
		<-tick.C
	}
	if s := c.store.Stats(); s.BlobBytes != blobs || pending > s.PendingBytes {
		return fmt.Errorf("%d bytes of blobs count as %d, %d pending as %d", blobs, s.BlobBytes, pending, s.PendingBytes)
	}
	return claimsOfParked(c)
}

// claimsOfParked holds what is claimed to what is parked, where each file counts in
// whole blocks.
func claimsOfParked(c *Cache) error {
	_, parked, claimed := c.flights.Stats()
	if n := c.store.Stats().PendingBytes; n < claimed || n > claimed+int64(parked)*4095 {
		return fmt.Errorf("%d bytes are claimed, of which %d for %d parked files", n, claimed, parked)
	}
	return nil
}

// settled: nothing more happens, unless the disk is mended.
func settled(c *Cache) func() bool {
	return func() bool { s := c.Stats(); return s.Flights == 0 && (s.Adopting == 0 || s.Trouble != "") }
}

func rest(c *Cache, ok func() bool) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for n := 0; !ok(); n++ {
		if n == 4000 {
			return fmt.Errorf("does not come to rest: %+v", c.Stats())
		}
		<-tick.C
	}
	return nil
}

// taken is what is allocated under blobs and pending.
func taken(dir string) (blobs, pending int64, err error) {
	for sub, sum := range map[string]*int64{"blobs/sha256": &blobs, "blobs/sha512": &blobs, "pending": &pending} {
		entries, err := os.ReadDir(filepath.Join(dir, sub))
		if err != nil {
			return 0, 0, err
		}
		for _, e := range entries {
			if info, err := e.Info(); err == nil {
				*sum += blobstore.Allocated(info)
			}
		}
	}
	return blobs, pending, nil
}

// leaveBehind makes a directory as processes leave it that are killed, and
// people who know better.
func leaveBehind(t *testing.T, dir string) {
	t.Helper()
	if err := pullAll(dir, nil, func() bool { return false }, true); err != nil {
		t.Fatal(err)
	}
	path := func(body []byte) string {
		return filepath.Join(dir, "blobs", "sha256", digest.FromBytes(body).Encoded())
	}
	write := func(name string, content []byte) {
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pending := filepath.Join(dir, "pending")
	journals, err := filepath.Glob(filepath.Join(pending, "*"+journalSuffix))
	if err != nil || len(journals) != 1 {
		t.Fatalf("%v: %v", journals, err)
	}
	j, err := os.OpenFile(journals[0], os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	fmt.Fprint(j, "12345678 torn")
	if err := os.Remove(path(pulledBodies()[0])); err != nil { // a row without a file
		t.Fatal(err)
	}
	write(path([]byte("stray")), []byte("stray"))
	write(path([]byte("another")), []byte("not another"))
	write(filepath.Join(dir, "blobs", "sha256", "README"), []byte("keep out"))
	write(filepath.Join(pending, "sha256-"+digest.FromString("unknown").Encoded()+".123"), make([]byte, 100_000))
}

const journalSuffix = ".journal"

// allWhole looks at every file under a digest but those that leaveBehind made.
func allWhole(t *testing.T, dir string) (whole map[digest.Digest]bool) {
	t.Helper()
	whole = make(map[digest.Digest]bool)
	for _, body := range pulledBodies() {
		d := digest.FromBytes(body)
		got, err := os.ReadFile(filepath.Join(dir, "blobs", "sha256", d.Encoded()))
		if err == nil && !bytes.Equal(got, body) {
			t.Errorf("%d bytes of %d under a digest that is not theirs", len(got), len(body))
		}
		whole[d] = err == nil
	}
	return whole
}

// again is the next process, whose disk is well.
func again(t *testing.T, dir string) {
	t.Helper()
	whole := allWhole(t, dir)
	started := time.Now()
	c, err := New(Options{Dir: dir, MaxSize: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if took := time.Since(started); took > 10*time.Second {
		t.Errorf("ready after %v", took)
	}
	for i, body := range pulledBodies() {
		o := &origin{body: body}
		got, err := readAll(c, parallelRequest(o, "two"))
		if err != nil || !bytes.Equal(got, body) {
			t.Errorf("image %d after the restart: %d bytes: %v", i, len(got), err)
		}
		if asked := o.questions(); whole[digest.FromBytes(body)] && len(asked) > 0 {
			t.Errorf("image %d was whole on the disk, and was fetched again: %v", i, asked)
		}
	}
	if err := landed(c); err != nil {
		t.Error(err)
	}
	if err := c.Index().Sync(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, store.PinsName+".broken")); err == nil {
		t.Error("the pins were broken")
	}
	for d, row := range rowsOf(t, c) {
		if info, err := os.Stat(c.store.Path(d)); err != nil || info.Size() != row {
			t.Errorf("the row of %s has no such file: %v", d, err)
		}
	}
}

func rowsOf(t *testing.T, c *Cache) map[digest.Digest]int64 {
	t.Helper()
	rows := make(map[digest.Digest]int64)
	for _, body := range pulledBodies() {
		d := digest.FromBytes(body)
		row, ok := c.Index().Row(d)
		if !ok {
			t.Errorf("no row of %s", d)
		}
		rows[d] = row.Size
	}
	return rows
}

// A trial is what happens at which step: the n-th of that name.
type trial struct {
	step, what string
	n          int
}

func (tr trial) String() string { return fmt.Sprintf("%s %d %s", tr.step, tr.n, tr.what) }

const (
	fails       = "fails"
	failsAndHas = "fails and took effect"
	staysBad    = "fails, as all later ones"
	diesBefore  = "is never taken"
	diesBehind  = "is the last"
)

// steps counts, and has the trial's step go wrong. It fails differently each
// time.
func (tr trial) steps() (steps fault.Steps, mend func() bool) {
	var mu sync.Mutex
	seen, bad, mended := 0, false, false
	mend = func() bool {
		mu.Lock()
		defer mu.Unlock()
		was := bad
		bad, mended = false, true
		return was
	}
	return func(name string, do func() error) error {
		mu.Lock()
		hit := false
		if name == tr.step {
			seen++
			hit = seen == tr.n
		}
		bad = !mended && (bad || hit && tr.what == staysBad)
		stays := bad
		mu.Unlock()
		broken := &os.PathError{Op: name, Path: "disk", Err: []error{syscall.EIO, syscall.ENOSPC, syscall.EROFS}[tr.n%3]}
		switch {
		case stays && !strings.HasPrefix(name, "open") && !strings.HasPrefix(name, "list"):
			return broken
		case !hit:
			return do()
		case tr.what == diesBefore:
			die()
		case tr.what == failsAndHas:
			do()
		case tr.what == diesBehind:
			do()
			die()
		}
		return broken
	}, mend
}

func die() {
	syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// TestFaultTable takes them all; of steps that are taken several times, the
// first and the last, unless TARN_TEST_FAULTS is "all".
func TestFaultTable(t *testing.T) {
	if testing.Short() {
		t.Skip("takes many processes")
	}
	if dir := os.Getenv("TARN_TEST_FAULT_DIR"); dir != "" {
		t.Skip("this is one of them")
	}
	t.Parallel()
	for _, s := range scripts {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			template, undisturbed := t.TempDir(), t.TempDir()
			s.prepare(t, template)
			copyAll(t, template, undisturbed)
			if err := s.run(undisturbed, nil, func() bool { return false }); err != nil {
				t.Fatal(err)
			}
			var mu sync.Mutex
			taken := make(map[string]int)
			dir := t.TempDir()
			copyAll(t, template, dir)
			if err := s.run(dir, func(name string, do func() error) error {
				mu.Lock()
				taken[name]++
				mu.Unlock()
				return do()
			}, func() bool { return false }); err != nil {
				t.Fatal(err)
			}
			again(t, dir)
			names := slices.Sorted(maps.Keys(taken))
			t.Logf("%v", taken)
			for _, name := range names {
				isLayout := strings.HasSuffix(name, " list") || strings.HasSuffix(name, " layout")
				if own := s.own == nil && !isLayout || slices.Contains(s.own, name); !own && os.Getenv("TARN_TEST_FAULTS") != "all" {
					continue
				}
				for n := 1; n <= taken[name]; n++ {
					if n > 1 && n < taken[name] && os.Getenv("TARN_TEST_FAULTS") != "all" {
						continue
					}
					for _, what := range []string{fails, failsAndHas, staysBad, diesBefore, diesBehind} {
						tr := trial{name, what, n}
						t.Run(tr.String(), func(t *testing.T) {
							t.Parallel()
							dir := t.TempDir()
							copyAll(t, template, dir)
							steps, mend := tr.steps()
							if what == diesBefore || what == diesBehind {
								runAndDie(t, s.name, template, dir, tr)
							} else if err := s.run(dir, steps, mend); err != nil && !errors.Is(err, errNoStart) {
								t.Error(err)
							} else if err != nil {
								t.Logf("%v", err)
							}
							again(t, dir)
						})
					}
				}
			}
		})
	}
}

func copyAll(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// runAndDie runs the script in a process of its own, which does not survive it.
// Some steps of a download are not taken each time: a file may be whole before it is noted.
func runAndDie(t *testing.T, script, template, dir string, tr trial) {
	t.Helper()
	for range 10 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestOneProcessOfTheFaultTable$", "-test.count=1")
		cmd.Env = append(os.Environ(), "TARN_TEST_FAULT_DIR="+dir, "TARN_TEST_FAULT_SCRIPT="+script,
			"TARN_TEST_FAULT_STEP="+tr.step, "TARN_TEST_FAULT_WHAT="+tr.what, fmt.Sprint("TARN_TEST_FAULT_N=", tr.n))
		out, err := cmd.CombinedOutput()
		if err == nil {
			if tr.n > 1 {
				return // that often it was not taken this time
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			copyAll(t, template, dir)
			continue
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	if !strings.Contains(tr.step, "pending") && !strings.Contains(tr.step, "journal") {
		t.Error("the step was never taken")
	}
}

func TestOneProcessOfTheFaultTable(t *testing.T) {
	dir := os.Getenv("TARN_TEST_FAULT_DIR")
	if dir == "" {
		t.Skip("part of another")
	}
	tr := trial{step: os.Getenv("TARN_TEST_FAULT_STEP"), what: os.Getenv("TARN_TEST_FAULT_WHAT")}
	if _, err := fmt.Sscan(os.Getenv("TARN_TEST_FAULT_N"), &tr.n); err != nil {
		t.Fatal(err)
	}
	for _, s := range scripts {
		if s.name == os.Getenv("TARN_TEST_FAULT_SCRIPT") {
			steps, mend := tr.steps()
			if err := s.run(dir, steps, mend); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("no such script")
}
