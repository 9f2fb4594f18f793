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

	"tarn/cache"
	"tarn/internal/registrytest"
	"tarn/rights"
	"tarn/upstream"
)

// withNode starts a private registry where "node" may pull everything, and a
// tarn that has node's password.
func withNode(t *testing.T, scheme string, share ...string) (r *registrytest.Registry, d *tarnd, config string) {
	t.Helper()
	r = registrytest.New(t)
	r.Access = registrytest.NewAccess(t, scheme)
	for _, repository := range []string{"private/app", "platform/base", "open/app"} {
		r.Access.Allow(repository, "node")
	}
	r.Access.Allow("private/app", "a")
	r.Access.Allow("open/app", "")
	config = filepath.Join(t.TempDir(), "config.json")
	writeConfig(t, config, fmt.Sprintf(`{"auths":{%q:{"username":"node","password":%q}}}`, lab, registrytest.Password("node")))
	rules := DefaultRules()
	rules.Share = share
	d = start(t, setup{
		listed: map[string]*registrytest.Registry{lab: r},
		rules:  &rules,
		configure: func(c *upstream.Config) {
			c.Credentials = upstream.NewDockerConfig(config, c.Name)
			c.Realm, _ = url.Parse(r.Access.Service.URL + "/token")
		},
	})
	return r, d, config
}

func writeConfig(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// asked are the requests of a user, by the credential or the token.
func asked(r *registrytest.Registry, user string) (n int) {
	for _, e := range r.Exchanges() {
		if strings.HasSuffix(e.Authorization, "-of-"+user) || e.Authorization == registrytest.Basic(user, registrytest.Password(user)) {
			n++
		}
	}
	return n
}

func TestTheNodesCredentialFetchesForWhoHasTheRegistrysYes(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"Basic", "Bearer"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			r, d, _ := withNode(t, scheme)
			layer := random(1, 200_000)
			img := r.Image("private/app", "v1", layer)
			blob := blobPath("private/app", img.Layers[0])

			// The node may have it; that lends nobody a right.
			for _, path := range []string{manifestPath("private/app", "v1"), blob} {
				d.get(path).must(t, 401)
				if a := d.get(path, r.Access.Login("private/app", "b")...); a.status != 401 && a.status != 403 {
					t.Errorf("b: %d", a.status)
				}
			}
			if n := asked(r, "node"); n != 0 {
				t.Fatalf("%d requests as the node for who has no right", n)
			}
			r.Reset()
			d.get(blob, r.Access.Login("private/app", "a")...).mustBe(t, layer)
			var question, get string
			for _, e := range r.Exchanges() {
				switch {
				case e.Range == "bytes=0-0":
					question = e.Authorization
				case strings.Contains(e.Path, "/blobs/") && e.Authorization != "":
					get = e.Authorization
				}
			}
			if !strings.HasSuffix(question, "-of-a") && question != registrytest.Basic("a", registrytest.Password("a")) {
				t.Errorf("the question was put with %q", question)
			}
			if !strings.HasSuffix(get, "-of-node") && get != registrytest.Basic("node", registrytest.Password("node")) {
				t.Errorf("the bytes were fetched with %q", get)
			}
			// Who sees what is what the client's own answer said.
			d.stored(cache.ListedDomain, img.Layers[0])
			d.advance(refusedFor)
			d.get(blob).must(t, 401)
		})
	}
}

func TestWhoOnlyFinishesIsNotLentTheNodesCredential(t *testing.T) {
	t.Parallel()
	r, d, _ := withNode(t, "Basic")
	layer := random(1, 200_000)
	img := r.Image("private/app", "v1", layer)
	blob := blobPath("private/app", img.Layers[0])
	auth := r.Access.Login("private/app", "a")
	d.get(blob, auth...).mustBe(t, layer)
	d.stored(cache.ListedDomain, img.Layers[0])
	r.Access.Revoke("private/app", "a")
	d.advance(time.Minute)
	// The 30 s have not begun for an answer that is still being sent.
	q := &request{upstream: lab, repository: "private/app", kind: upstream.Blob, digest: img.Layers[0], authorization: auth[1]}
	d.proxy.identify(q)
	defer d.proxy.rights.Begin(q.asker, q.object(q.digest), rights.Yes{Asked: d.proxy.now(), Proved: true}, 200_000)()
	d.get(blob, append(auth, "Range", "bytes=1000-")...).must(t, 206)
	// What is not here any more is a new question.
	eventually(t, "the flight has landed", func() bool { return d.cache.Stats().Flights == 0 })
	path := filepath.Join(d.options.dir, "blobs", "sha256", img.Layers[0].Encoded())
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	r.Reset()
	d.get(blob, append(auth, "Range", "bytes=1000-")...).must(t, 403)
	if n := asked(r, "node"); n != 0 {
		t.Errorf("%d requests as the node", n)
	}
}

