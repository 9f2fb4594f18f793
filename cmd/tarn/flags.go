// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"tarn/upstream"

	"github.com/spf13/pflag"
)

// serveFlags are the flags that override the file.
type serveFlags struct {
	set       *pflag.FlagSet
	file      string
	listen    string
	admin     string
	dir       string
	maxSize   string
	upstreams []string
}

// register adds the flags to a command.
func (f *serveFlags) register(set *pflag.FlagSet) {
	d := defaultConfig()
	f.set = set
	set.StringVar(&f.file, "config", os.Getenv(configVariable), "configuration `file` (YAML); without it, $"+configVariable)
	set.StringVar(&f.listen, "listen", "", "`address` of the registry API (default "+d.Listen+")")
	set.StringVar(&f.admin, "admin-listen", "", "`address` for people and probes: host:port, unix:/path, or empty for none (default "+d.AdminListen+")")
	set.StringVar(&f.dir, "dir", "", "data `directory` (default "+d.Dir+", or for a user without a file, tarn in the cache directory)")
	set.StringVar(&f.maxSize, "max-size", "", "bound on the data directory, a `size` such as 50GiB or 40% (default 50GiB)")
	set.StringArrayVar(&f.upstreams, "upstream", nil, "list a registry, as `NAME=URL`; repeatable, further URLs of one name are its further endpoints")
}

// config loads the file that --config names, and lets each of the other flags
// that was given replace the file's value. A flag obeys the rule of its key.
func (f *serveFlags) config() (Config, error) {
	c, err := loadConfig(f.file)
	if err != nil {
		return Config{}, err
	}
	for _, o := range []struct {
		flag, value string
		field       *string
		rule        func(string) error
	}{
		{"listen", f.listen, &c.Listen, checkAddress},
		{"admin-listen", f.admin, &c.AdminListen, checkAdminAddress},
		{"dir", f.dir, &c.Dir, checkDir},
	} {
		if !f.set.Changed(o.flag) {
			continue
		}
		if err := o.rule(o.value); err != nil {
			return Config{}, fmt.Errorf("--%s: %w", o.flag, err)
		}
		*o.field = o.value
	}
	if f.set.Changed("max-size") {
		size, err := parseSize(f.maxSize)
		if err == nil {
			err = checkMaxSize(size)
		}
		if err != nil {
			return Config{}, fmt.Errorf("--max-size: %w", err)
		}
		c.MaxSize = size
	}
	if err := c.overrideUpstreams(f.upstreams); err != nil {
		return Config{}, fmt.Errorf("--upstream: %w", err)
	}
	return c, c.checkListeners()
}

// overrideUpstreams gives each upstream that is named the endpoints that are
// named with it, in place of the file's; all else of it stays.
func (c *Config) overrideUpstreams(flags []string) error {
	replaced := make(map[upstream.Name]bool)
	for _, s := range flags {
		name, endpoint, err := parseUpstreamFlag(s)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(c.Upstreams, func(u Upstream) bool {
			n, err := upstream.ParseName(u.Name)
			return err == nil && n == name
		})
		if i < 0 {
			i = len(c.Upstreams)
			c.Upstreams = append(c.Upstreams, Upstream{Name: string(name), UpstreamDefaults: c.Defaults.UpstreamDefaults})
		}
		u := &c.Upstreams[i]
		if !replaced[name] {
			replaced[name] = true
			u.Endpoints = nil
		}
		u.Endpoints = append(u.Endpoints, endpoint)
	}
	return nil
}

// parseUpstreamFlag parses NAME=URL. A registry's name cannot have a '=', so
// the first one parts them.
func parseUpstreamFlag(s string) (upstream.Name, Endpoint, error) {
	rawName, rawURL, ok := strings.Cut(s, "=")
	if !ok {
		return "", Endpoint{}, fmt.Errorf("%q is not NAME=URL, as in ghcr.io=https://ghcr.io", s)
	}
	name, err := upstream.ParseName(rawName)
	if err != nil {
		return "", Endpoint{}, err
	}
	return name, Endpoint{URL: rawURL}, checkURL(rawURL)
}
