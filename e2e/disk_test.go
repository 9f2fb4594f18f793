// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// readiness is what /readyz says, with its details.
func readiness(t *testing.T) string {
	t.Helper()
	resp, err := http.Get("http://" + tarnAdminAddr + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("/readyz: %s %v", resp.Status, err)
	}
	return string(body)
}

// get reads a blob whole through tarn and checks it.
func get(repo string, o v1.Descriptor) (cacheStatus string, err error) {
	client := http.Client{Timeout: patience}
	resp, err := client.Get("http://" + tarnAddr + "/v2/" + repo + "/blobs/" + o.Digest.String() + "?ns=" + upstreamName)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	v := o.Digest.Verifier()
	n, err := io.Copy(v, resp.Body)
	switch {
	case err != nil:
		return "", fmt.Errorf("after %d bytes of %d: %w", n, o.Size, err)
	case resp.StatusCode != http.StatusOK:
		return "", fmt.Errorf("%s", resp.Status)
	case n != o.Size || !v.Verified():
		return "", fmt.Errorf("%d wrong bytes of %d, whole", n, o.Size)
	}
	return resp.Header.Get("Cache-Status"), nil
}

func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := folder(t, work(), "tmpfs")
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// TestAnImageThatIsLargerThanTheDisk is pulled right by eight clients at once:
// ten times with TARN_E2E_ROUNDS=10.
func TestAnImageThatIsLargerThanTheDisk(t *testing.T) {
	rounds := 2
	if text := os.Getenv("TARN_E2E_ROUNDS"); text != "" {
		if _, err := fmt.Sscan(text, &rounds); err != nil {
			t.Fatal(err)
		}
	}
	newRegistry(t, nil)
	i := pushSaying(t, "app/large", "v1", "hello", noise("a", 50<<20, 1), noise("b", 50<<20, 2), noise("c", 50<<20, 3), noise("d", 50<<20, 4))
	dir := tmpfs(t, "64m")
	startTarn(t, dir, "")
	statuses := make(map[string]int)
	for range rounds {
		var mu sync.Mutex
		var clients sync.WaitGroup
		for range 8 {
			clients.Go(func() {
				for _, o := range i.objects {
					if o.MediaType == v1.MediaTypeImageManifest {
						continue
					}
					said, err := get(i.repo, o)
					if err != nil {
						t.Error(err)
					}
					mu.Lock()
					statuses[said]++
					mu.Unlock()
				}
			})
		}
		clients.Wait()
	}
	t.Logf("%d rounds: %v", rounds, statuses)
}

// TestAFullDiskIsSaidAndComesBackByItself.
func TestAFullDiskIsSaidAndComesBackByItself(t *testing.T) {
	newRegistry(t, nil)
	i := pushSaying(t, "app/full", "v1", "hello", noise("a", 3<<20, 1), noise("b", 3<<20, 2), noise("c", 3<<20, 3))
	layers := i.objects[len(i.objects)-3:]
	dir := tmpfs(t, "16m")
	startTarn(t, dir, "max_size: 1GiB\n")
	// The room goes after tarn has looked.
	filler := filepath.Join(dir, "filler")
	brimful := func() {
		f, err := os.Create(filler)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := io.Copy(f, zeros{}); err == nil {
			t.Fatal("the disk has no end")
		}
	}
	brimful()
	for range 2 {
		if said, err := get(i.repo, layers[0]); err != nil || !strings.Contains(said, "bypass") {
			t.Errorf("%s %v", said, err)
		}
	}
	full := readiness(t)
	if !strings.Contains(full, "no space left") && !strings.Contains(full, "no room") {
		t.Errorf("%s", full)
	}
	waitForMetric(t, "tarn_cache_store_failing 1")
	waitForMetric(t, `tarn_requests_total{kind="blob",outcome="bypassed",upstream="`+upstreamName+`"} 2`)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it is stored again", func() error {
		said, err := get(i.repo, layers[1])
		if err == nil && !strings.Contains(said, "hit") {
			err = fmt.Errorf("%s", said)
		}
		return err
	})
	waitFor(t, "all is well", func() error {
		if now := readiness(t); strings.Contains(now, "no space") || strings.Contains(now, "no room") {
			return fmt.Errorf("%s", now)
		}
		return nil
	})
	waitForMetric(t, "tarn_cache_store_failing 0")
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// loop is an ext4 in a file.
type loop struct{ image, dir string }

