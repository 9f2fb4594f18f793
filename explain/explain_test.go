// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"encoding/json"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"tarn/history"
	"tarn/internal/registrytest"
	"tarn/proxy"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
)

// story is something that happened to reg.corp/app, and what is to be said of it.
type story struct {
	name    string
	options options
	image   string // "" is reg.corp/app:v1
	happens func(*node, *pair)
	state   State
	served  bool
	// In the words, {m1} is the manifest of the first image, {m2} of the second, {l1}
	// and {l2} the layers of the first, {host} the registry's address.
	verdict, next, who string
	advice             string
	gone               []history.Cause // of what is missing
	// happened are the last entries, the latest first, as far as given.
	happened []string
}

// pair are two of app, which have their second layer in common.
type pair struct{ one, two registrytest.Image }

const (
	costsAHead  = "The next pull asks the registry with one HEAD what the tag means and who may have it, and has its bytes from this node's disk."
	costsAll    = "The next pull fetches all of it from reg.corp."
	forEachSays = "whoever reg.corp says yes to, asked with each client's own credential"
	toAnybody   = "reg.corp served it to who shows no credential"
	oneYes      = toAnybody + "; remembered now: 1 yes, the last anonymous"
)

var stories = []story{
	{
		name:    "never seen",
		happens: func(*node, *pair) {},
		state:   NeverSeen,
		verdict: "never seen: nothing of it is here, and nobody has fetched it here in the last 1 second, as far back as is remembered.",
		next:    costsAll,
		who:     "reg.corp answers for it to who shows no credential",
	},
	{
		name:     "only looked at",
		happens:  func(n *node, _ *pair) { n.get("HEAD", "/v2/app/manifests/v1"); n.forward(time.Hour) },
		state:    NeverSeen,
		verdict:  "never seen: nothing of it is here, and nobody has fetched it here in the last about an hour, as far back as is remembered.",
		next:     costsAll,
		who:      "reg.corp answers for it to who shows no credential",
		happened: []string{"containerd: v1 is {m1}; the registry was asked with HEAD; HEAD: nothing is fetched for that; it was never seen here"},
	},
	{
		name:    "current",
		happens: func(n *node, i *pair) { n.pull("app", "v1", i.one) },
		state:   Current, served: true,
		verdict: "current: at reg.corp v1 is {m1} now, and all of it is here (linux/amd64, 195.9KiB).",
		next:    costsAHead,
		who:     oneYes,
		happened: []string{
			"containerd: blob {l2}; the registry was asked with GET; 97.66KiB from the registry: it was never seen here",
			"containerd: blob {l1}; the registry was asked with GET; 97.66KiB from the registry: it was never seen here",
		},
	},
	{
		name: "pulled again",
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.forward(3 * time.Hour)
			n.pull("app", "v1", i.one)
			n.get("GET", "/v2/app/blobs/"+i.one.Layers[1].String())
			n.get("GET", "/v2/app/blobs/"+i.one.Layers[1].String())
		},
		state: Current, served: true,
		verdict: "current: at reg.corp v1 is {m1} now, and all of it is here (linux/amd64, 195.9KiB).",
		next:    costsAHead,
		who:     oneYes,
		happened: []string{
			"containerd: blob {l2}; the registry was not asked; 293KiB from the disk; 3 times",
			"containerd: blob {l1}; the registry was not asked; 97.66KiB from the disk",
		},
	},
	{
		name:    "by digest",
		image:   "reg.corp/app@{m1 whole}",
		happens: func(n *node, i *pair) { n.pull("app", "v1", i.one) },
		state:   Current, served: true,
		verdict: "current: at reg.corp {m1} is known now, and all of it is here (linux/amd64, 195.9KiB).",
		next:    "The next pull has its bytes from this node's disk; the registry is asked once whether this client may have them, and then not again for about a minute.",
		who:     oneYes,
	},
	{
		name:  "an index, pulled for this platform",
		image: corp + "/app:all",
		happens: func(n *node, i *pair) {
			body := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[`+
				`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":%d,"platform":{"os":"linux","architecture":%q}},`+
				`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":%d,"platform":{"os":"linux","architecture":"s390x"}},`+
				`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":7,"platform":{"os":"unknown","architecture":"unknown"}}]}`,
				i.one.Manifest, len(i.one.Body), runtime.GOARCH, i.two.Manifest, len(i.two.Body), digest.FromString("attestation"))
			all := n.registry.Manifest("app", "all", "application/vnd.oci.image.index.v1+json", []byte(body))
			n.get("GET", "/v2/app/manifests/all")
			n.stored(all)
			n.pull("app", "v1", i.one)
		},
		state: Current, served: true,
		verdict: "current: at reg.corp all is {here} now, and all of it is here (linux/" + runtime.GOARCH + ", {here bytes}).",
		next:    costsAHead,
		who:     oneYes,
	},
	{
		name: "fetched by tarn pull",
		happens: func(n *node, i *pair) {
			image, err := n.proxy.ParseImage(corp + "/app:v1")
			if err != nil {
				n.t.Fatal(err)
			}
			if _, err := n.proxy.Pull(n.t.Context(), image, proxy.PullOptions{}); err != nil {
				n.t.Fatal(err)
			}
			if sum := history.Total(n.history.Day()); sum.Requests != 0 {
				n.t.Errorf("in the sums of what was served there is %+v", sum)
			}
		},
		state: Current, served: true,
		verdict: "current: at reg.corp v1 is {m1} now, and all of it is here (linux/amd64, 195.9KiB).",
		next:    costsAHead,
		who:     oneYes,
		happened: []string{
			"", "", "",
			"tarn pull: manifest {m1}; the registry was asked with GET; 560B from the registry: it was never seen here",
		},
	},
	{
		name: "moved",
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.forward(3 * time.Hour)
			n.registry.Tag("app", "v1", i.two.Manifest)
		},
		state:   Moved,
		verdict: "moved: at reg.corp v1 means {m2} now; here is {m1}, which it meant 3 hours ago.",
		next:    "The next pull fetches what of the new one is not here; layers that both have are not fetched again.",
		who:     toAnybody,
	},
	{
		name: "moved, and pulled",
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.registry.Tag("app", "v1", i.two.Manifest)
			n.pull("app", "v1", i.two)
		},
		state: Current, served: true,
		verdict: "current: at reg.corp v1 is {m2} now, and all of it is here (linux/amd64, 195.9KiB).",
		next:    costsAHead,
		who:     oneYes,
		happened: []string{
			"containerd: blob {l2}; the registry was not asked; 97.66KiB from the disk",
			"", "",
			"containerd: manifest {m2}; the registry was asked with GET; 560B from the registry: the tag means something else than before",
			"containerd: v1 is {m2}, and was {m1}; the registry was asked with HEAD; HEAD: nothing is fetched for that; the tag means something else than before",
		},
	},
	{
		name: "moved back",
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.registry.Tag("app", "v1", i.two.Manifest)
			n.pull("app", "v1", i.two)
			n.registry.Tag("app", "v1", i.one.Manifest)
		},
		state: Current, served: true,
		verdict: "current: at reg.corp v1 is {m1} now, and all of it is here (linux/amd64, 195.9KiB).",
		next:    costsAHead,
		who:     oneYes,
	},
	{
		name: "partly evicted",
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.evict(i.one.Layers[0])
			n.history.Went(i.one.Layers[0], 100_000, history.Evicted) // as the store says it, which chooses by itself
			n.forward(3 * time.Hour)
		},
		state:   Partly,
		verdict: "partly here: 98.26KiB of 195.9KiB of {m1}; 1 of 4 objects was evicted to make room, the last 3 hours ago.",
		next:    "The next pull fetches 97.66KiB from reg.corp, and has the rest from this node's disk.",
		who:     toAnybody,
		gone:    []history.Cause{history.Evicted},
	},
	{
		name: "a layer removed by hand",
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.evict(i.one.Layers[0], i.one.Layers[1])
		},
		state:   Partly,
		verdict: "partly here: 616B of 195.9KiB of {m1}; 2 of 4 objects were removed by hand, the last just now.",
		next:    "The next pull fetches 195.3KiB from reg.corp, and has the rest from this node's disk.",
		who:     oneYes,
		gone:    []history.Cause{history.Removed, history.Removed},
	},
	{
		name: "removed, and fetched again",
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.evict(i.one.Layers[1])
			n.get("GET", "/v2/app/blobs/"+i.one.Layers[1].String())
			n.stored(i.one.Layers[1])
		},
		state: Current, served: true,
		verdict: "current: at reg.corp v1 is {m1} now, and all of it is here (linux/amd64, 195.9KiB).",
		next:    costsAHead,
		who:     oneYes,
		happened: []string{
			"containerd: blob {l2}; the registry was asked with GET; 97.66KiB from the registry: it was removed by hand",
			"{l2} went from the disk (97.66KiB): it was removed by hand",
		},
	},
	{
		name:    "only the manifest",
		happens: func(n *node, i *pair) { n.get("GET", "/v2/app/manifests/v1"); n.stored(i.one.Manifest) },
		state:   Partly,
		verdict: "partly here: 560B of 195.9KiB of {m1}; 3 of 4 objects were never here.",
		next:    "The next pull fetches 195.4KiB from reg.corp, and has the rest from this node's disk.",
		who:     oneYes,
		gone:    []history.Cause{history.NeverSeen, history.NeverSeen, history.NeverSeen},
	},
	{
		name:    "stale",
		advice:  "check that a registry answers at this host and port, and the scheme (http or https)",
		options: options{rules: proxy.Rules{GrantTTL: time.Minute, MembershipTTL: 24 * time.Hour, StaleIfError: 2 * time.Hour}},
		happens: func(n *node, i *pair) {
			n.pull("app", "v1", i.one)
			n.forward(time.Hour)
			n.away()
			n.get("GET", "/v2/app/manifests/v1")
		},
		state: Stale, served: true,
		verdict: "stale: reg.corp cannot be asked (upstream {host} cannot be reached: it ended the connection without an answer). All of {m1} is here (linux/amd64, 195.9KiB), as the registry confirmed about an hour ago.",
		next:    "Until {until} v1 is answered from here, marked as stale, to who was given it before; after that a pull fails here, and the client asks the registry itself.",
		who:     toAnybody,
		happened: []string{
			"containerd: v1 is {m1}; the registry was asked with HEAD; 560B from the disk, stale: the registry could not be asked (upstream {host} cannot be reached: it ended the connection without an answer)",
		},
	},
	{
		name:    "private without right",
		happens: func(n *node, _ *pair) { n.status(401); n.get("GET", "/v2/app/manifests/v1") },
		state:   Private,
		verdict: "private: reg.corp answers 401 to who shows no credential, so what v1 means now is known only to who may ask. Nothing of it is here.",
		next:    "The registry is asked with each client's own credential; whom it says yes to has from this node's disk what is here.",
		who:     forEachSays,
		happened: []string{
			"containerd: v1; the registry was asked with HEAD; answered with 401: the registry refused (upstream requires authentication)",
		},
	},
	{
		name: "private, and here for others",
		happens: func(n *node, i *pair) {
			n.hook(func(w http.ResponseWriter, r *http.Request) bool {
				if _, _, ok := r.BasicAuth(); !ok {
					w.Header().Set("WWW-Authenticate", `Basic realm="corp"`)
					w.WriteHeader(401)
				}
				return r.Header.Get("Authorization") == ""
			})
			credential := "Basic " + "YWxpY2U6Y2FuYXJ5"
			n.get("GET", "/v2/app/manifests/v1", "Authorization", credential)
			n.stored(i.one.Manifest)
			for _, d := range append([]digest.Digest{i.one.Config}, i.one.Layers...) {
				n.get("GET", "/v2/app/blobs/"+d.String(), "Authorization", credential)
				n.stored(d)
			}
		},
		state: Private, served: true,
		verdict: "private: reg.corp answers 401 to who shows no credential, so what v1 means now is known only to who may ask. All of {m1} is here (linux/amd64, 195.9KiB), as the registry confirmed just now.",
		next:    "The registry is asked with each client's own credential; whom it says yes to has from this node's disk what is here.",
		who:     forEachSays + "; remembered now: 1 yes, the last Basic",
	},
	{
		name:    "upstream down",
		advice:  "check that a registry answers at this host and port, and the scheme (http or https)",
		happens: func(n *node, i *pair) { n.pull("app", "v1", i.one); n.away(); n.get("HEAD", "/v2/app/manifests/v1") },
		state:   Away,
		verdict: "reg.corp cannot be asked: upstream {host} cannot be reached: it ended the connection without an answer. All of {m1} is here (linux/amd64, 195.9KiB), as the registry confirmed just now.",
		next:    "A pull by tag fails here, and the client asks the registry itself. stale_if_error, in tarn's configuration, has what was confirmed last served meanwhile.",
		who:     oneYes,
		happened: []string{
			"containerd: v1; the registry was asked with HEAD; answered with 502: the registry could not be asked (upstream {host} cannot be reached: it ended the connection without an answer)",
		},
	},
	{
		name:    "upstream broken",
		happens: func(n *node, _ *pair) { n.status(500) },
		state:   Away,
		verdict: "reg.corp cannot be asked: upstream answered 500. Nothing of it is here.",
		next:    "A pull by tag fails here, and the client asks the registry itself. stale_if_error, in tarn's configuration, has what was confirmed last served meanwhile.",
		who:     forEachSays,
	},
	{
		name:    "no such tag",
		image:   "reg.corp/app:v3",
		happens: func(n *node, _ *pair) { n.get("GET", "/v2/app/manifests/v3") },
		state:   Missing,
		verdict: "no such image: reg.corp says 404 for v3. Nothing is here by that name.",
		next:    "A pull is told the same: some registries say so also to who may not have it.",
		who:     forEachSays,
		happened: []string{
			"containerd: v3; the registry was asked with HEAD; answered with 404: the registry refused (upstream does not have it)",
		},
	},
	{
		name:    "not allowed",
		options: options{listedOnly: true},
		image:   "quay.io/org/app:v1",
		happens: func(*node, *pair) {},
		state:   NotAllowed,
		verdict: "not allowed: quay.io is not listed, and allow is set to listed.",
		next:    "tarn says that it does not know the image, and the client asks the registry itself.",
		who:     "whoever quay.io says yes to, asked with each client's own credential",
		advice:  "to have it served, add to tarn's configuration: upstreams: [{name: quay.io}]",
	},
	{
		name:    "pinned",
		happens: func(n *node, i *pair) { n.pull("app", "v1", i.one); n.pin("v1") },
		state:   Current, served: true,
		verdict: "current: at reg.corp v1 is {m1} now, and all of it is here (linux/amd64, 195.9KiB). It is pinned: it is not evicted.",
		next:    costsAHead,
		who:     oneYes,
	},
	{
		name:    "too large for the disk",
		options: options{maxSize: 1 << 20},
		image:   "reg.corp/app:large",
		happens: func(n *node, _ *pair) {
			large := n.registry.Image("app", "large", random(9, 3<<20))
			n.get("GET", "/v2/app/manifests/large")
			n.stored(large.Manifest)
			n.get("GET", "/v2/app/blobs/"+large.Layers[0].String())
		},
		state:   Partly,
		verdict: "partly here: 404B of 3MiB of {large}; 2 of 3 objects were never here.",
		next:    "The next pull fetches 3MiB from reg.corp, and has the rest from this node's disk.",
		who:     oneYes,
		gone:    []history.Cause{history.NeverSeen, history.NeverSeen},
		happened: []string{
			"containerd: blob {large layer}; the registry was asked with GET; 3MiB from the registry: it could not be stored (no room: 3211264 bytes are more than max_size, 1048576)",
		},
	},
	{
		name: "the registry limits requests",
		happens: func(n *node, i *pair) {
			n.answer(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(429) })
			n.get("GET", "/v2/app/manifests/v1")
		},
		state:   Away,
		verdict: "reg.corp cannot be asked: upstream limits the rate of requests. Nothing of it is here.",
		next:    "A pull by tag fails here, and the client asks the registry itself. stale_if_error, in tarn's configuration, has what was confirmed last served meanwhile.",
		who:     forEachSays,
		happened: []string{
			"containerd: v1; the registry was asked with HEAD; answered with 503: the registry limits requests (upstream limits the rate of requests)",
		},
	},
	{
		name: "a layer with other bytes",
		happens: func(n *node, i *pair) {
			n.get("GET", "/v2/app/manifests/v1")
			n.stored(i.one.Manifest)
			n.answer(func(w http.ResponseWriter, _ *http.Request) { w.Write(random(99, 100)) })
			n.get("GET", "/v2/app/blobs/"+i.one.Layers[0].String())
			n.answersAgain()
		},
		state:   Partly,
		verdict: "partly here: 560B of 195.9KiB of {m1}; 3 of 4 objects were never here.",
		next:    "The next pull fetches 195.4KiB from reg.corp, and has the rest from this node's disk.",
		who:     oneYes,
		gone:    []history.Cause{history.NeverSeen, history.NeverSeen, history.NeverSeen},
		happened: []string{
			"containerd: blob {l1}; the registry was asked with GET; answered with 502: what came was not what the digest says, or broke off (upstream sent a body that is not what its digest says)",
		},
	},
}

