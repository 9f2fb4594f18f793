// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	sigsyaml "sigs.k8s.io/yaml"
)

// render is what Helm makes of the chart with these values, as the API server of a
// version would decode it, with strict field validation.
func render(t *testing.T, namespace, values string) (objects []runtime.Object, err error) {
	t.Helper()
	c, err := loader.Load("chart")
	if err != nil {
		t.Fatal(err)
	}
	return renderChart(t, c, namespace, values)
}

func renderFiles(t *testing.T, c *chart.Chart, namespace, values string) map[string]string {
	t.Helper()
	files, err := renderTemplates(t, c, namespace, values)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func renderTemplates(t *testing.T, c *chart.Chart, namespace, values string) (map[string]string, error) {
	t.Helper()
	var given map[string]any
	if err := sigsyaml.Unmarshal([]byte(values), &given); err != nil {
		t.Fatal(err)
	}
	capabilities := chartutil.DefaultCapabilities.Copy()
	capabilities.KubeVersion = chartutil.KubeVersion{Version: "v1.36.3", Major: "1", Minor: "36"}
	all, err := chartutil.ToRenderValues(c, given, chartutil.ReleaseOptions{Name: "tarn", Namespace: namespace, Revision: 1, IsInstall: true}, capabilities)
	if err != nil {
		return nil, err
	}
	return engine.Render(c, all)
}

func renderChart(t *testing.T, c *chart.Chart, namespace, values string) (objects []runtime.Object, err error) {
	t.Helper()
	files, err := renderTemplates(t, c, namespace, values)
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasSuffix(name, ".txt") || strings.HasSuffix(name, ".tpl") {
			continue
		}
		objects = append(objects, decodeAll(t, name, []byte(files[name]))...)
	}
	return objects, nil
}

// decodeAll decodes strictly what the core types are; of others, which a cluster may
// have, it only takes that they are objects.
func decodeAll(t *testing.T, name string, text []byte) (objects []runtime.Object) {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	documents := yaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text)))
	defer documents.Close()
	for buf := make([]byte, 4<<20); ; {
		n, err := documents.Read(buf)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(bytes.TrimSpace(bytes.TrimPrefix(bytes.TrimSpace(buf[:n]), []byte("# SPDX-License-Identifier: Apache-2.0")))) == 0 {
			continue
		}
		var kind struct{ APIVersion string }
		if err := sigsyaml.Unmarshal(buf[:n], &kind); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, buf[:n])
		}
		if strings.HasPrefix(kind.APIVersion, "monitoring.coreos.com/") {
			continue
		}
		o, _, err := decoder.Decode(buf[:n], nil, nil)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, buf[:n])
		}
		objects = append(objects, o)
	}
}

// one is the object of that type.
func one[T runtime.Object](t *testing.T, objects []runtime.Object) (found T) {
	t.Helper()
	n := 0
	for _, o := range objects {
		if is, ok := o.(T); ok {
			found = is
			n++
		}
	}
	if n != 1 {
		t.Fatalf("there are %d of %T", n, found)
	}
	return found
}

func containers(spec corev1.PodSpec) map[string]corev1.Container {
	all := make(map[string]corev1.Container)
	for _, c := range append(slices.Clone(spec.InitContainers), spec.Containers...) {
		all[c.Name] = c
	}
	return all
}

