// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// What somebody without any right can do to others: by what he asks, by what
// his registry answers, by what he makes tarn remember.

// TestAStrangersChallengeIsNotRelayedThroughASharedQuestion has a client that
// came by path wait for the answer to one that came in containerd's form.
func TestAStrangersChallengeIsNotRelayedThroughASharedQuestion(t *testing.T) {
	t.Parallel()
	for _, challenge := range []string{`Bearer realm="https://example.com/steal",service="x"`, `Basic realm="x"`} {
		_, evil, d := withEvil(t)
		bait := digest.FromString("bait")
		gate, asked := make(chan struct{}), make(chan struct{}, 10)
		evil.Hook = func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/blobs/") {
				asked <- struct{}{}
				<-gate
			}
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(401)
			return true
		}
		ns := make(chan answer, 1)
		go func() { ns <- d.get("/v2/x/blobs/" + bait.String() + evilNS) }()
		<-asked
		byPath := make(chan answer, 1)
		go func() { byPath <- d.get("/v2/example.com/x/blobs/" + bait.String()) }()
		eventually(t, "the second waits for the first", func() bool {
			stacks := make([]byte, 1<<20)
			return bytes.Contains(stacks[:runtime.Stack(stacks, true)], []byte("(*flight).answer"))
		})
		close(gate)
		if a := <-byPath; a.status != 403 || a.header.Get("WWW-Authenticate") != "" {
			t.Errorf("by path: %d %q", a.status, a.header["Www-Authenticate"])
		}
		if a := <-ns; a.status != 401 || !strings.HasPrefix(a.header.Get("WWW-Authenticate"), challenge[:5]) {
			t.Errorf("by ns: %d %q", a.status, a.header["Www-Authenticate"])
		}
	}
}

// TestASignOnPageIsNoYes has a registry that shows a page to whoever has no
// credential that it knows.
func TestASignOnPageIsNoYes(t *testing.T) {
	t.Parallel()
	for _, mediaType := range []string{"text/html; charset=utf-8", "application/json", "application/octet-stream"} {
		for _, elsewhere := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, elsewhere %v", mediaType, elsewhere), func(t *testing.T) {
				t.Parallel()
				const page = "<html>Sign in</html>"
				show := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Content-Type", mediaType)
					w.Header().Set("Content-Length", fmt.Sprint(len(page)))
					io.WriteString(w, page)
				})
				login := httptest.NewServer(show)
				defer login.Close()
				r, d := one(t)
				img := r.Image("private/app", "v1", random(1, 300_000))
				cold := r.Blob("private/app", random(2, 300_000))
				r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
					if u, _, _ := req.BasicAuth(); u == "a" {
						return false
					}
					if elsewhere {
						http.Redirect(w, req, login.URL+"/login", http.StatusFound)
					} else {
						show(w, req)
					}
					return true
				}
				a := []string{"Authorization", registrytest.Basic("a", "pw")}
				d.get(manifestPath("private/app", "v1"), a...).mustBe(t, img.Body)
				d.get(blobPath("private/app", img.Layers[0]), a...).must(t, 200)
				d.stored(cache.ListedDomain, img.Layers[0])
				for _, stranger := range [][]string{nil, {"Authorization", registrytest.Basic("b", "guess")}} {
					for range 2 {
						d.get(blobPath("private/app", cold), stranger...) // its yes is another thing's
						for _, path := range []string{blobPath("private/app", img.Layers[0]), manifestPath("private/app", img.Manifest.String())} {
							if got := d.get(path, stranger...); got.status != 502 {
								t.Errorf("GET %s: %d, %d bytes", path, got.status, len(got.body))
							}
							// What the registry says to a HEAD, whatever is here.
							got := d.head(path, stranger...)
							if path == blobPath("private/app", img.Layers[0]) {
								got.must(t, 200).mustSay(t, "Content-Length", fmt.Sprint(len(page))).mustSay(t, "Cache-Status", "tarn; fwd=uri-miss; fwd-status=200")
							} else if got.status != 502 {
								t.Errorf("HEAD %s: %d", path, got.status)
							}
						}
						// Nor by what the registry said of objects that nobody has.
						for _, nothing := range []string{"a", "b"} {
							d.head(blobPath("private/app", digest.FromString(nothing)), stranger...)
							d.get(blobPath("private/app", digest.FromString(nothing)), stranger...).must(t, 502)
							d.get(manifestPath("private/app", digest.FromString(nothing).String()), stranger...).must(t, 502)
						}
						d.get(blobPath("private/app", img.Layers[0]), append(stranger, "Range", "bytes=1-")...).must(t, 502)
					}
				}
				// And nothing of it stays.
				d.get(manifestPath("private/app", img.Manifest.String()), a...).mustBe(t, img.Body)
			})
		}
	}
}

