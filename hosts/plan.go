// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Options of Install.
type Options struct {
	CertsDir string // the runtime's; made where it is missing
	Mirror   Mirror
	// Registries get a hosts.toml of their own; none means one for all that have
	// no directory.
	Registries []string
}

// Plan is what would be changed, and Apply changes it.
type Plan struct {
	changes []change
	left    []string // by a kill
	// Notes say which registries' pulls go past tarn all the same, and what tarn itself
	// needs for others, a line each.
	Notes []string
}

// change makes, replaces or removes one file. Without old it is made, without new
// removed.
type change struct {
	path     string // of the file, in a directory of certsDir
	old, new []byte
	made     int // how many of the directories above it come or go with it
}

// Empty tells whether there is nothing to do but to clear what a kill left.
func (p Plan) Empty() bool { return len(p.changes) == 0 }

// Paths are the files that would be changed.
func (p Plan) Paths() (paths []string) {
	for _, c := range p.changes {
		paths = append(paths, c.path)
	}
	return paths
}

// Diff shows the changes as whole files, in the form of diff -u.
func (p Plan) Diff() string {
	var b strings.Builder
	for _, c := range p.changes {
		from, to := c.path, c.path
		if c.old == nil {
			from = "/dev/null"
		}
		if c.new == nil {
			to = "/dev/null"
		}
		fmt.Fprintf(&b, "--- %s\n+++ %s\n@@ -%s +%s @@\n", from, to, extent(c.old), extent(c.new))
		for line := range strings.Lines(string(c.old)) {
			b.WriteString("-" + line)
		}
		for line := range strings.Lines(string(c.new)) {
			b.WriteString("+" + line)
		}
	}
	return b.String()
}

func extent(text []byte) string {
	if n := bytes.Count(text, []byte("\n")); n > 0 {
		return fmt.Sprintf("1,%d", n)
	}
	return "0,0"
}

// PlanInstall says what has to be written. It fails where somebody else's settings
// are in the way, and changes nothing.
func PlanInstall(o Options) (p Plan, err error) {
	if err := errors.Join(o.Mirror.check(), checkCertsDir(o.CertsDir)); err != nil {
		return p, err
	}
	add := func(name string, server *registry) error {
		c, err := planFile(o, name, server)
		if err == nil && !bytes.Equal(c.old, c.new) {
			p.changes = append(p.changes, c)
		}
		return err
	}
	if len(o.Registries) == 0 {
		err = add(anyRegistry, nil)
	}
	for _, name := range o.Registries {
		r, rerr := parseRegistry(name)
		if rerr == nil {
			dir := r.directory(o.CertsDir)
			if r, rerr = r.withCertificates(filepath.Join(o.CertsDir, dir)); rerr == nil {
				rerr = add(dir, &r)
			}
			if rerr == nil && len(r.ca) > 0 {
				p.Notes = append(p.Notes, fmt.Sprintf("tarn needs the certificates of %s, too, in its configuration: upstreams: [{name: %q, ca_file: %s}]",
					r.host, r.host, filepath.Join(o.CertsDir, dir, r.ca[0])))
			}
		}
		err = errors.Join(err, rerr)
	}
	if err != nil {
		return Plan{}, err
	}
	// Of several new files below one directory that is missing, too, the first makes it.
	for i := 1; i < len(p.changes); i++ {
		p.changes[i].made = min(p.changes[i].made, 1)
		if server := p.changes[i]; server.old == nil && server.made > 0 {
			p.changes[i].new = withMade(server.new, server.made)
		}
	}
	p.left = leftovers(o.CertsDir)
	lines, err := past(o.CertsDir, p.changes)
	p.Notes = append(p.Notes, lines...)
	return p, err
}

// withMade is the file with another number of directories.
func withMade(text []byte, made int) []byte {
	lines := strings.SplitAfter(string(text), "\n")
	lines[1] = fmt.Sprintf("%s%d\n", madeLine, made)
	return []byte(strings.Join(lines, ""))
}

func checkCertsDir(dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("--certs-dir %s: must be an absolute path, since the runtime reads it", dir)
	}
	if s, err := look(dir); err != nil || s == file || s == dangling {
		return cmp.Or(err, fmt.Errorf("%s is not a directory; name the runtime's with --certs-dir", dir))
	}
	return nil
}

// planFile is the file for one directory of certsDir.
func planFile(o Options, name string, server *registry) (c change, err error) {
	dir := filepath.Join(o.CertsDir, name)
	c.path = filepath.Join(dir, fileName)
	if target, err := os.Readlink(dir); err == nil && target == syncDir {
		return c, fmt.Errorf("%s is a link that tarn hosts sync keeps; nothing has to be installed, or end that first", dir)
	}
	switch s, err := look(dir); {
	case err != nil:
		return c, err
	case s == file:
		return c, fmt.Errorf("%s is a file, not a directory: every pull of containerd fails on it; remove it", dir)
	case s == dangling:
		return c, fmt.Errorf("%s is a link that leads nowhere, and not tarn's; remove it, or make what it leads to", dir)
	case s == absent:
		if c.made, err = missing(dir); err != nil {
			return c, err
		}
	}
	info, err := os.Lstat(c.path)
	switch {
	case os.IsNotExist(err):
		c.new = render(byInstall, c.made, o.Mirror, server)
		return c, nil
	case err != nil:
		return c, err
	case !info.Mode().IsRegular():
		return c, fmt.Errorf("%s is not a plain file, and not tarn's; it is left alone", c.path)
	}
	if c.old, err = (tree{}).readFile(c.path); err != nil {
		return c, err
	}
	by, made, ours := own(c.old)
	if !ours || by != byInstall {
		return c, foreign(c.path, by, o.Mirror, server)
	}
	c.new = render(byInstall, made, o.Mirror, server)
	return c, nil
}

