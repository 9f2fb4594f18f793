// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"tarn/index"
	"tarn/internal/probe"
	"tarn/internal/registrytest"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestTheProbeIsAnsweredByTarnAlone pulls it as clients do, from a tarn that serves
// listed registries only and has none but one that must not be asked.
func TestTheProbeIsAnsweredByTarnAlone(t *testing.T) {
	hub := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{"docker.io": hub}, listedOnly: true})
	for form, base := range map[string]string{
		"ns":              "/v2/nonce/",
		"ns and the path": "/v2/probe.tarn.invalid/nonce/",
		"path":            "/v2/probe.tarn.invalid/a/b/",
		"prefix":          "/probe.tarn.invalid/v2/nonce/",
	} {
		query := ""
		if strings.HasPrefix(form, "ns") {
			query = "?ns=" + probe.Registry
		}
		fetch := func(method, path string) answer { return d.do(method, base+path+query) }
		head := fetch("HEAD", "manifests/1").must(t, 200).header
		named := head.Get("Docker-Content-Digest")
		if head.Get("Content-Length") == "" || head.Get("Content-Type") != v1.MediaTypeImageIndex {
			t.Fatalf("%s: HEAD: %v", form, head)
		}
		body := fetch("GET", "manifests/"+named).must(t, 200).body
		var index v1.Index
		if err := json.Unmarshal(body, &index); err != nil || digest.FromBytes(body).String() != named {
			t.Fatalf("%s: the index: %v, %s", form, err, body)
		}
		for _, m := range index.Manifests {
			body := fetch("GET", "manifests/"+m.Digest.String()).must(t, 200).body
			var manifest v1.Manifest
			if err := json.Unmarshal(body, &manifest); err != nil {
				t.Fatalf("%s: %v, %s", form, err, body)
			}
			for _, blob := range append(manifest.Layers, manifest.Config) {
				if body := fetch("GET", "blobs/"+blob.Digest.String()).must(t, 200).body; digest.FromBytes(body) != blob.Digest {
					t.Errorf("%s: blob %s is another", form, blob.Digest)
				}
			}
		}
		for _, path := range []string{"tags/list", "referrers/" + named, "blobs/" + digest.FromString("another").String()} {
			fetch("GET", path).must(t, 404)
		}
	}
	if n := hub.Count("", ""); n != 0 {
		t.Errorf("the registry was asked %d times", n)
	}
	if counts := d.cache.Index().Counts(); counts != (index.Counts{}) {
		t.Errorf("something is stored: %+v", counts)
	}
	families, err := d.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "tarn_requests_total" {
			t.Errorf("requests are counted: %v", f)
		}
	}
	if last := d.proxy.metrics.LastRequests(); len(last) != 0 {
		t.Errorf("they count as clients': %+v", last)
	}
}

func TestEachClientIsKnownByItsUserAgent(t *testing.T) {
	hub := registrytest.New(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{"docker.io": hub}})
	for agent, want := range map[string]string{
		"containerd/2.4.2+unknown":                        "containerd",
		"cri-o/1.30.0 go/go1.22":                          "cri-o",
		"docker/26.1.5 go/go1.21":                         "docker",
		"libpod/4.3.1":                                    "podman",
		"Buildah/1.28.2":                                  "podman",
		"containers/5.34.2 (github.com/containers/image)": "podman",
		"buildkit/v0.17":                                  "buildkit",
		"curl/7.88.1":                                     "other",
		"not-containerd/1":                                "other",
		"":                                                "other",
		"containerd":                                      "other",
		"CONTAINERD/2.4.2 ":                               "containerd",
	} {
		before := time.Now()
		d.head("/v2/library/alpine/manifests/latest", "User-Agent", agent).must(t, 404)
		last := d.proxy.metrics.LastRequests()
		if len(last) == 0 || last[0].Client != want || last[0].At.Before(before.Truncate(time.Millisecond)) {
			t.Errorf("%q counts as %+v, not as %s", agent, last, want)
		}
	}
}

// TestNobodyListsTheProbe: whoever did would have all that it is asked for answered with
// tarn's own image, or wonder why none of its settings is used.
func TestNobodyListsTheProbe(t *testing.T) {
	for _, listed := range []bool{true, false} {
		var o upstream.Options
		if listed {
			o.Listed = []upstream.Config{{Name: probeName}}
		}
		client, err := upstream.New(o)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		if _, err := New(Options{Upstreams: client, DefaultUpstream: probeName}); err == nil || !strings.Contains(err.Error(), "tarn answers for it") {
			t.Errorf("listed %v: %v", listed, err)
		}
		if !listed {
			continue
		}
		if _, err := New(Options{Upstreams: client}); err == nil || !strings.Contains(err.Error(), "tarn answers for it") {
			t.Errorf("listed: %v", err)
		}
	}
}
