// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// runHosts runs tarn hosts in this process.
func runHosts(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd := newCommand()
	cmd.SetOut(&out)
	cmd.SetArgs(append([]string{"hosts"}, args...))
	err := cmd.Execute()
	return out.String(), err
}

// TestInstallWithTLSNamesWhatItMakes: containerd's side and tarn's are of one CA, and a
// second run changes neither.
func TestInstallWithTLSNamesWhatItMakes(t *testing.T) {
	dir := t.TempDir()
	certs, tls := filepath.Join(dir, "certs.d"), filepath.Join(dir, "tls")
	args := []string{"install", "--tls", "--tls-dir", tls, "--certs-dir", certs}
	if out, err := runHosts(t, append(args, "--dry-run")...); err != nil || !strings.Contains(out, "would make certificates") {
		t.Fatalf("%s, %v", out, err)
	}
	if _, err := os.Stat(tls); err == nil {
		t.Error("a dry run makes certificates")
	}
	out, err := runHosts(t, args...)
	if err != nil || !strings.Contains(out, "tls: {cert_file: "+tls) {
		t.Fatalf("%s, %v", out, err)
	}
	text, err := os.ReadFile(filepath.Join(certs, "_default/hosts.toml"))
	if err != nil || !strings.Contains(string(text), `[host."https://127.0.0.1:5050"]`) || !strings.Contains(string(text), filepath.Join(tls, "client.key")) {
		t.Errorf("%s, %v", text, err)
	}
	cfg := Config{TLS: TLS{CertFile: filepath.Join(tls, "server.crt"), KeyFile: filepath.Join(tls, "server.key"), ClientCAFile: filepath.Join(tls, "ca.crt")}}
	if _, _, err := readCertificates(cfg.TLS); err != nil {
		t.Errorf("tarn cannot read what it is told: %v", err)
	}
	before, _ := os.ReadFile(filepath.Join(tls, "server.crt"))
	if out, err := runHosts(t, args...); err != nil || !strings.Contains(out, "nothing to do") {
		t.Errorf("the second run: %s, %v", out, err)
	}
	if after, _ := os.ReadFile(filepath.Join(tls, "server.crt")); !bytes.Equal(before, after) {
		t.Error("the second run makes another certificate")
	}
	for want, args := range map[string][]string{
		"must be https":    {"install", "--tls", "--certs-dir", certs, "--url", "http://127.0.0.1:5050"},
		"unknown user":     {"install", "--tls", "--certs-dir", certs, "--tls-dir", tls, "--tls-user", "nobody-of-this-name"},
		"must be text or":  {"check", "-o", "yaml", "--config", "/nowhere"},
		"hosts.toml or re": {"install", "--format", "json"},
	} {
		if _, err := runHosts(t, args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}

// TestCheckMovesNoCursor: what stands in a runtime's files is shown without what a
// terminal obeys, and takes no line for a verdict of tarn's.
func TestCheckMovesNoCursor(t *testing.T) {
	dir := t.TempDir()
	file, config := filepath.Join(dir, "_default/hosts.toml"), filepath.Join(dir, "config.toml")
	err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.Mkdir(filepath.Join(dir, "x\x1b[2J"), 0o755),
		os.WriteFile(file, []byte("ca = \"/x\\u001b[2J\\r\\nused: containerd asks tarn\"\n[host.\"http://127.0.0.1:5050\"]\n"), 0o644),
		os.WriteFile(config, []byte("version = 3\n[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \""+dir+"\"\n"), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"check", "--config", config, "--containerd-version", "2.4"},
		{"install", "--certs-dir", dir, "--registry", "quay.io", "--dry-run"},
	} {
		out, _ := runHosts(t, args...)
		if !strings.Contains(out, "x?[2J") || strings.ContainsAny(out, "\x1b\r") || strings.Contains(out, "\nused: ") {
			t.Errorf("%v: it says %q", args, out)
		}
	}
}
