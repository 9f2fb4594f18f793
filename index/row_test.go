// SPDX-License-Identifier: Apache-2.0

package index

import (
	"bytes"
	"testing"
	"time"
)

// FuzzRow: whatever lies in the file, a row is an error or says what it would
// say once more.
func FuzzRow(f *testing.F) {
	now := time.Unix(1_700_000_000, 5)
	for _, r := range []row{
		&Object{Size: 5, Alloc: 4096, Created: now, Inode: 1 << 63, Modified: 1, Changed: 2, Verified: now},
		&Tag{Digest: "sha256:x", Confirmed: now, Sequence: 1 << 63},
		&Membership{Time: now, MediaType: "a/b"},
		&Use{Time: now, Uses: 3, Priority: 1.5},
	} {
		f.Add(r.encode())
	}
	f.Add([]byte{0x80})
	f.Add(bytes.Repeat([]byte{0xff}, 11))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, pair := range [][2]row{{new(Object), new(Object)}, {new(Tag), new(Tag)}, {new(Membership), new(Membership)}, {new(Use), new(Use)}} {
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
