// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// manager is what a service manager has of a process.
type manager struct{ *net.UnixConn }

func newManager(t *testing.T) manager {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	if len(path) > maxSocketPath {
		t.Fatalf("%s is too long for a socket", path)
	}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return manager{c}
}

// until reads what tarn says, up to the state that begins so.
func (m manager) until(t *testing.T, prefix string) (state string) {
	t.Helper()
	m.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 4096)
	for {
		n, err := m.Read(buf)
		if err != nil {
			t.Fatalf("tarn never says %s: %v", prefix, err)
		}
		if state = string(buf[:n]); strings.HasPrefix(state, prefix) {
			return state
		}
	}
}

func TestTheServiceManagerIsTold(t *testing.T) {
	t.Parallel()
	for name, settings := range map[string]string{"http": "", "TLS": tlsSettings(nodeFiles(t))} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newManager(t)
			p := runPrepared(t, t.TempDir(), settings, func(cmd *exec.Cmd) {
				cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+m.LocalAddr().String(), "WATCHDOG_USEC=2000000")
			})
			m.until(t, "READY=1")
			for range 3 {
				m.until(t, "WATCHDOG=1")
			}
			p.Process.Signal(syscall.SIGHUP)
			if state := m.until(t, "RELOADING=1"); !strings.HasPrefix(state, "RELOADING=1\nMONOTONIC_USEC=") || strings.HasSuffix(state, "=0") {
				t.Errorf("%q", state)
			}
			m.until(t, "READY=1")
			p.Process.Signal(syscall.SIGTERM)
			m.until(t, "STOPPING=1")
			p.ended()
			if strings.Contains(p.output.String(), "does not answer itself") {
				t.Error("the log says that tarn did not answer")
			}
		})
	}
}

// TestWhoSaysNothingDoesNotAnswer: and who is refused, or closes, or wants a
// certificate, is there.
func TestWhoSaysNothingDoesNotAnswer(t *testing.T) {
	t.Parallel()
	f := nodeFiles(t)
	cert, err := tls.LoadX509KeyPair(f.Server, f.ServerKey)
	if err != nil {
		t.Fatal(err)
	}
	each := func(serve func(net.Conn)) net.Addr {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go serve(c)
			}
		}()
		return l.Addr()
	}
	silent := each(func(c net.Conn) { t.Cleanup(func() { c.Close() }) })
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	for what, c := range map[string]struct {
		at      net.Addr
		overTLS bool
		want    bool
	}{
		"silence":           {silent, false, false},
		"silence under TLS": {silent, true, false},
		"nobody":            {gone.Addr(), false, false},
		"one that closes":   {each(func(c net.Conn) { c.Close() }), false, true},
		"a certificate is wanted": {each(func(c net.Conn) {
			tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert}).Handshake()
			c.Close()
		}), true, true},
	} {
		if err := answers(t.Context(), c.at, c.overTLS, 500*time.Millisecond); (err == nil) != c.want {
			t.Errorf("%s: %v", what, err)
		}
	}
}
