// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"tarn/upstream"

	"go.uber.org/zap"
	"golang.org/x/net/http/httpproxy"
)

// maxCredentialsBytes bounds a file with a user and a password.
const maxCredentialsBytes = 4 << 10

// environmentProxies are what HTTPS_PROXY, HTTP_PROXY and NO_PROXY say, in large
// letters or small; with neither of the first two, only whom to reach without.
func environmentProxies() (*httpproxy.Config, error) {
	c := httpproxy.FromEnvironment()
	for name, text := range map[string]string{"HTTPS_PROXY": c.HTTPSProxy, "HTTP_PROXY": c.HTTPProxy} {
		if text == "" {
			continue
		}
		if _, err := upstream.CheckProxy(text); err != nil {
			return nil, fmt.Errorf("%s in the environment: %w", name, err)
		}
	}
	return c, nil
}

// config is this proxy for http and https alike, but for what noProxy names; nil
// where there is none.
func (p Proxy) config(noProxy string) (*httpproxy.Config, error) {
	if p.URL == "" {
		return nil, nil
	}
	u, err := upstream.CheckProxy(p.URL)
	if err != nil {
		return nil, fmt.Errorf("url: %w", err)
	}
	if p.CredentialsFile != "" {
		if u.User, err = readCredentials(p.CredentialsFile); err != nil {
			return nil, fmt.Errorf("credentials_file: %w", err)
		}
	}
	return &httpproxy.Config{HTTPProxy: u.String(), HTTPSProxy: u.String(), NoProxy: noProxy}, nil
}

// readCredentials reads USER:PASSWORD. Its errors never say what is in the file.
func readCredentials(path string) (*url.Userinfo, error) {
	data, err := readSettings(path)
	if err != nil {
		return nil, err
	}
	user, password, ok := strings.Cut(strings.TrimRight(string(data), "\r\n"), ":")
	if !ok || user == "" || len(data) > maxCredentialsBytes || strings.ContainsAny(user+password, "\r\n\x00") {
		return nil, fmt.Errorf("%s is not one line USER:PASSWORD", path)
	}
	return url.UserPassword(user, password), nil
}

// logEgress tells where connections go out, without users and passwords.
func logEgress(log *zap.Logger, c *httpproxy.Config) {
	for name, text := range map[string]string{"HTTPS_PROXY": c.HTTPSProxy, "HTTP_PROXY": c.HTTPProxy} {
		if u, err := upstream.CheckProxy(text); text != "" && err == nil {
			log.Info("registries are reached by a proxy", zap.String("by", name), zap.String("proxy", u.Scheme+"://"+u.Host), zap.String("no_proxy", c.NoProxy))
		}
	}
}

// withRoots are the system's certificates and those of the files; nil, which means
// the system's, where there are none.
func withRoots(files ...string) (roots *x509.CertPool, err error) {
	for _, file := range files {
		if file == "" {
			continue
		}
		if roots == nil {
			if roots, err = x509.SystemCertPool(); err != nil {
				roots = x509.NewCertPool()
			}
		}
		if err := appendCertificates(roots, file); err != nil {
			return nil, err
		}
	}
	return roots, nil
}

func appendCertificates(pool *x509.CertPool, file string) error {
	pem, err := readSettings(file)
	if err != nil {
		return fmt.Errorf("ca_file: %w", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return fmt.Errorf("ca_file: %s has no certificate in PEM form", file)
	}
	return nil
}

func checkProxy(s string) error {
	if s == "" {
		return nil
	}
	u, err := upstream.CheckProxy(s)
	if err == nil && u.User != nil {
		return errors.New("the URL must not have a user or password: name a file with them as credentials_file")
	}
	return err
}
