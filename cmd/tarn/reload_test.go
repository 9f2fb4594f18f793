// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tarn/internal/nodeca"
	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

// configure replaces the configuration of a running tarn, which does not know it yet.
func (p *process) configure(settings string) {
	p.t.Helper()
	path := p.Args[slices.Index(p.Args, "--config")+1]
	if err := os.WriteFile(path, []byte("min_free: 0\nadmin_socket: "+socketIn(p.t, p.dir)+"\n"+settings), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// reload runs tarn reload, and returns what it says.
func (p *process) reload() (string, error) {
	p.t.Helper()
	var out bytes.Buffer
	cmd := command("reload", "--admin", p.socket())
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

func (p *process) mustReload(settings, want string) {
	p.t.Helper()
	p.configure(settings)
	if out, err := p.reload(); err != nil || out != want {
		p.t.Fatalf("tarn reload: %v\n%s\n%s", err, out, p.output.String())
	}
}

func upstreamsOf(url string, more ...string) string {
	return fmt.Sprintf("upstreams:\n- name: lab.test\n  endpoints: [%q]\n%s", url, strings.Join(more, ""))
}

// status is the answer to a request, its body thrown away.
func (p *process) status(path string) int {
	p.t.Helper()
	resp, _, err := p.get(path)
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.StatusCode
}

func TestAReloadSaysWhatOnlyARestartChanges(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	p := runWith(t, t.TempDir(), upstreamsOf(r.URL))
	if got, err := p.reload(); err != nil || got != "reloaded\n" {
		t.Errorf("without a change: %q, %v", got, err)
	}
	p.mustReload("max_size: 1GiB\nadmin_changes: tcp\nlog_level: debug\n"+
		fmt.Sprintf("tls: {cert_file: %[1]s, key_file: %[1]s}\n", "/x")+upstreamsOf(r.URL),
		"reloaded\nchanged, but only a restart uses it: admin_changes, max_size, tls\n")
	p.until("the log says so", func() bool {
		return strings.Contains(p.output.String(), `"needs_restart":["admin_changes","max_size","tls"]`)
	})
	// Flags go before the file also now.
	p.mustReload("dir: /elsewhere\nlisten: 127.0.0.1:1\nnames: [other.example]\n"+upstreamsOf(r.URL), "reloaded\n")
	req, err := http.NewRequest("GET", p.url+"/v2/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "other.example"
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("under a new name: %s", resp.Status)
	}
}

func TestSIGHUPReloads(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	p := runWith(t, t.TempDir(), upstreamsOf(r.URL))
	d := r.Blob("app", []byte("a blob"))
	p.mustGet("/v2/app/blobs/"+d.String()+"?ns=lab.test", []byte("a blob"))
	before := strings.Count(p.output.String(), `"msg":"request"`)
	p.configure("log_level: warn\n" + upstreamsOf(r.URL))
	p.Process.Signal(syscall.SIGHUP)
	p.until("it is reloaded", func() bool {
		resp, err := http.Get(p.admin + "/healthz")
		if err == nil {
			resp.Body.Close()
		}
		n := strings.Count(p.output.String(), `"msg":"request"`)
		p.status("/v2/")
		after := strings.Count(p.output.String(), `"msg":"request"`)
		return before > 0 && n == after
	})
}

// TestABadFileChangesNothing: whatever of it is bad, and however much else it says.
func TestABadFileChangesNothing(t *testing.T) {
	t.Parallel()
	f := nodeFiles(t)
	r := registrytest.New(t)
	d := r.Blob("app", []byte("a blob"))
	p := runWith(t, t.TempDir(), tlsSettings(f)+upstreamsOf(r.URL))
	path := "/v2/app/blobs/" + d.String() + "?ns=lab.test"
	const none = "allow: listed\nlog_level: error\n" // with which the blob would be nobody's
	for what, c := range map[string]struct{ settings, want string }{
		"a mistake":               {none + tlsSettings(f) + "alow: x\n", `unknown key "alow"`},
		"a CA that is not there":  {none + tlsSettings(f) + upstreamsOf(r.URL, "  ca_file: "+filepath.Join(t.TempDir(), "none")+"\n"), "ca_file: open "},
		"a share without secret":  {none + tlsSettings(f) + upstreamsOf(r.URL, "  share: [a]\n"), "set credentials: too"},
		"a certificate of others": {none + strings.Replace(tlsSettings(f), f.ServerKey, f.ClientKey, 1), "private key does not match"},
		"clients' CA that is not": {none + strings.Replace(tlsSettings(f), f.CA, f.ServerKey, 1), "has no certificate in PEM form"},
	} {
		p.configure(c.settings)
		got, err := p.reload()
		if err == nil || !strings.HasPrefix(got, "tarn: ") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %v, %s", what, err, got)
		}
		before := strings.Count(p.output.String(), `"msg":"request"`)
		p.mustGet(path, []byte("a blob"))
		p.until("the request is logged", func() bool { return strings.Count(p.output.String(), `"msg":"request"`) > before })
	}
}

// TestWhatIsSharedNoMoreIsNobodysAtOnce: also over a connection that is open, also what
// is stored, and also for who had it a moment ago.
func TestWhatIsSharedNoMoreIsNobodysAtOnce(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	r.Access = registrytest.NewAccess(t, "Basic")
	r.Access.Allow("platform/app", "node")
	secret := bytes.Repeat([]byte("a secret"), 100_000)
	d := r.Blob("platform/app", secret)
	docker := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(docker, fmt.Appendf(nil, `{"auths":{"lab.test":{"username":"node","password":%q}}}`, registrytest.Password("node")), 0o600); err != nil {
		t.Fatal(err)
	}
	credentials := fmt.Sprintf("  realm: %s/token\n  credentials: {docker_config: %q}\n", r.Access.Service.URL, docker)
	p := runWith(t, t.TempDir(), upstreamsOf(r.URL, credentials, "  share: [platform/*]\n"))
	path := "/v2/platform/app/blobs/" + d.String() + "?ns=lab.test"
	for range 2 {
		p.mustGet(path, secret)
	}
	p.mustReload(upstreamsOf(r.URL, credentials), "reloaded\n")
	if got := p.status(path); got != http.StatusUnauthorized {
		t.Errorf("no longer shared: %d", got)
	}
	p.mustReload("", "reloaded\n")
	if got := p.status(path); got < 400 { // a stranger's name, which resolves to nothing
		t.Errorf("no longer listed: %d", got)
	}
}

// TestAnotherAuthoritysWordIsForgotten: what the one served to anonymous, the other may
// never have had.
func TestAnotherAuthoritysWordIsForgotten(t *testing.T) {
	t.Parallel()
	one, two := registrytest.New(t), registrytest.New(t)
	old, fresh := one.Blob("app", []byte("old")), two.Blob("app", []byte("fresh"))
	p := runWith(t, t.TempDir(), upstreamsOf(one.URL))
	at := func(d digest.Digest) string { return "/v2/app/blobs/" + d.String() + "?ns=lab.test" }
	p.mustGet(at(old), []byte("old"))
	p.mustReload(upstreamsOf(two.URL), "reloaded\n")
	p.mustGet(at(fresh), []byte("fresh")) // anonymous has a grant for the repository now
	if got := p.status(at(old)); got != http.StatusNotFound {
		t.Errorf("what only the other authority has: %d", got)
	}
	// A reload that leaves an authority as it is costs nobody what he was given.
	p.mustReload("names: [x.example]\n"+upstreamsOf(two.URL), "reloaded\n")
	two.Reset()
	p.mustGet(at(fresh), []byte("fresh"))
	if n := two.Count("GET", ""); n != 1 {
		t.Errorf("asked %d times for what is stored", n)
	}
}

func TestARunningAnswerEndsAsItBegan(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	blob := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(blob)
	d := r.Blob("app", blob)
	gate, waiting := make(chan struct{}), make(chan struct{}, 16)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		w.Write(blob[:1<<19])
		w.(http.Flusher).Flush()
		waiting <- struct{}{}
		<-gate
		w.Write(blob[1<<19:])
		return true
	}
	p := runWith(t, t.TempDir(), upstreamsOf(r.URL))
	path := "/v2/app/blobs/" + d.String() + "?ns=lab.test"
	resp, err := http.Get(p.url + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	<-waiting
	p.mustReload("allow: listed\n", "reloaded\n")
	if got := p.status(path); got != http.StatusNotFound {
		t.Errorf("who comes now: %d", got)
	}
	close(gate)
	got, err := io.ReadAll(resp.Body)
	if err != nil || digest.FromBytes(got) != d {
		t.Errorf("the running answer: %d bytes, %v", len(got), err)
	}
	p.terminate() // waits for what the reload replaced, too
}

// TestNoPullFailsWhileTheConfigurationIsReloaded: with certificates that are renewed
// meanwhile.
func TestNoPullFailsWhileTheConfigurationIsReloaded(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f, _, err := nodeca.Ensure(dir, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	r := registrytest.New(t)
	layer := bytes.Repeat([]byte("layer"), 300_000)
	img := r.Image("app", "v1", layer)
	p := runWith(t, t.TempDir(), tlsSettings(f)+upstreamsOf(r.URL))
	var pulls atomic.Int64
	stop, done := make(chan struct{}), make(chan error, 2)
	for range cap(done) {
		go func() {
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				if err := pullOnce(p, clientOf(t, f), img, layer); err != nil {
					done <- fmt.Errorf("pull %d: %w", pulls.Load(), err)
					return
				}
				pulls.Add(1)
			}
		}()
	}
	const reloads = 12
	for i := range reloads {
		settings := fmt.Sprintf("names: [name%d.example]\nprefetch: %s\n%sdefaults: {grant_ttl: %ds}\n", i, []string{"off", "layers"}[i%2], tlsSettings(f), i)
		if i%4 == 0 {
			if _, _, err := nodeca.Ensure(dir, []string{fmt.Sprint("name", i)}, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		p.mustReload(settings+upstreamsOf(r.URL), "reloaded\n")
		before := pulls.Load()
		p.until("pulls go on", func() bool { return pulls.Load() > before+3 || len(done) > 0 })
	}
	close(stop)
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d pulls", pulls.Load())
}

// pullOnce fetches the tag, the config and the layer, as containerd does.
func pullOnce(p *process, client *http.Client, img registrytest.Image, layer []byte) error {
	defer client.CloseIdleConnections()
	for path, want := range map[string][]byte{
		"manifests/v1":                       img.Body,
		"blobs/" + img.Config.String():       nil,
		"blobs/" + img.Layers[0].String():    layer,
		"manifests/" + img.Manifest.String(): img.Body,
	} {
		resp, err := client.Get(p.url + "/v2/app/" + path + "?ns=lab.test")
		if err != nil {
			return err
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || want != nil && !bytes.Equal(got, want) {
			return fmt.Errorf("%s: %s, %d bytes, %w", path, resp.Status, len(got), err)
		}
	}
	return nil
}

func TestAReloadIsAskedForOverTheSocket(t *testing.T) {
	t.Parallel()
	p := run(t, t.TempDir())
	widened := runWith(t, t.TempDir(), "admin_changes: tcp\n")
	for what, c := range map[string]struct {
		client     *http.Client
		url        string
		mediaType  string
		wantStatus int
	}{
		"the admin listener":  {http.DefaultClient, p.admin, "application/json", http.StatusForbidden},
		"one that changes":    {http.DefaultClient, widened.admin, "application/json", http.StatusForbidden},
		"a page of a browser": {p.overSocket(), "http://localhost", "text/plain", http.StatusUnsupportedMediaType},
		"the socket":          {p.overSocket(), "http://localhost", "application/json", http.StatusOK},
	} {
		resp, err := c.client.Post(c.url+"/api/v1/reload", c.mediaType, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.wantStatus {
			t.Errorf("%s: %s, %s", what, resp.Status, body)
		}
	}
}

// TestASecondSIGINTEndsAtOnce: what the first one waits for is said.
func TestASecondSIGINTEndsAtOnce(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	blob := make([]byte, 1<<20)
	d := r.Blob("app", blob)
	gate := make(chan struct{})
	defer close(gate)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		w.Write(blob[:1<<19])
		w.(http.Flusher).Flush()
		<-gate
		return true
	}
	p := run(t, t.TempDir(), "--upstream", "lab.test="+r.URL)
	resp, err := http.Get(p.url + "/v2/app/blobs/" + d.String() + "?ns=lab.test")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	p.Process.Signal(os.Interrupt)
	p.until("it says what it waits for", func() bool {
		return strings.Contains(p.output.String(), `"running_answers":1`)
	})
	p.Process.Signal(os.Interrupt)
	select {
	case <-p.exited:
	case <-time.After(5 * time.Second):
		t.Fatal("still there 5 s after a second SIGINT")
	}
	var exit *exec.ExitError
	if !errors.As(p.err, &exit) || exit.ExitCode() != 128+int(syscall.SIGINT) {
		t.Errorf("ended with %v", p.err)
	}
}
