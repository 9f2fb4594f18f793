// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"tarn/e2e/cri"

	"github.com/distribution/distribution/v3/configuration"
	"golang.org/x/sys/unix"
)

const (
	// nodeIP is an address of the loopback interface: a kubelet takes none of 127.0.0.0/8 for its node's.
	nodeIP   = "10.99.0.1"
	nodeName = "node-1"
	// webAddr is where a runtime asks a registry that no file of its settings names.
	webAddr = "127.0.0.1:443"
	apiAddr = "https://" + nodeIP + ":6443"
)

// cluster is Kubernetes on one node, in the namespaces of this test run.
type cluster struct {
	*registry
	containerd *containerd
	dir        string // the files of its parts
}

// tokens are who asks the API server: the token, the user and the groups, as --token-auth-file has them.
var tokens = []struct{ token, user, groups string }{
	{"admin-token", "admin", "system:masters"},
	{"controller-token", "system:kube-controller-manager", ""},
	{"scheduler-token", "system:kube-scheduler", ""},
	{"kubelet-token", "system:node:" + nodeName, "system:nodes"},
}

// podNetwork is for pods that do not use the node's network.
const podNetwork = `{
  "cniVersion": "1.0.0", "name": "pods", "plugins": [
    {"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.98.0.0/24", "dataDir": "%s"}}
  ]
}
`

// kubeletConfig lets a kubelet run where a machine in a machine has fewer rights than a real one.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix://%[1]s
podLogsDir: %[2]s/pods
volumePluginDir: %[2]s/plugins
cgroupRoot: %[3]s
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
localStorageCapacityIsolation: false
makeIPTablesUtilChains: false
oomScoreAdj: 0
registerNode: true
syncFrequency: 5s
evictionHard: {memory.available: 0%%, nodefs.available: 0%%, nodefs.inodesFree: 0%%, imagefs.available: 0%%, imagefs.inodesFree: 0%%}
`

// startCluster returns when the node is ready, which has tarn's image, and nothing that
// knows of tarn. Who may pull is up to protect, nil for everybody.
func startCluster(t *testing.T, protect configuration.Auth) *cluster {
	t.Helper()
	if os.Getenv(envCluster) == "" {
		t.Skip("wants " + envCluster + "=1: make e2e-cluster")
	}
	clearNode(t)
	c := &cluster{registry: newRegistry(t, protect), dir: folder(t, work(), "kubernetes")}
	mustRun(t, "ip", "address", "add", nodeIP+"/32", "dev", "lo")
	t.Cleanup(func() { mustRun(t, "ip", "address", "del", nodeIP+"/32", "dev", "lo") })
	ownFolder(t, "/var/log")
	ownFolder(t, "/var/lib") // for what is told of no other place: addresses of pods, device plugins
	c.trustRegistry(t)
	pushPause(t)
	write(t, filepath.Join(containerdRoot(t), "cni", "10-pods.conflist"), fmt.Sprintf(podNetwork, filepath.Join(c.dir, "addresses")))
	c.containerd = &containerd{hosts: certsDir}
	c.containerd.start(t, 0)
	ctr{c.containerd, "k8s.io"}.mustCommand(t, "images", "import", filepath.Join(work(), "image", "tarn-"+imageVersion+".oci.tar"))
	// After the kubelet's end, which leaves its pods running.
	client := c.containerd.dialCRI(t)
	t.Cleanup(func() {
		if err := client.RemovePods(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	if _, err := client.PullImage(t.Context(), pauseRef, &cri.Auth{Username: user, Password: password}); err != nil {
		t.Fatal(err)
	}
	c.startControlPlane(t)
	c.startKubelet(t)
	return c
}

// ownFolder keeps in memory what is written below the directory, for this test.
func ownFolder(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatalf("mount %s: %v", dir, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// trustRegistry has the registry answer where runtimes look for it without tarn, over TLS,
// and has those believe its certificate that are started after this.
func (c *cluster) trustRegistry(t *testing.T) {
	t.Helper()
	f := nodeCertificates(t, "registry", upstreamName)
	pair, err := tls.LoadX509KeyPair(f.Server, f.ServerKey)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", webAddr)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: c.recorded(pastTarn)}
	done := make(chan error, 1)
	go func() {
		done <- server.Serve(tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}))
	}()
	t.Cleanup(func() {
		server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("the registry's server over TLS ended with %v", err)
		}
	})
	t.Setenv("SSL_CERT_FILE", f.CA)
}

// startControlPlane returns when the API server is ready.
func (c *cluster) startControlPlane(t *testing.T) {
	t.Helper()
	startPart(t, "etcd", "--data-dir", filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync",
		"--listen-peer-urls", "http://127.0.0.1:2380")
	keyFile := c.serviceAccountKey(t)
	var lines strings.Builder
	for i, of := range tokens {
		fmt.Fprintf(&lines, "%s,%s,%d,%q\n", of.token, of.user, i, of.groups)
		write(t, c.kubeconfig(of.token), fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: it,
clusters: [{name: it, cluster: {server: %q, insecure-skip-tls-verify: true}}],
users: [{name: it, user: {token: %q}}], contexts: [{name: it, context: {cluster: it, user: it}}]}
`, apiAddr, of.token))
	}
	tokenFile := filepath.Join(c.dir, "tokens.csv")
	write(t, tokenFile, lines.String())
	startPart(t, "kube-apiserver", "--etcd-servers", "http://127.0.0.1:2379", "--cert-dir", filepath.Join(c.dir, "certificates"),
		"--advertise-address", nodeIP, "--kubelet-preferred-address-types", "InternalIP", "--service-cluster-ip-range", "10.96.0.0/16", "--authorization-mode", "Node,RBAC",
		"--token-auth-file", tokenFile, "--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", keyFile, "--service-account-signing-key-file", keyFile)
	waitFor(t, "the API server is ready", func() error { return c.try(t, "kubectl", "get", "--raw", "/readyz") })
	startPart(t, "kube-controller-manager", "--kubeconfig", c.kubeconfig("controller-token"),
		"--leader-elect=false", "--use-service-account-credentials", "--service-account-private-key-file", keyFile, "--cert-dir", filepath.Join(c.dir, "controller"))
	startPart(t, "kube-scheduler", "--kubeconfig", c.kubeconfig("scheduler-token"), "--leader-elect=false",
		"--authentication-tolerate-lookup-failure")
}

