// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"tarn/internal/probe"

	"golang.org/x/sys/unix"
)

// Verdict says whether a runtime's pulls go through tarn.
type Verdict string

const (
	Used       Verdict = "used"
	NotUsed    Verdict = "not used"
	CannotTell Verdict = "cannot tell"
)

// Report is what Check found.
type Report struct {
	Verdict Verdict `json:"verdict"`
	Reason  string  `json:"reason"`
	// Fix is what to do about it, "" for nothing.
	Fix string `json:"fix,omitempty"`
	// Notes are what else is to be known, a line each.
	Notes []string `json:"notes,omitempty"`
}

// CheckOptions says what is looked at. The zero value is what is found on this node.
type CheckOptions struct {
	Socket   string // of the runtime; "" is the first of Sockets that is there
	Config   string // containerd's file; "" is what its command line says
	Version  string // containerd's, where no socket tells it
	URL      string // of tarn; "" is DefaultURL
	Registry string // whose pulls are meant; "" is all that have no directory
	Live     bool   // the runtime is made to pull the probe
}

// found is what is known of the runtime.
type found struct {
	name, text string // containerd, v2.4.2
	versions   []version
	process    process
	seen       bool // the process
	config     string
}

// Check reads what the runtime reads, and computes how it pulls. With Live it has it
// pull, which is the verdict then, and what was read is the reason.
func Check(ctx context.Context, o CheckOptions) Report {
	o.URL = cmp.Or(o.URL, DefaultURL)
	if o.Live && o.Registry != "" {
		return Report{Verdict: CannotTell, Reason: "a live pull is one of an image that only tarn has, and says nothing of " + o.Registry, Fix: "leave out --live, or " + o.Registry}
	}
	socket, err := findSocket(o.Socket)
	if errors.Is(err, fs.ErrPermission) {
		return Report{Verdict: CannotTell, Reason: err.Error(), Fix: "run it as root"}
	}
	if err != nil && (o.Live || o.Config == "") {
		return Report{Verdict: CannotTell, Reason: err.Error(), Fix: "name the socket with --socket; or, where there is none, the file with --config"}
	}
	f, notes := o.find(ctx, socket)
	if _, err := f.process.files.stat(o.Config); o.Config != "" && err != nil {
		return Report{Verdict: CannotTell, Reason: err.Error(), Fix: "name containerd's file with --config, or leave that out"}
	}
	report := o.judge(ctx, f)
	report.Notes = append(notes, report.Notes...)
	if o.Live {
		report = o.live(ctx, socket, report)
	}
	return report
}

func findSocket(given string) (string, error) {
	if given != "" {
		given = strings.TrimPrefix(given, "unix://")
		if _, err := os.Stat(given); err != nil {
			return "", err
		}
		return given, nil
	}
	for _, path := range Sockets {
		_, err := os.Stat(path)
		if err == nil {
			err = unix.Access(path, unix.W_OK)
		}
		if err == nil || errors.Is(err, fs.ErrPermission) {
			return path, err
		}
	}
	return "", fmt.Errorf("no runtime is found: there is none of %s", strings.Join(Sockets, ", "))
}

// find asks the socket for the version, and /proc for the process.
func (o CheckOptions) find(ctx context.Context, socket string) (f found, notes []string) {
	f = found{name: "containerd", text: o.Version, config: o.Config, versions: containerds}
	if socket != "" {
		if r, err := connect(socket); err == nil {
			name, text, err := r.version(ctx)
			r.close()
			if err == nil {
				f.name, f.text = name, text
			} else {
				notes = append(notes, fmt.Sprintf("%s does not tell its version: %v", socket, err))
			}
		}
		p, err := processBehind(socket)
		if f.seen = err == nil; f.seen {
			f.process = p
			f.config = cmp.Or(o.Config, p.config)
		} else {
			notes = append(notes, fmt.Sprintf("%v: whether its configuration was changed since it started is not known", err))
		}
	}
	f.config = cmp.Or(f.config, DefaultConfig)
	if v, ok := parseVersion(f.text); ok {
		f.versions = []version{v}
	}
	return f, notes
}