func TestTheChartRendersOverAMatrix(t *testing.T) {
	for name, values := range map[string]string{
		"defaults":           "",
		"by digest":          "image: {digest: sha256:" + strings.Repeat("a", 64) + "}",
		"without hosts":      "hosts: {enabled: false}",
		"as root":            "prepare: false",
		"metrics":            "metrics: {enabled: true, serviceMonitor: {enabled: true, interval: 30s, labels: {release: p}}, prometheusRule: {enabled: true}, dashboard: {enabled: true, annotations: {folder: tarn}}}",
		"cleanup":            "cleanup: {data: true}",
		"files":              "files: [{secret: s, path: /etc/tarn/credentials}, {configMap: c, path: /etc/tarn/ca}]\nconfig: {upstreams: [{name: 'registry.corp:5000', ca_file: /etc/tarn/ca/ca.crt, credentials: {docker_config: /etc/tarn/credentials/config.json}}]}",
		"all that is extra":  "podAnnotations: {a: b}\npodLabels: {c: d}\nextraArgs: ['--max-size=1GiB']\nextraEnv: [{name: HTTPS_PROXY, value: 'http://p:1'}]\nextraVolumes: [{name: x, emptyDir: {}}]\nextraVolumeMounts: [{name: x, mountPath: /x}]\nseLinuxOptions: {type: spc_t}\nimagePullSecrets: [r]",
		"nothing about node": "priorityClassName: ''\naffinity: null\ntolerations: []\nnodeSelector: null",
	} {
		t.Run(name, func(t *testing.T) {
			objects, err := render(t, "tarn", values)
			if err != nil {
				t.Fatal(err)
			}
			set := one[*appsv1.DaemonSet](t, objects)
			spec := set.Spec.Template.Spec
			if !spec.HostNetwork || spec.DNSPolicy != corev1.DNSDefault || *spec.AutomountServiceAccountToken {
				t.Errorf("%+v", spec)
			}
			if len(spec.Containers) != 1 || set.Spec.Template.Annotations["kubectl.kubernetes.io/default-container"] != "tarn" {
				t.Errorf("%d containers, %v", len(spec.Containers), set.Spec.Template.Annotations)
			}
			for _, c := range containers(spec) {
				s := c.SecurityContext
				if len(c.Ports) > 0 || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) ||
					(c.Name == "tarn" && name != "cleanup" || c.Name == "hosts") && len(s.Capabilities.Add) > 0 {
					t.Errorf("%s: %+v", c.Name, s)
				}
				if c.Resources.Requests.Memory().IsZero() || c.Resources.Requests.Cpu().IsZero() || c.Resources.Limits.Memory().IsZero() {
					t.Errorf("%s: %+v", c.Name, c.Resources)
				}
				for _, m := range c.VolumeMounts {
					if !slices.ContainsFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
						t.Errorf("%s mounts %s, which is no volume", c.Name, m.Name)
					}
				}
			}
			if name == "cleanup" {
				return
			}
			tarn := containers(spec)["tarn"]
			if user := *tarn.SecurityContext.RunAsUser; (user == 0) != (name == "as root") {
				t.Errorf("tarn is user %d", user)
			}
			for _, p := range []*corev1.Probe{tarn.StartupProbe, tarn.LivenessProbe, tarn.ReadinessProbe} {
				if p.HTTPGet == nil || p.HTTPGet.Host != "127.0.0.1" {
					t.Errorf("%+v", p)
				}
			}
		})
	}
}

func TestTheChartRefusesWhatItDoesNotKnow(t *testing.T) {
	for values, want := range map[string]string{
		"hosst: {enabled: false}":             "hosst",
		"ports: {registry: 70000}":            "65,535",
		"image: {digest: latest}":             "digest",
		"updateStrategy: {maxUnavailable: 0}": "maxUnavailable",
		"files: [{path: /x}]":                 "files",
		"config: {listen: '0.0.0.0:1'}":       "config.listen is the chart's",
		"config: {metrics_listen: ':1'}":      "config.metrics_listen is the chart's",
	} {
		if _, err := render(t, "tarn", values); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", values, err)
		}
	}
}

func TestTheKubeletStartsHostsAfterTarnAndEndsItFirst(t *testing.T) {
	objects, err := render(t, "tarn", "")
	if err != nil {
		t.Fatal(err)
	}
	spec := one[*appsv1.DaemonSet](t, objects).Spec.Template.Spec
	if n := len(spec.InitContainers); n != 2 || spec.InitContainers[0].Name != "prepare" || spec.InitContainers[1].Name != "tarn" || spec.Containers[0].Name != "hosts" {
		t.Fatalf("%d", n)
	}
	tarn, hosts := spec.InitContainers[1], spec.Containers[0]
	if tarn.RestartPolicy == nil || *tarn.RestartPolicy != corev1.ContainerRestartPolicyAlways || tarn.StartupProbe == nil {
		t.Errorf("tarn is no sidecar: %+v", tarn)
	}
	for _, c := range []corev1.Container{tarn, hosts} {
		if !slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool {
			return e.Name == "TARN_INSTANCE" && e.ValueFrom.FieldRef.FieldPath == "metadata.uid"
		}) {
			t.Errorf("%s does not know which tarn is meant", c.Name)
		}
	}
	if slices.ContainsFunc(tarn.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == "certs" || m.Name == "run-hosts" }) {
		t.Error("tarn sees the node's settings")
	}
	for _, v := range spec.Volumes {
		if v.Name == "certs" && v.HostPath.Type != nil && *v.HostPath.Type != "" {
			t.Errorf("certs.d has the type %s, and tarn does not start where that fails", *v.HostPath.Type)
		}
	}
}

func TestAQuotaGoesWithThePriorityClass(t *testing.T) {
	for namespace, want := range map[string]int{"tarn": 1, "kube-system": 0} {
		objects, err := render(t, namespace, "")
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, o := range objects {
			if _, is := o.(*corev1.ResourceQuota); is {
				n++
			}
		}
		if n != want {
			t.Errorf("in %s there are %d quotas", namespace, n)
		}
	}
}

func TestAChangedConfigurationRollsThePods(t *testing.T) {
	sums := make(map[string]bool)
	for _, values := range []string{"", "config: {max_size: 10%}", "ports: {admin: 6051}"} {
		objects, err := render(t, "tarn", values)
		if err != nil {
			t.Fatal(err)
		}
		sums[one[*appsv1.DaemonSet](t, objects).Spec.Template.Annotations["checksum/config"]] = true
	}
	if len(sums) != 3 {
		t.Errorf("three configurations have %d sums", len(sums))
	}
}

