// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tarn/internal/registrytest"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// effectOfTrouble is the message of each warning of a registry that is not asked, or
// gives no answer.
const effectOfTrouble = "pulls of this registry go past tarn"

// proxiedHost is a name that httptest's certificate has.
const proxiedHost = "registry.example.com"

// roots is a file with the certificate of the server.
func roots(t *testing.T, s *httptest.Server) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	data := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// with sets variables of the environment, and none of the machine's proxies.
func with(variables ...string) func(*exec.Cmd) {
	return func(c *exec.Cmd) {
		c.Env = slices.DeleteFunc(c.Env, func(v string) bool { return strings.Contains(strings.ToLower(v), "_proxy=") })
		c.Env = append(c.Env, variables...)
	}
}

// refusal is the status and the message of an answer that is an error.
func (p *process) refusal(path string) (int, string) {
	p.t.Helper()
	resp, err := http.Get(p.url + path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	var body struct{ Errors []struct{ Message string } }
	if err := json.NewDecoder(resp.Body).Decode(&body); err != nil || len(body.Errors) != 1 {
		p.t.Fatalf("%s: %s: %v, %+v", path, resp.Status, err, body)
	}
	return resp.StatusCode, body.Errors[0].Message
}

// status is what the admin listener says, as text.
func (p *process) statusDocument() string {
	p.t.Helper()
	resp, err := http.Get(p.admin + "/api/v1/status")
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(text)
}

// TestTarnGoesOutByTheProxiesOfItsEnvironment: which it is told with a password, and
// the password is nowhere afterwards.
func TestTarnGoesOutByTheProxiesOfItsEnvironment(t *testing.T) {
	t.Parallel()
	reg := registrytest.NewTLS(t)
	d := reg.Blob("app", []byte("a blob"))
	f := registrytest.NewProxy(t, reg.Address(), httptest.NewServer)
	f.Password = "tarn:s3cr3t-of-the-proxy"
	at := strings.Replace(f.URL, "http://", "http://tarn:s3cr3t-of-the-proxy@", 1)
	settings := "default_upstream: " + proxiedHost + "\ndefaults: {ca_file: " + roots(t, reg.Server) + "}\n"
	p := runPrepared(t, t.TempDir(), settings, with("HTTPS_PROXY="+at, "NO_PROXY=direct.invalid"))
	p.mustGet("/v2/app/blobs/"+d.String(), []byte("a blob"))
	if told := f.Told(); len(told) != 1 || told[0] != proxiedHost+":443" {
		t.Errorf("the proxy was told %v", told)
	}
	status, words := p.refusal("/v2/app/manifests/v1?ns=other.example.com")
	if status != 502 || !strings.Contains(words, "not listed") || !strings.Contains(words, `upstreams: [{name: "other.example.com"}]`) || !strings.Contains(words, "allow_via_proxy: true") || len(f.Told()) != 1 {
		t.Errorf("an unlisted registry: %d %s; the proxy was told %v", status, words, f.Told())
	}
	if _, words := p.refusal("/v2/app/manifests/v1?ns=direct.invalid"); strings.Contains(words, "proxy") || len(f.Told()) != 1 {
		t.Errorf("whom NO_PROXY names: %s; the proxy was told %v", words, f.Told())
	}
	wrong := runPrepared(t, t.TempDir(), settings, with("HTTPS_PROXY="+strings.Replace(at, "s3cr3t", "wr0ng-s3cr3t", 1)))
	status, words = wrong.refusal("/v2/app/blobs/" + d.String())
	if status != 502 || !strings.Contains(words, "the proxy wants a user and password") {
		t.Errorf("the wrong password: %d %s", status, words)
	}
	for _, p := range []*process{p, wrong} {
		if all := p.output.String() + p.statusDocument() + words; strings.Contains(all, "s3cr3t") || !strings.Contains(all, strings.TrimPrefix(f.URL, "http://")) {
			t.Errorf("the password is told, or the proxy is not:\n%s", all)
		}
	}
	wrong.until("the log tells of the proxy", func() bool { return strings.Contains(wrong.output.String(), "go past tarn") })
	if lines := logged(t, wrong, effectOfTrouble); len(lines) != 1 || lines[0]["kind"] != "proxy" {
		t.Errorf("the log says %v", lines)
	}
}

// TestARegistryHasAProxyOfItsOwn: with what a file says for it.
func TestARegistryHasAProxyOfItsOwn(t *testing.T) {
	t.Parallel()
	reg := registrytest.NewTLS(t)
	d := reg.Blob("app", []byte("a blob"))
	f := registrytest.NewProxy(t, reg.Address(), httptest.NewTLSServer)
	f.Password = "tarn:p@ss:word/%"
	file := filepath.Join(t.TempDir(), "auth")
	if err := os.WriteFile(file, []byte(f.Password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := runPrepared(t, t.TempDir(), fmt.Sprintf("upstreams: [{name: %s, proxy: {url: %q, credentials_file: %s}}]\ndefaults: {ca_file: %s}\n",
		proxiedHost, f.URL, file, roots(t, f.Server)), with("HTTPS_PROXY=http://127.0.0.1:1"))
	p.mustGet("/v2/app/blobs/"+d.String()+"?ns="+proxiedHost, []byte("a blob"))
	if told := f.Told(); len(told) != 1 {
		t.Errorf("its proxy was told %v", told)
	}
}

// TestAReloadReadsAProxysPassword: it may have been replaced, as one in a Secret is.
func TestAReloadReadsAProxysPassword(t *testing.T) {
	t.Parallel()
	reg := registrytest.NewTLS(t)
	d := reg.Blob("app", []byte("a blob"))
	f := registrytest.NewProxy(t, reg.Address(), httptest.NewServer)
	f.Password = "tarn:new"
	file := filepath.Join(t.TempDir(), "auth")
	write := func(credentials string) {
		if err := os.WriteFile(file, []byte(credentials+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("tarn:old")
	p := runPrepared(t, t.TempDir(), fmt.Sprintf("upstreams: [{name: %s, proxy: {url: %q, credentials_file: %s}}]\ndefaults: {ca_file: %s}\n",
		proxiedHost, f.URL, file, roots(t, reg.Server)), with())
	path := "/v2/app/blobs/" + d.String() + "?ns=" + proxiedHost
	if status, words := p.refusal(path); status != 502 || !strings.Contains(words, "(407)") {
		t.Errorf("with the old one: %d %s", status, words)
	}
	write(f.Password)
	if said, err := p.reload(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	p.mustGet(path, []byte("a blob"))
}

// TestMistakesOfTheEgressAreOneClearLine: without the password.
func TestMistakesOfTheEgressAreOneClearLine(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "auth")
	if err := os.WriteFile(file, []byte("s3cr3t"), 0o600); err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(t.TempDir(), "none")
	for name, c := range map[string]struct{ variable, settings, want string }{
		"another kind of proxy": {"HTTPS_PROXY=socks5://u:s3cr3t@p:1080", "", `HTTPS_PROXY in the environment: the proxy's scheme must be http or https, and not "socks5"`},
		"no URL":                {"http_proxy=http://u:s3c r3t@p:1", "", "HTTP_PROXY in the environment: not the URL of a proxy"},
		"a file without a user": {"", "upstreams: [{name: a.io, proxy: {url: 'http://p:1', credentials_file: " + file + "}}]\n", file + " is not one line USER:PASSWORD"},
		"no such file":          {"", "upstreams: [{name: a.io, proxy: {url: 'http://p:1', credentials_file: " + none + "}}]\n", "credentials_file: open " + none + ": no such file"},
		"no such CA":            {"", "defaults: {ca_file: " + none + "}\n", "defaults: ca_file: open " + none + ": no such file"},
		"no certificate":        {"", "defaults: {ca_file: " + file + "}\n", file + " has no certificate in PEM form"},
	} {
		cmd := command("serve", "--config", anyDisk(t, c.settings), "--listen", "127.0.0.1:0", "--admin-listen", "", "--dir", t.TempDir())
		with(c.variable)(cmd)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.want) || strings.Contains(string(out), "s3c") {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
}

// TestWhatIsNotServedIsToldOnce: where only listed registries are, the others' pulls
// go past tarn, and the operator may not have meant that.
func TestWhatIsNotServedIsToldOnce(t *testing.T) {
	t.Parallel()
	p := runPrepared(t, t.TempDir(), "allow: listed\n", with())
	for range 3 {
		if status, words := p.refusal("/v2/app/manifests/v1?ns=other.example.com"); status != 404 || !strings.Contains(words, "not listed") {
			t.Errorf("%d %s", status, words)
		}
	}
	p.until("the requests are in the log", func() bool { return strings.Count(p.output.String(), `"status":404`) == 3 })
	lines := logged(t, p, effectOfTrouble)
	if len(lines) != 1 || lines[0]["kind"] != "unlisted" || !strings.Contains(fmt.Sprint(lines[0]["advice"]), `upstreams: [{name: "other.example.com"}]`) {
		t.Errorf("the log says %v", lines)
	}
	if s := p.statusDocument(); !strings.Contains(s, `"kind": "unlisted"`) {
		t.Errorf("the status says %s", s)
	}
}

// TestEachMistakeOfAFirstDayIsSaidThreeTimes: in the log, in the status, and to the
// client, with its cause.
func TestEachMistakeOfAFirstDayIsSaidThreeTimes(t *testing.T) {
	t.Parallel()
	secure, plain := registrytest.NewTLS(t), registrytest.New(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := l.Addr().String()
	l.Close()
	p := runPrepared(t, t.TempDir(), fmt.Sprintf(`
upstreams:
- {name: ca.test, endpoints: ["https://%s"]}
- {name: tls.test, endpoints: ["https://%s"]}
- {name: gone.test, endpoints: ["http://%s"]}
- {name: typo.invalid}
`, secure.Address(), plain.Address(), gone), with())
	for _, c := range []struct{ registry, kind, cause, client string }{
		{"ca.test", "certificate", "x509: certificate signed by unknown authority", "x509: certificate signed by unknown authority"},
		{"tls.test", "tls", "first record does not look like a TLS handshake", "it speaks no TLS there"},
		{"gone.test", "refused", "connect: connection refused", "connection refused"},
		{"typo.invalid", "name", "lookup typo.invalid", ""}, // by what name server, and how, is the machine's affair
		{"10.1.2.3:5000", "address", "10.1.2.3 is at 10.1.2.3:5000 (private)", `upstreams: [{name: "10.1.2.3:5000"}]`},
	} {
		status, words := p.refusal("/v2/app/blobs/" + digest.FromString("x").String() + "?ns=" + c.registry)
		if status != 502 || !strings.Contains(words, c.client) {
			t.Errorf("%s: the client hears %d %s", c.registry, status, words)
		}
		var lines []map[string]any
		p.until("the log tells of "+c.registry, func() bool {
			lines = slices.DeleteFunc(logged(t, p, effectOfTrouble), func(l map[string]any) bool { return l["upstream"] != c.registry })
			return len(lines) > 0
		})
		if len(lines) != 1 || lines[0]["kind"] != c.kind || !strings.Contains(fmt.Sprint(lines[0]["cause"]), c.cause) || lines[0]["advice"] == "" || lines[0]["level"] != "warn" {
			t.Errorf("%s: the log says %v", c.registry, lines)
		}
		var s struct{ Upstreams, Unlisted []upstream.Health }
		fetchJSON(t, p.admin+"/api/v1/status", &s)
		all := append(s.Upstreams, s.Unlisted...)
		i := slices.IndexFunc(all, func(h upstream.Health) bool { return string(h.Name) == c.registry })
		if i < 0 || len(all[i].Failing) != 1 || all[i].Failing[0].Kind != c.kind || !strings.Contains(all[i].Failing[0].Cause, c.cause) || all[i].Effect == "" {
			t.Errorf("%s: the status says %+v", c.registry, all)
		}
	}
}
