// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// gauge samples a filesystem every 10 ms, and keeps what it has had most of.
type gauge struct {
	dir         string
	before      int64
	most, least atomic.Int64 // bytes that were used besides those before, and bytes that were free
	samples     atomic.Int64
	watching    sync.WaitGroup
	done        chan struct{}
}

func (u *gauge) look() (used, free int64) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(u.dir, &st); err != nil {
		return 0, 0
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, int64(st.Bavail) * st.Bsize
}

func watch(dir string) *gauge {
	u := &gauge{dir: dir, done: make(chan struct{})}
	u.before, _ = u.look()
	_, free := u.look()
	u.least.Store(free)
	u.watching.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			used, free := u.look()
			u.most.Store(max(u.most.Load(), used-u.before))
			u.least.Store(min(u.least.Load(), free))
			u.samples.Add(1)
			select {
			case <-u.done:
				return
			case <-tick.C:
			}
		}
	})
	return u
}

func (u *gauge) stop() {
	close(u.done)
	u.watching.Wait()
}

// evictedObjects is what tarn says of itself.
func evictedObjects(t *testing.T) int64 {
	t.Helper()
	resp, err := http.Get("http://" + tarnAdminAddr + "/api/v1/status")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var s struct {
		Cache struct{ Evicted struct{ Objects int64 } }
	}
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		t.Fatal(err)
	}
	return s.Cache.Evicted.Objects
}

// pushMany pushes images of five layers, which have nothing but the program in
// common.
func pushMany(t *testing.T, n, layerSize int) (images []image) {
	t.Helper()
	for i := range n {
		var files []file
		for l := range 5 {
			files = append(files, noise(fmt.Sprint(i, "-", l), layerSize, byte(5*i+l)))
		}
		images = append(images, pushSaying(t, fmt.Sprint("app/many", i), "v1", "hello", files...))
	}
	return images
}

// pullMany has clients pull all images, each client its own, with the layers of
// one at once.
func pullMany(t *testing.T, images []image, clients int) {
	t.Helper()
	var pulling sync.WaitGroup
	for client := range clients {
		pulling.Go(func() {
			for n := client; n < len(images); n += clients {
				var layers sync.WaitGroup
				for _, o := range images[n].objects[1:] {
					layers.Go(func() {
						if _, err := get(images[n].repo, o); err != nil {
							t.Error(err)
						}
					})
				}
				layers.Wait()
			}
		})
	}
	pulling.Wait()
}

// TestTheBoundHoldsAtEverySample pulls five times as much as there is room for:
// 5 GiB into 1 GiB with TARN_E2E_BOUND=1024, in MiB.
func TestTheBoundHoldsAtEverySample(t *testing.T) {
	mib := 80
	if text := os.Getenv("TARN_E2E_BOUND"); text != "" {
		if _, err := fmt.Sscan(text, &mib); err != nil {
			t.Fatal(err)
		}
	}
	const clients, many = 8, 32
	newRegistry(t, nil)
	images := pushMany(t, many, mib<<20/many) // of five layers each
	for name, f := range map[string]struct {
		disk     int64
		settings string
		wrong    func(*gauge) string
	}{
		"max_size": {int64(mib) << 20 * 2, fmt.Sprintf("max_size: %dMiB\n", mib), func(u *gauge) string {
			if over := u.most.Load() - int64(mib)<<20; over > 0 {
				return fmt.Sprintf("%d bytes over the bound", over)
			}
			return ""
		}},
		"min_free": {int64(mib) << 20 * 2, fmt.Sprintf("max_size: 100%%\nmin_free: %dMiB\n", mib), func(u *gauge) string {
			if short := int64(mib)<<20 - u.least.Load(); short > 0 {
				return fmt.Sprintf("%d bytes too few were free", short)
			}
			return ""
		}},
	} {
		t.Run(name, func(t *testing.T) {
			disk := newLoopOf(t, f.disk)
			u := watch(disk.dir)
			tarn := startTarn(t, disk.dir, f.settings)
			pullMany(t, images, clients)
			waitFor(t, "all is stored", noFlights)
			u.stop()
			evicted := evictedObjects(t)
			t.Logf("%d samples: at most %d MiB taken, at least %d MiB free, %d objects evicted", u.samples.Load(), u.most.Load()>>20, u.least.Load()>>20, evicted)
			if wrong := f.wrong(u); wrong != "" {
				t.Error(wrong)
			}
			if evicted < int64(len(images)) || u.most.Load() < int64(mib)<<20/2 && u.least.Load() > int64(mib)<<20*3/2 {
				t.Error("it was not put to the test")
			}
			tarn.stop(t)
		})
	}
}
