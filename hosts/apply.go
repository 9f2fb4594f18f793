// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// What is on its way has these names, beside what it becomes or was: they are fixed,
// so that the next run finds what a kill left.
const (
	comingName = ".tarn.new"
	goingName  = ".tarn.old"
)

// Apply makes the changes, each by one rename. What the plan has seen must still be
// there: somebody else's file that has come meanwhile is an error.
func (p Plan) Apply() error {
	for _, path := range p.left {
		if err := os.RemoveAll(path); err != nil {
			return explain(path, err)
		}
	}
	for _, c := range p.changes {
		var err error
		switch {
		case c.new == nil:
			err = c.remove()
		case c.old == nil && c.made > 0:
			err = c.makeTree()
		default:
			err = c.write()
		}
		if err != nil {
			return explain(c.path, err)
		}
	}
	return nil
}

// explain says what may be done where a file cannot be changed.
func explain(path string, err error) error {
	switch {
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w; on a node whose /etc cannot be written, the settings are the node's own, see docs/INSTALL.md", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w; run it as root", err)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%s: somebody else has just made it; run this again", path)
	}
	return err
}

// write makes or replaces the file in a directory that is there. The kernel sees, in
// this order: the new file whole and on the disk, its new name, the name on the disk.
func (c change) write() error {
	dir := filepath.Dir(c.path)
	coming := filepath.Join(dir, comingName)
	if err := writeFile(coming, c.new); err != nil {
		os.Remove(coming)
		return err
	}
	if err := c.unchanged(); err != nil {
		os.Remove(coming)
		return err
	}
	if err := c.rename(coming, c.path); err != nil {
		os.Remove(coming)
		return err
	}
	return syncDirectory(dir)
}

// makeTree makes the directories and the file under another name, and renames the
// topmost: before that there is none of it, after that all.
func (c change) makeTree() error {
	top := filepath.Dir(c.path)
	for range c.made - 1 {
		top = filepath.Dir(top)
	}
	coming := filepath.Join(filepath.Dir(top), comingName)
	err := c.fillTree(coming, top)
	if err == nil {
		err = c.rename(coming, top)
	}
	if err != nil {
		os.RemoveAll(coming)
		return err
	}
	return syncDirectory(filepath.Dir(top))
}

func (c change) fillTree(coming, top string) error {
	below, err := filepath.Rel(top, filepath.Dir(c.path))
	if err != nil {
		return err
	}
	dir := filepath.Join(coming, below)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, fileName), c.new); err != nil {
		return err
	}
	for ; ; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask
			return err
		}
		if err := syncDirectory(dir); err != nil {
			return err
		}
		if dir == coming {
			return nil
		}
	}
}

// rename never replaces what the plan has not seen.
func (c change) rename(from, to string) error {
	if c.old != nil {
		return os.Rename(from, to)
	}
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // a filesystem that cannot
		if _, err := os.Lstat(to); err == nil {
			return fs.ErrExist
		}
		err = os.Rename(from, to)
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// unchanged looks once more at what is to be replaced or removed.
func (c change) unchanged() error {
	if c.old == nil {
		return nil
	}
	text, err := tree{}.readFile(c.path)
	if err == nil && !bytes.Equal(text, c.old) {
		err = fmt.Errorf("%s: somebody else has just changed it; run this again", c.path)
	}
	return err
}

// remove takes the file away, and of the directories that were made for it those
// that have nothing else in them.
func (c change) remove() error {
	if err := c.unchanged(); err != nil {
		return err
	}
	what := c.path
	for range c.made {
		dir := filepath.Dir(what)
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		alone := true
		for _, e := range entries {
			alone = alone && (e.Name() == filepath.Base(what) || e.Name() == comingName || e.Name() == goingName)
		}
		if info, err := os.Lstat(dir); err != nil || !info.IsDir() || !alone {
			break // a link was not made
		}
		what = dir
	}
	going := filepath.Join(filepath.Dir(what), goingName)
	if err := os.Rename(what, going); err != nil {
		return err
	}
	if err := os.RemoveAll(going); err != nil {
		return err
	}
	return syncDirectory(filepath.Dir(what))
}

// writeFile makes a file that everybody may read, on the disk when it returns.
func writeFile(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Chmod(0o644), f.Sync())
	return errors.Join(err, f.Close())
}

func syncDirectory(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
