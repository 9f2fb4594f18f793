// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// fallbacks takes the record of requests and returns how many came past tarn,
// and by it.
func (r *registry) fallbacks() (past, by int) {
	for _, req := range r.take() {
		if req.route == pastTarn {
			past++
		} else {
			by++
		}
	}
	return past, by
}

// TestNoPullFailsWhileTarnCannotReachTheRegistry: containerd can, at another
// address, and pulls what tarn has and what it has not; from an outage that has
// begun, one that begins in the middle of a layer, and one that tarn starts in.
func TestNoPullFailsWhileTarnCannotReachTheRegistry(t *testing.T) {
	n := newNode(t)
	c := &criClient{n.containerd, n.containerd.dialCRI(t)}
	known := pushSaying(t, "app/known", "v1", "hello", noise("a", 300_000, 1), noise("b", 300_000, 2))
	mustPull(t, c, known.ref())
	c.forget(t, known.ref())
	waitFor(t, "it is stored", noFlights)
	outer := t // a process lasts as long as the test that has started it
	for seed, mode := range outages {
		t.Run(mode, func(t *testing.T) {
			unknown := pushSaying(t, "app/unknown", fmt.Sprint("v", seed), fmt.Sprint("hello ", seed), noise("c", 300_000, byte(10+seed)), noise("d", 400_000, byte(20+seed)))
			late := pushSaying(t, "app/late", fmt.Sprint("v", seed), fmt.Sprint("bye ", seed),
				noise("e", 2<<20, byte(30+seed)), noise("f", 400_000, byte(40+seed)), noise("g", 400_000, byte(50+seed)), noise("h", 400_000, byte(60+seed)))
			begun := time.Now()
			pullIn := func(what string, i image) {
				t.Helper()
				begun := time.Now()
				n.registry.take()
				mustPull(t, c, i.ref())
				c.forget(t, i.ref())
				past, by := n.registry.fallbacks()
				t.Logf("%s: %.1f s, %d requests past tarn, %d by it", what, time.Since(begun).Seconds(), past, by)
				if past == 0 {
					t.Errorf("%s: nothing went past tarn, so nothing was in its way", what)
				}
			}
			n.registry.gate.set(t, mode)
			pullIn("what tarn has", known)
			pullIn("what it has not", unknown)
			n.restartTarn(outer)
			pullIn("what it has, started in the outage", known)
			n.registry.gate.set(t, "")
			waitFor(t, "tarn asks again", func() error { return tagAnswers(known) })

			// One layer is on its way as it begins.
			layer := late.objects[len(late.objects)-4]
			brake := n.registry.stopMidway(layer.Digest, 1<<20)
			pulled := make(chan error, 1)
			go func() { pulled <- c.pull(context.WithoutCancel(t.Context()), late.ref()) }()
			<-brake.reached
			n.registry.gate.set(t, mode)
			close(brake.release)
			if err := <-pulled; err != nil {
				t.Errorf("in the middle of a layer: %v", err)
			}
			past, by := n.registry.fallbacks()
			t.Logf("in the middle of a layer: %d requests past tarn, %d by it; all of it %.1f s", past, by, time.Since(begun).Seconds())
			n.registry.gate.set(t, "")
			waitFor(t, "tarn asks again", func() error { return tagAnswers(known) })
			c.forget(t, late.ref())
		})
	}
}

// tagAnswers is nil when tarn answers with what the registry says now.
func tagAnswers(i image) error {
	resp, err := http.Head("http://" + tarnAddr + "/v2/" + i.repo + "/manifests/" + i.tag + "?ns=" + upstreamName)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if said := resp.Header.Get("Cache-Status"); resp.StatusCode != http.StatusOK || strings.Contains(said, "ttl=-") {
		return fmt.Errorf("%s, %s", resp.Status, said)
	}
	return nil
}

// TestNoPullFailsWhileTarnIsRestarted thirty times, every third time with an
// empty directory, so that it ends in the middle of downloads, too.
func TestNoPullFailsWhileTarnIsRestarted(t *testing.T) {
	n := newNode(t)
	c := &criClient{n.containerd, n.containerd.dialCRI(t)}
	i := pushSaying(t, "app/again", "v1", "hello", noise("a", 2<<20, 1), noise("b", 2<<20, 2), noise("c", 300_000, 3))
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	defer cancel()
	var pulls, failed atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if err := c.pull(context.WithoutCancel(ctx), i.ref()); err != nil {
				t.Errorf("pull %d: %v", pulls.Load(), err)
				failed.Add(1)
			}
			pulls.Add(1)
			if err := c.client.RemoveImage(ctx, i.ref()); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	}()
	n.registry.take()
	for round := range 30 {
		before := pulls.Load()
		waitFor(t, "another pull", func() error {
			if pulls.Load() == before {
				return errors.New("none has ended")
			}
			return nil
		})
		n.tarn.stop(t)
		if round%3 == 0 {
			if err := os.RemoveAll(n.tarnDir); err != nil {
				t.Fatal(err)
			}
		}
		n.tarn = startTarn(t, n.tarnDir, "")
	}
	cancel()
	<-done
	past, by := n.registry.fallbacks()
	t.Logf("%d pulls, %d failed; %d requests went past tarn, %d by it", pulls.Load(), failed.Load(), past, by)
}

