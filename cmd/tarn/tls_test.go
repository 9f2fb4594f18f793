// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tarn/internal/nodeca"
	"tarn/internal/registrytest"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// nodeFiles makes the certificates of a node.
func nodeFiles(t testing.TB) nodeca.Files {
	t.Helper()
	f, _, err := nodeca.Ensure(t.TempDir(), nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// tlsSettings are the lines of a configuration that has tarn serve with them.
func tlsSettings(f nodeca.Files) string {
	return fmt.Sprintf("tls: {cert_file: %s, key_file: %s, client_ca_file: %s}\n", f.Server, f.ServerKey, f.CA)
}

// tlsClient is the node's client where such lines stand in the settings; nil where
// there are none.
func tlsClient(t testing.TB, settings string) *http.Client {
	t.Helper()
	_, after, ok := strings.Cut(settings, "tls: {cert_file: ")
	if !ok {
		return nil
	}
	cert, _, _ := strings.Cut(after, ",")
	return clientOf(t, nodeca.In(filepath.Dir(cert)))
}

// clientOf believes the node's CA, and shows the node's client certificate as it is
// in the file by then.
func clientOf(t testing.TB, f nodeca.Files) *http.Client {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: &tls.Config{
		RootCAs: poolOf(t, f.CA),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			c, err := tls.LoadX509KeyPair(f.Client, f.ClientKey)
			return &c, err
		},
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func poolOf(t testing.TB, path string) *x509.CertPool {
	t.Helper()
	pool, err := readPool(path)
	if err != nil {
		t.Fatal(err)
	}
	return pool
}

func TestWhoHasNoCertificateOfTheNodeIsServedNothing(t *testing.T) {
	t.Parallel()
	f := nodeFiles(t)
	r := registrytest.New(t)
	d := r.Blob("app", []byte("a blob"))
	p := runWith(t, t.TempDir(), tlsSettings(f), "--upstream", "lab.test="+r.URL)
	path := "/v2/app/blobs/" + d.String() + "?ns=lab.test"
	resp := p.mustGet(path, []byte("a blob"))
	metrics, err := http.Get(p.admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer metrics.Body.Close()
	text, _ := io.ReadAll(metrics.Body)
	if want := fmt.Sprintf("tarn_certificate_expiry_timestamp_seconds %g\n", float64(leafOf(t, f.Server).NotAfter.Unix())); !strings.Contains(string(text), want) {
		t.Errorf("metrics lack %s", want)
	}
	if resp.ProtoMajor != 1 || resp.TLS == nil {
		t.Errorf("served over %s", resp.Proto)
	}
	other := nodeFiles(t)
	both := clientOf(t, other)
	both.Transport.(*http.Transport).TLSClientConfig.RootCAs = poolOf(t, f.CA)
	for who, client := range map[string]*http.Client{
		"nobody":             {Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: poolOf(t, f.CA)}}},
		"another node":       both,
		"who trusts another": clientOf(t, other),
	} {
		r.Reset()
		if resp, err := client.Get(p.url + path); err == nil {
			t.Errorf("%s: %s", who, resp.Status)
			resp.Body.Close()
		}
		if n := r.Count("GET", "") + r.Count("HEAD", ""); n > 0 {
			t.Errorf("%s: the registry was asked %d times", who, n)
		}
		client.CloseIdleConnections()
	}
}

// TestWhoSpeaksPlainHTTPIsToldSo: by net/http, before anything is read of the request.
func TestWhoSpeaksPlainHTTPIsToldSo(t *testing.T) {
	t.Parallel()
	p := runWith(t, t.TempDir(), tlsSettings(nodeFiles(t)))
	resp, err := http.Get("http" + strings.TrimPrefix(p.url, "https") + "/v2/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(body), "HTTP request to an HTTPS server") {
		t.Errorf("%s, %q", resp.Status, body)
	}
}

// copyFile puts the file of one set where the other one's is, as an operator would.
func copyFile(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	fresh := to + ".new"
	if err := errors.Join(os.WriteFile(fresh, text, 0o600), os.Rename(fresh, to)); err != nil {
		t.Fatal(err)
	}
}

// TestCertificatesFollowTheirFiles: what cannot be used changes nothing, and is said
// once; the other half has it used.
func TestCertificatesFollowTheirFiles(t *testing.T) {
	t.Parallel()
	core, logged := observer.New(zapcore.InfoLevel)
	f, next := nodeFiles(t), nodeFiles(t)
	certs, err := newCertificates(TLS{f.Server, f.ServerKey, f.CA}, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	shown := func() *tls.Config { now = now.Add(lookEvery); return certs.at(now) }
	first := shown()
	for range 3 {
		if shown() != first {
			t.Error("changed without a change")
		}
	}
	for _, spoil := range []func(){
		func() { copyFile(t, next.Server, f.Server) }, // the key is still to come
		func() { os.Remove(f.CA) },
	} {
		spoil()
		before := logged.FilterLevelExact(zapcore.ErrorLevel).Len()
		for range 3 {
			if shown() != first {
				t.Error("what cannot be used is used")
			}
		}
		if n := logged.FilterLevelExact(zapcore.ErrorLevel).Len() - before; n != 1 {
			t.Errorf("said %d times", n)
		}
	}
	copyFile(t, next.ServerKey, f.ServerKey)
	copyFile(t, next.CA, f.CA)
	if certs.at(now) != first {
		t.Error("looked at more than once a second")
	}
	second := shown()
	if second == first || !second.Certificates[0].Leaf.Equal(leafOf(t, next.Server)) || !second.ClientCAs.Equal(poolOf(t, next.CA)) {
		t.Error("what can be used is not")
	}
	if !second.SessionTicketsDisabled {
		t.Error("a ticket lets its holder in")
	}
}

func leafOf(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	c, err := tls.LoadX509KeyPair(path, strings.TrimSuffix(path, ".crt")+".key")
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf
}

func TestACertificateThatEndsIsSaidInTime(t *testing.T) {
	t.Parallel()
	f := nodeFiles(t)
	for days, want := range map[int]int{0: 0, 300: 0, 340: 1, 400: 1} {
		core, logged := observer.New(zapcore.WarnLevel)
		certs, err := newCertificates(TLS{CertFile: f.Server, KeyFile: f.ServerKey}, zap.New(core))
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now().AddDate(0, 0, days)
		for range 3 { // a day's clients
			now = now.Add(time.Hour)
			certs.at(now)
		}
		if n := logged.Len(); n != want {
			t.Errorf("after %d days: said %d times", days, n)
		}
		certs.at(now.Add(warnEvery))
		if n := logged.Len(); n != 2*want {
			t.Errorf("a day later: said %d times", n)
		}
	}
}

// TestNoPullFailsWhileCertificatesAreRenewed: with a connection for each, so that each
// shakes hands, against files that change all the time, and are half new in between.
func TestNoPullFailsWhileCertificatesAreRenewed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f, _, err := nodeca.Ensure(dir, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	r := registrytest.New(t)
	blob := []byte(strings.Repeat("a blob", 1000))
	d := r.Blob("app", blob)
	p := runWith(t, t.TempDir(), tlsSettings(f), "--upstream", "lab.test="+r.URL)
	var pulls atomic.Int64
	stop, done := make(chan struct{}), make(chan struct{})
	serials := make(map[string]bool)
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			client := clientOf(t, f) // which reads the CA anew, as containerd does
			resp, err := client.Get(p.url + "/v2/app/blobs/" + d.String() + "?ns=lab.test")
			if err != nil {
				t.Errorf("pull %d: %v", pulls.Load(), err)
				return
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || string(body) != string(blob) {
				t.Errorf("pull %d: %s, %d bytes, %v", pulls.Load(), resp.Status, len(body), err)
				return
			}
			serials[resp.TLS.PeerCertificates[0].SerialNumber.String()] = true
			client.CloseIdleConnections()
			pulls.Add(1)
		}
	}()
	const renewals = 3
	for i := range renewals {
		// Other names, so that the server's certificate is another one.
		if _, changed, err := nodeca.Ensure(dir, []string{fmt.Sprintf("name%d", i)}, time.Now()); err != nil || !changed {
			t.Fatal(changed, err)
		}
		said := i + 1
		p.until("the new certificate is used", func() bool {
			return strings.Count(p.output.String(), "are used from now on") >= said
		})
		before := pulls.Load()
		p.until("pulls go on", func() bool { return pulls.Load() > before+10 || t.Failed() })
	}
	close(stop)
	<-done
	if len(serials) != renewals+1 {
		t.Errorf("%d certificates were shown, want %d", len(serials), renewals+1)
	}
	t.Logf("%d pulls", pulls.Load())
}

// TestASlowHandshakeKeepsNobodyWaiting: who connects and says nothing.
func TestASlowHandshakeKeepsNobodyWaiting(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := r.Blob("app", []byte("a blob"))
	p := runWith(t, t.TempDir(), tlsSettings(nodeFiles(t)), "--upstream", "lab.test="+r.URL)
	for range 32 {
		c, err := net.Dial("tcp", strings.TrimPrefix(p.url, "https://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte{22, 3}); err != nil { // the beginning of one
			t.Fatal(err)
		}
	}
	p.mustGet("/v2/app/blobs/"+d.String()+"?ns=lab.test", []byte("a blob"))
}

// stalling is a connection on which nothing is sent any more after so many bytes.
type stalling struct {
	net.Conn
	left int
}

func (s *stalling) Write(p []byte) (int, error) {
	n := min(len(p), s.left)
	s.left -= n
	if _, err := s.Conn.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}

// TestHandshakesFitIntoTheMemory: each client may send a quarter of a megabyte before
// anybody knows whether it has a certificate, and stop then.
func TestHandshakesFitIntoTheMemory(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("the race detector, which runs the short tests, takes memory of its own")
	}
	const limit, connections, sent = 128 << 20, 600, 230 << 10
	f := nodeFiles(t)
	p := runPrepared(t, t.TempDir(), tlsSettings(f), func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, fmt.Sprint("GOMEMLIMIT=", limit))
	})
	before := residentOf(t, p)
	cert, err := tls.LoadX509KeyPair(f.Client, f.ClientKey)
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		cert.Certificate = append(cert.Certificate, make([]byte, 60<<10))
	}
	roots := poolOf(t, f.CA)
	var shaking sync.WaitGroup
	for range connections {
		c, err := net.Dial("tcp", strings.TrimPrefix(p.url, "https://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		shaking.Go(func() {
			s := &stalling{c, sent}
			// Those that are too many are closed, and the others believe that they are in.
			tls.Client(s, &tls.Config{RootCAs: roots, ServerName: "localhost", Certificates: []tls.Certificate{cert}}).Handshake()
		})
	}
	shaking.Wait()
	most := int64(0)
	p.until("tarn has read all that was sent", func() bool {
		most = max(most, residentOf(t, p)-before)
		return underWay(t, p) == 0
	})
	t.Logf("%d MiB more", most>>20)
	if most > limit*3/4 {
		t.Errorf("handshakes take %d MiB", most>>20)
	}
}

