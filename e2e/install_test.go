// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"crypto/tls"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tarn/e2e/cri"
)

// bareNode is a containerd of the node's own configuration, one folder.
func bareNode(t *testing.T) *criClient {
	t.Helper()
	clearNode(t)
	layNode(t, map[string]string{containerdFile: "version = 3\n" + registry3 + oneFolder})
	p := startBare(t, "containerd")
	c := &containerd{process: p}
	return &criClient{c, c.dialCRI(t)}
}

// TestAPrivateImageThroughWhatWasInstalled: the registry's token service takes its
// time, and hosts.toml names no server that could step in.
func TestAPrivateImageThroughWhatWasInstalled(t *testing.T) {
	service, protect := bearerAuth(t)
	service.delay.Store(int64(500 * time.Millisecond))
	registry := newRegistry(t, protect)
	startTarn(t, folder(t, work(), "tarn"), "")
	i := pushSaying(t, "team/secret", "v1", "a secret")
	c := bareNode(t)
	mustTarn(t, "hosts", "install")
	for _, state := range []string{"cold", "warm"} {
		if err := c.pullAs(t, i.ref(), &cri.Auth{Username: user, Password: "guess"}); err == nil {
			t.Errorf("%s: a wrong password pulls it", state)
		}
		if err := c.pullAs(t, i.ref(), &cri.Auth{Username: user, Password: password}); err != nil {
			t.Fatalf("%s: %v", state, err)
		}
		if past, by := registry.fallbacks(); past != 0 || by == 0 {
			t.Errorf("%s: %d requests past tarn, %d by it", state, past, by)
		}
		c.forget(t, i.ref())
	}
	mustTarn(t, "hosts", "remove")
	if err := c.pullAs(t, i.ref(), &cri.Auth{Username: user, Password: password}); err == nil {
		t.Error("after remove it still goes through tarn")
	}
	clearNode(t)
}

// TestARegistryWithCertificatesOfItsOwn goes past tarn after an install, as it did
// before; after an install for it, through tarn, and still to it while tarn is away.
func TestARegistryWithCertificatesOfItsOwn(t *testing.T) {
	registry := newRegistry(t, nil)
	tarn := startTarn(t, folder(t, work(), "tarn"), "")
	cert, ca := certificate(t, upstreamName)
	serveTLS(t, "127.0.0.1:443", cert, registry.recorded(pastTarn))
	i := pushSaying(t, "app/own", "v1", "hello")
	c := bareNode(t)
	text, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	layNode(t, map[string]string{certsDir + "/" + upstreamName + "/ca.crt": string(text)})
	pulled := func(state string, wantPast, wantBy bool) {
		t.Helper()
		registry.take()
		if err := c.pull(t.Context(), i.ref()); err != nil {
			t.Fatalf("%s: %v", state, err)
		}
		if past, by := registry.fallbacks(); (past > 0) != wantPast || (by > 0) != wantBy {
			t.Errorf("%s: %d requests past tarn, %d by it", state, past, by)
		}
		c.forget(t, i.ref())
	}
	pulled("before", true, false)
	if out := mustTarn(t, "hosts", "install"); !strings.Contains(out, upstreamName+" goes past tarn") {
		t.Errorf("install does not say that it goes past tarn: %s", out)
	}
	pulled("after an install for all", true, false)
	mustTarn(t, "hosts", "install", "--registry", upstreamName)
	pulled("after an install for it", false, true)
	tarn.stop(t)
	pulled("while tarn is away", true, false)
	mustTarn(t, "hosts", "remove")
	pulled("after remove", true, false)
	if left := folderNames(t, certsDir); left != "upstream.test/ upstream.test/ca.crt" {
		t.Errorf("remove left %s", left)
	}
	clearNode(t)
}

func serveTLS(t *testing.T, addr string, cert tls.Certificate, h http.Handler) {
	t.Helper()
	l, err := tls.Listen("tcp", addr, &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: h}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
}

