// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"tarn/upstream"
)

// The rules say what a key's value must be beyond its type. Flags obey them, too.

func oneOf(words ...string) func(string) error {
	return func(s string) error {
		if !slices.Contains(words, s) {
			return fmt.Errorf("%q is none of %s", s, strings.Join(words, ", "))
		}
		return nil
	}
}

func checkDir(s string) error {
	if s == "" {
		return errors.New("must not be empty")
	}
	return nil
}

func checkName(s string) error {
	if _, err := upstream.ParseName(s); err != nil {
		return fmt.Errorf("%q: %w", s, err)
	}
	return nil
}

func checkAddress(s string) error {
	_, port, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("%q is not host:port, as in 127.0.0.1:5050", s)
	}
	// 0 lets the kernel choose, which try-outs and tests want.
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%q: the port must be a number from 0 to 65535", s)
	}
	return nil
}

func checkAdminAddress(s string) error {
	path, unix := strings.CutPrefix(s, unixPrefix)
	switch {
	case s == "":
		return nil
	case unix && !filepath.IsAbs(path):
		return fmt.Errorf("%q: the path of a socket must be absolute, as in unix:/run/tarn/admin.sock", s)
	case unix:
		return checkSocketPath(path)
	}
	return checkAddress(s)
}

func checkMetricsAddress(s string) error {
	if s == "" {
		return nil
	}
	return checkAddress(s)
}

// socketOff is the word for no admin socket.
const socketOff = "off"

func checkAdminSocket(path string) error {
	switch {
	case path == "" || path == socketOff:
		return nil
	case !filepath.IsAbs(path):
		return fmt.Errorf("%q is neither off nor the absolute path of a socket, as in /run/tarn/admin.sock", path)
	default:
		return checkSocketPath(path)
	}
}

// minMaxSize is less than any image takes: who sets less has left out the unit.
const minMaxSize = 1 << 20

func checkMaxSize(s Size) error {
	switch {
	case s == (Size{}):
		return errors.New("must be more than 0")
	case s.share == 0 && s.bytes < minMaxSize:
		return fmt.Errorf("must be at least 1MiB, and is %d bytes; a unit is written as in 50GiB", s.bytes)
	}
	return nil
}

// checkListeners: that one address is taken by this very process would read as if it
// were by another.
func (c Config) checkListeners() error {
	host, port, err := net.SplitHostPort(c.Listen)
	adminHost, adminPort, adminErr := net.SplitHostPort(c.AdminListen)
	if strings.HasPrefix(c.AdminListen, unixPrefix) || err != nil || adminErr != nil || port != adminPort || strings.Trim(port, "0") == "" {
		return nil
	}
	if host == adminHost || isEverywhere(host) || isEverywhere(adminHost) {
		return fmt.Errorf("listen (%s) and admin_listen (%s) have one port: give admin_listen another one", c.Listen, c.AdminListen)
	}
	return nil
}

// isEverywhere tells whether a listener there has all addresses of the node.
func isEverywhere(host string) bool {
	ip := net.ParseIP(host)
	return host == "" || ip != nil && ip.IsUnspecified()
}

// checkHeadTimeout: a longer one would never be reached, since every answer
// has its headers a second later.
func checkHeadTimeout(d time.Duration) error {
	if d <= 0 || d > upstream.DefaultHeadTimeout {
		return fmt.Errorf("must be more than 0s and at most %v", upstream.DefaultHeadTimeout)
	}
	return nil
}

func checkRealm(s string) error {
	if s == "" {
		return nil
	}
	u, err := url.Parse(s)
	if err != nil {
		return errors.New("not a URL, as in https://auth.example/token")
	}
	return upstream.CheckRealm(u)
}

// checkShare: a pattern names repositories of this upstream, from their first
// component to the last.
func checkShare(s string) error {
	_, err := path.Match(s, "")
	switch {
	case s == "" || strings.HasPrefix(s, "/") || strings.HasSuffix(s, "/"):
		return fmt.Errorf("%q is not a pattern of repositories, as in platform/*", s)
	case err != nil:
		return fmt.Errorf("%q: a bracket or backslash is not closed", s)
	}
	return nil
}

func checkParallel(n int) error {
	if n < 1 {
		return errors.New("must be at least 1")
	}
	return nil
}

// checkURL says what is wrong with an endpoint's URL. Its errors repeat the URL
// only once it is known to have no user, password or query, and so no secret.
func checkURL(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return errors.New("not a URL, as in https://registry.example:5000")
	case u.Scheme != "http" && u.Scheme != "https":
		return errors.New("the URL's scheme must be http or https, as in https://registry.example:5000")
	case u.Hostname() == "":
		return errors.New("the URL has no host")
	case u.User != nil:
		return errors.New("the URL must not have a user or password")
	case strings.ContainsAny(s, "?#"):
		return errors.New("the URL must not have a query or fragment")
	}
	// url.Parse takes any digits for a port, and none.
	if _, port, ok := strings.Cut(strings.TrimPrefix(u.Host, "["+u.Hostname()+"]"), ":"); ok {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return errors.New("the URL's port must be a number from 1 to 65535")
		}
	}
	// The address as documentation of registries gives it. Each request would go
	// to /v2/v2/, and the registry's 404 would say that no image is there.
	if base, ok := strings.CutSuffix(strings.TrimRight(u.EscapedPath(), "/"), "/v2"); ok {
		return fmt.Errorf("the URL must not end in /v2, which tarn adds itself: write %s://%s%s", u.Scheme, u.Host, base)
	}
	return nil
}
