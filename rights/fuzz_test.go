// SPDX-License-Identifier: Apache-2.0

package rights

import "testing"

func FuzzTokenEnd(f *testing.F) {
	f.Add("Bearer e30.eyJleHAiOjE3MDAwMDAwMDB9.x")
	f.Add("Bearer a.b.c")
	f.Add("Basic YTpi")
	f.Fuzz(func(t *testing.T, header string) {
		if end, ok := tokenEnd(header); ok && end.Unix() < 0 {
			t.Fatalf("%q: %v", header, end)
		}
	})
}
