// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"tarn/internal/registrytest"

	"github.com/opencontainers/go-digest"
)

const lab Name = "lab.test"

func endpoint(r *registrytest.Registry) Endpoint { return Endpoint{URL: r.Endpoint()} }

func listed(t *testing.T, endpoints ...Endpoint) *Registry {
	t.Helper()
	c, err := New(Options{
		Listed:  []Config{{Name: lab, Endpoints: endpoints}},
		Connect: registrytest.Loopback(t),
		Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			return nil, fmt.Errorf("a test looked up %s", host)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c.Registry(lab)
}

func blobRequest(method string, d digest.Digest) Request {
	return Request{Method: method, Repository: "app", Kind: Blob, Reference: d.String()}
}

func read(t *testing.T, resp *Response, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestOneEndpointIsAskedAndNoOther(t *testing.T) {
	authority, mirror := registrytest.New(t), registrytest.New(t)
	d := mirror.Blob("app", []byte("bytes"))
	r := listed(t, endpoint(authority), endpoint(mirror))
	req := blobRequest("GET", d)
	status := 0
	refuse := func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(status); return true }
	authority.Hook = refuse
	var refused *StatusError
	for _, status = range []int{401, 403, 404, 429, 500, 503} {
		req.Authorization = fmt.Sprintf("Basic %d", status) // a 429 stands for a while
		if _, err := r.Do(t.Context(), req); !errors.As(err, &refused) || refused.Status != status || len(mirror.Exchanges()) != 0 {
			t.Errorf("%d: %v, the other endpoint saw %v", status, err, mirror.Exchanges())
		}
	}
	authority.Reset()
	req.Endpoint = 1
	resp, err := r.Do(t.Context(), req)
	if got := read(t, resp, err); got != "bytes" || resp.Authority || len(authority.Exchanges()) != 0 {
		t.Errorf("%q, the authority's word: %v, and it saw %v", got, resp.Authority, authority.Exchanges())
	}
	mirror.Hook = refuse
	status = 404
	if _, err := r.Do(t.Context(), req); !errors.As(err, &refused) || refused.Status != 404 || len(authority.Exchanges()) != 0 {
		t.Errorf("%v, the authority saw %v", err, authority.Exchanges())
	}
	// A tag is the authority's alone, even when it is dead.
	authority.Close()
	mirror.Reset()
	tag := Request{Method: "HEAD", Repository: "app", Kind: Manifest, Reference: "v1"}
	if _, err := r.Do(t.Context(), tag); !errors.Is(err, ErrUnreachable) {
		t.Errorf("a tag of a dead authority: %v", err)
	}
	tag.Endpoint = 1
	if _, err := r.Do(t.Context(), tag); !errors.Is(err, ErrProtocol) || len(mirror.Exchanges()) != 0 {
		t.Errorf("a tag of another endpoint: %v, it saw %v", err, mirror.Exchanges())
	}
}

func TestOnlyATrustedEndpointSeesTheCredential(t *testing.T) {
	authority := registrytest.New(t)
	for _, trusted := range []bool{false, true} {
		mirror := registrytest.New(t)
		d := mirror.Blob("app", []byte("bytes"))
		r := listed(t, endpoint(authority), Endpoint{URL: mirror.Endpoint(), Trusted: trusted})
		req := blobRequest("GET", d)
		req.Endpoint, req.Authorization = 1, "Basic c2VjcmV0"
		resp, err := r.Do(t.Context(), req)
		read(t, resp, err)
		if saw := mirror.Exchanges()[0].Authorization != ""; saw != trusted || r.Trusts(1) != trusted || !r.Trusts(0) {
			t.Errorf("trusted: %v, it saw the credential: %v", trusted, saw)
		}
	}
}

func TestRangesAreStrict(t *testing.T) {
	up := registrytest.New(t)
	d := up.Blob("app", []byte("0123456789"))
	r := listed(t, endpoint(up))
	req := blobRequest("GET", d)
	req.Offset = 4
	resp, err := r.Do(t.Context(), req)
	if got := read(t, resp, err); got != "456789" || resp.Offset != 4 || resp.Size != 10 {
		t.Errorf("%q from %d of %d", got, resp.Offset, resp.Size)
	}
	up.NoRange = true
	resp, err = r.Do(t.Context(), req)
	if got := read(t, resp, err); got != "0123456789" || resp.Offset != 0 || resp.Size != 10 {
		t.Errorf("without ranges: %q from %d of %d", got, resp.Offset, resp.Size)
	}
	part := req
	part.Length = 3
	resp, err = r.Do(t.Context(), part)
	if got := read(t, resp, err); got != "0123456789" || resp.Offset != 0 || resp.End != 10 {
		t.Errorf("without ranges: %q to %d", got, resp.End)
	}
	up.NoRange = false
	for _, c := range []struct {
		off, n int64
		want   string
	}{{4, 3, "456"}, {0, 3, "012"}, {8, 3, "89"}, {0, 10, "0123456789"}, {0, 99, "0123456789"}} {
		part.Offset, part.Length = c.off, c.n
		resp, err := r.Do(t.Context(), part)
		if got := read(t, resp, err); got != c.want || resp.Offset != c.off || resp.End != c.off+int64(len(got)) || resp.Size != 10 {
			t.Errorf("%d from %d: %q from %d to %d of %d", c.n, c.off, got, resp.Offset, resp.End, resp.Size)
		}
	}
	part.Offset = 10
	if _, err := r.Do(t.Context(), part); !errors.Is(err, ErrRange) {
		t.Errorf("past the end: %v", err)
	}
	part.Offset, part.Length = 4, 3
	up.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Range", "bytes 4-9/10") // more than was asked for
		w.WriteHeader(206)
		io.WriteString(w, "456789")
		return true
	}
	if _, err := r.Do(t.Context(), part); !errors.Is(err, ErrRange) {
		t.Error(err)
	}
	for _, header := range []string{"bytes 3-9/10", "bytes 4-8/10", "bytes 4-9/11", "bytes 4-9/*", ""} {
		up.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Range", header)
			w.WriteHeader(206)
			io.WriteString(w, "456789")
			return true
		}
		if _, err := r.Do(t.Context(), req); !errors.Is(err, ErrRange) {
			t.Errorf("%q: %v", header, err)
		}
	}
	up.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Encoding", "gzip")
		return false
	}
	resp, err = r.Do(t.Context(), req)
	if got := read(t, resp, err); got != "456789" || resp.Encoding != "gzip" || !r.Has(Labelled) {
		t.Errorf("a label that nobody asked for: %q, %q", got, resp.Encoding)
	}
	for _, e := range up.Exchanges() {
		if e.Method != "GET" {
			t.Errorf("%v", e)
		}
	}
}

