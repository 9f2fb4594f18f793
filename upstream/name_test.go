// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"errors"
	"strings"
	"testing"
)

func TestNamesBecomeCanonical(t *testing.T) {
	for in, want := range map[string]Name{
		"docker.io": "docker.io", "index.docker.io": "docker.io", "registry-1.docker.io": "docker.io",
		"DOCKER.IO": "docker.io", "docker.io.": "docker.io", "docker.io:443": "docker.io", "Index.Docker.io.:443": "docker.io",
		"ghcr.io": "ghcr.io", "registry.corp:5000": "registry.corp:5000", "localhost": "localhost",
		"10.0.0.1:5000": "10.0.0.1:5000", "[2001:DB8:0::1]:5000": "[2001:db8::1]:5000", "[::1]:443": "[::1]",
	} {
		if got, err := ParseName(in); err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"", ".", "a..b", "a.b..", "-a.b", "a-.b", "a_b", "user@a.b", "a.b/c", "a.b%41", "a b", "a\x00b", "ä.b",
		"\u212aernel.org", // the Kelvin sign, whose lower case is k
		"a.b:", "a.b:0", "a.b:0443", "a.b:65536", "a.b:+1", "a.b:x", "[::1", "::1", "[fe80::1%25eth0]", "[1.2.3.4]", "[::1]x",
		strings.Repeat("a", 64) + ".b", strings.Repeat("a.", 200) + "b"} {
		if got, err := ParseName(in); !errors.Is(err, ErrName) {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for in, want := range map[string]Name{"a.b__5000": "a.b:5000", "a.b_5000_": "a.b:5000", "a.b": "a.b"} {
		if got, err := ParsePathName(in); err != nil || got != want {
			t.Errorf("path %q: %q, %v", in, got, err)
		}
	}
}

// FuzzParseName: a canonical name stays as it is, also through a path.
func FuzzParseName(f *testing.F) {
	for _, s := range []string{"docker.io", "A.b:443", "[::1]:5", "a..b", "x_5_"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseName(s)
		if err != nil {
			return
		}
		if again, err := ParseName(string(n)); err != nil || again != n {
			t.Fatalf("%q: %q, then %q, %v", s, n, again, err)
		}
		if strings.ContainsAny(string(n), "/@%\\ \x00") {
			t.Fatalf("%q: %q", s, n)
		}
		if strings.HasPrefix(string(n), "[") {
			return
		}
		if again, err := ParsePathName(n.Path()); err != nil || again != n {
			t.Fatalf("%q: %q by path %q is %q, %v", s, n, n.Path(), again, err)
		}
	})
}
