// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tarn/internal/registrytest"
	"tarn/upstream"
)

// withPlugin is withNode where the password is had of a plugin of the kubelet's.
func withPlugin(t *testing.T, scheme, script string, share ...string) (r *registrytest.Registry, d *tarnd, dir string) {
	t.Helper()
	r = registrytest.New(t)
	r.Access = registrytest.NewAccess(t, scheme)
	for _, repository := range []string{"private/app", "platform/base", "open/app"} {
		r.Access.Allow(repository, "node")
	}
	r.Access.Allow("private/app", "a")
	r.Access.Allow("open/app", "")
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "lab"), []byte("#!/bin/sh\necho >> \"${0%/*}/asked\"\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeConfig(t, filepath.Join(dir, "plugins.yaml"), fmt.Sprintf("{kind: CredentialProviderConfig, apiVersion: kubelet.config.k8s.io/v1, providers: [{name: lab, matchImages: [%q], defaultCacheDuration: 10m, apiVersion: credentialprovider.kubelet.k8s.io/v1}]}", lab))
	rules := DefaultRules()
	rules.Share = share
	d = start(t, setup{
		listed: map[string]*registrytest.Registry{lab: r},
		rules:  &rules,
		configure: func(c *upstream.Config) {
			c.Credentials = upstream.NewKubeletPlugins(filepath.Join(dir, "plugins.yaml"), dir)
			c.Realm, _ = url.Parse(r.Access.Service.URL + "/token")
		},
	})
	return r, d, dir
}

// nodesPassword is a plugin that gives the node's.
func nodesPassword() string {
	return fmt.Sprintf(`echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","auth":{%q:{"username":"node","password":%q}}}'`, lab, registrytest.Password("node"))
}

func TestAPluginsPasswordIsTheNodesByTheSameRules(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"Basic", "Bearer"} {
		r, d, dir := withPlugin(t, scheme, nodesPassword(), "platform/*")
		layer := random(1, 200_000)
		img := r.Image("private/app", "v1", layer)
		blob := blobPath("private/app", img.Layers[0])
		d.get(blob).must(t, 401)
		if n := asked(r, "node"); n != 0 {
			t.Errorf("%s: %d requests as the node for who has no right", scheme, n)
		}
		if _, err := os.Stat(filepath.Join(dir, "asked")); err == nil {
			t.Errorf("%s: the plugin ran for who has no right", scheme)
		}
		d.get(blob, r.Access.Login("private/app", "a")...).mustBe(t, layer)
		base := r.Image("platform/base", "v1")
		d.get(manifestPath("platform/base", "v1")).mustBe(t, base.Body)
		if asked(r, "node") < 2 {
			t.Errorf("%s: the node did not ask: %v", scheme, r.Exchanges())
		}
		if runs, _ := os.ReadFile(filepath.Join(dir, "asked")); string(runs) != "\n" {
			t.Errorf("%s: it ran %d times", scheme, len(runs))
		}
	}
}

func TestABrokenPluginIsNoClientsAffair(t *testing.T) {
	t.Parallel()
	r, d, dir := withPlugin(t, "Basic", `echo "words-of-stderr" >&2; exit 1`, "platform/*")
	open := r.Image("open/app", "v1", random(1, 100_000))
	layer := random(2, 100_000)
	private := r.Image("private/app", "v1", layer)
	r.Image("platform/base", "v1")
	d.get(manifestPath("open/app", "v1")).mustBe(t, open.Body)
	d.get(blobPath("open/app", open.Layers[0])).must(t, 200)
	d.get(blobPath("private/app", private.Layers[0]), r.Access.Login("private/app", "a")...).mustBe(t, layer)
	a := d.get(manifestPath("platform/base", "v1")).must(t, 502)
	if want := filepath.Join(dir, "lab") + " ended with exit status 1"; !strings.Contains(string(a.body), want) || strings.Contains(string(a.body), "words-of") {
		t.Errorf("the client is told %s", a.body)
	}
	if log := string(d.log.take()); !strings.Contains(log, "words-of-stderr") || strings.Count(log, "the node's credentials do not work") != 1 {
		t.Errorf("the log says %s", log)
	}
	h := d.proxy.upstreams.Health()[0]
	if !strings.Contains(h.Credentials, "exit status 1: words-of-stderr") {
		t.Errorf("the status says %q", h.Credentials)
	}
	if runs, _ := os.ReadFile(filepath.Join(dir, "asked")); string(runs) != "\n" {
		t.Errorf("it ran %d times", len(runs))
	}
}

// Not parallel: the one that hangs has the turn of all.
func TestAPluginThatHangsLeavesTimeForTheClientsOwn(t *testing.T) {
	r, d, _ := withPlugin(t, "Bearer", `sleep 1000`)
	layer := random(1, 100_000)
	img := r.Image("private/app", "v1", layer)
	open := r.Image("open/app", "v1", random(2, 100_000))
	d.get(blobPath("private/app", img.Layers[0]), r.Access.Login("private/app", "a")...).mustBe(t, layer)
	// Nobody waits any more for one that hangs.
	begun := time.Now()
	d.get(manifestPath("open/app", "v1")).mustBe(t, open.Body)
	d.get(blobPath("open/app", open.Layers[0])).must(t, 200)
	if took := time.Since(begun); took > 4*time.Second {
		t.Errorf("a public pull took %v", took)
	}
}
