// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// FuzzHostFile reads what anybody may have written as hosts.toml: it must not panic,
// and what is tarn's must be read back.
func FuzzHostFile(f *testing.F) {
	f.Add(string(render(byInstall, 2, Mirror{URL: DefaultURL}, nil)))
	f.Add("server = \"https://a\"\nca = [\"x\", 1]\n[host.\"http://127.0.0.1:5050\"]\nclient = [[\"a\"], \"b\"]\n")
	f.Add("[host]\n[host.\"a\".header]\nx = [\"y\"]\n[host.'b']\ncapabilities = [\"PULL\"]")
	f.Fuzz(func(t *testing.T, text string) {
		own([]byte(text))
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, fileName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, v := range containerds {
			w, err := inDirectory(tree{}, dir, DefaultURL, v)
			if err == nil && w.tarn == "" && w.reason == "" {
				t.Errorf("it is not said why tarn is not asked")
			}
		}
	})
}

// FuzzConfiguration reads what anybody may have written as containerd's file.
func FuzzConfiguration(f *testing.F) {
	f.Add("version = 3\n[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"/a:/b\"\n")
	f.Add("imports = [\"*.toml\", \"config.toml\", \"[\"]\n[plugins.cri.registry.mirrors.x]\nendpoint = []\n")
	f.Add("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nregistry = 3\ncontainerd = \"x\"\n")
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(t.TempDir(), "config.toml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, v := range containerds {
			if c, err := readConfiguration(tree{}, path, v); err == nil {
				c.roots(v, DefaultCertsDir)
			}
		}
	})
}

// TestNobodyWaitsForAPipe: a pipe in place of a file has neither what looks nor what
// installs wait for whoever writes into it.
func TestNobodyWaitsForAPipe(t *testing.T) {
	certs := t.TempDir()
	for _, name := range []string{"_default", "quay.io"} {
		if err := os.Mkdir(filepath.Join(certs, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	pipe := filepath.Join(certs, "quay.io", fileName)
	if err := syscall.Mkfifo(pipe, 0o644); err != nil {
		t.Fatal(err)
	}
	said := make(chan string, 2)
	go func() {
		_, err := inDirectory(tree{}, filepath.Dir(pipe), DefaultURL, containerds[0])
		said <- fmt.Sprint(err)
		plan, err := PlanInstall(Options{CertsDir: certs, Mirror: Mirror{URL: DefaultURL}})
		said <- fmt.Sprint(plan.Notes, err)
	}()
	for range 2 {
		select {
		case s := <-said:
			if !strings.Contains(s, pipe+" is a pipe") {
				t.Errorf("it says %q", s)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("it waits")
		}
	}
}