func TestASharedRepositoryIsForEveryClient(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"Basic", "Bearer"} {
		r, d, _ := withNode(t, scheme, "platform/*")
		layer := random(1, 200_000)
		img := r.Image("platform/base", "v1", layer)
		r.Image("private/app", "v1")
		for _, auth := range [][]string{nil, {"Authorization", registrytest.Basic("b", "canary-whatever")}} {
			d.get(manifestPath("platform/base", "v1"), auth...).mustBe(t, img.Body)
			d.get(blobPath("platform/base", img.Layers[0]), auth...).mustBe(t, layer)
			d.head(blobPath("platform/base", img.Config), auth...).must(t, 200)
			d.get("/v2/platform/base/tags/list?ns=lab.test", auth...).must(t, 404) // the test registry has no lists
		}
		for _, e := range r.Exchanges() {
			if strings.Contains(e.Authorization, "whatever") || e.Authorization == registrytest.Basic("b", "canary-whatever") {
				t.Error("a client's credential went to a shared repository")
			}
		}
		d.get(manifestPath("private/app", "v1")).must(t, 401) // not shared
		// A registry that refuses the node does not send the client to log in.
		r.Access.Revoke("platform/base", "node")
		a := d.get(manifestPath("platform/base", "v1")).must(t, 403)
		if a.header.Get("WWW-Authenticate") != "" || !strings.Contains(string(a.body), "credentials:") {
			t.Errorf("%s: %v %s", scheme, a.header, a.body)
		}
	}
}

