// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"net/http"
	"strings"
	"testing"
)

func TestChallengesLoseTheirErrorOnly(t *testing.T) {
	for in, want := range map[string]string{
		`Bearer realm="https://a/token",service="s",scope="repository:x:pull",error="invalid_token"`: `Bearer realm="https://a/token",service="s",scope="repository:x:pull"`,
		`Bearer error="invalid_token", error_description="a, \"b\"",realm="https://a/token"`:         `Bearer realm="https://a/token"`,
		`Basic realm="error=1"`:           `Basic realm="error=1"`,
		`Basic realm="x", charset=UTF-8`:  `Basic realm="x", charset=UTF-8`,
		`Bearer realm="https://a/?error"`: `Bearer realm="https://a/?error"`,
	} {
		got := cleanChallenges(http.Header{"Www-Authenticate": {in}})
		if len(got) != 1 || got[0] != want {
			t.Errorf("%s:\n got %q\nwant %q", in, got, want)
		}
	}
}

func TestBearerChallenges(t *testing.T) {
	p, ok := bearerChallenge([]string{`Basic realm="x"`, `bearer realm="https://a/t?x=1,2" , service=s,scope="repository:a/b:pull,push"`})
	if !ok || p["realm"] != "https://a/t?x=1,2" || p["service"] != "s" || p["scope"] != "repository:a/b:pull,push" {
		t.Fatalf("%v %v", p, ok)
	}
	if _, ok := bearerChallenge([]string{`Basic realm="x"`, `Bearer service="s"`}); ok {
		t.Fatal("a challenge without a realm")
	}
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-1/2", "bytes 5-5/6", "bytes */6", "bytes 1-0/2", "bytes 0-1/*", "bytes +0-1/2", "bytes 0-9223372036854775807/9223372036854775807"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, size, err := parseContentRange(s)
		if err == nil && (first < 0 || first > last || last >= size) {
			t.Fatalf("%q: %d-%d/%d", s, first, last, size)
		}
	})
}

func FuzzAuthParams(f *testing.F) {
	f.Add(`realm="https://a",service=x`)
	f.Add(`a="\"`)
	f.Fuzz(func(t *testing.T, s string) {
		for k := range authParams(s) {
			if strings.ContainsAny(k, " \t") {
				t.Fatalf("%q: key %q", s, k)
			}
		}
		for _, c := range cleanChallenges(http.Header{"Www-Authenticate": {"Bearer " + s}}) {
			if strings.TrimSpace(c) == "" {
				t.Fatalf("%q: an empty challenge", s)
			}
		}
	})
}
