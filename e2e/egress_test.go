// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// newNetns makes a network namespace with nothing but loopback, and returns its path.
func newNetns(t *testing.T, name string, lines ...string) string {
	t.Helper()
	for _, line := range append([]string{"netns add " + name, "-n " + name + " link set lo up"}, lines...) {
		if err := command(t, nil, "ip", strings.Fields(line)...); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := command(t, nil, "ip", "netns", "del", name); err != nil {
			t.Error(err)
		}
	})
	return "/run/netns/" + name
}

// inside is a tarn in another network namespace, and a client of it there.
type inside struct {
	*process
	client http.Client
	url    string
}

// startInside starts tarn in that namespace, with these variables. The configuration
// says where it listens; client is the host:port of its registry API.
func startInside(t *testing.T, netns, addr, settings string, variables ...string) *inside {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "tarn.yaml")
	writeFile(t, config, "min_free: 0\nadmin_socket: off\nlog_level: debug\ndir: "+filepath.Join(dir, "data")+"\nlisten: \""+addr+"\"\n"+settings)
	args := append([]string{"--net=" + netns, "env"}, variables...)
	in := &inside{process: start(t, "tarn", "nsenter", append(args, filepath.Join(work(), "tarn"), "serve", "--config", config)...), url: "http://" + addr}
	transport := &http.Transport{DialContext: func(_ context.Context, network, to string) (conn net.Conn, err error) {
		err = inNetns(netns, func() (err error) {
			conn, err = net.Dial(network, to)
			return err
		})
		return conn, err
	}}
	t.Cleanup(transport.CloseIdleConnections)
	in.client.Transport = transport
	waitFor(t, "tarn serves", func() error {
		if err := in.alive(); err != nil {
			t.Fatalf("%v; its log:\n%s", err, in.tail(t))
		}
		resp, err := in.client.Get(in.url + "/v2/")
		if err == nil {
			resp.Body.Close()
		}
		return err
	})
	return in
}

// get asks tarn, with a password where there is one, and returns status and body.
func (in *inside) get(t *testing.T, path, password string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, in.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if password != "" {
		req.SetBasicAuth(user, password)
	}
	resp, err := in.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	return resp.StatusCode, string(body)
}

// egress is a proxy that listens in one network namespace and connects in ours: for
// who is in there, it is the only way out.
type egress struct {
	to    map[string]string // where a host is really reached
	opens *tls.Config       // where it opens TLS, what it says who it is

	mu   sync.Mutex
	told []string
	read bytes.Buffer // all that clients sent it, as it could read it
}

func startEgress(t *testing.T, netns, addr string, e *egress) {
	server := &http.Server{Handler: e}
	l := listenIn(t, netns, addr)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
}

func (e *egress) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.read.Write(p)
}

// knows tells whether the proxy could read user's password.
func (e *egress) knows(password string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return bytes.Contains(e.read.Bytes(), []byte(password)) ||
		bytes.Contains(e.read.Bytes(), []byte(base64.StdEncoding.EncodeToString([]byte(user+":"+password))))
}

// take returns the hosts that it was told since the last time.
func (e *egress) take() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	told := e.told
	e.told = nil
	return told
}

func (e *egress) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	e.told = append(e.told, r.Host)
	e.mu.Unlock()
	r.Write(e)
	conn, err := net.Dial("tcp", e.to[r.Host])
	if r.Method != http.MethodConnect || err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer conn.Close()
	hijacked, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	client := hijacked
	defer hijacked.Close()
	io.WriteString(hijacked, "HTTP/1.1 200 OK\r\n\r\n")
	if e.opens != nil { // what it reads it passes on without TLS
		client = tls.Server(hijacked, e.opens)
	}
	go func() {
		io.Copy(conn, io.TeeReader(client, e))
		conn.Close()
	}()
	io.Copy(client, conn)
}

const (
	outsideName = "registry.outside.example"
	tlsAddr     = "127.0.0.1:5443" // the registry with TLS, in our namespace
	egressAddr  = "127.0.0.1:3128"
)

