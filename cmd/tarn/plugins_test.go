// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tarn/internal/registrytest"
)

// pluginSettings are a plugin of the kubelet's with this script, and the lines of an
// upstream that has it.
func pluginSettings(t *testing.T, r *registrytest.Registry, script string) (dir, settings string) {
	t.Helper()
	dir = t.TempDir()
	providers := `{kind: CredentialProviderConfig, apiVersion: kubelet.config.k8s.io/v1, providers: [
{name: lab, matchImages: [lab.test], defaultCacheDuration: 10m, apiVersion: credentialprovider.kubelet.k8s.io/v1},
{name: pods, matchImages: [lab.test], defaultCacheDuration: 10m, apiVersion: credentialprovider.kubelet.k8s.io/v1,
 tokenAttributes: {serviceAccountTokenAudience: a, cacheType: Token, requireServiceAccount: true}}]}`
	for name, content := range map[string]string{"lab": "#!/bin/sh\necho >> \"${0%/*}/asked\"\n" + script + "\n", "plugins.yaml": providers} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dir, fmt.Sprintf("  realm: %s/token\n  credentials: {kubelet_plugins: {config: %q, bin_dir: %q}}\n  share: [platform/*]\n",
		r.Access.Service.URL, filepath.Join(dir, "plugins.yaml"), dir)
}

func withNodesRegistry(t *testing.T) *registrytest.Registry {
	t.Helper()
	r := registrytest.New(t)
	r.Access = registrytest.NewAccess(t, "Basic")
	r.Access.Allow("platform/app", "node")
	return r
}

func TestAReloadForgetsWhatPluginsSaid(t *testing.T) {
	t.Parallel()
	r := withNodesRegistry(t)
	d := r.Blob("platform/app", []byte("shared"))
	dir, settings := pluginSettings(t, r, fmt.Sprintf(
		`echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Global","auth":{"lab.test":{"username":"node","password":%q}}}'`,
		registrytest.Password("node")))
	p := runWith(t, t.TempDir(), upstreamsOf(r.URL, settings))
	path := "/v2/platform/app/blobs/" + d.String() + "?ns=lab.test"
	for runs := 1; runs <= 2; runs++ {
		for range 2 {
			p.mustGet(path, []byte("shared"))
		}
		if asked, _ := os.ReadFile(filepath.Join(dir, "asked")); len(asked) != runs {
			t.Errorf("it ran %d times, and not %d", len(asked), runs)
		}
		p.mustReload(upstreamsOf(r.URL, settings), "reloaded\n")
	}
	log := p.output.String()
	for _, want := range []string{`"provider":"pods"`, "stays open to every pod of the node"} {
		if strings.Count(log, want) != 3 { // the start, and two reloads
			t.Errorf("%d times %s in the log: %s", strings.Count(log, want), want, log)
		}
	}
	if strings.Contains(log, registrytest.Password("node")) {
		t.Error("the password is in the log")
	}
}

func TestABrokenPluginIsInTheStatusAndEndsWithTarn(t *testing.T) {
	t.Parallel()
	r := withNodesRegistry(t)
	d := r.Blob("platform/app", []byte("shared"))
	dir, settings := pluginSettings(t, r, `exec 3> "${0%/*}/alive"; echo $$ >&3; sleep 1000 & wait`)
	alive := filepath.Join(dir, "alive")
	if err := syscall.Mkfifo(alive, 0o600); err != nil {
		t.Fatal(err)
	}
	p := runWith(t, t.TempDir(), upstreamsOf(r.URL, settings))
	answer := make(chan int, 1)
	go func() { answer <- p.status("/v2/platform/app/blobs/" + d.String() + "?ns=lab.test") }()
	f, err := os.Open(alive) // once the plugin runs
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got := <-answer; got != 502 {
		t.Errorf("answered %d", got)
	}
	if s := p.statusDocument(); !strings.Contains(s, "have not answered in 5s") {
		t.Errorf("the status says %s", s)
	}
	if out, _, _ := p.tell("status"); !strings.Contains(out, "have not answered in 5s") || strings.Contains(out, "lab.test: no trouble seen") {
		t.Errorf("tarn status says %s", out)
	}
	p.terminate()
	if _, err := io.ReadAll(f); err != nil { // ends when neither the plugin nor its child holds the pipe
		t.Error(err)
	}
}
