// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

func TestMistakesAreOneClearLine(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	used := t.TempDir()
	run(t, used)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--listen", taken.Addr().String(), "--dir", t.TempDir()}, "is taken by another process"},
		{[]string{"--listen", "127.0.0.1:0", "--admin-listen", taken.Addr().String(), "--dir", t.TempDir()}, "admin_listen:"},
		{[]string{"--listen", "127.0.0.1:0", "--admin-listen", "", "--dir", used}, "in use by another tarn"},
		{[]string{"--listen", "127.0.0.1:0", "--admin-listen", "", "--dir", filepath.Join(file, "x")}, "not a directory"},
		{[]string{"--max-size", "lots"}, "is not a size"},
		{[]string{"--max-size", "50"}, "--max-size: must be at least 1MiB, and is 50 bytes"},
		{[]string{"--listen", "127.0.0.1:5050", "--admin-listen", "127.0.0.1:5050"}, "have one port"},
		{[]string{"--listen", ":5050", "--admin-listen", "127.0.0.1:5050"}, "have one port"},
		{[]string{"--listen", "[::1]:5050", "--admin-listen", "[::]:5050"}, "have one port"},
		{[]string{"--upstream", "ghcr.io"}, "is not NAME=URL"},
		{[]string{"--upstream", "ghcr.io=gopher://x"}, "must be http or https"},
		{[]string{"--config", "/nonexistent.yaml"}, "no such file"},
		{[]string{"--nonsense"}, "unknown flag"},
	} {
		if got := fails(t, append([]string{"serve"}, c.args...)...); !strings.HasPrefix(got, "tarn: ") || !strings.Contains(got, c.want) {
			t.Errorf("%v: %s", c.args, got)
		}
	}
}

func TestTheAdminListenerTellsWhatIsThere(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	p := run(t, t.TempDir(), "--upstream", "lab.test="+r.URL)
	blob := []byte("a blob")
	d := r.Blob("app", blob)
	path := "/v2/app/blobs/" + d.String() + "?ns=lab.test"
	p.mustGet(path, blob)
	p.until("the status shows the object", func() bool {
		var s struct {
			Cache struct{ UsedBytes, MaxBytes int64 }
			Index struct{ Objects int }
		}
		fetchJSON(t, p.admin+"/api/v1/status", &s)
		return s.Index.Objects == 1 && s.Cache.UsedBytes > 0 && s.Cache.MaxBytes == 50<<30
	})
	p.mustGet(path, blob)
	resp, err := http.Get(p.admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	for _, want := range []string{
		`tarn_requests_total{kind="blob",outcome="miss",upstream="lab.test"} 1`,
		`tarn_requests_total{kind="blob",outcome="hit",upstream="lab.test"} 1`,
		`tarn_upstream_requests_total{cause="fetch",code="206",method="GET",upstream="lab.test"} 1`,
		`tarn_cache_used_bytes`,
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	if strings.Contains(string(text), "app") || strings.Contains(string(text), d.String()) {
		t.Error("metrics name an image")
	}
}

func fetchJSON(t testing.TB, url string, into any) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		t.Fatal(err)
	}
}

