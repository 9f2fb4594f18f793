// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"fmt"
	"net/url"
	"strings"

	"tarn/internal/probe"
)

// PublicRegistries are those that most images come from: what there are settings for
// where nobody has named any.
var PublicRegistries = []string{"docker.io", "quay.io", "ghcr.io", "registry.k8s.io", "gcr.io", "public.ecr.aws", "mcr.microsoft.com"}

// RegistriesConf is a drop-in for podman, buildah, skopeo and CRI-O
// (containers-registries.conf.d(5)): one table for each registry, since they have none
// for all, and one for the probe.
func RegistriesConf(mirror string, registries []string) (string, error) {
	if err := (Mirror{URL: mirror}).check(); err != nil {
		return "", err
	}
	u, err := url.Parse(mirror)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("# Written by tarn hosts install --format registries.conf, for /etc/containers/registries.conf.d/50-tarn.conf.\n" +
		"# Ask tarn first. While it does not answer, the registry itself is asked.\n")
	for _, name := range append([]string{probe.Registry}, registries...) {
		r, err := parseRegistry(name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "\n[[registry]]\nprefix = %s\nlocation = %s\n", quote(r.host), quote(r.host))
		if strings.HasPrefix(r.url, "http://") {
			b.WriteString("insecure = true\n")
		}
		// A port cannot be written in a path.
		fmt.Fprintf(&b, "[[registry.mirror]]\nlocation = %s\n", quote(u.Host+"/"+strings.Replace(r.host, ":", "__", 1)))
		if u.Scheme == "http" {
			b.WriteString("insecure = true\n")
		}
	}
	return b.String(), nil
}
