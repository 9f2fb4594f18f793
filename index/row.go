// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"slices"

	"github.com/opencontainers/go-digest"
)

// A row's key is text, its parts separated by a NUL byte, which is in none of them. Its
// value is what is quick to read, since all of them are at a start: integers as varints
// (encoding/binary), a time as nanoseconds since 1970 with 0 for none, and a string
// last, up to the end.

var (
	metaBucket       = []byte("meta")
	objectBucket     = []byte("objects")
	tagBucket        = []byte("tags")
	membershipBucket = []byte("memberships")
	possessionBucket = []byte("possessions")
	useBucket        = []byte("uses")
	childrenBucket   = []byte("children")
	versionKey       = []byte("version")
	allBuckets       = [][]byte{metaBucket, objectBucket, tagBucket, membershipBucket, possessionBucket, useBucket, childrenBucket}
	// formerBuckets are those of earlier versions: who had a yes is not kept any more.
	formerBuckets = [][]byte{[]byte("yeses"), []byte("challenges")}
)

var errRow = errors.New("not a row")

func joined(parts ...string) []byte {
	var b []byte
	for i, p := range parts {
		if i > 0 {
			b = append(b, 0)
		}
		b = append(b, p...)
	}
	return b
}

func (k TagKey) bytes() []byte { return joined(k.Upstream, k.Repository, k.Tag) }

func (k MembershipKey) bytes() []byte {
	return joined(k.Upstream, k.Repository, k.Kind, string(k.Digest))
}

// String is the key as text, in which no two are the same.
func (k MembershipKey) String() string { return string(k.bytes()) }

// possessionKey starts with the digest, so that all of an object's lie together.
func possessionKey(d digest.Digest, domain string) []byte { return joined(string(d), domain) }

// childrenARow bounds a row: bbolt copies what lies beside it in a page when one is
// deleted. The first row's key is the digest, and that of a further one its number
// besides.
const childrenARow = 512

func childrenKey(d digest.Digest, n int) []byte {
	if n == 0 {
		return []byte(d)
	}
	return binary.BigEndian.AppendUint32(joined(string(d), ""), uint32(n))
}

func (r row) encode() []byte {
	return encodeRow("", r.size, r.alloc, r.created, int64(r.inode), r.modified, r.changed, r.verified)
}

func (r *row) decode(b []byte) error {
	var inode int64
	rest, err := decodeRow(b, &r.size, &r.alloc, &r.created, &inode, &r.modified, &r.changed, &r.verified)
	r.inode = uint64(inode)
	if err == nil && (len(rest) > 0 || r.size < 0) {
		err = errRow
	}
	return err
}

func (t Tag) encode() []byte {
	return encodeRow(t.Digest.String(), nanos(t.Confirmed), int64(t.Sequence))
}

func (t *Tag) decode(b []byte) error {
	var confirmed, sequence int64
	rest, err := decodeRow(b, &confirmed, &sequence)
	t.Confirmed, t.Sequence, t.Digest = moment(confirmed), uint64(sequence), digest.Digest(rest)
	return err
}

func (m Membership) encode() []byte {
	return encodeRow(m.MediaType, nanos(m.Time), nanos(m.Anonymous))
}

func (m *Membership) decode(b []byte) error {
	var when, anonymous int64
	rest, err := decodeRow(b, &when, &anonymous)
	m.Time, m.Anonymous, m.MediaType = moment(when), moment(anonymous), string(rest)
	return err
}

func (u use) encode() []byte {
	lost := int64(0)
	if u.lost {
		lost = 1
	}
	return encodeRow("", u.time, int64(u.uses), int64(math.Float64bits(u.priority)), lost)
}

func (u *use) decode(b []byte) error {
	var uses, priority, lost int64
	rest, err := decodeRow(b, &u.time, &uses, &priority, &lost)
	u.uses, u.priority, u.lost = int32(max(0, min(uses, maxUses))), math.Float64frombits(uint64(priority)), lost != 0
	if err == nil && (len(rest) > 0 || math.IsNaN(u.priority)) {
		err = errRow
	}
	return err
}

// maxUses is as many as are counted in a row.
const maxUses = math.MaxInt32

// encodeChildren joins digests by what none of them has.
func encodeChildren(ds []digest.Digest) []byte {
	var b []byte
	for _, d := range ds {
		b = append(append(b, d...), 0)
	}
	return b
}

func decodeChildren(b []byte) (ds []digest.Digest) {
	for part := range bytes.SplitSeq(bytes.TrimSuffix(b, []byte{0}), []byte{0}) {
		ds = append(ds, digest.Digest(part))
	}
	return ds
}

func encodeRow(text string, numbers ...int64) []byte {
	b := make([]byte, 0, len(numbers)*binary.MaxVarintLen64+len(text))
	for _, n := range numbers {
		b = binary.AppendVarint(b, n)
	}
	return append(b, text...)
}

// decodeRow returns what is after the numbers.
func decodeRow(b []byte, numbers ...*int64) (text []byte, err error) {
	for _, n := range numbers {
		v, size := binary.Varint(b)
		if size <= 0 {
			return nil, errRow
		}
		*n, b = v, b[size:]
	}
	return b, nil
}

// change is what a transaction does to a key: put a value, or delete it and, if it is
// an object's, all that begin with it.
type change struct {
	bucket, key, value []byte // value nil: delete
	under              bool   // delete what is under the key, too
}

func (c change) compare(d change) int {
	if order := bytes.Compare(c.bucket, d.bucket); order != 0 {
		return order
	}
	return bytes.Compare(c.key, d.key)
}

// changesOf are those that have the file say of an object what memory says, nil where
// it is gone. Of one that is new, the file may have rows of an earlier one of that
// digest, whose possessors are none of this one: they go first.
func changesOf(d digest.Digest, o *object, anew bool) (all []change) {
	key := []byte(d)
	if anew {
		all = append(all,
			change{bucket: objectBucket, key: key},
			change{bucket: useBucket, key: key},
			change{bucket: possessionBucket, key: key, under: true},
			change{bucket: childrenBucket, key: key, under: true})
	}
	if o == nil {
		return all
	}
	all = append(all, change{bucket: objectBucket, key: key, value: o.row.encode()})
	for _, domain := range o.domains {
		all = append(all, change{bucket: possessionBucket, key: possessionKey(d, domain), value: binary.BigEndian.AppendUint64(nil, uint64(o.row.created))})
	}
	if !anew {
		return all
	}
	n := 0
	for part := range slices.Chunk(unpackDigests(o.children), childrenARow) {
		all = append(all, change{bucket: childrenBucket, key: childrenKey(d, n), value: encodeChildren(part)})
		n++
	}
	if o.use.known() {
		all = append(all, change{bucket: useBucket, key: key, value: o.use.encode()})
	}
	return all
}
