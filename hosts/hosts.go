// SPDX-License-Identifier: Apache-2.0

// Package hosts has a node's container runtime ask tarn first, says whether it does
// and why not, and takes tarn away again.
//
// Contract: what is written is a hosts.toml (containerd's docs/hosts.md) below a
// certs.d directory, whose first line says that tarn wrote it, and by which command;
// only such a file is ever replaced or removed. A change is one rename, so that a
// reader, or who comes after a kill, sees the old state or the new one. Directories
// that were made for the file go with it.
//
// Failure model: what is there and is not tarn's is an error that says what to do
// about it, before anything is changed. A kill may leave a name that begins with
// ".tarn." beside what was to be changed; no runtime reads it, and the next install
// or remove deletes it.
//
// It never moves, rewrites or restarts what is not tarn's, and asks no network but
// the tarn that it is told of.
package hosts

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	// DefaultCertsDir is containerd's.
	DefaultCertsDir = "/etc/containerd/certs.d"
	// DefaultURL is where tarn listens.
	DefaultURL = "http://127.0.0.1:5050"

	// anyRegistry is the directory for every registry that has none of its own.
	anyRegistry = "_default"
	fileName    = "hosts.toml"
)

// Mirror is how a runtime reaches tarn. The files are absolute paths on the node, ""
// for none.
type Mirror struct {
	URL        string
	CA         string // what tarn's certificate is signed by
	ClientCert string // with which the runtime shows who it is
	ClientKey  string
}

// check says what is wrong with what an operator gave.
func (m Mirror) check() error {
	u, err := url.Parse(m.URL)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
		return fmt.Errorf("--url %q: must be http://HOST:PORT or https://HOST:PORT, as in %s", m.URL, DefaultURL)
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" || u.User != nil:
		return fmt.Errorf("--url %q: only a scheme, a host and a port; runtimes add the path", m.URL)
	case u.Scheme == "http" && (m.CA != "" || m.ClientCert != "" || m.ClientKey != ""):
		return fmt.Errorf("--url %s: certificates are for https; with http a runtime would try https first", m.URL)
	case (m.ClientCert == "") != (m.ClientKey == ""):
		return errors.New("a client certificate and its key go together")
	}
	for _, path := range []string{m.CA, m.ClientCert, m.ClientKey} {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("%s: must be an absolute path, since the runtime reads it", path)
		}
	}
	return nil
}

// writer is the command that wrote a file. Each takes away only its own.
type writer string

const (
	byInstall writer = "install"
	bySync    writer = "sync"
)

const (
	firstLine = "# Written by tarn hosts "
	madeLine  = "# Directories made for it: "
)

// render is a hosts.toml that asks tarn before the registry. made is how many of the
// directories above it were made for it; server is nil for _default, where it would
// send each registry's clients to one.
func render(by writer, made int, m Mirror, server *registry) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s%s; edits are not kept. tarn hosts remove takes away what install wrote.\n", firstLine, by)
	if made > 0 {
		fmt.Fprintf(&b, "%s%d\n", madeLine, made)
	}
	if server != nil {
		fmt.Fprintf(&b, "server = %s\n", quote(server.url))
		if len(server.ca) > 0 {
			fmt.Fprintf(&b, "ca = [%s]\n", quoteAll(server.ca))
		}
		var pairs []string
		for _, c := range server.client {
			if len(c) == 1 { // certificate and key in one file
				pairs = append(pairs, quote(c[0]))
			} else {
				pairs = append(pairs, "["+quoteAll(c)+"]")
			}
		}
		if len(pairs) > 0 {
			fmt.Fprintf(&b, "client = [%s]\n", strings.Join(pairs, ", "))
		}
	}
	b.WriteString("\n# Ask tarn first. While it does not answer, the registry itself is asked.\n")
	fmt.Fprintf(&b, "[host.%s]\n", quote(strings.TrimSuffix(m.URL, "/")))
	b.WriteString("  capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = \"3s\"\n")
	if m.CA != "" {
		fmt.Fprintf(&b, "  ca = %s\n", quote(m.CA))
	}
	if m.ClientCert != "" {
		fmt.Fprintf(&b, "  client = [[%s]]\n", quoteAll([]string{m.ClientCert, m.ClientKey}))
	}
	return b.Bytes()
}

// quote is a basic string of TOML 1.0; what strconv escapes, TOML does, but for \x, \a
// and \v, which no path has that can be written here.
func quote(s string) string { return strconv.Quote(s) }

func quoteAll(list []string) string {
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = quote(s)
	}
	return strings.Join(quoted, ", ")
}

// own tells whether tarn wrote the file, by which command, and how many directories
// were made for it.
func own(text []byte) (by writer, made int, ok bool) {
	line, rest, _ := strings.Cut(string(text), "\n")
	word, ok := strings.CutPrefix(line, firstLine)
	if !ok {
		return "", 0, false
	}
	word, _, _ = strings.Cut(word, ";")
	line, _, _ = strings.Cut(rest, "\n")
	if count, found := strings.CutPrefix(line, madeLine); found {
		made, _ = strconv.Atoi(count) // 0 for what somebody has changed: then none goes
	}
	return writer(word), made, true
}

// state is what a path is, links followed.
type state int

const (
	absent state = iota
	directory
	file
	dangling // a link that leads nowhere
)

func look(path string) (state, error) {
	info, err := os.Stat(path)
	switch {
	case err == nil && info.IsDir():
		return directory, nil
	case err == nil:
		return file, nil
	case !errors.Is(err, fs.ErrNotExist):
		return absent, err
	}
	if _, err := os.Lstat(path); err == nil {
		return dangling, nil
	}
	return absent, nil
}
