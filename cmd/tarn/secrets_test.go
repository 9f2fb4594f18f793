// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/base64"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tarn/internal/registrytest"
)

// TestNoSecretIsLeftAnywhere gives tarn passwords, tokens and signed URLs, makes
// it fail and crash, and looks for them in all that it wrote and answered.
func TestNoSecretIsLeftAnywhere(t *testing.T) {
	t.Parallel()
	r, cdn := registrytest.New(t), registrytest.New(t)
	r.Access = registrytest.NewAccess(t, "Bearer")
	for _, user := range []string{"a", "node"} {
		r.Access.Allow("private/app", user)
	}
	r.Access.Allow("platform/app", "node")
	layer := []byte(strings.Repeat("a layer ", 50_000))
	img := r.Image("private/app", "v1", layer)
	r.Image("platform/app", "v1", layer)
	hang := make(chan struct{})
	defer close(hang)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		switch {
		case strings.HasSuffix(req.URL.Path, img.Layers[0].String()):
			http.Redirect(w, req, cdn.URL+"/data?X-Amz-Signature=canary-signature", http.StatusTemporaryRedirect)
		case strings.HasSuffix(req.URL.Path, "/manifests/hangs"):
			<-hang
		default:
			return false
		}
		return true
	}
	cdn.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Header.Get("Range") != "" { // the second half never comes
			http.Error(w, "expired canary-words", http.StatusForbidden)
			return true
		}
		w.Write(layer)
		return true
	}

	dir, files := t.TempDir(), t.TempDir()
	nodeConfig := filepath.Join(files, "config.json")
	if err := os.WriteFile(nodeConfig, fmt.Appendf(nil, `{"auths":{"lab.test":{"username":"node","password":%q}}}`, registrytest.Password("node")), 0o600); err != nil {
		t.Fatal(err)
	}
	p := runWith(t, dir, fmt.Sprintf(`
log_level: debug
default_upstream: lab.test
upstreams:
- name: lab.test
  endpoints: [%q]
  realm: %s/token
  token_broker: true
  credentials: {docker_config: %q}
  share: ["platform/*"]
- name: dead.test
  endpoints: ["http://127.0.0.1:1"]
  credentials: {docker_config: %q}
`, r.URL, r.Access.Service.URL, nodeConfig, filepath.Join(files, "missing.json")))

	var said strings.Builder
	do := func(method, path, authorization string) {
		t.Helper()
		req, err := http.NewRequest(method, p.url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if authorization != "" {
			req.Header.Set("Authorization", authorization)
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		if strings.HasPrefix(path, "/token") && resp.StatusCode == 200 {
			return // a client's own token is what it asked for
		}
		fmt.Fprintf(&said, "%v %s\n", resp.Header, body)
	}
	basic := registrytest.Basic("a", registrytest.Password("a"))
	tokens := []string{"", basic, registrytest.Basic("a", "canary-guess"), r.Access.Login("private/app", "a")[1],
		r.Access.Login("private/app", "b")[1], "Bearer canary-forged", "canary-no-scheme", "Bearer e30." +
			base64.RawURLEncoding.EncodeToString([]byte(`{"exp":1,"sub":"canary"}`)) + ".canary"}
	paths := []string{
		"/v2/", "/lab.test/v2/", "/v2/private/app/manifests/v1?ns=lab.test", "/v2/lab.test/private/app/manifests/v1",
		"/v2/private/app/blobs/" + img.Layers[0].String() + "?ns=lab.test", "/v2/private/app/manifests/none?ns=lab.test",
		"/v2/platform/app/manifests/v1?ns=lab.test", "/v2/x/manifests/v1?ns=dead.test",
		"/v2/x/manifests/v1?ns=user:canary-password@lab.test", "/v2/private/app/tags/list?ns=lab.test&n=2&token=canary-query",
		"/v2/x/manifests/v1?ns=lab.test&canary-query=1", "/token?scope=repository:lab.test/private/app:pull&canary-query=1",
		"/token?scope=repository:dead.test/private/app:pull", "/token?scope=canary-scope",
	}
	for range 2 {
		for _, path := range paths {
			for _, token := range tokens {
				do("GET", path, token)
				do("HEAD", path, token)
			}
		}
		p.until("the layer is stored", func() bool {
			_, err := os.Stat(filepath.Join(dir, "blobs", "sha256", img.Layers[0].Encoded()))
			return err == nil
		})
	}
	resp, err := http.PostForm(p.url+"/token", url.Values{
		"grant_type": {"password"}, "username": {"a"}, "password": {"canary-posted"}, "scope": {"repository:lab.test/private/app:pull"}})
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	fmt.Fprintf(&said, "%v %s\n", resp.Header, body)

	look := func(where, text string) {
		t.Helper()
		for _, secret := range append(tokens, registrytest.Basic("node", registrytest.Password("node"))) {
			if _, value, ok := strings.Cut(secret, " "); ok && strings.Contains(text, value) {
				t.Errorf("%s has %q", where, value)
			}
		}
		if i := strings.Index(text, "canary"); i >= 0 {
			t.Errorf("%s: ...%s", where, text[max(0, i-100):min(len(text), i+100)])
		}
	}
	look("an answer", said.String())
	for _, path := range []string{"/metrics", "/api/v1/status", "/readyz", "/healthz"} {
		resp, err := http.Get(p.admin + path)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		look(path, string(text))
	}

	// A crash in the middle of a question that carries one.
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		req, err := http.NewRequest("GET", p.url+"/v2/private/app/manifests/hangs?ns=lab.test", nil)
		if err != nil {
			t.Error(err)
			return
		}
		req.Header.Set("Authorization", tokens[3])
		if resp, err := http.DefaultTransport.RoundTrip(req); err == nil {
			resp.Body.Close()
		}
	}()
	p.until("the registry is asked", func() bool { return r.Count("HEAD", "/manifests/hangs") > 0 })
	p.Process.Signal(syscall.SIGQUIT)
	<-p.exited
	<-gone
	output := p.output.String()
	if !strings.Contains(output, "SIGQUIT") || !strings.Contains(output, "goroutine ") {
		t.Fatal("there is no crash dump to look at")
	}
	look("the log or the crash dump", output)
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		look(path, string(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
