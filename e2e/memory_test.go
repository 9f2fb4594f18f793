// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// envMemory set to anything has the numbers of each attack be those that are
// promised; without it they are a tenth, or less.
const envMemory = "TARN_E2E_MEMORY"

const (
	// podMemory is what the DaemonSet's pod has.
	podMemory = 512 << 20
	// restMemory is what tarn may hold of its own once the attack is over.
	restMemory = 128 << 20
	memoryName = "evil.test"
	longLine   = 4 << 10
)

// memoryGroup makes a control group that bounds memory, of either version, and
// returns the file to enter it by.
func memoryGroup(t *testing.T) string {
	t.Helper()
	name := filepath.Base(work()) + "-memory"
	for _, g := range []struct{ dir, limit string }{
		{"/sys/fs/cgroup/memory/" + name, "memory.limit_in_bytes"},
		{"/sys/fs/cgroup/" + name, "memory.max"},
	} {
		if os.Mkdir(g.dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() { os.Remove(g.dir) })
		if err := os.WriteFile(filepath.Join(g.dir, g.limit), []byte(strconv.Itoa(podMemory)), 0); err == nil {
			return filepath.Join(g.dir, "cgroup.procs")
		}
	}
	t.Fatal("no control group can bound memory here")
	return ""
}

// TestTheMemoryLimitIsAShareOfTheGroups where GOMEMLIMIT says nothing else.
func TestTheMemoryLimitIsAShareOfTheGroups(t *testing.T) {
	group := memoryGroup(t)
	for variable, want := range map[string]string{"": "4.29496729e+08", "GOMEMLIMIT=100MiB": "1.048576e+08"} {
		p := startTarn(t, folder(t, work(), "data"), "", "env", cmp.Or(variable, "-uGOMEMLIMIT"), "sh", "-c", `echo $$ >"$0" && exec "$@"`, group)
		resp, err := http.Get("http://" + tarnAdminAddr + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Contains(text, []byte("\ngo_gc_gomemlimit_bytes "+want+"\n")) {
			i := bytes.Index(text, []byte("\ngo_gc_gomemlimit_bytes "))
			t.Errorf("with %q, not %s: %.60s, %v", variable, want, text[max(0, i):], err)
		}
		p.stop(t)
	}
}

// ownMemory is what the process has that no file is behind, in bytes.
func (p *process) ownMemory(t *testing.T) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("no RssAnon")
	return 0
}

