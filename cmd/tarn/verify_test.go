// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tarn/internal/registrytest"

	"golang.org/x/sys/unix"
)

// runWithImage has a tarn with one image stored, whose layer has so many bytes.
func runWithImage(t *testing.T, size int) (p *process, layer string) {
	t.Helper()
	r := registrytest.New(t)
	image := r.Image("team/app", "v1", noises(1, size)[0])
	dir := t.TempDir()
	p = run(t, dir, "--upstream", "lab.test="+r.URL)
	p.pull("team/app", "v1", append(image.Layers, image.Config)...)
	layer = filepath.Join(dir, "blobs", "sha256", image.Layers[0].Encoded())
	p.until("it is stored", func() bool {
		var s struct{ Index struct{ Objects int } }
		fetchJSON(t, p.admin+"/api/v1/status", &s)
		return s.Index.Objects == 3
	})
	return p, layer
}

// terminal is a pseudo-terminal: what is written to tty is read from the other one.
func terminal(t *testing.T) (screen, tty *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { screen.Close() })
	n := 0
	if err = unix.IoctlSetPointerInt(int(screen.Fd()), unix.TIOCSPTLCK, 0); err == nil {
		n, err = unix.IoctlGetInt(int(screen.Fd()), unix.TIOCGPTN)
	}
	if err == nil {
		tty, err = os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80})
	}
	if err != nil {
		t.Fatal(err)
	}
	return screen, tty
}

// TestVerifyShowsHowFarItHasCome to who looks at a terminal.
func TestVerifyShowsHowFarItHasCome(t *testing.T) {
	t.Parallel()
	p, _ := runWithImage(t, 4<<20)
	screen, tty := terminal(t)
	cmd := command("verify", "--rate", "8MiB", "--admin", p.socket())
	cmd.Stderr = tty
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	shown, err := io.ReadAll(screen) // ends with EIO when nobody has the terminal
	if err != nil && !errors.Is(err, syscall.EIO) {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if !regexp.MustCompile(`verify +\[=+>-+\] +[1-3][.0-9]*MiB/4MiB`).Match(shown) || !bytes.Contains(shown, []byte(" 4MiB/4MiB")) {
		t.Errorf("%q", shown)
	}
}

// TestAVerifyEndsWithWhoAskedForIt, with an error, and the next one begins.
func TestAVerifyEndsWithWhoAskedForIt(t *testing.T) {
	t.Parallel()
	p, _ := runWithImage(t, 3<<20)
	screen, tty := terminal(t)
	cmd := command("verify", "--rate", "1", "--admin", p.socket())
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, tty
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	if _, err := screen.Read(make([]byte, 1)); err != nil { // it has begun
		t.Fatal(err)
	}
	if _, words, code := p.tell("verify"); code != 1 || !strings.Contains(words, "already") {
		t.Errorf("a second one: %d: %s", code, words)
	}
	cmd.Process.Signal(syscall.SIGINT)
	shown, _ := io.ReadAll(screen)
	if err := cmd.Wait(); err == nil || !bytes.Contains(shown, []byte("not come to its end")) {
		t.Errorf("%v: %s", err, shown)
	}
	p.until("it has ended", func() bool { _, _, code := p.tell("verify", "--rate", "0"); return code == 0 })
}

// TestAVerifyDoesNotHoldUpTheEnd, and says that it is none.
func TestAVerifyDoesNotHoldUpTheEnd(t *testing.T) {
	t.Parallel()
	p, _ := runWithImage(t, 3<<20)
	resp, err := p.overSocket().Post("http://tarn/api/v1/verify", "application/json", strings.NewReader(`{"rate":1}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	p.terminate() // within 20 s, and not after the grace of 25
	if said, _ := io.ReadAll(resp.Body); len(said) == 0 || bytes.Contains(said, []byte(`"done":true`)) {
		t.Errorf("%s", said)
	}
}

// TestWhatIsMissingIsAnError, and so is what cannot be printed.
func TestWhatIsMissingIsAnError(t *testing.T) {
	t.Parallel()
	p, layer := runWithImage(t, 200_000)
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, args := range [][]string{{"images"}, {"images", "-o", "json"}, {"pin"}, {"verify"}} {
		cmd := command(append(args, "--admin", p.socket())...)
		cmd.Stdout = full
		if err := cmd.Run(); err == nil {
			t.Errorf("tarn %v has printed nothing, and says that it has", args)
		}
	}
	if err := os.Remove(layer); err != nil {
		t.Fatal(err)
	}
	out, words, code := p.tell("verify")
	if code != 1 || !strings.Contains(out, "missing:") || !strings.Contains(words, "1 of 3 files were not as they were stored") {
		t.Errorf("%d: %s%s", code, out, words)
	}
}

// TestAnOrderIsOneDocument of the right form.
func TestAnOrderIsOneDocument(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	r.Image("library/app", "latest", noises(1, 1000)[0])
	p := run(t, t.TempDir(), "--upstream", "docker.io="+r.URL)
	for body, want := range map[string]int{
		`{"image":"app"} {"image":"app"}`:                                     400,
		`{"image":"app"}x`:                                                    400,
		`{"image":"app","platforms":["linux/\u001b[31mamd64"]}`:               400,
		`{"image":"app","platforms":["linux/a\nevil.example/fake:v1   all"]}`: 400,
		`{"image":"app","platforms":["LINUX/AMD64"]}`:                         400,
		`{"image":"app","force":true}`:                                        400,
		`{"image":"` + strings.Repeat("a", 1<<20) + `"}`:                      400,
		`{"image":"app"}` + "\n":                                              200,
	} {
		resp, err := p.overSocket().Post("http://tarn/api/v1/pins", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		said, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%.60s: %s %s", body, resp.Status, said)
		}
	}
}

// TestHalfAnOrderIsNotWaitedForLong.
func TestHalfAnOrderIsNotWaitedForLong(t *testing.T) {
	t.Parallel()
	p := run(t, t.TempDir())
	var waiting sync.WaitGroup
	for _, head := range []string{
		"POST /api/v1/pins HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
		"POST /api/v1/pins HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\nx",
		"POST /api/v1/evict HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 1000\r\n\r\nx",
		"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx",
	} {
		waiting.Go(func() {
			conn, err := net.Dial("unix", socketIn(t, p.dir))
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(2 * readHeaderTimeout))
			if _, err := io.WriteString(conn, head); err != nil {
				t.Error(err)
			}
			if said, err := io.ReadAll(conn); err != nil {
				t.Errorf("%s: %v", said, err)
			}
		})
	}
	waiting.Wait()
}