// judge computes the verdict for each version that it may be.
func (o CheckOptions) judge(ctx context.Context, f found) Report {
	if f.name != "containerd" {
		return Report{Verdict: CannotTell, Reason: fmt.Sprintf("%s %s has its mirrors in registries.conf, which is not read here", f.name, f.text),
			Fix: "tarn hosts check --live has it pull an image that only tarn has"}
	}
	var first Report
	for i, v := range f.versions {
		r := o.judgeVersion(ctx, f, v)
		if i == 0 {
			first = r
		}
		if r.Verdict != first.Verdict {
			return Report{Verdict: CannotTell, Reason: fmt.Sprintf("it depends on containerd's version, which nobody has told; with %s: %s: %s; with %s: %s: %s",
				f.versions[0], first.Verdict, first.Reason, v, r.Verdict, r.Reason), Fix: "tell it with --containerd-version, or name the socket with --socket"}
		}
		first = r // the newest one's words
	}
	return first
}

func (o CheckOptions) judgeVersion(ctx context.Context, f found, v version) Report {
	c, err := readConfiguration(f.process.files, f.config, v)
	if err != nil {
		return broken(err)
	}
	var r Report
	roots, reason, fix, err := c.roots(v, DefaultCertsDir)
	switch {
	case err != nil:
		return broken(err)
	case len(roots) == 0:
		r = Report{Verdict: NotUsed, Reason: reason, Fix: fix}
	default:
		r = o.judgeRoots(ctx, f, roots, v)
	}
	if changed := f.changed(c); changed != "" {
		r.Reason = fmt.Sprintf("%s was changed after containerd was started, which reads it at its start; after a restart it is %q: %s", changed, r.Verdict, r.Reason)
		if !strings.HasSuffix(r.Fix, restart) {
			r.Fix = strings.TrimPrefix(r.Fix+", then ", ", then ") + restart
		}
		r.Verdict = CannotTell
	}
	return r
}

func (f found) changed(c configuration) string {
	if !f.seen {
		return ""
	}
	return f.process.changedAfter(c.files)
}

func broken(err error) Report {
	r := Report{Verdict: NotUsed, Reason: err.Error()}
	var f *fixed
	switch {
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		r.Verdict, r.Fix = CannotTell, "run it as root, as the runtime is"
	case errors.As(err, &f):
		r.Fix = f.fix
	}
	return r
}

// judgeRoots follows the look-up for the registry.
func (o CheckOptions) judgeRoots(ctx context.Context, f found, roots []string, v version) Report {
	host := cmp.Or(o.Registry, probe.Registry)
	w, err := find(f.process.files, roots, host, o.URL, v)
	if err != nil {
		return broken(err)
	}
	r := Report{Verdict: NotUsed, Reason: w.reason, Fix: w.fix}
	if w.tarn != "" {
		r.Verdict, r.Fix = Used, ""
		r.Reason = fmt.Sprintf("%s asks tarn at %s first, by %s", strings.TrimSpace(f.name+" "+f.text), w.tarn, w.file)
		if w.reason != "" {
			r.Notes = append(r.Notes, strings.TrimSuffix(w.reason+"; "+w.fix, "; "))
		}
		if err := w.answers(ctx, f.process.files); err != nil {
			r.Verdict, r.Reason = NotUsed, fmt.Sprintf("%s names tarn, but %v", w.file, err)
			r.Fix = "start tarn, or see its log; meanwhile the registries themselves are asked"
			switch {
			case strings.Contains(err.Error(), "HTTP response to HTTPS client"):
				r.Fix = "put the lines that tarn hosts install --tls has printed into tarn's configuration, and restart tarn"
			case errors.Is(err, context.DeadlineExceeded):
				r.Fix = "restart tarn, which hangs: until then each pull waits half a minute for it"
			}
		}
	}
	if o.Registry == "" {
		r.Notes = append(r.Notes, passing(f.process.files, roots, o.URL, v)...)
	}
	for _, root := range roots {
		if !f.process.files.same(tree{}, root) {
			r.Notes = append(r.Notes, fmt.Sprintf("containerd sees another %s than this process: it has mounts of its own", root))
		}
	}
	return r
}

