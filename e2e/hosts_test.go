// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tarn/e2e/cri"
)

// What operators write, at the places where containerd looks for it.
const (
	certsDir         = "/etc/containerd/certs.d"
	containerdFile   = "/etc/containerd/config.toml"
	images           = `[plugins."io.containerd.cri.v1.images"]` + "\n"
	registry3        = `[plugins."io.containerd.cri.v1.images".registry]` + "\n"
	registry2        = `[plugins."io.containerd.grpc.v1.cri".registry]` + "\n"
	oneFolder        = `config_path = "/etc/containerd/certs.d"` + "\n"
	twoFolders       = `config_path = "/etc/containerd/certs.d:/etc/docker/certs.d"` + "\n"
	asInstalled      = "[host.\"http://" + tarnAddr + "\"]\n  capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = \"3s\"\n"
	anyRegistrysFile = certsDir + "/_default/hosts.toml"
)

// hostsCase is a node as an operator left it.
type hostsCase struct {
	name    string
	config  string // containerd's file; "" for none
	files   map[string]string
	used    bool // what a pull does
	install bool // before all, by tarn itself
}

// cases1 are for containerd 1.6.
var cases1 = []hostsCase{
	{name: "stock", install: true},
	{name: "one folder", config: "version = 2\n" + registry2 + oneFolder, install: true, used: true},
	{name: "two folders", config: "version = 2\n" + registry2 + twoFolders, install: true, used: true},
	{name: "version 1", config: "[plugins.cri.registry]\n" + oneFolder, install: true, used: true},
	{name: "version 3", config: "version = 3\n" + registry3 + oneFolder, install: true},
	{name: "mirrors", config: "version = 2\n" + `[plugins."io.containerd.grpc.v1.cri".registry.mirrors."a.test"]` + "\nendpoint = [\"http://a.test\"]\n", install: true},
	{name: "mirrors beside a folder", config: "version = 2\n" + registry2 + oneFolder + `[plugins."io.containerd.grpc.v1.cri".registry.mirrors."a.test"]` + "\nendpoint = [\"http://a.test\"]\n", install: true},
	{name: "disabled", config: "disabled_plugins = [\"cri\"]\n", install: true},
	{name: "an import", config: "version = 2\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n", files: map[string]string{"/etc/containerd/conf.d/a.toml": "version = 2\n" + registry2 + oneFolder}, install: true, used: true},
	{name: "an import takes its place", config: "version = 2\nimports = [\"a.toml\"]\n" + registry2 + oneFolder, files: map[string]string{"/etc/containerd/a.toml": "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nmax_concurrent_downloads = 4\n"}, install: true},
	{name: "referrers", config: "version = 2\n" + registry2 + oneFolder, files: map[string]string{anyRegistrysFile: strings.Replace(asInstalled, "\"resolve\"", "\"resolve\", \"referrers\"", 1)}},
}

