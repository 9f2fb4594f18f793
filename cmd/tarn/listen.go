// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"go.uber.org/zap"
)

func listen(network, addr string) (net.Listener, error) {
	l, err := net.Listen(network, addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s is taken by another process (perhaps another tarn); choose another address, or stop that process", addr)
	}
	return l, err
}

// listeners are those that the configuration names. The second and third may be nil.
type listeners struct{ clients, admin, metrics net.Listener }

// listenAll opens where clients are served, the admin listener, and that for metrics.
func listenAll(cfg Config) (ls listeners, err error) {
	if ls.clients, err = listen("tcp", cfg.Listen); err != nil {
		return ls, fmt.Errorf("listen: %w", err)
	}
	if ls.admin, err = listenAdmin(cfg.AdminListen); err != nil {
		ls.close()
		return ls, fmt.Errorf("admin_listen: %w", err)
	}
	if cfg.MetricsListen == "" {
		return ls, nil
	}
	if ls.metrics, err = listen("tcp", cfg.MetricsListen); err != nil {
		ls.close()
		return ls, fmt.Errorf("metrics_listen: %w", err)
	}
	return ls, nil
}

func (ls listeners) close() {
	for _, l := range []net.Listener{ls.clients, ls.admin, ls.metrics} {
		closeListener(l)
	}
}

// closeListener is for those that may be nil.
func closeListener(l net.Listener) {
	if l != nil {
		l.Close()
	}
}

// listenAdmin takes host:port or unix:/path; "" is no listener.
func listenAdmin(addr string) (net.Listener, error) {
	if addr == "" {
		return nil, nil
	}
	if path, ok := strings.CutPrefix(addr, unixPrefix); ok {
		return listenSocketAt(path)
	}
	return listen("tcp", addr)
}

// listenSocketAt makes the directory of a socket that the operator named.
func listenSocketAt(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	return listenSocket(path)
}

// listenChanges opens the admin socket; nil where there is none. Where no place
// can be found for it, tarn serves all the same.
func listenChanges(cfg Config, log *zap.Logger) (net.Listener, error) {
	switch {
	case cfg.AdminSocket == socketOff:
		return nil, nil
	case cfg.AdminSocket != "":
		return listenSocketAt(cfg.AdminSocket)
	case strings.HasPrefix(cfg.AdminListen, unixPrefix):
		return nil, nil // which is one
	}
	l, err := listenFirst(append(runPlaces(), realDir(cfg.Dir)))
	if err != nil {
		log.Warn("there is no place for the admin socket, over which images are pinned, evicted and verified: name one as admin_socket", zap.Error(err))
		return nil, nil
	}
	return l, nil
}

// addressAt is where a listener is; "" where there is none.
func addressAt(l net.Listener) string {
	switch {
	case l == nil:
		return ""
	case l.Addr().Network() == "unix":
		return addressOf(l)
	}
	return l.Addr().String()
}

func addressOf(socket net.Listener) string {
	if socket == nil {
		return ""
	}
	return unixPrefix + socket.Addr().String()
}

// readOnly are the words for who asks the admin listener for a change; "" where it
// takes them.
func readOnly(cfg Config, l, socket net.Listener) string {
	switch {
	case cfg.AdminChanges == "tcp" || l.Addr().Network() == "unix":
		return ""
	case socket == nil:
		return "this listener is only for reading, and there is no admin socket for what changes something: set admin_socket in tarn's configuration, or admin_changes: tcp to allow it here"
	}
	return "this listener is only for reading; what changes something is asked for at " + addressOf(socket) +
		", by the user that tarn runs as: with sudo, or in tarn's pod (kubectl exec), tarn pin, unpin, evict and verify find it by themselves; admin_changes: tcp in tarn's configuration would allow it here"
}

// namesElsewhere are the words for who asks the admin listener for names of images; ""
// where it tells them.
func namesElsewhere(cfg Config, l, socket net.Listener) string {
	switch {
	case cfg.AdminNames == "tcp" || l.Addr().Network() == "unix":
		return ""
	case socket == nil:
		return "names of images are told over the admin socket only, and there is none: set admin_socket in tarn's configuration, or admin_names: tcp"
	}
	return "names of images are told at " + addressOf(socket) + " only, by the user that tarn runs as: with sudo, or in tarn's pod (kubectl exec), the commands find it by themselves; admin_names: tcp in tarn's configuration would have them told here"
}
