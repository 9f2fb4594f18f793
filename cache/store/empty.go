// SPDX-License-Identifier: Apache-2.0

package store

import (
	"fmt"
	"os"
)

// Empty removes what tarn keeps in a data directory. That itself stays, since it may be a
// mount, and so does what somebody else has put there. It fails with ErrForeign where somebody else keeps something there, and with ErrInUse
// while a tarn runs on it.
func Empty(dir string) error {
	if err := checkDir(dir); err != nil {
		return err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !isOwn(e.Name()) || e.Name() == lockName { // which goes last, while it is held
			continue
		}
		if err := root.RemoveAll(e.Name()); err != nil {
			return fmt.Errorf("empty %s: %w", dir, err)
		}
	}
	return root.Remove(lockName)
}
