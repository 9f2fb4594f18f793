// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"tarn/upstream"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// Config is the configuration file. Every key is optional; the values given
// here are the defaults. A key that tarn does not know is an error, and so is
// one that has no meaning yet, unless it is set to what it would be anyway.
type Config struct {
	// Listen is the address of the registry API, 127.0.0.1:5050.
	Listen string `yaml:"listen"`
	// TLS of that address. Not yet.
	TLS notYet `yaml:"tls"`
	// AdminListen is the address for people and probes, 127.0.0.1:5051;
	// "" for none, unix:/path for a socket.
	AdminListen string `yaml:"admin_listen"`
	// MetricsListen exposes the nameless metrics elsewhere, "". Not yet.
	MetricsListen notYet `yaml:"metrics_listen"`
	// LogLevel is debug, info, warn or error; info.
	LogLevel string `yaml:"log_level"`
	// Dir is the data directory, /var/lib/tarn; for a user without a
	// configuration file, tarn in the user's cache directory.
	Dir string `yaml:"dir"`
	// MaxSize bounds what the directory takes, in bytes or as a share of
	// its filesystem; 50GiB.
	MaxSize Size `yaml:"max_size"`
	// MinFree of the filesystem is always left free, in bytes or as a
	// share; 5%.
	MinFree Size `yaml:"min_free"`
	// DefaultUpstream is asked when a request names no registry; docker.io.
	DefaultUpstream string `yaml:"default_upstream"`
	// Allow says which registries are served besides the listed ones:
	// public (any, on public addresses) or listed (none); public.
	Allow string `yaml:"allow"`
	// Prefetch starts an image's parts before they are asked for; off. Not
	// yet.
	Prefetch notYet `yaml:"prefetch"`
	// AllowViaProxy serves registries that are not listed through an egress
	// proxy; false. Not yet.
	AllowViaProxy notYet `yaml:"allow_via_proxy"`
	// Defaults hold for every upstream that does not say otherwise.
	Defaults UpstreamDefaults `yaml:"defaults"`
	// Upstreams are the registries that are listed: they may live on private
	// addresses, and credentials are passed to them by path, too.
	Upstreams []Upstream `yaml:"upstreams"`
}

// UpstreamDefaults are the keys that an upstream has of its own or takes from
// "defaults".
type UpstreamDefaults struct {
	// HeadTimeout is how long a registry may take for its response headers;
	// 8s, more than 0 and at most that.
	HeadTimeout time.Duration `yaml:"head_timeout"`
	// StaleIfError is how old an answer may be when the registry cannot be
	// asked; 0s. Not yet.
	StaleIfError notYet `yaml:"stale_if_error"`
	// GrantTTL is how long a yes to a credential is remembered; 60s. Not
	// yet: every request asks.
	GrantTTL notYet `yaml:"grant_ttl"`
	// MembershipTTL is how long an object is believed to exist in a
	// repository; 24h. Not yet: every request asks.
	MembershipTTL notYet `yaml:"membership_ttl"`
	// Parallel is how many connections one large blob may use; 4. Not yet.
	Parallel notYet `yaml:"parallel"`
}

// Upstream is a listed registry.
type Upstream struct {
	// Name as it stands in image names, such as registry.corp:5000.
	Name string `yaml:"name"`
	// Endpoints are URLs, or {url, trusted}. The first is the authority,
	// which alone says who may have what; https on the name.
	Endpoints []Endpoint `yaml:"endpoints"`
	// Realm pins the token service of the node's credentials, "". Not yet.
	Realm notYet `yaml:"realm"`
	// CAFile is a PEM file with the roots to believe; the system's.
	CAFile string `yaml:"ca_file"`
	// CertFile and KeyFile are a client certificate in PEM form; none.
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	// InsecureSkipVerify believes any certificate; false.
	InsecureSkipVerify bool `yaml:"insecure_skip_verify"`
	// TokenBroker serves clients that learn the scheme from /v2/ only;
	// false. Not yet.
	TokenBroker notYet `yaml:"token_broker"`
	// Credentials of the node; none. Not yet.
	Credentials notYet `yaml:"credentials"`
	// Share lists repositories that every client may have with the node's
	// credentials; none. Not yet.
	Share notYet `yaml:"share"`

	UpstreamDefaults `yaml:",inline"`
}

