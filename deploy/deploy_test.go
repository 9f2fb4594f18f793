// SPDX-License-Identifier: Apache-2.0

// Package deploy has no code: its tests read the files beside it with the
// parsers of the systems that they are for.
package deploy

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
)

func read(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestContainerdAsksTarnFirstAndThenTheRegistry(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "_default"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "_default", "hosts.toml"), read(t, "hosts.toml"), 0o644); err != nil {
		t.Fatal(err)
	}
	hosts := config.ConfigureHosts(context.Background(), config.HostOptions{HostDir: config.HostDirFromRoot(root)})
	for registry, own := range map[string]string{
		"docker.io":          "registry-1.docker.io",
		"ghcr.io":            "ghcr.io",
		"registry.corp:5000": "registry.corp:5000",
	} {
		got, err := hosts(registry)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 2 {
			t.Errorf("%s: %d hosts", registry, len(got))
			continue
		}
		tarn, fallback := got[0], got[1]
		if tarn.Scheme != "http" || tarn.Host != "127.0.0.1:5050" || tarn.Path != "/v2" {
			t.Errorf("%s: asked first is %s://%s%s", registry, tarn.Scheme, tarn.Host, tarn.Path)
		}
		if want := docker.HostCapabilityPull | docker.HostCapabilityResolve; tarn.Capabilities != want {
			t.Errorf("%s: tarn is asked for %b", registry, tarn.Capabilities)
		}
		if fallback.Scheme != "https" || fallback.Host != own {
			t.Errorf("%s: asked next is %s://%s", registry, fallback.Scheme, fallback.Host)
		}
	}
}

// TestSystemdTakesTheUnit: with systemd's own parser, and with a program that is here.
func TestSystemdTakesTheUnit(t *testing.T) {
	t.Parallel()
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd is not installed")
	}
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	unit := filepath.Join(t.TempDir(), "tarn.service")
	text := bytes.ReplaceAll(read(t, "systemd/tarn.service"), []byte("/usr/bin/tarn"), []byte(own))
	if err := os.WriteFile(unit, text, 0o644); err != nil {
		t.Fatal(err)
	}
	// It says what it does not understand, and goes on.
	out, err := exec.Command(analyze, "verify", "--man=no", unit).CombinedOutput()
	if err != nil || strings.Contains(string(out), "tarn.service") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	for _, want := range []string{"Type=notify", "WatchdogSec=", "StateDirectory=tarn", "RuntimeDirectory=tarn", "User=tarn", "ExecReload=/usr/bin/tarn reload"} {
		if !strings.Contains(string(read(t, "systemd/tarn.service")), "\n"+want) {
			t.Errorf("no %s", want)
		}
	}
}
