// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// maxFile bounds what is read of another's file, in bytes.
const maxFile = 4 << 20

// tree is the files as the runtime sees them: from the directory root, which may be
// another process's /proc/PID/root. "" is this process's own.
type tree struct{ root string }

// open resolves links as the runtime does, within its root. It does not wait for the
// other end of a pipe.
func (t tree) open(path string) (*os.File, error) {
	if t.root == "" {
		return os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	}
	root, err := unix.Open(t.root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: t.root, Err: err}
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, path, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (t tree) stat(path string) (fs.FileInfo, error) {
	f, err := t.open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Stat()
}

func (t tree) readFile(path string) ([]byte, error) {
	f, err := t.open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Mode()&fs.ModeNamedPipe != 0 {
		return nil, fmt.Errorf("%s is a pipe, and not a file; remove it", path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", path, maxFile)
	}
	return text, err
}

func (t tree) readDir(path string) ([]fs.DirEntry, error) {
	f, err := t.open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.ReadDir(-1)
}

// same tells whether both trees have the same file or directory at the path, or both
// none.
func (t tree) same(other tree, path string) bool {
	a, aerr := t.stat(path)
	b, berr := other.stat(path)
	if aerr != nil || berr != nil {
		return errors.Is(aerr, fs.ErrNotExist) && errors.Is(berr, fs.ErrNotExist)
	}
	return os.SameFile(a, b)
}