// TestResetsInTheMiddleOfABlobFailNoPull: neither of clients that resume, nor of
// those that know no way back from a blob.
func TestResetsInTheMiddleOfABlobFailNoPull(t *testing.T) {
	eachPathClient(t, func(t *testing.T, c pathClient) {
		r := newRegistry(t, nil)
		i := pushSaying(t, "app/resets", "v1", "hello", noise("a", 300_000, 1), noise("b", 3<<20, 2), noise("c", 12<<20, 3))
		var mu sync.Mutex
		answers, resets := make(map[string]int), 0
		r.gate.chaos = func(w http.ResponseWriter, q *http.Request) bool {
			if !strings.Contains(q.URL.Path, "/blobs/") || q.Method != http.MethodGet {
				return false
			}
			mu.Lock()
			defer mu.Unlock()
			if answers[q.URL.Path]++; answers[q.URL.Path] > 3 {
				return false
			}
			resets++
			r.gate.app.ServeHTTP(&cutting{ResponseWriter: w, left: 100_000}, q)
			return true
		}
		pull := c.start(t)
		startTarn(t, folder(t, work(), "tarn"), "")
		if err := pull(tarnAddr+"/"+i.ref(), ""); err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		if t.Logf("%d bodies were cut", resets); resets < 9 {
			t.Errorf("only %d bodies were cut", resets)
		}
	})
}

// cutting breaks the connection after so many bytes.
type cutting struct {
	http.ResponseWriter
	left int
}

func (c *cutting) Write(p []byte) (int, error) {
	n := min(len(p), c.left)
	c.ResponseWriter.Write(p[:n])
	if c.left -= n; c.left == 0 {
		http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, nil
}

// TestStaleAnswersKeepTheirTime: with stale_if_error and head_timeout set, a
// whole pull works in each outage, and each request as fast as it should.
func TestStaleAnswersKeepTheirTime(t *testing.T) {
	const (
		headTimeout = 2 * time.Second
		settings    = "defaults: {head_timeout: 2s, stale_if_error: 1h}\n"
	)
	outer, r := t, newRegistry(t, nil)
	dir := folder(t, work(), "tarn")
	tarn := startTarn(t, dir, settings)
	i := pushSaying(t, "app/stale", "v1", "hello", noise("a", 300_000, 1), noise("b", 2<<20, 2))
	var paths []string
	paths = append(paths, "manifests/"+i.tag, "manifests/"+i.top.Digest.String())
	for _, o := range i.objects {
		if o.Digest != i.top.Digest {
			paths = append(paths, "blobs/"+o.Digest.String())
		}
	}
	ask := func(method, path string) (said string, took time.Duration) {
		t.Helper()
		begun := time.Now()
		req, err := http.NewRequest(method, "http://"+tarnAddr+"/v2/"+i.repo+"/"+path+"?ns="+upstreamName, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		took = time.Since(begun) // its headers
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s %s: %s %v %s", method, path, resp.Status, err, body)
		}
		if _, d, ok := strings.Cut(path, "/sha256:"); ok && method == http.MethodGet && digest.FromBytes(body).Encoded() != d {
			t.Errorf("%s %s: %d wrong bytes", method, path, len(body))
		}
		return resp.Header.Get("Cache-Status"), took
	}
	pull := func() (said []string, took []time.Duration) {
		t.Helper()
		for n, path := range paths {
			method := http.MethodGet
			if n == 0 {
				method = http.MethodHead
			}
			s, d := ask(method, path)
			said, took = append(said, s), append(took, d)
		}
		return said, took
	}
	pull()
	waitFor(t, "it is stored", noFlights)
	for _, mode := range outages {
		for _, fromStart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, at the start %v", mode, fromStart), func(t *testing.T) {
				// Grants are nothing to a new process, so each object is asked about.
				tarn.stop(t)
				if fromStart {
					r.gate.set(t, mode)
					tarn = startTarn(outer, dir, settings)
				} else {
					tarn = startTarn(outer, dir, settings)
					r.gate.set(t, mode)
				}
				said, took := pull()
				again, tookAgain := pull()
				t.Logf("%v\nagain %v", took, tookAgain)
				for n, s := range append(said, again...) {
					if !strings.Contains(s, "; hit; ttl=-") {
						t.Errorf("request %d: %s", n, s)
					}
				}
				slow := 0
				for n, d := range append(took, tookAgain...) {
					switch {
					case mode == hangs && d > headTimeout+100*time.Millisecond:
						t.Errorf("request %d took %v", n, d)
					case mode == hangs && d > 1500*time.Millisecond: // once it is silent, a question has a second
						slow++
					case mode != hangs && d > time.Second: // a machine may stumble; it does not wait
						t.Errorf("request %d took %v", n, d)
					}
				}
				if slow > 2 {
					t.Errorf("%d requests waited", slow)
				}
				r.gate.set(t, "")
				back := time.Now()
				waitFor(t, "tarn asks again", func() error { return tagAnswers(i) })
				t.Logf("asked again %v after the outage", time.Since(back))
			})
		}
	}
}