// Endpoint is one URL of an upstream.
type Endpoint struct {
	URL string `yaml:"url"`
	// Trusted lets an endpoint other than the first see credentials; false.
	Trusted bool `yaml:"trusted"`
}

// UnmarshalYAML takes a URL alone as well.
func (e *Endpoint) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode {
		*e = Endpoint{URL: n.Value}
	} else {
		for i := 0; i+1 < len(n.Content); i += 2 {
			if k := n.Content[i].Value; k != "url" && k != "trusted" {
				return lineError(n.Content[i], "unknown key %q", k)
			}
		}
		type plain Endpoint
		if err := n.Decode((*plain)(e)); err != nil {
			return err
		}
	}
	if err := checkURL(e.URL); err != nil {
		return lineError(n, "endpoint: %w", err)
	}
	return nil
}

func checkURL(raw string) error {
	u, err := url.Parse(raw)
	if err != nil {
		return fmt.Errorf("%q is not a URL", raw)
	}
	return upstream.CheckEndpoint(u)
}

// notYet is a key that is part of the configuration's design and has no
// meaning in this version.
type notYet struct{ node *yaml.Node }

// UnmarshalYAML keeps the node, for refuse.
func (k *notYet) UnmarshalYAML(n *yaml.Node) error {
	k.node = n
	return nil
}

// refuse fails unless the key is absent or has the value that it would have.
func (k notYet) refuse(key, value string) error {
	if k.node == nil || k.node.Kind == yaml.ScalarNode && k.node.Value == value {
		return nil
	}
	return lineError(k.node, "key %q: not yet supported; remove it, or leave it at its default", key)
}

// refuseNotYet is the one list of them.
func (c *Config) refuseNotYet() error {
	errs := []error{
		c.TLS.refuse("tls", ""),
		c.MetricsListen.refuse("metrics_listen", ""),
		c.Prefetch.refuse("prefetch", "off"),
		c.AllowViaProxy.refuse("allow_via_proxy", "false"),
		c.Defaults.refuseNotYet(),
	}
	for _, u := range c.Upstreams {
		errs = append(errs,
			u.Realm.refuse("realm", ""),
			u.TokenBroker.refuse("token_broker", "false"),
			u.Credentials.refuse("credentials", ""),
			u.Share.refuse("share", ""),
			u.UpstreamDefaults.refuseNotYet())
	}
	return errors.Join(errs...)
}

func (d *UpstreamDefaults) refuseNotYet() error {
	return errors.Join(
		d.StaleIfError.refuse("stale_if_error", "0s"),
		d.GrantTTL.refuse("grant_ttl", "60s"),
		d.MembershipTTL.refuse("membership_ttl", "24h"),
		d.Parallel.refuse("parallel", "4"))
}

// Size is a number of bytes, or a share of the filesystem.
type Size struct {
	bytes   int64
	percent float64
}

// Bytes is the size on a filesystem of that many bytes.
func (s Size) Bytes(total int64) int64 {
	if s.percent > 0 {
		return int64(s.percent / 100 * float64(total))
	}
	return s.bytes
}

