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
	c := startCluster(t, nil)
	// A folder that was not there would stay, empty: the runtime makes it for the mount.
	layNode(t, map[string]string{certsDir + "/other.test/hosts.toml": "server = \"http://other.test\"\n"})
	before := tree(t, certsDir)
	c.install(t)
	c.wantAlways(t)
	c.helm(t, "test", "tarn", "--timeout", "90s")
	if phase := c.kubectl(t, "-n", chartNamespace, "get", "pod", "tarn-test", "-o", "jsonpath={.status.phase}"); phase != "Succeeded" {
		t.Errorf("the pod of helm test: %s", phase)
	}
	if out := c.kubectl(t, "-n", chartNamespace, "exec", "daemonset/tarn", "--", "tarn", "status"); !strings.Contains(out, "1GiB") && !strings.Contains(out, "1.0GiB") {
		t.Errorf("tarn status, by kubectl exec: %s", out)
	}
	c.wantSurvivesKill(t)

	c.wantPodsMeanwhile(t, "upgraded", append([]string{"upgrade"}, c.chart("--set", "config.log_level=debug", "--set", "metrics.enabled=true")...)...)
	c.wantMetrics(t)
	c.wantPodsMeanwhile(t, "rolled-back", "rollback", "tarn", "1", "--wait", "--timeout", "60s")
	i := pushSaying(t, "app/after", "v1", "after the rollback")
	c.take()
	c.wantPod(t, "after-rollback", i)
	c.wantRequests(t, "after the rollback", coldly(i)...)

	c.helm(t, append([]string{"upgrade"}, c.chart("--set", "cleanup.data=true")...)...)
	waitFor(t, "the data directory is empty", func() error {
		if left := tree(t, c.data()); len(left) > 1 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
	c.helm(t, "uninstall", "tarn", "--wait", "--timeout", "60s")
	waitFor(t, "certs.d is as before", func() error {
		if now := tree(t, certsDir); strings.Join(now, "\n") != strings.Join(before, "\n") {
			return fmt.Errorf("%v, was %v", now, before)
		}
		return nil
	})
	c.wantPod(t, "without-tarn", pushSaying(t, "app/gone", "v1", "tarn is gone"))
}

// TestPullSecretsOnACluster: who may run an image is what it would be without tarn, also
// where the image is on the node already, pulled with another pod's secret.
func TestPullSecretsOnACluster(t *testing.T) {
	c := startCluster(t, basicAuth(t))
	c.install(t)
	for name, of := range map[string]string{"right": password, "wrong": "wrong-" + password} {
		c.kubectl(t, "create", "secret", "docker-registry", name, "--docker-server", upstreamName, "--docker-username", user, "--docker-password", of)
	}
	i := pushSaying(t, "team/secret", "v1", "a secret")
	for _, policy := range []string{"Always", "IfNotPresent"} {
		c.wantRefused(t, policy, i)
		c.wantRefused(t, policy, i, "wrong")
		c.take()
		c.wantPodAs(t, "secret", policy, i, "right")
		for _, r := range c.take() {
			if r.route != byTarn {
				t.Errorf("%s, the right secret: past tarn: %s", policy, r)
			}
		}
		c.wantRefused(t, policy, i)
		c.wantRefused(t, policy, i, "wrong")
	}
	c.take()
	c.wantPodAs(t, "again", "IfNotPresent", i, "right")
	c.wantRequests(t, "the right secret again, which the kubelet remembers")
}

// TestAnotherFolderOnACluster: where containerd looks elsewhere than the chart writes, helm
// test fails in time, and pods start.
func TestAnotherFolderOnACluster(t *testing.T) {
	c := startCluster(t, nil)
	c.install(t, "--set", "hosts.certsDir=/etc/containerd/elsewhere")
	begin := time.Now()
	err := c.try(t, "helm", "test", "tarn", "--namespace", chartNamespace, "--timeout", "90s")
	if took := time.Since(begin); err == nil || took > 75*time.Second {
		t.Errorf("helm test has said after %s: %v", took, err)
	} else {
		t.Logf("helm test has failed after %.0f s", took.Seconds())
	}
	t.Log(c.kubectl(t, "-n", chartNamespace, "logs", "-l", chartPods, "-c", "hosts"))
	c.wantPod(t, "past-tarn", pushSaying(t, "app/past", "v1", "past tarn"))
}

// TestABadConfigurationOnACluster: tarn says what is wrong with it, pods start all the
// same, and a rollback is enough. One who writes certs.d himself has nothing written.
func TestABadConfigurationOnACluster(t *testing.T) {
	c := startCluster(t, nil)
	c.install(t)
	// helm --wait does not see it, see rolledOut.
	if err := c.try(t, "helm", append([]string{"upgrade", "--namespace", chartNamespace}, c.chart("--set", "config.max_size=plenty")...)...); err != nil {
		t.Log(err)
	}
	waitFor(t, "tarn says what is wrong", func() error {
		out, err := c.command(t, "kubectl", "-n", chartNamespace, "logs", "-l", chartPods, "-c", "tarn").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "max_size") || !strings.Contains(string(out), "plenty") {
			return fmt.Errorf("%v: %s", err, out)
		}
		t.Logf("%s", out)
		return nil
	})
	c.take()
	i := pushSaying(t, "app/bad", "v1", "no tarn serves")
	c.wantPod(t, "bad", i)
	for _, r := range c.take() {
		if r.route != pastTarn {
			t.Errorf("while tarn does not take its configuration: by tarn: %s", r)
		}
	}
	c.helm(t, "rollback", "tarn", "1", "--wait", "--timeout", "60s")
	c.rolledOut(t)
	i = pushSaying(t, "app/good", "v1", "tarn serves again")
	c.take()
	c.wantPod(t, "good", i)
	c.wantRequests(t, "after the rollback", coldly(i)...)

	c.helm(t, append([]string{"upgrade"}, c.chart("--set", "hosts.enabled=false")...)...)
	c.kubectl(t, "-n", chartNamespace, "rollout", "status", "daemonset/tarn", "--timeout", "60s")
	waitFor(t, "nothing is left in certs.d", func() error {
		if now := tree(t, certsDir); len(now) > 1 {
			return fmt.Errorf("%v", now)
		}
		return nil
	})
	c.containerd.mirror(t, tarnAddr) // as an operator would
	i = pushSaying(t, "app/own", "v1", "by a file of the operator")
	c.take()
	c.wantPod(t, "own", i)
	c.wantRequests(t, "by the operator's own file", coldly(i)...)
}

