// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

// noises are blobs of one size each.
func noises(n, size int) [][]byte {
	blobs := make([][]byte, n)
	for i := range blobs {
		blobs[i] = make([]byte, size)
		rand.NewChaCha8([32]byte{byte(i), 77}).Read(blobs[i])
	}
	return blobs
}

// TestTwoHundredClientsAndSixtyFourDescriptors: who is too many is refused at
// once or told so, nobody is given anything wrong or left waiting, and when they
// have gone all is as before.
func TestTwoHundredClientsAndSixtyFourDescriptors(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	blobs := noises(40, 300_000)
	for _, b := range blobs {
		r.Blob("app", b)
	}
	p := runPrepared(t, t.TempDir(), "", func(c *exec.Cmd) {
		c.Args = append([]string{"sh", "-c", `ulimit -n 64 && exec "$0" "$@"`, c.Path}, c.Args[1:]...)
		c.Path = "/bin/sh"
	}, "--upstream", "lab.test="+r.URL)
	// A connection for each, and none is used twice.
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	defer client.CloseIdleConnections()
	var whole, refused atomic.Int32
	var clients sync.WaitGroup
	for i := range 200 {
		clients.Go(func() {
			body := blobs[i%len(blobs)]
			resp, err := client.Get(p.url + "/v2/app/blobs/" + digest.FromBytes(body).String() + "?ns=lab.test")
			var got []byte
			if err == nil {
				got, err = io.ReadAll(resp.Body)
				resp.Body.Close()
			}
			var timeout net.Error
			switch {
			case errors.As(err, &timeout) && timeout.Timeout():
				t.Errorf("client %d was left waiting: %v", i, err)
			case err != nil, resp.StatusCode >= 500:
				refused.Add(1)
			case resp.StatusCode != 200 || !bytes.Equal(got, body):
				t.Errorf("client %d: %s and %d bytes", i, resp.Status, len(got))
			default:
				whole.Add(1)
			}
		})
	}
	clients.Wait()
	t.Logf("%d of 200 had the whole, %d were told that they were too many", whole.Load(), refused.Load())
	if whole.Load() == 0 {
		t.Error("nobody was served")
	}
	p.until("all is served, and stored in the end", func() bool {
		for _, b := range blobs {
			// While as many as there are descriptors wait for the disk, some pass by.
			path := "/v2/app/blobs/" + digest.FromBytes(b).String() + "?ns=lab.test"
			if resp, got, err := p.get(path); err != nil || resp.StatusCode != 200 || !bytes.Equal(got, b) {
				return false
			}
		}
		var s struct {
			Cache struct{ Trouble string }
			Index struct{ Objects int }
		}
		fetchJSON(t, p.admin+"/api/v1/status", &s)
		return s.Index.Objects == len(blobs) && s.Cache.Trouble == ""
	})
	p.terminate()
}

// TestMemoryStaysBoundedHoweverMuchPassesThrough: a hundred clients at once
// of blobs that do not fit into the store, under the limit that the manifest of
// a node would set.
func TestMemoryStaysBoundedHoweverMuchPassesThrough(t *testing.T) {
	if testing.Short() {
		t.Skip("says nothing under -race")
	}
	t.Parallel()
	const limit = 64 << 20
	r := registrytest.New(t)
	blobs := noises(10, 12<<20)
	for _, b := range blobs {
		r.Blob("app", b)
	}
	p := runPrepared(t, t.TempDir(), "", func(c *exec.Cmd) {
		c.Env = append(c.Env, fmt.Sprintf("GOMEMLIMIT=%d", limit))
	}, "--upstream", "lab.test="+r.URL, "--max-size", "40MiB")
	var clients sync.WaitGroup
	for i := range 100 {
		clients.Go(func() {
			body := blobs[i%len(blobs)]
			resp, got, err := p.get("/v2/app/blobs/" + digest.FromBytes(body).String() + "?ns=lab.test")
			if err != nil || resp.StatusCode != 200 || !bytes.Equal(got, body) {
				t.Errorf("client %d: %v, %d bytes, %v", i, status200(resp), len(got), err)
			}
		})
	}
	clients.Wait()
	peak := p.peakMemory(t)
	t.Logf("at most %d MiB resident for %d MiB under way at once", peak>>20, 100*12)
	// What the limit does not cover: the program itself, its mapped index, and
	// a collector that is not always in time.
	if peak > 2*limit {
		t.Errorf("%d MiB", peak>>20)
	}
}

// peakMemory is the most that a process had in memory, in bytes.
func (p *process) peakMemory(t *testing.T) (peak int64) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, "VmHWM: %d kB", &peak)
	}
	return peak << 10
}

// TestARequestThatNeverEndsIsCut, and costs nobody else anything.
func TestARequestThatNeverEndsIsCut(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	blob := []byte("something small")
	d := r.Blob("app", blob)
	p := run(t, t.TempDir(), "--upstream", "lab.test="+r.URL)
	ctx, cancel := context.WithTimeout(t.Context(), 3*readHeaderTimeout)
	defer cancel()
	var slow sync.WaitGroup
	for range 50 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		slow.Go(func() {
			defer conn.Close()
			defer stop()
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			io.WriteString(conn, "GET /v2/ HTTP/1.1\r\nHost: tarn\r\nX-Slow: ")
			for {
				if _, err := conn.Write([]byte("z")); err != nil {
					break
				}
				<-tick.C
			}
			if ctx.Err() != nil {
				t.Error("it was not cut")
			} else if _, err := conn.Write([]byte("z")); !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("not by the server: %v", err)
			}
		})
	}
	p.mustGet("/v2/app/blobs/"+d.String()+"?ns=lab.test", blob)
	slow.Wait()
	p.mustGet("/v2/app/blobs/"+d.String()+"?ns=lab.test", blob)
}
