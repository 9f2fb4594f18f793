// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tarn/cache"
	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

// Differential tests: each request goes to a registry with some habits, as a
// plain client would send it, and through tarn, and what differs beyond the list
// in differs is wrong. The habits are those that registries were reported to
// have, and what they imply.

// axes are what is combined. go test takes each pair of values of two axes, and
// with TARN_TEST_DIRECT=N in its place N combinations at random.
var axes = []struct {
	name   string
	values []string
}{
	{"what", []string{"tag", "manifest", "blob"}},
	{"method", []string{"GET", "HEAD", "range"}},
	{"state", []string{"cold", "stored", "shared"}},
	{"scheme", []string{"", "Basic", "Bearer"}},
	{"form", []string{"ns", "path", "prefix", "ns and path"}},
	// What a HEAD is answered with, where a GET is answered as get says.
	{"head", []string{"", "400", "401", "403", "404", "405", "410", "429", "500", "501", "502", "503",
		"no digest", "no length", "no type", "length 0", "digest only"}},
	{"get", []string{"", "401", "403", "404", "410", "429", "500", "503", "451", "418"}},
	{"way", []string{"", "blobs elsewhere", "all elsewhere", "all elsewhere with tokens"}},
	{"body", []string{"", "no digest", "no length", "gzip label", "octet-stream", "other name", "no ranges", "no digest, no length, no ranges"}},
}

type combination map[string]string

func (c combination) String() string {
	var parts []string
	for _, a := range axes {
		if v := c[a.name]; v != "" {
			parts = append(parts, a.name+" "+v)
		}
	}
	return strings.Join(parts, ", ")
}

// pairwise returns combinations in which each value of each axis stands beside
// each value of each other one.
func pairwise() (all []combination) {
	type pair struct{ i, j, vi, vj int }
	left := make(map[pair]bool)
	for i := range axes {
		for j := range i {
			for vi := range axes[i].values {
				for vj := range axes[j].values {
					left[pair{i, j, vi, vj}] = true
				}
			}
		}
	}
	covers := func(row []int) (ps []pair) {
		for i := range row {
			for j := range i {
				if p := (pair{i, j, row[i], row[j]}); left[p] {
					ps = append(ps, p)
				}
			}
		}
		return ps
	}
	for len(left) > 0 {
		// Begin with a pair that is left, the same one each time, and choose for
		// each other axis the value that covers most.
		pairs := make([]pair, 0, len(left))
		for p := range left {
			pairs = append(pairs, p)
		}
		first := slices.MinFunc(pairs, func(a, b pair) int {
			return cmp.Or(cmp.Compare(a.i, b.i), cmp.Compare(a.j, b.j), cmp.Compare(a.vi, b.vi), cmp.Compare(a.vj, b.vj))
		})
		row := make([]int, len(axes))
		row[first.i], row[first.j] = first.vi, first.vj
		for k := range axes {
			if k == first.i || k == first.j {
				continue
			}
			best, most := 0, -1
			for v := range axes[k].values {
				row[k] = (v + len(all)) % len(axes[k].values)
				if n := len(covers(row)); n > most {
					best, most = row[k], n
				}
			}
			row[k] = best
		}
		for _, p := range covers(row) {
			delete(left, p)
		}
		all = append(all, asCombination(row))
	}
	return all
}

func asCombination(row []int) combination {
	c := make(combination)
	for i, v := range row {
		c[axes[i].name] = axes[i].values[v]
	}
	return c
}

// some returns n combinations at random, of the 1.8 million that there are.
func some(n int) (all []combination) {
	row := make([]int, len(axes))
	for range n {
		for i, a := range axes {
			row[i] = rand.IntN(len(a.values))
		}
		all = append(all, asCombination(row))
	}
	return all
}

// habitual is a registry with habits, which begin when they are switched on.
type habitual struct {
	*registrytest.Registry
	c  combination
	on bool
}

