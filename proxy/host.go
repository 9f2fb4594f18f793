// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"strings"

	"github.com/distribution/distribution/v3/registry/api/errcode"
)

// Who asks under which name. A web page of a stranger, open in a browser on this
// node, can have its own name resolve to this node (DNS rebinding), and then the
// browser lets it read what tarn answers: names of images, and what anonymous may
// have. Over plain http such a GET carries neither Origin nor Sec-Fetch-Site. What
// the page cannot do without is a name of its own, which stands in Host. So
// addresses are answered, and of names only those that are known to be tarn's.
//
// A page that asks for a right name from elsewhere is told apart by Origin and
// Sec-Fetch-Site, which no registry's client sends.

// ownName is always one of tarn's names: it has no dot, and so it is none that
// somebody can register for a page.
const ownName = "tarn"

// hosts are the names that tarn is asked under: in lower case, without a port and
// without the dot at the end. It is never changed, and asked by each request.
type hosts map[string]struct{}

// newHosts are localhost, tarn, this host's own name with and without its domain,
// and these.
func newHosts(names []string) (hosts, error) {
	h := hosts{"localhost": {}, ownName: {}}
	if name, err := os.Hostname(); err == nil { // else nobody knows it to ask under it
		name = strings.ToLower(strings.TrimSuffix(name, "."))
		short, _, _ := strings.Cut(name, ".")
		h[name], h[short] = struct{}{}, struct{}{}
	}
	delete(h, "")
	for _, name := range names {
		host, err := parseHost(name)
		if err != nil {
			return nil, err
		}
		h[host] = struct{}{}
	}
	return h, nil
}

// CheckHost says what is wrong with one of Options.Names, if anything.
func CheckHost(name string) error {
	_, err := parseHost(name)
	return err
}

// maxHost is the length that the longest name has (RFC 1035 2.3.4).
const maxHost = 253

func parseHost(s string) (string, error) {
	host, port, _ := strings.Cut(s, ":")
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	switch {
	case strings.Trim(port, "0123456789") != "":
		return "", fmt.Errorf("%q is not the name of a host, with or without a port", s)
	case host == "":
		return "", errors.New("a name is empty")
	case len(host) > maxHost:
		return "", fmt.Errorf("a name has %d characters; %d is the most", len(host), maxHost)
	}
	for i := range len(host) {
		if c := host[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return "", fmt.Errorf("%q is not the name of a host, as in tarn.corp.example or tarn.tarn.svc", s)
		}
	}
	return host, nil
}

// hostOf is a Host without its port and without the dot at the end. Of an address
// that stands in brackets it is all but the port.
func hostOf(s string) string {
	// Not net.SplitHostPort, whose errors cost each request an allocation.
	if i := strings.LastIndexByte(s, ':'); i >= 0 && (strings.IndexByte(s, ':') == i || i > 0 && s[i-1] == ']') {
		s = s[:i]
	}
	return strings.TrimSuffix(s, ".")
}

// own tells whether a Host means this tarn. None at all is HTTP/1.0's, which no
// browser speaks.
func (h hosts) own(host string) bool {
	if host == "" {
		return true
	}
	host = hostOf(host)
	if isAddress(host) {
		return true
	}
	_, ok := h[host]
	if !ok {
		_, ok = h[strings.ToLower(host)]
	}
	return ok
}

// isAddress looks before it parses, since the error that parsing a name ends in
// would cost an allocation.
func isAddress(host string) bool {
	if inner, ok := strings.CutPrefix(host, "["); ok {
		host = strings.TrimSuffix(inner, "]")
	} else if host == "" || (host[0] < '0' || host[0] > '9') && !strings.Contains(host, ":") {
		return false
	}
	_, err := netip.ParseAddr(host)
	return err == nil
}

// check refuses what a browser may have sent on behalf of another site's page.
func (h hosts) check(r *http.Request) error {
	if !h.own(r.Host) {
		return &apiError{http.StatusMisdirectedRequest, errDenied, fmt.Sprintf(
			"tarn does not know %.*q as a name of its own: if it is one, add it to names: in tarn's configuration; addresses and localhost are always answered",
			maxHost, r.Host)}
	}
	for _, origin := range r.Header["Origin"] {
		host, ok := strings.CutPrefix(origin, "http://")
		if !ok {
			host, ok = strings.CutPrefix(origin, "https://")
		}
		if !ok || !strings.EqualFold(host, r.Host) {
			return errForeign
		}
	}
	for _, site := range r.Header["Sec-Fetch-Site"] {
		if site == "cross-site" {
			return errForeign
		}
	}
	return nil
}

var errForeign = &apiError{http.StatusForbidden, errcode.ErrorCodeDenied,
	"tarn does not answer pages of other web sites: the request has an Origin or Sec-Fetch-Site that is not tarn's own"}