// folderNames are all names below a folder but what is on its way.
func folderNames(t *testing.T, root string) string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		if err != nil || path == root {
			return err
		}
		if strings.HasPrefix(d.Name(), ".tarn.") {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		name, _ := filepath.Rel(root, path)
		if d.IsDir() {
			name += "/"
		}
		names = append(names, name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(names, " ")
}

// TestAKillLeavesTheOldStateOrTheNew ends install and remove at each system call that
// changes or reads a file, and then has them do the whole.
func TestAKillLeavesTheOldStateOrTheNew(t *testing.T) {
	for _, start := range []struct{ name, before, after string }{
		{"no certs.d", "", "certs.d/ certs.d/_default/ certs.d/_default/hosts.toml"},
		{"an empty _default", "certs.d/ certs.d/_default/", "certs.d/ certs.d/_default/ certs.d/_default/hosts.toml"},
	} {
		t.Run(start.name, func(t *testing.T) {
			root := folder(t, "/run/tarn-e2e", "hosts")
			t.Cleanup(func() { os.RemoveAll(filepath.Dir(root)) })
			certs := filepath.Join(root, "certs.d")
			lay := func() {
				if err := os.RemoveAll(root); err != nil {
					t.Fatal(err)
				}
				layNode(t, map[string]string{root + "/": ""})
				if start.before != "" {
					layNode(t, map[string]string{certs + "/_default/": ""})
				}
			}
			kills := 0
			for _, command := range []string{"install", "remove"} {
				old, new := start.before, start.after
				if command == "remove" {
					old, new = new, old
				}
				for _, call := range []string{"mkdirat", "openat", "write", "fchmod", "fchmodat", "fsync", "renameat", "renameat2", "unlinkat"} {
					for n := 1; n < 400; n++ {
						lay()
						if command == "remove" {
							mustTarn(t, "hosts", "install", "--certs-dir", certs)
						}
						killed := killedAt(t, call, n, "hosts", command, "--certs-dir", certs)
						if got := folderNames(t, root); got != old && got != new {
							t.Fatalf("%s killed at %s %d left %q", command, call, n, got)
						}
						if !killed {
							break
						}
						kills++
						mustTarn(t, "hosts", command, "--certs-dir", certs)
						if got := folderNames(t, root); got != new {
							t.Fatalf("%s after a kill at %s %d made %q", command, call, n, got)
						}
						if entries, _ := filepath.Glob(root + "/.tarn*"); len(entries) > 0 {
							t.Fatalf("%s after a kill at %s %d left %q", command, call, n, entries)
						}
					}
				}
			}
			t.Logf("%d kills", kills)
			if kills < 20 {
				t.Error("hardly any kill has struck")
			}
		})
	}
}

// killedAt runs the built tarn until its nth system call of that name.
func killedAt(t *testing.T, call string, n int, args ...string) bool {
	t.Helper()
	line := append([]string{"-f", "-qq", "-o", "/dev/null", "-e", "trace=" + call, "-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", call, n), filepath.Join(work(), "tarn")}, args...)
	cmd := exec.CommandContext(t.Context(), "strace", line...)
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState.Success() {
		t.Fatalf("%v: %s", err, out)
	}
	return !cmd.ProcessState.Success()
}

// TestTheProbeRuns: a pod of it completes.
func TestTheProbeRuns(t *testing.T) {
	eachClient(t, func(t *testing.T, n *node, c client) {
		pushPause(t)
		mustTarn(t, "hosts", "install", "--certs-dir", n.containerd.hosts)
		const ref = "probe.tarn.invalid/pod:1"
		mustPull(t, c, ref)
		if out, code := c.run(t, ref); code != 0 || out != "" {
			t.Errorf("it ends with %d and says %q", code, out)
		}
		c.forget(t, ref)
	})
}

// TestSkopeoGoesByThePrintedSettings: it has a table for the probe, which is the only
// way to it.
func TestSkopeoGoesByThePrintedSettings(t *testing.T) {
	newRegistry(t, nil)
	startTarn(t, folder(t, work(), "tarn"), "")
	const conf = "/etc/containers/registries.conf.d/50-tarn.conf"
	pull := func() error {
		out, err := exec.CommandContext(t.Context(), "skopeo", "--insecure-policy", "copy", "docker://probe.tarn.invalid/skopeo:1", "dir:"+t.TempDir()).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	if err := pull(); err == nil {
		t.Error("it pulls the probe without them")
	}
	layNode(t, map[string]string{conf: mustTarn(t, "hosts", "install", "--format", "registries.conf")})
	if err := pull(); err != nil {
		t.Error(err)
	}
	if err := os.Remove(conf); err != nil {
		t.Error(err)
	}
}

// TestContainerdGoesByIPv6: tarn, and what was installed, know no other address.
func TestContainerdGoesByIPv6(t *testing.T) {
	const url = "http://[::1]:5050"
	config := filepath.Join(t.TempDir(), "tarn.yaml")
	writeFile(t, config, "listen: \"[::1]:5050\"\nadmin_listen: \"[::1]:5051\"\nmin_free: 0\n")
	start(t, "tarn", filepath.Join(work(), "tarn"), "serve", "--config", config, "--dir", folder(t, work(), "tarn"))
	bareNode(t)
	waitFor(t, "tarn answers", func() error {
		resp, err := http.Get(url + "/v2/")
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
	if r := hostsCheck(t, "--live", "--url", url); r.Verdict != "not used" {
		t.Errorf("before: %+v", r)
	}
	mustTarn(t, "hosts", "install", "--url", url)
	for _, args := range [][]string{{"--url", url}, {"--url", url, "--live"}} {
		if r := hostsCheck(t, args...); r.Verdict != "used" {
			t.Errorf("%q: %+v", args, r)
		}
	}
	clearNode(t)
}