// TestASecretForOneRegistryIsForNoneByDefault gives a client the URL of a
// mirror with a path: its scopes do not say which registry they are for.
func TestASecretForOneRegistryIsForNoneByDefault(t *testing.T) {
	t.Parallel()
	r, hub := registrytest.New(t), registrytest.New(t)
	for _, reg := range []*registrytest.Registry{r, hub} {
		reg.Access = registrytest.NewAccess(t, "Bearer")
	}
	r.Access.Allow("team/secret", "a")
	r.Image("team/secret", "v1", random(1, 1000))
	rules := DefaultRules()
	rules.TokenBroker = true
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r, "docker.io": hub}, rules: &rules})
	basic := []string{"Authorization", registrytest.Basic("a", registrytest.Password("a"))}
	scope := "?service=tarn&scope=" + url.QueryEscape("repository:team/secret:pull")
	d.get("/token"+scope, basic...).must(t, 400)
	if seen := hub.Access.Exchanges(); len(seen) > 0 {
		t.Errorf("docker.io's token service saw %+v", seen)
	}
	d.get("/lab.test/token"+scope, basic...).must(t, 200)
	seen := r.Access.Exchanges()
	if last := seen[len(seen)-1]; last.Authorization != basic[1] || last.Scope != "repository:team/secret:pull" {
		t.Errorf("lab.test's token service saw %+v", last)
	}
	d.get("/unheard.test/token"+scope, basic...).must(t, 400)
	d.get("/lab.test/x/token"+scope, basic...).must(t, 404)
}

