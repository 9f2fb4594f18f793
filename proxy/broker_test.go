// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"tarn/internal/registrytest"
)

// brokered starts a private Bearer registry whose broker is on, one whose broker
// is off, and a stranger.
func brokered(t *testing.T) (r, off, evil *registrytest.Registry, d *tarnd) {
	t.Helper()
	r, off, evil = registrytest.New(t), registrytest.New(t), registrytest.NewTLS(t)
	for _, reg := range []*registrytest.Registry{r, off} {
		reg.Access = registrytest.NewAccess(t, "Bearer")
		reg.Access.Allow("team/secret", "a")
		reg.Access.Allow("open/app", "")
	}
	roots := x509.NewCertPool()
	roots.AddCert(evil.Certificate())
	rules := DefaultRules()
	rules.TokenBroker = true
	d = start(t, setup{
		listed:  map[string]*registrytest.Registry{lab: r},
		urls:    map[string]string{"off.test": off.URL},
		hosts:   map[string]string{"example.com": publicAddress},
		routes:  map[string]string{publicAddress + ":443": evil.Address()},
		roots:   roots,
		rules:   &rules,
		without: []string{"off.test"},
	})
	return r, off, evil, d
}

// token asks tarn's /token.
func (d *tarnd) token(t testing.TB, query string, headers ...string) (string, answer) {
	t.Helper()
	a := d.get("/token?"+query, headers...)
	var body struct {
		Token     string `json:"token"`
		ExpiresIn int    `json:"expires_in"`
	}
	if a.status == 200 {
		if err := json.Unmarshal(a.body, &body); err != nil || body.Token == "" || body.ExpiresIn <= 0 {
			t.Fatalf("%s: %v", a.body, err)
		}
		a.mustSay(t, "Cache-Control", "no-store")
	}
	return body.Token, a
}

