// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// serveAt runs a tarn by its own rule of where its socket is, and returns when it
// has one.
func serveAt(t *testing.T, dir string, listen, adminListen, socket string) *process {
	t.Helper()
	p := start(t, "tarn", filepath.Join(work(), "tarn"), "serve", "--config", anyDisk(t), "--dir", dir,
		"--listen", listen, "--admin-listen", adminListen, "--upstream", upstreamName+"=http://"+forTarnAddr)
	waitFor(t, "tarn listens at "+socket, func() error {
		if err := p.alive(); err != nil {
			t.Fatalf("%v; its log:\n%s", err, p.tail(t))
		}
		if tail := p.tail(t); !strings.Contains(tail, `"admin_socket":"unix:`+socket+`"`) {
			return fmt.Errorf("its log is %s", tail)
		}
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
		}
		return err
	})
	return p
}

// anyDisk is a configuration for a machine whose disk may be nearly full.
func anyDisk(t *testing.T) string {
	t.Helper()
	config := filepath.Join(t.TempDir(), "tarn.yaml")
	if err := os.WriteFile(config, []byte("min_free: 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return config
}

// TestTheCommandsFindTheTarnThatIsMeant, by the rule by which it chose its socket;
// it is tried here, where /run is the tests' own.
func TestTheCommandsFindTheTarnThatIsMeant(t *testing.T) {
	newRegistry(t, nil)
	pushSaying(t, "app/a", "v1", "hello", noise("a", 1<<10, 1))
	pushSaying(t, "app/b", "v1", "hello", noise("b", 1<<10, 2))
	t.Setenv("XDG_RUNTIME_DIR", "")
	a, b := folder(t, work(), "a"), folder(t, work(), "b")
	const runSocket = "/run/tarn/admin.sock"
	program := filepath.Join(work(), "tarn")
	tell := func(want string, ok bool, args ...string) {
		t.Helper()
		out, err := exec.Command(program, args...).CombinedOutput()
		if (err == nil) != ok || !strings.Contains(string(out), want) {
			t.Errorf("tarn %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	first := serveAt(t, a, tarnAddr, tarnAdminAddr, runSocket)
	second := serveAt(t, b, "127.0.0.1:5060", "127.0.0.1:5061", filepath.Join(b, "admin.sock"))
	tell("pinned", true, "pin", upstreamName+"/app/a:v1")
	tell("pinned", true, "pin", upstreamName+"/app/b:v1", "--dir", b)
	tell("app/a:v1", true, "pin", "--dir", a)
	tell("app/b:v1", true, "pin", "--dir", b)
	tell("app/a:v1", true, "pin")

	// Without the first one, what is meant for it goes to nobody else.
	first.kill(t)
	tell("is tarn running?", false, "pin", "--dir", a)
	c := folder(t, work(), "c")
	third := serveAt(t, c, tarnAddr, tarnAdminAddr, runSocket)
	tell("this is the tarn whose data directory is "+c, false, "unpin", upstreamName+"/app/a:v1", "--dir", a)
	tell("app/b:v1", true, "pin", "--dir", b)

	// Another user reads over TCP, and is told what to do for the rest.
	others := "/run/tarn-program"
	copyFile(t, program, others)
	asOther := func(args ...string) (string, error) {
		cmd := exec.Command(others, args...)
		cmd.Env, cmd.Dir = []string{"HOME=/nonexistent"}, "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := asOther("images"); err != nil || !strings.Contains(out, "IMAGE") {
		t.Errorf("images as another user: %v: %s", err, out)
	}
	if out, err := asOther("pin", upstreamName+"/app/a:v1"); err == nil || !strings.Contains(out, runSocket) || !strings.Contains(out, "sudo") || !strings.Contains(out, "kubectl exec") {
		t.Errorf("pin as another user: %v: %s", err, out)
	}
	third.stop(t)
	second.stop(t)

	// As in the DaemonSet's pod, nothing but the data directory can be written.
	if err := os.RemoveAll("/run/tarn"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/run", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Mount("", "/run", "", unix.MS_REMOUNT, "mode=755"); err != nil {
			t.Error(err)
		}
	})
	config := anyDisk(t)
	if err := os.WriteFile(config, []byte("min_free: 0\ndir: "+c+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	serveAt(t, c, tarnAddr, tarnAdminAddr, filepath.Join(c, "admin.sock"))
	tell("pinned", true, "pin", upstreamName+"/app/a:v1", "--config", config)
	t.Setenv("TARN_CONFIG", config)
	tell("app/a:v1", true, "pin")
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err == nil {
		_, err = io.Copy(out, in)
		out.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(to) })
}
