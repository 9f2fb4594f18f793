// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"tarn/proxy"
	"tarn/upstream"

	"github.com/spf13/pflag"
)

// Config is the configuration file, and what the flags made of it. A key's
// name in the file is its yaml tag. docs/tarn.example.yaml says the same in
// the file's own form, and a test keeps the two equal.
type Config struct {
	// Listen is host:port of the registry API. No host means every address
	// of the node. Default 127.0.0.1:5050.
	Listen string `yaml:"listen"`
	// Names are hosts under which clients ask the registry API, besides
	// addresses, localhost, tarn and this host's own name: with or without a
	// port, which does not count. Default none.
	Names []string `yaml:"names"`
	// AdminListen is where people and probes are answered: host:port, unix:/path
	// (for its owner only, and for changes, too), or "" for nowhere. Default
	// 127.0.0.1:5051.
	AdminListen string `yaml:"admin_listen"`
	// AdminSocket is where pins, evictions and verifying are asked for, by who
	// runs tarn: the path of a unix socket, "off", or "" for admin.sock in the
	// first of /run/tarn, $XDG_RUNTIME_DIR/tarn and Dir that can be written and
	// has no other tarn's; and for none where AdminListen is a socket. Default "".
	AdminSocket string `yaml:"admin_socket"`
	// AdminChanges tells where these are asked for: socket, or tcp, which is at
	// AdminListen, too, by whoever can connect there. Default socket.
	AdminChanges string `yaml:"admin_changes"`
	// LogLevel is the least severity that is logged: debug, info, warn or
	// error. Default info.
	LogLevel string `yaml:"log_level"`
	// Dir holds all that tarn keeps. Default /var/lib/tarn; but without a
	// file and not as root, tarn in the user's cache directory.
	Dir string `yaml:"dir"`
	// MaxSize bounds what Dir takes: bytes, or a share of its filesystem;
	// more than 0. Default 50GiB.
	MaxSize Size `yaml:"max_size"`
	// MinFree is always left free on Dir's filesystem: bytes, or a share of
	// it. Default 5%.
	MinFree Size `yaml:"min_free"`
	// DefaultUpstream is the registry that is meant when a request names
	// none; it counts as listed. Default docker.io.
	DefaultUpstream string `yaml:"default_upstream"`
	// Allow tells which registries may be asked besides the listed ones:
	// public (any, on public addresses) or listed (none). Default public.
	Allow string `yaml:"allow"`
	// Prefetch tells what is fetched ahead of the client when it was given a
	// manifest that was not here: off, config, or layers, which is all that
	// this node needs of the image. Default off.
	Prefetch string `yaml:"prefetch"`
	// Defaults hold for every upstream, listed or not.
	Defaults UpstreamDefaults `yaml:"defaults"`
	// Upstreams are the listed registries: they may live on private
	// addresses, and clients' credentials are passed to them. Default none.
	Upstreams []Upstream `yaml:"upstreams"`
}

// UpstreamDefaults are the keys that stand under defaults for every upstream,
// and under one upstream for that one. Durations are written as in 90s, 8h.
type UpstreamDefaults struct {
	// HeadTimeout is how long the registry may take for its response
	// headers; more than 0, at most 8s. Default 8s.
	HeadTimeout time.Duration `yaml:"head_timeout"`
	// StaleIfError is how old an answer may be that is given while the
	// registry cannot be asked; 0 means that none is. Default 0s.
	StaleIfError time.Duration `yaml:"stale_if_error"`
	// StaleFor is who may have such an answer: owner, whom the registry said
	// yes to; or node, every client of this node as soon as somebody of it
	// was told yes, while the registry cannot be reached or answers nobody.
	// Default owner.
	StaleFor string `yaml:"stale_for"`
	// GrantTTL is how long a registry's yes to a credential is believed for
	// further objects of the repository; 0 means asking for each. Default
	// 60s.
	GrantTTL time.Duration `yaml:"grant_ttl"`
	// MembershipTTL is how long a registry is believed to still have an
	// object that it had; 0 means asking every time. Default 24h.
	MembershipTTL time.Duration `yaml:"membership_ttl"`
	// Parallel is how many connections one large blob may use; more than 0.
	// Default 4.
	Parallel int `yaml:"parallel"`
}

