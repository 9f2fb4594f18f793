// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tarn's own image, as make image writes it.
const (
	imageName, imageVersion = upstreamName + "/tarn", "1.2.3"
	imageUser               = 15050
)

// startContainer runs tarn's image as the DaemonSet does, but as the image's own user,
// who can write the data directory and nothing else.
func (n *node) startContainer(t *testing.T, c ctr) {
	t.Helper()
	settings := folder(t, work(), "settings")
	text := fmt.Sprintf("min_free: 0\nlisten: %s\nadmin_listen: %s\nupstreams:\n- name: %s\n  endpoints: [http://%s]\n", tarnAddr, tarnAdminAddr, upstreamName, forTarnAddr)
	if err := os.WriteFile(filepath.Join(settings, "tarn.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(n.tarnDir, imageUser, imageUser); err != nil {
		t.Fatal(err)
	}
	c.mustCommand(t, "images", "import", filepath.Join(work(), "image", "tarn-"+imageVersion+".oci.tar"))
	n.tarn = start(t, "tarn in a container", "ctr", "--address", containerdSocket, "--namespace", c.namespace, "run", "--rm",
		"--net-host", "--read-only", "--cgroup", cgroupParent()+"/tarn", "--env", "TARN_CONFIG=/etc/tarn/tarn.yaml",
		"--mount", "type=bind,src="+settings+",dst=/etc/tarn,options=rbind:ro",
		"--mount", "type=bind,src="+n.tarnDir+",dst=/var/lib/tarn,options=rbind:rw",
		imageName+":"+imageVersion, "tarn")
	waitFor(t, "tarn serves", func() error {
		if err := n.tarn.alive(); err != nil {
			t.Fatalf("%v; its log:\n%s", err, n.tarn.tail(t))
		}
		resp, err := http.Get("http://" + tarnAddr + "/v2/")
		if err == nil {
			resp.Body.Close()
		}
		return err
	})
}

// TestTheImageServesContainerdAsNobodysUser: with a root file system that cannot be
// written, no power, and a user that no other image has.
func TestTheImageServesContainerdAsNobodysUser(t *testing.T) {
	n := &node{registry: newRegistry(t, nil), tarnDir: folder(t, work(), "tarn")}
	n.containerd = startContainerd(t)
	c := n.ctr("tarn")
	n.startContainer(t, c)

	tasks := strings.Fields(c.mustCommand(t, "tasks", "ls"))
	status, err := os.ReadFile("/proc/" + tasks[len(tasks)-2] + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{fmt.Sprintf("\nUid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\n", imageUser), "\nCapEff:\t0000000000000000\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("not %q:\n%s", want, status)
		}
	}

	client := &criClient{n.containerd, n.containerd.dialCRI(t)}
	pushPause(t)
	i := pushSaying(t, "public", "v1", "through the container")
	for _, cold := range []bool{true, false} {
		n.registry.take()
		mustPull(t, client, i.ref())
		for _, r := range n.registry.take() {
			if r.route == pastTarn || !cold && r.method == http.MethodGet && strings.Contains(r.path, "/blobs/") {
				t.Errorf("cold %v: %s (%d)", cold, r, r.status)
			}
		}
		wantDigest(t, client, i.ref(), i)
		client.forget(t, i.ref())
	}

	// As kubectl exec runs it: by its name alone, where there is no shell.
	exec := func(args ...string) string {
		t.Helper()
		return c.mustCommand(t, append([]string{"tasks", "exec", "--exec-id", "e" + args[len(args)-1], "tarn"}, args...)...)
	}
	if out := exec("tarn", "version"); !strings.HasPrefix(out, "tarn "+imageVersion+" (commit ") {
		t.Errorf("%q", out)
	}
	if out := exec("tarn", "images"); !strings.Contains(out, upstreamName+"/public") {
		t.Errorf("%q", out)
	}
	if out := exec("tarn", "reload"); out != "reloaded\n" {
		t.Errorf("%q", out)
	}
	if out, err := c.command(t.Context(), "tasks", "exec", "--exec-id", "sh", "tarn", "sh", "-c", "true"); err == nil {
		t.Errorf("there is a shell: %s", out)
	}
}