// TestTheOnlyWayOutIsAProxy: public and private pulls go by it, and it reads no
// credential, and is not told of what strangers must not reach.
func TestTheOnlyWayOutIsAProxy(t *testing.T) {
	protected := newRegistry(t, basicAuth(t))
	i := pushSaying(t, "team/app", "v1", "from outside")
	cert, file := certificate(t, outsideName)
	startTLS(t, tlsAddr, cert, protected.recorded(byTarn))
	netns := newNetns(t, "behind")
	e := &egress{to: map[string]string{outsideName + ":443": tlsAddr}}
	startEgress(t, netns, egressAddr, e)
	const settings = "admin_listen: ''\ndefault_upstream: " + outsideName + "\n"
	path := "/v2/" + i.repo + "/manifests/" + i.tag + "?ns=" + outsideName

	none := startInside(t, netns, tarnAddr, settings, "SSL_CERT_FILE="+file)
	if status, body := none.get(t, path, password); status != http.StatusBadGateway || len(e.take()) != 0 {
		t.Errorf("without a proxy: %d %s", status, body)
	}
	none.stop(t)

	in := startInside(t, netns, tarnAddr, settings, "SSL_CERT_FILE="+file, "HTTPS_PROXY=http://"+egressAddr)
	if status, body := in.get(t, path, ""); status != http.StatusUnauthorized {
		t.Errorf("without a password: %d %s", status, body)
	}
	if status, body := in.get(t, path, "a wrong one"); status != http.StatusUnauthorized {
		t.Errorf("with a wrong password: %d %s", status, body)
	}
	for _, o := range i.objects {
		kind := "blobs"
		if o.Digest == i.top.Digest {
			kind = "manifests"
		}
		if status, body := in.get(t, "/v2/"+i.repo+"/"+kind+"/"+o.Digest.String()+"?ns="+outsideName, password); status != http.StatusOK || int64(len(body)) != o.Size {
			t.Errorf("%s: %d and %d bytes of %d", o.Digest, status, len(body), o.Size)
		}
	}
	if told := slices.Compact(e.take()); !slices.Equal(told, []string{outsideName + ":443"}) {
		t.Errorf("the proxy was told %v", told)
	}
	if e.knows(password) {
		t.Error("the proxy knows the password")
	}
	for _, unlisted := range []string{"stranger.example", evilName, upstreamName, "10.0.0.1", "169.254.169.254"} {
		if status, body := in.get(t, "/v2/app/manifests/v1?ns="+unlisted, ""); status != http.StatusBadGateway || !strings.Contains(body, unlisted) {
			t.Errorf("%s: %d %s", unlisted, status, body)
		}
	}
	if told := e.take(); len(told) != 0 {
		t.Errorf("of registries that are not listed, the proxy was told %v", told)
	}
	in.stop(t)

	// evilName has a public address here, upstreamName is at loopback, and nobody
	// here knows the stranger.
	open := startInside(t, netns, tarnAddr, settings+"allow_via_proxy: true\n", "SSL_CERT_FILE="+file, "HTTPS_PROXY=http://"+egressAddr)
	for unlisted, passes := range map[string]bool{"stranger.example": true, evilName: true, upstreamName: false, "10.0.0.1": false, "169.254.169.254": false, "127.1": false, "intranet": false} {
		status, body := open.get(t, "/v2/app/manifests/v1?ns="+unlisted, "")
		told := slices.Compact(e.take()) // a HEAD and a GET
		if status != http.StatusBadGateway || passes != slices.Equal(told, []string{unlisted + ":443"}) || !passes && len(told) != 0 {
			t.Errorf("%s: %d %s; the proxy was told %v", unlisted, status, body, told)
		}
	}
}

