// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	// patience is how long anything may take that is expected to happen. It
	// is far above what it takes on a small machine; a test that reaches it
	// fails.
	patience = 60 * time.Second
	// stopWithin is how long a daemon may take to end after SIGTERM.
	stopWithin = 20 * time.Second
	// pollEvery is short against the start of a process.
	pollEvery = 5 * time.Millisecond
)

// waitFor asks until the answer is nil, and fails the test with the last answer
// when that takes too long.
func waitFor(t *testing.T, what string, ask func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := ask()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s; last seen: %v", what, patience, err)
		}
		time.Sleep(pollEvery)
	}
}

// process is a daemon that a test started.
type process struct {
	name  string
	cmd   *exec.Cmd
	log   string        // the file with what it wrote
	ended chan struct{} // closed once it was waited for
	err   error         // how it ended; readable then
}

// start starts a daemon. The test ends it, at the latest when it is over, and
// shows the end of its log when the test failed.
func start(t *testing.T, name, binary string, args ...string) *process {
	t.Helper()
	log, err := os.CreateTemp(work(), name+"-*.log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() // the process has its own handle
	p := &process{name: name, cmd: exec.Command(binary, args...), log: log.Name(), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			t.Logf("the end of the log of %s:\n%s", name, p.tail(t))
		}
	})
	return p
}

// stop ends the process as a service manager would, and fails the test when it
// takes too long or ends badly. A process that has ended already stays ended.
func (p *process) stop(t *testing.T) {
	t.Helper()
	select {
	case <-p.ended:
		return
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Errorf("end %s: %v", p.name, err)
	}
	select {
	case <-p.ended:
		if p.err != nil {
			t.Errorf("%s ended after SIGTERM with %v, want exit code 0", p.name, p.err)
		}
	case <-time.After(stopWithin):
		p.kill(t)
		t.Errorf("%s was still running %s after SIGTERM", p.name, stopWithin)
	}
}

// kill ends the process at once and returns when it is gone.
func (p *process) kill(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		t.Errorf("kill %s: %v", p.name, err)
	}
	<-p.ended
}

// alive is nil as long as the process runs.
func (p *process) alive() error {
	select {
	case <-p.ended:
		return fmt.Errorf("%s has ended: %v", p.name, p.err)
	default:
		return nil
	}
}

// tail is the end of what the process wrote.
func (p *process) tail(t *testing.T) string {
	t.Helper()
	const length = 8 << 10
	f, err := os.Open(p.log)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > length {
		if _, err := f.Seek(-length, io.SeekEnd); err != nil {
			return err.Error()
		}
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// folder makes a folder of this test below parent.
func folder(t *testing.T, parent, name string) string {
	t.Helper()
	dir := filepath.Join(parent, strings.NewReplacer("/", "-", " ", "-").Replace(t.Name()), name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
