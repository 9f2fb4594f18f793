// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func ownerOf(t *testing.T, path string) (uid, gid int, mode os.FileMode) {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	return int(st.Uid), int(st.Gid), info.Mode().Perm()
}

func TestPrepareGivesTheDirectoryAway(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
	top := t.TempDir()
	dir, outside := filepath.Join(top, "data"), filepath.Join(top, "outside")
	blob := filepath.Join(dir, "blobs/sha256/abc")
	link, twin := filepath.Join(dir, "link"), filepath.Join(dir, "twin")
	if err := errors.Join(os.MkdirAll(filepath.Dir(blob), 0o755), os.WriteFile(blob, nil, 0o600), os.WriteFile(outside, nil, 0o600),
		os.Symlink(outside, link), os.Link(outside, twin)); err != nil {
		t.Fatal(err)
	}
	for round, want := range []int{4, 0} { // the directory, two in it, and a file
		changed, err := prepare(dir, 15050, 15051)
		if err != nil || changed != want {
			t.Errorf("round %d: %d changed hands, not %d: %v", round, changed, want, err)
		}
	}
	for path, want := range map[string]int{dir: 15050, blob: 15050, filepath.Dir(blob): 15050, outside: 0, link: 0, twin: 0} {
		if uid, _, _ := ownerOf(t, path); uid != want {
			t.Errorf("%s is user %d's, not %d's", path, uid, want)
		}
	}
	if _, gid, mode := ownerOf(t, dir); gid != 15051 || mode != 0o700 {
		t.Errorf("group %d, mode %o", gid, mode)
	}
	for _, wrong := range []string{"", "tarn", "15050:", "-1:0", ":"} {
		if _, _, err := parseOwner(wrong); err == nil {
			t.Errorf("%q is taken for an owner", wrong)
		}
	}
}

func TestCleanupRemovesWhatIsTarnsWhenNoneRuns(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := run(t, dir)
	mine := filepath.Join(dir, "mine")
	if err := os.WriteFile(mine, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := command("cleanup", "--dir", dir).CombinedOutput(); err == nil || !strings.Contains(string(out), "is used by another") && !strings.Contains(string(out), "in use") {
		t.Errorf("beside a tarn that runs: %v, %s", err, out)
	}
	p.terminate()
	cmd := command("cleanup", "--dir", dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() }).Stop()
	buf := make([]byte, 4096)
	n, _ := out.Read(buf)
	if !strings.Contains(string(buf[:n]), "is empty; waiting") {
		t.Errorf("it says %q", buf[:n])
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "mine" {
		t.Errorf("%v, %v", entries, err)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if out, err := command("cleanup", "--dir", "/usr").CombinedOutput(); err == nil || !strings.Contains(string(out), "others' files") {
		t.Errorf("of another directory: %v, %s", err, out)
	}
}
