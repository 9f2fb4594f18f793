// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/distribution/distribution/v3/configuration"
	"golang.org/x/sys/unix"
)

// A pathClient is a client that finds tarn by the path of an image's name, and
// keeps its secret under tarn's own address.
type pathClient struct {
	name string
	// everywhere: it is driven in each run, and not by make e2e-clients only.
	everywhere bool
	// start makes the client ready, and returns how it pulls: with the secret
	// of this docker config.json, or without any when that is "".
	start func(t *testing.T) (pull func(image, config string) error)
}

var pathClients = []pathClient{
	{"crane", true, func(t *testing.T) func(string, string) error {
		return func(image, config string) error {
			return command(t, dockerConfig(config), "crane", "pull", "--insecure", image, filepath.Join(t.TempDir(), "image.tar"))
		}
	}},
	{"skopeo", true, func(t *testing.T) func(string, string) error { return startSkopeo(t, "skopeo") }},
	{"podman", false, func(t *testing.T) func(string, string) error { return startPodman(t, "podman") }},
	{"skopeo of Debian 13", false, func(t *testing.T) func(string, string) error { return startSkopeo(t, ofDebian13(t, "skopeo")) }},
	{"podman of Debian 13", false, func(t *testing.T) func(string, string) error { return startPodman(t, ofDebian13(t, "podman")) }},
	{"docker of Debian 13", false, func(t *testing.T) func(string, string) error {
		return startDocker(t, ofDebian13(t, "docker"), ofDebian13(t, "dockerd"))
	}},
	{"oras", false, func(t *testing.T) func(string, string) error {
		return func(image, config string) error {
			return command(t, dockerConfig(config), "oras", "copy", "--from-plain-http", "--to-oci-layout", image, t.TempDir()+":v1")
		}
	}},
	{"regctl", false, func(t *testing.T) func(string, string) error {
		return func(image, config string) error {
			env := append(dockerConfig(config), "REGCTL_CONFIG="+filepath.Join(t.TempDir(), "regctl.json"))
			host, _, _ := strings.Cut(image, "/")
			if err := command(t, env, "regctl", "registry", "set", "--tls", "disabled", "--skip-check", host); err != nil {
				return err
			}
			return command(t, env, "regctl", "image", "copy", image, "ocidir://"+t.TempDir()+"/layout:v1")
		}
	}},
	{"docker", false, func(t *testing.T) func(string, string) error { return startDocker(t, "docker", "dockerd") }},
	{"BuildKit", false, func(t *testing.T) func(string, string) error {
		buildkit := startBuildKit(t, "")
		return func(image, config string) error { return buildkit(t, image, config) }
	}},
}

func startSkopeo(t *testing.T, skopeo string) func(string, string) error {
	return func(image, config string) error {
		args := append(authfile(config), "--src-tls-verify=false", "docker://"+image, "dir:"+t.TempDir())
		return command(t, nil, skopeo, append([]string{"--insecure-policy", "copy"}, args...)...)
	}
}

func startPodman(t *testing.T, podman string) func(string, string) error {
	policy := filepath.Join(folder(t, work(), "podman"), "policy.json")
	writeFile(t, policy, `{"default":[{"type":"insecureAcceptAnything"}]}`)
	return func(image, config string) error {
		root, err := os.MkdirTemp("/run", "podman-") // its paths have to be short
		if err != nil {
			return err
		}
		defer os.RemoveAll(root)
		return command(t, nil, podman, append(append([]string{"--root", root + "/root", "--runroot", root + "/run", "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs",
			"pull", "--signature-policy", policy, "--tls-verify=false"}, authfile(config)...), image)...)
	}
}

func startDocker(t *testing.T, docker, dockerd string) func(string, string) error {
	startContainerd(t)
	dir := folder(t, work(), "docker")
	socket := "unix:///run/docker-e2e.sock"
	p := start(t, "dockerd", dockerd, "--host", socket, "--data-root", dir, "--exec-root", "/run/docker-e2e", "--pidfile", dir+"/pid",
		"--containerd", containerdSocket, "--storage-driver", "vfs", "--iptables=false", "--ip-forward=false", "--bridge=none")
	waitFor(t, "dockerd is ready", func() error {
		if err := p.alive(); err != nil {
			t.Fatalf("%v; its log:\n%s", err, p.tail(t))
		}
		return command(t, nil, docker, "--host", socket, "version")
	})
	return func(image, config string) error {
		err := command(t, dockerConfig(config), docker, "--host", socket, "pull", image)
		command(t, nil, docker, "--host", socket, "rmi", image)
		return err
	}
}