func TestTheChartRunsOnEveryNode(t *testing.T) {
	objects, err := render(t, "tarn", "")
	if err != nil {
		t.Fatal(err)
	}
	set := one[*appsv1.DaemonSet](t, objects)
	pod := set.Spec.Template.Spec
	for k, v := range set.Spec.Selector.MatchLabels {
		if set.Spec.Template.Labels[k] != v {
			t.Errorf("the selector's %s=%s is not the pod's", k, v)
		}
	}
	if len(pod.Tolerations) != 1 || pod.Tolerations[0] != (corev1.Toleration{Operator: corev1.TolerationOpExists}) || pod.PriorityClassName != "system-node-critical" {
		t.Errorf("%+v, %s", pod.Tolerations, pod.PriorityClassName)
	}
	if s := set.Spec.UpdateStrategy; s.RollingUpdate == nil || s.RollingUpdate.MaxUnavailable.String() != "10%" {
		t.Errorf("update strategy %+v", s)
	}
	if g := pod.TerminationGracePeriodSeconds; g == nil || *g <= 25 { // which the program gives downloads
		t.Errorf("grace period %v", g)
	}
	if pod.SecurityContext.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || pod.HostPID || pod.HostIPC {
		t.Errorf("%+v", pod.SecurityContext)
	}
}

const base = "kustomize/tarn.yaml"

// TestTheKustomizeBaseIsTheChart with its defaults, in the namespace tarn. With
// TARN_UPDATE set to anything it is written.
func TestTheKustomizeBaseIsTheChart(t *testing.T) {
	c, err := loader.Load("chart")
	if err != nil {
		t.Fatal(err)
	}
	files := renderFiles(t, c, "tarn", "")
	var text strings.Builder
	text.WriteString("# SPDX-License-Identifier: Apache-2.0\n# What the chart makes with its defaults; a test keeps the two the same.\n")
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !strings.HasSuffix(name, ".yaml") || strings.Contains(name, "/tests/") {
			continue
		}
		var lines []string
		for line := range strings.Lines(files[name]) {
			if !strings.Contains(line, "app.kubernetes.io/managed-by:") && !strings.Contains(line, "SPDX-License-Identifier") {
				lines = append(lines, line)
			}
		}
		if body := strings.TrimSpace(strings.Join(lines, "")); body != "" {
			text.WriteString("---\n" + body + "\n")
		}
	}
	if os.Getenv("TARN_UPDATE") != "" {
		if err := os.WriteFile(base, []byte(text.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := string(read(t, base)); got != text.String() {
		t.Errorf("%s is not what the chart makes; TARN_UPDATE=1 go test -run Kustomize has it written", base)
	}
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), "kustomize")
	if err != nil {
		t.Fatal(err)
	}
	yaml, err := built.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	objects := decodeAll(t, "kustomize", yaml)
	if namespace, set := one[*corev1.Namespace](t, objects), one[*appsv1.DaemonSet](t, objects); set.Namespace != namespace.Name || namespace.Labels["pod-security.kubernetes.io/enforce"] != "privileged" {
		t.Errorf("%s, %+v", set.Namespace, namespace)
	}
	if _, quota := one[*corev1.ConfigMap](t, objects), one[*corev1.ResourceQuota](t, objects); quota.Namespace != "tarn" {
		t.Errorf("%+v", quota)
	}
}

func TestTheProgramTakesTheArgumentsOfTheChart(t *testing.T) {
	t.Parallel()
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
	for _, values := range []string{"", "cleanup: {data: true}"} {
		objects, err := render(t, "tarn", values)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range containers(one[*appsv1.DaemonSet](t, objects).Spec.Template.Spec) {
			args := append(slices.Clone(c.Args), "--help")
			if out, err := exec.Command(program, args...).CombinedOutput(); err != nil || !bytes.Contains(out, []byte("Usage:\n  tarn "+c.Args[0])) {
				t.Errorf("tarn %s: %v\n%s", strings.Join(args, " "), err, out)
			}
		}
	}
}

// TestTheDaemonSetSelectsItsOwnPodsOnly: its controller adopts every other pod that its
// selector matches, and deletes it as one too many.
func TestTheDaemonSetSelectsItsOwnPodsOnly(t *testing.T) {
	objects, err := render(t, "tarn", "")
	if err != nil {
		t.Fatal(err)
	}
	set := one[*appsv1.DaemonSet](t, objects)
	selector, err := metav1.LabelSelectorAsSelector(set.Spec.Selector)
	if err != nil {
		t.Fatal(err)
	}
	if !selector.Matches(labels.Set(set.Spec.Template.Labels)) {
		t.Errorf("%s does not select %v", selector, set.Spec.Template.Labels)
	}
	if probe := one[*corev1.Pod](t, objects); selector.Matches(labels.Set(probe.Labels)) {
		t.Errorf("%s selects the pod of helm test, %v", selector, probe.Labels)
	}
}
