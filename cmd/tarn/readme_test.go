// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
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
// docker.io at a registry of ours and free ports for the usual ones. What it has
// done to /etc is done in a mount namespace, where the test is root.
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
	bin := t.TempDir() // in place of /usr/local/bin
	tarn := filepath.Join(bin, "tarn")
	node := newReadmeNode(t)

	served, confirmed, proven := 0, 0, 0
	var stop func()
	lines := readmeCommands(t)
	for i, line := range lines {
		serve, isServe := strings.CutPrefix(strings.Replace(strings.TrimSuffix(line, " &"), "go run ./cmd/tarn", "tarn", 1), "tarn serve")
		command, isTarn := strings.CutPrefix(line, "tarn ")
		switch {
		case strings.Contains(line, "somebody has pushed another"):
			hub.PushImage(t, "library/alpine", "latest", []byte("the second alpine"))
		case line == "go test ./...", strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "go build -o /usr/local/bin/tarn "):
			shell(t, strings.Replace(line, "/usr/local/bin/tarn", tarn, 1))
		case isServe:
			if stop != nil {
				stop()
			}
			program := tarn
			if strings.HasPrefix(line, "go run") {
				program = "go run ./cmd/tarn"
			}
			served++
			stop = background(t, fmt.Sprintf("%s serve%s --config %s --dir %s --listen %s --admin-listen %s --upstream docker.io=%s", program, serve, config, t.TempDir(), listen, admin, hub.URL), "http://"+listen+"/v2/")
		case isTarn && strings.HasPrefix(command, "hosts "):
			proven++
			node.hosts(t, tarn+" "+command, "http://"+listen)
		case isTarn:
			if shell(t, tarn+" "+command+" --config "+config) == "" {
				t.Errorf("%s said nothing", line)
			}
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
	if served != 3 || confirmed != 3 || proven != 3 {
		t.Errorf("the README starts tarn %d times, shows %d answers, and has %d commands for hosts", served, confirmed, proven)
	}
}

// readmeNode is a node on which the README's commands change what containerd reads.
type readmeNode struct {
	within []string // goes before a command
	certs  string   // where there is no such namespace
}

// newReadmeNode has an /etc of its own, in memory, where the test is root.
func newReadmeNode(t *testing.T) *readmeNode {
	t.Helper()
	const containerd = "version = 3\n[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n"
	if os.Geteuid() != 0 {
		return &readmeNode{certs: filepath.Join(t.TempDir(), "certs.d")}
	}
	holder := exec.Command("unshare", "--mount", "sh", "-ec", `mount -t tmpfs tmpfs /mnt; mkdir /mnt/upper /mnt/work
		mount -t overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work overlay /etc
		rm -rf /etc/containerd; mkdir /etc/containerd; printf %s "$1" > /etc/containerd/config.toml; echo ready; exec cat`, "sh", containerd)
	holder.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := holder.StdinPipe() // its end ends it
	if err != nil {
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	holder.Stderr = os.Stderr
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		holder.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("an /etc of its own: %q, %v", line, err)
	}
	return &readmeNode{within: []string{"nsenter", "--mount", fmt.Sprintf("--target=%d", holder.Process.Pid)}}
}

// hosts runs a command for a containerd 2.4 that has this configuration.
func (n *readmeNode) hosts(t *testing.T, line, url string) {
	t.Helper()
	switch words := strings.Fields(line); words[2] {
	case "check":
		line += " --config /etc/containerd/config.toml --containerd-version 2.4 --url " + url
		if n.within == nil {
			return // it reads what only root may write
		}
	case "install":
		line += " --url " + url
	}
	if n.certs != "" {
		line += " --certs-dir " + n.certs
	}
	out := shell(t, strings.Join(append(n.within, line), " "))
	if strings.Contains(line, " check ") && !strings.HasPrefix(out, "used: ") {
		t.Errorf("%s: %s", line, out)
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
