// SPDX-License-Identifier: Apache-2.0

// Package deploy has no code: its tests read the files beside it with the
// parsers of the systems that they are for.
package deploy

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
)

func read(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// objects decodes all of daemonset.yaml as the API server does with strict
// field validation: unknown and duplicate fields are errors.
func objects(t *testing.T) (*corev1.Namespace, *appsv1.DaemonSet) {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	documents := yaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(read(t, "daemonset.yaml"))))
	defer documents.Close()
	var namespace *corev1.Namespace
	var set *appsv1.DaemonSet
	buf := make([]byte, 1<<20)
	for {
		n, err := documents.Read(buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		object, _, err := decoder.Decode(buf[:n], nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		switch o := object.(type) {
		case *corev1.Namespace:
			namespace = o
		case *appsv1.DaemonSet:
			set = o
		default:
			t.Fatalf("unexpected %T", o)
		}
	}
	if namespace == nil || set == nil {
		t.Fatal("want a Namespace and a DaemonSet")
	}
	return namespace, set
}

func TestTheDaemonSetRunsOnEveryNode(t *testing.T) {
	t.Parallel()
	namespace, set := objects(t)
	if set.Namespace != namespace.Name {
		t.Errorf("it is in namespace %q", set.Namespace)
	}
	labels := set.Spec.Template.Labels
	for k, v := range set.Spec.Selector.MatchLabels {
		if labels[k] != v {
			t.Errorf("the selector's %s=%s is not the pod's", k, v)
		}
	}
	pod := set.Spec.Template.Spec
	if len(pod.Tolerations) != 1 || pod.Tolerations[0] != (corev1.Toleration{Operator: corev1.TolerationOpExists}) {
		t.Errorf("tolerations: %v", pod.Tolerations)
	}
	if pod.PriorityClassName != "system-node-critical" {
		t.Errorf("priority class %q", pod.PriorityClassName)
	}
	if pod.DNSPolicy != corev1.DNSDefault {
		t.Errorf("names are resolved with policy %q, which may depend on pods", pod.DNSPolicy)
	}
	if s := set.Spec.UpdateStrategy; s.RollingUpdate == nil || s.RollingUpdate.MaxUnavailable.String() != "10%" {
		t.Errorf("update strategy %+v", s)
	}
	// The program needs 25 s to let downloads end.
	if g := pod.TerminationGracePeriodSeconds; g == nil || *g <= 25 {
		t.Errorf("grace period %v", g)
	}
}

// flag finds the value of --name=value in the container's arguments.
func flag(t *testing.T, c corev1.Container, name string) string {
	t.Helper()
	for _, arg := range c.Args {
		if value, ok := strings.CutPrefix(arg, "--"+name+"="); ok {
			return value
		}
	}
	t.Fatalf("no --%s in %q", name, c.Args)
	return ""
}

func container(t *testing.T) (corev1.PodSpec, corev1.Container) {
	t.Helper()
	_, set := objects(t)
	pod := set.Spec.Template.Spec
	if len(pod.Containers) != 1 || len(pod.InitContainers) != 0 {
		t.Fatalf("%d containers, %d init containers", len(pod.Containers), len(pod.InitContainers))
	}
	return pod, pod.Containers[0]
}

func TestTheDaemonSetListensOnTheNodesLoopbackOnly(t *testing.T) {
	t.Parallel()
	pod, c := container(t)
	if !pod.HostNetwork {
		t.Error("containerd cannot reach a pod's own loopback")
	}
	if len(c.Ports) != 0 {
		t.Errorf("ports are declared: %v", c.Ports)
	}
	if got := flag(t, c, "listen"); got != "127.0.0.1:5050" {
		t.Errorf("it listens on %s", got)
	}
	admin := flag(t, c, "admin-listen")
	if admin != "127.0.0.1:5051" {
		t.Errorf("admin listens on %s", admin)
	}
	for name, probe := range map[string]struct {
		*corev1.Probe
		path string
	}{
		"startup":   {c.StartupProbe, "/healthz"},
		"liveness":  {c.LivenessProbe, "/healthz"},
		"readiness": {c.ReadinessProbe, "/readyz"},
	} {
		if probe.Probe == nil || probe.HTTPGet == nil {
			t.Errorf("no %s probe by HTTP", name)
			continue
		}
		if at := probe.HTTPGet.Host + ":" + probe.HTTPGet.Port.String(); at != admin || probe.HTTPGet.Path != probe.path {
			t.Errorf("the %s probe asks %s%s", name, at, probe.HTTPGet.Path)
		}
	}
}

func TestTheDaemonSetHasNoPowers(t *testing.T) {
	t.Parallel()
	pod, c := container(t)
	s := c.SecurityContext
	if s == nil {
		t.Fatal("no security context")
	}
	if s.Privileged != nil && *s.Privileged {
		t.Error("it is privileged")
	}
	if s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation {
		t.Error("it may gain privileges")
	}
	if s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
		t.Error("its root file system is writable")
	}
	if s.Capabilities == nil || len(s.Capabilities.Add) != 0 || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Errorf("capabilities: %+v", s.Capabilities)
	}
	if pod.SecurityContext == nil || pod.SecurityContext.SeccompProfile == nil ||
		pod.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Error("no seccomp profile")
	}
	if pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
		t.Error("it gets a token for the API server")
	}
	if pod.HostPID || pod.HostIPC {
		t.Error("it shares more of the host than its network")
	}
}

func TestTheDaemonSetKeepsItsDataOnTheNode(t *testing.T) {
	t.Parallel()
	pod, c := container(t)
	if len(pod.Volumes) != 1 || pod.Volumes[0].HostPath == nil {
		t.Fatalf("volumes: %+v", pod.Volumes)
	}
	v := pod.Volumes[0]
	if v.HostPath.Path != "/var/lib/tarn" || v.HostPath.Type == nil || *v.HostPath.Type != corev1.HostPathDirectoryOrCreate {
		t.Errorf("host path: %+v", v.HostPath)
	}
	if len(c.VolumeMounts) != 1 || c.VolumeMounts[0].Name != v.Name || c.VolumeMounts[0].ReadOnly {
		t.Fatalf("mounts: %+v", c.VolumeMounts)
	}
	if dir := flag(t, c, "dir"); dir != c.VolumeMounts[0].MountPath {
		t.Errorf("the data goes to %s, the volume is at %s", dir, c.VolumeMounts[0].MountPath)
	}
	// The kubelet makes a hostPath directory root's; without capabilities only
	// its owner can write there.
	if u := c.SecurityContext.RunAsUser; u == nil || *u != 0 {
		t.Errorf("it runs as user %v", u)
	}
}

func TestTheProgramTakesTheArgumentsOfTheDaemonSet(t *testing.T) {
	t.Parallel()
	_, c := container(t)
	program := filepath.Join(t.TempDir(), "tarn")
	build := exec.Command("go", "build", "-trimpath", "-o", program, "./cmd/tarn")
	build.Dir = ".."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	binary, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer binary.Close()
	for _, p := range binary.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("built as for the image, it needs a loader that the image does not have")
		}
	}
	// Help is printed instead of running, but only once all flags are known.
	args := append(slices.Clone(c.Args), "--help")
	if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
		t.Errorf("tarn %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestContainerdAsksTarnFirstAndThenTheRegistry(t *testing.T) {
	t.Parallel()
	_, c := container(t)
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
		if tarn.Scheme != "http" || tarn.Host != flag(t, c, "listen") || tarn.Path != "/v2" {
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