func TestABadConfigNamesItselfAndPublicPullsGoOn(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		"taken away later":     "",
		"no JSON":              `canary-secret`,
		"another JSON":         `["canary-secret"]`,
		"auths of a kind":      `{"auths":["canary-secret"]}`,
		"an auth of a kind":    `{"auths":{"lab.test":"canary-secret"}}`,
		"auth without a colon": `{"auths":{"lab.test":{"auth":"Y2FuYXJ5LXNlY3JldA=="}}}`,
		"auth not base64":      `{"auths":{"lab.test":{"auth":"canary-secret"}}}`,
		"missing":              "",
		"no such program":      `{"credHelpers":{"lab.test":"is-not-there"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, d, config := withNode(t, "Bearer", "platform/*")
			if strings.HasSuffix(name, "later") { // what was good a moment ago does not count
				r.Image("platform/base", "v1")
				d.get(manifestPath("platform/base", "v1")).must(t, 200)
			}
			writeConfig(t, config, content)
			if content == "" {
				os.Remove(config)
			}
			open := r.Image("open/app", "v1", random(1, 100_000))
			r.Image("platform/base", "v1")
			d.get(manifestPath("open/app", "v1")).mustBe(t, open.Body)
			d.get(blobPath("open/app", open.Layers[0])).must(t, 200)
			a := d.get(manifestPath("platform/base", "v1")).must(t, 502)
			want := config
			if strings.Contains(content, "credHelpers") {
				want = "docker-credential-is-not-there"
			}
			if !strings.Contains(string(a.body), want) {
				t.Errorf("the answer does not name %s: %s", want, a.body)
			}
			if log := string(d.log.take()); !strings.Contains(log, "the node's credentials do not work") || !strings.Contains(log, want) {
				t.Errorf("the log does not name %s: %s", want, log)
			}
			// Mended, it works at once.
			writeConfig(t, config, fmt.Sprintf(`{"auths":{%q:{"username":"node","password":%q}}}`, lab, registrytest.Password("node")))
			d.get(manifestPath("platform/base", "v1")).must(t, 200)
		})
	}
}

func TestAPasswordThatWasReplacedIsNotShownAgain(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"Basic", "Bearer"} {
		r, d, config := withNode(t, scheme, "platform/*")
		img := r.Image("platform/base", "v1")
		d.get(manifestPath("platform/base", "v1")).mustBe(t, img.Body)
		r.Access.Allow("platform/base", "successor")
		writeConfig(t, config, fmt.Sprintf(`{"auths":{%q:{"username":"successor","password":%q}}}`, lab, registrytest.Password("successor")))
		r.Reset()
		d.get(manifestPath("platform/base", "v1")).mustBe(t, img.Body)
		if asked(r, "node") != 0 || asked(r, "successor") == 0 {
			t.Errorf("%s: %v", scheme, r.Exchanges())
		}
	}
}

func TestARealmElsewhereGetsNoCredentialOfTheNode(t *testing.T) {
	t.Parallel()
	r, d, _ := withNode(t, "Bearer", "platform/*")
	thief := registrytest.NewAccess(t, "Bearer")
	r.Image("open/app", "v1", random(1, 100_000))
	r.Image("platform/base", "v1")
	r.Access.Challenge = func(repository string) string {
		return fmt.Sprintf(`Bearer realm="%s/token",service="lab",scope="repository:%s:pull"`, thief.Service.URL, repository)
	}
	a := d.get(manifestPath("platform/base", "v1")).must(t, 502)
	if !strings.Contains(string(a.body), "realm:") {
		t.Errorf("%s", a.body)
	}
	d.get(manifestPath("open/app", "v1"))
	for _, e := range thief.Exchanges() {
		if e.Authorization != "" || strings.Contains(e.Form, "canary") {
			t.Errorf("the thief saw %+v", e)
		}
	}
}

func TestTheNodesSecretInItsOtherForms(t *testing.T) {
	t.Parallel()
	t.Run("an identity token is shown to the token service alone", func(t *testing.T) {
		t.Parallel()
		r, d, config := withNode(t, "Bearer", "platform/*")
		writeConfig(t, config, fmt.Sprintf(`{"auths":{%q:{"identitytoken":"canary-identity-of-node"}}}`, lab))
		img := r.Image("platform/base", "v1")
		d.get(manifestPath("platform/base", "v1")).mustBe(t, img.Body)
		seen := r.Access.Exchanges()
		if last := seen[len(seen)-1]; last.Method != "POST" || !strings.Contains(last.Form, "canary-identity-of-node") || last.Authorization != "" {
			t.Errorf("the token service saw %+v", last)
		}
	})
	t.Run("a registry token goes to the registry as it is", func(t *testing.T) {
		t.Parallel()
		r, d, config := withNode(t, "Bearer", "platform/*")
		token := strings.TrimPrefix(r.Access.Login("platform/base", "node")[1], "Bearer ")
		writeConfig(t, config, fmt.Sprintf(`{"auths":{%q:{"registrytoken":%q}}}`, lab, token))
		img := r.Image("platform/base", "v1")
		d.get(manifestPath("platform/base", "v1")).mustBe(t, img.Body)
		if n := len(r.Access.Exchanges()); n != 0 {
			t.Errorf("%d requests for a token", n)
		}
	})
	t.Run("a node that is refused leaves the client its own credential", func(t *testing.T) {
		t.Parallel()
		r, d, config := withNode(t, "Basic")
		writeConfig(t, config, fmt.Sprintf(`{"auths":{%q:{"username":"node","password":"canary-old"}}}`, lab))
		layer := random(1, 100_000)
		img := r.Image("private/app", "v1", layer)
		d.get(blobPath("private/app", img.Layers[0]), r.Access.Login("private/app", "a")...).mustBe(t, layer)
		if !strings.Contains(string(d.log.take()), "the node's credentials do not work") {
			t.Error("nothing in the log")
		}
	})
}

func TestTheNodesTokenIsRenewedBeforeItsEnd(t *testing.T) {
	t.Parallel()
	r, d, _ := withNode(t, "Bearer", "platform/*")
	r.Access.Life = 2 * time.Second // of which tarn uses one
	img := r.Image("platform/base", "v1")
	path := manifestPath("platform/base", "v1")
	d.get(path).mustBe(t, img.Body)
	r.Reset()
	tokens := len(r.Access.Exchanges())
	eventually(t, "another token", func() bool {
		d.get(path).mustBe(t, img.Body)
		return len(r.Access.Exchanges()) > tokens
	})
	for _, e := range r.Exchanges() {
		if e.Authorization == "" {
			t.Fatal("the registry had to ask for a token")
		}
	}
}

// TestTheNodesTroubleHasABoundInTheLog: clients name the images, and a plugin may work for
// one and not for the next.
func TestTheNodesTroubleHasABoundInTheLog(t *testing.T) {
	t.Parallel()
	_, d, _ := withNode(t, "Basic")
	for i := range 100 {
		d.proxy.noteNode(lab, fmt.Errorf("%w: %d", upstream.ErrCredentials, i))
		d.proxy.noteNode(lab, nil)
	}
	if n := strings.Count(string(d.log.take()), "the node's credentials"); n != maxNodeNotes {
		t.Errorf("%d lines", n)
	}
}
