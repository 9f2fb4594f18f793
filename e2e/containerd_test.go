// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"text/template"

	"tarn/e2e/cri"
)

// containerdSocket is where containerd listens unless told otherwise. It is
// below the /run of this test run.
const containerdSocket = "/run/containerd/containerd.sock"

// pauseRef is the image that holds a pod's namespaces. It comes through tarn,
// as all others do.
const pauseRef = upstreamName + "/pause:1"

// containerdConfig keeps containerd to its folder, and lets it run where a
// machine in a machine has fewer rights than a real one.
var containerdConfig = template.Must(template.New("config.toml").Parse(`version = 3
root = '{{.Root}}'
state = '{{.State}}'
imports = []
# The first wants a folder in /opt; the others are not for these tests and only cost time at the start.
disabled_plugins = [
  'io.containerd.internal.v1.opt', 'io.containerd.nri.v1.nri', 'io.containerd.tracing.processor.v1.otlp',
  'io.containerd.snapshotter.v1.blockfile', 'io.containerd.snapshotter.v1.btrfs', 'io.containerd.snapshotter.v1.devmapper',
  'io.containerd.snapshotter.v1.erofs', 'io.containerd.snapshotter.v1.zfs',
]

# Each namespace fetches for itself, as if it were a client of its own.
[plugins.'io.containerd.metadata.v1.bolt']
  content_sharing_policy = 'isolated'

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{{.Pause}}'

[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '{{.Hosts}}'

[plugins.'io.containerd.transfer.v1.local']
  config_path = '{{.Hosts}}'
  # Bytes of a layer that one of several parallel requests is for; 0 is one request a layer.
  concurrent_layer_fetch_buffer = {{.Parallel}}

[plugins.'io.containerd.cri.v1.runtime']
  # A container may not lower its score without CAP_SYS_RESOURCE.
  restrict_oom_score_adj = true
  disable_apparmor = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    SystemdCgroup = false

# Pods are on the host's network and need no plugin; but containerd watches the folder, and makes it.
[plugins.'io.containerd.cri.v1.runtime'.cni]
  conf_dir = '{{.Root}}/cni'
  bin_dirs = ['{{.Plugins}}']
`))

// mirror sends containerd to tarn at this address first, and to the registry
// itself where tarn fails. It holds for the next pull.
func (c *containerd) mirror(t *testing.T, addr string) {
	t.Helper()
	host := filepath.Join(c.hosts, upstreamName)
	if err := os.MkdirAll(host, 0o755); err != nil {
		t.Fatal(err)
	}
	hosts := fmt.Sprintf("server = \"http://%s:5002\"\n\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", upstreamName, addr)
	if err := os.WriteFile(filepath.Join(host, "hosts.toml"), []byte(hosts), 0o644); err != nil {
		t.Fatal(err)
	}
}

// direct sends containerd to the registry itself.
func (c *containerd) direct(t *testing.T) {
	t.Helper()
	hosts := fmt.Sprintf("server = \"http://%s:5002\"\n", upstreamName)
	if err := os.WriteFile(filepath.Join(c.hosts, upstreamName, "hosts.toml"), []byte(hosts), 0o644); err != nil {
		t.Fatal(err)
	}
}

// containerd is a running containerd without any image.
type containerd struct {
	*process
	hosts string // its certs.d
}

// startContainerd starts an empty containerd and returns when it can pull and
// run.
func startContainerd(t *testing.T) *containerd { return startContainerdWith(t, 0) }

// startContainerdWith fetches layers in parallel ranges of that many bytes,
// unless that is 0.
func startContainerdWith(t *testing.T, parallel int) *containerd {
	t.Helper()
	c := &containerd{hosts: folder(t, work(), "certs.d")}
	c.mirror(t, tarnAddr)
	c.start(t, parallel)
	return c
}

// containerdRoot is where the containerd of this test keeps what it has. On /run,
// which is in memory: its layered filesystem works there wherever the tests run,
// and its fsyncs cost nothing.
func containerdRoot(t *testing.T) string { return folder(t, "/run/tarn-e2e", "root") }

