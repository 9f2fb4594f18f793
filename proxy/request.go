// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"tarn/blobstore"
	"tarn/rights"
	"tarn/upstream"

	v2 "github.com/distribution/distribution/v3/registry/api/v2"
	"github.com/opencontainers/go-digest"
)

// form is how a request named its upstream. It decides which credentials may
// pass, and how a link back to tarn is written.
type form int

const (
	formDefault form = iota // /v2/app/...
	formNS                  // /v2/app/...?ns=ghcr.io
	formNSPath              // /v2/ghcr.io/app/...?ns=ghcr.io, /ghcr.io/v2/app/...?ns=ghcr.io
	formPath                // /v2/ghcr.io/app/...
	formPrefix              // /ghcr.io/v2/app/...
)

// spelling is how the client wrote what it asks for.
type spelling struct {
	form   form
	ns     string // as it came; "" when there was none
	prefix string // path before the repository
	named  string // repository
}

// link is the path of what else the client may ask for of that repository.
func (s spelling) link(kind upstream.Kind, reference string) string {
	return s.prefix + s.named + "/" + string(kind) + "/" + reference
}

// span is what of an object a client wants. The zero value is all of it.
type span struct {
	first   int64 // byte
	length  int64 // how many from there; 0: all that follow
	ranged  bool  // there is a Range that is honoured, whatever the object's tag
	resumes bool  // it is the middle of an object, whatever the object's size
}

// request is a client's request as a value: parsed once, names canonical,
// nothing of it looked at again.
type request struct {
	method     string // GET or HEAD
	completes  bool   // it is a GET that completes the answer to a client's HEAD
	kind       upstream.Kind
	base       bool // /v2/ itself; then only upstream may be set
	upstream   upstream.Name
	repository string // as the upstream knows it
	tag        string // of a manifest; "" when digest is set
	digest     digest.Digest
	spelling
	span

	accept        []string   // "" means anything; see acceptOf
	authorization string     // "" for none, also where the client sent the broker's marker
	query         url.Values // what the upstream may see of it
	size          int64      // the only one that is taken; 0 for any

	asker rights.Asker // who asks, see identify

	gone <-chan struct{} // closed when the client has left, or has its answer
	// leaves has a function called when the client leaves, as context.AfterFunc has: then
	// its downloads end, unless others read them, too. nil: they go on.
	leaves func(func()) (stop func() bool)
}

func (q *request) hasLeft() bool {
	select {
	case <-q.gone:
		return true
	default:
		return false
	}
}

// reference is the tag or the digest.
func (q *request) reference() string {
	if q.kind == upstream.Tags {
		return "list"
	}
	return cmp.Or(q.tag, q.digest.String())
}

// names is what the parser must know of the configuration.
type names struct {
	listed          func(upstream.Name) bool
	defaultUpstream upstream.Name
	listedOnly      bool                // registries that are not listed are not served
	refused         func(upstream.Name) // hears of each request for one, then
}

// defaultAccept is what tarn asks for on behalf of a client that takes
// anything: distribution, for one, reads "*/*" as nothing that is newer than
// Docker's schema 2.
var defaultAccept = []string{strings.Join([]string{
	"application/vnd.oci.image.index.v1+json",
	"application/vnd.oci.image.manifest.v1+json",
	"application/vnd.docker.distribution.manifest.list.v2+json",
	"application/vnd.docker.distribution.manifest.v2+json",
	"*/*",
}, ", ")}

// maxAccept bounds what a client accepts, in bytes: more than ten times what any
// sends. It is kept as long as a question is open.
const maxAccept = 8 << 10

// acceptOf returns the client's Accept lines, or nil when they are none or
// take anything and name nothing.
func acceptOf(h http.Header) []string {
	lines := h.Values("Accept")
	for _, l := range lines {
		if strings.TrimSpace(l) != "*/*" {
			return lines
		}
	}
	return nil
}

