// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// errPull is wrapped by what has every pull fail, of the registries that it is about.
var errPull = errors.New("every pull fails on this")

// hostFile is a hosts.toml as containerd reads it.
type hostFile struct {
	hostFields
	Server string                `toml:"server"`
	Hosts  map[string]hostFields `toml:"host"`
	order  []string              // of Hosts
}

type hostFields struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// maxHostFile is far above what anybody writes, in bytes: the time that a file takes
// to be read grows with the square of its tables.
const maxHostFile = 256 << 10

// parseHostFile fails with what has that release of containerd ignore the whole file.
func parseHostFile(text []byte, v version) (f hostFile, err error) {
	if len(text) > maxHostFile {
		return f, fmt.Errorf("it has more than %d bytes, and takes long to read", maxHostFile)
	}
	if err := toml.Unmarshal(text, &f); err != nil {
		return f, err
	}
	f.order = hostOrder(text)
	for _, fields := range append(slices.Collect(maps.Values(f.Hosts)), f.hostFields) {
		if err := fields.check(v); err != nil {
			return f, err
		}
	}
	return f, nil
}

// hostOrder is the hosts in the order of the file, which decides and which a map does
// not have.
func hostOrder(text []byte) (order []string) {
	var p unstable.Parser
	p.Reset(text)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.Table {
			continue
		}
		var key []string
		for it := e.Key(); it.Next(); {
			key = append(key, string(it.Node().Data))
		}
		if len(key) > 1 && key[0] == "host" && !slices.Contains(order, key[1]) {
			order = append(order, key[1])
		}
	}
	return order
}

func (f hostFields) check(v version) error {
	known := []string{"pull", "resolve", "push"}
	if !v.before(2, 2) {
		known = append(known, "referrers")
	}
	for _, c := range f.Capabilities {
		if !slices.Contains(known, strings.ToLower(c)) {
			return fmt.Errorf("containerd %s knows no capability %q", v, c)
		}
	}
	if f.DialTimeout != "" && !v.before(2, 0) {
		if _, err := time.ParseDuration(f.DialTimeout); err != nil {
			return fmt.Errorf("dial_timeout: %w", err)
		}
	}
	_, cerr := f.ca()
	_, perr := f.client()
	return errors.Join(cerr, perr)
}

func (f hostFields) can(capability string) bool {
	return len(f.Capabilities) == 0 || slices.ContainsFunc(f.Capabilities, func(c string) bool { return strings.EqualFold(c, capability) })
}

// ca are the files that the host's certificate is signed by, as they are written.
func (f hostFields) ca() (files []string, err error) {
	switch v := f.CA.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		return toStrings(v)
	}
	return nil, fmt.Errorf("ca: must be a file or a list of files")
}

// client are pairs of a certificate and its key, or one file with both.
func (f hostFields) client() (pairs [][]string, err error) {
	switch v := f.Client.(type) {
	case nil:
		return nil, nil
	case string:
		return [][]string{{v}}, nil
	case []any:
		for _, one := range v {
			var pair []string
			if list, ok := one.([]any); ok {
				if pair, err = toStrings(list); err != nil || len(pair) != 2 {
					return nil, errors.New("client: must be pairs of a certificate and its key")
				}
			} else if path, ok := one.(string); ok {
				pair = []string{path}
			} else {
				return nil, errors.New("client: must be files, or pairs of a certificate and its key")
			}
			pairs = append(pairs, pair)
		}
		return pairs, nil
	}
	return nil, errors.New("client: must be files, or pairs of a certificate and its key")
}

func toStrings(list []any) (out []string, err error) {
	for _, v := range list {
		s, ok := v.(string)
		if !ok {
			return nil, fmt.Errorf("%v is not a string", v)
		}
		out = append(out, s)
	}
	return out, nil
}

// checkTLS reads the files as containerd does at each pull: one that cannot be read
// has the pull fail.
func (f hostFields) checkTLS(t tree, dir string) error {
	absolute := func(path string) string {
		if filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(dir, path)
	}
	files, _ := f.ca()
	for _, path := range files {
		text, err := t.readFile(absolute(path))
		if err == nil && !x509.NewCertPool().AppendCertsFromPEM(text) {
			err = fmt.Errorf("%s has no certificate in PEM form", absolute(path))
		}
		if err != nil {
			return fmt.Errorf("%w: ca: %w", errPull, err)
		}
	}
	pairs, _ := f.client()
	for _, pair := range pairs {
		cert, err := t.readFile(absolute(pair[0]))
		key := cert
		if err == nil && len(pair) == 2 {
			key, err = t.readFile(absolute(pair[1]))
		}
		if err == nil {
			_, err = tls.X509KeyPair(cert, key)
		}
		if err != nil {
			return fmt.Errorf("%w: client: %w", errPull, err)
		}
	}
	return nil
}

// way is how pulls of one registry go.
type way struct {
	file   string     // the hosts.toml that holds; "" for none
	tarn   string     // the URL at which tarn is asked; "" where it is not
	fields hostFields // of tarn's entry
	reason string     // why it is not, or what else is to be known
	fix    string
}