// start returns when it can pull and run, by the settings in its certs.d.
func (c *containerd) start(t *testing.T, parallel int) {
	t.Helper()
	root := containerdRoot(t)
	var config strings.Builder
	err := containerdConfig.Execute(&config, map[string]string{
		"Root": root, "State": folder(t, "/run/tarn-e2e", "state"), "Pause": pauseRef, "Hosts": c.hosts, "Parallel": fmt.Sprint(parallel),
		"Plugins": pluginFolder(),
	})
	if err != nil {
		t.Fatal(err)
	}
	configFile := filepath.Join(folder(t, work(), "containerd"), "config.toml")
	if err := os.WriteFile(configFile, []byte(config.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	// Memory is given back when all is over: removed after containerd's end.
	t.Cleanup(func() {
		if err := os.RemoveAll(filepath.Dir(root)); err != nil {
			t.Errorf("remove containerd's folder: %v", err)
		}
	})
	c.process = start(t, "containerd", "containerd", "--config", configFile)
	client := c.dialCRI(t)
	waitFor(t, "containerd is ready", func() error {
		if err := c.alive(); err != nil {
			t.Fatalf("%v; its log:\n%s", err, c.tail(t))
		}
		return client.Ready(t.Context())
	})
}

// pluginFolder is where the plugins for the network of pods are, if they are.
func pluginFolder() string {
	path, err := exec.LookPath("ptp")
	if err != nil {
		return "/opt/cni/bin"
	}
	return filepath.Dir(path)
}

func (c *containerd) dialCRI(t *testing.T) *cri.Client {
	t.Helper()
	client, err := cri.Dial(containerdSocket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Errorf("close the CRI client: %v", err)
		}
	})
	return client
}

// client is a way to use containerd.
type client interface {
	pull(ctx context.Context, ref string) error
	// run runs the image's own command.
	run(t *testing.T, ref string) (output string, code int)
	// forget removes the image with its content, and fails the test if any
	// content of this client is left: then a later pull would prove nothing.
	forget(t *testing.T, refs ...string)
	// digests are the digests that this client knows the reference by.
	digests(t *testing.T, ref string) string
}

// eachClient runs a test once by ctr and once by the CRI, each with a node of
// its own.
func eachClient(t *testing.T, test func(t *testing.T, n *node, c client)) {
	t.Run("ctr", func(t *testing.T) {
		n := newNode(t)
		test(t, n, n.ctr("default"))
	})
	t.Run("CRI", func(t *testing.T) {
		n := newNode(t)
		test(t, n, &criClient{n.containerd, n.containerd.dialCRI(t)})
	})
}

// ctr is containerd's own command line, in one containerd namespace.
type ctr struct {
	*containerd
	namespace string
}

// command runs ctr and returns its standard output. It fails with what ctr
// wrote to its standard error, and an *exec.ExitError.
func (c ctr) command(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ctr", append([]string{"--address", containerdSocket, "--namespace", c.namespace}, args...)...)
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

func (c ctr) mustCommand(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.command(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (c ctr) pull(ctx context.Context, ref string) error {
	// Of other platforms ctr would fetch manifest and config; nobody else does.
	_, err := c.command(ctx, "images", "pull", "--skip-metadata", "--hosts-dir", c.hosts, ref)
	return err
}

func (c ctr) run(t *testing.T, ref string) (string, int) {
	t.Helper()
	out, err := c.command(t.Context(), "run", "--rm", "--cgroup", cgroupParent()+"/ctr", ref, "said")
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit == nil {
		return out, 0
	}
	if exit.ExitCode() != saysCode {
		t.Log(err)
	}
	return out, exit.ExitCode()
}

func (c ctr) forget(t *testing.T, refs ...string) {
	t.Helper()
	c.mustCommand(t, append([]string{"images", "remove", "--sync"}, refs...)...)
	c.wantEmpty(t)
}

func (c ctr) wantEmpty(t *testing.T) {
	t.Helper()
	if left := c.mustCommand(t, "content", "ls", "--quiet"); left != "" {
		t.Fatalf("namespace %s of containerd still has content, so the next pull is not cold:\n%s", c.namespace, left)
	}
}

func (c ctr) digests(t *testing.T, ref string) string {
	t.Helper()
	return c.mustCommand(t, "images", "ls", "name=="+ref)
}

// criClient is what a kubelet uses.
type criClient struct {
	containerd *containerd
	client     *cri.Client
}

func (c *criClient) pull(ctx context.Context, ref string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, err := c.client.PullImage(ctx, ref, nil)
	return err
}

func (c *criClient) run(t *testing.T, ref string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	pod, err := c.client.RunPodSandbox(ctx, "pod", folder(t, work(), "logs"), cgroupParent())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := pod.Remove(ctx); err != nil {
			t.Error(err)
		}
	}()
	out, code, err := pod.Run(ctx, "said", ref)
	if err != nil {
		t.Fatal(err)
	}
	return out, code
}

func (c *criClient) forget(t *testing.T, refs ...string) {
	t.Helper()
	for _, ref := range refs {
		if err := c.client.RemoveImage(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	names, err := c.client.ListImages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if !strings.HasPrefix(n, upstreamName+"/pause") {
			t.Fatalf("after RemoveImage of %v the runtime still has %v", refs, names)
		}
	}
	if len(names) == 0 {
		ctr{c.containerd, "k8s.io"}.wantEmpty(t)
	}
}

func (c *criClient) digests(t *testing.T, ref string) string {
	t.Helper()
	d, err := c.client.ImageDigests(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(d, " ")
}