// Upstream is one listed registry.
type Upstream struct {
	// Name is the registry's host, with :port if it has one, as it stands in
	// image names. Required.
	Name string `yaml:"name"`
	// Endpoints are asked in this order. The first is the authority on what
	// a tag means and who may have it; the others serve bytes only. Default
	// none, which means https on the registry's own name.
	Endpoints []Endpoint `yaml:"endpoints"`
	// Realm pins the URL of the token service that passwords which tarn is
	// given, the node's and the token broker's, may go to: https, or http on
	// loopback. Default "": https on the authority's own domain.
	Realm string `yaml:"realm"`
	// CAFile has the certificates, in PEM form, that the registry's must be
	// signed by. They count, besides the system's, where it redirects or
	// sends for a token, too. Default "": the system's.
	CAFile string `yaml:"ca_file"`
	// CertFile is tarn's own certificate for this registry, in PEM form.
	// Default "", none.
	CertFile string `yaml:"cert_file"`
	// KeyFile is the key of CertFile. Default "", none.
	KeyFile string `yaml:"key_file"`
	// InsecureSkipVerify believes any certificate of the endpoints: whoever
	// sits between then sees the clients' credentials. Default false.
	InsecureSkipVerify bool `yaml:"insecure_skip_verify"`
	// TokenBroker passes clients' credentials on to the token service from
	// tarn's own address, for clients that learn the scheme from /v2/ alone.
	// Default false.
	TokenBroker bool `yaml:"token_broker"`
	// Credentials of the node for this registry. They fetch bytes for clients
	// to whom the registry has said yes, and what is shared. Default none.
	Credentials Credentials `yaml:"credentials"`
	// Share are patterns of repositories that any client of this node may
	// have with the node's credentials; * is all but a slash. Default none.
	Share []string `yaml:"share"`
	// UpstreamDefaults are those of Config.Defaults where this upstream does
	// not set its own.
	UpstreamDefaults `yaml:",inline"`
}

// Endpoint is one URL of an upstream. In the file it is the URL alone, or a
// mapping.
type Endpoint struct {
	// URL is http or https, with a host and perhaps a path prefix. Required.
	URL string `yaml:"url"`
	// Trusted lets this endpoint see clients' credentials; the first one
	// always does. Default false.
	Trusted bool `yaml:"trusted"`
}

// Credentials say where the node's own credentials come from.
type Credentials struct {
	// DockerConfig is a file like docker's config.json. Default "", none.
	DockerConfig string `yaml:"docker_config"`
}

// defaultDir is where the daemon of a node keeps its data.
const defaultDir = "/var/lib/tarn"

// configVariable names the configuration file where --config does not, so that
// daemon and commands have the same without a word.
const configVariable = "TARN_CONFIG"

// maxConfigBytes bounds what a mistaken --config can make tarn read.
const maxConfigBytes = 1 << 20

// defaultConfig is the configuration of an empty file.
func defaultConfig() Config {
	return Config{
		Listen:          "127.0.0.1:5050",
		AdminListen:     "127.0.0.1:5051",
		AdminChanges:    "socket",
		LogLevel:        "info",
		Dir:             defaultDir,
		MaxSize:         Size{bytes: 50 << 30},
		MinFree:         Size{share: 5 * percent},
		DefaultUpstream: string(upstream.DockerHub),
		Allow:           "public",
		Prefetch:        "off",
		Defaults: UpstreamDefaults{
			HeadTimeout:   upstream.DefaultHeadTimeout,
			StaleFor:      "owner",
			GrantTTL:      time.Minute,
			MembershipTTL: 24 * time.Hour,
			Parallel:      4,
		},
	}
}

// userConfig is the configuration without a file. Who is not root cannot write
// to the system's directory and gets one of their own, if they have a home.
func userConfig(uid int) Config {
	c := defaultConfig()
	if cache, err := os.UserCacheDir(); uid != 0 && err == nil {
		c.Dir = filepath.Join(cache, "tarn")
	}
	return c
}

// loadConfig reads the file at path; "" means that there is none. Its error
// has a line for each mistake in the file.
func loadConfig(path string) (Config, error) {
	if path == "" {
		return userConfig(os.Geteuid()), nil
	}
	f, err := os.Open(path)
	if err != nil {
		return Config{}, fmt.Errorf("config: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return Config{}, fmt.Errorf("config: %w", err)
	}
	if len(data) > maxConfigBytes {
		return Config{}, fmt.Errorf("config: %s has more than %d bytes", path, maxConfigBytes)
	}
	return parseConfig(path, data)
}

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
		flag, key, value string
		field            *string
	}{
		{"listen", "listen", f.listen, &c.Listen},
		{"admin-listen", "admin_listen", f.admin, &c.AdminListen},
		{"dir", "dir", f.dir, &c.Dir},
	} {
		if !f.set.Changed(o.flag) {
			continue
		}
		if err := rules[o.key](o.value); err != nil {
			return Config{}, fmt.Errorf("--%s: %w", o.flag, err)
		}
		*o.field = o.value
	}
	if f.set.Changed("max-size") {
		size, err := parseSize(f.maxSize)
		if err == nil {
			err = rules["max_size"](size)
		}
		if err != nil {
			return Config{}, fmt.Errorf("--max-size: %w", err)
		}
		c.MaxSize = size
	}
	if err := c.overrideUpstreams(f.upstreams); err != nil {
		return Config{}, fmt.Errorf("--upstream: %w", err)
	}
	return c, nil
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
			c.Upstreams = append(c.Upstreams, Upstream{Name: string(name), UpstreamDefaults: c.Defaults})
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

