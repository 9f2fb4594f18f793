// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"
)

// TestAPasswordOfABasicRegistryComesBackSealed: a client that learns from /v2/
// alone pulls from a registry that takes passwords itself, with its own.
func TestAPasswordOfABasicRegistryComesBackSealed(t *testing.T) {
	t.Parallel()
	r, other := registrytest.New(t), registrytest.New(t)
	for _, reg := range []*registrytest.Registry{r, other} {
		reg.Access = registrytest.NewAccess(t, "Basic")
		reg.Access.Allow("team/secret", "a")
		reg.Access.Allow("open/app", "")
	}
	layer := random(1, 100_000)
	img := r.Image("team/secret", "v1", layer)
	rules := DefaultRules()
	rules.TokenBroker = true
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r, "other.test": other}, rules: &rules})
	a := d.get("/v2/").must(t, 401)
	if !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Bearer realm=") {
		t.Fatalf("%v", a.header)
	}
	manifest := "/v2/lab.test/team/secret/manifests/v1"
	scope := "scope=repository:lab.test/team/secret:pull"
	password := registrytest.Basic("a", registrytest.Password("a"))
	token, _ := d.token(t, scope, "Authorization", password)
	again, _ := d.token(t, scope, "Authorization", password)
	if token == again || !strings.HasPrefix(token, sealedPrefix) || strings.Contains(token, strings.TrimPrefix(password, "Basic ")) {
		t.Errorf("%q, and then %q", token, again)
	}
	d.get(manifest, "Authorization", "Bearer "+token).mustBe(t, img.Body)
	d.get("/v2/lab.test/team/secret/blobs/"+img.Layers[0].String(), "Authorization", "bearer "+again).mustBe(t, layer)
	d.stored(cache.ListedDomain, img.Layers[0])
	for _, e := range r.Exchanges() {
		if e.Authorization != "" && e.Authorization != password {
			t.Errorf("the registry saw %q", e.Authorization)
		}
	}
	// To the rights it is the password: whoever shows that is the same.
	r.Reset()
	d.get("/v2/lab.test/team/secret/blobs/"+img.Layers[0].String(), "Authorization", password).mustBe(t, layer)
	if n := len(r.Exchanges()); n != 0 {
		t.Errorf("%d questions", n)
	}
	// Wrong ones are the registry's to refuse.
	wrong, _ := d.token(t, scope, "Authorization", registrytest.Basic("a", "canary-guess"))
	d.get(manifest, "Authorization", "Bearer "+wrong).must(t, 401)

	other.Reset()
	r.Reset()
	refused := func(what, path, authorization string) {
		t.Helper()
		a := d.get(path, "Authorization", authorization).must(t, 401)
		if !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Bearer realm=\""+d.URL) {
			t.Errorf("%s: %v", what, a.header)
		}
	}
	refused("for another registry", "/v2/other.test/team/secret/manifests/v1", "Bearer "+token)
	flipped := token[:len(token)-3] + "AAA"
	refused("changed", manifest, "Bearer "+flipped)
	refused("cut", manifest, "Bearer "+token[:30])
	refused("none", manifest, "Bearer "+sealedPrefix)
	s := d.options
	d.advance(sealedLife)
	refused("too old", manifest, "Bearer "+token)
	d.stop()
	d = start(t, s)
	refused("of an earlier process", manifest, "Bearer "+token)
	for _, reg := range []*registrytest.Registry{r, other} {
		if seen := reg.Exchanges(); len(seen) != 0 {
			t.Errorf("a registry saw %v", seen)
		}
	}
	// Without a credential there is nothing to seal.
	if token, _ := d.token(t, "scope=repository:lab.test/open/app:pull"); token != markerToken {
		t.Errorf("%q", token)
	}
	if a := d.do(http.MethodHead, "/v2/lab.test/open/app/manifests/v1", "Authorization", "Bearer "+markerToken); a.status != 404 {
		t.Errorf("%d", a.status)
	}
}

func FuzzUnseal(f *testing.F) {
	s, now := newSealer(), time.Unix(1_800_000_000, 0)
	f.Add("Bearer " + s.seal("ghcr.io", "Basic YTpi", now).Value)
	f.Add("Bearer " + sealedPrefix)
	f.Add("bearer tarn-sealed.AAAA")
	f.Add("Basic YTpi")
	f.Fuzz(func(t *testing.T, header string) {
		opened, ok := s.open("ghcr.io", header, now)
		if ok && opened != header && opened != "Basic YTpi" {
			t.Fatalf("%q: %q", header, opened)
		}
		if ok && strings.Contains(opened, " "+sealedPrefix) && strings.EqualFold(strings.SplitN(opened, " ", 2)[0], "bearer") {
			t.Fatalf("%q is passed on", header)
		}
	})
}
