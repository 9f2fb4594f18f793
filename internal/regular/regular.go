// SPDX-License-Identifier: Apache-2.0

// Package regular opens files of which nobody knows what somebody has put in their
// place by now.
//
// Contract: a link is not followed, the other end of a pipe is not waited for, and
// what is opened is a regular file or an error that wraps ErrNot.
package regular

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// ErrNot: something else has the place of a file.
var ErrNot = errors.New("it is no regular file")

// Flags neither follow a link nor wait for the other end of a pipe.
const Flags = syscall.O_NOFOLLOW | syscall.O_NONBLOCK

// Open is os.OpenFile for a regular file.
func Open(path string, flag int, mode os.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, flag|Flags, mode)
	for _, no := range []error{syscall.ELOOP, syscall.ENXIO, syscall.ENODEV, syscall.EISDIR} {
		if errors.Is(err, no) {
			return nil, fmt.Errorf("%w: %w", ErrNot, no)
		}
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: %s", ErrNot, info.Mode().Type())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Read is os.ReadFile for one of at most so many bytes. One that has more is an
// error.
func Read(path string, most int64) ([]byte, error) {
	f, err := Open(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("it has more than %d bytes, the most that it may have", most)
	}
	return data, err
}

// Replace is os.WriteFile for what has no other name and nobody else writes: what is
// in its place is removed first.
func Replace(path string, data []byte, mode os.FileMode) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}
