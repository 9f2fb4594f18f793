// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tarn/e2e/cri"
	"tarn/internal/nodeca"
)

// nodeCertificates are those of a node, as its operator would make them.
func nodeCertificates(t *testing.T, name string, hosts ...string) nodeca.Files {
	t.Helper()
	f, _, err := nodeca.Ensure(folder(t, work(), name), hosts, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func tlsSettings(f nodeca.Files) string {
	return fmt.Sprintf("tls: {cert_file: %s, key_file: %s, client_ca_file: %s}\n", f.Server, f.ServerKey, f.CA)
}

// mirrorTLS sends containerd to tarn over https, with the node's certificates.
func (c *containerd) mirrorTLS(t *testing.T, f nodeca.Files) {
	t.Helper()
	hosts := fmt.Sprintf(`server = "http://%s:5002"

[host."https://%s"]
  capabilities = ["pull", "resolve"]
  ca = %q
  client = [[%q, %q]]
`, upstreamName, tarnAddr, f.CA, f.Client, f.ClientKey)
	if err := os.WriteFile(filepath.Join(c.hosts, upstreamName, "hosts.toml"), []byte(hosts), 0o644); err != nil {
		t.Fatal(err)
	}
}

// impostor listens on tarn's port while tarn is away, and asks whoever comes for a
// password.
type impostor struct {
	*http.Server
	mu    sync.Mutex
	asked int
	shown []string
}

// startImpostor serves with the certificate, or without TLS if there is none.
func startImpostor(t *testing.T, certificates ...tls.Certificate) *impostor {
	t.Helper()
	l, err := net.Listen("tcp", tarnAddr)
	if err != nil {
		t.Fatal(err)
	}
	i := &impostor{}
	i.Server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.asked++
		i.shown = append(i.shown, r.Header["Authorization"]...)
		w.Header().Set("WWW-Authenticate", `Basic realm="tarn"`)
		w.WriteHeader(http.StatusUnauthorized)
	})}
	if len(certificates) > 0 {
		l = tls.NewListener(l, &tls.Config{Certificates: certificates, NextProtos: []string{"http/1.1"}})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		i.Serve(l)
	}()
	t.Cleanup(func() {
		i.Close()
		<-done
	})
	return i
}

// TestAnImpostorOnThePortGetsNoPassword: who has tarn's port while tarn is away is
// shown pull secrets over plain http, and nothing at all over TLS. containerd asks
// the registry itself then.
func TestAnImpostorOnThePortGetsNoPassword(t *testing.T) {
	own, others := nodeCertificates(t, "own"), nodeCertificates(t, "others")
	n := newPrivateNode(t, basicAuth(t), tlsSettings(own))
	c := &criClient{n.containerd, n.containerd.dialCRI(t)}
	n.containerd.mirrorTLS(t, own)
	i := pushSaying(t, "team/secret", "v1", "a secret")
	right := &cri.Auth{Username: user, Password: password}
	pull := func(what string) (past bool) {
		t.Helper()
		n.registry.take()
		if err := c.pullAs(t, i.ref(), right); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		for _, r := range n.registry.take() {
			past = past || r.route == pastTarn
		}
		c.forget(t, i.ref())
		return past
	}
	if pull("tarn over TLS") {
		t.Error("containerd asked the registry past tarn")
	}

	n.tarn.stop(t)
	forged, err := tls.LoadX509KeyPair(others.Server, others.ServerKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what         string
		mirror       func()
		certificates []tls.Certificate
		wantShown    bool
	}{
		{"plain http", func() { n.containerd.mirror(t, tarnAddr) }, nil, true}, // or this would prove nothing
		{"an impostor without TLS", func() { n.containerd.mirrorTLS(t, own) }, nil, false},
		{"an impostor with a certificate of its own", func() { n.containerd.mirrorTLS(t, own) }, []tls.Certificate{forged}, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			c.mirror()
			i := startImpostor(t, c.certificates...)
			if !pull(c.what) {
				t.Error("the image came from nowhere")
			}
			i.mu.Lock()
			defer i.mu.Unlock()
			if got := len(i.shown) > 0; got != c.wantShown {
				t.Errorf("asked %d times, and shown %d credentials", i.asked, len(i.shown))
			}
		})
	}
}