// sizePattern has the number and the unit: decimal (K, M, G, T, with or without
// B) or binary (Ki, Mi, Gi, Ti), or a share in percent.
var sizePattern = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?) ?(%|(?:[KMGT]i?)?B?)$`)

const sizeForms = `as in "50GiB", "500MB", "1073741824" or "40%"`

// ParseSize reads a Size.
func ParseSize(s string) (Size, error) {
	m := sizePattern.FindStringSubmatch(s)
	if m == nil {
		return Size{}, fmt.Errorf("%q is not a size, %s", s, sizeForms)
	}
	n, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		return Size{}, fmt.Errorf("%q is not a size, %s", s, sizeForms)
	}
	if m[2] == "%" {
		if n > 100 {
			return Size{}, fmt.Errorf("%q is more than the whole filesystem", s)
		}
		return Size{percent: n}, nil
	}
	unit := strings.TrimSuffix(m[2], "B")
	base := 1000.0
	if strings.HasSuffix(unit, "i") {
		base = 1024
	}
	if unit != "" {
		n *= math.Pow(base, float64(strings.IndexByte("KMGT", unit[0])+1))
	}
	if n >= math.MaxInt64 {
		return Size{}, fmt.Errorf("%q is more than any disk has", s)
	}
	return Size{bytes: int64(n)}, nil
}

// UnmarshalYAML reads a size.
func (s *Size) UnmarshalYAML(n *yaml.Node) (err error) {
	if *s, err = ParseSize(n.Value); err != nil {
		return lineError(n, "%w", err)
	}
	return nil
}

// lineError is an error of the line at which a node stands; loadConfig puts
// the file's name before it.
func lineError(n *yaml.Node, format string, args ...any) error {
	return &positioned{n.Line, fmt.Errorf(format, args...)}
}

type positioned struct {
	line int
	err  error
}

func (p *positioned) Error() string { return fmt.Sprintf("line %d: %s", p.line, p.err) }
func (p *positioned) Unwrap() error { return p.err }

const defaultMaxSize = 50 << 30

func defaultConfig() Config {
	return Config{
		Listen:          "127.0.0.1:5050",
		AdminListen:     "127.0.0.1:5051",
		LogLevel:        "info",
		Dir:             "/var/lib/tarn",
		MaxSize:         Size{bytes: defaultMaxSize},
		MinFree:         Size{percent: 5},
		DefaultUpstream: string(upstream.DockerHub),
		Allow:           "public",
		Defaults:        UpstreamDefaults{HeadTimeout: upstream.DefaultHeadTimeout},
	}
}

// loadConfig reads a configuration file. Errors name the file, the line and
// the key.
func loadConfig(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("config: %w", err)
	}
	c, err := parseConfig(data)
	if err != nil {
		return c, inFile(path, err)
	}
	return c, nil
}

func parseConfig(data []byte) (Config, error) {
	c := defaultConfig()
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil && err != io.EOF {
		return c, err
	}
	if err := dec.Decode(new(yaml.Node)); err != io.EOF {
		return c, errors.New("more than one YAML document")
	}
	if err := c.refuseNotYet(); err != nil {
		return c, err
	}
	return c, c.check()
}

var (
	yamlLine    = regexp.MustCompile(`^(?:yaml: )?line (\d+): `)
	yamlUnknown = regexp.MustCompile(`^field (\S+) not found in type \S+$`)
)

// inFile rewrites each error as "file:line: what", on one line each.
func inFile(path string, err error) error {
	messages := strings.Split(err.Error(), "\n")
	var te *yaml.TypeError
	if errors.As(err, &te) {
		messages = te.Errors
	}
	for i, m := range messages {
		m = strings.TrimSpace(m)
		at := path
		if l := yamlLine.FindStringSubmatch(m); l != nil {
			at, m = path+":"+l[1], m[len(l[0]):]
		}
		if u := yamlUnknown.FindStringSubmatch(m); u != nil {
			m = fmt.Sprintf("unknown key %q", u[1])
		}
		messages[i] = at + ": " + m
	}
	return errors.New(strings.Join(messages, "\n"))
}

// check holds the values to what they mean, whether they came from the file or
// from flags.
func (c *Config) check() error {
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("listen: %q is not host:port", c.Listen)
	}
	if a := c.AdminListen; a != "" && !strings.HasPrefix(a, "unix:/") {
		if _, _, err := net.SplitHostPort(a); err != nil {
			return fmt.Errorf("admin_listen: %q is neither host:port nor unix:/path nor empty", a)
		}
	}
	if c.Dir == "" {
		return errors.New("dir: is empty")
	}
	if c.MaxSize.Bytes(1<<40) <= 0 {
		return errors.New("max_size: must be more than 0")
	}
	if c.Allow != "public" && c.Allow != "listed" {
		return fmt.Errorf("allow: %q is neither public nor listed", c.Allow)
	}
	if _, err := upstream.ParseName(c.DefaultUpstream); err != nil {
		return fmt.Errorf("default_upstream: %w", err)
	}
	if err := checkHeadTimeout("defaults", c.Defaults.HeadTimeout); err != nil {
		return err
	}
	seen := make(map[upstream.Name]bool)
	for _, u := range c.Upstreams {
		name, err := upstream.ParseName(u.Name)
		if err != nil {
			return fmt.Errorf("upstreams: name %q: %w", u.Name, err)
		}
		if seen[name] {
			return fmt.Errorf("upstreams: %s is listed twice", name)
		}
		seen[name] = true
		if u.HeadTimeout != 0 {
			if err := checkHeadTimeout("upstream "+u.Name, u.HeadTimeout); err != nil {
				return err
			}
		}
		if (u.CertFile == "") != (u.KeyFile == "") {
			return fmt.Errorf("upstream %s: cert_file and key_file go together", u.Name)
		}
	}
	return nil
}

func checkHeadTimeout(where string, d time.Duration) error {
	if d <= 0 || d > upstream.DefaultHeadTimeout {
		return fmt.Errorf("%s: head_timeout: %s is not more than 0 and at most %s, which leaves time to answer", where, d, upstream.DefaultHeadTimeout)
	}
	return nil
}

// serveFlags override the file.
type serveFlags struct {
	set       *pflag.FlagSet
	file      string
	listen    string
	admin     string
	dir       string
	maxSize   string
	upstreams []string
}

func (f *serveFlags) register(set *pflag.FlagSet) {
	f.set = set
	set.StringVar(&f.file, "config", "", "configuration `file` (YAML)")
	set.StringVar(&f.listen, "listen", "", "`address` of the registry API (default 127.0.0.1:5050)")
	set.StringVar(&f.admin, "admin-listen", "", "`address` for people and probes, empty for none (default 127.0.0.1:5051)")
	set.StringVar(&f.dir, "dir", "", "data `directory` (default /var/lib/tarn)")
	set.StringVar(&f.maxSize, "max-size", "", "bound on the data directory, a `size` such as 50GiB or 40% (default 50GiB)")
	set.StringArrayVar(&f.upstreams, "upstream", nil, "list a registry: `NAME=URL`; repeatable")
}

// config is the file, or the defaults, with the flags over it.
func (f *serveFlags) config() (Config, error) {
	c := defaultConfig()
	if f.file != "" {
		var err error
		if c, err = loadConfig(f.file); err != nil {
			return c, err
		}
	} else if os.Geteuid() != 0 {
		cacheDir, err := os.UserCacheDir()
		if err != nil {
			return c, fmt.Errorf("dir: %w; choose one with --dir", err)
		}
		c.Dir = filepath.Join(cacheDir, "tarn")
	}
	if f.set.Changed("listen") {
		c.Listen = f.listen
	}
	if f.set.Changed("admin-listen") {
		c.AdminListen = f.admin
	}
	if f.set.Changed("dir") {
		c.Dir = f.dir
	}
	if f.set.Changed("max-size") {
		s, err := ParseSize(f.maxSize)
		if err != nil {
			return c, fmt.Errorf("--max-size: %w", err)
		}
		c.MaxSize = s
	}
	for _, s := range f.upstreams {
		if err := c.addUpstream(s); err != nil {
			return c, fmt.Errorf("--upstream: %w", err)
		}
	}
	return c, c.check()
}

// addUpstream takes NAME=URL: the registry's only endpoint, whatever the file
// says.
func (c *Config) addUpstream(s string) error {
	rawName, rawURL, ok := strings.Cut(s, "=")
	if !ok {
		return fmt.Errorf("%q is not NAME=URL, as in ghcr.io=https://ghcr.io", s)
	}
	name, err := upstream.ParseName(rawName)
	if err != nil {
		return err
	}
	if err := checkURL(rawURL); err != nil {
		return err
	}
	endpoints := []Endpoint{{URL: rawURL}}
	for i, u := range c.Upstreams {
		if n, err := upstream.ParseName(u.Name); err == nil && n == name {
			c.Upstreams[i].Endpoints = endpoints
			return nil
		}
	}
	c.Upstreams = append(c.Upstreams, Upstream{Name: string(name), Endpoints: endpoints})
	return nil
}