// cases2 are for containerd 2.4.
var cases2 = []hostsCase{
	{name: "stock", install: true},
	{name: "nothing installed", config: "version = 3\n" + registry3 + oneFolder},
	{name: "one folder", config: "version = 3\n" + registry3 + oneFolder, install: true, used: true},
	{name: "version 4", config: "version = 4\n" + registry3 + oneFolder, install: true, used: true},
	{name: "version 2", config: "version = 2\n" + registry2 + oneFolder, install: true, used: true},
	{name: "version 3 with the old name", config: "version = 3\n" + registry2 + oneFolder, install: true, used: true},
	{name: "two folders", config: "version = 3\n" + registry3 + twoFolders, install: true},
	{name: "two folders, pulled locally", config: "version = 3\n" + images + "use_local_image_pull = true\n" + registry3 + twoFolders, install: true, used: true},
	{name: "two folders as on EKS", config: "version = 3\n" + images + "discard_unpacked_layers = true\n" + registry3 + twoFolders, install: true, used: true},
	{name: "two folders, ten downloads", config: "version = 3\n" + images + "max_concurrent_downloads = 10\n" + registry3 + twoFolders, install: true, used: true},
	{name: "two folders, annotations", config: "version = 3\n" + images + "disable_snapshot_annotations = false\n" + registry3 + twoFolders, install: true, used: true},
	{name: "two folders, sync", config: "version = 3\n" + images + "image_pull_with_sync_fs = true\n" + registry3 + twoFolders, install: true, used: true},
	{name: "two folders, auths", config: "version = 3\n" + registry3 + twoFolders + "[plugins.\"io.containerd.cri.v1.images\".registry.configs.\"a.test\".auth]\nusername = \"u\"\npassword = \"p\"\n", install: true, used: true},
	{name: "mirrors beside a folder", config: "version = 3\n" + registry3 + oneFolder + "[plugins.\"io.containerd.cri.v1.images\".registry.mirrors.\"a.test\"]\nendpoint = [\"http://a.test\"]\n", install: true},
	{name: "mirrors", config: "version = 3\n[plugins.\"io.containerd.cri.v1.images\".registry.mirrors.\"a.test\"]\nendpoint = [\"http://a.test\"]\n", install: true},
	{name: "an import", config: "version = 3\nimports = [\"conf.d/*.toml\"]\n" + images + "max_concurrent_downloads = 3\n", files: map[string]string{"/etc/containerd/conf.d/a.toml": "version = 3\n" + registry3 + oneFolder}, install: true, used: true},
	{name: "an empty _default", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{certsDir + "/_default/": ""}},
	{name: "a dangling _default", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{certsDir + "/_default": "-> /gone"}},
	{name: "_default is a file", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{certsDir + "/_default": "x"}},
	{name: "half a hosts.toml", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{anyRegistrysFile: asInstalled[:20]}},
	{name: "referrers", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{anyRegistrysFile: strings.Replace(asInstalled, "\"resolve\"", "\"resolve\", \"referrers\"", 1)}, used: true},
	{name: "an unknown capability", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{anyRegistrysFile: strings.Replace(asInstalled, "\"resolve\"", "\"fly\"", 1)}},
	{name: "an unknown key", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{anyRegistrysFile: asInstalled + "  wings = 2\n"}, used: true},
	{name: "no capabilities", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{anyRegistrysFile: "[host.\"http://" + tarnAddr + "\"]\n"}, used: true},
	{name: "resolve alone", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{anyRegistrysFile: strings.Replace(asInstalled, "\"pull\", ", "", 1)}},
	{name: "server in _default", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{anyRegistrysFile: "server = \"http://a.test\"\n" + asInstalled}, used: true},
	{name: "TLS settings on http", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{anyRegistrysFile: asInstalled + "  skip_verify = true\n"}, used: true},
	{name: "a CA that is not there", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{anyRegistrysFile: asInstalled + "  ca = \"gone.crt\"\n"}},
	{name: "a folder of its own", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{certsDir + "/probe.tarn.invalid/": ""}, install: true},
	{name: "a link into /run", config: "version = 3\n" + registry3 + oneFolder, files: map[string]string{"/run/tarn-hosts/hosts.toml": asInstalled, certsDir + "/_default": "-> /run/tarn-hosts"}, used: true},
}

// TestCheckSaysWhatAPullDoes prepares nodes as operators leave them, and has a real
// containerd pull what only tarn has. What tarn hosts check computes from the files
// must be what the pull did, and so must be what it says after a pull of its own.
func TestCheckSaysWhatAPullDoes(t *testing.T) {
	startTarn(t, folder(t, work(), "tarn"), "")
	for _, of := range []struct {
		binary string
		cases  []hostsCase
	}{{"containerd-of-debian", cases1}, {"containerd", cases2}} {
		for _, c := range of.cases {
			t.Run(of.binary+", "+c.name, func(t *testing.T) {
				clearNode(t)
				layNode(t, c.files)
				if c.config != "" {
					layNode(t, map[string]string{containerdFile: c.config})
				}
				if c.install {
					mustTarn(t, "hosts", "install")
				}
				startBare(t, of.binary)
				client, err := cri.Dial(containerdSocket)
				if err != nil {
					t.Fatal(err)
				}
				defer client.Close()
				computed := hostsCheck(t)
				_, err = client.PullImage(t.Context(), "probe.tarn.invalid/test:1", nil)
				if pulled := err == nil; pulled != c.used {
					t.Errorf("a pull goes through tarn: %v (%v), and the case says %v", pulled, err, c.used)
				}
				want := map[bool]string{true: "used", false: "not used"}[c.used]
				if computed.Verdict != want {
					t.Errorf("computed: %+v, want %s", computed, want)
				}
				if live := hostsCheck(t, "--live"); live.Verdict != want && !(live.Verdict == "cannot tell" && strings.Contains(live.Reason, "Unimplemented")) {
					t.Errorf("after a pull: %+v, want %s", live, want)
				}
				if err == nil { // an image goes with all its names, the test's, too
					if left, err := client.ListImages(t.Context()); err != nil || len(left) != 0 {
						t.Errorf("check leaves images: %v, %v", left, err)
					}
				}
			})
		}
	}
	clearNode(t)
}

