// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"tarn/upstream"
)

// Config is the configuration file, and what the flags made of it. keys.go names
// the key of each field. docs/tarn.example.yaml says the same in the file's own
// form, and a test keeps the two equal.
type Config struct {
	// Listen is host:port of the registry API. No host means every address
	// of the node. Default 127.0.0.1:5050.
	Listen string
	// TLS has clients ask over https. Default: plain http.
	TLS TLS
	// Names are hosts under which clients ask the registry API, besides
	// addresses, localhost, tarn and this host's own name: with or without a
	// port, which does not count. Default none.
	Names []string
	// AdminListen is where people and probes are answered: host:port, unix:/path
	// (for its owner only, and for changes, too), or "" for nowhere. Default
	// 127.0.0.1:5051.
	AdminListen string
	// AdminSocket is where pins, evictions and verifying are asked for, by who
	// runs tarn: the path of a unix socket, "off", or "" for admin.sock in the
	// first of /run/tarn, $XDG_RUNTIME_DIR/tarn and Dir that can be written and
	// has no other tarn's; and for none where AdminListen is a socket. Default "".
	AdminSocket string
	// AdminNames tells where what names images is told (images, pins, explanations,
	// decisions): tcp, which is at AdminListen, too, or socket. Any process of the
	// node can connect to the loopback.
	AdminNames string
	// AdminChanges tells where these are asked for: socket, or tcp, which is at
	// AdminListen, too, by whoever can connect there. Default socket.
	AdminChanges string
	// MetricsListen is host:port where whoever can connect reads metrics that name
	// nothing, and nothing else; "" for nowhere. Default "".
	MetricsListen string
	// LogLevel is the least severity that is logged: debug, info, warn or
	// error. Default info.
	LogLevel string
	// AccessLog tells which requests have a line in the log: all, upstream (those
	// that a registry was asked for) or errors. Default all.
	AccessLog string
	// Dir holds all that tarn keeps. Default /var/lib/tarn; but without a
	// file and not as root, tarn in the user's cache directory.
	Dir string
	// MaxSize bounds what Dir takes: bytes, at least 1 MiB, or a share of its
	// filesystem, more than 0. Default 50GiB.
	MaxSize Size
	// MinFree is always left free on Dir's filesystem: bytes, or a share of
	// it. Default 5%.
	MinFree Size
	// MinFreeInodes is how many files can always still be made there: a number, or a
	// share of all that there may be. Default 5%.
	MinFreeInodes Size
	// DefaultUpstream is the registry that is meant when a request names
	// none; it counts as listed. Default docker.io.
	DefaultUpstream string
	// Allow tells which registries may be asked besides the listed ones:
	// public (any, on public addresses) or listed (none). Default public.
	Allow string
	// Prefetch tells what is fetched ahead of the client when it was given a
	// manifest that was not here: off, config, or layers, which is all that
	// this node needs of the image. Default off.
	Prefetch string
	// AllowViaProxy lets registries that are not listed be asked by an egress
	// proxy (HTTPS_PROXY, HTTP_PROXY), where their addresses cannot be checked.
	// Default false.
	AllowViaProxy bool
	// Defaults hold for every upstream, listed or not.
	Defaults Defaults
	// Upstreams are the listed registries: they may live on private
	// addresses, and clients' credentials are passed to them. Default none.
	Upstreams []Upstream
}

// Defaults are what holds for every upstream.
type Defaults struct {
	// CAFile has certificates, in PEM form, that count besides the system's for
	// every registry without a CAFile of its own, for all that registries
	// redirect to or name as their token service, and for egress proxies.
	// Default "": the system's alone.
	CAFile string
	// UpstreamDefaults are those that an upstream may set for itself.
	UpstreamDefaults
}

// UpstreamDefaults are the keys that stand under defaults for every upstream,
// and under one upstream for that one. Durations are written as in 90s, 8h.
type UpstreamDefaults struct {
	// HeadTimeout is how long the registry may take for its response
	// headers; more than 0, at most 8s. Default 8s.
	HeadTimeout time.Duration
	// StaleIfError is how old an answer may be that is given while the
	// registry cannot be asked; 0 means that none is. Default 0s.
	StaleIfError time.Duration
	// StaleFor is who may have such an answer: owner, whom the registry said
	// yes to; or node, every client of this node as soon as somebody of it
	// was told yes, while the registry cannot be reached or answers nobody.
	// Default owner.
	StaleFor string
	// GrantTTL is how long a registry's yes to a credential is believed for
	// further objects of the repository; 0 means asking for each. Default
	// 60s.
	GrantTTL time.Duration
	// MembershipTTL is how long a registry is believed to still have an
	// object that it had; 0 means asking every time. Default 24h.
	MembershipTTL time.Duration
	// Parallel is how many connections one large blob may use; more than 0.
	// Default 4.
	Parallel int
}