// TestWhatAStrangerSendsIsNotKept fills what can be filled, and looks at the
// heap.
func TestWhatAStrangerSendsIsNotKept(t *testing.T) {
	const rounds = 300
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"challenges": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Basic realm="`+strings.Repeat("A", 50<<10)+`"`)
			w.WriteHeader(401)
		},
		"tokens": func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.URL.Path == "/token":
				fmt.Fprintf(w, `{"token":%q}`, strings.Repeat("A", 500<<10))
			case r.Header.Get("Authorization") == "":
				w.Header().Set("WWW-Authenticate", `Bearer realm="https://example.com/token"`)
				w.WriteHeader(401)
			default:
				w.WriteHeader(404)
			}
		},
		"tokens of a usual size": func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.URL.Path == "/token":
				fmt.Fprintf(w, `{"token":%q}`, strings.Repeat("A", 16<<10))
			case r.Header.Get("Authorization") == "":
				w.Header().Set("WWW-Authenticate", `Bearer realm="https://example.com/token"`)
				w.WriteHeader(401)
			default:
				w.WriteHeader(404)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, evil, d := withEvil(t)
			evil.Hook = func(w http.ResponseWriter, r *http.Request) bool {
				answer(w, r)
				return true
			}
			d.head(manifestPath("r", "v1"))
			before := heap()
			for i := range rounds {
				resp, err := http.Head(d.URL + fmt.Sprintf("/v2/r%d/manifests/v1%s", i, evilNS))
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
			}
			evil.Reset()
			if grown := int64(heap()) - int64(before); grown > 4<<20 {
				t.Errorf("%d KiB are kept after %d requests", grown>>10, rounds)
			}
		})
	}
}

// TestAListedRegistryThatHangsIsNobodyElsesAffair asks two listed registries
// for the same digest; who asked first has no right to anything.
func TestAListedRegistryThatHangsIsNobodyElsesAffair(t *testing.T) {
	t.Parallel()
	for _, fails := range []bool{false, true} {
		good, bad := registrytest.New(t), registrytest.New(t)
		d := start(t, setup{listed: map[string]*registrytest.Registry{lab: good, "bad.test": bad}})
		blob := random(1, 300_000)
		dgst := good.Blob("app", blob)
		asked, gate := make(chan struct{}), make(chan struct{})
		var once sync.Once
		bad.Hook = func(w http.ResponseWriter, r *http.Request) bool {
			once.Do(func() { close(asked) })
			<-gate
			w.WriteHeader(http.StatusBadGateway)
			return true
		}
		first := make(chan answer, 1)
		go func() { first <- d.get("/v2/any/blobs/" + dgst.String() + "?ns=bad.test") }()
		<-asked
		if fails {
			// While it is waited for, or afterwards: nobody else hears of it.
			go close(gate)
		}
		d.get(blobPath("app", dgst)).mustBe(t, blob)
		if !fails {
			close(gate)
		}
		if a := <-first; a.status != 502 {
			t.Errorf("who asked the one that fails: %d", a.status)
		}
	}
}

// TestABodyThatDoesNotComeIsAnError has the headers of a blob come, and behind
// them a byte now and then, so that no limit but the answer's own ends it.
func TestABodyThatDoesNotComeIsAnError(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}})
	blob := random(1, 30_000)
	dgst := r.Blob("app", blob)
	stop := make(chan struct{})
	defer close(stop)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		sized(w, len(blob))
		drip := time.NewTicker(time.Second)
		defer drip.Stop()
		for i := range 60 {
			w.Write(blob[i : i+1])
			w.(http.Flusher).Flush()
			select {
			case <-drip.C:
			case <-stop:
				return true
			}
		}
		return true
	}
	began := time.Now()
	a := d.get(blobPath("app", dgst))
	// The seconds are those of a busy machine under the race detector.
	if took := time.Since(began); a.status != 504 || took > headerDeadline+5*time.Second {
		t.Errorf("%d after %v", a.status, took)
	}
}

// TestHowOftenIsAskedDoesNotTellWhatIsCached where HEAD is refused.
func TestHowOftenIsAskedDoesNotTellWhatIsCached(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	secret := random(1, 300_000)
	cached, other := r.Blob("private/app", secret), r.Blob("private/app", random(2, 300_000))
	var n atomic.Int32
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		n.Add(1)
		if req.Method == "HEAD" {
			w.WriteHeader(405)
			return true
		}
		if u, _, _ := req.BasicAuth(); u == "a" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(401)
		return true
	}
	d.get(blobPath("private/app", cached), "Authorization", registrytest.Basic("a", "pw")).mustBe(t, secret)
	d.stored(cache.ListedDomain, cached)
	b := []string{"Authorization", registrytest.Basic("b", "pw")}
	d.get(blobPath("private/app", cached), b...).must(t, 401) // that HEAD is refused is found out once
	n.Store(0)
	for _, dgst := range []digest.Digest{cached, other} {
		d.get(blobPath("private/app", dgst), b...).must(t, 401)
		if asked := n.Swap(0); asked != 1 {
			t.Errorf("%d requests", asked)
		}
	}
}

// TestA403ToTarnsOwnTokenEndsADownload, although the client is told to come
// back with a credential of its own.
func TestA403ToTarnsOwnTokenEndsADownload(t *testing.T) {
	t.Parallel()
	r, d := one(t)
	r.Access = registrytest.NewAccess(t, "Bearer")
	r.Access.Allow("open/app", "")
	body := random(1, 300_000)
	dgst := r.Blob("open/app", body)
	d.get(blobPath("open/app", dgst)).mustBe(t, body)
	d.stored(cache.ListedDomain, dgst)
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool { w.WriteHeader(403); return true }
	if a := d.get(manifestPath("open/app", "v1")).must(t, 401); a.header.Get("WWW-Authenticate") == "" {
		t.Error("no way for a credential of the client's own")
	}
	d.get(blobPath("open/app", dgst), "Range", "bytes=1-").must(t, 401)
}

// TestAStrangersSizeTakesAQuarterOfTheRoom has a registry announce all that
// there is, and send nothing.
func TestAStrangersSizeTakesAQuarterOfTheRoom(t *testing.T) {
	t.Parallel()
	r, evil, d := withEvil(t)
	stop := make(chan struct{})
	defer close(stop)
	started := make(chan struct{}, 10)
	max := d.cache.Stats().MaxBytes
	evil.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		sized(w, int(max/2))
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		started <- struct{}{}
		<-stop
		return true
	}
	req, _ := http.NewRequestWithContext(t.Context(), "GET", d.URL+"/v2/x/blobs/"+digest.FromString("x").String()+evilNS, nil)
	go http.DefaultTransport.RoundTrip(req)
	<-started
	blob := random(1, 2_000_000)
	dgst := r.Blob("app", blob)
	d.get(blobPath("app", dgst)).mustBe(t, blob).mustSay(t, "Cache-Status", "tarn; fwd=uri-miss; fwd-status=200; stored")
	if s := d.cache.Stats(); s.PendingBytes > max/4 {
		t.Errorf("%d of %d bytes are claimed", s.PendingBytes, max)
	}
}

// TestAHelperIsNotRunForEachRefusal asks for names that the registry refuses
// to the node.
func TestAHelperIsNotRunForEachRefusal(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "runs")
	script := "#!/bin/sh\necho x >>" + log + "\necho '{\"ServerURL\":\"x\",\"Username\":\"node\",\"Secret\":\"wrong-password\"}'\n"
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-count"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	config := filepath.Join(dir, "config.json")
	writeConfig(t, config, fmt.Sprintf(`{"credHelpers":{%q:"count"}}`, lab))
	r := registrytest.New(t)
	r.Access = registrytest.NewAccess(t, "Basic")
	rules := DefaultRules()
	rules.Share = []string{"platform/*"}
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, rules: &rules,
		configure: func(c *upstream.Config) { c.Credentials = upstream.NewDockerConfig(config, c.Name) }})
	for i := range 20 {
		d.head(manifestPath(fmt.Sprintf("platform/x%d", i), "v1")).must(t, 403)
	}
	if runs, _ := os.ReadFile(log); len(runs) != len("x\n") {
		t.Errorf("it ran %d times", len(runs)/2)
	}
}

// TestWhoJoinedAndLeftIsNotAskedFor once the right has ended: its credential is
// not shown any more for those who stayed.
func TestWhoJoinedAndLeftIsNotAskedFor(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	rules := DefaultRules()
	rules.Parallel = 1
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, rules: &rules})
	body := random(1, 8<<20)
	path := blobPath("app", r.Blob("app", body))
	stays, leaves := registrytest.Basic("stays", "canary-of-stays"), registrytest.Basic("leaves", "canary-of-leaves")
	more := make(chan struct{})
	var ended atomic.Bool
	var late atomic.Int32
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		switch {
		case req.Method != "GET":
			return false
		case ended.Load():
			if req.Header.Get("Authorization") == leaves {
				late.Add(1)
			}
			w.WriteHeader(403)
			return true
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		w.Write(body[:2<<20])
		http.NewResponseController(w).Flush()
		<-more
		panic(http.ErrAbortHandler)
	}
	first := make(chan answer)
	go func() { first <- d.get(path, "Authorization", stays) }()
	eventually(t, "the flight is on its way", func() bool { return d.cache.Stats().Flights == 1 })
	ctx, leave := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "GET", d.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", leaves)
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(resp.Body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	leave()
	resp.Body.Close()
	eventually(t, "it has left", func() bool { return d.finished(path) == 1 })
	d.advance(finishFor + time.Minute)
	ended.Store(true)
	close(more)
	<-first
	if n := late.Load(); n != 0 {
		t.Errorf("%d questions with the credential of who left", n)
	}
}
