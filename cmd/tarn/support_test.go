// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tarn/internal/registrytest"
)

// unpack are the files of an archive, by their names in its one folder.
func unpack(t *testing.T, data []byte) map[string]string {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Mode != 0o600 || !strings.HasPrefix(path.Dir(h.Name), "tarn-support-") {
			t.Errorf("%s has mode %o", h.Name, h.Mode)
		}
		files[path.Base(h.Name)] = readAll(t, r)
	}
}

// planted is what a node has that is nobody else's to know.
const (
	registryPassword = "registry-canary-1"
	proxyPassword    = "proxy-canary-2"
	oddPassword      = "proxy/canary@2" // as nobody should write it
	clientToken      = "token-canary-3"
	commentPassword  = "comment-canary-4"
	misplacedKey     = "misplaced-canary-5"
	variableSecret   = "variable-canary-6"
	querySecret      = "query-canary-7"
)

// plant starts a tarn that has to do with all of them.
func plant(t *testing.T, r *registrytest.Registry) (p *process, environment []string, key string) {
	t.Helper()
	dir := t.TempDir()
	f := nodeFiles(t)
	docker := filepath.Join(t.TempDir(), "config.json")
	auth := base64.StdEncoding.EncodeToString([]byte("robot:" + registryPassword))
	if err := os.WriteFile(docker, fmt.Appendf(nil, `{"auths":{"lab.test":{"auth":%q}}}`, auth), 0o600); err != nil {
		t.Fatal(err)
	}
	environment = []string{
		"HTTPS_PROXY=http://agent:" + proxyPassword + "@127.0.0.1:1", "TARN_SECRET=" + variableSecret, "UNRELATED=" + variableSecret,
	}
	settings := "# the password is " + commentPassword + "\n" + tlsSettings(f) + upstreamsOf(r.URL, "  credentials: {docker_config: "+docker+"}\n")
	p = runPrepared(t, dir, settings, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, environment...) })
	pem, err := os.ReadFile(f.ServerKey)
	if err != nil {
		t.Fatal(err)
	}
	return p, environment, strings.Split(string(pem), "\n")[1]
}