// find follows containerd's look-up for a registry: in each root its own directory,
// then _default; the first that is there holds, whatever is in it.
func find(t tree, roots []string, host string, mirror string, v version) (w way, err error) {
	for _, root := range roots {
		for _, name := range append(directories(host), anyRegistry) {
			dir := filepath.Join(root, name)
			info, err := t.stat(dir)
			switch {
			case errors.Is(err, fs.ErrNotExist):
				continue
			case err != nil:
				return w, fmt.Errorf("%w: %w", errPull, err)
			case !info.IsDir():
				return w, fmt.Errorf("%w: %s is a file, and must be a directory; remove it", errPull, dir)
			}
			return inDirectory(t, dir, mirror, v)
		}
	}
	w.reason = fmt.Sprintf("there is no %s", filepath.Join(strings.Join(roots, " or "), anyRegistry, fileName))
	w.fix = "tarn hosts install"
	switch {
	case len(roots) > 0 && strings.Contains(roots[0], "/rancher/"):
		w.fix = "write the mirror \"*\" into registries.yaml, as docs/INSTALL.md has it, and restart k3s or RKE2, which writes this directory itself"
	case len(roots) > 0 && roots[0] != DefaultCertsDir:
		w.fix += " --certs-dir " + roots[0]
	}
	return w, nil
}

func inDirectory(t tree, dir, mirror string, v version) (w way, err error) {
	w.file = filepath.Join(dir, fileName)
	text, err := t.readFile(w.file)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && len(text) == 0:
		w.reason = fmt.Sprintf("%s has no settings in it, and still takes the place of %s", dir, anyRegistry)
		w.fix = "remove that directory, or tarn hosts install --registry " + filepath.Base(dir)
		if ca, client, _ := certificates(dir); len(ca)+len(client) > 0 { // as far as this process sees them
			w.reason = fmt.Sprintf("%s has certificates and no settings, and so takes the place of %s", dir, anyRegistry)
			w.fix = "tarn hosts install --registry " + filepath.Base(dir)
		}
		if filepath.Base(dir) == anyRegistry {
			w.reason, w.fix = fmt.Sprintf("%s is empty", dir), "tarn hosts install"
		}
		return w, nil
	case err != nil:
		return w, fmt.Errorf("%w: %w", errPull, err)
	}
	f, err := parseHostFile(text, v)
	if err != nil {
		w.reason = fmt.Sprintf("containerd ignores %s as a whole: %v", w.file, err)
		w.fix = "mend that line; it is read at the next pull"
		return w, nil
	}
	for _, fields := range append(slices.Collect(maps.Values(f.Hosts)), f.hostFields) {
		if err := fields.checkTLS(t, dir); err != nil {
			return w, fmt.Errorf("%s: %w", w.file, err)
		}
	}
	return f.way(w, text, mirror)
}

// way looks for tarn among the hosts.
func (f hostFile) way(w way, text []byte, mirror string) (way, error) {
	_, _, ours := own(text)
	var before []string
	for _, raw := range f.order {
		fields := f.Hosts[raw]
		if !sameHost(raw, mirror) && !(ours && len(f.order) == 1) {
			before = append(before, raw)
			continue
		}
		if !fields.can("pull") || !fields.can("resolve") {
			w.reason = fmt.Sprintf("%s lets tarn only %s", w.file, strings.Join(fields.Capabilities, ", "))
			w.fix = `in it: capabilities = ["pull", "resolve"]`
			return w, nil
		}
		if u, err := url.Parse(raw); err == nil && fields.OverridePath && !strings.Contains(u.Path, "/v2") {
			w.reason = fmt.Sprintf("%s has override_path, with which tarn is asked without /v2", w.file)
			w.fix = "take override_path out; it is read at the next pull"
			return w, nil
		}
		w.tarn, w.fields = origin(raw), fields
		w.reason, w.fix = f.remarks(w.file, raw, before)
		return w, nil
	}
	w.reason = fmt.Sprintf("%s does not name tarn at %s", w.file, mirror)
	w.fix = "tarn hosts install, once that file is not in its way, or --url, if tarn listens elsewhere"
	return w, nil
}

// remarks are what does not keep tarn from being asked, and is still not meant so.
func (f hostFile) remarks(file, raw string, before []string) (reason, fix string) {
	fields := f.Hosts[raw]
	plain := strings.HasPrefix(raw, "http://")
	switch {
	case f.Server != "" && filepath.Base(filepath.Dir(file)) == anyRegistry:
		return fmt.Sprintf("%s has server = %q: what tarn does not answer is asked there, whatever registry the image is of", file, f.Server),
			"take that line out"
	case plain && (fields.CA != nil || fields.Client != nil || fields.SkipVerify != nil):
		return fmt.Sprintf("%s has TLS settings for %s, so https is tried first", file, raw), "take ca, client and skip_verify out, or write https"
	case len(fields.Capabilities) == 0:
		return fmt.Sprintf("%s gives tarn no capabilities, which means all, push too", file), `in it: capabilities = ["pull", "resolve"]`
	case len(before) > 0:
		return fmt.Sprintf("%s has %s asked before tarn", file, strings.Join(before, ", ")), ""
	}
	return "", ""
}

// origin is the host's scheme, name and port: what is asked is below /v2/, whatever
// path it is written with.
func origin(raw string) string {
	if u, err := url.Parse(raw); err == nil && u.Host != "" {
		return u.Scheme + "://" + u.Host
	}
	return raw
}

// sameHost tells whether a host of the file is the mirror.
func sameHost(raw, mirror string) bool {
	if !strings.HasPrefix(raw, "http") {
		raw = "https://" + raw
	}
	a, aerr := url.Parse(raw)
	b, berr := url.Parse(mirror)
	if aerr != nil || berr != nil {
		return false
	}
	name := func(u *url.URL) string {
		return strings.Replace(strings.ToLower(u.Host), "localhost:", "127.0.0.1:", 1)
	}
	return name(a) == name(b)
}