// TestAProcessWithoutTheNodesCertificateGetsNothing: with curl, as a process of the
// node has it.
func TestAProcessWithoutTheNodesCertificateGetsNothing(t *testing.T) {
	own, others := nodeCertificates(t, "own"), nodeCertificates(t, "others")
	newRegistry(t, nil)
	startTarn(t, folder(t, work(), "tarn"), tlsSettings(own))
	i := pushSaying(t, "public", "v1", "for all")
	curl := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		out, err := exec.CommandContext(ctx, "curl", append([]string{"-sS", "--fail-with-body"}, args...)...).CombinedOutput()
		return string(out), err
	}
	url := "https://" + tarnAddr + "/v2/public/manifests/v1?ns=" + upstreamName
	accept := []string{"-H", "Accept: " + i.top.MediaType, "--cacert", own.CA}
	if out, err := curl(append(accept, "--cert", own.Client, "--key", own.ClientKey, url)...); err != nil || !strings.Contains(out, "schemaVersion") {
		t.Fatalf("with the node's certificate: %v, %s", err, out)
	}
	for who, args := range map[string][]string{
		"no certificate":          {url},
		"another's certificate":   {"--cert", others.Client, "--key", others.ClientKey, url},
		"the server's own":        {"--cert", own.Server, "--key", own.ServerKey, url},
		"plain http":              {"http" + strings.TrimPrefix(url, "https")},
		"no certificate, TLS 1.2": {"--tls-max", "1.2", url},
		"a look at /v2/ only":     {"https://" + tarnAddr + "/v2/"},
	} {
		if out, err := curl(append(accept, args...)...); err == nil || strings.Contains(out, "schemaVersion") {
			t.Errorf("%s: %v, %s", who, err, out)
		} else {
			t.Logf("%s: %s", who, strings.TrimSpace(out))
		}
	}
}

// TestNoPullGoesPastTarnWhileItsCertificatesAreRenewed: containerd reads its side's
// files at each pull, and tarn its own, while they and the configuration change.
func TestNoPullGoesPastTarnWhileItsCertificatesAreRenewed(t *testing.T) {
	own := nodeCertificates(t, "own")
	n := newPrivateNode(t, basicAuth(t), tlsSettings(own))
	c := &criClient{n.containerd, n.containerd.dialCRI(t)}
	n.containerd.mirrorTLS(t, own)
	i := pushSaying(t, "team/secret", "v1", "a secret")
	stop, renewed := make(chan struct{}), make(chan int)
	go func() {
		times := 0
		defer func() { renewed <- times }()
		for {
			select {
			case <-stop:
				return
			default:
			}
			// Other names, so that there is another certificate.
			if _, _, err := nodeca.Ensure(filepath.Dir(own.CA), []string{fmt.Sprint("name", times)}, time.Now()); err != nil {
				t.Error(err)
				return
			}
			if err := n.tarn.cmd.Process.Signal(syscall.SIGHUP); err != nil {
				t.Error(err)
				return
			}
			times++
		}
	}()
	const pulls = 20
	for range pulls {
		n.registry.take()
		if err := c.pullAs(t, i.ref(), &cri.Auth{Username: user, Password: password}); err != nil {
			t.Error(err)
			continue
		}
		for _, r := range n.registry.take() {
			if r.route == pastTarn {
				t.Errorf("containerd asked the registry past tarn: %s (%d)", r, r.status)
			}
		}
		c.forget(t, i.ref())
	}
	close(stop)
	times := <-renewed
	if times < pulls {
		t.Errorf("renewed only %d times", times)
	}
	t.Logf("%d pulls, %d renewals", pulls, times)
}
