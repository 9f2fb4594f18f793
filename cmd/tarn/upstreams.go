// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"

	"tarn/proxy"
	"tarn/upstream"

	"go.uber.org/zap"
)

// newUpstreams lists the configured registries. The default upstream counts as
// listed.
func newUpstreams(cfg Config, observe func(upstream.Exchange) func(n int), log *zap.Logger, listeners ...net.Listener) (*upstream.Client, error) {
	defaultUpstream, err := upstream.ParseName(cfg.DefaultUpstream)
	if err != nil {
		return nil, fmt.Errorf("default_upstream: %w", err)
	}
	environment, err := environmentProxies()
	if err != nil {
		return nil, err
	}
	logEgress(log, environment)
	roots, err := withRoots(cfg.Defaults.CAFile)
	if err != nil {
		return nil, fmt.Errorf("defaults: %w", err)
	}
	var listed []upstream.Config
	defaultListed := false
	plugins := make(map[KubeletPlugins]*upstream.KubeletPlugins) // what one says may be for several registries
	for _, u := range cfg.Upstreams {
		c, err := upstreamConfig(u, cfg.Defaults, roots)
		if err == nil {
			c.Proxies, err = u.Proxy.config(environment.NoProxy)
		}
		if err != nil {
			return nil, fmt.Errorf("upstream %s: %w", u.Name, err)
		}
		defaultListed = defaultListed || c.Name == defaultUpstream
		if k := u.Credentials.KubeletPlugins; k.Config != "" {
			if plugins[k] == nil {
				plugins[k] = newPlugins(k, log)
			}
			c.Credentials = plugins[k]
		} else if c.Credentials != nil {
			// A secret may be mounted later, and who does not need it is
			// served meanwhile.
			if err := c.Credentials.Check(); err != nil {
				log.Error("the node's credentials cannot be read", zap.String("upstream", string(c.Name)), zap.Error(err))
			}
		}
		warnOfKubelet(u, log)
		listed = append(listed, c)
	}
	if !defaultListed {
		listed = append(listed, upstream.Config{Name: defaultUpstream, HeadTimeout: cfg.Defaults.HeadTimeout})
	}
	return upstream.New(upstream.Options{
		Listed:      listed,
		HeadTimeout: cfg.Defaults.HeadTimeout,
		Own:         ownAddresses(listeners),
		UserAgent:   "tarn/" + version,
		Observe:     observe,
		Logger:      log,
		RootCAs:     roots,
		Proxies:     environment,

		AllowViaProxy: cfg.AllowViaProxy,
	})
}

// newPlugins are the kubelet's plugins; what is wrong with them is told here, and may be
// mounted later.
func newPlugins(k KubeletPlugins, log *zap.Logger) *upstream.KubeletPlugins {
	plugins := upstream.NewKubeletPlugins(k.Config, k.BinDir)
	if err := plugins.Check(); err != nil {
		log.Error("the kubelet's plugins cannot be asked as they are", zap.String("config", k.Config), zap.Error(err))
	}
	for _, name := range plugins.Skipped() {
		log.Warn("a plugin of the kubelet's is never asked: it requires the token of a pod's service account, and tarn is no pod's",
			zap.String("config", k.Config), zap.String("provider", name))
	}
	return plugins
}

// warnOfKubelet says what a kubelet makes of what everybody may have, which outlives the
// setting. tarn cannot know whether there is one.
func warnOfKubelet(u Upstream, log *zap.Logger) {
	stale := u.StaleIfError > 0 && u.StaleFor == "node"
	if len(u.Share) == 0 && !stale {
		return
	}
	log.Warn("on Kubernetes since 1.35, what share: and stale_for: node let pods have without a credential of their own stays open to every pod of the node as long as the image is there, also after they are taken out",
		zap.String("upstream", u.Name), zap.Strings("share", u.Share), zap.Bool("stale_for_node", stale))
}

