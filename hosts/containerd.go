// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// DefaultConfig is containerd's configuration file.
const DefaultConfig = "/etc/containerd/config.toml"

// maxImports bounds how many files one may import, which may import others.
const maxImports = 256

// configuration is what containerd's files say of how images are pulled.
type configuration struct {
	files    []string       // that were read, the first being the one that is named
	version  int            // of the first file; 0 where there is none
	images   map[string]any // the settings of the plugin for images
	disabled []string       // plugins
}

// configFile is one file, with what is read of it.
type configFile struct {
	Version  int            `toml:"version"`
	Imports  []string       `toml:"imports"`
	Disabled []string       `toml:"disabled_plugins"`
	Plugins  map[string]any `toml:"plugins"`
}

var (
	// errStart is wrapped by what keeps containerd from starting, and errPlugin by what
	// keeps its plugin for Kubernetes from that.
	errStart  = errors.New("containerd does not start with this")
	errPlugin = errors.New("containerd's plugin for Kubernetes does not start with this")
)

// fixed is an error with what to do about it.
type fixed struct {
	error
	fix string
}

func (f *fixed) Unwrap() error { return f.error }

// restart is what each change of containerd's own files wants.
const restart = "restart containerd"

// readConfiguration reads the file and what it imports, as that release of containerd
// does. A file that is not there is no settings at all.
func readConfiguration(t tree, path string, v version) (configuration, error) {
	c := configuration{images: make(map[string]any)}
	for pending := []string{path}; len(pending) > 0; {
		path, pending = pending[0], pending[1:]
		if slices.Contains(c.files, path) {
			continue
		}
		if len(c.files) == maxImports {
			return c, fmt.Errorf("%s: more than %d files are imported", c.files[0], maxImports)
		}
		text, err := t.readFile(path)
		if len(c.files) == 0 && errors.Is(err, fs.ErrNotExist) {
			return c, nil
		}
		if err != nil {
			return c, fmt.Errorf("%w: %w", errStart, err)
		}
		var f configFile
		if err := toml.Unmarshal(text, &f); err != nil {
			return c, fmt.Errorf("%w: %s: %w", errStart, path, err)
		}
		if f.Version > v.fileVersion() && !v.before(1, 7) { // 1.6 does not look at it
			return c, fmt.Errorf("%w: %s: version = %d, and containerd %s knows %d at most", errStart, path, f.Version, v, v.fileVersion())
		}
		if len(c.files) == 0 {
			c.version = max(f.Version, 1)
		}
		c.files = append(c.files, path)
		c.merge(f, v)
		imports, err := resolveImports(t, path, f.Imports)
		if err != nil {
			return c, err
		}
		pending = append(pending, imports...)
	}
	return c, nil
}

// merge adds a file's settings, which win over those read before.
func (c *configuration) merge(f configFile, v version) {
	c.disabled = append(c.disabled, f.Disabled...)
	images := imagesOf(f, v)
	if v.before(2, 0) {
		if images != nil {
			c.images = images // a plugin's settings are replaced as a whole
		}
		return
	}
	mergeMaps(c.images, images)
}

// imagesOf finds the settings of pulls, by the names that they have in this version of
// the file, and where this release moves them.
func imagesOf(f configFile, v version) map[string]any {
	table := func(name string) map[string]any {
		m, _ := f.Plugins[name].(map[string]any)
		return m
	}
	old := table("io.containerd.grpc.v1.cri")
	if f.Version < 2 {
		old = table("cri")
		if old == nil && !v.before(2, 0) {
			old = table("io.containerd.grpc.v1.cri")
		}
	}
	if v.before(2, 0) {
		return old
	}
	images := maps.Clone(table("io.containerd.cri.v1.images"))
	if images == nil {
		images = make(map[string]any)
	}
	if f.Version >= v.fileVersion() || old == nil {
		return images
	}
	moved := func(from map[string]any, keys ...string) {
		for _, key := range keys {
			if value, ok := from[key]; ok {
				images[key] = value
			}
		}
	}
	moved(old, "registry", "max_concurrent_downloads", "image_pull_with_sync_fs")
	below, _ := old["containerd"].(map[string]any)
	moved(below, "disable_snapshot_annotations", "discard_unpacked_layers")
	return images
}

func mergeMaps(to, from map[string]any) {
	for key, value := range from {
		below, ok := value.(map[string]any)
		if already, both := to[key].(map[string]any); ok && both {
			merged := maps.Clone(already)
			mergeMaps(merged, below)
			to[key] = merged
			continue
		}
		to[key] = value
	}
}

// resolveImports finds the files that a pattern stands for.
func resolveImports(t tree, parent string, imports []string) (files []string, err error) {
	for _, path := range imports {
		path = filepath.Clean(path)
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(parent), path)
		}
		if !strings.Contains(path, "*") {
			files = append(files, path)
			continue
		}
		matches, err := filepath.Glob(t.root + path) // links of another's tree are not followed right
		if err != nil {
			return nil, fmt.Errorf("%s: imports: %q: %w", parent, path, err)
		}
		for _, m := range matches {
			files = append(files, strings.TrimPrefix(m, t.root))
		}
	}
	return files, nil
}

