// SPDX-License-Identifier: Apache-2.0

package index

import (
	"encoding/hex"
	"iter"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// How the rows lie in memory. There may be a million of them, so digests are bytes
// and not text, times are numbers, and what thousands of rows share is there once.

// RepositoryKey names a repository: the canonical upstream name, and the
// repository's name there.
type RepositoryKey struct {
	Upstream, Repository string
}

// TagKey names a tag.
type TagKey struct {
	RepositoryKey
	Tag string
}

// MembershipKey names an object in a repository; Kind is "manifests" or "blobs".
type MembershipKey struct {
	RepositoryKey
	Kind   string
	Digest digest.Digest
}

// TagKey is the key of a tag of the repository.
func (k RepositoryKey) TagKey(tag string) TagKey { return TagKey{k, tag} }

// MembershipKey is the key of an object in the repository; kind is "manifests" or
// "blobs".
func (k RepositoryKey) MembershipKey(kind string, d digest.Digest) MembershipKey {
	return MembershipKey{k, kind, d}
}

const manifests, blobs = "manifests", "blobs"

// repository has what is known of one.
type repository struct {
	tags             map[string]Tag
	manifests, blobs byDigest[membership]
	types            byDigest[string] // of manifests
}

func newRepository() *repository {
	return &repository{
		tags:      make(map[string]Tag),
		manifests: newByDigest[membership](),
		blobs:     newByDigest[membership](),
		types:     newByDigest[string](),
	}
}

// members are those of a kind.
func (r *repository) members(kind string) byDigest[membership] {
	if kind == manifests {
		return r.manifests
	}
	return r.blobs
}

func (r *repository) empty() bool {
	return len(r.tags)+r.manifests.len()+r.blobs.len() == 0
}

func (r *repository) membership(kind string, d digest.Digest) (m Membership, ok bool) {
	served, ok := r.members(kind).get(d)
	if !ok {
		return m, false
	}
	m = Membership{Time: moment(served.time), Anonymous: moment(served.anonymous)}
	if kind == manifests {
		m.MediaType, _ = r.types.get(d)
	}
	return m, true
}

// setMembership tells whether it could: it needs a digest.
func (r *repository) setMembership(kind string, d digest.Digest, m Membership) bool {
	switch {
	case kind != manifests:
	case m.MediaType == "":
		r.types.delete(d)
	default:
		r.types.put(d, m.MediaType)
	}
	return r.members(kind).put(d, membership{nanos(m.Time), nanos(m.Anonymous)})
}

func (r *repository) deleteMembership(kind string, d digest.Digest) {
	r.members(kind).delete(d)
	if kind == manifests {
		r.types.delete(d)
	}
}

// membership is a Membership, with times in nanoseconds since 1970. The type of a
// manifest is beside it, since nine of ten are blobs.
type membership struct{ time, anonymous int64 }

// latest is when the authority served it last, to anybody.
func (m membership) latest() int64 { return max(m.time, m.anonymous) }

// object is a stored file.
type object struct {
	row      row
	domains  []string // that possess it
	children []byte   // what it leads to, see packDigests
	use      use
}

// ListedDomain is the source domain that all listed upstreams share. It is no
// legal registry name, so that no registry can claim it.
const ListedDomain = "*"

// listedOnly is what possesses nearly all.
var listedOnly = []string{ListedDomain}

func (o *object) possessed(domain string) bool { return slices.Contains(o.domains, domain) }

func (o *object) possess(domain string) {
	switch {
	case o.possessed(domain):
	case len(o.domains) == 0 && domain == listedOnly[0]:
		o.domains = listedOnly
	default:
		o.domains = append(slices.Clone(o.domains), domain)
	}
}

// row is an Object, with times in nanoseconds since 1970.
type row struct {
	size, alloc, created        int64
	inode                       uint64
	modified, changed, verified int64
}

func (r row) unpack() Object {
	return Object{r.size, r.alloc, moment(r.created), r.inode, r.modified, r.changed, moment(r.verified)}
}

func (o Object) pack() row {
	return row{o.Size, o.Alloc, nanos(o.Created), o.Inode, o.Modified, o.Changed, nanos(o.Verified)}
}

// use is a Use, with its time in nanoseconds since 1970.
type use struct {
	time     int64
	priority float64
	uses     int32
	lost     bool
	marked   bool // it is to be written
}

// known tells whether there was one.
func (u use) known() bool { return u.time != 0 }

func (u use) unpack() Use { return Use{moment(u.time), int(u.uses), u.priority, u.lost} }

func (u Use) pack() use {
	return use{time: nanos(u.Time), priority: u.Priority, uses: int32(min(u.Uses, maxUses)), lost: u.Lost}
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func moment(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// byDigest is a map whose keys are the bytes of a digest, of one of the two
// algorithms that are registered (image-spec "Registered Algorithms"). Anything
// else is never in it.
type byDigest[V any] struct {
	short map[[32]byte]V
	long  map[[64]byte]V
}

func newByDigest[V any]() byDigest[V] {
	return byDigest[V]{make(map[[32]byte]V), make(map[[64]byte]V)}
}

// parse returns the bytes that a digest stands for, and how many there are, 0
// where it is none.
func parse(d digest.Digest) (b [64]byte, n int) {
	const sha256, sha512 = len("sha256:"), len("sha512:")
	switch {
	case len(d) == sha256+2*32 && d[:sha256] == "sha256:":
		n = 32
	case len(d) == sha512+2*64 && d[:sha512] == "sha512:":
		n = 64
	default:
		return b, 0
	}
	var text [128]byte
	copy(text[:], d[sha256:])
	if m, err := hex.Decode(b[:], text[:2*n]); err != nil || m != n {
		return b, 0
	}
	return b, n
}

// text is the digest of so many bytes.
func text(b []byte) digest.Digest {
	name := "sha256:"
	if len(b) == 64 {
		name = "sha512:"
	}
	return digest.Digest(hex.AppendEncode(append(make([]byte, 0, len(name)+2*len(b)), name...), b))
}

func (m byDigest[V]) get(d digest.Digest) (v V, ok bool) {
	switch b, n := parse(d); n {
	case 32:
		v, ok = m.short[[32]byte(b[:])]
	case 64:
		v, ok = m.long[b]
	}
	return v, ok
}

// put tells whether it could: only a digest can be a key.
func (m byDigest[V]) put(d digest.Digest, v V) bool {
	switch b, n := parse(d); n {
	case 32:
		m.short[[32]byte(b[:])] = v
	case 64:
		m.long[b] = v
	default:
		return false
	}
	return true
}

func (m byDigest[V]) delete(d digest.Digest) {
	switch b, n := parse(d); n {
	case 32:
		delete(m.short, [32]byte(b[:]))
	case 64:
		delete(m.long, b)
	}
}

func (m byDigest[V]) len() int { return len(m.short) + len(m.long) }

// where are the digests of which f says yes.
func (m byDigest[V]) where(f func(V) bool) (ds []digest.Digest) {
	for k, v := range m.short {
		if f(v) {
			ds = append(ds, text(k[:]))
		}
	}
	for k, v := range m.long {
		if f(v) {
			ds = append(ds, text(k[:]))
		}
	}
	return ds
}

func (m byDigest[V]) values() iter.Seq[V] {
	return func(yield func(V) bool) {
		for _, v := range m.short {
			if !yield(v) {
				return
			}
		}
		for _, v := range m.long {
			if !yield(v) {
				return
			}
		}
	}
}

func (m byDigest[V]) all() iter.Seq2[digest.Digest, V] {
	return func(yield func(digest.Digest, V) bool) {
		for k, v := range m.short {
			if !yield(text(k[:]), v) {
				return
			}
		}
		for k, v := range m.long {
			if !yield(text(k[:]), v) {
				return
			}
		}
	}
}

// packDigests puts digests one after the other, each as the number of its bytes
// and these. What is no digest leads nowhere.
func packDigests(ds []digest.Digest) (packed []byte) {
	for _, d := range ds {
		if b, n := parse(d); n > 0 {
			packed = append(append(packed, byte(n)), b[:n]...)
		}
	}
	return packed
}

func unpackDigests(packed []byte) (ds []digest.Digest) {
	for len(packed) > 0 {
		n := 1 + int(packed[0])
		ds = append(ds, text(packed[1:n]))
		packed = packed[n:]
	}
	return ds
}