// foreign says what to do where a file is there that install did not write.
func foreign(path string, by writer, m Mirror, server *registry) error {
	if by == bySync {
		return fmt.Errorf("%s is tarn hosts sync's; nothing has to be installed, or end that first", path)
	}
	_, lines, _ := bytes.Cut(render(byInstall, 0, m, server), []byte("\n"))
	return fmt.Errorf("%s is not tarn's, and is left alone; to have tarn asked first, add to it, before its other hosts:\n%s", path, lines)
}

// missing counts the directories that are to be made for this one: itself, and those
// above it.
func missing(dir string) (n int, err error) {
	for ; dir != "/"; n, dir = n+1, filepath.Dir(dir) {
		s, err := look(dir)
		switch {
		case err != nil:
			return 0, err
		case s == directory:
			return n, nil
		case s != absent:
			return 0, fmt.Errorf("%s is not a directory", dir)
		}
	}
	return n, nil
}

// PlanRemove says what install wrote in certsDir; with registries, only for these.
func PlanRemove(certsDir string, registries []string) (p Plan, err error) {
	if err := checkCertsDir(certsDir); err != nil {
		return p, err
	}
	var names []string
	for _, name := range registries {
		r, err := parseRegistry(name)
		if err != nil {
			return p, err
		}
		names = append(names, directories(r.host)...)
	}
	entries, err := os.ReadDir(certsDir)
	if err != nil && !os.IsNotExist(err) {
		return p, err
	}
	for _, e := range entries {
		if len(names) > 0 && !slices.Contains(names, e.Name()) {
			continue
		}
		path := filepath.Join(certsDir, e.Name(), fileName)
		info, err := os.Lstat(path)
		if err != nil || !info.Mode().IsRegular() || info.Size() > maxFile {
			continue
		}
		text, err := tree{}.readFile(path)
		if err != nil {
			return p, err
		}
		if by, made, ours := own(text); ours && by == byInstall {
			p.changes = append(p.changes, change{path: path, old: text, made: made})
		}
	}
	// The file that certsDir itself was made for comes last: then it is empty.
	slices.SortStableFunc(p.changes, func(a, b change) int { return cmp.Compare(a.made, b.made) })
	p.left = leftovers(certsDir)
	return p, nil
}

// leftovers are what kills left: in certsDir, in a directory of it, or above it, where
// it was made or went itself.
func leftovers(certsDir string) (paths []string) {
	dirs := []string{certsDir}
	for dir := certsDir; dir != "/"; {
		dir = filepath.Dir(dir)
		dirs = append(dirs, dir)
	}
	entries, _ := os.ReadDir(certsDir) // none where it is not there
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			dirs = append(dirs, filepath.Join(certsDir, e.Name()))
		}
	}
	for _, dir := range dirs {
		for _, name := range []string{comingName, goingName} {
			path := filepath.Join(dir, name)
			if _, err := os.Lstat(path); err == nil {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// past lists the directories of registries that have settings of their own, and so
// have no use for _default's.
func past(certsDir string, changes []change) (lines []string, err error) {
	entries, err := os.ReadDir(certsDir)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	for _, e := range entries {
		dir := filepath.Join(certsDir, e.Name())
		changed := slices.ContainsFunc(changes, func(c change) bool { return filepath.Dir(c.path) == dir })
		if s, _ := look(dir); e.Name() == anyRegistry || strings.HasPrefix(e.Name(), ".") || s != directory || changed {
			continue
		}
		if why := whyPast(dir); why != "" {
			lines = append(lines, fmt.Sprintf("%s goes past tarn: %s", e.Name(), why))
		}
	}
	return lines, nil
}

// whyPast says why pulls of the directory's registry go past tarn, "" where they do
// not, by a file of tarn's.
func whyPast(dir string) string {
	text, err := tree{}.readFile(filepath.Join(dir, fileName))
	if err != nil && !os.IsNotExist(err) {
		return err.Error()
	}
	if _, _, ours := own(text); ours {
		return ""
	}
	if err == nil && len(text) > 0 {
		return fmt.Sprintf("%s is not tarn's, and is left alone", filepath.Join(dir, fileName))
	}
	ca, client, _ := certificates(dir)
	if len(ca)+len(client) > 0 {
		return fmt.Sprintf("%s has its certificates; tarn hosts install --registry %s would keep them in use", dir, filepath.Base(dir))
	}
	return fmt.Sprintf("%s is empty; remove it, or tarn hosts install --registry %s", dir, filepath.Base(dir))
}
