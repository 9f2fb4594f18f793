// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// TestABrokenIndexUnderLoadCostsNothing: somebody cuts, zeroes, overwrites or removes
// index.db while clients pull. No request fails, no blob is asked of the registry
// again, and the file is whole again within seconds, for the next start.
func TestABrokenIndexUnderLoadCostsNothing(t *testing.T) {
	t.Parallel()
	const blobs, clients = 200, 4
	r := registrytest.New(t)
	bodies := noises(blobs, 20_000)
	var digests []digest.Digest
	for _, b := range bodies {
		digests = append(digests, r.Blob("team/app", b))
	}
	image := r.Image("team/app", "v1", noises(1, 10_000)...)
	dir := t.TempDir()
	p := run(t, dir, "--upstream", "lab.test="+r.URL)
	p.pull("team/app", "v1", append(image.Layers, image.Config)...)
	for _, d := range digests {
		p.pull("team/app", "v1", d)
	}
	path := filepath.Join(dir, "index.db")
	// What a process would find that starts now.
	rows := func() (n int) {
		data, err := os.ReadFile(path)
		if err != nil {
			return 0
		}
		copied := filepath.Join(t.TempDir(), "index.db")
		if err := os.WriteFile(copied, data, 0o600); err != nil {
			t.Fatal(err)
		}
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() { recover() }() // bbolt's, of what is no index
		db, err := bolt.Open(copied, 0o600, &bolt.Options{Timeout: time.Second})
		if err != nil {
			return 0
		}
		defer db.Close()
		db.View(func(tx *bolt.Tx) error {
			if b := tx.Bucket([]byte("objects")); b != nil {
				n = b.Stats().KeyN
			}
			return nil
		})
		return n
	}
	const objects = blobs + 3 // manifest, config and layer
	p.until("all rows are written", func() bool { return rows() == objects })
	r.Reset()

	var pulling sync.WaitGroup
	stop := make(chan struct{})
	for c := range clients {
		pulling.Go(func() {
			for i := c; ; i = (i + clients) % blobs {
				select {
				case <-stop:
					return
				default:
				}
				resp, body, err := p.get("/v2/team/app/blobs/" + digests[i].String() + "?ns=lab.test")
				if err != nil || resp.StatusCode != 200 || !bytes.Equal(body, bodies[i]) {
					t.Errorf("blob %d: %v, %d bytes: %v", i, status200(resp), len(body), err)
					return
				}
			}
		})
	}
	for _, damage := range []struct {
		how string
		do  func() error
	}{
		{"cut", func() error { return os.Truncate(path, 8192) }},
		{"zeroed", func() error {
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			return os.WriteFile(path, make([]byte, info.Size()), 0o600)
		}},
		{"overwritten", func() error { return os.WriteFile(path, []byte("this is no index"), 0o600) }},
		{"removed", func() error { return os.Remove(path) }},
	} {
		if err := damage.do(); err != nil {
			t.Fatal(err)
		}
		if n := rows(); n == objects {
			t.Errorf("%s: the file is whole at once", damage.how)
		}
		begun := time.Now()
		p.until(fmt.Sprint(damage.how, ", and whole again"), func() bool { return rows() == objects })
		t.Logf("%s: whole again after %v", damage.how, time.Since(begun).Round(time.Millisecond))
	}
	close(stop)
	pulling.Wait()
	if n := r.Count("GET", "/blobs/"); n > 0 {
		t.Errorf("%d blobs were asked for again", n)
	}
	p.terminate()
	p = run(t, dir, "--upstream", "lab.test="+r.URL)
	r.Reset()
	for i, d := range digests[:20] {
		p.mustGet("/v2/team/app/blobs/"+d.String()+"?ns=lab.test", bodies[i])
	}
	for _, e := range r.Exchanges() {
		if e.Method == "GET" && e.Range != "bytes=0-0" { // which is a question
			t.Errorf("after a restart, %s %s %s", e.Method, e.Path, e.Range)
		}
	}
}
