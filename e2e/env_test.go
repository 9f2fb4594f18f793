// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The tests run twice nested. The outer process may use the network: it
// installs and builds, makes the working folder, and cleans up. The inner one,
// which is the same test binary, is the first process of its own process, mount
// and network namespaces, and runs the tests. When it ends, the kernel ends
// whatever it started and drops its mounts and its network, even after a crash
// of the tests.
const (
	envWork       = "TARN_E2E_WORK"     // the working folder; set for the inner process only
	envPrograms   = "TARN_E2E_PROGRAMS" // folders with the clients' programs; likewise
	envAllClients = "TARN_E2E_CLIENTS"  // set by make e2e-clients: not containerd, skopeo and crane only
	envCluster    = "TARN_E2E_CLUSTER"  // set by make e2e-cluster: a cluster of one node besides
)

func TestMain(m *testing.M) {
	if os.Getenv(envWork) == "" {
		os.Exit(outer())
	}
	if err := enter(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: prepare the namespaces:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// outer runs this test binary again inside the namespaces.
func outer() int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "e2e: containerd and the namespaces of these tests need root")
		return 1
	}
	// Ended by a signal, we still have a folder and cgroups to remove.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()

	work, err := os.MkdirTemp("", "tarn-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	defer cleanUp(work)

	programs, err := build(ctx, work)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	inner := exec.CommandContext(ctx, self, os.Args[1:]...)
	inner.Stdout, inner.Stderr = os.Stdout, os.Stderr
	inner.Env = append(os.Environ(), envWork+"="+work, envPrograms+"="+programs)
	inner.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL, // and with it the whole process namespace
	}
	// The death signal comes when the thread ends that made the child, so that
	// thread has to stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := inner.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: the tests in the namespaces:", err)
		return 1
	}
	return 0
}

// build makes what the tests run: the clients, tarn, and the program inside the
// images. It returns the folders with the clients.
func build(ctx context.Context, work string) (programs string, err error) {
	install := exec.CommandContext(ctx, "./install.sh")
	if os.Getenv(envAllClients) != "" {
		install.Args = append(install.Args, "clients")
	}
	if os.Getenv(envCluster) != "" {
		install.Args = append(install.Args, "cluster")
	}
	install.Stderr = os.Stderr
	out, err := install.Output()
	if err != nil {
		return "", fmt.Errorf("install.sh: %w", err)
	}
	for _, b := range []struct{ folder, pkg, binary string }{
		{"..", "./cmd/tarn", "tarn"},
		{".", "./program", "program"},
	} {
		c := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(work, b.binary), b.pkg)
		c.Dir = b.folder
		c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
		if out, err := c.CombinedOutput(); err != nil {
			return "", fmt.Errorf("go build %s: %w\n%s", b.pkg, err, out)
		}
	}
	image := exec.CommandContext(ctx, "../deploy/build.sh", "image", runtime.GOARCH)
	image.Env = append(os.Environ(), "OUT="+filepath.Join(work, "image"), "VERSION="+imageVersion, "IMAGE="+imageName)
	if out, err := image.CombinedOutput(); err != nil {
		return "", fmt.Errorf("deploy/build.sh image: %w\n%s", err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// cleanUp removes what outlives the namespaces: the working folder, and cgroups
// of containers, which only an orderly end of containerd removes.
func cleanUp(work string) {
	name := filepath.Base(work)
	for _, pattern := range []string{"/sys/fs/cgroup/" + name, "/sys/fs/cgroup/*/" + name} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			panic(err) // the pattern is a constant
		}
		for _, cgroup := range found {
			if err := removeCgroup(cgroup); err != nil {
				fmt.Fprintln(os.Stderr, "e2e:", err)
			}
		}
	}
	if err := os.RemoveAll(work); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
	}
}

// removeCgroup removes a cgroup and those below it, the deepest first. The
// files in them cannot be removed and need not be.
func removeCgroup(cgroup string) error {
	var folders []string
	err := filepath.WalkDir(cgroup, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			folders = append(folders, path)
		}
		return err
	})
	for _, f := range slices.Backward(folders) {
		// In cgroup v1 two controllers can share a hierarchy under two names.
		if e := syscall.Rmdir(f); e != nil && !errors.Is(e, syscall.ENOENT) {
			err = errors.Join(err, fmt.Errorf("rmdir %s: %w", f, e))
		}
	}
	return err
}

// enter finishes the namespaces from within. Mounting comes first: until the
// tree is private, a mount would be seen by the whole machine.
func enter() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make all mounts private: %w", err)
	}
	// The old /proc shows the processes of the namespace that we left.
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	// containerd, its shims and runc keep sockets and state below /run. Ours
	// are nobody else's, and their paths are short, as those of sockets must be.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	// What tests write below /etc, as operators do, is seen here only.
	if err := overlayEtc(); err != nil {
		return err
	}
	// With no name server and only these hosts, no name of a real registry can
	// even be looked up.
	for path, content := range map[string]string{
		"/etc/resolv.conf": "",
		"/etc/hosts":       "127.0.0.1 localhost " + upstreamName + "\n::1 localhost\n" + evilIP + " " + evilName + "\n",
	} {
		ours := filepath.Join(work(), filepath.Base(path))
		if err := os.WriteFile(ours, []byte(content), 0o644); err != nil {
			return err
		}
		if err := bindOver(ours, path); err != nil {
			return err
		}
	}
	// containerd finds its shim, and runc, on the path.
	if err := os.Setenv("PATH", os.Getenv(envPrograms)+":"+os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin"); err != nil {
		return err
	}
	return loopbackUp()
}

// overlayEtc keeps what is written below /etc in memory.
func overlayEtc() error {
	const upper, scratch = "/run/tarn-e2e-etc/upper", "/run/tarn-e2e-etc/work"
	for _, dir := range []string{upper, scratch} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("overlay", "/etc", "overlay", 0, "lowerdir=/etc,upperdir="+upper+",workdir="+scratch); err != nil {
		return fmt.Errorf("mount an overlay on /etc: %w", err)
	}
	return nil
}

// bindOver shows ours wherever path is read.
func bindOver(ours, path string) error {
	target, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		// Some systems have a link to a file below /run, which is empty now.
		if target, err = os.Readlink(path); err != nil {
			return err
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		if !strings.HasPrefix(target, "/run/") {
			return fmt.Errorf("%s leads to %s, which is not there", path, target)
		}
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		err = os.WriteFile(target, nil, 0o644)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(ours, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind over %s: %w", target, err)
	}
	return nil
}

// loopbackUp switches on the only interface of a new network namespace.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("switch on the loopback interface: %w", err)
	}
	return nil
}

// work is the folder of this run, on a real filesystem.
func work() string { return os.Getenv(envWork) }

// cgroupParent is the cgroup above all containers of this run.
func cgroupParent() string { return "/" + filepath.Base(work()) }