func TestSIGTERMClosesTheListenerAtOnceAndFinishesAnswers(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	blob := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(blob)
	d := r.Blob("app", blob)
	gate := make(chan struct{})
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		w.Write(blob[:1<<19])
		w.(http.Flusher).Flush()
		<-gate
		w.Write(blob[1<<19:])
		return true
	}
	p := run(t, t.TempDir(), "--upstream", "lab.test="+r.URL)
	resp, err := http.Get(p.url + "/v2/app/blobs/" + d.String() + "?ns=lab.test")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	p.Process.Signal(os.Interrupt)
	p.until("connections are refused", func() bool {
		c, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(gate)
	got, err := io.ReadAll(resp.Body)
	if err != nil || digest.FromBytes(got) != d {
		t.Fatalf("the running answer: %d bytes, %v", len(got), err)
	}
	p.ended()
}

// TestKillAtAnyMoment: tarn is killed at a moment that no test chose, in the
// middle of pulls; whatever it left, the next tarn serves right bytes only,
// sweeps what is pending, and counts what is there.
func TestKillAtAnyMoment(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	var layers [][]byte
	for i := range 8 {
		b := make([]byte, 1000+rnd.IntN(3<<20))
		rand.NewChaCha8([32]byte{byte(i)}).Read(b)
		layers = append(layers, b)
	}
	img := r.Image("app", "v1", layers...)
	dir := t.TempDir()
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for round := range rounds {
		p := run(t, dir, "--upstream", "lab.test="+r.URL)
		if left, _ := filepath.Glob(filepath.Join(dir, "pending", "*")); len(left) > 0 && round > 0 {
			t.Errorf("pending files after a start: %v", left)
		}
		// Forget something, so that there is work in each round.
		if round > 0 {
			os.Remove(filepath.Join(dir, "blobs/sha256", img.Layers[round%len(layers)].Encoded()))
		}
		killAfter := int64(rnd.IntN(12 << 20))
		var received atomic.Int64
		var once sync.Once
		var wg sync.WaitGroup
		for i, l := range img.Layers {
			wg.Go(func() {
				resp, err := http.Get(p.url + "/v2/app/blobs/" + l.String() + "?ns=lab.test")
				if err != nil {
					return // killed
				}
				defer resp.Body.Close()
				var got []byte
				buf := make([]byte, 16<<10)
				for {
					n, err := resp.Body.Read(buf)
					got = append(got, buf[:n]...)
					if received.Add(int64(n)) > killAfter {
						once.Do(func() { p.Process.Kill() })
					}
					if err != nil {
						if err == io.EOF && resp.StatusCode == 200 && digest.FromBytes(got) != l {
							t.Errorf("round %d, layer %d: a complete wrong object", round, i)
						}
						return
					}
				}
			})
		}
		wg.Wait()
		p.kill()
	}
	p := run(t, dir, "--upstream", "lab.test="+r.URL)
	p.mustGet("/v2/app/manifests/v1?ns=lab.test", img.Body)
	for i, l := range img.Layers {
		p.mustGet("/v2/app/blobs/"+l.String()+"?ns=lab.test", layers[i])
	}
	p.until("all is stored", func() bool {
		var s struct{ Index struct{ Objects int } }
		fetchJSON(t, p.admin+"/api/v1/status", &s)
		return s.Index.Objects == len(layers)+1
	})
	r.Reset()
	for i, l := range img.Layers {
		p.mustGet("/v2/app/blobs/"+l.String()+"?ns=lab.test", layers[i])
	}
	if n := r.Count("GET", ""); n != 0 {
		t.Errorf("%d GETs of what is stored", n)
	}
	p.terminate()
	files, _ := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || digest.FromBytes(b).Encoded() != filepath.Base(f) {
			t.Errorf("%s is not what its name says: %v", f, err)
		}
	}
	// What the kills had refused is left to the next process, as names without a byte.
	left, _ := filepath.Glob(filepath.Join(dir, "pending", "*"))
	for _, f := range left {
		if info, err := os.Stat(f); err != nil || info.Size() > 0 {
			t.Errorf("a pending file: %s: %v", f, err)
		}
	}
}

// TestABoundLargerThanTheDiskIsAWarning: one configuration is for nodes of many sizes.
func TestABoundLargerThanTheDiskIsAWarning(t *testing.T) {
	t.Parallel()
	p := run(t, t.TempDir(), "--max-size", "8000TiB")
	p.until("it is said", func() bool { return strings.Contains(p.output.String(), `"msg":"serving"`) })
	if n := strings.Count(p.output.String(), "max_size is more than the filesystem"); n != 1 {
		t.Errorf("%d warnings in\n%s", n, &p.output)
	}
	if p := run(t, t.TempDir(), "--max-size", "100%"); strings.Contains(p.output.String(), "more than the filesystem") {
		t.Errorf("all of the disk is too much:\n%s", &p.output)
	}
}
