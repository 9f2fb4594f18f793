// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// chartValues are what a node of these tests needs: the image that was imported, the
// registry's address for tarn, and a disk that may be nearly full.
const chartValues = `image: {repository: ` + imageName + `, tag: "` + imageVersion + `"}
dataDir: %s
config:
  min_free: 0
  max_size: 1GiB
  min_free_inodes: 0
  upstreams:
    - {name: ` + upstreamName + `, endpoints: ["http://` + forTarnAddr + `"]}
`

// TestHelmInstallOnACluster goes the way of an operator, from a cluster without tarn to
// a cluster without tarn.
func TestHelmInstallOnACluster(t *testing.T) {
	c := startCluster(t)
	data := folder(t, work(), "data")
	if err := os.RemoveAll(data); err != nil { // the kubelet makes it
		t.Fatal(err)
	}
	// A folder that was not there would stay, empty: the runtime makes it for the mount.
	layNode(t, map[string]string{certsDir + "/other.test/hosts.toml": "server = \"http://other.test\"\n"})
	before := tree(t, certsDir)
	ctr{c.containerd, "k8s.io"}.mustCommand(t, "images", "import", filepath.Join(work(), "image", "tarn-"+imageVersion+".oci.tar"))
	values := filepath.Join(c.dir, "values.yaml")
	write(t, values, fmt.Sprintf(chartValues, data))
	helm := func(args ...string) string {
		t.Helper()
		begin := time.Now()
		out, err := c.command(t, "helm", append(args, "--namespace", "tarn-system")...).CombinedOutput()
		if err != nil {
			t.Fatalf("helm %s: %v: %s\n%s", strings.Join(args, " "), err, out, c.describe(t))
		}
		t.Logf("helm %s: %.1f s", args[0], time.Since(begin).Seconds())
		return string(out)
	}
	// helm --wait does not wait for the last maxUnavailable pods, and one node has one.
	rolledOut := func() {
		t.Helper()
		c.kubectl(t, "-n", "tarn-system", "rollout", "status", "daemonset/tarn", "--timeout", "60s")
		waitFor(t, "hosts.toml is there", func() error {
			_, err := os.Stat(anyRegistrysFile)
			return err
		})
	}
	installed := func(more ...string) []string {
		return append([]string{"tarn", "../deploy/chart", "--values", values, "--wait", "--timeout", "60s"}, more...)
	}

	helm(append([]string{"install", "--create-namespace"}, installed()...)...)
	rolledOut()
	c.wantAlways(t)
	helm("test", "tarn", "--timeout", "90s")
	if phase := c.kubectl(t, "-n", "tarn-system", "get", "pod", "tarn-test", "-o", "jsonpath={.status.phase}"); phase != "Succeeded" {
		t.Errorf("the pod of helm test: %s", phase)
	}
	c.wantSurvivesKill(t)

	const pods = "app.kubernetes.io/name=tarn,app.kubernetes.io/instance=tarn"
	pod := c.kubectl(t, "-n", "tarn-system", "get", "pod", "-l", pods, "-o", "name")
	helm(append([]string{"upgrade"}, installed("--set", "config.log_level=debug")...)...)
	rolledOut()
	if now := c.kubectl(t, "-n", "tarn-system", "get", "pod", "-l", pods, "-o", "name"); now == pod {
		t.Errorf("after a changed configuration, it is still %s", now)
	}
	helm("rollback", "tarn", "1", "--wait", "--timeout", "60s")
	rolledOut()
	i := pushSaying(t, "app/after", "v1", "after the rollback")
	c.take()
	c.wantPod(t, "after-rollback", i)
	c.wantRequests(t, "after the rollback", coldly(i)...)

	helm(append([]string{"upgrade"}, installed("--set", "cleanup.data=true")...)...)
	waitFor(t, "the data directory is empty", func() error {
		if left := tree(t, data); len(left) > 1 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
	helm("uninstall", "tarn", "--wait", "--timeout", "60s")
	waitFor(t, "certs.d is as before", func() error {
		if now := tree(t, certsDir); strings.Join(now, "\n") != strings.Join(before, "\n") {
			return fmt.Errorf("%v, was %v", now, before)
		}
		return nil
	})
	i = pushSaying(t, "app/gone", "v1", "tarn is gone")
	c.wantPod(t, "without-tarn", i)
}

// wantAlways has pods of imagePullPolicy Always pulled through tarn: the first one cold,
// one of the same tag, and one once the tag has moved.
func (c *cluster) wantAlways(t *testing.T) {
	t.Helper()
	i := pushSaying(t, "app/hello", "v1", "the first one")
	c.take()
	c.wantPod(t, "hello", i)
	c.wantRequests(t, "a cold pull", coldly(i)...)
	c.wantPod(t, "hello", i)
	c.wantFromDisk(t, "an unchanged tag", i)
	moved := pushSaying(t, "app/hello", "v1", "the second one")
	c.wantPod(t, "hello", moved)
	requests := c.take()
	if len(requests) == 0 {
		t.Error("a moved tag: the registry was asked nothing")
	}
	for _, r := range requests {
		if r.route != byTarn {
			t.Errorf("a moved tag: past tarn: %s", r)
		}
	}
}

// coldly is what a first pull asks the registry: all but the layer that the node has from
// the image that holds the pods' namespaces.
func coldly(i image) []string {
	var out []string
	for _, get := range append(i.gets(), i.headTag()) {
		if !strings.HasSuffix(get, i.objects[2].Digest.String()) {
			out = append(out, get)
		}
	}
	return out
}

// wantSurvivesKill kills tarn's process: pods start meanwhile, and it comes back.
func (c *cluster) wantSurvivesKill(t *testing.T) {
	t.Helper()
	killed := 0
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range lines {
		line, _ := os.ReadFile(file) // a process that has ended since has none
		args := strings.Split(string(line), "\x00")
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil && filepath.Base(args[0]) == "tarn" && len(args) > 1 && args[1] == "serve" {
			killed++
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	if killed != 1 {
		t.Fatalf("%d processes of tarn killed, want 1", killed)
	}
	for n := range 3 {
		i := pushSaying(t, fmt.Sprintf("app/killed-%d", n), "v1", fmt.Sprintf("while tarn was killed, %d", n))
		c.wantPod(t, "killed", i)
	}
	waitFor(t, "tarn comes back", func() error {
		resp, err := http.Get("http://" + tarnAddr + "/v2/")
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
	waitFor(t, "hosts.toml comes back", func() error {
		_, err := os.Stat(anyRegistrysFile)
		return err
	})
}

// wantPod runs a pod of the image, and fails the test unless it says what the image says.
func (c *cluster) wantPod(t *testing.T, name string, i image) {
	t.Helper()
	file := filepath.Join(c.dir, name+".yaml")
	write(t, file, fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers: [{name: it, image: %q, imagePullPolicy: Always}]
`, name, i.ref()))
	begin := time.Now()
	c.kubectl(t, "apply", "-f", file)
	waitFor(t, "the pod "+name+" ends", func() error {
		code := c.kubectl(t, "get", "pod", name, "-o", "jsonpath={.status.containerStatuses[0].state.terminated.exitCode}")
		if code != fmt.Sprint(saysCode) {
			return fmt.Errorf("exit code %q; %s", code, c.kubectl(t, "get", "pod", name, "-o", "jsonpath={.status.containerStatuses[0].state}"))
		}
		return nil
	})
	t.Logf("the pod %s has run after %.1f s", name, time.Since(begin).Seconds())
	if said := c.kubectl(t, "logs", name); said != i.says {
		t.Errorf("the pod %s says %q, want %q", name, said, i.says)
	}
	c.kubectl(t, "delete", "pod", name, "--wait")
}

// describe is what an operator would look at when something did not come up.
func (c *cluster) describe(t *testing.T) string {
	out, _ := c.command(t, "sh", "-c", `kubectl get pods -A -o wide; kubectl -n tarn-system describe pods,daemonsets; kubectl get events -A --sort-by=.lastTimestamp | tail -30
		kubectl -n tarn-system logs -l app.kubernetes.io/name=tarn --all-containers --prefix --tail 20
		kubectl -n tarn-system logs tarn-test`).CombinedOutput()
	return string(out)
}

// tree is every name below the directory with what it is: a link's target, a file's content.
func tree(t *testing.T, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		line := path + " " + e.Type().String()
		if target, err := os.Readlink(path); err == nil {
			line += " -> " + target
		} else if e.Type().IsRegular() {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += " " + string(content)
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
