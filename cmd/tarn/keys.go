// SPDX-License-Identifier: Apache-2.0

package main

import (
	"tarn/proxy"
	"tarn/upstream"

	"go.yaml.in/yaml/v3"
)

// key is one key that a mapping of the file may have, and who reads its value.
type key struct {
	name string
	read reader
}

// keys are those of the file. They are read in this order, whatever the file's.
func (c *Config) keys() []key {
	return []key{
		{"listen", text(&c.Listen, checkAddress)},
		{"tls", c.TLS.read()},
		{"names", list(&c.Names, func(name *string) reader { return text(name, proxy.CheckHost) })},
		{"admin_listen", text(&c.AdminListen, checkAdminAddress)},
		{"admin_socket", text(&c.AdminSocket, checkAdminSocket)},
		{"admin_changes", text(&c.AdminChanges, oneOf("socket", "tcp"))},
		{"admin_names", text(&c.AdminNames, oneOf("socket", "tcp"))},
		{"metrics_listen", text(&c.MetricsListen, checkMetricsAddress)},
		{"log_level", text(&c.LogLevel, oneOf("debug", "info", "warn", "error"))},
		{"access_log", text(&c.AccessLog, oneOf("all", "upstream", "errors"))},
		{"dir", text(&c.Dir, checkDir)},
		{"max_size", bytesOrShare(&c.MaxSize, checkMaxSize)},
		{"min_free", bytesOrShare(&c.MinFree, nil)},
		{"min_free_inodes", bytesOrShare(&c.MinFreeInodes, nil)},
		{"default_upstream", text(&c.DefaultUpstream, checkName)},
		{"allow", text(&c.Allow, oneOf("public", "listed"))},
		{"allow_via_proxy", boolean(&c.AllowViaProxy)},
		{"prefetch", text(&c.Prefetch, oneOf("off", "config", "layers"))},
		{"defaults", section(c.Defaults.keys())},
		{"upstreams", list(&c.Upstreams, c.upstream)}, // each begins with the defaults
	}
}

func (d *Defaults) keys() []key {
	return append([]key{{"ca_file", text(&d.CAFile, nil)}}, d.UpstreamDefaults.keys()...)
}

func (u *UpstreamDefaults) keys() []key {
	return []key{
		{"head_timeout", duration(&u.HeadTimeout, checkHeadTimeout)},
		{"stale_if_error", duration(&u.StaleIfError, nil)},
		{"stale_for", text(&u.StaleFor, oneOf("owner", "node"))},
		{"grant_ttl", duration(&u.GrantTTL, nil)},
		{"membership_ttl", duration(&u.MembershipTTL, nil)},
		{"parallel", number(&u.Parallel, checkParallel)},
	}
}

func (u *Upstream) keys() []key {
	return append([]key{
		{"name", text(&u.Name, checkName)},
		{"endpoints", list(&u.Endpoints, (*Endpoint).read)},
		{"realm", text(&u.Realm, checkRealm)},
		{"ca_file", text(&u.CAFile, nil)},
		{"cert_file", text(&u.CertFile, nil)},
		{"key_file", text(&u.KeyFile, nil)},
		{"insecure_skip_verify", boolean(&u.InsecureSkipVerify)},
		{"token_broker", boolean(&u.TokenBroker)},
		{"credentials", u.Credentials.read},
		{"proxy", u.Proxy.read},
		{"share", list(&u.Share, func(pattern *string) reader { return text(pattern, checkShare) })},
	}, u.UpstreamDefaults.keys()...)
}

func (e *Endpoint) keys() []key {
	return []key{
		{"url", text(&e.URL, checkURL)},
		{"trusted", boolean(&e.Trusted)},
	}
}

func (c *Credentials) keys() []key {
	return []key{
		{"docker_config", text(&c.DockerConfig, nil)},
		{"kubelet_plugins", c.KubeletPlugins.read},
	}
}

// read reads where credentials come from, which is one place.
func (c *Credentials) read(d *decoder, n *yaml.Node, at string) {
	section(c.keys())(d, n, at)
	if c.DockerConfig != "" && c.KubeletPlugins.Config != "" {
		d.addKey(n, at, "docker_config and kubelet_plugins do not go together: name one of them")
	}
}

func (k *KubeletPlugins) keys() []key {
	return []key{
		{"config", text(&k.Config, nil)},
		{"bin_dir", text(&k.BinDir, nil)},
	}
}

// read reads where the plugins are, which takes both keys.
func (k *KubeletPlugins) read(d *decoder, n *yaml.Node, at string) {
	section(k.keys())(d, n, at)
	if (k.Config == "") != (k.BinDir == "") {
		d.addKey(n, at, "config and bin_dir go together")
	}
}

func (t *TLS) keys() []key {
	return []key{
		{"cert_file", text(&t.CertFile, nil)},
		{"key_file", text(&t.KeyFile, nil)},
		{"client_ca_file", text(&t.ClientCAFile, nil)},
	}
}

// read reads the listener's files, which go together: half of them must not leave
// clients without what the operator meant.
func (t *TLS) read() reader {
	return func(d *decoder, n *yaml.Node, at string) {
		section(t.keys())(d, n, at)
		switch {
		case (t.CertFile == "") != (t.KeyFile == ""):
			d.addKey(n, at, "cert_file and key_file go together")
		case t.ClientCAFile != "" && t.CertFile == "":
			d.addKey(n, at, "client_ca_file needs cert_file and key_file")
		}
	}
}

func (p *Proxy) keys() []key {
	return []key{
		{"url", text(&p.URL, checkProxy)},
		{"credentials_file", text(&p.CredentialsFile, nil)},
	}
}

// read reads a proxy, which may be its URL alone.
func (p *Proxy) read(d *decoder, n *yaml.Node, at string) {
	if n.Kind == yaml.ScalarNode && !isNull(n) {
		text(&p.URL, checkProxy)(d, n, at)
		return
	}
	section(p.keys())(d, n, at)
	if p.CredentialsFile != "" && p.URL == "" {
		d.addKey(n, at+".url", "must be given with credentials_file")
	}
}

// upstream reads one of the listed registries.
func (c *Config) upstream(u *Upstream) reader {
	return func(d *decoder, n *yaml.Node, at string) {
		u.UpstreamDefaults = c.Defaults.UpstreamDefaults
		d.mapping(n, at+".", u.keys())
		d.require(n, at+".", "name")
		if (u.CertFile == "") != (u.KeyFile == "") {
			d.addKey(n, at, "cert_file and key_file go together")
		}
		if name, err := upstream.ParseName(u.Name); err == nil {
			if line, twice := d.listed[name]; twice {
				d.addKey(n, at+".name", "%s is listed before, on line %d", name, line)
			} else {
				d.listed[name] = n.Line
			}
		}
	}
}

// read reads an endpoint, which may be its URL alone.
func (e *Endpoint) read() reader {
	return func(d *decoder, n *yaml.Node, at string) {
		if n.Kind == yaml.ScalarNode {
			text(&e.URL, checkURL)(d, n, at)
			return
		}
		d.mapping(n, at+".", e.keys())
		d.require(n, at+".", "url")
	}
}