// TestAChangedConfigurationWantsARestart: containerd reads its file at its start only,
// and so what is in the file may not hold.
func TestAChangedConfigurationWantsARestart(t *testing.T) {
	startTarn(t, folder(t, work(), "tarn"), "")
	clearNode(t)
	mustTarn(t, "hosts", "install")
	first := startBare(t, "containerd")
	layNode(t, map[string]string{containerdFile: "version = 3\n" + registry3 + oneFolder})
	if r := hostsCheck(t); r.Verdict != "cannot tell" && r.Verdict != "not used" || !strings.Contains(r.Reason+r.Fix, "restart containerd") {
		t.Errorf("after the change: %+v", r)
	}
	if r := hostsCheck(t, "--live"); r.Verdict != "not used" {
		t.Errorf("after the change, live: %+v", r)
	}
	first.stop(t)
	startBare(t, "containerd")
	if r := hostsCheck(t, "--live"); r.Verdict != "used" {
		t.Errorf("after the restart: %+v", r)
	}
	clearNode(t)
}

type hostsReport struct {
	Verdict, Reason, Fix string
	Notes                []string
}

func hostsCheck(t *testing.T, args ...string) (r hostsReport) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(work(), "tarn"), append([]string{"hosts", "check", "-o", "json", "--url", "http://" + tarnAddr}, args...)...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("tarn hosts check says %s: %v, %v", out, err, exit)
	}
	if code := cmd.ProcessState.ExitCode(); code != map[string]int{"used": 0, "not used": 1, "cannot tell": 2}[r.Verdict] {
		t.Errorf("%s, with exit status %d", r.Verdict, code)
	}
	return r
}

// mustTarn runs the built tarn, which tells runtimes of the tarn of these tests.
func mustTarn(t *testing.T, args ...string) string {
	t.Helper()
	if args[0] == "hosts" && args[1] == "install" && !slices.Contains(args, "--url") {
		args = append(args, "--url", "http://"+tarnAddr)
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join(work(), "tarn"), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("tarn %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// clearNode makes the node one that nobody has set up.
func clearNode(t *testing.T) {
	t.Helper()
	for _, path := range []string{"/etc/containerd", "/etc/docker", "/run/tarn-hosts"} {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
}

// layNode writes files, directories (a name that ends in a slash) and links ("-> ...").
func layNode(t *testing.T, files map[string]string) {
	t.Helper()
	for path, content := range files {
		dir := filepath.Dir(path)
		if strings.HasSuffix(path, "/") {
			dir = path
		}
		err := os.MkdirAll(dir, 0o755)
		if target, ok := strings.CutPrefix(content, "-> "); err == nil && ok {
			err = os.Symlink(target, path)
		} else if err == nil && dir != path {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// startBare starts a containerd with the node's own configuration, and returns when its
// socket answers, also where its plugin for Kubernetes has failed.
func startBare(t *testing.T, binary string) *process {
	t.Helper()
	root := folder(t, "/run/tarn-e2e", "root")
	p := start(t, binary, binary, "--root", root, "--state", folder(t, "/run/tarn-e2e", "state"))
	t.Cleanup(func() { // before the process ends: as a cleanup registered later
		p.stop(t)
		if err := os.RemoveAll(filepath.Dir(root)); err != nil {
			t.Errorf("remove containerd's folder: %v", err)
		}
	})
	waitFor(t, "containerd answers", func() error {
		if p.alive() != nil { // it refuses its configuration
			return nil
		}
		out, err := exec.CommandContext(t.Context(), "ctr", "--address", containerdSocket, "version").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	return p
}

// TestContainerdWithMountsOfItsOwn is judged by the files that it sees: what was
// installed where it does not look is no use.
func TestContainerdWithMountsOfItsOwn(t *testing.T) {
	startTarn(t, folder(t, work(), "tarn"), "")
	clearNode(t)
	theirs := folder(t, work(), "theirs")
	layNode(t, map[string]string{containerdFile: "version = 3\n" + registry3 + oneFolder, certsDir + "/": ""})
	mustTarn(t, "hosts", "install")
	root := folder(t, "/run/tarn-e2e", "root")
	p := start(t, "containerd", "unshare", "--mount", "sh", "-ec",
		`mount --bind "$1" "$2"; exec containerd --root "$3" --state "$4"`, "sh", theirs, certsDir, root, folder(t, "/run/tarn-e2e", "state"))
	t.Cleanup(func() {
		p.stop(t)
		os.RemoveAll(filepath.Dir(root))
	})
	waitFor(t, "containerd answers", func() error {
		return exec.CommandContext(t.Context(), "ctr", "--address", containerdSocket, "version").Run()
	})
	for _, args := range [][]string{nil, {"--live"}} {
		r := hostsCheck(t, args...)
		if r.Verdict != "not used" || !strings.Contains(strings.Join(r.Notes, "\n"), "it has mounts of its own") {
			t.Errorf("%q, before: %+v", args, r)
		}
	}
	mustTarn(t, "hosts", "install", "--certs-dir", theirs)
	for _, args := range [][]string{nil, {"--live"}} {
		if r := hostsCheck(t, args...); r.Verdict != "used" {
			t.Errorf("%q, after: %+v", args, r)
		}
	}
	clearNode(t)
}