const (
	chartNamespace = "tarn-system"
	chartPods      = "app.kubernetes.io/name=tarn,app.kubernetes.io/instance=tarn"
)

// data is tarn's directory on the node. The kubelet makes it.
func (c *cluster) data() string { return filepath.Join(c.dir, "data") }

func (c *cluster) chart(more ...string) []string {
	return append([]string{"tarn", "../deploy/chart", "--values", filepath.Join(c.dir, "values.yaml"), "--wait", "--timeout", "60s"}, more...)
}

// install returns when pulls go through tarn.
func (c *cluster) install(t *testing.T, more ...string) {
	t.Helper()
	write(t, filepath.Join(c.dir, "values.yaml"), fmt.Sprintf(chartValues, c.data()))
	c.helm(t, append([]string{"install", "--create-namespace"}, c.chart(more...)...)...)
	c.rolledOut(t)
}

func (c *cluster) helm(t *testing.T, args ...string) {
	t.Helper()
	begin := time.Now()
	if err := c.try(t, "helm", append(args, "--namespace", chartNamespace)...); err != nil {
		t.Fatalf("%v\n%s", err, c.describe(t))
	}
	t.Logf("helm %s: %.1f s", args[0], time.Since(begin).Seconds())
}

// rolledOut waits for more than helm --wait, which does not wait for the last
// maxUnavailable pods, and one node has one.
func (c *cluster) rolledOut(t *testing.T) {
	t.Helper()
	if err := c.try(t, "kubectl", "-n", chartNamespace, "rollout", "status", "daemonset/tarn", "--timeout", "60s"); err != nil {
		t.Fatalf("%v\n%s", err, c.describe(t))
	}
	waitFor(t, "hosts sync has written its file", func() error {
		_, err := os.Stat("/run/tarn-hosts/hosts.toml")
		return err
	})
}

