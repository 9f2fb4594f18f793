// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"tarn/internal/probe"

	"golang.org/x/sys/unix"
)

// syncDir is where sync keeps the directory that _default is a link to. /run is gone
// after a restart of the machine, and then the link leads nowhere, which containerd
// takes for no settings at all. It is not in /run/tarn, which is the user's that tarn runs
// as: sync is root's, and would write and remove wherever that user has a link lead.
const syncDir = "/run/tarn-hosts"

// Sync keeps tarn's hosts.toml in place while tarn answers, until the context ends,
// and then takes it away.
type Sync struct {
	CertsDir string
	Mirror   Mirror
	Client   *http.Client  // asks tarn
	Every    time.Duration // how often
	// Instance is the TARN_INSTANCE of the tarn that is meant; "" takes any.
	Instance string
	// Told hears of each change and of each new error.
	Told func(message string)

	dir string // syncDir, but in tests
}

// Run returns when the context ends, with what could not be taken away. What is in the
// way meanwhile, such as somebody else's settings or a directory that is read-only, it
// says, and tries again: tarn is as useful to who asks it otherwise.
func (s Sync) Run(ctx context.Context) error {
	if s.dir == "" {
		s.dir = syncDir
	}
	if err := errors.Join(s.Mirror.check(), checkCertsDir(s.CertsDir)); err != nil {
		return err
	}
	unlock, err := s.alone()
	if err != nil {
		return err
	}
	defer unlock()
	_, err = os.Stat(s.CertsDir)
	made := errors.Is(err, fs.ErrNotExist)
	if made {
		defer os.Remove(s.CertsDir) // where nobody else has used it meanwhile
	}
	tick := time.NewTicker(s.Every)
	defer tick.Stop()
	for was := ""; ; {
		now := "tarn answers: " + s.place() + " leads to it"
		if err := s.link(); err != nil {
			now = err.Error()
		} else if err := Answers(ctx, s.Client, s.Mirror.URL, s.Instance); err != nil && ctx.Err() == nil {
			now = fmt.Sprintf("the registries themselves are asked: %v", err)
			if err := s.take(); err != nil {
				now = fmt.Sprintf("%v", err)
			}
		} else if err := s.put(); err != nil {
			now = fmt.Sprintf("the registries themselves are asked: %v", err)
		}
		if now != was && ctx.Err() == nil {
			s.Told(now)
			was = now
		}
		select {
		case <-ctx.Done():
			return errors.Join(s.unlink(), s.take())
		case <-tick.C:
		}
	}
}

// alone keeps a second one out, which would take the link away at its end. Whoever
// holds the lock has it until its process ends.
func (s Sync) alone() (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(s.dir), 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(s.dir+".lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("another tarn hosts sync runs here: %s: %w", lock.Name(), err)
	}
	return func() { lock.Close() }, nil
}

func (s Sync) place() string { return filepath.Join(s.CertsDir, anyRegistry) }

// link makes _default a link to the directory in /run. A name that is there and is
// not this link is somebody's.
func (s Sync) link() error {
	if target, err := os.Readlink(s.place()); err == nil && target == s.dir {
		return nil // left by a kill
	}
	if _, err := os.Lstat(s.place()); err == nil {
		return fmt.Errorf("%s is there and is not sync's; take it away first: tarn hosts remove, if it is tarn's", s.place())
	}
	if err := os.MkdirAll(s.CertsDir, 0o755); err != nil {
		return explain(s.place(), err)
	}
	if err := os.Symlink(s.dir, s.place()); err != nil {
		return explain(s.place(), err)
	}
	return syncDirectory(s.CertsDir)
}

func (s Sync) unlink() error {
	if target, err := os.Readlink(s.place()); err == nil && target == s.dir {
		return os.Remove(s.place())
	}
	return nil // somebody else's by now
}

// put writes the file, unless it is there.
func (s Sync) put() error {
	path := filepath.Join(s.dir, fileName)
	text := render(bySync, 0, s.Mirror, nil)
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return err
	}
	if err := s.checkDir(); err != nil {
		return err
	}
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, text) {
		return nil
	}
	coming := filepath.Join(s.dir, comingName)
	if err := os.RemoveAll(coming); err != nil {
		return err
	}
	return errors.Join(writeFile(coming, text), os.Rename(coming, path))
}

// checkDir tells whether the directory is sync's alone to change.
func (s Sync) checkDir() error {
	info, err := os.Lstat(s.dir)
	if err != nil {
		return err
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	if !info.IsDir() || info.Mode().Perm()&0o022 != 0 || owner != 0 && int(owner) != os.Geteuid() {
		return fmt.Errorf("%s is no directory that only its owner, root, can change; remove it", s.dir)
	}
	return nil
}

// take removes the file first, since a directory without one is as if absent.
func (s Sync) take() error {
	if err := s.checkDir(); err != nil {
		if os.IsNotExist(err) {
			return nil
		}
		return err
	}
	if err := os.Remove(filepath.Join(s.dir, fileName)); err != nil && !os.IsNotExist(err) {
		return err
	}
	os.Remove(s.dir) // with what else is in it, it stays
	return nil
}

// Answers asks the tarn at the URL for its probe, and returns nil where it is tarn
// that answers; where an instance is named, that one.
func Answers(ctx context.Context, client *http.Client, url, instance string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, url+"/v2/hosts/manifests/1?ns="+probe.Registry, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("tarn does not answer: %w", err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Cache-Status") != probe.CacheStatus {
		return fmt.Errorf("what answers at %s is not tarn, or an older one: %s", url, resp.Status)
	}
	if want := probe.Instance(instance); want != "" && resp.Header.Get(probe.InstanceHeader) != want {
		return fmt.Errorf("another tarn answers at %s, or something that poses as one", url)
	}
	return nil
}
