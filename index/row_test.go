// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// encoded is what a row of the file is read into.
type encoded interface {
	encode() []byte
	decode(b []byte) error
}

// FuzzRow: whatever lies in the file, a row is an error or says what it would
// say once more.
func FuzzRow(f *testing.F) {
	now := time.Unix(1_700_000_000, 5)
	object := Object{Size: 5, Alloc: 4096, Created: now, Inode: 1 << 63, Modified: 1, Changed: 2, Verified: now}.pack()
	used := Use{Time: now, Uses: 3, Priority: 1.5}.pack()
	for _, r := range []encoded{&object, &Tag{Digest: "sha256:x", Confirmed: now, Sequence: 1 << 63}, &Membership{Time: now, MediaType: "a/b"}, &used} {
		f.Add(r.encode())
	}
	f.Add([]byte{0x80})
	f.Add(bytes.Repeat([]byte{0xff}, 11))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, pair := range [][2]encoded{{new(row), new(row)}, {new(Tag), new(Tag)}, {new(Membership), new(Membership)}, {new(use), new(use)}} {
			if pair[0].decode(data) != nil {
				continue
			}
			again := pair[0].encode()
			if err := pair[1].decode(again); err != nil || !bytes.Equal(pair[1].encode(), again) {
				t.Errorf("%T: %x became %x: %v", pair[0], data, again, err)
			}
		}
	})
}

// FuzzDigest: a key in memory is the bytes of a digest, and of nothing else.
func FuzzDigest(f *testing.F) {
	for _, s := range []string{"", "sha256:", string(digest.FromString("x")), string(digest.SHA512.FromString("x")), "sha384:" + digest.FromString("x").Encoded()} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d := digest.Digest(s)
		b, n := parse(d)
		if valid := d.Validate() == nil && (d.Algorithm() == digest.SHA256 || d.Algorithm() == digest.SHA512); valid != (n > 0) {
			t.Fatalf("%q: %d bytes", s, n)
		}
		if n > 0 && (text(b[:n]) != d || !slices.Equal(unpackDigests(packDigests([]digest.Digest{d, d})), []digest.Digest{d, d})) {
			t.Errorf("%q became %q", s, text(b[:n]))
		}
	})
}