func newLoop(t *testing.T) *loop { return newLoopOf(t, 512<<20) }

func newLoopOf(t *testing.T, size int64) *loop {
	t.Helper()
	l := &loop{filepath.Join(folder(t, work(), "image"), "disk"), folder(t, work(), "disk")}
	f, err := os.Create(l.image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	mustRun(t, "mkfs.ext4", "-q", "-F", l.image)
	l.mount(t)
	t.Cleanup(func() { l.unmount(t) })
	return l
}

func mustRun(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if name == "mkfs.ext4" && cmd.Err != nil {
		cmd = exec.Command("/usr/sbin/mkfs.ext4", args...)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

func (l *loop) mount(t *testing.T) {
	t.Helper()
	mustRun(t, "mount", "-o", "loop,errors=remount-ro", l.image, l.dir)
}

func (l *loop) unmount(t *testing.T) {
	t.Helper()
	if err := unix.Unmount(l.dir, 0); err != nil {
		t.Errorf("unmount %s: %v", l.dir, err)
	}
}

// TestADiskThatTurnsReadOnly in the middle of a pull, as ext4 does after an
// error.
func TestADiskThatTurnsReadOnly(t *testing.T) {
	r := newRegistry(t, nil)
	i := pushSaying(t, "app/ro", "v1", "hello", noise("a", 20<<20, 1), noise("b", 3<<20, 2), noise("c", 3<<20, 3))
	layers := i.objects[len(i.objects)-3:]
	disk := newLoop(t)
	tarn := startTarn(t, disk.dir, "")
	defer tarn.kill(t) // before the disk is unmounted; in order it would say that the index could not be written
	if _, err := get(i.repo, layers[1]); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it is stored", noFlights)
	brake := r.stopMidway(layers[0].Digest, 1<<20)
	pulled := make(chan error, 1)
	go func() {
		_, err := get(i.repo, layers[0])
		pulled <- err
	}()
	<-brake.reached
	mustRun(t, "mount", "-o", "remount,abort", disk.dir)
	close(brake.release)
	if err := <-pulled; err != nil {
		t.Errorf("the layer that was on its way: %v", err)
	}
	for _, o := range layers { // one is on the disk, the others pass through
		said, err := get(i.repo, o)
		t.Logf("%s %v", said, err)
		if err != nil {
			t.Error(err)
		}
	}
	if ready := readiness(t); !strings.Contains(ready, "read-only") && !strings.Contains(ready, "input/output") {
		t.Errorf("%s", ready)
	}
}

// TestAPowerCutLosesNoRightByte: the filesystem stops writing at one moment
// under load, and what its journal had is what there is.
func TestAPowerCutLosesNoRightByte(t *testing.T) {
	newRegistry(t, nil)
	var files []file
	for n := range 12 {
		files = append(files, noise(fmt.Sprint("f", n), 100_000<<(n%6), byte(n)))
	}
	i := pushSaying(t, "app/power", "v1", "hello", files...)
	layers := i.objects[len(i.objects)-len(files):]
	disk := newLoop(t)
	for _, stored := range []int{0, 1, 1, 12} {
		tarn := startTarn(t, disk.dir, "")
		var clients sync.WaitGroup
		landed := make(chan struct{}, len(layers))
		blobs := filepath.Join(disk.dir, "blobs", "sha256", "*")
		for _, o := range layers {
			clients.Go(func() {
				get(i.repo, o) // whole or not, it is checked below
				landed <- struct{}{}
			})
		}
		<-landed
		waitFor(t, "so many are stored", func() error {
			if found, err := filepath.Glob(blobs); err != nil || len(found) < stored {
				return fmt.Errorf("%d files, %v", len(found), err)
			}
			return nil
		})
		cutPower(t, disk.dir)
		tarn.kill(t)
		clients.Wait()
		disk.unmount(t)
		disk.mount(t) // the journal is replayed
		whole := checkFiles(t, disk.dir)
		begun := time.Now()
		tarn = startTarn(t, disk.dir, "")
		ready := time.Since(begun)
		for _, o := range layers {
			if _, err := get(i.repo, o); err != nil {
				t.Error(err)
			}
		}
		waitFor(t, "the downloads have ended", noFlights)
		wantAccounted(t, disk.dir)
		t.Logf("cut when %d of %d were stored: %d are on the disk, ready in %v", stored, len(layers), whole, ready)
		if ready > patience/10 {
			t.Errorf("ready in %v", ready)
		}
		tarn.stop(t)
		if err := os.RemoveAll(filepath.Join(disk.dir, "blobs")); err != nil {
			t.Fatal(err)
		}
		unix.Sync() // or the next cut brings them back
	}
}

// cutPower has the filesystem forget what its journal has not got yet
// (EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH).
func cutPower(t *testing.T, dir string) {
	t.Helper()
	const shutdown, noLogFlush = 0x8004587d, 2
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.IoctlSetPointerInt(int(d.Fd()), shutdown, noLogFlush); err != nil {
		t.Fatal(err)
	}
}

// checkFiles fails the test if a file is not what its name says.
func checkFiles(t *testing.T, dir string) int {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil || digest.FromBytes(data).Encoded() != filepath.Base(f) {
			t.Errorf("%s has %d other bytes, %v", f, len(data), err)
		}
	}
	return len(files)
}

// wantAccounted compares what tarn says that it takes with what it takes.
func wantAccounted(t *testing.T, dir string) {
	t.Helper()
	resp, err := http.Get("http://" + tarnAdminAddr + "/api/v1/status")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var s struct {
		Cache struct {
			Used    int64 `json:"usedBytes"`
			Pending int64 `json:"pendingBytes"`
		} `json:"cache"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		t.Fatal(err)
	}
	var blobs, index int64
	if err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() {
			return err
		}
		alloc := info.Sys().(*syscall.Stat_t).Blocks * 512
		switch {
		case strings.Contains(path, "/blobs/"):
			blobs += alloc
		case filepath.Base(path) == "index.db":
			index = info.Size() * 2 // its next growth
		case strings.Contains(path, "/pending/") && alloc > 0:
			t.Errorf("%s is left", path)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if s.Cache.Used < blobs || s.Cache.Used > blobs+index+1<<20 || s.Cache.Pending != 0 {
		t.Errorf("%d bytes are used and %d pending, with %d of blobs and %d of index", s.Cache.Used, s.Cache.Pending, blobs, index)
	}
}

// TestInodesAreLeftFree whoever takes them, on a filesystem that has few.
func TestInodesAreLeftFree(t *testing.T) {
	const all, left = 300, 100
	newRegistry(t, nil)
	var layers []file
	for n := range 120 {
		layers = append(layers, noise(fmt.Sprint("layer", n), 4<<10, byte(n+1)))
	}
	i := pushSaying(t, "app/many", "v1", "hello", layers...)
	j := pushSaying(t, "app/more", "v1", "hello again", noise("other", 4<<10, 200))
	dir := tmpfs(t, fmt.Sprintf("64m,nr_inodes=%d", all))
	startTarn(t, dir, fmt.Sprintf("min_free_inodes: %d\n", left))
	free := func() uint64 {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ffree
	}
	for _, o := range i.objects {
		if o.MediaType == v1.MediaTypeImageManifest {
			continue
		}
		if _, err := get(i.repo, o); err != nil {
			t.Fatal(err)
		}
		if n := free(); n < left {
			t.Fatalf("%d inodes are free, of %d that are to be", n, left)
		}
	}
	// Somebody else takes all but 80.
	others := folder(t, dir, "others")
	for n := 0; free() > 80; n++ {
		if err := os.WriteFile(filepath.Join(others, fmt.Sprint(n)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, "tarn gives inodes back", func() error {
		if n := free(); n < left {
			return fmt.Errorf("%d are free", n)
		}
		return nil
	})
	for _, o := range j.objects {
		if o.MediaType == v1.MediaTypeImageManifest {
			continue
		}
		if _, err := get(j.repo, o); err != nil {
			t.Error(err)
		}
	}
	if said := readiness(t); !strings.Contains(said, `"ready": true`) {
		t.Error(said)
	}
	os.RemoveAll(others) // or the mount would stay
}
