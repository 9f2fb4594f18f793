// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"fmt"
	"os"
	"testing"

	"tarn/blobstore"

	"github.com/opencontainers/go-digest"
)

// FuzzRestore: whatever a journal says, no byte is believed that is not in the
// file, or that belongs to the object's held back end.
func FuzzRestore(f *testing.F) {
	d := digest.FromString("x")
	header := fmt.Appendf(nil, `{"Domain":"*","Digest":%q,"Size":300000}`, d)
	f.Add(header, []byte(`{"Filled":[[0,100000],[200000,300000]],"Synced":true}`), uint32(300_000))
	f.Add(header, []byte(`{"Filled":[[0,9223372036854775807]],"Synced":true}`), uint32(1))
	f.Add(fmt.Appendf(nil, `{"Domain":"*","Digest":%q,"Size":9223372036854775807}`, d), []byte(`{"Filled":[[-5,3]],"Synced":true}`), uint32(5))
	f.Add([]byte(`{}`), []byte(`null`), uint32(0))
	file, err := os.CreateTemp(f.TempDir(), "")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { file.Close() })
	f.Fuzz(func(t *testing.T, header, progress []byte, length uint32) {
		if err := file.Truncate(int64(length)); err != nil {
			t.Fatal(err)
		}
		k, p, _, err := restore(&blobstore.Pending{File: file, Digest: d, Notes: [][]byte{header, progress}})
		if err != nil {
			return
		}
		if k.Digest != d || k.Domain == "" || len(p.filled) == 0 || p.filled.total() <= 0 {
			t.Errorf("%v %v", k, p.filled)
		}
		last := int64(-1)
		for _, s := range p.filled {
			if s.start <= last || s.start >= s.end || s.end > int64(length) || s.end > p.size-tailHold {
				t.Errorf("%v in %d bytes of %d", p.filled, length, p.size)
			}
			last = s.end
		}
	})
}
