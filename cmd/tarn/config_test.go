// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

func load(t *testing.T, text string) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tarn.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := loadConfig(path)
	if err != nil {
		err = errorString(strings.ReplaceAll(err.Error(), path, "tarn.yaml"))
	}
	return c, err
}

type errorString string

func (e errorString) Error() string { return string(e) }

func TestAnEmptyFileIsTheDefaults(t *testing.T) {
	for _, text := range []string{"", "# nothing\n", "{}"} {
		c, err := load(t, text)
		if err != nil || !reflect.DeepEqual(c, defaultConfig()) {
			t.Errorf("%q: %+v, %v", text, c, err)
		}
	}
}

func TestAFullFile(t *testing.T) {
	c, err := load(t, `
listen: 127.0.0.1:6000
admin_listen: unix:/run/tarn/admin.sock
log_level: debug
dir: /data
max_size: 40%
min_free: 1GiB
default_upstream: ghcr.io
allow: listed
prefetch: off
defaults: {head_timeout: 2s, grant_ttl: 60s}
upstreams:
  - name: registry.corp:5000
    endpoints: [https://registry.corp:5000, {url: "http://mirror.corp/x", trusted: true}]
    insecure_skip_verify: true
    head_timeout: 3s
    token_broker: false
`)
	if err != nil {
		t.Fatal(err)
	}
	u := c.Upstreams[0]
	if c.MaxSize.Bytes(1000) != 400 || c.MinFree.Bytes(0) != 1<<30 || c.Defaults.HeadTimeout != 2*time.Second ||
		len(u.Endpoints) != 2 || !u.Endpoints[1].Trusted || u.HeadTimeout != 3*time.Second || !u.InsecureSkipVerify {
		t.Errorf("%+v", c)
	}
}

func TestMistakesNameFileLineAndKey(t *testing.T) {
	for text, want := range map[string]string{
		"listen: 127.0.0.1:1\nmax_sise: 5\n":                               `tarn.yaml:2: unknown key "max_sise"`,
		"upstreams:\n- name: a.b\n  endpoint: x\n":                         `tarn.yaml:3: unknown key "endpoint"`,
		"max_size: 5 apples\n":                                             `tarn.yaml:1: "5 apples" is not a size, as in "50GiB", "500MB", "1073741824" or "40%"`,
		"max_size: -1\n":                                                   `tarn.yaml:1: "-1" is not a size, as in "50GiB", "500MB", "1073741824" or "40%"`,
		"max_size: 101%\n":                                                 `tarn.yaml:1: "101%" is more than the whole filesystem`,
		"max_size: 99999999TiB\n":                                          `tarn.yaml:1: "99999999TiB" is more than any disk has`,
		"max_size: 0\n":                                                    `tarn.yaml: max_size: must be more than 0`,
		"prefetch: layers\n":                                               `tarn.yaml:1: key "prefetch": not yet supported; remove it, or leave it at its default`,
		"defaults:\n  stale_if_error: 1h\n":                                `tarn.yaml:2: key "stale_if_error": not yet supported; remove it, or leave it at its default`,
		"upstreams:\n- name: a.b\n  share: [x]\n":                          `tarn.yaml:3: key "share": not yet supported; remove it, or leave it at its default`,
		"upstreams:\n- name: a.b\n  endpoints:\n  - ftp://x\n":             `tarn.yaml:4: endpoint: endpoint "ftp://x": the scheme must be http or https`,
		"upstreams:\n- name: a.b\n  endpoints: [\"https://u:p@x\"]\n":      `tarn.yaml:3: endpoint: endpoint "https://u:xxxxx@x": user info, query and fragment have no place here`,
		"upstreams:\n- name: a.b\n  endpoints: [{url: https://x, y: 1}]\n": `tarn.yaml:3: unknown key "y"`,
		"upstreams: [{name: a.b}, {name: A.B.}]\n":                         `tarn.yaml: upstreams: a.b is listed twice`,
		"upstreams: [{name: a/b}]\n":                                       `tarn.yaml: upstreams: name "a/b": not a registry name: "a/b" is not a host name`,
		"allow: some\n":                                                    `tarn.yaml: allow: "some" is neither public nor listed`,
		"listen: nowhere\n":                                                `tarn.yaml: listen: "nowhere" is not host:port`,
		"defaults: {head_timeout: 20s}\n":                                  `tarn.yaml: defaults: head_timeout: 20s is not more than 0 and at most 8s, which leaves time to answer`,
		"log_level: info\nlog_level: debug\n":                              `tarn.yaml:2: mapping key "log_level" already defined at line 1`,
		"listen: a:1\n---\nlisten: b:1\n":                                  `tarn.yaml: more than one YAML document`,
		"listen: [\n":                                                      `tarn.yaml:1: did not find expected node content`,
	} {
		if _, err := load(t, text); err == nil || err.Error() != want {
			t.Errorf("%q:\n got %v\nwant %s", text, err, want)
		}
	}
}

func TestFlagsOverrideTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tarn.yaml")
	if err := os.WriteFile(path, []byte("dir: /a\nupstreams: [{name: lab.test, endpoints: [https://x]}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var f serveFlags
	set := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	f.register(set)
	if err := set.Parse([]string{"--config", path, "--dir", "/b", "--max-size", "1GB", "--admin-listen", "",
		"--upstream", "LAB.test=http://127.0.0.1:1", "--upstream", "ghcr.io=https://ghcr.io"}); err != nil {
		t.Fatal(err)
	}
	c, err := f.config()
	if err != nil {
		t.Fatal(err)
	}
	if c.Dir != "/b" || c.MaxSize.Bytes(0) != 1e9 || c.AdminListen != "" || len(c.Upstreams) != 2 || c.Upstreams[0].Endpoints[0].URL != "http://127.0.0.1:1" {
		t.Errorf("%+v", c)
	}
	for _, bad := range []string{"x", "a.b=", "a.b=ftp://x", "a b=http://x", "=http://x"} {
		if err := c.addUpstream(bad); err == nil {
			t.Errorf("--upstream %q was taken", bad)
		}
	}
}

// TestTheExampleNamesEveryKey: the documented file loads as it stands, is the
// defaults, and leaves no key out.
func TestTheExampleNamesEveryKey(t *testing.T) {
	path := "../../docs/tarn.example.yaml"
	c, err := loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	d := defaultConfig()
	if c.Listen != d.Listen || c.AdminListen != d.AdminListen || c.Dir != d.Dir || c.MaxSize != d.MaxSize || c.MinFree != d.MinFree ||
		c.Allow != d.Allow || c.DefaultUpstream != d.DefaultUpstream || c.Defaults.HeadTimeout != d.Defaults.HeadTimeout || len(c.Upstreams) != 0 {
		t.Errorf("the example is not the defaults: %+v", c)
	}
	var walk func(reflect.Type)
	walk = func(s reflect.Type) {
		for i := range s.NumField() {
			f := s.Field(i)
			key, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			if key != "" && !strings.Contains(string(text), key+":") {
				t.Errorf("key %q is missing in %s", key, path)
			}
			ft := f.Type
			if ft.Kind() == reflect.Slice {
				ft = ft.Elem()
			}
			if ft.Kind() == reflect.Struct && ft != reflect.TypeFor[notYet]() && ft != reflect.TypeFor[Size]() {
				walk(ft)
			}
		}
	}
	walk(reflect.TypeFor[Config]())
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte("max_size: 1GiB\nupstreams: [{name: a.b, endpoints: [https://x]}]"))
	f.Add([]byte("tls: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseConfig(data)
		if err != nil {
			inFile("f", err)
			return
		}
		if c.MaxSize.Bytes(1<<40) <= 0 {
			t.Fatalf("max_size %v", c.MaxSize)
		}
		for _, u := range c.Upstreams {
			if _, err := upstreamConfig(u, c.Defaults); err != nil && u.CAFile == "" && u.CertFile == "" {
				t.Fatalf("a checked upstream cannot be used: %v", err)
			}
		}
	})
}