// answers asks tarn as the runtime would.
func (w way) answers(ctx context.Context, files tree) error {
	ctx, cancel := context.WithTimeout(ctx, dialPatience)
	defer cancel()
	config, err := w.fields.tlsConfig(files, filepath.Dir(w.file))
	if err != nil {
		return err
	}
	transport := &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}
	return Answers(ctx, &http.Client{Transport: transport}, w.tarn, "")
}

func (f hostFields) tlsConfig(t tree, dir string) (*tls.Config, error) {
	config := &tls.Config{InsecureSkipVerify: f.SkipVerify != nil && *f.SkipVerify}
	read := func(path string) []byte {
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		text, _ := t.readFile(path) // checkTLS has read it
		return text
	}
	files, _ := f.ca()
	for _, path := range files {
		if config.RootCAs == nil {
			config.RootCAs = x509.NewCertPool()
		}
		config.RootCAs.AppendCertsFromPEM(read(path))
	}
	pairs, _ := f.client()
	for _, pair := range pairs {
		cert, err := tls.X509KeyPair(read(pair[0]), read(pair[len(pair)-1]))
		if err != nil {
			return nil, err
		}
		config.Certificates = append(config.Certificates, cert)
	}
	return config, nil
}

// passing lists the registries whose own directories have their pulls go past tarn.
func passing(t tree, roots []string, mirror string, v version) (lines []string) {
	for _, root := range roots {
		entries, err := t.readDir(root)
		if err != nil {
			continue // which the look-up has met, too
		}
		for _, e := range entries {
			if e.Name() == anyRegistry || strings.HasPrefix(e.Name(), ".") {
				continue
			}
			info, err := t.stat(filepath.Join(root, e.Name()))
			if err != nil || !info.IsDir() {
				continue
			}
			w, err := inDirectory(t, filepath.Join(root, e.Name()), mirror, v)
			switch {
			case err != nil:
				lines = append(lines, fmt.Sprintf("%s: %v", e.Name(), err))
			case w.tarn == "":
				lines = append(lines, fmt.Sprintf("%s goes past tarn: %s", e.Name(), w.reason))
			}
		}
	}
	return lines
}

// live has the runtime pull, which outweighs whatever was computed.
func (o CheckOptions) live(ctx context.Context, socket string, computed Report) Report {
	r, err := connect(socket)
	if err != nil {
		return Report{Verdict: CannotTell, Reason: err.Error()}
	}
	defer r.close()
	image, err := r.prove(ctx)
	switch {
	case errors.Is(err, errUnknown) && computed.Verdict == NotUsed:
		return computed
	case errors.Is(err, errUnknown):
		return Report{Verdict: CannotTell, Reason: fmt.Sprintf("the runtime did not pull %s: %v", image, err), Notes: append(computed.Notes, "by the files: "+string(computed.Verdict)+": "+computed.Reason)}
	case err != nil && computed.Verdict == Used:
		return Report{Verdict: NotUsed, Reason: fmt.Sprintf("the runtime did not find %s, which only tarn has, although its files say otherwise: %v", image, err),
			Fix: "restart the runtime, which reads some of its files at its start only; then see its log", Notes: computed.Notes}
	case err != nil:
		computed.Notes = append(computed.Notes, fmt.Sprintf("it did not find %s, which only tarn has: %v", image, err))
		computed.Verdict = NotUsed
		return computed
	}
	notes := computed.Notes
	if computed.Verdict != Used {
		notes = append(notes, "by the files: "+string(computed.Verdict)+": "+computed.Reason)
	}
	return Report{Verdict: Used, Reason: fmt.Sprintf("the runtime has just pulled %s, which only tarn has", image), Notes: notes}
}
