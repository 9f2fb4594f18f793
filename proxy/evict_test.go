// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

// TestWholeAThousandRacesWithEviction: clients ask for blobs that must go for each
// other, whole and in part. Nobody gets a 200 or 206 with anything else than what
// it says.
func TestWholeAThousandRacesWithEviction(t *testing.T) {
	t.Parallel()
	const races, clients, n = 1000, 5, 16
	r := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: r}, maxSize: 5 << 20})
	blobs, digests := make([][]byte, n), make([]digest.Digest, n)
	for i := range blobs {
		blobs[i] = random(uint64(i), 400_000+i)
		digests[i] = r.Blob("app", blobs[i])
	}
	var asking sync.WaitGroup
	for client := range clients {
		asking.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(client), 3))
			for range races / clients {
				i := rnd.IntN(n)
				want, status, headers := blobs[i], 200, []string(nil)
				if from := rnd.IntN(2 * len(want)); from < len(want) {
					want, status, headers = want[from:], 206, []string{"Range", fmt.Sprintf("bytes=%d-", from)}
				}
				a := d.get(blobPath("app", digests[i]), headers...)
				if a.status != status || a.err != nil || !bytes.Equal(a.body, want) {
					t.Errorf("%v: %d and %d bytes of %d: %v", headers, a.status, len(a.body), len(want), a.err)
				}
			}
		})
	}
	asking.Wait()
	if e := d.cache.Stats().Evicted.Objects; e < races/20 {
		t.Errorf("only %d were evicted", e)
	}
}
