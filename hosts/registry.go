// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// registry is one that gets a hosts.toml of its own: where it is itself, and what of
// its directory its clients need for it. The names of the files are relative to the
// directory.
type registry struct {
	host   string // as it stands in image names
	url    string
	ca     []string
	client [][]string // a certificate, and its key where that is a file of its own
}

var hostName = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?$`)

// parseRegistry takes HOST, HOST:PORT or the URL of the registry itself.
func parseRegistry(name string) (registry, error) {
	raw := name
	if !strings.Contains(raw, "://") {
		raw = "https://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		return registry{}, fmt.Errorf("--registry %q: must be HOST, HOST:PORT or http://HOST:PORT, as in image names", name)
	}
	if !hostName.MatchString(u.Host) {
		return registry{}, fmt.Errorf("--registry %q: is no registry's host; for all registries leave --registry out", name)
	}
	r := registry{host: strings.ToLower(u.Host)}
	switch r.host {
	case "docker.io", "index.docker.io", "registry-1.docker.io":
		// The name in images is not the registry's.
		r.host, r.url = "docker.io", "https://registry-1.docker.io"
	default:
		r.url = u.Scheme + "://" + r.host
	}
	return r, nil
}

// directories are those that containerd looks into for the registry, in its order.
func directories(host string) []string {
	if i := strings.LastIndex(host, ":"); i > 0 {
		return []string{host[:i] + "_" + host[i+1:] + "_", host}
	}
	return []string{host}
}

// directory is the one that is there already, or else the name itself.
func (r registry) directory(certsDir string) string {
	for _, name := range directories(r.host) {
		if s, err := look(filepath.Join(certsDir, name)); err == nil && s != absent {
			return name
		}
	}
	return r.host
}

// withCertificates adds those that lie in the directory, as containerd finds them
// where there is no hosts.toml: one written there would switch them off.
func (r registry) withCertificates(dir string) (registry, error) {
	ca, client, err := certificates(dir)
	if err != nil {
		return r, err
	}
	r.ca, r.client = ca, client
	return r, nil
}

// certificates are docker's files in a registry's directory: NAME.crt for what its
// certificate is signed by, NAME.cert and NAME.key for the client's own.
func certificates(dir string) (ca []string, client [][]string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		return nil, nil, err
	}
	var names []string
	for _, e := range entries {
		if !e.IsDir() {
			names = append(names, e.Name())
		}
	}
	for _, name := range names {
		if strings.HasSuffix(name, ".crt") {
			ca = append(ca, name)
		}
		base, ok := strings.CutSuffix(name, ".cert")
		if !ok {
			continue
		}
		pair := []string{name}
		if slices.Contains(names, base+".key") {
			pair = append(pair, base+".key")
		}
		client = append(client, pair)
	}
	return ca, client, nil
}
