// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tarn/internal/registrytest"
)

// order sends one to the admin API.
func order(t *testing.T, c *http.Client, method, url, body string) (status int, said string) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

var changes = []struct{ method, path string }{
	{"POST", "/api/v1/pins"}, {"DELETE", "/api/v1/pins"}, {"POST", "/api/v1/evict"}, {"POST", "/api/v1/verify"},
}

// withoutUmask has files open to everybody unless who makes them says otherwise.
func withoutUmask(cmd *exec.Cmd) {
	cmd.Args = append([]string{"sh", "-c", `umask 0; exec "$0" "$@"`}, cmd.Args...)
	cmd.Path = "/bin/sh"
}

func TestWhatChangesSomethingIsAskedForOverTheSocket(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := runPrepared(t, dir, "", withoutUmask)
	for round := range 2 {
		info, err := os.Lstat(filepath.Join(dir, socketName))
		if err != nil || info.Mode() != fs.ModeSocket|0o600 {
			t.Fatalf("the socket is %v, %v", info.Mode(), err)
		}
		for _, c := range changes {
			status, said := order(t, http.DefaultClient, c.method, p.admin+c.path, `{"image": "app:v1"}`)
			if status != 403 || !strings.Contains(said, p.socket()) || !strings.Contains(said, "admin_changes: tcp") {
				t.Errorf("%s %s over TCP: %d %s", c.method, c.path, status, said)
			}
			// It goes as far as what there is.
			if status, said := order(t, p.overSocket(), c.method, "http://tarn"+c.path, `{"rate": -1}`); status != 400 {
				t.Errorf("%s %s over the socket: %d %s", c.method, c.path, status, said)
			}
		}
		for _, path := range []string{"/healthz", "/readyz", "/metrics", "/api/v1/status", "/api/v1/images", "/api/v1/pins"} {
			for at, c := range map[string]*http.Client{p.admin: http.DefaultClient, "http://tarn": p.overSocket()} {
				if status, said := order(t, c, "GET", at+path, ""); status != 200 {
					t.Errorf("%s at %s: %d %s", path, at, status, said)
				}
			}
		}
		if round == 0 { // what a killed one leaves is replaced
			p.kill()
			p = runPrepared(t, dir, "", withoutUmask)
		}
	}
	p.terminate()
	if _, err := os.Lstat(filepath.Join(dir, socketName)); !os.IsNotExist(err) {
		t.Errorf("after its end the socket is there: %v", err)
	}
}

func TestTheOperatorMayAllowChangesOverTCP(t *testing.T) {
	t.Parallel()
	const warning = "lets other hosts pin"
	for name, c := range map[string]struct {
		settings, listen string
		status           int
		warns            bool
	}{
		"on loopback":                      {"admin_changes: tcp\n", "", 400, false},
		"on every address, with a warning": {"admin_changes: tcp\n", "0.0.0.0", 400, true},
		"and does not by default":          {"", "0.0.0.0", 403, false},
		"nor without any socket":           {"admin_socket: off\n", "", 403, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var args []string
			port := freePort(t)
			if c.listen != "" {
				port = c.listen + port[strings.LastIndexByte(port, ':'):]
			}
			args = append(args, "--admin-listen", port) // the last one counts
			p := runWith(t, t.TempDir(), c.settings, args...)
			url := "http://" + strings.Replace(port, "0.0.0.0", "127.0.0.1", 1)
			for _, change := range changes {
				if status, said := order(t, http.DefaultClient, change.method, url+change.path, `{"rate": -1}`); status != c.status {
					t.Errorf("%s %s: %d %s", change.method, change.path, status, said)
				}
			}
			if got := strings.Contains(p.output.String(), warning); got != c.warns {
				t.Errorf("it warns: %v\n%s", got, p.output.String())
			}
		})
	}
}

func TestAnAdminListenerThatIsASocketTakesChanges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := runWith(t, dir, "admin_socket: \"\"\n", "--admin-listen", "unix:"+filepath.Join(dir, socketName))
	if status, said := order(t, p.overSocket(), "POST", "http://tarn/api/v1/evict", `{"image": "app:v1"}`); status != 404 {
		t.Errorf("%d %s", status, said)
	}
	if strings.Contains(p.output.String(), `"admin_socket":"unix:`) {
		t.Errorf("there is another one:\n%s", p.output.String())
	}
}