// startPart starts a part of Kubernetes. Some of them end with a failure after SIGTERM,
// and none has anything to keep: they are killed.
func startPart(t *testing.T, name string, args ...string) {
	t.Helper()
	p := start(t, name, name, args...)
	t.Cleanup(func() {
		if p.alive() == nil {
			p.kill(t)
		}
	})
}

// startKubelet returns when the node takes pods.
func (c *cluster) startKubelet(t *testing.T) {
	t.Helper()
	config := filepath.Join(c.dir, "kubelet.yaml")
	write(t, config, fmt.Sprintf(kubeletConfig, containerdSocket, "/var/log", cgroupParent()))
	root := filepath.Join(c.dir, "kubelet")
	// Before the folder goes, and after the kubelet has ended.
	t.Cleanup(func() {
		if err := unmountBelow(root); err != nil {
			t.Error(err)
		}
	})
	startPart(t, "kubelet", "--config", config, "--kubeconfig", c.kubeconfig("kubelet-token"), "--root-dir", root,
		"--cert-dir", filepath.Join(c.dir, "kubelet-certificates"), "--node-ip", nodeIP, "--hostname-override", nodeName)
	waitFor(t, "the node is ready", func() error {
		return c.try(t, "kubectl", "wait", "--for=condition=Ready", "node/"+nodeName, "--timeout=1s")
	})
	waitFor(t, "there are accounts for pods", func() error { return c.try(t, "kubectl", "get", "serviceaccount", "default") })
}

// unmountBelow takes away what a kubelet has mounted for pods.
func unmountBelow(dir string) error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[1]; strings.HasPrefix(at, dir+"/") {
			err = errors.Join(err, unix.Unmount(at, unix.MNT_DETACH))
		}
	}
	return err
}

// serviceAccountKey makes the key that signs the tokens of pods.
func (c *cluster) serviceAccountKey(t *testing.T) (file string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(c.dir, "accounts.key")
	write(t, file, string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})))
	return file
}

func (c *cluster) kubeconfig(token string) string { return filepath.Join(c.dir, token+".kubeconfig") }

// command is a program of an operator of the cluster.
func (c *cluster) command(t *testing.T, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.kubeconfig("admin-token"), "HOME="+c.dir)
	return cmd
}

func (c *cluster) try(t *testing.T, program string, args ...string) error {
	if out, err := c.command(t, program, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, out)
	}
	return nil
}

// kubectl returns what the command wrote.
func (c *cluster) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.command(t, "kubectl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("kubectl %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
