// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"fmt"
	"strings"
	"testing"
)

func TestTheAccessLogHasWhatIsAskedFor(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		log  AccessLog
		want int
	}{
		{LogAll, 6},
		{LogUpstream, 5}, // not the blob from the disk
		{LogErrors, 1},   // not the 401
	} {
		t.Run(fmt.Sprint(c.log), func(t *testing.T) {
			t.Parallel()
			r, d := private(t, "Basic", setup{})
			d.proxy.accessLog = c.log // of a proxy that nobody has asked yet
			img := r.Image("private/app", "v1", random(1, 1000))
			may := r.Access.Login("private/app", "a")
			d.get(manifestPath("private/app", "v1")).must(t, 401)
			d.get(manifestPath("private/app", "v1"), may...).must(t, 200)
			d.stored("*", img.Manifest)
			d.get(manifestPath("private/app", "v1"), may...).must(t, 200)
			d.get(blobPath("private/app", img.Layers[0]), may...).must(t, 200)
			d.stored("*", img.Layers[0])
			d.get(blobPath("private/app", img.Layers[0]), may...).must(t, 200)
			d.get("/nothing").must(t, 404)
			d.stop()
			if got := strings.Count(string(d.log.take()), `"msg":"request"`); got != c.want {
				t.Errorf("%d lines, and not %d:\n%s", got, c.want, d.log.take())
			}
		})
	}
}