func (c configuration) registry() map[string]any {
	m, _ := c.images["registry"].(map[string]any)
	return m
}

// size is how many entries a table of the registry's settings has.
func (c configuration) size(key string) int {
	m, _ := c.registry()[key].(map[string]any)
	return len(m)
}

// configPath is config_path as it is in force, "" for none.
func (c configuration) configPath(v version) string {
	path, _ := c.registry()["config_path"].(string)
	if path == "" && c.size("mirrors") == 0 && !v.before(2, 2) {
		return "/etc/containerd/certs.d:/etc/docker/certs.d"
	}
	return path
}

// local says why this release pulls by itself, "" where the transfer service does.
func (c configuration) local(v version) string {
	if v.before(2, 1) {
		return "containerd before 2.1 does"
	}
	is := func(key string) bool { b, _ := c.images[key].(bool); return b }
	annotations, set := c.images["disable_snapshot_annotations"].(bool)
	downloads, some := c.images["max_concurrent_downloads"].(int64)
	switch {
	case is("use_local_image_pull"):
		return "use_local_image_pull = true"
	case set && !annotations:
		return "disable_snapshot_annotations = false"
	case is("discard_unpacked_layers"):
		return "discard_unpacked_layers = true"
	case c.size("mirrors") > 0:
		return "registry.mirrors"
	case c.size("configs") > 0:
		return "registry.configs"
	case c.size("auths") > 0:
		return "registry.auths"
	case some && downloads != 3:
		return fmt.Sprintf("max_concurrent_downloads = %d", downloads)
	case is("image_pull_with_sync_fs"):
		return "image_pull_with_sync_fs = true"
	}
	return ""
}

// section is the header under which config_path stands, in this release's newest form
// or in that of the file that is there.
func (c configuration) section(v version) string {
	switch {
	case c.version == 1:
		return "[plugins.cri.registry]"
	case v.before(2, 0) || c.version == 2:
		return `[plugins."io.containerd.grpc.v1.cri".registry]`
	}
	return `[plugins."io.containerd.cri.v1.images".registry]`
}

// line is the setting that has containerd read a directory.
func (c configuration) line(v version, dir string) string {
	file := DefaultConfig
	if len(c.files) > 0 {
		file = c.files[0]
	}
	if c.registry() != nil {
		return fmt.Sprintf("in %s, in the table %s that is there (perhaps with '), have one line\n      config_path = %q\n  then %s", file, c.section(v), dir, restart)
	}
	version := ""
	if c.version == 0 {
		version = fmt.Sprintf("version = %d\n    ", min(v.fileVersion(), 3))
	}
	return fmt.Sprintf("in %s:\n    %s%s\n      config_path = %q\n  then %s", file, version, c.section(v), dir, restart)
}

// roots are the directories in which the settings of registries are looked for, in
// their order; reason and fix say why there are none.
func (c configuration) roots(v version, certsDir string) (roots []string, reason, fix string, err error) {
	if slices.Contains(c.disabled, "cri") || slices.Contains(c.disabled, "io.containerd.grpc.v1.cri") || slices.Contains(c.disabled, "io.containerd.cri.v1.images") {
		return nil, "containerd's plugin for Kubernetes is disabled (disabled_plugins), so its settings are nobody's",
			"in " + c.files[0] + ": take cri out of disabled_plugins, then " + restart, nil
	}
	path := c.configPath(v)
	set, _ := c.registry()["config_path"].(string)
	switch {
	case set != "" && c.size("mirrors") > 0:
		return nil, "", "", &fixed{fmt.Errorf("%w: registry.mirrors beside config_path", errPlugin), "remove the mirrors, then " + restart}
	case set != "" && v.before(2, 0) && c.configsTLS():
		return nil, "", "", &fixed{fmt.Errorf("%w: registry.configs with tls beside config_path", errPlugin), "remove the tls, put the certificates into certs.d, then " + restart}
	case c.size("mirrors") > 0:
		return nil, "registry.mirrors is set, so containerd reads no certs.d", "remove the mirrors, and " + c.line(v, certsDir), nil
	case path == "":
		return nil, "config_path is not set, so containerd reads no certs.d", c.line(v, certsDir), nil
	}
	roots = filepath.SplitList(path)
	if len(roots) > 1 && c.local(v) == "" {
		reason = fmt.Sprintf("config_path is the list %s, and the transfer service, which pulls, takes it for one folder of that name", path)
		if set == "" {
			reason = fmt.Sprintf("config_path is not set, which containerd %s reads as the list %s; the transfer service, which pulls, takes that for one folder of that name", v, path)
		}
		return nil, reason, c.line(v, certsDir), nil
	}
	return roots, "", "", nil
}

func (c configuration) configsTLS() bool {
	configs, _ := c.registry()["configs"].(map[string]any)
	for _, one := range configs {
		if m, ok := one.(map[string]any); ok && m["tls"] != nil {
			return true
		}
	}
	return false
}