// Upstream is one listed registry.
type Upstream struct {
	// Name is the registry's host, with :port if it has one, as it stands in
	// image names. Required.
	Name string
	// Endpoints are asked in this order. The first is the authority on what
	// a tag means and who may have it; the others serve bytes only. Default
	// none, which means https on the registry's own name.
	Endpoints []Endpoint
	// Realm pins the URL of the token service that passwords which tarn is
	// given, the node's and the token broker's, may go to: https, or http on
	// loopback. Default "": https on the authority's own domain.
	Realm string
	// CAFile has the certificates, in PEM form, that the registry's must be
	// signed by. They count, besides the system's, where it redirects or
	// sends for a token, too. Default "": the system's, and Defaults.CAFile.
	CAFile string
	// CertFile is tarn's own certificate for this registry, in PEM form.
	// Default "", none.
	CertFile string
	// KeyFile is the key of CertFile. Default "", none.
	KeyFile string
	// InsecureSkipVerify believes any certificate of the endpoints: whoever
	// sits between then sees the clients' credentials. Default false.
	InsecureSkipVerify bool
	// TokenBroker passes clients' credentials on to the token service from
	// tarn's own address, for clients that learn the scheme from /v2/ alone.
	// Default false.
	TokenBroker bool
	// Credentials of the node for this registry. They fetch bytes for clients
	// to whom the registry has said yes, and what is shared. Default none.
	Credentials Credentials
	// Proxy is the egress proxy by which this registry, and what it redirects to
	// or names as its token service, is reached, but for what NO_PROXY names.
	// Default none: as HTTPS_PROXY, HTTP_PROXY and NO_PROXY say.
	Proxy Proxy
	// Share are patterns of repositories that any client of this node may
	// have with the node's credentials; * is all but a slash. Default none.
	Share []string
	// UpstreamDefaults are those of Config.Defaults where this upstream does
	// not set its own.
	UpstreamDefaults
}

// Endpoint is one URL of an upstream. In the file it is the URL alone, or a
// mapping.
type Endpoint struct {
	// URL is http or https, with a host and perhaps a path prefix. Required.
	URL string
	// Trusted lets this endpoint see clients' credentials; the first one
	// always does. Default false.
	Trusted bool
}

// TLS are the files that Listen is served with, in PEM form. tarn looks at them each
// second in which a client comes, and uses what has changed; what cannot be used
// changes nothing.
type TLS struct {
	// CertFile is what clients are shown, with what it is signed by. Default "",
	// plain http.
	CertFile string
	// KeyFile is the key of CertFile. Default "", none.
	KeyFile string
	// ClientCAFile has the certificates that a client's own must be signed by: who
	// has none is served nothing. Default "": every client is.
	ClientCAFile string
}

// Credentials say where the node's own credentials come from.
type Credentials struct {
	// DockerConfig is a file like docker's config.json. Default "", none.
	DockerConfig string
	// KubeletPlugins are the kubelet's image credential provider plugins, asked
	// where DockerConfig is not set. Default none.
	KubeletPlugins KubeletPlugins
}

// given tells whether there are any.
func (c Credentials) given() bool { return c.DockerConfig != "" || c.KubeletPlugins.Config != "" }

// KubeletPlugins are the programs that the kubelet asks for credentials. They run as
// tarn's user, one at a time, for a minute at most.
type KubeletPlugins struct {
	// Config is a file like that of the kubelet's --image-credential-provider-config,
	// or a folder of such files. It is read with this one. Default "", none.
	Config string
	// BinDir is the folder of the programs, as for the kubelet's
	// --image-credential-provider-bin-dir. Default "", none.
	BinDir string
}

// Proxy is an egress proxy. In the file it is the URL alone, or a mapping.
type Proxy struct {
	// URL is http or https, and a host with its port. Default "", none.
	URL string
	// CredentialsFile has USER:PASSWORD for the proxy; it is read with the file.
	// Default "", none.
	CredentialsFile string
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
		AdminNames:      "tcp",
		LogLevel:        "info",
		AccessLog:       "all",
		Dir:             defaultDir,
		MaxSize:         Size{bytes: 50 << 30},
		MinFree:         Size{share: 5 * percent},
		MinFreeInodes:   Size{share: 5 * percent},
		DefaultUpstream: string(upstream.DockerHub),
		Allow:           "public",
		Prefetch:        "off",
		Defaults: Defaults{UpstreamDefaults: UpstreamDefaults{
			HeadTimeout:   upstream.DefaultHeadTimeout,
			StaleFor:      "owner",
			GrantTTL:      time.Minute,
			MembershipTTL: 24 * time.Hour,
			Parallel:      4,
		}},
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
