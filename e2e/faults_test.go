// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// TestAFailingDiskOrASuddenEndCostsNoRightByte lets single system calls of a
// running tarn fail, or end it, in the middle of two downloads and their commit.
// What a client is given whole is right; and the next tarn over the same
// directory is ready at once and serves both.
func TestAFailingDiskOrASuddenEndCostsNoRightByte(t *testing.T) {
	registry := newRegistry(t, nil)
	i := pushSaying(t, "app/faults", "v1", "hello", noise("one", 200_000, 7), noise("two", 3<<20, 8))
	blobs := i.objects[len(i.objects)-2:]
	registry.take()
	injected := make(map[string]int) // by call
	whens := []string{"1", "2", "4+"}
	if text := os.Getenv("TARN_E2E_FAULTS"); text != "" { // each call up to that many, one by one
		most, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		whens = nil
		for n := range most {
			whens = append(whens, strconv.Itoa(n+1))
		}
	}
	for _, fault := range []string{"error=EIO", "error=ENOSPC", "signal=SIGKILL"} {
		for _, call := range []string{"pwrite64", "fsync", "fdatasync", "renameat", "unlinkat"} {
			for _, when := range whens {
				t.Run(fault+" at "+call+" "+when, func(t *testing.T) {
					dir := folder(t, work(), "tarn")
					trace := filepath.Join(t.TempDir(), "strace.txt")
					tarn := startTarn(t, dir, "")
					tracer := start(t, "strace", "strace", "-f", "-qq", "-e", "trace="+call, "-e", "signal=none", "-o", trace,
						"-e", fmt.Sprintf("inject=%s:%s:when=%s", call, fault, when), "-p", fmt.Sprint(tarn.cmd.Process.Pid))
					waitFor(t, "the tracer is there", func() error {
						if err := tracer.alive(); err != nil {
							t.Fatalf("%v: %s", err, tracer.tail(t))
						}
						return traced(tarn.cmd.Process.Pid)
					})
					for _, b := range blobs {
						fetchUnlessItFails(t, i.repo, b.Digest, b.Size)
					}
					waitFor(t, "the downloads have ended", func() error {
						if tarn.alive() != nil {
							return nil
						}
						return noFlights()
					})
					tracer.cmd.Process.Signal(syscall.SIGTERM) // it lets go
					<-tracer.ended
					if text, err := os.ReadFile(trace); err != nil {
						t.Error(err)
					} else if strings.Contains(string(text), "(INJECTED)") || strings.Contains(string(text), "killed by SIGKILL") {
						injected[call]++
					}
					if tarn.alive() == nil {
						tarn.kill(t)
					}

					begun := time.Now()
					tarn = startTarn(t, dir, "")
					t.Logf("ready after %v", time.Since(begun))
					for _, b := range blobs {
						fetchBlob(t, i.repo, b.Digest)
					}
					waitFor(t, "the downloads have ended", noFlights)
					tarn.stop(t)
					files, err := filepath.Glob(filepath.Join(dir, "blobs", "sha256", "*"))
					if err != nil || len(files) != len(blobs) {
						t.Errorf("%d files, %v", len(files), err)
					}
					for _, f := range files {
						data, err := os.ReadFile(f)
						if err != nil || digest.FromBytes(data).Encoded() != filepath.Base(f) {
							t.Errorf("%s has %d other bytes, %v", f, len(data), err)
						}
					}
				})
			}
		}
	}
	t.Logf("cases in which the fault struck: %v", injected)
	for _, call := range []string{"pwrite64", "fsync", "fdatasync", "renameat"} { // nothing has to be unlinked
		if least := 3; injected[call] < least { // each first call, at the least
			t.Errorf("of %d cases with %s, the fault struck in %d", 3*len(whens), call, injected[call])
		}
	}
}

// traced is nil when somebody traces the process.
func traced(pid int) error {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err == nil && strings.Contains(string(status), "TracerPid:\t0\n") {
		err = fmt.Errorf("nobody traces %d", pid)
	}
	return err
}

// fetchUnlessItFails gets a blob; one that comes whole must be right.
func fetchUnlessItFails(t *testing.T, repo string, d digest.Digest, size int64) {
	t.Helper()
	client := http.Client{Timeout: patience / 2}
	resp, err := client.Get("http://" + tarnAddr + "/v2/" + repo + "/blobs/" + d.String() + "?ns=" + upstreamName)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	v := d.Verifier()
	n, err := io.Copy(v, resp.Body)
	if resp.StatusCode == http.StatusOK && err == nil && (n != size || !v.Verified()) {
		t.Errorf("%d wrong bytes, and all is well", n)
	}
}

// noFlights is nil when tarn has nothing to download or to commit.
func noFlights() error {
	resp, err := http.Get("http://" + tarnAdminAddr + "/api/v1/status")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var s struct {
		Cache struct {
			Flights int `json:"flights"`
		} `json:"cache"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		return err
	}
	if s.Cache.Flights > 0 {
		return fmt.Errorf("%d downloads", s.Cache.Flights)
	}
	return nil
}
