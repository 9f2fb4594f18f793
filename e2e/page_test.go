// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"bufio"
	"context"
	"errors"
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
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// The page is looked at in a real Chromium by the scripts in page/, while a real
// containerd pulls. A script asks the test for what is to happen next, by a line
// "ask WHAT", and goes on with the line that it is answered. With TARN_E2E_PAGE_LOOKS,
// a folder, each look that it takes is a screenshot there.

// scriptPatience is how long a script may take in all.
const scriptPatience = 4 * time.Minute

// modules is the folder with what drives the browser.
func modules(t *testing.T) string {
	t.Helper()
	for _, dir := range filepath.SplitList(os.Getenv(envPrograms)) {
		if strings.HasPrefix(filepath.Base(dir), "page@") {
			return dir
		}
	}
	t.Fatal("install.sh names no folder with playwright-core")
	return ""
}

// look runs a script. What it asks for is done here, in the test's own goroutine.
func look(t *testing.T, script string, args []string, steps map[string]func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), scriptPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "node", append([]string{filepath.Join("page", script)}, args...)...)
	cmd.Env = append(os.Environ(), "TARN_E2E_MODULES="+modules(t), "TARN_E2E_PROFILE="+t.TempDir())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		what, asks := strings.CutPrefix(lines.Text(), "ask ")
		if !asks {
			t.Log(lines.Text())
			continue
		}
		do := steps[what]
		if do == nil {
			t.Fatalf("%s asks for %q, which nobody knows", script, what)
		}
		do()
		fmt.Fprintln(in, "done")
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%s: %v", script, err)
	}
}

// valve lets so many bytes of a blob through to tarn, over however many connections.
type valve struct {
	mu   sync.Mutex
	left int64
	more chan struct{} // closed when there are more
}

func newValve(left int64) *valve { return &valve{left: left, more: make(chan struct{})} }

func (v *valve) open(n int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.left += n
	close(v.more)
	v.more = make(chan struct{})
}

// take returns how many of n bytes may pass now, and else when to ask again.
func (v *valve) take(n int) (int, <-chan struct{}) {
	v.mu.Lock()
	defer v.mu.Unlock()
	n = int(min(int64(n), v.left))
	v.left -= int64(n)
	return n, v.more
}

// valved writes an answer through a valve.
type valved struct {
	http.ResponseWriter
	valve *valve
	gone  <-chan struct{}
}

// WriteHeader sends it at once: a registry that is slow has answered.
func (w valved) WriteHeader(status int) {
	w.ResponseWriter.WriteHeader(status)
	http.NewResponseController(w.ResponseWriter).Flush() // the first Write has the error
}

func (w valved) Write(p []byte) (written int, err error) {
	for written < len(p) {
		n, more := w.valve.take(len(p) - written)
		if n == 0 {
			select {
			case <-more:
				continue
			case <-w.gone:
				return written, io.ErrClosedPipe
			}
		}
		n, err = w.ResponseWriter.Write(p[written : written+n])
		written += n
		if err != nil {
			return written, err
		}
		if err := http.NewResponseController(w.ResponseWriter).Flush(); err != nil {
			return written, err
		}
	}
	return written, nil
}

// holdBack puts a valve on an object's way to tarn.
func holdBack(r *registry, o v1.Descriptor, left int64) *valve {
	v := newValve(left)
	r.gate.chaos = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != http.MethodGet || !strings.HasSuffix(req.URL.Path, o.Digest.String()) {
			return false
		}
		r.gate.app.ServeHTTP(valved{w, v, req.Context().Done()}, req)
		return true
	}
	return v
}

// TestThePageShowsAPullAsItHappens to who looks, clicks, or has a keyboard only.
func TestThePageShowsAPullAsItHappens(t *testing.T) {
	n := newNode(t)
	c := n.ctr("default")
	pushSaying(t, "app/small", "v1", "small")
	large := pushSaying(t, "app/large", "v1", "large", noise("large", 8<<20, 1))
	layer := large.objects[len(large.objects)-1]
	v := holdBack(n.registry, layer, layer.Size/8)
	done := make(chan error, 1)
	look(t, "pull.mjs", nil, map[string]func(){
		"begin the pull": func() {
			mustPull(t, c, upstreamName+"/app/small:v1")
			go func() { done <- c.pull(t.Context(), large.ref()) }()
		},
		"let more come": func() { v.open(layer.Size / 2) },
		"let all come": func() {
			v.open(layer.Size)
			if err := <-done; err != nil {
				t.Error(err)
			}
		},
	})
	v.open(layer.Size) // also where the script failed
}

// events opens a stream of events; nil and the words of a refusal where there is none.
func events() (stream io.ReadCloser, refused string, err error) {
	resp, err := http.Get("http://" + tarnAdminAddr + "/api/v1/events")
	if err != nil {
		return nil, "", err
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, "", nil
	}
	defer resp.Body.Close()
	words, err := io.ReadAll(resp.Body)
	return nil, string(words), err
}

// takeStreams opens all that tarn still gives.
func takeStreams() (taken []io.ReadCloser, err error) {
	for range 100 {
		stream, refused, err := events()
		if err != nil || refused != "" {
			return taken, err
		}
		taken = append(taken, stream)
	}
	return taken, fmt.Errorf("there is no bound on streams")
}

