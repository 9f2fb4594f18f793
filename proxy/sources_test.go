// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"
	"tarn/rights"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// fetcherFor is that of a client which brings a credential, "" for none.
func (d *tarnd) fetcherFor(repository, authorization string, dgst digest.Digest, y *rights.Yes) *fetcher {
	q := &request{method: "GET", kind: upstream.Blob, upstream: lab, repository: repository, digest: dgst, authorization: authorization}
	d.proxy.identify(q)
	return d.proxy.fetcher(q, dgst, y)
}

// list is what the next fetch would ask.
func (f *fetcher) list() []source {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sources(f.after(), f.first)
}

// breakOff has a body of that source break off.
func (f *fetcher) breakOff(s source, cause error) {
	body := &watchedBody{ReadCloser: io.NopCloser(iotest.ErrReader(cause)), fetcher: f, source: s}
	body.Read(make([]byte, 1))
}

func TestTheOrderOfTheSources(t *testing.T) {
	t.Parallel()
	const basic = "Basic c2VjcmV0"
	yes := &rights.Yes{Size: 5, Proved: true}
	finishing := &rights.Yes{Size: 5, Proved: true, Finishing: true}
	broken := errors.New("reset")
	for _, c := range []struct {
		name          string
		mirrors       []upstream.Endpoint // by host alone
		node          bool
		share         []string
		authorization string
		yes           *rights.Yes
		broken        []int // bodies of which entries of the list break off, one after the other
		cause         error
		want          []string
	}{
		{name: "before the yes", authorization: basic, want: []string{
			"own a.test as client 8s"}},
		{name: "before the yes, whatever there is", authorization: basic, mirrors: mirrors("b.test", "+c.test"), node: true, want: []string{
			"own a.test as client 8s"}},
		{name: "the client only", authorization: basic, yes: yes, want: []string{
			"own a.test as client 8s"}},
		{name: "anonymous", yes: yes, want: []string{
			"own a.test as anonymous 8s"}},
		{name: "the node's credential is lent", authorization: basic, yes: yes, node: true, want: []string{
			"lent a.test as node 8s",
			"own a.test as client 8s"}},
		{name: "shared with every client", authorization: basic, yes: yes, node: true, share: []string{"app"}, want: []string{
			"own a.test as node 8s"}},
		{name: "shared, before the yes", authorization: basic, mirrors: mirrors("+b.test"), node: true, share: []string{"app"}, want: []string{
			"own a.test as node 8s"}},
		{name: "another endpoint", authorization: basic, yes: yes, mirrors: mirrors("b.test"), want: []string{
			"own a.test as client 3s",
			"own b.test as anonymous 8s",
			"word a.test as client 8s"}},
		{name: "another endpoint that is trusted", authorization: basic, yes: yes, mirrors: mirrors("+b.test"), want: []string{
			"own a.test as client 3s",
			"own b.test as client 8s",
			"word a.test as client 8s"}},
		{name: "all of it", authorization: basic, yes: yes, mirrors: mirrors("b.test", "+c.test"), node: true, want: []string{
			"lent a.test as node 3s",
			"lent b.test as anonymous 3s",
			"lent c.test as node 8s",
			"own a.test as client 3s",
			"own b.test as anonymous 3s",
			"own c.test as client 8s",
			"word a.test as client 8s"}},
		{name: "after a broken body", authorization: basic, yes: yes, mirrors: mirrors("b.test"), node: true, broken: []int{0}, cause: broken, want: []string{
			"lent b.test as anonymous 3s",
			"lent a.test as node 8s",
			"own b.test as anonymous 3s",
			"own a.test as client 8s",
			"word a.test as client 8s"}},
		{name: "after a second one", authorization: basic, yes: yes, mirrors: mirrors("b.test", "c.test"), broken: []int{0, 0}, cause: broken, want: []string{
			"own c.test as anonymous 3s",
			"own a.test as client 3s",
			"own b.test as anonymous 8s",
			"word a.test as client 8s"}},
		{name: "after the last one's", authorization: basic, yes: yes, mirrors: mirrors("b.test"), broken: []int{1}, cause: broken, want: []string{
			"own a.test as client 3s",
			"own b.test as anonymous 8s",
			"word a.test as client 8s"}},
		{name: "after a body that the client left", authorization: basic, yes: yes, mirrors: mirrors("b.test"), broken: []int{0}, cause: fmt.Errorf("read: %w", context.Canceled), want: []string{
			"own a.test as client 3s",
			"own b.test as anonymous 8s",
			"word a.test as client 8s"}},
		{name: "after a whole body", authorization: basic, yes: yes, mirrors: mirrors("b.test"), broken: []int{0}, cause: io.EOF, want: []string{
			"own a.test as client 3s",
			"own b.test as anonymous 8s",
			"word a.test as client 8s"}},
		{name: "who only finishes", authorization: basic, yes: finishing, mirrors: mirrors("+b.test"), node: true, want: []string{
			"own a.test as client 8s"}},
		{name: "who only finishes, after a broken body", authorization: basic, yes: finishing, mirrors: mirrors("+b.test"), broken: []int{0}, cause: broken, want: []string{
			"own a.test as client 8s"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			rules := DefaultRules()
			rules.Share = c.share
			d := start(t, setup{urls: map[string]string{lab: "https://a.test"}, rules: &rules, configure: func(u *upstream.Config) {
				u.Endpoints = append(u.Endpoints, c.mirrors...)
				if c.node {
					u.Credentials = upstream.NewDockerConfig("/nowhere", u.Name)
				}
			}})
			f := d.fetcherFor("app", c.authorization, digest.FromString("bytes"), c.yes)
			for _, i := range c.broken {
				f.breakOff(f.list()[i], c.cause)
			}
			var got []string
			for _, s := range f.list() {
				got = append(got, fmt.Sprintf("%s %s %v", []string{"lent", "own", "word"}[s.turn], s.name(), s.budget))
				if s.authority != (s.host == "a.test") {
					t.Errorf("%s is the authority: %v", s.name(), s.authority)
				}
				if s.after && c.yes == nil {
					t.Errorf("%s is asked before the yes", s.name())
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("the list is\n%s\nand not\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}

// mirrors are endpoints by their hosts, trusted with a plus.
func mirrors(hosts ...string) (all []upstream.Endpoint) {
	for _, h := range hosts {
		host, trusted := strings.CutPrefix(h, "+")
		all = append(all, upstream.Endpoint{URL: &url.URL{Scheme: "https", Host: host}, Trusted: trusted})
	}
	return all
}

// TestTheLogSaysWhoSentTheBytes and as whom it was asked, also where one broke off.
func TestTheLogSaysWhoSentTheBytes(t *testing.T) {
	t.Parallel()
	authority, mirror, d := withMirror(t, false)
	blob := random(1, 2<<20)
	dgst := authority.Blob("app", blob)
	mirror.Blob("app", blob)
	authority.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.Method != "GET" {
			return false
		}
		sized(w, len(blob))
		w.Write(blob[:1<<20])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	line := func() string {
		before := len(d.log.take())
		d.get(blobPath("app", dgst), "Authorization", registrytest.Basic("a", "canary-password")).mustBe(t, blob)
		var text string
		eventually(t, "a line", func() bool {
			text = string(d.log.take()[before:])
			return strings.Contains(text, `"msg":"request"`)
		})
		return text
	}
	want := fmt.Sprintf(`"sources":["%s as client","%s as anonymous"]`, authority.Address(), mirror.Address())
	if got := line(); !strings.Contains(got, want) {
		t.Errorf("%s\nhas not %s", got, want)
	}
	d.stored(cache.ListedDomain, dgst)
	if got := line(); strings.Contains(got, "sources") {
		t.Errorf("from the disk: %s", got)
	}
}

// withMirror is a tarn whose registry has another endpoint.
func withMirror(t *testing.T, trusted bool) (authority, mirror *registrytest.Registry, d *tarnd) {
	t.Helper()
	authority, mirror = registrytest.New(t), registrytest.New(t)
	d = start(t, setup{listed: map[string]*registrytest.Registry{lab: authority}, configure: func(c *upstream.Config) {
		c.Endpoints = append(c.Endpoints, upstream.Endpoint{URL: mirror.Endpoint(), Trusted: trusted})
	}})
	return authority, mirror, d
}

// whole is what a fetch of all brings.
func (f *fetcher) whole(t *testing.T) (string, cache.Info, error) {
	t.Helper()
	body, info, err := f.fetch(t.Context(), 0, -1)
	if err != nil {
		return "", info, err
	}
	defer body.Close()
	data, err := io.ReadAll(body)
	if err != nil {
		t.Fatal(err)
	}
	return string(data), info, nil
}

func TestEntitledOnlyTheAuthorityAnswersUntilItHasSaidYes(t *testing.T) {
	t.Parallel()
	authority, mirror, d := withMirror(t, false)
	dgst := mirror.Blob("app", []byte("bytes"))
	status := 0
	authority.Hook = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(status); return true }
	for _, status = range []int{401, 403, 404, 429, 500, 503} {
		for _, y := range []*rights.Yes{nil, {Size: 5, Proved: true}} {
			// Each with its own credential: a 429 stands for a while.
			f := d.fetcherFor("app", fmt.Sprintf("Basic %d%v", status, y != nil), dgst, y)
			mirror.Reset()
			got, _, err := f.whole(t)
			if moves := y != nil && status >= 500; moves {
				if err != nil || got != "bytes" {
					t.Errorf("%d: %q, %v", status, got, err)
				}
				if mirror.Exchanges()[0].Authorization != "" {
					t.Error("an endpoint that is not trusted saw the credential")
				}
				continue
			}
			var refused *upstream.StatusError
			if !errors.As(err, &refused) || refused.Status != status || len(mirror.Exchanges()) != 0 {
				t.Errorf("%d, authorised %v: %v, the other endpoint saw %v", status, y != nil, err, mirror.Exchanges())
			}
		}
	}
	// What another endpoint refuses is nobody's word, in whatever order they are asked.
	status = 503
	for _, no := range []int{401, 403, 404} {
		mirror.Hook = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(no); return true }
		for _, first := range []int{0, 1} {
			f := d.fetcherFor("app", "Basic c2VjcmV0", dgst, &rights.Yes{Size: 5, Proved: true})
			f.beginWith(first)
			var said *upstream.StatusError
			if _, _, err := f.whole(t); !errors.As(err, &said) || said.Status != 503 {
				t.Errorf("a mirror that says %d, as number %d: %v", no, first, err)
			}
		}
	}
}

func TestATrustedEndpointSeesTheCredential(t *testing.T) {
	t.Parallel()
	for _, trusted := range []bool{false, true} {
		authority, mirror, d := withMirror(t, trusted)
		dgst := mirror.Blob("app", []byte("bytes"))
		authority.Close()
		const credential = "Basic c2VjcmV0"
		if got, _, err := d.fetcherFor("app", credential, dgst, &rights.Yes{Size: 5, Proved: true}).whole(t); err != nil || got != "bytes" {
			t.Fatalf("%q, %v", got, err)
		}
		if saw := mirror.Exchanges()[0].Authorization; (saw == credential) != trusted || !trusted && saw != "" {
			t.Errorf("trusted: %v, it saw %q", trusted, saw)
		}
	}
}

// TestWhatTheNodeIsRefusedTheClientMayHave with its own credential, and what is no
// refusal ends there: another question would be one too many.
func TestWhatTheNodeIsRefusedTheClientMayHave(t *testing.T) {
	t.Parallel()
	for status, goesOn := range map[int]bool{401: true, 403: true, 404: true, 429: true, 500: false, 503: false} {
		r, d, _ := withNode(t, "Basic")
		dgst := r.Blob("private/app", []byte("bytes"))
		node, client := registrytest.Basic("node", registrytest.Password("node")), registrytest.Basic("a", registrytest.Password("a"))
		r.Hook = func(w http.ResponseWriter, req *http.Request) bool {
			if req.Header.Get("Authorization") != node {
				return false
			}
			w.WriteHeader(status)
			return true
		}
		got, info, err := d.fetcherFor("private/app", client, dgst, &rights.Yes{Size: 5, Proved: true}).whole(t)
		var said *upstream.StatusError
		switch {
		case goesOn && (err != nil || got != "bytes" || info.From != r.Address()+" as client"):
			t.Errorf("the node got %d, the client %q from %q, %v", status, got, info.From, err)
		case !goesOn && (!errors.As(err, &said) || said.Status != status || asked(r, "a") > 0):
			t.Errorf("the node got %d: %v, and %d questions as the client", status, err, asked(r, "a"))
		case asked(r, "node") == 0:
			t.Error("the node did not ask")
		}
	}
}

// TestARefusalOfAMomentAgoAnswersAnonymous, whoever would be asked first.
func TestARefusalOfAMomentAgoAnswersAnonymous(t *testing.T) {
	t.Parallel()
	authority, mirror, d := withMirror(t, false)
	dgst := mirror.Blob("app", []byte("bytes"))
	authority.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("WWW-Authenticate", `Basic realm="lab"`)
		w.WriteHeader(401)
		return true
	}
	if _, _, err := d.fetcherFor("app", "", dgst, nil).whole(t); err == nil {
		t.Fatal("no refusal")
	}
	authority.Reset()
	for _, first := range []int{0, 1} {
		f := d.fetcherFor("app", "", dgst, &rights.Yes{Size: 5, Proved: true})
		f.beginWith(first)
		var said *upstream.StatusError
		if got, _, err := f.whole(t); !errors.As(err, &said) || said.Status != 401 {
			t.Errorf("%d: %q, %v", first, got, err)
		}
	}
	if n := len(authority.Exchanges()) + len(mirror.Exchanges()); n > 0 {
		t.Errorf("%d questions", n)
	}
}

// TestEntitledWhatTheYesDoesNotCoverIsTheAuthoritysToSend: another endpoint has
// something else under that digest than the authority said yes to.
func TestEntitledWhatTheYesDoesNotCoverIsTheAuthoritysToSend(t *testing.T) {
	t.Parallel()
	authority, mirror, d := withMirror(t, true)
	dgst := authority.Blob("app", []byte("bytes"))
	var refusals, gets atomic.Int32
	authority.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		if gets.Add(1) <= refusals.Load() {
			w.WriteHeader(503)
			return true
		}
		return false
	}
	mirror.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		sized(w, 9)
		io.WriteString(w, "elsewhere")
		return true
	}
	for _, c := range []struct {
		size  int64
		fails int32
		want  string
	}{{5, 0, "bytes"}, {5, 1, "bytes"}, {9, 1, "elsewhere"}, {-1, 1, "bytes"}, {5, 2, ""}} {
		gets.Store(0)
		refusals.Store(c.fails)
		f := d.fetcherFor("app", "Basic c2VjcmV0", dgst, &rights.Yes{Size: c.size})
		got, _, err := f.whole(t)
		if got != c.want || (err != nil) != (c.want == "") {
			t.Errorf("a yes to %d bytes, after %d refusals: %q, %v", c.size, c.fails, got, err)
		}
		if n := int32(authority.Count("GET", "/blobs/")); n == 0 {
			t.Error("the authority was not asked")
		}
	}
}

// TestEntitledAnotherEndpointsAnswerIsNoEvidence of anything, not even where it
// names the digest.
func TestEntitledAnotherEndpointsAnswerIsNoEvidence(t *testing.T) {
	t.Parallel()
	authority, mirror, d := withMirror(t, true)
	dgst := mirror.Blob("app", []byte("bytes"))
	authority.Close()
	f := d.fetcherFor("app", "Basic c2VjcmV0", dgst, &rights.Yes{Size: 5, Proved: true})
	if got, _, err := f.whole(t); err != nil || got != "bytes" {
		t.Fatalf("%q, %v", got, err)
	}
	f.verified()
	if d.proxy.rights.Granted(f.q.asker) || d.proxy.rights.Had(f.q.asker, f.q.object(dgst)) {
		t.Error("it made a right")
	}
	resp := &upstream.Response{Digest: dgst, Size: 5}
	if e, _ := d.proxy.weigh(f.q, dgst, resp, time.Now()); e.Says != rights.Mute || e.Size != -1 {
		t.Errorf("it is %+v", e)
	}
}