func TestAChallengeIsTakenFromTheBaseWhereTheAnswerHasNone(t *testing.T) {
	up := registrytest.New(t)
	up.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		if req.URL.Path == "/v2/" {
			w.Header().Set("WWW-Authenticate", `Basic realm="base"`)
		}
		w.WriteHeader(401)
		return true
	}
	_, err := listed(t, endpoint(up)).Do(t.Context(), Request{Method: "HEAD", Repository: "app", Kind: Manifest, Reference: "v1"})
	var refused *StatusError
	if !errors.As(err, &refused) || len(refused.Challenge) != 1 || refused.Challenge[0] != `Basic realm="base"` {
		t.Fatalf("%v", err)
	}
}

func TestErrorsCarryNoURL(t *testing.T) {
	up := registrytest.New(t)
	up.Hook = func(w http.ResponseWriter, req *http.Request) bool {
		http.Redirect(w, req, "http://127.0.0.1:1/x?signature=secret", http.StatusTemporaryRedirect)
		return true
	}
	_, err := listed(t, endpoint(up)).Do(t.Context(), blobRequest("GET", digest.FromString("x")))
	if err == nil || !errors.Is(err, ErrUnreachable) {
		t.Fatal(err)
	}
	for _, word := range []string{"signature", "secret", "/x"} {
		if text := err.Error(); strings.Contains(text, word) {
			t.Errorf("%s", text)
		}
	}
}

func TestHeadersThatDoNotComeEndInTime(t *testing.T) {
	up := registrytest.New(t)
	up.Hook = func(_ http.ResponseWriter, req *http.Request) bool {
		<-req.Context().Done()
		return true
	}
	r := listed(t, endpoint(up))
	r.headTimeout = time.Millisecond
	for _, method := range []string{"HEAD", "GET"} {
		if _, err := r.Do(t.Context(), blobRequest(method, digest.FromString("x"))); !errors.Is(err, ErrTimeout) {
			t.Errorf("%s: %v", method, err)
		}
	}
	r.headTimeout = 2 * time.Second // for which a late answer is listened to, too
	req := blobRequest("GET", digest.FromString("x"))
	req.Budget = time.Millisecond
	if _, err := r.Do(t.Context(), req); !errors.Is(err, ErrTimeout) {
		t.Errorf("within its budget: %v", err)
	}
}

// silentBody brings nothing until its context ends.
type silentBody struct{ ctx context.Context }

func (b silentBody) Read([]byte) (int, error) { <-b.ctx.Done(); return 0, b.ctx.Err() }
func (silentBody) Close() error               { return nil }

func TestABodyThatBringsNothingEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, deadline := withHeaderDeadline(t.Context(), DefaultHeadTimeout)
		body := deadline.arrived(silentBody{ctx})
		time.Sleep(time.Hour) // the bubble's clock; the reader's own time does not count
		start := time.Now()
		if _, err := body.Read(make([]byte, 1)); !errors.Is(err, ErrTimeout) || time.Since(start) != bodyIdle {
			t.Errorf("%v after %s", err, time.Since(start))
		}
		body.Close()
	})
}
