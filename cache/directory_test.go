// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"tarn/cache/store"
	"tarn/images"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// inTime fails the test when f hangs.
func inTime(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s hangs", what)
	}
}

// oddities put something in a file's place that is none. They return whether it can be
// done here.
var oddities = map[string]func(t *testing.T, path, outside string) error{
	"a pipe":                func(_ *testing.T, path, _ string) error { return syscall.Mkfifo(path, 0o600) },
	"a link to a file":      func(_ *testing.T, path, outside string) error { return os.Symlink(outside, path) },
	"a link to a pipe":      func(_ *testing.T, path, outside string) error { return os.Symlink(outside+".pipe", path) },
	"a link elsewhere":      func(_ *testing.T, path, outside string) error { return os.Symlink(filepath.Dir(outside), path) },
	"a link to nothing":     func(_ *testing.T, path, outside string) error { return os.Symlink(outside+".nothing", path) },
	"a directory":           func(_ *testing.T, path, _ string) error { return os.Mkdir(path, 0o700) },
	"a directory with some": func(_ *testing.T, path, _ string) error { return os.MkdirAll(filepath.Join(path, "x"), 0o700) },
	"a device": func(_ *testing.T, path, _ string) error {
		return syscall.Mknod(path, syscall.S_IFCHR|0o600, 1<<8|5) // zero: there is no end to it
	},
	"a socket": func(t *testing.T, path, _ string) error {
		dir, err := os.MkdirTemp("", "s") // a socket's path is short
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		defer l.Close()
		return os.Rename(filepath.Join(dir, "s"), path)
	},
}

