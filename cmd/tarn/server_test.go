// SPDX-License-Identifier: Apache-2.0

package main

import (
	"runtime/debug"
	"testing"
)

// TestConnectionsTakeHalfOfTheMemory: and never so little that nobody is served.
func TestConnectionsTakeHalfOfTheMemory(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	for _, c := range []struct{ limit, most int64 }{
		{128 << 20, 512},
		{64 << 20, 256},
		{1 << 20, 16},
	} {
		debug.SetMemoryLimit(c.limit)
		if n := maxConnections(connectionMemory); n > c.most || n < 16 {
			t.Errorf("with %d MiB: %d connections, of at most %d", c.limit>>20, n, c.most)
		}
	}
}
