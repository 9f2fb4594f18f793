// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tarn/internal/registrytest"
)

// readmeCommands are the lines of the README's sh blocks; a line of output
// that it shows follows its command as "# ...".
func readmeCommands(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	in := false
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		switch {
		case line == "```sh":
			in = true
		case strings.HasPrefix(line, "```"):
			in = false
		case in:
			lines = append(lines, line)
		}
	}
	return lines
}

// TestReadme runs every command of the README but the tests themselves, with
// docker.io at a registry of ours and free ports for the usual ones.
func TestReadme(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("the README's commands want curl")
	}
	t.Parallel()
	hub := registrytest.NewDistribution(t)
	listen, admin := freePort(t), freePort(t)
	local := strings.NewReplacer("127.0.0.1:5050", listen, "127.0.0.1:5051", admin)
	hub.PushImage(t, "library/alpine", "latest", []byte("the first alpine"))
	config := anyDisk(t, "admin_socket: "+filepath.Join(t.TempDir(), socketName)+"\n")

	served, confirmed := 0, 0
	var stop func()
	lines := readmeCommands(t)
	for i, line := range lines {
		switch {
		case line == "go test ./...":
		case strings.HasPrefix(line, "go run ./cmd/tarn serve"):
			if stop != nil {
				stop()
			}
			served++
			line += fmt.Sprintf(" --config %s --dir %s --listen %s --admin-listen %s --upstream docker.io=%s", config, t.TempDir(), listen, admin, hub.URL)
			stop = background(t, line, "http://"+listen+"/v2/")
		case strings.HasPrefix(line, "go run ./cmd/tarn "):
			if shell(t, line+" --config "+config) == "" {
				t.Errorf("%s said nothing", line)
			}
		case strings.Contains(line, "somebody has pushed another"):
			hub.PushImage(t, "library/alpine", "latest", []byte("the second alpine"))
		case strings.HasPrefix(line, "#"):
		default:
			out := shell(t, local.Replace(line))
			if i+1 < len(lines) && strings.HasPrefix(lines[i+1], "# Cache-Status") {
				confirmed++
				if want := strings.TrimPrefix(lines[i+1], "# "); out != want {
					t.Errorf("%s\nsays  %s\nand not %s", line, out, want)
				}
			} else if out == "" {
				t.Errorf("%s said nothing", line)
			}
		}
	}
	stop()
	if served != 2 || confirmed != 3 {
		t.Errorf("the README starts tarn %d times and shows %d answers", served, confirmed)
	}
}

func shell(t *testing.T, line string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", line)
	cmd.Dir = filepath.Join("..", "..")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// background starts a command in the module's root, in a process group of its
// own, and waits until the URL answers.
func background(t *testing.T, line, url string) (stop func()) {
	t.Helper()
	cmd := exec.Command("sh", "-c", "exec "+line)
	cmd.Dir = filepath.Join("..", "..")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) // go run and what it ran
		select {
		case <-exited:
		case <-time.After(20 * time.Second):
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			<-exited
		}
	}
	t.Cleanup(stop)
	deadline := time.NewTimer(90 * time.Second) // go run may have to compile
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if resp, err := http.Get(url); err == nil {
			resp.Body.Close()
			return stop
		}
		select {
		case <-exited:
			t.Fatalf("%s has ended:\n%s", line, out.String())
		case <-deadline.C:
			t.Fatalf("%s does not answer:\n%s", line, out.String())
		case <-tick.C:
		}
	}
}