func TestASocketIsNeverTakenFromWhoListens(t *testing.T) {
	t.Parallel()
	places := []string{t.TempDir(), filepath.Join(t.TempDir(), "made")}
	at := func(l net.Listener) string { return filepath.Dir(l.Addr().String()) }
	var listening []net.Listener
	for i := range places {
		l, err := listenFirst(places)
		if err != nil || at(l) != places[i] {
			t.Fatalf("the place of number %d: %v", i, err)
		}
		defer l.Close()
		listening = append(listening, l)
	}
	if _, err := listenFirst(places); err == nil || strings.Count(err.Error(), errTaken.Error()) != 2 {
		t.Errorf("a third one: %v", err)
	}
	for _, l := range listening {
		if c, err := net.Dial("unix", l.Addr().String()); err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
	}
	// A process that was killed leaves its socket, which nobody listens on.
	listening[0].(*net.UnixListener).SetUnlinkOnClose(false)
	listening[0].Close()
	l, err := listenFirst(places)
	if err != nil || at(l) != places[0] {
		t.Fatalf("in place of a dead one: %v", err)
	}
	l.Close()
}

// TestOfManyThatStartAtOnceEachHasASocketOfItsOwn: between finding a dead socket
// and replacing it, another one must not have replaced it.
func TestOfManyThatStartAtOnceEachHasASocketOfItsOwn(t *testing.T) {
	t.Parallel()
	for range 20 {
		root := t.TempDir()
		var places []string
		for _, name := range strings.Split("abcdefgh", "") {
			dir := filepath.Join(root, name)
			places = append(places, dir)
			l, err := listenFirst([]string{dir})
			if err != nil {
				t.Fatal(err)
			}
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			l.Close()
		}
		all := make([]net.Listener, len(places))
		var starting sync.WaitGroup
		for i := range all {
			starting.Go(func() {
				var err error
				if all[i], err = listenFirst(places); err != nil {
					t.Error(err)
				}
			})
		}
		starting.Wait()
		for _, l := range all {
			if l == nil {
				continue
			}
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			l.(*net.UnixListener).SetDeadline(time.Now().Add(10 * time.Second))
			c, err := net.Dial("unix", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			if c, err = l.Accept(); err != nil {
				t.Fatalf("who asks at %s does not reach who listens there: %v", l.Addr(), err)
			}
			c.Close()
			l.Close()
		}
	}
}

func TestASocketGoesWhereItCan(t *testing.T) {
	t.Parallel()
	long := filepath.Join(t.TempDir(), strings.Repeat("l", maxSocketPath))
	file := t.TempDir()
	if err := os.WriteFile(filepath.Join(file, socketName), []byte("somebody's"), 0o644); err != nil {
		t.Fatal(err)
	}
	last := t.TempDir()
	l, err := listenFirst([]string{"/proc/tarn", filepath.Join(t.TempDir(), "no", "parent"), long, file, last})
	if err != nil || l.Addr().String() != filepath.Join(last, socketName) {
		t.Fatalf("%v", err)
	}
	l.Close()
	if text, err := os.ReadFile(filepath.Join(file, socketName)); string(text) != "somebody's" {
		t.Errorf("a file in its place has %q now: %v", text, err)
	}
	_, err = listenFirst([]string{long, file})
	for _, want := range []string{"at most 107 bytes", "is no socket"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
}

func TestCommandsReadOverTCPWhereThereIsNoSocket(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	dir := t.TempDir()
	p := runWith(t, dir, "admin_socket: off\n", "--upstream", "lab.test="+r.URL)
	tell := func(args ...string) string {
		t.Helper()
		cmd := command(append(args, "--admin", strings.TrimPrefix(p.admin, "http://"))...)
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	if said := tell("images"); !strings.Contains(said, "IMAGE") {
		t.Errorf("images: %s", said)
	}
	if said := tell("evict", "app"); !strings.Contains(said, "only for reading") || !strings.Contains(said, "set admin_socket") {
		t.Errorf("evict: %s", said)
	}
}

// TestCommandsAskWhereTheSocketIs, when the daemon was told more than they are.
func TestCommandsAskWhereTheSocketIs(t *testing.T) {
	t.Parallel()
	p := run(t, t.TempDir())
	config := func(more string) string {
		return anyDisk(t, "admin_socket: "+filepath.Join(t.TempDir(), "none")+"\n"+more)
	}
	tell := func(config string) string {
		t.Helper()
		out, err := command("unpin", "app:v1", "--config", config).CombinedOutput()
		if err == nil {
			t.Errorf("it is unpinned: %s", out)
		}
		return string(out)
	}
	if said := tell(config("admin_listen: " + strings.TrimPrefix(p.admin, "http://") + "\n")); !strings.Contains(said, "the image is not pinned") {
		t.Errorf("at the daemon's: %s", said)
	}
	// But not for the tarn of another directory.
	if said := tell(config("admin_listen: " + strings.TrimPrefix(p.admin, "http://") + "\ndir: /somewhere\n")); !strings.Contains(said, "this is the tarn whose data directory is "+p.dir) {
		t.Errorf("at another one's: %s", said)
	}
}