// rules say what a key's value must be beyond its type. Flags obey them too.
var rules = map[string]func(value any) error{
	"listen":                      func(v any) error { return checkAddress(v.(string)) },
	"admin_listen":                func(v any) error { return checkAdminAddress(v.(string)) },
	"admin_socket":                checkAdminSocket,
	"admin_changes":               oneOf("socket", "tcp"),
	"names[]":                     checkHost,
	"log_level":                   oneOf("debug", "info", "warn", "error"),
	"dir":                         checkDir,
	"max_size":                    checkMaxSize,
	"default_upstream":            checkName,
	"allow":                       oneOf("public", "listed"),
	"prefetch":                    oneOf("off", "config", "layers"),
	"defaults.head_timeout":       checkHeadTimeout,
	"defaults.parallel":           checkParallel,
	"defaults.grant_ttl":          checkTTL,
	"defaults.membership_ttl":     checkTTL,
	"defaults.stale_if_error":     checkTTL,
	"defaults.stale_for":          oneOf("owner", "node"),
	"upstreams[].stale_if_error":  checkTTL,
	"upstreams[].stale_for":       oneOf("owner", "node"),
	"upstreams[].grant_ttl":       checkTTL,
	"upstreams[].membership_ttl":  checkTTL,
	"upstreams[].realm":           checkRealm,
	"upstreams[].share[]":         checkShare,
	"upstreams[].name":            checkName,
	"upstreams[].endpoints[]":     func(v any) error { return checkURL(v.(string)) },
	"upstreams[].endpoints[].url": func(v any) error { return checkURL(v.(string)) },
	"upstreams[].head_timeout":    checkHeadTimeout,
	"upstreams[].parallel":        checkParallel,
}

func oneOf(words ...string) func(any) error {
	return func(v any) error {
		if !slices.Contains(words, v.(string)) {
			return fmt.Errorf("%q is none of %s", v, strings.Join(words, ", "))
		}
		return nil
	}
}

func checkDir(v any) error {
	if v.(string) == "" {
		return errors.New("must not be empty")
	}
	return nil
}

func checkName(v any) error {
	_, err := upstream.ParseName(v.(string))
	if err != nil {
		return fmt.Errorf("%q: %w", v, err)
	}
	return nil
}

func checkHost(v any) error { return proxy.CheckHost(v.(string)) }

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

// socketOff is the word for no admin socket.
const socketOff = "off"

func checkAdminSocket(v any) error {
	switch path := v.(string); {
	case path == "" || path == socketOff:
		return nil
	case !filepath.IsAbs(path):
		return fmt.Errorf("%q is neither off nor the absolute path of a socket, as in /run/tarn/admin.sock", path)
	default:
		return checkSocketPath(path)
	}
}

func checkMaxSize(v any) error {
	if v.(Size) == (Size{}) {
		return errors.New("must be more than 0")
	}
	return nil
}

// checkHeadTimeout: a longer one would never be reached, since every answer
// has its headers a second later.
func checkHeadTimeout(v any) error {
	if d := v.(time.Duration); d <= 0 || d > upstream.DefaultHeadTimeout {
		return fmt.Errorf("must be more than 0s and at most %v", upstream.DefaultHeadTimeout)
	}
	return nil
}

func checkTTL(v any) error {
	if v.(time.Duration) < 0 {
		return errors.New("must not be negative; 0s means asking every time")
	}
	return nil
}

func checkRealm(v any) error {
	if v.(string) == "" {
		return nil
	}
	u, err := url.Parse(v.(string))
	if err != nil {
		return errors.New("not a URL, as in https://auth.example/token")
	}
	return upstream.CheckRealm(u)
}

// checkShare: a pattern names repositories of this upstream, from their first
// component to the last.
func checkShare(v any) error {
	s := v.(string)
	_, err := path.Match(s, "")
	switch {
	case s == "" || strings.HasPrefix(s, "/") || strings.HasSuffix(s, "/"):
		return fmt.Errorf("%q is not a pattern of repositories, as in platform/*", s)
	case err != nil:
		return fmt.Errorf("%q: a bracket or backslash is not closed", s)
	}
	return nil
}

func checkParallel(v any) error {
	if v.(int) < 1 {
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
