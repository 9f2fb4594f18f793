// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The test binary is tarn itself when it is told to be: a process of its own,
// with everything but the name of the file.
const asTarn = "TARN_TEST_AS_TARN"

func TestMain(m *testing.M) {
	if os.Getenv(asTarn) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// process is a running tarn.
type process struct {
	*exec.Cmd
	t      testing.TB
	url    string
	admin  string
	dir    string
	client *http.Client // of the registry API
	output lockedBuffer
	exited chan struct{}
	err    error // of Wait
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// command is tarn with these arguments, not started.
func command(args ...string) *exec.Cmd {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), asTarn+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// freePort is an address that nobody listens on. It is none of the ports that
// the kernel hands out: another test's connection would take it meanwhile.
func freePort(t testing.TB) string {
	t.Helper()
	const first, end = 20_000, 32_768
	for range 100 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+rand.IntN(end-first)))
		if err != nil {
			continue
		}
		defer l.Close()
		if _, taken := portsTaken.LoadOrStore(l.Addr().String(), true); !taken {
			return l.Addr().String()
		}
	}
	t.Fatal("no free port")
	return ""
}

var portsTaken sync.Map // by address, of this process

// run starts tarn serve and waits until it answers.
func run(t testing.TB, dir string, args ...string) *process {
	t.Helper()
	return runWith(t, dir, "", args...)
}

// runWith adds these lines to its configuration.
func runWith(t testing.TB, dir, settings string, args ...string) *process {
	t.Helper()
	return runPrepared(t, dir, settings, func(*exec.Cmd) {}, args...)
}

// runPrepared lets the caller change how it is started.
func runPrepared(t testing.TB, dir, settings string, prepare func(*exec.Cmd), args ...string) *process {
	t.Helper()
	listen, admin := freePort(t), freePort(t)
	p := &process{t: t, url: "http://" + listen, admin: "http://" + admin, dir: dir, client: http.DefaultClient, exited: make(chan struct{})}
	if !strings.Contains(settings, "admin_socket:") { // not in /run/tarn, which is the machine's
		settings += "admin_socket: " + socketIn(t, dir) + "\n"
	}
	p.Cmd = command(append([]string{"serve", "--config", anyDisk(t, settings), "--dir", dir, "--listen", listen, "--admin-listen", admin}, args...)...)
	p.Stdout, p.Stderr = &p.output, &p.output
	prepare(p.Cmd)
	if client := tlsClient(t, settings); client != nil {
		p.url, p.client = "https://"+listen, client
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.err = p.Wait(); close(p.exited) }()
	t.Cleanup(p.kill)
	p.until("tarn answers", func() bool {
		resp, err := p.client.Get(p.url + "/v2/")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == 200 || resp.StatusCode == 401 // with a token broker
	})
	return p
}

// anyDisk is a configuration for a machine whose disk may be nearly full.
func anyDisk(t testing.TB, settings string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tarn.yaml")
	if err := os.WriteFile(path, []byte("min_free: 0\n"+settings), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// until waits, bounded, for what ok says.
func (p *process) until(what string, ok func() bool) {
	p.t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			p.t.Fatalf("not in 20 s: %s\n%s", what, p.output.String())
		case <-p.exited:
			p.t.Fatalf("tarn has ended: %v\n%s", p.err, p.output.String())
		case <-tick.C:
		}
	}
}

func (p *process) kill() {
	p.Process.Kill()
	<-p.exited
}

// terminate ends it as systemd or the kubelet would.
func (p *process) terminate() {
	p.t.Helper()
	p.Process.Signal(syscall.SIGTERM)
	p.ended()
}

// ended waits for the end of a process that was told to stop.
func (p *process) ended() {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(20 * time.Second):
		p.t.Fatal("still there 20 s after SIGTERM")
	}
	if p.err != nil {
		p.t.Errorf("after SIGTERM: %v\n%s", p.err, p.output.String())
	}
}

// socket is the address of its admin socket.
func (p *process) socket() string { return unixPrefix + socketIn(p.t, p.dir) }

// socketIn is a path for a socket in the directory, or, where that is too long for
// one, as a test's own name can make it, a link to the directory.
func socketIn(t testing.TB, dir string) string {
	t.Helper()
	if path := filepath.Join(dir, socketName); len(path) <= maxSocketPath {
		return path
	}
	short := filepath.Join(os.TempDir(), fmt.Sprintf("t%x", sha256.Sum256([]byte(dir)))[:12])
	if err := os.Symlink(dir, short); err == nil {
		t.Cleanup(func() { os.Remove(short) })
	} else if !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	return filepath.Join(short, socketName)
}

// overSocket is a client that speaks to it over that.
func (p *process) overSocket() *http.Client {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socketIn(p.t, p.dir))
	}}
	p.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// get returns the whole answer.
func (p *process) get(path string) (*http.Response, []byte, error) {
	ctx, cancel := context.WithTimeout(p.t.Context(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", p.url+path, nil)
	if err != nil {
		return nil, nil, err
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, body, err
}

// mustGet is a whole 200.
func (p *process) mustGet(path string, want []byte) *http.Response {
	p.t.Helper()
	resp, body, err := p.get(path)
	if err != nil || resp.StatusCode != 200 || !bytes.Equal(body, want) {
		p.t.Fatalf("%s: %v, %d bytes of %d, %v\n%s", path, status200(resp), len(body), len(want), err, p.output.String())
	}
	return resp
}

func status200(r *http.Response) string {
	if r == nil {
		return "no answer"
	}
	return r.Status
}

// fails runs tarn to its end and returns the one line that it says.
func fails(t testing.TB, args ...string) string {
	t.Helper()
	cmd := command(args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	done := make(chan error, 1)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if err == nil {
			t.Fatalf("tarn %v did not fail", args)
		}
	case <-time.After(20 * time.Second):
		cmd.Process.Kill()
		t.Fatalf("tarn %v goes on\n%s", args, out.String())
	}
	if n := strings.Count(out.String(), "\n"); n != 1 {
		t.Errorf("tarn %v said %d lines:\n%s", args, n, out.String())
	}
	return strings.TrimSpace(out.String())
}
