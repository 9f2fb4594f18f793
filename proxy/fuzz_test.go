// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"tarn/upstream"

	"github.com/distribution/reference"
)

// FuzzRange: what is taken for the middle of an object is never served from its
// beginning, and what is honoured begins where it was said to.
func FuzzRange(f *testing.F) {
	for _, seed := range []string{"bytes=0-", "bytes=5-", "bytes=-5", "bytes=5-9", "bytes=1-1,0-", "bytes= 5-", "bytes=+5-", "lines=5-", "bytes=5-\t", "bytes=05-"} {
		f.Add(seed, "", int64(100))
	}
	f.Add("bytes=5-", `"x"`, int64(10))
	f.Fuzz(func(t *testing.T, header, ifRange string, size int64) {
		size = max(0, min(size, 1000))
		r := httptest.NewRequest("GET", "/", nil)
		r.Header["Range"] = []string{header}
		if ifRange != "" {
			r.Header["If-Range"] = []string{ifRange}
		}
		want := parseRange(r)
		body := make([]byte, size)
		for i := range body {
			body[i] = byte(min(i, 255))
		}
		w := httptest.NewRecorder()
		http.ServeContent(w, r, "", noTime, bytes.NewReader(body))
		got := w.Body.Bytes()
		if (w.Code == 200 || w.Code == 206) && want.resumes && len(got) > 0 && got[0] == 0 {
			t.Fatalf("%q, If-Range %q: taken for the middle, served %d from byte 0", header, ifRange, w.Code)
		}
		if w.Code == 206 && !strings.HasPrefix(header, "bytes=-") && int(got[0]) != int(min(want.first, 255)) {
			t.Fatalf("%q: begins at %d, said %d", header, got[0], want.first)
		}
		if want.first < 0 || want.length < 0 {
			t.Fatalf("%q: first %d, length %d", header, want.first, want.length)
		}
		if w.Code == 206 && want.length > 0 && int64(len(got)) > want.length && !strings.HasPrefix(header, "bytes=-") {
			t.Fatalf("%q: %d bytes, said %d", header, len(got), want.length)
		}
	})
}

// FuzzScopes: all scopes of a token request are pulls from one registry, whose
// repositories have legal names.
func FuzzScopes(f *testing.F) {
	for _, seed := range []string{
		"repository:ghcr.io/org/app:pull", "repository:lab.test/a:pull repository:lab.test/b:pull,pull", "repository:host__5000/a:pull",
		"repository:127.0.0.1:5000/a:pull", "repository:a:push", "registry:catalog:*", "repository:ghcr.io/../a:pull", "::", "repository::pull",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, scope string) {
		name, repositories, err := testNames.parseScopes("", strings.Fields(scope))
		if err != nil {
			return
		}
		if name != "" && len(repositories) == 0 {
			t.Fatalf("%q: %q %q", scope, name, repositories)
		}
		for _, r := range repositories {
			if !reference.NameRegexp.MatchString(r) || strings.ContainsAny(r, ": ") {
				t.Fatalf("%q: repository %q", scope, r)
			}
		}
		if again, err := upstream.ParseName(string(name)); name != "" && (err != nil || again != name) {
			t.Fatalf("%q: upstream %q", scope, name)
		}
		if strings.Contains(scope, "push") && !strings.Contains(strings.ReplaceAll(scope, ":push", ""), "push") {
			t.Fatalf("%q: push", scope)
		}
	})
}

// FuzzTokenEnd: whatever a token is, its end is a time after the epoch.

// FuzzWithoutMarker: the broker's marker is nobody's credential, however it is
// written.
func FuzzWithoutMarker(f *testing.F) {
	f.Add("Bearer " + markerToken)
	f.Add("bearer  " + markerToken + " ")
	f.Fuzz(func(t *testing.T, header string) {
		if marked := withoutMarker(header); strings.Contains(marked, " "+markerToken) && strings.TrimSpace(marked[strings.Index(marked, " "):]) == markerToken && strings.EqualFold(strings.SplitN(marked, " ", 2)[0], "bearer") {
			t.Fatalf("%q: the marker is kept", header)
		}
	})
}