func TestTheBrokerSendsClientsToItselfAndTheirSecretsToOneRealm(t *testing.T) {
	t.Parallel()
	r, _, _, d := brokered(t)
	img := r.Image("team/secret", "v1", random(1, 100_000))
	host := strings.TrimPrefix(d.URL, "http://")
	for path, realm := range map[string]string{"/v2/": "/token", "/v2": "/token", "/lab.test/v2/": "/lab.test/token"} {
		d.get(path).must(t, 401).mustSay(t, "WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s%s",service="tarn"`, host, realm))
		d.get(path, "Authorization", registrytest.Basic("a", registrytest.Password("a"))).must(t, 401)
		d.get(path, "Authorization", "Bearer x").must(t, 200)
	}
	d.get("/off.test/v2/").must(t, 200)
	d.get("/v2/?ns=lab.test").must(t, 200) // containerd's kind is shown the registry's own challenge

	basic := []string{"Authorization", registrytest.Basic("a", registrytest.Password("a"))}
	scope := "service=tarn&account=a&scope=" + url.QueryEscape("repository:lab.test/team/secret:pull")
	token, a := d.token(t, scope, basic...)
	a.must(t, 200)
	seen := r.Access.Exchanges()
	last := seen[len(seen)-1]
	if last.Authorization != basic[1] || last.Scope != "repository:team/secret:pull" {
		t.Errorf("the token service saw %+v", last)
	}
	bearer := []string{"Authorization", "Bearer " + token}
	for _, path := range []string{"/v2/lab.test/team/secret/manifests/v1", "/lab.test/v2/team/secret/manifests/v1"} {
		d.get(path, bearer...).mustBe(t, img.Body)
	}
	d.get("/v2/lab.test/team/secret/blobs/"+img.Layers[0].String(), bearer...).must(t, 200)

	// The form of OAuth 2.
	form := url.Values{"grant_type": {"password"}, "username": {"a"}, "password": {registrytest.Password("a")}, "scope": {"repository:lab.test/team/secret:pull"}}
	resp, err := http.PostForm(d.URL+"/token", form)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("POST: %s", resp.Status)
	}
	form = url.Values{"grant_type": {"refresh_token"}, "refresh_token": {"canary-identity-of-a"}, "scope": {"repository:lab.test/team/secret:pull"}}
	if resp, err = http.PostForm(d.URL+"/token", form); err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("POST of a refresh token: %s", resp.Status)
	}

	// Wrong ones are refused, there and here.
	_, a = d.token(t, scope, "Authorization", registrytest.Basic("a", "canary-guess"))
	a.must(t, 401)
	token, _ = d.token(t, scope, "Authorization", registrytest.Basic("b", registrytest.Password("b")))
	d.get("/v2/lab.test/team/secret/manifests/v1", "Authorization", "Bearer "+token).must(t, 401)
}

func TestTheBrokersMarkerMeansAnonymous(t *testing.T) {
	t.Parallel()
	r, off, _, d := brokered(t)
	for name, reg := range map[string]*registrytest.Registry{lab: r, "off.test": off} {
		open := reg.Image("open/app", "v1", random(1, 100_000))
		reg.Image("team/secret", "v1")
		token, a := d.token(t, "scope="+url.QueryEscape("repository:"+name+"/open/app:pull"))
		a.must(t, 200)
		if token != markerToken {
			t.Errorf("%s: token %q", name, token)
		}
		for _, scheme := range []string{"Bearer ", "bearer "} {
			d.get("/v2/"+name+"/open/app/manifests/v1", "Authorization", scheme+token).mustBe(t, open.Body)
			d.get("/v2/"+name+"/team/secret/manifests/v1", "Authorization", scheme+token).must(t, 401)
		}
		for _, e := range reg.Exchanges() {
			if strings.Contains(e.Authorization, markerToken) {
				t.Errorf("%s saw the marker", name)
			}
		}
	}
	// Without a scope, too: what clients ask that have nothing.
	token, a := d.token(t, "service=tarn")
	if a.must(t, 200); token != markerToken {
		t.Errorf("token %q", token)
	}
}

func TestTheBrokerRefusesWhatIsNotOnePullFromOneRegistry(t *testing.T) {
	t.Parallel()
	r, off, evil, d := brokered(t)
	basic := []string{"Authorization", registrytest.Basic("a", registrytest.Password("a"))}
	for _, scopes := range [][]string{
		{"repository:lab.test/team/secret:pull", "repository:off.test/team/secret:pull"},
		{"repository:lab.test/team/secret:pull", "repository:second.test/team/secret:pull"},
		{"repository:second.test/team/secret:pull repository:lab.test/team/secret:pull"},
		{"repository:lab.test/team/secret:pull repository:example.com/x:pull"},
		{"repository:lab.test/team/secret:pull", "repository:team/secret:pull"},
		{"repository:lab.test/team/secret:push"},
		{"repository:lab.test/team/secret:pull,push"},
		{"repository:lab.test/team/secret:*"},
		{"repository:lab.test/team/secret:"},
		{"repository:lab.test/team/secret"},
		{"registry:catalog:*"},
		{"repository(plugin):lab.test/team/secret:pull"},
		{"repository:lab.test/../secret:pull"},
		{"repository:lab.test/TEAM:pull"},
		{"repository:off.test/team/secret:pull"},
		{"repository:example.com/team/secret:pull"},
		{"repository:team/secret:pull"}, // docker.io
		{"pull"},
		{},
	} {
		query := url.Values{"service": {"tarn"}, "scope": scopes}
		a := d.get("/token?"+query.Encode(), basic...).must(t, 400)
		if !strings.Contains(string(a.body), `"message":"`) {
			t.Errorf("%v: %s", scopes, a.body)
		}
		form := url.Values{"grant_type": {"password"}, "username": {"a"}, "password": {registrytest.Password("a")}, "scope": {strings.Join(scopes, " ")}}
		resp, err := http.PostForm(d.URL+"/token", form)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 400 {
			t.Errorf("POST %v: %s", scopes, resp.Status)
		}
	}
	d.get("/token?scope=repository:lab.test/a:pull", "Authorization", "Bearer canary-token").must(t, 400)
	d.get("/token?scope=%zz").must(t, 400)
	d.do("PUT", "/token").must(t, 405)
	d.do("POST", "/token").must(t, 400)
	for _, reg := range []*registrytest.Registry{r, off} {
		if seen := reg.Access.Exchanges(); len(seen) != 0 {
			t.Errorf("a token service saw %+v", seen)
		}
	}
	if seen := evil.Exchanges(); len(seen) != 0 {
		t.Errorf("a stranger saw %+v", seen)
	}
}