// wantPodsMeanwhile has helm replace tarn's pod, and starts pods of images that the node
// does not have until the new one is up.
func (c *cluster) wantPodsMeanwhile(t *testing.T, name string, args ...string) {
	t.Helper()
	pod := c.kubectl(t, "-n", chartNamespace, "get", "pod", "-l", chartPods, "-o", "name")
	done := make(chan error, 1)
	go func() {
		err := c.try(t, "helm", append(args, "--namespace", chartNamespace)...)
		if err == nil {
			err = c.try(t, "kubectl", "-n", chartNamespace, "rollout", "status", "daemonset/tarn", "--timeout", "60s")
		}
		done <- err
	}()
	const most = 50
	c.take()
	past, started := 0, 0
	for over := false; !over && started < most; started++ {
		c.wantPod(t, name, pushSaying(t, fmt.Sprintf("app/%s-%d", name, started), "v1", fmt.Sprintf("number %d", started)))
		for _, r := range c.take() {
			if r.route == pastTarn {
				past++
			}
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("%v\n%s", err, c.describe(t))
			}
			over = true
		default:
		}
	}
	t.Logf("%s: %d pods have started meanwhile, %d requests went past tarn", name, started, past)
	c.rolledOut(t)
	if now := c.kubectl(t, "-n", chartNamespace, "get", "pod", "-l", chartPods, "-o", "name"); now == pod {
		t.Errorf("%s: it is still %s", name, now)
	}
}

// wantMetrics finds tarn's metrics as Prometheus does, by the endpoints of the Service.
func (c *cluster) wantMetrics(t *testing.T) {
	t.Helper()
	const at = nodeIP + ":5052"
	found := c.kubectl(t, "-n", chartNamespace, "get", "endpointslices", "-l", "kubernetes.io/service-name=tarn-metrics",
		"-o", "jsonpath={.items[*].endpoints[*].addresses[*]}:{.items[*].ports[*].port}")
	if found != at {
		t.Errorf("the endpoints of the Service are %q, want %s", found, at)
	}
	resp, err := http.Get("http://" + at + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("/metrics answers %s", resp.Status)
	}
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
	c.wantPodAs(t, name, "Always", i)
}

func (c *cluster) wantPodAs(t *testing.T, name, policy string, i image, secrets ...string) {
	t.Helper()
	begin := time.Now()
	c.apply(t, name, policy, i, secrets...)
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

// wantRefused fails the test unless the image of such a pod does not come.
func (c *cluster) wantRefused(t *testing.T, policy string, i image, secrets ...string) {
	t.Helper()
	const name = "refused"
	c.apply(t, name, policy, i, secrets...)
	waitFor(t, fmt.Sprintf("a pod of %s with the secrets %v is refused", policy, secrets), func() error {
		state := c.kubectl(t, "get", "pod", name, "-o", "jsonpath={.status.containerStatuses[0].state}")
		if strings.Contains(state, "terminated") {
			t.Fatalf("a pod of %s with the secrets %v has run: %s", policy, secrets, state)
		}
		if !strings.Contains(state, "ErrImagePull") && !strings.Contains(state, "ImagePullBackOff") {
			return errors.New(state)
		}
		return nil
	})
	c.kubectl(t, "delete", "pod", name, "--wait")
}

func (c *cluster) apply(t *testing.T, name, policy string, i image, secrets ...string) {
	t.Helper()
	var names []string
	for _, s := range secrets {
		names = append(names, "{name: "+s+"}")
	}
	file := filepath.Join(c.dir, name+".yaml")
	write(t, file, fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  imagePullSecrets: [%s]
  containers: [{name: it, image: %q, imagePullPolicy: %s}]
`, name, strings.Join(names, ", "), i.ref(), policy))
	c.kubectl(t, "apply", "-f", file)
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