// proxyOptions are what the configuration says of the proxy itself.
func proxyOptions(cfg Config) (proxy.Options, error) {
	rules, err := newRules(cfg)
	if err != nil {
		return proxy.Options{}, err
	}
	defaultUpstream, err := upstream.ParseName(cfg.DefaultUpstream)
	return proxy.Options{
		DefaultUpstream: defaultUpstream,
		ListedOnly:      cfg.Allow == "listed",
		Names:           cfg.Names,
		Prefetch:        map[string]proxy.Prefetch{"config": proxy.PrefetchConfig, "layers": proxy.PrefetchLayers}[cfg.Prefetch],
		AccessLog:       map[string]proxy.AccessLog{"upstream": proxy.LogUpstream, "errors": proxy.LogErrors}[cfg.AccessLog],
		Rules:           rules,
		Defaults:        rulesOf(cfg.Defaults.UpstreamDefaults),
	}, err
}

// newRules are who may have what from each listed registry.
func newRules(cfg Config) (map[upstream.Name]proxy.Rules, error) {
	rules := make(map[upstream.Name]proxy.Rules)
	for _, u := range cfg.Upstreams {
		name, err := upstream.ParseName(u.Name)
		if err != nil {
			return nil, fmt.Errorf("upstream %s: %w", u.Name, err)
		}
		if len(u.Share) > 0 && !u.Credentials.given() {
			return nil, fmt.Errorf("upstream %s: share: repositories are shared with the node's credentials; set credentials: too", u.Name)
		}
		r := rulesOf(u.UpstreamDefaults)
		r.TokenBroker, r.Share = u.TokenBroker, u.Share
		rules[name] = r
	}
	return rules, nil
}

func rulesOf(d UpstreamDefaults) proxy.Rules {
	return proxy.Rules{
		GrantTTL:      d.GrantTTL,
		MembershipTTL: d.MembershipTTL,
		StaleIfError:  d.StaleIfError,
		StaleForNode:  d.StaleFor == "node",
		Parallel:      d.Parallel,
	}
}

func ownAddresses(listeners []net.Listener) (own []netip.AddrPort) {
	for _, l := range listeners {
		if l == nil {
			continue
		}
		if tcp, ok := l.Addr().(*net.TCPAddr); ok {
			own = append(own, tcp.AddrPort())
		}
	}
	return own
}

// upstreamConfig is one listed registry; roots are believed where it names none of its own.
func upstreamConfig(u Upstream, defaults Defaults, roots *x509.CertPool) (c upstream.Config, err error) {
	if c.Name, err = upstream.ParseName(u.Name); err != nil {
		return c, err
	}
	for _, e := range u.Endpoints {
		parsed, err := url.Parse(e.URL)
		if err != nil {
			return c, fmt.Errorf("endpoint %q: not a URL", e.URL)
		}
		c.Endpoints = append(c.Endpoints, upstream.Endpoint{URL: parsed, Trusted: e.Trusted})
	}
	c.HeadTimeout = cmp.Or(u.HeadTimeout, defaults.HeadTimeout)
	if u.Realm != "" {
		if c.Realm, err = url.Parse(u.Realm); err != nil {
			return c, errors.New("realm: not a URL")
		}
	}
	if u.Credentials.DockerConfig != "" {
		c.Credentials = upstream.NewDockerConfig(u.Credentials.DockerConfig, c.Name)
	}
	if u.CAFile == "" && u.CertFile == "" && u.KeyFile == "" && !u.InsecureSkipVerify {
		return c, nil
	}
	c.TLS = &tls.Config{InsecureSkipVerify: u.InsecureSkipVerify, RootCAs: roots}
	if u.CAFile != "" {
		c.TLS.RootCAs = x509.NewCertPool()
		if err := appendCertificates(c.TLS.RootCAs, u.CAFile); err != nil {
			return c, err
		}
		// Its storage may be the same house's, or a cloud's.
		if c.ForeignRoots, err = withRoots(defaults.CAFile, u.CAFile); err != nil {
			return c, err
		}
	}
	if u.CertFile != "" || u.KeyFile != "" {
		cert, err := readKeyPair(u.CertFile, u.KeyFile)
		if err != nil {
			return c, fmt.Errorf("cert_file, key_file: %w", err)
		}
		c.TLS.Certificates = []tls.Certificate{cert}
	}
	return c, nil
}