func TestInAPersonsWords(t *testing.T) {
	for _, s := range slices.Concat(stories, sloppy) {
		t.Run(s.name, func(t *testing.T) {
			if s.options.rules.GrantTTL == 0 {
				s.options.rules = usual
			}
			n := start(t, s.options)
			common := random(2, 100_000)
			i := &pair{one: n.registry.Image("app", "v1", random(1, 100_000), common), two: n.registry.Image("app", "v2", random(3, 100_000), common)}
			if s.happens(n, i); s.image == "" {
				s.image = corp + "/app:v1"
			}
			x := n.explain(strings.ReplaceAll(s.image, "{m1 whole}", i.one.Manifest.String()))
			large := digest.FromBytes(random(9, 3<<20))
			words := strings.NewReplacer("{m1}", short(i.one.Manifest), "{m2}", short(i.two.Manifest), "{l1}", short(i.one.Layers[0]), "{l2}", short(i.one.Layers[1]),
				"{host}", n.address(), "{here}", short(x.Here.Digest), "{here bytes}", units.BytesSize(float64(x.Here.HereBytes)), "{until}", x.StaleUntil.Local().Format(time.DateTime), "{large layer}", short(large), "{large}", short(x.Here.Digest))
			is := func(what, got, want string) {
				if want = words.Replace(want); got != want {
					t.Errorf("%s:\n got %s\nwant %s", what, got, want)
				}
			}
			is("state", string(x.State), string(s.state))
			is("served", fmt.Sprint(x.FromHere), fmt.Sprint(s.served))
			is("verdict", x.Verdict, s.verdict)
			is("next", x.Next, s.next)
			is("who", x.Who, s.who)
			is("advice", x.Advice, s.advice)
			var gone []history.Cause
			for _, g := range x.Here.Missing {
				gone = append(gone, g.Cause)
			}
			is("missing", fmt.Sprint(gone), fmt.Sprint(s.gone))
			for k, want := range s.happened {
				switch {
				case k >= len(x.Happened):
					t.Errorf("only %d things happened", len(x.Happened))
				case want != "":
					is(fmt.Sprint("happened ", k), x.Happened[k].Words, want)
				}
			}
			text, err := json.Marshal(x)
			if err != nil || strings.Contains(string(text), "YWxpY2U6Y2FuYXJ5") || strings.Contains(string(text), "canary") {
				t.Errorf("%v, %s", err, text)
			}
		})
	}
}

