// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"tarn/upstream"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

func TestAnEmptyFileMeansTheDefaults(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		"nothing at all":                "",
		"comments only":                 "# nothing\n",
		"an empty document":             "---\n",
		"an empty mapping":              "{}\n",
		"every key below commented out": "defaults:\nupstreams:\nnames:\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := parseConfig("tarn.yaml", []byte(content))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(c, defaultConfig()) {
				t.Errorf("got %+v", c)
			}
		})
	}
}

func TestEveryKeyIsRead(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "tarn.yaml")
	// upstreams stand before defaults on purpose: the order of keys means nothing.
	content := `
upstreams:
  - name: Registry.Corp:5000
    endpoints: [http://10.0.0.1:5000/prefix, {url: "https://[::1]:5001", trusted: true}]
    ca_file: /etc/tarn/corp.pem
    cert_file: /etc/tarn/own.pem
    key_file: /etc/tarn/own.key
    insecure_skip_verify: true
    realm: https://auth.corp/token
    token_broker: true
    credentials: {docker_config: /etc/tarn/docker.json}
    share: ["platform/*"]
    proxy: {url: "https://proxy.corp:3129", credentials_file: /etc/tarn/proxy.auth}
    head_timeout: 2s
    stale_if_error: 1h
    stale_for: node
    grant_ttl: 3s
    membership_ttl: 0
    parallel: 2
  - name: ghcr.io
    proxy: http://proxy.corp:3128
listen: :6000
tls: {cert_file: /etc/tarn/tls.crt, key_file: /etc/tarn/tls.key, client_ca_file: /etc/tarn/ca.crt}
names: [tarn.tarn.svc, "Mirror.corp.:5050"]
admin_listen: unix:/run/tarn/admin.sock
admin_socket: /run/x.sock
admin_changes: tcp
metrics_listen: :9000
log_level: debug
dir: /srv/tarn
max_size: 40%
min_free: 1073741824
default_upstream: quay.io
allow: listed
prefetch: layers
allow_via_proxy: true
defaults: {ca_file: /etc/tarn/proxy.pem, head_timeout: 3500ms, stale_if_error: 2h, stale_for: owner, grant_ttl: 4s, membership_ttl: 5s, parallel: 8}
`
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	want := defaultConfig()
	want.Listen = ":6000"
	want.TLS = TLS{CertFile: "/etc/tarn/tls.crt", KeyFile: "/etc/tarn/tls.key", ClientCAFile: "/etc/tarn/ca.crt"}
	want.Names = []string{"tarn.tarn.svc", "Mirror.corp.:5050"}
	want.AdminListen = "unix:/run/tarn/admin.sock"
	want.AdminSocket = "/run/x.sock"
	want.AdminChanges = "tcp"
	want.MetricsListen = ":9000"
	want.LogLevel = "debug"
	want.Dir = "/srv/tarn"
	want.MaxSize = Size{share: 4000}
	want.MinFree = Size{bytes: 1 << 30}
	want.DefaultUpstream = "quay.io"
	want.Allow = "listed"
	want.Prefetch = "layers"
	ghcr := UpstreamDefaults{HeadTimeout: 3500 * time.Millisecond, StaleIfError: 2 * time.Hour, StaleFor: "owner", GrantTTL: 4 * time.Second, MembershipTTL: 5 * time.Second, Parallel: 8}
	want.Defaults = Defaults{CAFile: "/etc/tarn/proxy.pem", UpstreamDefaults: ghcr}
	want.AllowViaProxy = true
	corp := UpstreamDefaults{HeadTimeout: 2 * time.Second, StaleIfError: time.Hour, StaleFor: "node", GrantTTL: 3 * time.Second, Parallel: 2}
	want.Upstreams = []Upstream{{
		Name: "Registry.Corp:5000",
		Endpoints: []Endpoint{
			{URL: "http://10.0.0.1:5000/prefix"},
			{URL: "https://[::1]:5001", Trusted: true},
		},
		CAFile:             "/etc/tarn/corp.pem",
		CertFile:           "/etc/tarn/own.pem",
		KeyFile:            "/etc/tarn/own.key",
		InsecureSkipVerify: true,
		Realm:              "https://auth.corp/token",
		TokenBroker:        true,
		Credentials:        Credentials{DockerConfig: "/etc/tarn/docker.json"},
		Share:              []string{"platform/*"},
		Proxy:              Proxy{URL: "https://proxy.corp:3129", CredentialsFile: "/etc/tarn/proxy.auth"},
		UpstreamDefaults:   corp,
	}, {
		Name:             "ghcr.io",
		Proxy:            Proxy{URL: "http://proxy.corp:3128"},
		UpstreamDefaults: ghcr,
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestAMistakeIsNamedWithFileLineAndKey(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		content string
		want    string // all of the error, or its beginning when it ends in …
	}{
		"an unknown key":                  {"\nmax_sise: 1\n", `tarn.yaml:2: unknown key "max_sise"; did you mean "max_size"?`},
		"an unknown key under defaults":   {"defaults:\n  head_timout: 1s\n", `tarn.yaml:2: unknown key "defaults.head_timout"; did you mean "head_timeout"?`},
		"an unknown key of an upstream":   {"upstreams:\n- name: a.io\n- name: b.io\n  url: x\n", `tarn.yaml:4: unknown key "upstreams[1].url"`},
		"an unknown key of an endpoint":   {"upstreams:\n- name: a.io\n  endpoints:\n  - url: http://a\n    trust: true\n", `tarn.yaml:5: unknown key "upstreams[0].endpoints[0].trust"; did you mean "trusted"?`},
		"a merge key":                     {"<<: {listen: x}\n", `tarn.yaml:1: unknown key "<<"`},
		"a key that is a list":            {"? [a]\n: 1\n", `tarn.yaml:1: a key must be a word, not a list`},
		"a key given twice":               {"listen: a:1\ndir: /x\nlisten: a:1\n", `tarn.yaml:3: duplicate key "listen", first on line 1`},
		"a second document":               {"dir: /x\n---\ndir: /y\n", `tarn.yaml:2: a second document; only one is read`},
		"a list for the whole file":       {"- dir\n", `tarn.yaml:1: must be a mapping of keys to values, not a list`},
		"bad YAML":                        {"dir: /x\nlisten: [a\n", `tarn.yaml:1: not YAML, here or just below: …`},
		"bad YAML in a second document":   {"dir: /x\n---\n[\n", `tarn.yaml:3: not YAML, here or just below: …`},
		"an alias":                        {"dir: &d /x\nlisten: *d\n", `tarn.yaml:2: key "listen": aliases (*d) are not supported; write the value out`},
		"an alias of what it stands in":   {"defaults: &d\n  head_timeout: *d\n", `tarn.yaml:2: key "defaults.head_timeout": aliases…`},
		"a number for a string":           {"listen: 5050\n", `tarn.yaml:1: key "listen": must be a string, not a number`},
		"nothing for a string":            {"dir:\n", `tarn.yaml:1: key "dir": must be a string, not nothing`},
		"a string for a boolean":          {"upstreams:\n- {name: a.io, token_broker: yes please}\n", `tarn.yaml:2: key "upstreams[0].token_broker": must be true or false, not a string`},
		"a list for a duration":           {"defaults: {head_timeout: [1s]}\n", `tarn.yaml:1: key "defaults.head_timeout": must be a duration, not a list`},
		"a mapping for a list":            {"upstreams: {name: a}\n", `tarn.yaml:1: key "upstreams": must be a list, not a mapping`},
		"a string for a mapping":          {"defaults: 8s\n", `tarn.yaml:1: key "defaults": must be a mapping of keys to values, not a string`},
		"nothing for an upstream":         {"upstreams:\n-\n", `tarn.yaml:2: key "upstreams[0]": must be a mapping of keys to values, not nothing`},
		"a size without sense":            {"max_size: 50XB\n", `tarn.yaml:1: key "max_size": "50XB" is not a size: allowed are …`},
		"a size without its unit":         {"max_size: 50\n", `tarn.yaml:1: key "max_size": must be at least 1MiB, and is 50 bytes; a unit is written as in 50GiB`},
		"a proxy with a password":         {"upstreams:\n- {name: a.io, proxy: 'http://u:secret@p:3128'}\n", `tarn.yaml:2: key "upstreams[0].proxy": the URL must not have a user or password: name a file with them as credentials_file`},
		"a proxy of another kind":         {"upstreams:\n- {name: a.io, proxy: {url: 'socks5://p:1080'}}\n", `tarn.yaml:2: key "upstreams[0].proxy.url": the proxy's scheme must be http or https, and not "socks5"`},
		"plugins without programs":        {"upstreams:\n- {name: a.io, credentials: {kubelet_plugins: {config: x}}}\n", `tarn.yaml:2: key "upstreams[0].credentials.kubelet_plugins": config and bin_dir go together`},
		"two credentials":                 {"upstreams:\n- {name: a.io, credentials: {docker_config: y, kubelet_plugins: {config: x, bin_dir: z}}}\n", `tarn.yaml:2: key "upstreams[0].credentials": docker_config and kubelet_plugins do not go together: name one of them`},
		"a password for no proxy":         {"upstreams:\n- {name: a.io, proxy: {credentials_file: x}}\n", `tarn.yaml:2: key "upstreams[0].proxy.url": must be given with credentials_file`},
		"a negative size":                 {"min_free: -1\n", `tarn.yaml:1: key "min_free": "-1" is not a size: …`},
		"no size at all":                  {"max_size: 0\n", `tarn.yaml:1: key "max_size": must be more than 0`},
		"no share at all":                 {"max_size: 0%\n", `tarn.yaml:1: key "max_size": must be more than 0`},
		"a duration without a unit":       {"defaults: {head_timeout: 8}\n", `tarn.yaml:1: key "defaults.head_timeout": "8" is not a duration, as in "500ms", "8s", "24h"`},
		"a negative duration":             {"defaults: {head_timeout: -8s}\n", `tarn.yaml:1: key "defaults.head_timeout": must not be negative`},
		"a head timeout of 0":             {"defaults: {head_timeout: 0}\n", `tarn.yaml:1: key "defaults.head_timeout": must be more than 0s and at most 8s`},
		"a head timeout beyond an answer": {"upstreams:\n- {name: a.io, head_timeout: 9s}\n", `tarn.yaml:2: key "upstreams[0].head_timeout": must be more than 0s and at most 8s`},
		"an address without a port":       {"listen: localhost\n", `tarn.yaml:1: key "listen": "localhost" is not host:port, as in 127.0.0.1:5050`},
		"a port beyond all ports":         {"admin_listen: localhost:65536\n", `tarn.yaml:1: key "admin_listen": "localhost:65536": the port must be a number from 0 to 65535`},
		"a relative socket":               {"admin_listen: unix:admin.sock\n", `tarn.yaml:1: key "admin_listen": "unix:admin.sock": the path of a socket must be absolute, as in unix:/run/tarn/admin.sock`},
		"a relative admin socket":         {"admin_socket: admin.sock\n", `tarn.yaml:1: key "admin_socket": "admin.sock" is neither off nor the absolute path of a socket, as in /run/tarn/admin.sock`},
		"an admin socket without room":    {"admin_socket: /" + strings.Repeat("x", 107) + "\n", `tarn.yaml:1: key "admin_socket": /` + strings.Repeat("x", 107) + `: the path of a socket has at most 107 bytes, and this one 108`},
		"an unknown place for changes":    {"admin_changes: udp\n", `tarn.yaml:1: key "admin_changes": "udp" is none of socket, tcp`},
		"a name that no host has":         {"names: [http://tarn]\n", `tarn.yaml:1: key "names[0]": "http://tarn" is not the name of a host, with or without a port`},
		"a socket for the registry API":   {"listen: unix:/run/x\n", `tarn.yaml:1: key "listen": "unix:/run/x": the port must be…`},
		"an unknown log level":            {"log_level: trace\n", `tarn.yaml:1: key "log_level": "trace" is none of debug, info, warn, error`},
		"an unknown word for allow":       {"allow: all\n", `tarn.yaml:1: key "allow": "all" is none of public, listed`},
		"an empty directory":              {"dir: ''\n", `tarn.yaml:1: key "dir": must not be empty`},
		"a URL for a name":                {"default_upstream: https://ghcr.io\n", `tarn.yaml:1: key "default_upstream": …`},
		"a listener's key alone":          {"listen: a:1\ntls:\n  key_file: x\n", `tarn.yaml:3: key "tls": cert_file and key_file go together`},
		"clients' CA without TLS":         {"tls: {client_ca_file: x}\n", `tarn.yaml:1: key "tls": client_ca_file needs cert_file and key_file`},
		"an upstream without a name":      {"upstreams:\n- ca_file: x\n", `tarn.yaml:2: key "upstreams[0].name": must be given`},
		"an upstream with a bad name":     {"upstreams:\n- name: a/b\n", `tarn.yaml:2: key "upstreams[0].name": "a/b": …`},
		"an upstream listed twice":        {"upstreams:\n- name: GHCR.io\n- name: ghcr.io:443\n", `tarn.yaml:3: key "upstreams[1].name": ghcr.io is listed before, on line 2`},
		"a certificate without a key":     {"upstreams:\n- name: a.io\n  cert_file: x\n", `tarn.yaml:2: key "upstreams[0]": cert_file and key_file go together`},
		"an endpoint without a URL":       {"upstreams:\n- name: a.io\n  endpoints: [{trusted: true}]\n", `tarn.yaml:3: key "upstreams[0].endpoints[0].url": must be given`},
		"an endpoint that is a host":      {"upstreams:\n- name: a.io\n  endpoints: [a.io]\n", `tarn.yaml:3: key "upstreams[0].endpoints[0]": the URL's scheme must be http or https, as in https://registry.example:5000`},
		"an endpoint with a password": {"upstreams:\n- name: a.io\n  endpoints: ['https://u:secret@a.io']\n",
			`tarn.yaml:3: key "upstreams[0].endpoints[0]": the URL must not have a user or password`},
		"an endpoint that ends in /v2": {"upstreams:\n- name: a.io\n  endpoints: ['https://a.io:5000/mirror/v2/']\n",
			`tarn.yaml:3: key "upstreams[0].endpoints[0]": the URL must not end in /v2, which tarn adds itself: write https://a.io:5000/mirror`},
		"two mistakes, in the order of the lines": {"upstreams: 1\nlisten: 1\n",
			"tarn.yaml:1: key \"upstreams\": must be a list, not a number\ntarn.yaml:2: key \"listen\": must be a string, not a number"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := parseConfig("tarn.yaml", []byte(c.content))
			if err == nil {
				t.Fatalf("no error; want %s", c.want)
			}
			prefix, isPrefix := strings.CutSuffix(c.want, "…")
			if got := err.Error(); got != c.want && !(isPrefix && strings.HasPrefix(got, prefix)) {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// tables are the keys of each mapping of the file, and the struct that they fill.
var tables = map[string]struct {
	keys []key
	of   any
}{
	"":                         {new(Config).keys(), Config{}},
	"tls.":                     {new(TLS).keys(), TLS{}},
	"defaults.":                {new(Defaults).keys(), Defaults{}},
	"upstreams[].":             {new(Upstream).keys(), Upstream{}},
	"upstreams[].endpoints[].": {new(Endpoint).keys(), Endpoint{}},
	"upstreams[].credentials.": {new(Credentials).keys(), Credentials{}},
	"upstreams[].credentials.kubelet_plugins.": {new(KubeletPlugins).keys(), KubeletPlugins{}},
	"upstreams[].proxy.":                       {new(Proxy).keys(), Proxy{}},
}

func TestEveryFieldHasAKey(t *testing.T) {
	t.Parallel()
	for path, table := range tables {
		fields := reflect.VisibleFields(reflect.TypeOf(table.of))
		fields = slices.DeleteFunc(fields, func(f reflect.StructField) bool { return f.Anonymous })
		if len(fields) != len(table.keys) {
			t.Errorf("%q: %d keys for %d fields", path, len(table.keys), len(fields))
		}
	}
}

// exampleKeys lists the keys of a mapping, with the comment of each.
func exampleKeys(n *yaml.Node, path string, comments map[string]string) {
	switch n.Kind {
	case yaml.SequenceNode:
		for _, item := range n.Content {
			exampleKeys(item, strings.TrimSuffix(path, ".")+"[].", comments)
		}
	case yaml.MappingNode:
		for i := 0; i < len(n.Content); i += 2 {
			k := n.Content[i]
			comment := k.HeadComment
			if i == 0 && comment == "" { // the parser gives a first key's comment to the mapping
				comment = n.HeadComment
			}
			comments[path+k.Value] = comment
			exampleKeys(n.Content[i+1], path+k.Value+".", comments)
		}
	}
}

func TestTheExampleFileHasEveryKeyAndItsDefault(t *testing.T) {
	t.Parallel()
	const path = "../../docs/tarn.example.yaml"
	c, err := loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(c, defaultConfig()) {
		t.Errorf("as it stands it differs from the defaults: %+v", c)
	}

	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// A line that begins with "#" and no space is a key commented out.
	data = regexp.MustCompile(`(?m)^( *)#([^ \n])`).ReplaceAll(data, []byte("$1$2"))
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		t.Fatalf("with all keys uncommented: %v", err)
	}
	comments := make(map[string]string)
	exampleKeys(doc.Content[0], "", comments)
	for path, table := range tables {
		for _, k := range table.keys {
			comment, there := comments[path+k.name]
			if !there {
				t.Errorf("%s is not in the example", path+k.name)
			} else if comment == "" {
				t.Errorf("%s has no comment in the example", path+k.name)
			}
			delete(comments, path+k.name)
		}
	}
	for key := range comments {
		t.Errorf("%s is in the example and unknown", key)
	}

	// The values of what is commented out are the defaults too.
	if _, err = parseConfig(path, data); err != nil {
		t.Errorf("with all keys uncommented: %v", err)
	}
}

func TestFlagsOverrideTheFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "tarn.yaml")
	const content = "listen: 127.0.0.1:1\nadmin_listen: 127.0.0.1:2\ndir: /a\nmax_size: 1GiB\n" +
		"defaults: {head_timeout: 2s}\n" +
		"upstreams: [{name: Corp.io, ca_file: x, endpoints: ['http://a', 'http://b']}]\n"
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	parse := func(args ...string) (Config, error) {
		var f serveFlags
		set := pflag.NewFlagSet("serve", pflag.ContinueOnError)
		f.register(set)
		if err := set.Parse(append([]string{"--config", path}, args...)); err != nil {
			t.Fatal(err)
		}
		return f.config()
	}
	file, err := parse()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args   []string
		change func(*Config)
	}{
		"none":            {nil, func(*Config) {}},
		"listen":          {[]string{"--listen=:3"}, func(c *Config) { c.Listen = ":3" }},
		"admin off":       {[]string{"--admin-listen="}, func(c *Config) { c.AdminListen = "" }},
		"admin on socket": {[]string{"--admin-listen=unix:/s"}, func(c *Config) { c.AdminListen = "unix:/s" }},
		"dir":             {[]string{"--dir=/b"}, func(c *Config) { c.Dir = "/b" }},
		"max-size":        {[]string{"--max-size=40%"}, func(c *Config) { c.MaxSize = Size{share: 4000} }},
		"an upstream of the file gets other endpoints and keeps the rest": {
			[]string{"--upstream=corp.IO=http://c/p", "--upstream=corp.io=http://d=e"},
			func(c *Config) { c.Upstreams[0].Endpoints = []Endpoint{{URL: "http://c/p"}, {URL: "http://d=e"}} },
		},
		"an upstream that the file has not gets the file's defaults": {
			[]string{"--upstream=new.io:5000=http://10.0.0.1"},
			func(c *Config) {
				c.Upstreams = append(c.Upstreams, Upstream{
					Name:             "new.io:5000",
					Endpoints:        []Endpoint{{URL: "http://10.0.0.1"}},
					UpstreamDefaults: c.Defaults.UpstreamDefaults,
				})
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := parse(c.args...)
			if err != nil {
				t.Fatal(err)
			}
			want := file
			want.Upstreams = slices.Clone(file.Upstreams)
			c.change(&want)
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
		})
	}
	for name, c := range map[string]struct{ arg, want string }{
		"listen without a port":     {"--listen=x", `--listen: "x" is not host:port, as in 127.0.0.1:5050`},
		"an empty listen":           {"--listen=", `--listen: "" is not host:port, as in 127.0.0.1:5050`},
		"an empty dir":              {"--dir=", `--dir: must not be empty`},
		"a size of 0":               {"--max-size=0", `--max-size: must be more than 0`},
		"a size without sense":      {"--max-size=big", `--max-size: "big" is not a size`},
		"an upstream without a URL": {"--upstream=ghcr.io", `--upstream: "ghcr.io" is not NAME=URL`},
		"an upstream without name":  {"--upstream==http://x", `--upstream: `},
		"an upstream's /v2":         {"--upstream=ghcr.io=https://ghcr.io/v2", `--upstream: the URL must not end in /v2, which tarn adds itself: write https://ghcr.io`},
		"an upstream's bad URL":     {"--upstream=ghcr.io=ghcr.io", `--upstream: the URL's scheme must be http or https, as in https://registry.example:5000`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := parse(c.arg)
			if err == nil || !strings.HasPrefix(err.Error(), c.want) {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

func TestAFileThatCannotBeReadIsAnError(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	large := filepath.Join(dir, "large")
	if err := os.WriteFile(large, []byte(strings.Repeat("#", maxConfigBytes+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(dir, "absent"), dir, large} {
		if _, err := loadConfig(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestAUserWithoutAFileHasADirectoryOfTheirOwn(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", "/home/u/.cache")
	if got := userConfig(1000).Dir; got != "/home/u/.cache/tarn" {
		t.Errorf("a user gets %s", got)
	}
	if got := userConfig(0).Dir; got != "/var/lib/tarn" {
		t.Errorf("root gets %s", got)
	}
	t.Setenv("XDG_CACHE_HOME", "")
	t.Setenv("HOME", "")
	if got := userConfig(1000).Dir; got != "/var/lib/tarn" {
		t.Errorf("a user without a home gets %s", got)
	}
}

func TestURLsOfEndpoints(t *testing.T) {
	t.Parallel()
	for raw, ok := range map[string]bool{
		"https://ghcr.io":               true,
		"http://127.0.0.1:5000":         true,
		"http://[::1]":                  true,
		"http://[::1]:5000/path/prefix": true,
		"https://a.io/":                 true,
		"":                              false,
		"a.io":                          false,
		"a.io:5000":                     false,
		"ftp://a.io":                    false,
		"https:a.io":                    false,
		"https://":                      false,
		"https://:5000":                 false,
		"https://a.io:":                 false,
		"https://a.io:0":                false,
		"https://a.io:65536":            false,
		"https://[::1]:":                false,
		"https://u@a.io":                false,
		"https://u:p@a.io":              false,
		"https://a.io?":                 false,
		"https://a.io?a=b":              false,
		"https://a.io#":                 false,
		"https://a.io/%zz":              false,
		"https://a b.io":                false,
		"https://a.io/v2":               false,
		"https://a.io/v2//":             false,
		"https://a.io/p/v2/":            false,
		"https://a.io/v2/p":             true,
		"https://a.io/pv2":              true,
	} {
		if err := checkURL(raw); (err == nil) != ok {
			t.Errorf("%q: %v", raw, err)
		}
	}
}

func TestSizes(t *testing.T) {
	t.Parallel()
	const total = 1000_003
	for in, want := range map[string]int64{
		"0":                   0,
		"1073741824":          1 << 30,
		"9223372036854775807": math.MaxInt64,
		"7B":                  7,
		"1k":                  1000,
		"500MB":               500e6,
		"2 GB":                2e9,
		"3T":                  3e12,
		"1Ki":                 1024,
		"50GiB":               50 << 30,
		"1.5GiB":              3 << 29,
		"0.000001TiB":         1099511,
		"8388607Ti":           8388607 << 40,
		"0%":                  0,
		"40%":                 400_001,
		"2.5%":                25_000,
		"0.01%":               100,
		"99.99%":              999_902,
		"100%":                total,
	} {
		got, err := parseSize(in)
		if err != nil {
			t.Errorf("%q: %v", in, err)
		} else if got.Bytes(total) != want {
			t.Errorf("%q: got %d, want %d", in, got.Bytes(total), want)
		}
	}
	for _, in := range []string{
		"", " ", "x", "-1", "+1", "-5%", "NaN", "inf", "1e9", "0x10", "1_000", "1.5", "1.5B", ".5G", "1.", "1,5G",
		"5 0G", "50GiBB", "50gib", "50XiB", "50P", "i", "B", "5%B", "100.01%", "101%", "9223372036854775808",
		"8388608Ti", "8388607.9999999Ti", "9223372036854775807K", "99999999999999999999", "1G ", "5  G", "%", "٣",
	} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("%q: got %v, want an error", in, got)
		}
	}
	if got := (Size{share: filesystem}).Bytes(math.MaxInt64); got != math.MaxInt64 {
		t.Errorf("all of the largest filesystem: %d", got)
	}
	if got := (Size{share: 1}).Bytes(-1); got != 0 {
		t.Errorf("a share of less than nothing: %d", got)
	}
}

func FuzzSize(f *testing.F) {
	for _, s := range []string{"50GiB", "40%", "1.5TB", "8388607.999999Ti", "0.000001k", "99.999999%"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s, err := parseSize(in)
		if err != nil {
			return
		}
		again, err := parseSize(s.String())
		if err != nil || again != s {
			t.Errorf("%q is %v, which reads as %v, %v", in, s, again, err)
		}
		for _, total := range []int64{0, 1, 4096, 1 << 40, math.MaxInt64} {
			b := s.Bytes(total)
			if b < 0 || strings.HasSuffix(in, "%") && b > total {
				t.Errorf("%q of %d bytes is %d", in, total, b)
			}
		}
	})
}

func FuzzConfig(f *testing.F) {
	example, err := os.ReadFile("../../docs/tarn.example.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	for _, s := range []string{
		"", "---\n", "a: &a [*a]\n", "? {}\n: 1\n", "listen: !!binary aGk=\n", "\xff\xfe", "upstreams: [{name: a, endpoints: [b]}]",
		"defaults: {<<: *x}", "max_size: !foo 1", "!!map\nlisten: 127.0.0.1:1", "- - - -\n", "upstreams: [[[[", "a: 1\n---\nb: 2\n",
		"upstreams: [{name: a.io, endpoints: ['http://b', {url: 'https://c:1/d', trusted: true}], head_timeout: 1s}]",
	} {
		f.Add([]byte(s))
	}
	located := regexp.MustCompile(`(?m)^tarn\.yaml:[0-9]+: .`)
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseConfig("tarn.yaml", data)
		if err != nil {
			if !located.MatchString(err.Error()) {
				t.Errorf("an error that names no line: %v", err)
			}
			return
		}
		// What is accepted can be run with.
		if err := checkAddress(c.Listen); err != nil {
			t.Error(err)
		}
		if c.MaxSize == (Size{}) || c.Dir == "" || !slices.Contains([]string{"public", "listed"}, c.Allow) {
			t.Errorf("accepted: %+v", c)
		}
		names := make(map[upstream.Name]bool)
		for _, u := range c.Upstreams {
			name, err := upstream.ParseName(u.Name)
			if err != nil || names[name] {
				t.Errorf("accepted: upstream %q, %v", u.Name, err)
			}
			names[name] = true
			if u.HeadTimeout <= 0 || u.HeadTimeout > upstream.DefaultHeadTimeout {
				t.Errorf("accepted: head_timeout %v", u.HeadTimeout)
			}
			u.CAFile, u.CertFile, u.KeyFile = "", "", "" // not the fuzzer's business to open
			if _, err := upstreamConfig(u, c.Defaults, nil); err != nil {
				t.Errorf("accepted: %+v, %v", u, err)
			}
		}
	})
}
