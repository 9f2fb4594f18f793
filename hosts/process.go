// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is the runtime behind a socket, as /proc shows it (proc(5)).
type process struct {
	pid     int
	started time.Time
	config  string // the file that its command line names, "" for none
	files   tree
}

// processBehind finds who listens on the socket. It fails where that is in another
// process namespace, as in a pod without hostPID.
func processBehind(socket string) (p process, err error) {
	conn, err := net.DialTimeout("unix", socket, dialPatience)
	if err != nil {
		return p, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return p, err
	}
	var peer *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(cerr, err); err != nil {
		return p, err
	}
	p.pid = int(peer.Pid)
	if p.pid <= 1 { // 0 is a process of another namespace, and 1 an init that opened the socket for another
		return p, fmt.Errorf("the process behind %s cannot be seen from here", socket)
	}
	if p.started, err = startOf(p.pid); err != nil {
		return p, err
	}
	if p.config, err = configOf(p.pid); err != nil {
		return p, err
	}
	p.files, err = filesOf(p.pid)
	return p, err
}

func proc(pid int, name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }

// startOf is when the process was started, to a hundredth of a second.
func startOf(pid int) (time.Time, error) {
	stat, err := os.ReadFile(proc(pid, "stat"))
	if err != nil {
		return time.Time{}, err
	}
	// The name of the program, in parentheses, may have any character in it.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	const starttime, hertz = 22 - 3, 100 // USER_HZ is 100 wherever Go runs
	if len(fields) <= starttime {
		return time.Time{}, fmt.Errorf("%s has %d fields", proc(pid, "stat"), len(fields))
	}
	ticks, err := strconv.ParseInt(fields[starttime], 10, 64)
	if err != nil {
		return time.Time{}, err
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return time.Time{}, err
	}
	up := time.Duration(now.Nano())
	return time.Now().Add(time.Duration(ticks)*time.Second/hertz - up), nil
}

// configOf reads --config from the command line.
func configOf(pid int) (string, error) {
	line, err := os.ReadFile(proc(pid, "cmdline"))
	if err != nil {
		return "", err
	}
	args := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
	for i, arg := range args {
		name, value, given := strings.Cut(arg, "=")
		if name != "--config" && name != "-config" && name != "-c" && name != "--c" {
			continue
		}
		if !given && i+1 < len(args) {
			value = args[i+1]
		}
		if !filepath.IsAbs(value) {
			cwd, err := os.Readlink(proc(pid, "cwd"))
			if err != nil {
				return "", err
			}
			value = filepath.Join(cwd, value)
		}
		return value, nil
	}
	return "", nil
}

// filesOf are the files that the process sees: this process's own, where both have the
// same mounts and the same root.
func filesOf(pid int) (tree, error) {
	theirs, err := os.Readlink(proc(pid, "ns/mnt"))
	if err != nil {
		return tree{}, err
	}
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return tree{}, err
	}
	root := tree{proc(pid, "root")}
	if theirs == ours && root.same(tree{}, "/") {
		return tree{}, nil
	}
	return root, nil
}

// startSlack is what the clocks of a file and of a process may differ by, and less
// than a process takes to read its files.
const startSlack = 50 * time.Millisecond

// changedAfter tells whether one of the files was changed after the process started:
// by the time of the inode, which no copy keeps.
func (p process) changedAfter(files []string) string {
	for _, path := range files {
		info, err := p.files.stat(path)
		if err != nil {
			continue
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && time.Unix(stat.Ctim.Unix()).After(p.started.Add(startSlack)) {
			return path
		}
	}
	return ""
}