func TestTheBrokerIsOffByDefault(t *testing.T) {
	t.Parallel()
	_, d := one(t)
	d.get("/v2/").must(t, 200)
	d.get("/lab.test/v2/").must(t, 200)
	d.get("/token").must(t, 404)
	d.do("POST", "/token").must(t, 404)
}

func TestTheBrokerShowsAPasswordToThePinnedRealmOnly(t *testing.T) {
	t.Parallel()
	thief := registrytest.NewAccess(t, "Bearer")
	basic := []string{"Authorization", registrytest.Basic("a", registrytest.Password("a"))}
	for _, realm := range []string{
		"http://lab.example/token",       // not https
		"https://auth.example.net/token", // another domain
		"https://127.0.0.2/token",        // another address
	} {
		r, _, _, d := brokered(t)
		r.Access.Challenge = func(string) string { return fmt.Sprintf(`Bearer realm=%q,service="lab"`, realm) }
		_, a := d.token(t, "scope=repository:lab.test/team/secret:pull", basic...)
		a.must(t, 502)
		if !strings.Contains(string(a.body), "realm:") {
			t.Errorf("%s: %s", realm, a.body)
		}
		if n := len(r.Access.Exchanges()); n != 0 {
			t.Errorf("%s: a token was asked for", realm)
		}
	}
	// A realm that redirects is not followed.
	r, _, _, d := brokered(t)
	r.Access.Service.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		http.Redirect(w, req, thief.Service.URL+"/token", http.StatusTemporaryRedirect)
	})
	_, a := d.token(t, "scope=repository:lab.test/team/secret:pull", basic...)
	a.must(t, 502)
	if n := len(thief.Exchanges()); n != 0 {
		t.Error("the thief was asked for a token")
	}
}

// TestASecretUnderTarnsAddressReachesNoStranger: the client keeps a secret for
// tarn's own address, and is talked into pulling from a stranger through it.
func TestASecretUnderTarnsAddressReachesNoStranger(t *testing.T) {
	t.Parallel()
	_, _, evil, d := brokered(t)
	basic := []string{"Authorization", registrytest.Basic("a", registrytest.Password("a"))}
	for _, challenge := range []string{`Basic realm="give me"`, `Bearer realm="https://example.com/token",service="evil"`} {
		evil.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			if strings.HasPrefix(req.URL.Path, "/token") {
				w.Write([]byte(`{"token":"x"}`))
				return true
			}
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(401)
			return true
		}
		for path, agent := range map[string]string{
			"/v2/example.com/x/manifests/v1":                "containerd/2.0.0",
			"/example.com/v2/x/manifests/v1":                "containerd/2.0.0",
			"/v2/example.com/x/manifests/v1?ns=example.com": "containerd/2.0.0",
			"/v2/x/manifests/v1?ns=example.com":             "buildkit/v0.17",
			"/v2/y/manifests/v1?ns=example.com":             "containerd/1.7.22+unknown", // BuildKit's, for layers
		} {
			for _, secret := range [][]string{nil, basic} {
				a := d.get(path, append([]string{"User-Agent", agent}, secret...)...).must(t, 403)
				if a.header.Get("WWW-Authenticate") != "" {
					t.Errorf("%s: challenge %q", path, a.header.Get("WWW-Authenticate"))
				}
			}
		}
	}
	for _, e := range evil.Exchanges() {
		if e.Authorization != "" && e.Authorization != "Bearer x" {
			t.Errorf("the stranger saw %q", e.Authorization)
		}
	}
}
