// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
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