func TestASupportArchiveHasWhatHelpsAndNoSecret(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	img := r.Image("team/app", "v1", []byte("a layer"))
	p, environment, key := plant(t, r)
	req, err := http.NewRequest("GET", p.url+"/v2/team/app/manifests/v1?ns=lab.test&sig="+querySecret, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+clientToken)
	resp, err := p.client.Do(req)
	if err != nil || readAll(t, resp.Body) != string(img.Body) {
		t.Fatal(resp, err)
	}
	file := filepath.Join(t.TempDir(), "report.tar.gz")
	support := func(args ...string) (string, error) {
		cmd := command(append([]string{"support", "--admin", p.socket()}, args...)...)
		cmd.Env = append(cmd.Env, environment...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	said, err := support(file)
	if err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info.Mode(), err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	files := unpack(t, data)
	for name, want := range map[string]string{
		"version.txt": "tarn devel", "config.yaml": "docker_config: ", "environment.txt": "HTTPS_PROXY=http://LEFT-OUT@127.0.0.1:1",
		"goroutines.txt": "serveAll", "status.json": `"lab.test"`, "metrics.txt": "tarn_build_info", "ready.json": `"ready": true`,
		"hosts-check.txt": ": ", "README.txt": "names of images",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s lacks %q:\n%.2000s", name, want, files[name])
		}
	}
	for _, want := range []string{`"TARN_SECRET=LEFT-OUT"`, `"HTTPS_PROXY=http://LEFT-OUT@127.0.0.1:1"`, `"config": "/`} {
		if !strings.Contains(files["process.json"], want) {
			t.Errorf("process.json lacks %s", want)
		}
	}
	auth := base64.StdEncoding.EncodeToString([]byte("robot:" + registryPassword))
	files["what it says"] = said
	for name, text := range files {
		for _, secret := range []string{registryPassword, auth, proxyPassword, clientToken, commentPassword, variableSecret, querySecret, key} {
			if strings.Contains(text, secret) {
				t.Errorf("%s has the secret %q", name, secret)
			}
		}
		if name != "what it says" && name != "README.txt" && !strings.Contains(said, name) {
			t.Errorf("it does not say that %s is in it:\n%s", name, said)
		}
	}
	if !strings.Contains(said, "names of images") || !strings.HasPrefix(said, "wrote "+file) {
		t.Errorf("it says:\n%s", said)
	}
	if said, err := support(file); err == nil || !strings.Contains(said, "is there already") {
		t.Errorf("a second one: %v\n%s", err, said)
	}
	// What the process is at is nobody else's to read.
	resp, err = http.Get(p.admin + "/api/v1/process")
	if err != nil {
		t.Fatal(err)
	}
	if text := readAll(t, resp.Body); resp.StatusCode != http.StatusForbidden || strings.Contains(text, "goroutine") {
		t.Errorf("over TCP: %d\n%s", resp.StatusCode, text)
	}
	p.terminate()
}

// TestASupportArchiveIsWrittenWhileTarnIsAway, which is when it is needed most.
func TestASupportArchiveIsWrittenWhileTarnIsAway(t *testing.T) {
	t.Parallel()
	config := filepath.Join(t.TempDir(), "tarn.yaml")
	if err := os.WriteFile(config, []byte("dir: "+t.TempDir()+"\nadmin_listen: "+freePort(t)+"\nadmin_socket: \"off\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := command("support", "--config", config, "-")
	var told bytes.Buffer
	cmd.Stderr = &told
	data, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, told.String())
	}
	files := unpack(t, data)
	if !strings.Contains(files["config.yaml"], "admin_listen: 127.0.0.1:") || files["status.json"] != "" {
		t.Errorf("%v", files)
	}
	for _, said := range []string{told.String(), files["README.txt"]} {
		if !strings.Contains(said, "could not be had: process.json, goroutines.txt, status.json") || strings.Contains(said, "Get ") || !strings.Contains(said, "is tarn running?") {
			t.Errorf("it says:\n%s", said)
		}
	}
}

func TestWhatIsReportedOfAConfiguration(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]string{
		"listen: 127.0.0.1:5050 # " + commentPassword: "listen: 127.0.0.1:5050\n",
		"password: " + misplacedKey:                   "password: LEFT-OUT\n",
		"upstreams:\n- name: a.test\n  proxy: http://agent:" + oddPassword + "@proxy:3128\n  secret: {a: [" + misplacedKey + "]}\n":   "upstreams:\n  - name: a.test\n    proxy: http://LEFT-OUT@proxy:3128\n    secret: LEFT-OUT\n",
		"upstreams: [{name: a.test, realm: 'https://auth.test/token?key=" + querySecret + "'}]":                                       "upstreams: [{name: a.test, realm: 'https://auth.test/token?LEFT-OUT'}]\n",
		`upstreams: [{name: a.test, proxy: {url: "http://agent:it's ` + misplacedKey + `@proxy:3128/it's?key=` + querySecret + `"}}]`: "upstreams: [{name: a.test, proxy: {url: \"http://LEFT-OUT@proxy:3128/it's?LEFT-OUT\"}}]\n",
		"upstreams: [{name: a.test, proxy: {url: 'agent:" + misplacedKey + "@proxy:3128'}}]":                                          "upstreams: [{name: a.test, proxy: {url: 'LEFT-OUT@proxy:3128'}}]\n",
		"": "",
	} {
		if got, err := reportedConfig([]byte(given)); err != nil || string(got) != want {
			t.Errorf("%q is reported as %q, %v, and not %q", given, got, err, want)
		}
	}
	if got, err := reportedConfig([]byte("a: [" + misplacedKey)); !errors.Is(err, errNoYAML) || len(got) > 0 {
		t.Errorf("%q, %v", got, err)
	}
}

func TestWhatIsReportedOfTheEnvironment(t *testing.T) {
	t.Parallel()
	got := reportedEnvironment([]string{
		"https_proxy=agent:" + oddPassword + "@proxy:3128", "HTTP_PROXY=http://agent:" + oddPassword + "@proxy:3128/x?y=" + querySecret,
		"TARN_CONFIG=/etc/tarn.yaml", "TARN_TOKEN=" + variableSecret, "AWS_SECRET_ACCESS_KEY=" + variableSecret, "NO_PROXY=a,b", "TARNISH=x", "ALL_PROXY=http://a:it's@b?it's " + querySecret, "TARN_ADMIN=http://b?x@" + querySecret,
	})
	want := []string{"ALL_PROXY=http://LEFT-OUT@b?LEFT-OUT", "HTTP_PROXY=http://LEFT-OUT@proxy:3128/x?LEFT-OUT", "NO_PROXY=a,b", "TARN_ADMIN=http://LEFT-OUT", "TARN_CONFIG=/etc/tarn.yaml", "TARN_TOKEN=LEFT-OUT", "https_proxy=LEFT-OUT@proxy:3128"}
	if !slices.Equal(got, want) {
		t.Errorf("%q\nand not\n%q", got, want)
	}
}
