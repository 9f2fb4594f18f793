// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The admin socket: where what changes something is asked for. Who may open it is
// who runs tarn, and root; of a port on loopback that cannot be said.

const (
	// socketName is the socket's, in the directory that was chosen for it.
	socketName = "admin.sock"
	// runDir is where root's daemons have their sockets.
	runDir = "/run/tarn"
	// maxSocketPath is what fits into sockaddr_un.sun_path with its NUL (unix(7)).
	maxSocketPath = 107
	// socketPatience is how long is waited for another tarn that looks for its
	// place at the same time, and for the answer of one that is there: both take
	// a few system calls.
	socketPatience = time.Second
	// unixPrefix tells the address of a socket from host:port.
	unixPrefix = "unix:"
)

// errTaken: another process listens there.
var errTaken = errors.New("is taken by another process")

// runPlaces are the directories that are tried before the data directory, which is
// the only one that can be written in a container whose root file system is
// read-only.
func runPlaces() []string {
	places := []string{runDir}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		places = append(places, filepath.Join(dir, "tarn"))
	}
	return places
}

// realDir is the data directory as tarn and who looks for it both call it.
func realDir(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil { // else it is not there, or not for us
		dir = real
	}
	return dir
}

// listenFirst listens on a socket in the first of these directories where that can
// be done and no other tarn does. Of two tarns on one node the first has /run/tarn,
// and the other one its data directory.
func listenFirst(places []string) (net.Listener, error) {
	var failed []error
	for _, dir := range places {
		// Only the last folder is made: who has no /run has no use for one.
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			failed = append(failed, err)
			continue
		}
		l, err := listenSocket(filepath.Join(dir, socketName))
		if err == nil {
			return l, nil
		}
		failed = append(failed, err)
	}
	return nil, errors.Join(failed...)
}

// listenSocket listens on a socket that only its owner may open. One that somebody
// listens on is left alone; one that a killed process left is replaced.
func listenSocket(path string) (net.Listener, error) {
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	// Between finding a dead socket and replacing it, another tarn could have done
	// so, and would lose its own: only one at a time looks.
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := lock(dir); err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	if err := removeDead(path); err != nil {
		return nil, err
	}
	// The mode of the socket before it has a name is that of the file, which so is
	// never open to others, whatever the umask.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		err := c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmod)
	}}
	return config.Listen(context.Background(), "unix", path)
}

func checkSocketPath(path string) error {
	if n := len(path); n > maxSocketPath {
		return fmt.Errorf("%s: the path of a socket has at most %d bytes, and this one %d", path, maxSocketPath, n)
	}
	return nil
}

// lock waits for whoever holds the directory's lock, but not for ever: everybody
// who can read a directory can lock it.
func lock(dir *os.File) error {
	for end := time.Now().Add(socketPatience); ; time.Sleep(socketPatience / 100) {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return err
		}
	}
}

// removeDead removes a socket that nobody listens on, and nothing else.
func removeDead(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is no socket, and is not replaced", path)
	}
	c, err := net.DialTimeout("unix", path, socketPatience)
	if err == nil {
		c.Close()
		return fmt.Errorf("%s %w", path, errTaken)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%s may be another process's: %w", path, err)
	}
	return os.Remove(path)
}