func sumOf(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// TestWhatAnybodySendsFitsIntoThePod: a registry and clients that mean harm, in
// the memory that the DaemonSet gives, with an honest image on the disk.
func TestWhatAnybodySendsFitsIntoThePod(t *testing.T) {
	scale := 25
	if os.Getenv(envMemory) != "" {
		scale = 1
	}
	// The registry answers as its path says.
	zeros := append(append([]byte(`{"layers":[0`), bytes.Repeat([]byte(",0"), 2<<20-16)...), "]}"...)
	long := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.` + strings.Repeat("x", 4<<20-200) + `+json","layers":[]}`)
	honest := make([][]byte, 20)
	byDigest := map[string][]byte{sumOf(zeros): zeros, sumOf(long): long}
	for i := range honest {
		honest[i] = make([]byte, 200_000)
		rand.NewChaCha8([32]byte{byte(i)}).Read(honest[i])
		byDigest[sumOf(honest[i])] = honest[i]
	}
	small := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[]}`)
	byDigest[sumOf(small)] = small
	many := make([][]byte, 8) // of the zeros, each another object
	for i := range many {
		many[i] = append(bytes.Clone(zeros), bytes.Repeat([]byte(" "), i)...)
		byDigest[sumOf(many[i])] = many[i]
	}
	// Each of a few KB on the wire, and of 4 MiB once it is decoded.
	zipped := make([][]byte, 160)
	for i := range zipped {
		begin := fmt.Sprintf(`{"schemaVersion":2,"layers":[],"annotations":{"i":"%d"}`, i)
		var z bytes.Buffer
		w, _ := gzip.NewWriterLevel(&z, gzip.BestSpeed)
		fmt.Fprintf(w, "%s%s}", begin, strings.Repeat(" ", 4<<20-1-len(begin)))
		w.Close()
		zipped[i] = z.Bytes()
	}
	silent, unsilence := context.WithCancel(t.Context())
	defer unsilence()
	evil := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reference := path.Base(r.URL.Path)
		h := w.Header()
		h.Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		body := small
		switch {
		case strings.HasPrefix(r.URL.Path, "/v2/silent"):
			select {
			case <-silent.Done():
			case <-r.Context().Done():
			}
			return
		case strings.HasPrefix(r.URL.Path, "/v2/zipped/"):
			if r.Method == http.MethodHead {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			i, _ := strconv.Atoi(reference)
			h.Set("Content-Encoding", "gzip")
			w.Write(zipped[i%len(zipped)])
			return
		case strings.HasPrefix(r.URL.Path, "/v2/long/"):
			body = long
		case strings.HasPrefix(r.URL.Path, "/v2/type/"):
			h.Set("Content-Type", "application/vnd."+strings.Repeat("y", 60<<10)+"+json")
		}
		if b, ok := byDigest[reference]; ok {
			body = b
		}
		h.Set("Docker-Content-Digest", sumOf(body))
		h.Set("Content-Length", strconv.Itoa(len(body)))
		if r.Method == http.MethodGet {
			w.Write(body)
		}
	})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go evil.Serve(l)
	defer evil.Close()
	dir := folder(t, work(), "data")
	socket := filepath.Join(folder(t, work(), "run"), "s")
	settings := fmt.Sprintf("admin_socket: %s\nupstreams:\n- name: %s\n  endpoints: [http://%s]\n", socket, memoryName, l.Addr())
	group := memoryGroup(t)
	run := func() *process {
		return startTarn(t, dir, settings, "sh", "-c", `echo $$ >"$0" && exec "$@"`, group)
	}
	p := run()
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	ask := func(method, what string) (int, http.Header) {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+tarnAddr+what, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			return 0, nil
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		return resp.StatusCode, resp.Header
	}
	each := func(n, at int, do func(i int)) {
		var next atomic.Int64
		var wg sync.WaitGroup
		for range at {
			wg.Go(func() {
				for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
					do(i)
				}
			})
		}
		wg.Wait()
		if err := p.alive(); err != nil {
			t.Fatal(err)
		}
	}
	var left []net.Conn // clients that sent a question, and do nothing more
	leave := func(what, headers string) {
		if c, err := net.Dial("tcp", tarnAddr); err == nil {
			fmt.Fprintf(c, "GET %s?ns=%s HTTP/1.1\r\nHost: tarn\r\n%s\r\n", what, memoryName, headers)
			left = append(left, c)
		}
	}
	blob := func(b []byte) string { return "/v2/app/blobs/" + sumOf(b) + "?ns=" + memoryName }
	for _, b := range honest {
		if status, _ := ask("GET", blob(b)); status != 200 {
			t.Fatalf("an honest blob: %d", status)
		}
	}
	for _, attack := range []struct {
		name string
		do   func()
	}{
		{"100 tags of a manifest whose mediaType has 4 MiB", func() {
			each(100, 8, func(i int) { ask("GET", fmt.Sprintf("/v2/long/manifests/t%d?ns=%s", i, memoryName)) })
		}},
		{"eight bodies of two million zeros at once, as manifests and as blobs", func() {
			each(16, 8, func(i int) {
				kind := []string{"manifests", "blobs"}[i%2]
				if status, _ := ask("GET", fmt.Sprintf("/v2/zeros/%s/%s?ns=%s", kind, sumOf(many[i/2]), memoryName)); status != 200 {
					t.Errorf("the %s: %d", kind, status)
				}
			})
		}},
		{"4,000 HEADs with a Content-Type of 60 KB", func() {
			each(4000/scale, 32, func(i int) { ask("HEAD", fmt.Sprintf("/v2/type/manifests/t%d?ns=%s", i, memoryName)) })
		}},
		{"500,000 HEADs of distinct tags", func() {
			ask("GET", "/v2/tags/manifests/t0?ns="+memoryName) // so that it is here, and each tag worth a row
			each(500_000/scale, 32, func(i int) { ask("HEAD", fmt.Sprintf("/v2/tags/manifests/t%d?ns=%s", i, memoryName)) })
		}},
		{"200 pins of 64 KB", func() {
			admin := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", socket)
			}}}
			defer admin.CloseIdleConnections()
			each(200, 4, func(i int) {
				body := fmt.Sprintf(`{"image":"%s/app:t%d","platforms":["linux/%s"]}`, memoryName, i, strings.Repeat("a", 64_000))
				resp, err := admin.Post("http://localhost/api/v1/pins", "application/json", strings.NewReader(body))
				if err != nil {
					t.Errorf("a pin: %v", err)
					return
				}
				resp.Body.Close()
				if resp.StatusCode < 400 {
					t.Errorf("a pin with a platform of 64 KB: %s", resp.Status)
				}
			})
		}},
		{"160 clients that do not read what is 4 MiB once it is decoded", func() {
			for i := range zipped {
				leave(fmt.Sprintf("/v2/zipped/manifests/%d", i), "Accept: application/x\r\n")
			}
		}},
		{"4,000 questions with an Authorization of 30 KB that nobody answers", func() {
			for i := range 4000 / scale {
				leave(fmt.Sprintf("/v2/silent%d/manifests/a%d", i%50, i), "Authorization: Basic "+strings.Repeat("QUFB", 7500)+"\r\n")
			}
		}},
		{"5,000 questions whose clients leave", func() {
			// All connections that tarn has are taken: some must go for these.
			for _, c := range left[:min(400, len(left)/2)] {
				c.Close()
			}
			each(5000/scale, 200, func(i int) {
				c, err := net.Dial("tcp", tarnAddr)
				if err != nil {
					return
				}
				what := fmt.Sprintf("/v2/silent%d/manifests/t%d", i%50, i)
				if i%2 == 0 {
					what = fmt.Sprintf("/v2/silent%d/blobs/%s", i%50, sumOf([]byte(what)))
				}
				fmt.Fprintf(c, "GET %s?ns=%s HTTP/1.1\r\nHost: tarn\r\n\r\n", what, memoryName)
				c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
				c.Read(make([]byte, 1))
				c.Close()
			})
		}},
	} {
		begun := time.Now()
		attack.do()
		if err := p.alive(); err != nil {
			t.Fatal(err)
		}
		if t.Logf("%s: %v, then %d MiB", attack.name, time.Since(begun).Round(time.Millisecond), p.ownMemory(t)>>20); t.Failed() {
			t.FailNow()
		}
	}
	for _, c := range left {
		c.Close()
	}
	unsilence()
	waitFor(t, "the memory is given back", func() error {
		if n := p.ownMemory(t); n > restMemory {
			return fmt.Errorf("%d MiB", n>>20)
		}
		return p.alive()
	})
	t.Logf("at rest: %d MiB", p.ownMemory(t)>>20)
	kept := func() {
		t.Helper()
		for _, b := range honest {
			if status, h := ask("GET", blob(b)); status != 200 || !strings.HasPrefix(h.Get("Cache-Status"), "tarn; hit") {
				t.Errorf("an honest blob: %d %s", status, h.Get("Cache-Status"))
			}
		}
	}
	kept()
	if n := longestLine(t, p.log); n > longLine {
		t.Errorf("a line of %d bytes in the log", n)
	}
	p.stop(t)
	begun := time.Now()
	p = run()
	t.Logf("ready after %v", time.Since(begun).Round(time.Millisecond))
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("ready only after %v", took)
	}
	kept()
	p.stop(t)
}

func longestLine(t *testing.T, path string) (n int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := bufio.NewReaderSize(f, 1<<20); ; {
		line, err := r.ReadSlice('\n')
		if n = max(n, len(line)); err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return n
		}
	}
}