// parse turns an HTTP request into a value, or fails with an *apiError.
//
// The upstream is, in this order: what ?ns= says, whose name may be repeated
// at the head of the path; the first component of the repository, when it
// looks like a registry; the component before /v2/; the default upstream.
func (n names) parse(r *http.Request) (*request, error) {
	path, err := decodePath(r.URL)
	if err != nil {
		return nil, err
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badName("the query string cannot be parsed")
	}
	ns := query["ns"]
	if len(r.RequestURI) > maxKept { // or what is remembered by a name would keep all of it
		path, ns = strings.Clone(path), slices.Clone(ns)
		for i := range ns {
			ns[i] = strings.Clone(ns[i])
		}
	}
	if len(r.Header.Values("Authorization")) > 1 {
		return nil, badName("more than one Authorization header")
	}
	size := 0
	for _, line := range r.Header.Values("Accept") {
		size += len(line)
	}
	if size > maxAccept {
		return nil, badName(fmt.Sprintf("Accept headers of %d bytes, of at most %d", size, maxAccept))
	}
	q := &request{
		method:        r.Method,
		accept:        acceptOf(r.Header),
		authorization: withoutMarker(r.Header.Get("Authorization")),
		span:          parseRange(r),
		gone:          r.Context().Done(),
	}

	head, rest, ok := strings.Cut(path, "/v2")
	if !ok || rest != "" && rest[0] != '/' || strings.Count(head, "/") > 1 {
		return nil, errNoRoute
	}
	head, rest = strings.TrimPrefix(head, "/"), strings.TrimPrefix(rest, "/")
	if rest != "" {
		if rest, err = q.parseRoute(rest); err != nil {
			return nil, err
		}
	} else {
		q.base = true
	}
	if err := n.parseUpstream(q, head, rest, ns); err != nil {
		return nil, err
	}
	if q.base {
		return q, nil
	}
	if err := q.completeRepository(); err != nil {
		return nil, err
	}
	q.query = passedOn(q.kind, query)
	return q, nil
}

// completeRepository gives Docker Hub's own images their full name, and checks
// it.
func (q *request) completeRepository() error {
	if q.upstream == upstream.DockerHub && !strings.Contains(q.repository, "/") {
		q.repository = "library/" + q.repository
	}
	return checkRepository(q.repository)
}

// parseRange returns what is wanted of the object. It leaves the one kind of range
// that registries' clients send, so that the answer is the same whether the
// object is complete or on its way, and so that what is authorised here is what
// net/http serves later: a GET with one range of bytes. A server may ignore any
// other (RFC 9110 14.2).
func parseRange(r *http.Request) span {
	lines := r.Header["Range"]
	if len(lines) == 0 {
		return span{}
	}
	ranged := lines[0] != "" && r.Header.Get("If-Range") == "" // which may turn it into a request for all
	spec, bytes := strings.CutPrefix(lines[0], "bytes=")
	switch {
	case r.Method != http.MethodGet || len(lines) > 1:
	case !bytes:
		return span{ranged: ranged} // 416 where ranges are known, see serveContent
	case suffixRange.MatchString(spec):
		return span{first: 1, length: 1, ranged: ranged} // somewhere in the object, whose size is to be known first
	case simpleRange.MatchString(spec):
		from, to, _ := strings.Cut(spec, "-")
		first, err := strconv.ParseInt(from, 10, 64)
		if err != nil {
			break
		}
		length := int64(0)
		if last, err := strconv.ParseInt(to, 10, 64); err == nil && last >= first && last < math.MaxInt64 {
			length = last - first + 1
		}
		return span{first: first, length: length, ranged: ranged, resumes: ranged && first > 0}
	}
	r.Header.Del("Range")
	return span{}
}

var (
	simpleRange = regexp.MustCompile(`^[0-9]+-[0-9]*$`)
	suffixRange = regexp.MustCompile(`^-[0-9]+$`)
)

// decodePath returns the path of the URL. The only escape that a client has a
// reason for is that of the colon in a digest; any other could make the path
// mean something else further on.
func decodePath(u *url.URL) (string, error) {
	p := u.EscapedPath()
	if strings.Contains(p, "%") {
		p = strings.NewReplacer("%3A", ":", "%3a", ":").Replace(p)
	}
	for i := range len(p) {
		if c := p[i]; c <= ' ' || c >= 0x7f || c == '%' || c == '\\' {
			return "", badName("the path has an escape or a character that no name has")
		}
	}
	if len(p) > maxPath {
		return "", badName("the path is too long")
	}
	return p, nil
}

// maxKept is how long a request line may be of which names are parts.
const maxKept = 512

// maxPath is generous: a host, a repository of 255 characters, and a sha512.
const maxPath = 1024

// parseRoute reads <name>/manifests/<reference> and its sisters from the end,
// since a repository may be called "manifests" too, and returns the name.
func (q *request) parseRoute(rest string) (name string, err error) {
	if name, ok := strings.CutSuffix(rest, "/tags/list"); ok {
		q.kind = upstream.Tags
		return name, nil
	}
	i := strings.LastIndexByte(rest, '/')
	if i < 0 {
		return "", errNoRoute
	}
	name, ref := rest[:i], rest[i+1:]
	for _, k := range []upstream.Kind{upstream.Manifest, upstream.Blob, upstream.Referrers} {
		if n, ok := strings.CutSuffix(name, "/"+string(k)); ok {
			q.kind, name = k, n
			if k == upstream.Manifest && !strings.Contains(ref, ":") {
				if !validTag(ref) {
					return "", &apiError{http.StatusBadRequest, v2ErrTag, "not a tag"}
				}
				q.tag = ref
				return name, nil
			}
			q.digest = digest.Digest(ref)
			if err := blobstore.CheckDigest(q.digest); err != nil {
				return "", &apiError{http.StatusBadRequest, v2ErrDigest, err.Error()}
			}
			return name, nil
		}
	}
	return "", errNoRoute
}