// underWay is how many bytes of connections to it are in the kernel's buffers
// (proc_net_tcp.txt: tx_queue:rx_queue).
func underWay(t *testing.T, p *process) (n int64) {
	t.Helper()
	text, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(strings.TrimPrefix(p.url, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	const local, remote, state, queues, established = 1, 2, 3, 4, "01"
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		at := fmt.Sprintf(":%04X", number)
		if f[state] != established || !strings.HasSuffix(f[local], at) && !strings.HasSuffix(f[remote], at) {
			continue
		}
		var sending, received int64
		if _, err := fmt.Sscanf(f[queues], "%x:%x", &sending, &received); err != nil {
			t.Fatal(err)
		}
		n += sending + received
	}
	return n
}

// residentOf is what of a process is in memory, in bytes.
func residentOf(t *testing.T, p *process) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(text), &size, &resident); err != nil {
		t.Fatal(err)
	}
	return resident * int64(os.Getpagesize())
}

// TestNobodyWaitsForAPipeInTheConfiguration: neither a handshake nor a reload.
func TestNobodyWaitsForAPipeInTheConfiguration(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	files := TLS{CertFile: pipe, KeyFile: pipe, ClientCAFile: pipe}
	for name, read := range map[string]func() error{
		"tls":              func() error { _, _, err := readCertificates(files); return err },
		"client_ca_file":   func() error { _, err := readPool(pipe); return err },
		"ca_file":          func() error { _, err := withRoots(pipe); return err },
		"credentials_file": func() error { _, err := readCredentials(pipe); return err },
	} {
		done := make(chan error, 1)
		go func() { done <- read() }()
		select {
		case err := <-done:
			if err == nil || !strings.Contains(err.Error(), pipe+" is no file") {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s: it waits", name)
		}
	}
}