// wantFreeStreams says how many more may listen, which says how many do.
func wantFreeStreams(t *testing.T, want int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d streams are free", want), func() error {
		taken, err := takeStreams()
		for _, s := range taken {
			s.Close()
		}
		if err == nil && len(taken) != want {
			err = fmt.Errorf("%d are", len(taken))
		}
		return err
	})
}

// TestNineTabsTakeOneStreamAndHiddenOnesNone.
func TestNineTabsTakeOneStreamAndHiddenOnesNone(t *testing.T) {
	n := newNode(t)
	c := n.ctr("default")
	small := pushSaying(t, "app/small", "v1", "small")
	moved := pushSaying(t, "app/moved", "v1", "moved")
	var taken []io.ReadCloser
	look(t, "tabs.mjs", nil, map[string]func(){
		"14 streams are free": func() { wantFreeStreams(t, 14) },
		"15 streams are free": func() { wantFreeStreams(t, 15) },
		"16 streams are free": func() { wantFreeStreams(t, 16) },
		"pull":                func() { mustPull(t, c, small.ref()) },
		"move the tag":        func() { mustPull(t, c, moved.ref()) },
		"stop tarn":           func() { n.tarn.stop(t) },
		"start tarn":          func() { n.tarn = startTarn(t, n.tarnDir, "") },
		"take all streams": func() {
			waitFor(t, "nobody looks", func() (err error) {
				more, err := takeStreams()
				if taken = append(taken, more...); err == nil && len(taken) < 16 {
					err = fmt.Errorf("%d are free", len(taken))
				}
				return err
			})
		},
		"give them back": func() {
			for _, s := range taken {
				s.Close()
			}
		},
	})
}

// visit asks tarn for a path as a client whose name is markup.
func visit(t *testing.T, path string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, "http://"+tarnAddr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("User-Agent", "<b>agent</b>")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, resp.Body) // whatever it says
}

// TestThePageOfATarnInTrouble says what is wrong, and what to do.
func TestThePageOfATarnInTrouble(t *testing.T) {
	t.Run("its registry is away", func(t *testing.T) {
		r := newRegistry(t, nil)
		startTarn(t, folder(t, work(), "data"), "")
		r.gate.set(t, refuses)
		visit(t, "/v2/app/manifests/v1?ns="+upstreamName)
		look(t, "states.mjs", []string{"away"}, nil)
	})
	t.Run("its disk is full", func(t *testing.T) {
		newRegistry(t, nil)
		i := pushSaying(t, "app", "v1", "full", noise("large", 20<<20, 1))
		dir := tmpfs(t, "16m")
		startTarn(t, dir, "max_size: 1GiB\n")
		full, err := os.Create(filepath.Join(dir, "filler"))
		if err != nil {
			t.Fatal(err)
		}
		defer full.Close()
		if _, err := io.Copy(full, zeros{}); !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		for _, o := range i.objects {
			get(i.repo, o)
		}
		look(t, "states.mjs", []string{"full"}, nil)
	})
	t.Run("it tells names over the socket only", func(t *testing.T) {
		newRegistry(t, nil)
		i := pushSaying(t, "app/small", "v1", "small")
		startTarn(t, folder(t, work(), "data"), "admin_names: socket\nadmin_socket: "+filepath.Join(t.TempDir(), "s")+"\n")
		visit(t, "/v2/"+i.repo+"/manifests/v1?ns="+upstreamName)
		look(t, "states.mjs", []string{"socket"}, nil)
	})
	t.Run("who uses it is hostile", func(t *testing.T) {
		newRegistry(t, nil)
		startTarn(t, folder(t, work(), "data"), "")
		children := hostile(t)
		for _, path := range []string{
			"/v2/" + longest + "/manifests/v1?ns=" + upstreamName,
			"/v2/" + longest + "/manifests/" + children[0].String() + "?ns=" + upstreamName, // so that its platform is shown
			"/v2/" + longest + "/manifests/" + children[1].String() + "?ns=" + upstreamName,
			"/v2/%3Cscript%3Ealert(1)%3C%2Fscript%3E/manifests/v1?ns=" + upstreamName,
			"/v2/app/manifests/%E2%80%AE%3Cb%3E?ns=" + upstreamName,
			"/v2/app/manifests/v1?ns=%3Cscript%3Ealert(1)%3C%2Fscript%3E",
			"/v2/app/blobs/sha256:%3Cscript%3E?ns=" + upstreamName,
			"/v2/" + longest + "/manifests/" + strings.Repeat("t", 128) + "?ns=" + upstreamName,
		} {
			visit(t, path)
		}
		look(t, "states.mjs", []string{"hostile"}, nil)
	})
}

// longest is as long as a repository's name may be, and has nowhere to be broken.
var longest = strings.Repeat("n", 255)

// hostile pushes an index whose platforms are markup, and turn the writing round, and
// returns its manifests.
func hostile(t *testing.T) (children []digest.Digest) {
	t.Helper()
	list := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	for n, p := range []string{"<img src=x onerror=alert(1)>", "\u202e\u2067linux" + strings.Repeat("w", 300)} {
		m := pushManifest(t, longest, "amd64", nil, noise("a", 1<<10, byte(n)))
		m.top.Platform = &v1.Platform{OS: p, Architecture: "<script>alert(1)</script>"}
		list.Manifests = append(list.Manifests, m.top)
		children = append(children, m.top.Digest)
	}
	pushTag(t, image{repo: longest, tag: "v1", top: pushJSON(t, longest, v1.MediaTypeImageIndex, list)})
	return children
}