// validTag follows distribution-spec "Pulling manifests".
func validTag(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' || s[0] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '.' && c != '-' {
			return false
		}
	}
	return true
}

// parseUpstream decides which registry is meant: head is what stood before
// /v2, named the repository as the client wrote it.
func (n names) parseUpstream(q *request, head, named string, ns []string) error {
	q.repository, q.named, q.prefix = named, named, "/v2/"
	if head != "" {
		q.prefix = "/" + head + "/v2/"
	}
	for _, s := range ns[min(1, len(ns)):] {
		if s != ns[0] {
			return badName("two different ns")
		}
	}
	var err error
	first, remainder, hasMore := strings.Cut(named, "/")
	switch {
	case len(ns) > 0:
		q.ns, q.form = ns[0], formNS
		if q.upstream, err = upstream.ParseName(q.ns); err != nil {
			return badName("ns: " + err.Error())
		}
		if head != "" {
			if h, err := upstream.ParsePathName(head); err != nil || h != q.upstream {
				return badName(fmt.Sprintf("ns names %s, the path another registry", q.upstream))
			}
			q.form = formNSPath
		} else if p, err := upstream.ParsePathName(first); err == nil && hasMore && p == q.upstream {
			q.repository, q.form = remainder, formNSPath
		}
	case head != "":
		q.form = formPrefix
		if q.upstream, err = upstream.ParsePathName(head); err != nil {
			return badName(err.Error())
		}
	case hasMore && n.looksLikeUpstream(first):
		q.form, q.repository = formPath, remainder
		if q.upstream, err = upstream.ParsePathName(first); err != nil {
			return badName(err.Error())
		}
	case q.base:
		return nil // /v2/ is asked of tarn itself
	default:
		q.form, q.upstream = formDefault, n.defaultUpstream
	}
	if n.listedOnly && !n.listed(q.upstream) && q.upstream != probeName {
		n.refused(q.upstream)
		return errNotAllowed
	}
	return nil
}

// looksLikeUpstream tells whether the first component of a path names a
// registry rather than an organisation.
func (n names) looksLikeUpstream(first string) bool {
	if strings.Contains(first, ".") || strings.Contains(first, "__") {
		return true
	}
	name, err := upstream.ParsePathName(first)
	return err == nil && n.listed(name)
}

// maxRepository is distribution's limit on a repository's name.
const maxRepository = 255

// checkRepository follows distribution-spec "Pulling manifests": components of
// lower-case letters and digits, inside them '.', '_', '__' or any number of
// '-'.
func checkRepository(name string) error {
	if name == "" || len(name) > maxRepository {
		return badName("the repository's name is missing or too long")
	}
	for component := range strings.SplitSeq(name, "/") {
		if !validComponent(component) {
			return badName("not a repository name")
		}
	}
	return nil
}

func validComponent(s string) bool {
	alnum := func(i int) bool {
		return i >= 0 && i < len(s) && (s[i] >= 'a' && s[i] <= 'z' || s[i] >= '0' && s[i] <= '9')
	}
	if !alnum(0) || !alnum(len(s)-1) {
		return false
	}
	for i := 0; i < len(s); {
		if alnum(i) {
			i++
			continue
		}
		end := i
		for end < len(s) && s[end] == s[i] {
			end++
		}
		run := end - i
		switch s[i] {
		case '-':
		case '.':
			if run > 1 {
				return false
			}
		case '_':
			if run > 2 {
				return false
			}
		default:
			return false
		}
		if !alnum(end) { // two kinds of separator in a row
			return false
		}
		i = end
	}
	return true
}

// passedOn is what the upstream may see of the query: of a list everything but
// ns, since registries have words of their own for the next page.
func passedOn(kind upstream.Kind, query url.Values) url.Values {
	if kind != upstream.Tags && kind != upstream.Referrers {
		return nil
	}
	out := maps.Clone(query)
	delete(out, "ns")
	if len(out) == 0 {
		return nil
	}
	return out
}

// The routes' names are distribution's, so that a metric here reads like one
// there.
func (q *request) route() string {
	switch {
	case q.base:
		return v2.RouteNameBase
	case q.kind == upstream.Manifest:
		return v2.RouteNameManifest
	case q.kind == upstream.Blob:
		return v2.RouteNameBlob
	case q.kind == upstream.Tags:
		return v2.RouteNameTags
	case q.kind == tokenRoute:
		return string(tokenRoute)
	default:
		return "referrers"
	}
}