// TestAProxyThatOpensTLS: with a certificate of its own, which nobody believes but
// who is told of it.
func TestAProxyThatOpensTLS(t *testing.T) {
	newRegistry(t, nil)
	i := pushSaying(t, "app", "v1", "from outside")
	cert, file := certificate(t, outsideName)
	netns := newNetns(t, "opened")
	e := &egress{to: map[string]string{outsideName + ":443": forTarnAddr}, opens: &tls.Config{Certificates: []tls.Certificate{cert}}}
	startEgress(t, netns, egressAddr, e)
	const settings = "admin_listen: ''\nallow_via_proxy: true\n" // and nobody lists it
	path := "/v2/" + i.repo + "/manifests/" + i.tag + "?ns=" + outsideName
	closed := startInside(t, netns, tarnAddr, settings, "HTTPS_PROXY=http://"+egressAddr)
	if status, body := closed.get(t, path, ""); status != http.StatusBadGateway || !strings.Contains(body, "x509: certificate signed by unknown authority") {
		t.Errorf("without its CA: %d %s", status, body)
	}
	closed.stop(t)
	in := startInside(t, netns, tarnAddr, settings+"defaults: {ca_file: "+file+"}\n", "HTTPS_PROXY=http://"+egressAddr)
	if err := command(t, nil, "nsenter", "--net="+netns, "skopeo", "--insecure-policy", "copy", "--src-tls-verify=false",
		"docker://"+tarnAddr+"/"+outsideName+"/"+i.repo+":"+i.tag, "dir:"+t.TempDir()); err != nil {
		t.Error(err)
	}
	in.get(t, path, password)
	if !e.knows(password) {
		t.Error("this proxy reads all, and not the password: the other test shows nothing")
	}
}

// TestANodeWithoutIPv4: no address of IPv4 is there, not even on loopback.
func TestANodeWithoutIPv4(t *testing.T) {
	r := newRegistry(t, nil)
	i := pushSaying(t, "app", "v1", "by IPv6")
	netns := newNetns(t, "six", "-n six addr del 127.0.0.1/8 dev lo", "-n six addr add fd00:5::1/128 dev lo nodad")
	for _, addr := range []string{"[::1]:5001", "[fd00:5::1]:5002"} {
		l := listenIn(t, netns, addr)
		server := &http.Server{Handler: r.recorded(byTarn)}
		done := make(chan error, 1)
		go func() { done <- server.Serve(l) }()
		t.Cleanup(func() {
			server.Close()
			<-done
		})
	}
	in := startInside(t, netns, "[::1]:5050", `
admin_listen: "[::1]:5051"
upstreams:
- {name: "six.test:5001", endpoints: ["http://[::1]:5001"]}
- {name: "[fd00:5::1]:5002", endpoints: ["http://[fd00:5::1]:5002"]}
- {name: "both.test", endpoints: ["http://localhost:5001"]}
`)
	for _, name := range []string{"six.test:5001", "[fd00:5::1]:5002", "both.test"} {
		if status, body := in.get(t, "/v2/"+i.repo+"/manifests/"+i.tag+"?ns="+name, ""); status != http.StatusOK || !strings.Contains(body, i.objects[1].Digest.String()) {
			t.Errorf("%s: %d %s", name, status, body)
		}
	}
	if len(r.requests) == 0 {
		t.Error("nobody was asked")
	}
	in.url = "http://[::1]:5051"
	if status, body := in.get(t, "/readyz", ""); status != http.StatusOK {
		t.Errorf("the admin listener: %d %s", status, body)
	}
	in.url = "http://[::1]:5050"
	if status, body := in.get(t, "/v2/app/manifests/v1?ns=[fd00:5::2]:5002", ""); status != http.StatusBadGateway || !strings.Contains(body, fmt.Sprintf("upstreams: [{name: \\\"%s\\\"}]", "[fd00:5::2]:5002")) {
		t.Errorf("a private address that is not listed: %d %s", status, body)
	}
}

// startTLS serves at addr in our namespace.
func startTLS(t *testing.T, addr string, cert tls.Certificate, h http.Handler) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: h, TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}}
	done := make(chan error, 1)
	go func() { done <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
}
