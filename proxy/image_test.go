// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"strings"
	"testing"

	"tarn/cache"
)

var testImages = &Proxy{names: testNames}

func TestImagesAsPeopleWriteThem(t *testing.T) {
	t.Parallel()
	for written, want := range map[string]string{
		"alpine":                                 "docker.io/library/alpine:latest, bare",
		"alpine:3.20":                            "docker.io/library/alpine:3.20",
		"library/alpine":                         "docker.io/library/alpine:latest, bare",
		"docker.io/alpine":                       "docker.io/library/alpine:latest, bare",
		"index.docker.io/org/app:v1":             "docker.io/org/app:v1",
		"org/app:v1":                             "docker.io/org/app:v1",
		"GHCR.io/org/app:V1":                     "ghcr.io/org/app:V1",
		"localhost/app":                          "localhost/app:latest, bare",
		"localhost:5000/app:v1":                  "localhost:5000/app:v1",
		"corp:443/app":                           "wrong: no registry that is listed",
		"corp:5000/app":                          "corp:5000/app:latest, bare",
		"lab.test/team/app@" + sum:               "lab.test/team/app@" + sum,
		"lab.test/team/app:v1@" + sum:            "lab.test/team/app@" + sum,
		sum:                                      sum,
		"@" + sum:                                sum,
		sum[:19]:                                 sum[:19],
		sum[:13]:                                 sum[:13],
		"lab.test/team/app@" + sum[:19]:          "lab.test/team/app@" + sum[:19],
		"sha512:" + strings.Repeat("a", 100):     "sha512:" + strings.Repeat("a", 100),
		"docker.io/library/sha256:0123456789ab":  "docker.io/library/sha256:0123456789ab", // who means such a repository
		"sha256:v1":                              "docker.io/library/sha256:v1",
		sum[:12]:                                 "wrong: at least 6 digits",
		sum + "0":                                "wrong: none of sha256 or sha512",
		"app@sha256:0123456789AB":                "wrong: none of sha256 or sha512",
		"app@md5:0123456789ab":                   "wrong: none of sha256 or sha512",
		"app@":                                   "wrong: none of sha256 or sha512",
		"":                                       "wrong: not a repository name",
		"lab.test/Team":                          "wrong: not a repository name",
		"lab.test/":                              "wrong: missing",
		"https://ghcr.io/org/app":                "wrong: ",
		"app:v1:v2":                              "wrong: ",
		"app: v1":                                "wrong: its tag is none",
		"app\x1b[31m":                            "wrong: not a repository name",
		strings.Repeat("a", maxImageName+1):      "wrong: 1024 is the most",
		"app:" + strings.Repeat("a", 129):        "wrong: its tag is none",
		"lab.test/" + strings.Repeat("a", 256):   "wrong: too long",
		"lab.test/app:v1@sha256:0123456789ab@x":  "wrong: none of sha256 or sha512",
		"lab.test/app:v1@sha256:0123456789abcdg": "wrong: none of sha256 or sha512",
	} {
		n, err := testImages.ParseImage(written)
		got := n.String()
		if n.Bare {
			got += ", bare"
		}
		cause, wrong := strings.CutPrefix(want, "wrong: ")
		if err != nil {
			got = err.Error()
		}
		if (err != nil) != wrong || wrong && (!strings.Contains(got, cause) || strings.Contains(got, "\x1b")) || !wrong && got != want {
			t.Errorf("%.80q: %.300s, want %s", written, got, want)
		}
	}
}

// FuzzImage: what is read is read again from its canonical name.
func FuzzImage(f *testing.F) {
	for _, s := range []string{"alpine", "lab.test/team/app:v1@" + sum, sum[:19], "@" + sum, "a@b@c", "sha256:", "x:y:z", "[::1]:5/a", "A.B/c:D"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := testImages.ParseImage(s)
		if err != nil {
			return
		}
		again, err := testImages.ParseImage(n.String())
		again.Bare = n.Bare // which a canonical name never is
		if err != nil || again != n {
			t.Fatalf("%q is %q, and that %q: %v", s, n, again, err)
		}
		if n.Digest != "" && (n.Tag != "" || n.Prefix != "") || n.Repository.Repository == "" && n.Digest == "" && n.Prefix == "" {
			t.Fatalf("%q is %+v", s, n)
		}
	})
}

func TestAnImageIsAskedForAsTheNodeOnlyWhereItIsShared(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"Basic", "Bearer"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			r, d, _ := withNode(t, scheme, "platform/*")
			r.Image("platform/base", "v1", random(1, 1000))
			img := r.Image("private/app", "v1", random(2, 1000))
			ask := func(name string) (Offered, error) {
				t.Helper()
				n, err := d.proxy.ParseImage(name)
				if err != nil {
					t.Fatal(err)
				}
				return d.proxy.AskImage(t.Context(), n)
			}
			if o, err := ask("lab.test/platform/base:v1"); err != nil || !o.For("linux/amd64") || o.Index {
				t.Errorf("what is shared: %+v, %v", o, err)
			}
			if _, err := ask("lab.test/platform/base:v2"); !errors.Is(err, ErrNoImage) {
				t.Errorf("what is shared, and is not there: %v", err)
			}
			r.Reset()
			if _, err := ask("lab.test/private/app:v1"); err == nil || !strings.Contains(err.Error(), "answers 40") {
				t.Errorf("what is not shared: %v", err)
			}
			if n := asked(r, "node"); n != 0 {
				t.Errorf("%d questions as the node for what is not shared", n)
			}
			// Who may have what is as it was, and nothing has come.
			d.get(manifestPath("private/app", "v1")).must(t, 401)
			if d.has(cache.ListedDomain, img.Manifest) {
				t.Error("asking has stored the manifest")
			}
		})
	}
}
