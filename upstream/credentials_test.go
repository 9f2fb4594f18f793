// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// helper puts a docker-credential-lab into the PATH.
func helper(t *testing.T, script string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-lab"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return dir
}

func writeDockerConfig(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDockerConfigFindsTheRegistrysCredential(t *testing.T) {
	dir := helper(t, `read server; echo "$server" >> "$0.asked"; echo "{\"ServerURL\":\"$server\",\"Username\":\"u\",\"Secret\":\"s\"}"`)
	for _, c := range []struct {
		name    Name
		content string
		want    Secret
	}{
		{"lab.test", `{"auths":{"lab.test":{"auth":"dTpw"}}}`, Secret{Username: "u", Password: "p"}},
		{"lab.test:5000", `{"auths":{"https://lab.test:5000/v2/":{"auth":"dTpw"}}}`, Secret{Username: "u", Password: "p"}},
		{"docker.io", `{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOnE="}}}`, Secret{Username: "u", Password: "p:q"}},
		{"lab.test", `{"auths":{"lab.test":{"identitytoken":"i"}}}`, Secret{IdentityToken: "i"}},
		{"lab.test", `{"auths":{"lab.test":{"registrytoken":"r"}}}`, Secret{RegistryToken: "r"}},
		{"lab.test", `{"auths":{"other.test":{"auth":"dTpw"}}}`, Secret{}},
		{"lab.test", `{}`, Secret{}},
		{"lab.test", `{"credsStore":"lab"}`, Secret{Username: "u", Password: "s"}},
		{"lab.test", `{"credsStore":"none","credHelpers":{"lab.test":"lab"}}`, Secret{Username: "u", Password: "s"}},
	} {
		d := NewDockerConfig(writeDockerConfig(t, c.content), c.name)
		for range 3 {
			got, err := d.Get(t.Context(), "lab.test/app")
			if err != nil || got != c.want {
				t.Errorf("%s in %s: %v, %v", c.name, c.content, got, err)
			}
		}
	}
	asked, err := os.ReadFile(filepath.Join(dir, "docker-credential-lab.asked"))
	if n := strings.Count(string(asked), "lab.test\n"); err != nil || n != 2 {
		t.Errorf("two configurations asked the helper %d times", n)
	}
}

func TestABrokenHelperIsNamedAndNotQuoted(t *testing.T) {
	for _, c := range []struct{ name, script, want string }{
		{"rubbish", `echo canary-rubbish`, "printed something that is no credential"},
		{"another JSON", `echo '["canary-rubbish"]'`, "printed something that is no credential"},
		{"nothing", ``, "printed something that is no credential"},
		{"an error of its own", `echo canary-rubbish; exit 1`, "failed"},
		{"hangs", `exec sleep 60`, "did not answer in"},
		{"hangs in a child", `sleep 1 & wait`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			helper(t, c.script)
			path := writeDockerConfig(t, `{"credsStore":"lab"}`)
			d := NewDockerConfig(path, "lab.test")
			d.timeout = 200 * time.Millisecond
			_, err := d.Get(t.Context(), "lab.test/app")
			if err == nil || !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
				t.Fatalf("%v", err)
			}
			if c.want != "" && !strings.Contains(err.Error(), `"docker-credential-lab"`) {
				t.Errorf("it does not name the program: %v", err)
			}
			if strings.Contains(err.Error(), "canary") {
				t.Errorf("it quotes the program: %v", err)
			}
			// The next one is told at once.
			if _, again := d.Get(t.Context(), "lab.test/app"); again == nil {
				t.Error("no error the second time")
			}
		})
	}
}

func TestAChangedFileIsReadAgain(t *testing.T) {
	path := writeDockerConfig(t, `rubbish`)
	d := NewDockerConfig(path, "lab.test")
	for _, err := range []error{d.Check(), func() error { _, err := d.Get(t.Context(), "lab.test/app"); return err }()} {
		if !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), path) {
			t.Fatalf("%v", err)
		}
	}
	for i := range 3 {
		content := fmt.Sprintf(`{"auths":{"lab.test":{"username":"u","password":"p%s"}}}`, strings.Repeat("x", i))
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := d.Get(t.Context(), "lab.test/app")
		if err != nil || got.Password != "p"+strings.Repeat("x", i) {
			t.Fatalf("%v, %v", got, err)
		}
	}
	os.Remove(path)
	if _, err := d.Get(t.Context(), "lab.test/app"); err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("%v", err)
	}
	if _, err := NewDockerConfig(t.TempDir(), "lab.test").Get(t.Context(), "lab.test/app"); err == nil || !strings.Contains(err.Error(), "is no file") {
		t.Errorf("%v", err)
	}
}