func TestOfVeryManyObjectsSomeAreLookedAt(t *testing.T) {
	n := start(t, options{rules: usual})
	layers := make([][]byte, maxGaps+20)
	for i := range layers {
		layers[i] = random(uint64(i), 100)
	}
	img := n.registry.Image("app", "v1", layers...)
	n.get("GET", "/v2/app/manifests/v1")
	n.stored(img.Manifest)
	x := n.explain(corp + "/app:v1")
	if len(x.Here.Missing) != maxGaps || !strings.Contains(x.Verdict, "; at least 100 of 122 objects were never here.") {
		t.Errorf("%d: %s", len(x.Here.Missing), x.Verdict)
	}
}

func TestBeingFetched(t *testing.T) {
	n := start(t, options{rules: usual})
	img := n.registry.Image("app", "v1", random(1, 3<<20))
	n.get("GET", "/v2/app/manifests/v1")
	n.stored(img.Manifest)
	half, end := make(chan struct{}), make(chan struct{})
	n.hook(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, img.Layers[0].String()) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(3<<20))
		w.Header().Set("Docker-Content-Digest", img.Layers[0].String())
		w.Write(random(1, 3<<20)[:1<<20])
		http.NewResponseController(w).Flush()
		close(half)
		<-end
		w.Write(random(1, 3<<20)[1<<20:])
		return true
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.get("GET", "/v2/app/blobs/"+img.Layers[0].String())
	}()
	<-half
	x := n.explain(corp + "/app:v1")
	if x.State != Fetching || x.FromHere || x.Verdict != "being fetched: 404B of 3MiB are here, and more is on its way from reg.corp." {
		t.Errorf("%s, %v: %s", x.State, x.FromHere, x.Verdict)
	}
	close(end)
	<-done
}