// answer changes the answer of the registry below as the combination says.
func (h *habitual) hook(below *registrytest.Registry) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !h.on || r.URL.Path == "/v2/" || !strings.Contains(r.URL.Path, "/manifests/") && !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		if r.Method == http.MethodHead && len(h.c["head"]) == 3 {
			h.refuse(w, h.c["head"])
			return true
		}
		if r.Method == http.MethodGet && h.c["get"] != "" {
			h.refuse(w, h.c["get"])
			return true
		}
		rec := &recorder{header: make(http.Header), status: 200}
		if strings.Contains(h.c["body"], "no ranges") {
			r.Header.Del("Range")
		}
		below.Answer(rec, r)
		for k, v := range rec.header {
			w.Header()[k] = v
		}
		chunked := false
		drop := func(habits string) {
			for habit := range strings.SplitSeq(habits, ", ") {
				switch habit {
				case "no digest":
					w.Header().Del("Docker-Content-Digest")
				case "no type":
					w.Header()["Content-Type"] = nil
				case "no length":
					w.Header().Del("Content-Length")
					chunked = true
				case "length 0":
					w.Header().Set("Content-Length", "0")
				case "digest only":
					w.Header()["Content-Type"] = nil
					w.Header().Del("Content-Length")
					chunked = true
				case "gzip label":
					w.Header().Set("Content-Encoding", "gzip")
				case "octet-stream":
					w.Header().Set("Content-Type", "application/octet-stream")
				case "other name":
					if strings.Contains(r.URL.Path, "/manifests/") {
						w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v2+json")
					}
				}
			}
		}
		if rec.status < 300 {
			drop(h.c["body"])
			if r.Method == http.MethodHead {
				drop(h.c["head"])
			}
		}
		w.WriteHeader(rec.status)
		if chunked {
			w.(http.Flusher).Flush()
		}
		w.Write(rec.body.Bytes())
		return true
	}
}

func (h *habitual) refuse(w http.ResponseWriter, status string) {
	var code int
	fmt.Sscan(status, &code)
	if code == 401 { // to whatever is shown
		w.Header().Set("WWW-Authenticate", `Basic realm="habit"`)
	}
	w.WriteHeader(code)
}

type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }

// plainly sends a request as a plain client would: it follows redirects, without
// its credential elsewhere, and has a token for everybody where one is wanted
// and it has no credential, or is elsewhere.
func plainly(t *testing.T, method, at string, headers http.Header) answer {
	t.Helper()
	shown := headers.Get("Authorization")
	start, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	token := ""
	for range 10 {
		u, _ := url.Parse(at)
		req, err := http.NewRequest(method, at, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header = headers.Clone()
		req.Header.Set("Accept-Encoding", "identity")
		if u.Host != start.Host {
			req.Header.Del("Authorization")
		}
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		a := answer{status: resp.StatusCode, header: resp.Header}
		a.body, a.err = io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode >= 300 && resp.StatusCode < 400 && resp.StatusCode != 304 {
			to, err := resp.Location()
			if err != nil {
				t.Fatal(err)
			}
			at, token = to.String(), ""
			continue
		}
		if realm := bearerRealm.FindStringSubmatch(resp.Header.Get("WWW-Authenticate")); a.status == 401 && realm != nil && token == "" && (shown == "" || u.Host != start.Host) {
			scope := bearerScope.FindStringSubmatch(resp.Header.Get("WWW-Authenticate"))
			tresp, err := http.Get(realm[1] + "?scope=" + url.QueryEscape(scope[1]))
			if err != nil {
				t.Fatal(err)
			}
			var body struct{ Token string }
			json.NewDecoder(tresp.Body).Decode(&body)
			tresp.Body.Close()
			if token = body.Token; token != "" {
				continue
			}
		}
		return a
	}
	t.Fatal("too many hops")
	return answer{}
}

var (
	bearerRealm = regexp.MustCompile(`^Bearer .*realm="([^"]*)"`)
	bearerScope = regexp.MustCompile(`scope="([^"]*)"`)
)

// differs says what is wrong with an answer of tarn's beside the registry's own
// to the same request. What may differ is this:
//
//   - a 4xx that means something only between tarn and the registry, any but 401,
//     403 and 404, is a 502, or what the GET says that completes a HEAD; a 429 is
//     a 503, a 5xx one of 502, 503 and 504;
//   - what a redirect target refuses is nobody's word: a 502, or what its GET says;
//   - a 429 or 503 to tarn's own HEAD, or a 401 that nothing was shown for, ends
//     the matter, since another question would be one too many;
//   - a HEAD of tarn's own that says yes is one, whatever a GET would be told;
//   - tarn may know better than a poor answer, or than a refusal of HEAD: what it
//     says besides must be so.
func (w wanted) differs(direct, got answer) string {
	if got.err != nil {
		return fmt.Sprintf("the body broke off: %v", got.err)
	}
	refused := func(statuses ...int) string {
		if !slices.Contains(statuses, got.status) {
			return fmt.Sprintf("status %d, the registry's is %d: %.100s", got.status, direct.status, got.body)
		}
		return ""
	}
	unavailable := []int{502, 503, 504}
	s := direct.status
	switch {
	case s != 200 && s != 206 && w.method == http.MethodHead && got.status == 200 && w.possible:
		return w.mustBeRight(got)
	case s != 200 && s != 206 && w.headed && (got.status == 200 || got.status == 206):
		return w.mustBeRight(got)
	case w.ends != 0 && got.status >= 400:
		return refused(append(unavailable, w.ends, s)...)
	case s == 200, s == 206:
	case w.elsewhere && s < 500 && s != 429:
		return refused(append(unavailable, 401, 403, 404)...)
	case s == 401, s == 403, s == 404:
		return refused(s)
	case s == 429:
		if got.header.Get("Retry-After") == "" {
			return "a 429 without a Retry-After"
		}
		return refused(503)
	case s >= 500:
		return refused(append(unavailable, 401, 403, 404)...)
	default:
		return refused(502, 503, 401, 403, 404)
	}
	if got.status != direct.status && !(w.part && (got.status == 206 || got.status == 200)) {
		return fmt.Sprintf("status %d, the registry's is %d: %.100s", got.status, direct.status, got.body)
	}
	return w.mustBeRight(got)
}

// wanted is what was asked for.
type wanted struct {
	method    string
	part      bool
	body      []byte // the whole object
	digest    digest.Digest
	manifest  bool
	types     []string
	possible  bool // the registry gives it to a GET
	elsewhere bool
	headed    bool // a HEAD is told yes, and the object is here
	ends      int  // what tarn's own HEAD is answered with, where that ends the matter
}

const partFirst, partLast = 100, 199

func (w wanted) mustBeRight(got answer) string {
	body := w.body
	if got.status == 206 {
		if want := fmt.Sprintf("bytes %d-%d/%d", partFirst, partLast, len(body)); got.header.Get("Content-Range") != want {
			return fmt.Sprintf("Content-Range %q, want %q", got.header.Get("Content-Range"), want)
		}
		body = body[partFirst : partLast+1]
	}
	switch {
	case w.method == http.MethodHead:
		if l := got.header.Get("Content-Length"); l != "" && l != fmt.Sprint(len(body)) || l == "" && w.manifest && w.possible {
			return fmt.Sprintf("Content-Length %q, want %d", l, len(body))
		}
	case !bytes.Equal(got.body, body):
		return fmt.Sprintf("%d bytes, want %d", len(got.body), len(body))
	}
	if d := got.header.Get("Docker-Content-Digest"); d != w.digest.String() && (d != "" || w.possible) {
		return fmt.Sprintf("digest %q", d)
	}
	if ct := got.header.Get("Content-Type"); w.manifest && w.possible && !slices.Contains(w.types, ct) {
		return fmt.Sprintf("Content-Type %q", ct)
	}
	if got.header.Get("Content-Encoding") != "" {
		return "a Content-Encoding"
	}
	return ""
}

func TestAsIfTheRegistryHadBeenAskedDirectly(t *testing.T) {
	t.Parallel()
	combinations := pairwise()
	if n, err := strconv.Atoi(os.Getenv("TARN_TEST_DIRECT")); err == nil {
		combinations = some(n)
	}
	t.Logf("%d combinations", len(combinations))
	for _, c := range combinations {
		t.Run(c.String(), func(t *testing.T) {
			t.Parallel()
			testDirect(t, c)
		})
	}
}

func testDirect(t *testing.T, c combination) {
	layer := random(1, 300_000)
	if c["body"] == "gzip label" {
		var z bytes.Buffer
		zw := gzip.NewWriter(&z)
		zw.Write(layer)
		zw.Close()
		layer = z.Bytes()
	}
	front, cdn := &habitual{Registry: registrytest.New(t), c: c}, registrytest.New(t)
	back := front.Registry
	var images []registrytest.Image
	for _, reg := range []*registrytest.Registry{front.Registry, cdn} {
		for _, repository := range []string{"team/one", "team/two"} {
			img := reg.Image(repository, "v1", layer)
			if reg == front.Registry {
				images = append(images, img)
			}
		}
	}
	// Both repositories have the same manifest, so that what is shared is.
	for _, reg := range []*registrytest.Registry{front.Registry, cdn} {
		reg.Manifest("team/two", "v1", "application/vnd.oci.image.manifest.v1+json", images[0].Body)
		reg.Blob("team/two", []byte(`{"architecture":"amd64","os":"linux","created":"team/one:v1"}`))
	}
	auth := http.Header{}
	if c["scheme"] != "" && !strings.HasPrefix(c["way"], "all elsewhere") {
		back.Access = registrytest.NewAccess(t, c["scheme"])
		for _, repository := range []string{"team/one", "team/two"} {
			back.Access.Allow(repository, "a")
		}
	}
	cdn.Hook = front.hook(cdn)
	if c["way"] == "all elsewhere with tokens" {
		cdn.Access = registrytest.NewAccess(t, "Bearer")
		for _, repository := range []string{"team/one", "team/two"} {
			cdn.Access.Allow(repository, "")
		}
	}
	own := front.hook(front.Registry)
	front.Registry.Hook = func(w http.ResponseWriter, r *http.Request) bool {
		blob := strings.Contains(r.URL.Path, "/blobs/")
		if strings.HasPrefix(r.URL.Path, "/v2/team/") && (blob && c["way"] == "blobs elsewhere" || strings.HasPrefix(c["way"], "all")) {
			http.Redirect(w, r, cdn.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return true
		}
		return own(w, r)
	}
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: front.Registry}})
	repository := "team/one"
	login := func(repository string) (headers []string) {
		if back.Access != nil {
			return back.Access.Login(repository, "a")
		}
		return nil
	}
	img := images[0]
	if c["state"] != "cold" {
		d.get(manifestPath("team/one", "v1"), login("team/one")...).mustBe(t, img.Body)
		d.get(blobPath("team/one", img.Layers[0]), login("team/one")...).mustBe(t, layer)
		d.stored(cache.ListedDomain, img.Manifest)
		d.stored(cache.ListedDomain, img.Layers[0])
		if c["state"] == "shared" {
			repository = "team/two"
		}
		d.advance(25 * time.Hour) // grants and memberships are asked again
	}
	front.on = true
	for _, h := range [][]string{login(repository)} {
		for i := 0; i < len(h); i += 2 {
			auth.Set(h[i], h[i+1])
		}
	}
	w := wanted{method: c["method"], body: img.Body, digest: img.Manifest, manifest: c["what"] != "blob", elsewhere: c["way"] != ""}
	reference, kind := "v1", "manifests"
	switch c["what"] {
	case "manifest":
		reference = img.Manifest.String()
	case "blob":
		reference, kind = img.Layers[0].String(), "blobs"
		w.body, w.digest = layer, img.Layers[0]
	}
	w.types = []string{"application/vnd.oci.image.manifest.v1+json"}
	if c["body"] == "other name" {
		w.types = append(w.types, "application/vnd.docker.distribution.manifest.v2+json")
	}
	if c["method"] == "range" {
		w.method, w.part = http.MethodGet, true
		auth.Set("Range", fmt.Sprintf("bytes=%d-%d", partFirst, partLast))
	}
	auth.Set("Accept", "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json, */*")
	w.possible = c["get"] == ""
	w.headed = len(c["head"]) != 3 && c["state"] != "cold" && (w.manifest || strings.Contains(c["body"], "no ranges"))
	if head := c["head"]; w.method == http.MethodGet && w.manifest && (head == "429" || head == "503" || head == "401" && auth.Get("Authorization") == "") {
		fmt.Sscan(head, &w.ends)
	}
	path := "/v2/" + repository + "/" + kind + "/" + reference
	direct := plainly(t, w.method, front.URL+path, auth)
	through := map[string]string{
		"ns":          path + "?ns=" + lab,
		"path":        "/v2/" + lab + "/" + repository + "/" + kind + "/" + reference,
		"prefix":      "/" + lab + path,
		"ns and path": "/v2/" + lab + "/" + repository + "/" + kind + "/" + reference + "?ns=" + lab,
	}[c["form"]]
	var headers []string
	for k := range auth {
		headers = append(headers, k, auth.Get(k))
	}
	for range 2 {
		if wrong := w.differs(direct, d.do(w.method, through, headers...)); wrong != "" {
			t.Fatalf("%s %s: %s", w.method, through, wrong)
		}
	}
}
