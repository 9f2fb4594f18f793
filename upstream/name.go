// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// DockerHub is the canonical name of Docker Hub. Its registry answers under
// another host name, see hubHost.
const DockerHub Name = "docker.io"

// hubHost is where the registry that is called docker.io really lives.
const hubHost = "registry-1.docker.io"

// ErrName is wrapped by every error of ParseName and ParsePathName.
var ErrName = errors.New("not a registry name")

// maxNameLength is the limit of a DNS name (RFC 1035 2.3.4) plus ":65535".
const maxNameLength = 253 + 6

// Name is an upstream registry under its canonical name, as in "docker.io",
// "ghcr.io" or "registry.corp:5000". Only ParseName and ParsePathName make
// one, so two names are the same registry exactly when they are equal.
type Name string

// ParseName makes the name of a registry canonical: ASCII lower case, one
// trailing dot off the host, the port of https off, and Docker Hub's three
// names become docker.io. User info, escapes, white space, paths and anything
// but ASCII are refused, so that a name can never say one thing to tarn and
// another to a resolver or a URL parser.
func ParseName(s string) (Name, error) {
	if s == "" || len(s) > maxNameLength {
		return "", fmt.Errorf("%w: it has %d characters, of 1 to %d", ErrName, len(s), maxNameLength)
	}
	if strings.Contains(s, "@") {
		return "", fmt.Errorf("%w: user info has no place in one", ErrName) // and is not repeated: it may be a password
	}
	s = asciiLower(s)
	host, port, err := splitHostPort(s)
	if err != nil {
		return "", err
	}
	if port == "443" {
		port = ""
	}
	switch host {
	case "index.docker.io", hubHost:
		host = string(DockerHub)
	}
	if port == "" {
		return Name(host), nil
	}
	return Name(host + ":" + port), nil
}

// ParsePathName reads a registry name as it is written as the first component
// of a repository path, where a colon is not legal: "host__5000" and, as some
// clients rewrite it, "host_5000_" both mean "host:5000".
func ParsePathName(s string) (Name, error) {
	if host, port, ok := strings.Cut(s, "__"); ok {
		return ParseName(host + ":" + port)
	}
	if rest, ok := strings.CutSuffix(s, "_"); ok {
		if host, port, ok := strings.Cut(rest, "_"); ok {
			return ParseName(host + ":" + port)
		}
	}
	return ParseName(s)
}

// Path is the name as the first component of a repository path.
func (n Name) Path() string {
	if host, port, ok := strings.Cut(string(n), ":"); ok && !strings.HasPrefix(string(n), "[") {
		return host + "__" + port
	}
	return string(n)
}

// splitHostPort checks both halves and returns the host without its trailing
// dot and the port, "" when there is none.
func splitHostPort(s string) (host, port string, err error) {
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", "", fmt.Errorf("%w: %q lacks the closing bracket", ErrName, s)
		}
		addr, err := netip.ParseAddr(s[1:end])
		if err != nil || !addr.Is6() || addr.Zone() != "" {
			return "", "", fmt.Errorf("%w: %q is not an IPv6 address", ErrName, s[:end+1])
		}
		host, s = "["+addr.String()+"]", s[end+1:]
		if s == "" {
			return host, "", nil
		}
		if s[0] != ':' {
			return "", "", fmt.Errorf("%w: %q follows the address", ErrName, s)
		}
		port = s[1:]
	} else {
		var hasPort bool
		host, port, hasPort = strings.Cut(s, ":")
		host = strings.TrimSuffix(host, ".")
		if err := checkHost(host); err != nil {
			return "", "", err
		}
		if !hasPort {
			return host, "", nil
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || port[0] == '0' || port[0] == '+' {
		return "", "", fmt.Errorf("%w: %q is not a port", ErrName, port)
	}
	return host, port, nil
}

// checkHost holds a host to the "domain-name" of the reference grammar:
// labels of letters, digits and inner hyphens.
func checkHost(host string) error {
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("%w: %q is not a host name", ErrName, host)
		}
		for i := range len(label) {
			c := label[i]
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return fmt.Errorf("%w: %q is not a host name", ErrName, host)
			}
		}
	}
	return nil
}

// asciiLower is strings.ToLower without Unicode: the Kelvin sign must not
// become the letter k.
func asciiLower(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}
