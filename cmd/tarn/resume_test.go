// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"sync"
	"testing"

	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

// TestTwentyResetsAndAKillCostNothingTwice fetches a large blob through a link
// that is reset twenty times in the middle of an answer, and through a tarn that
// is killed halfway. TARN_TEST_BLOB_MB sets the size.
func TestTwentyResetsAndAKillCostNothingTwice(t *testing.T) {
	t.Parallel()
	const resets = 20
	size := 192 << 20
	if s := os.Getenv("TARN_TEST_BLOB_MB"); s != "" {
		mb, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		size = mb << 20
	}
	blob := make([]byte, size)
	rand.NewChaCha8([32]byte{7}).Read(blob)
	r := registrytest.New(t)
	dgst := r.Blob("app", blob)

	type connKey struct{}
	var mu sync.Mutex
	var sent int64
	broken := 0
	rnd := rand.New(rand.NewPCG(1, 2))
	half := make(chan struct{}) // closed when half of it has been sent
	var halfway sync.Once
	flaky := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		after := int64(-1)
		if req.Method == "GET" && broken < resets {
			broken++
			after = rnd.Int64N(3 << 20)
		}
		mu.Unlock()
		r.Answer(&resetting{ResponseWriter: w, conn: req.Context().Value(connKey{}).(*net.TCPConn), after: after, count: func(n int) {
			mu.Lock()
			defer mu.Unlock()
			sent += int64(n)
			if sent >= int64(size/2) {
				halfway.Do(func() { close(half) })
			}
		}}, req)
	}))
	flaky.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		// What lies in a buffer when a connection is reset was never sent.
		c.(*net.TCPConn).SetWriteBuffer(64 << 10)
		return context.WithValue(ctx, connKey{}, c)
	}
	flaky.Start()
	defer flaky.Close()

	dir := t.TempDir()
	p := run(t, dir, "--upstream", "lab.test="+flaky.URL)
	killed := make(chan *process)
	go func() {
		<-half
		p.kill()
		killed <- run(t, dir, "--upstream", "lab.test="+flaky.URL)
	}()
	now := p
	var got bytes.Buffer
	path := "/v2/app/blobs/" + dgst.String() + "?ns=lab.test"
	for tries := 0; got.Len() < size; tries++ {
		if tries > 2*resets {
			t.Fatalf("%d bytes after %d tries", got.Len(), tries)
		}
		req, err := http.NewRequest("GET", now.url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got.Len() > 0 {
			req.Header.Set("Range", fmt.Sprintf("bytes=%d-", got.Len()))
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			now = <-killed
			continue
		}
		if resp.StatusCode == http.StatusBadGateway && now != p {
			resp.Body.Close()
			got.Reset() // after a kill, as it is told: from the start
			continue
		}
		if resp.StatusCode > 206 {
			t.Fatal(resp.Status)
		}
		_, err = io.Copy(&got, resp.Body)
		resp.Body.Close()
		if err != nil && now == p {
			now = <-killed
		}
	}
	if digest.FromBytes(got.Bytes()) != dgst {
		t.Fatal("wrong bytes")
	}
	mu.Lock()
	defer mu.Unlock()
	t.Logf("%d bytes sent for %d: %.3f", sent, size, float64(sent)/float64(size))
	if now == p || broken < resets || float64(sent) > 1.05*float64(size)+20<<20 {
		t.Errorf("killed %v, %d resets, %d bytes sent for %d", now != p, broken, sent, size)
	}
}

// resetting resets its connection after so many bytes, unless that is -1.
type resetting struct {
	http.ResponseWriter
	conn  *net.TCPConn
	after int64
	count func(n int)
}

func (w *resetting) Write(p []byte) (int, error) {
	if w.after >= 0 && int64(len(p)) > w.after {
		p = p[:w.after]
	}
	n, err := w.ResponseWriter.Write(p)
	w.count(n)
	if w.after >= 0 {
		if w.after -= int64(n); w.after == 0 {
			http.NewResponseController(w.ResponseWriter).Flush()
			w.conn.SetLinger(0)
			panic(http.ErrAbortHandler)
		}
	}
	return n, err
}