// ofDebian13 is a client of that release, which lives in a folder and sees the
// tests' files there, at their own paths.
func ofDebian13(t *testing.T, name string) string {
	t.Helper()
	program, err := exec.LookPath(name + "-of-debian13")
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(filepath.Dir(program), "root")
	// podman wants a mount point under "/". All of it goes with the namespace.
	for _, dir := range []string{"", "/proc", "/dev", "/sys", "/run", work(), filepath.Dir(t.TempDir())} {
		at := root + dir
		if dir == "" {
			dir = root
		}
		if err := os.MkdirAll(at, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(dir, at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			t.Fatalf("mount %s: %v", at, err)
		}
		t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	}
	return program
}

// startBuildKit returns how it builds from an image, with these lines in its
// configuration.
func startBuildKit(t *testing.T, settings string) (from func(t *testing.T, image, config string) error) {
	t.Helper()
	dir := folder(t, work(), "buildkit")
	writeFile(t, filepath.Join(dir, "buildkitd.toml"), settings+"\n[registry.\""+tarnAddr+"\"]\n  http = true\n")
	socket := "unix:///run/buildkit-e2e.sock"
	p := start(t, "buildkitd", "buildkitd", "--addr", socket, "--root", filepath.Join(dir, "root"), "--config", filepath.Join(dir, "buildkitd.toml"),
		"--containerd-worker=false", "--oci-worker-snapshotter=native", "--oci-worker-net=host", "--oci-worker-gc=false")
	t.Cleanup(func() { p.kill(t) }) // in good order it ends with an error
	waitFor(t, "buildkitd is ready", func() error {
		if err := p.alive(); err != nil {
			t.Fatalf("%v; its log:\n%s", err, p.tail(t))
		}
		return command(t, nil, "buildctl", "--addr", socket, "debug", "workers")
	})
	return func(t *testing.T, image, config string) error {
		context := t.TempDir()
		writeFile(t, filepath.Join(context, "Dockerfile"), "FROM "+image+"\nLABEL a=b\n")
		return command(t, dockerConfig(config), "buildctl", "--addr", socket, "build", "--no-cache", "--frontend", "dockerfile.v0",
			"--local", "context="+context, "--local", "dockerfile="+context, "--output", "type=oci,dest="+filepath.Join(t.TempDir(), "out.tar"))
	}
}

// eachPathClient runs a test with each client that is there.
func eachPathClient(t *testing.T, test func(t *testing.T, c pathClient)) {
	for _, c := range pathClients {
		t.Run(c.name, func(t *testing.T) {
			if !c.everywhere && os.Getenv(envAllClients) == "" {
				t.Skip("a further client: make e2e-clients")
			}
			test(t, c)
		})
	}
}

// command runs a client. Its error has what it wrote.
func command(t *testing.T, env []string, name string, args ...string) error {
	t.Helper()
	// It runs while a test is being cleaned up, too.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(append(os.Environ(), "HOME="+work()), env...)
	out, err := cmd.CombinedOutput()
	var missing *exec.Error
	if errors.As(err, &missing) {
		t.Fatal(err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %.2000s", name, err, out)
	}
	return nil
}

// secretFor writes a docker config.json with one user's secret under tarn's
// address.
func secretFor(t *testing.T, key, name, secret string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.json")
	writeFile(t, file, fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, key, base64.StdEncoding.EncodeToString([]byte(name+":"+secret))))
	return file
}

func dockerConfig(file string) []string {
	if file == "" {
		return []string{"DOCKER_CONFIG=/nonexistent"}
	}
	return []string{"DOCKER_CONFIG=" + filepath.Dir(file)}
}

func authfile(file string) []string {
	if file == "" {
		return nil
	}
	return []string{"--authfile", file}
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// brokerSettings list the registry with a token broker.
const brokerSettings = "upstreams: [{name: " + upstreamName + ", token_broker: true}]\n"

// TestAPrivateImageByPathThroughTheBroker: clients that learn how to log in
// from /v2/ alone, with the secret that they keep under tarn's address; also from
// a registry that takes passwords itself, where /v2/ has no token to send for.
func TestAPrivateImageByPathThroughTheBroker(t *testing.T) {
	for _, scheme := range []string{"Bearer", "Basic"} {
		t.Run(scheme, func(t *testing.T) {
			eachPathClient(t, func(t *testing.T, c pathClient) {
				protect := basicAuth(t)
				if scheme == "Bearer" {
					_, protect = bearerAuth(t)
				}
				testBroker(t, c, protect)
			})
		})
	}
}

func testBroker(t *testing.T, c pathClient, protect configuration.Auth) {
	registry := newRegistry(t, protect)
	startTarn(t, folder(t, work(), "tarn"), brokerSettings)
	i := pushSaying(t, "team/secret", "v1", "a secret")
	image := tarnAddr + "/" + i.ref()
	pull := c.start(t)
	right := secretFor(t, tarnAddr, user, password)
	wrong := map[string]string{
		"nobody":           "",
		"a wrong password": secretFor(t, tarnAddr, user, "guess"),
		"another user":     secretFor(t, tarnAddr, stranger, password),
	}
	for who, config := range wrong {
		if err := pull(image, config); err == nil {
			t.Errorf("%s pulled the private image, cold", who)
		}
	}
	if err := pull(image, right); err != nil {
		t.Fatalf("who may have the image did not get it: %v", err)
	}
	registry.take()
	for who, config := range wrong {
		if err := pull(image, config); err == nil {
			t.Errorf("%s pulled the private image, warm", who)
		}
	}
	if err := pull(image, right); err != nil {
		t.Fatalf("who may have the image did not get it again: %v", err)
	}
	for _, r := range registry.take() {
		if strings.HasPrefix(r.method, "GET") && strings.Contains(r.path, "/blobs/") {
			t.Errorf("not from tarn's disk: %s (%d)", r, r.status)
		}
	}
}

// TestAnOpenImageByPathWithTheBrokerOn: the broker must be in nobody's way.
func TestAnOpenImageByPathWithTheBrokerOn(t *testing.T) {
	eachPathClient(t, func(t *testing.T, c pathClient) {
		newRegistry(t, nil)
		startTarn(t, folder(t, work(), "tarn"), brokerSettings)
		i := pushSaying(t, "app/open", "v1", "for everybody")
		pull := c.start(t)
		for who, config := range map[string]string{"nobody": "", "a user": secretFor(t, tarnAddr, user, password)} {
			if err := pull(tarnAddr+"/"+i.ref(), config); err != nil {
				t.Errorf("%s did not get the open image: %v", who, err)
			}
		}
	})
}
