// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestServerTimingSaysWhatAnAnswerWaitedFor(t *testing.T) {
	t.Parallel()
	const late = 20 * time.Millisecond
	r, d := private(t, "Basic", setup{})
	layer := random(1, 50_000)
	img := r.Image("private/app", "v1", layer)
	r.Latency = late
	may, mayNot := r.Access.Login("private/app", "a"), r.Access.Login("private/app", "b")
	steps := func(a answer) (names []string) {
		for one := range strings.SplitSeq(a.header.Get("Server-Timing"), ", ") {
			name, ms, _ := strings.Cut(one, ";dur=")
			var v float64
			if n, err := fmt.Sscan(ms, &v); name != "" && (n != 1 || err != nil || v < 0.1 || v > 10_000) {
				t.Errorf("%s: %q is no duration", name, ms)
			}
			if name != "disk" && name != "" { // which may be that slow, or not
				names = append(names, name)
			}
		}
		return names
	}
	for _, c := range []struct {
		what string
		answer
		want []string
	}{
		{"a tag that is not here", d.get(manifestPath("private/app", "v1"), may...).must(t, 200), []string{"head", "first-byte"}},
		{"a blob that is not here", d.get(blobPath("private/app", img.Layers[0]), may...).must(t, 200), []string{"first-byte"}},
		{"a tag that is here", d.get(manifestPath("private/app", "v1"), may...).must(t, 200), []string{"head"}},
		{"a digest that is here", d.get(blobPath("private/app", img.Layers[0]), may...).must(t, 200), nil},
		{"nobody's", d.get(blobPath("private/app", img.Layers[0])).must(t, 401), nil},
		{"another's that is here", d.get(blobPath("private/app", img.Layers[0]), mayNot...).must(t, 403), nil},
		{"another's that is not", d.get(manifestPath("private/app", "v2"), mayNot...).must(t, 403), nil},
		{"/v2/", d.get("/v2/").must(t, 200), nil},
	} {
		if got := steps(c.answer); !slices.Equal(got, c.want) {
			t.Errorf("%s waited for %v, and not for %v", c.what, got, c.want)
		}
		if _, told := c.header["Server-Timing"]; told && c.status >= 400 {
			t.Errorf("%s: a refusal tells its times: %v", c.what, c.header)
		}
	}
	d.advance(2 * time.Minute) // past the grant
	if got := steps(d.get(blobPath("private/app", img.Layers[0]), may...).must(t, 200)); !slices.Equal(got, []string{"rights"}) {
		t.Errorf("after grant_ttl it waited for %v", got)
	}
}