// TestWhatIsNoFileIsNeitherFollowedNorWaitedFor, wherever in the directory of an
// earlier process it lies: a start works, or says what is in the way, requests are
// served, and the committer goes on.
func TestWhatIsNoFileIsNeitherFollowedNorWaitedFor(t *testing.T) {
	t.Parallel()
	stored, next := randomBytes(200_000), randomBytes(100_000)
	blob := filepath.Join("blobs", "sha256", digest.FromBytes(stored).Encoded())
	left := filepath.Join("pending", "sha256-"+digest.FromBytes(next).Encoded()+".1")
	refused := map[string]bool{"lock": true, "pending": true, "blobs": true, filepath.Join("blobs", "sha256"): true}
	for _, place := range []string{
		"lock", store.PinsName, store.PinsName + ".new", "index.db", "index.db" + ".opening", "index.db.broken", store.ListName, store.ListName + ".new", store.LayoutName, store.LayoutName + ".new", ".probe",
		"pending", "blobs", filepath.Join("blobs", "sha256"),
		blob, filepath.Join("blobs", "sha256", digest.FromString("x").Encoded()), filepath.Join("blobs", "sha256", "\x1b[31mred"),
		left, left + ".journal", filepath.Join("pending", "\x1b[31mred"),
	} {
		for name, put := range oddities {
			t.Run(fmt.Sprintf("%s in place of %q", name, place), func(t *testing.T) {
				t.Parallel()
				dir, outside := filepath.Join(t.TempDir(), "data"), filepath.Join(t.TempDir(), "outside")
				if err := errors.Join(os.WriteFile(outside, []byte("mine"), 0o600), syscall.Mkfifo(outside+".pipe", 0o600)); err != nil {
					t.Fatal(err)
				}
				c := openChaos(t, dir, 1<<30)
				req := storedBy(t, c, &origin{body: stored})
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(dir, place)
				if strings.HasSuffix(place, ".journal") {
					if err := os.WriteFile(strings.TrimSuffix(path, ".journal"), next, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				if err := os.RemoveAll(path); err != nil {
					t.Fatal(err)
				}
				if err := put(t, path, outside); errors.Is(err, syscall.EPERM) {
					t.Skip("not to be had here")
				} else if err != nil {
					t.Fatal(err)
				}
				isDir := strings.HasPrefix(name, "a directory")
				inTime(t, "the cache", func() {
					c, err := New(Options{Dir: dir, MaxSize: 1 << 30})
					if refused[place] && (!isDir || place == "lock") {
						if err == nil {
							c.Close()
						}
						if err == nil || len(err.Error()) > 500 || strings.Contains(err.Error(), "\x1b") || !strings.Contains(err.Error(), filepath.Base(place)) {
							t.Errorf("it starts, or does not say why not: %v", err)
						}
						return
					}
					if err != nil {
						t.Errorf("it does not start: %v", err)
						return
					}
					for _, body := range [][]byte{stored, next} {
						r := req
						r.Digest = digest.FromBytes(body)
						r.Fetch = (&origin{body: body}).fetch
						if got, err := readAll(c, r); err != nil || !bytes.Equal(got, body) {
							t.Errorf("%d bytes: %v", len(got), err)
						}
					}
					settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
					c.store.Scrub(time.Now().Add(2*(7*24*time.Hour)), 0)
					c.store.NoteTrouble(errors.New("to be probed"))
					c.store.Housekeep()
					c.images.Pin(images.Pin{Upstream: "lab.test", Repository: "app", Tag: "v1"})
					c.images.List()
					if err := c.Close(); err != nil {
						t.Error(err)
					}
				})
				if text, err := os.ReadFile(outside); err != nil || string(text) != "mine" {
					t.Errorf("what a link named has become %q: %v", text, err)
				}
				if _, err := os.Lstat(outside + ".nothing"); err == nil {
					t.Error("what a link named was made")
				}
			})
		}
	}
}

// TestOthersFilesAreLeftAlone: a directory that is not tarn's is refused, with words,
// and nothing in it is changed; whatever an earlier tarn has left is not.
func TestOthersFilesAreLeftAlone(t *testing.T) {
	t.Parallel()
	stored := randomBytes(100_000)
	blob := filepath.Join("blobs", "sha256", digest.FromBytes(stored).Encoded())
	write := func(files ...string) func(dir string) error {
		return func(dir string) error {
			var errs []error
			for _, f := range files {
				name, text, _ := strings.Cut(f, "=")
				errs = append(errs, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700), os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
			}
			return errors.Join(errs...)
		}
	}
	without := func(names ...string) func(dir string) error {
		return func(dir string) error {
			c, err := New(Options{Dir: dir, MaxSize: 1 << 30})
			if err != nil {
				return err
			}
			if _, err := readAll(c, parallelRequest(&origin{body: stored}, "one")); err != nil {
				return err
			}
			if err := c.Close(); err != nil {
				return err
			}
			for _, name := range names {
				if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
					return err
				}
			}
			return write("others=files")(dir)
		}
	}
	then := func(a, b func(string) error) func(string) error {
		return func(dir string) error { return errors.Join(a(dir), b(dir)) }
	}
	const layout = store.LayoutName + `={"imageLayoutVersion":"1.0.0"}`
	for name, c := range map[string]struct {
		prepare func(dir string) error
		say     string // "": it starts
	}{
		"nothing":                           {write(), ""},
		"a new filesystem":                  {func(dir string) error { return os.Mkdir(filepath.Join(dir, "lost+found"), 0o700) }, ""},
		"pins, for a first start":           {write(store.PinsName + "=[]"), ""},
		"a start that ended at once":        {write("lock" + "="), ""},
		"tarn's":                            {without(), ""},
		"tarn's without its index":          {without("index.db"), ""},
		"tarn's without pending files":      {without("pending"), ""},
		"tarn's with an empty layout file":  {then(without(), write(store.LayoutName+"=")), ""},
		"tarn's of a later version":         {then(without(), write(store.LayoutName+`={"imageLayoutVersion":"2.0.0"}`)), `"2.0.0"`},
		"a layout":                          {write(layout, store.ListName+"={}", blob+"=x"), "OCI image layout"},
		"a layout with a lock":              {write(layout, "lock"+"="), "OCI image layout"},
		"somebody's files":                  {write("letters/\x1b[31mto=her"), `"letters"`},
		"a name that is not for a terminal": {write("\x1b[31m" + strings.Repeat("x", 200) + "=her"), `"\x1b[31mxxx`},
		"somebody's blobs":                  {write("main.go=package main", blob+"=x", "lock"+"="), `"main.go"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := c.prepare(dir); err != nil {
				t.Fatal(err)
			}
			before := t.TempDir()
			copyAll(t, dir, before)
			ca, err := New(Options{Dir: dir, MaxSize: 1 << 30})
			if c.say == "" {
				if err != nil {
					t.Fatal(err)
				}
				if got, err := readAll(ca, parallelRequest(&origin{body: stored}, "one")); err != nil || !bytes.Equal(got, stored) {
					t.Errorf("%d bytes: %v", len(got), err)
				}
				if err := ca.Close(); err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil {
				ca.Close()
			}
			if !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), c.say) || strings.Contains(err.Error(), "\x1b") || len(err.Error()) > 300 {
				t.Errorf("it is not refused as it should be: %v", err)
			}
			was, err1 := os.ReadDir(before)
			is, err2 := os.ReadDir(dir)
			if err1 != nil || err2 != nil || len(was) != len(is) {
				t.Errorf("there are %d files, and were %d: %v, %v", len(is), len(was), err1, err2)
			}
		})
	}
}
