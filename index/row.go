// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"time"

	"github.com/opencontainers/go-digest"
)

// Rows are read on the way of requests, and all of them at the start, so they
// are what is quick to read: integers as varints (encoding/binary), a time as
// nanoseconds since 1970 with 0 for none, and a string last, up to the end.

var errRow = errors.New("not a row")

// row is a row of one of the buckets.
type row interface {
	encode() []byte
	decode(b []byte) error
}

func (o *Object) encode() []byte {
	return encodeRow([]int64{o.Size, o.Alloc, nanos(o.Created), int64(o.Inode), o.Modified, o.Changed, nanos(o.Verified)}, "")
}

func (o *Object) decode(b []byte) error {
	var created, inode, checked int64
	rest, err := decodeRow(b, &o.Size, &o.Alloc, &created, &inode, &o.Modified, &o.Changed, &checked)
	o.Created, o.Inode, o.Verified = moment(created), uint64(inode), moment(checked)
	if err == nil && (rest != "" || o.Size < 0) {
		err = errRow
	}
	return err
}

func (t *Tag) encode() []byte {
	return encodeRow([]int64{nanos(t.Confirmed), int64(t.Sequence)}, t.Digest.String())
}

func (t *Tag) decode(b []byte) error {
	var confirmed, sequence int64
	rest, err := decodeRow(b, &confirmed, &sequence)
	t.Confirmed, t.Sequence, t.Digest = moment(confirmed), uint64(sequence), digest.Digest(rest)
	return err
}

func (m *Membership) encode() []byte {
	return encodeRow([]int64{nanos(m.Time), nanos(m.Anonymous)}, m.MediaType)
}

func (m *Membership) decode(b []byte) error {
	var when, anonymous int64
	rest, err := decodeRow(b, &when, &anonymous)
	m.Time, m.Anonymous, m.MediaType = moment(when), moment(anonymous), rest
	return err
}

func (u *Use) encode() []byte {
	lost := int64(0)
	if u.Lost {
		lost = 1
	}
	return encodeRow([]int64{nanos(u.Time), int64(u.Uses), int64(math.Float64bits(u.Priority)), lost}, "")
}

func (u *Use) decode(b []byte) error {
	var when, uses, priority, lost int64
	rest, err := decodeRow(b, &when, &uses, &priority, &lost)
	u.Time, u.Uses, u.Priority, u.Lost = moment(when), int(uses), math.Float64frombits(uint64(priority)), lost != 0
	if err == nil && (rest != "" || math.IsNaN(u.Priority)) {
		err = errRow
	}
	return err
}

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

func encodeRow(numbers []int64, text string) []byte {
	b := make([]byte, 0, len(numbers)*binary.MaxVarintLen64+len(text))
	for _, n := range numbers {
		b = binary.AppendVarint(b, n)
	}
	return append(b, text...)
}

func decodeRow(b []byte, numbers ...*int64) (text string, err error) {
	for _, n := range numbers {
		v, size := binary.Varint(b)
		if size <= 0 {
			return "", errRow
		}
		*n, b = v, b[size:]
	}
	return string(b), nil
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
