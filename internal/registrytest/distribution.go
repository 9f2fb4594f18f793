// SPDX-License-Identifier: Apache-2.0

package registrytest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory" // where the blobs live
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
)

// Distribution is the CNCF registry, in process, with its blobs in memory.
type Distribution struct {
	*httptest.Server

	mu  sync.Mutex
	log []Exchange
}

// NewDistribution starts one on loopback.
func NewDistribution(t testing.TB) *Distribution {
	logrus.SetOutput(io.Discard)
	config := &configuration.Configuration{Version: "0.1"}
	config.Log.Level = "panic"
	config.Log.AccessLog.Disabled = true
	config.Catalog.MaxEntries = 100
	config.Storage = configuration.Storage{
		"inmemory":    configuration.Parameters{},
		"maintenance": configuration.Parameters{"uploadpurging": map[any]any{"enabled": false}},
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	app := handlers.NewApp(ctx, config)
	d := &Distribution{}
	d.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		d.log = append(d.log, Exchange{r.Method, r.URL.Path, r.Header.Get("Range"), r.Header.Get("Authorization")})
		d.mu.Unlock()
		app.ServeHTTP(w, r)
	}))
	t.Cleanup(d.Server.Close)
	return d
}

// Take returns the requests since the last Take.
func (d *Distribution) Take() []Exchange {
	d.mu.Lock()
	defer d.mu.Unlock()
	log := d.log
	d.log = nil
	return log
}

// pushBlob uploads a blob in one request.
func (d *Distribution) pushBlob(t testing.TB, repository string, body []byte) digest.Digest {
	t.Helper()
	dgst := digest.FromBytes(body)
	resp, err := http.Post(d.URL+"/v2/"+repository+"/blobs/uploads/", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	location, err := resp.Location()
	if err != nil {
		t.Fatalf("no upload location: %v (%s)", err, resp.Status)
	}
	q := location.Query()
	q.Set("digest", dgst.String())
	location.RawQuery = q.Encode()
	put(t, location.String(), "application/octet-stream", body)
	return dgst
}

// pushManifest uploads a manifest under a tag.
func (d *Distribution) pushManifest(t testing.TB, repository, tag, mediaType string, body []byte) digest.Digest {
	t.Helper()
	put(t, d.URL+"/v2/"+repository+"/manifests/"+tag, mediaType, body)
	return digest.FromBytes(body)
}

// PushImage uploads an image of one layer.
func (d *Distribution) PushImage(t testing.TB, repository, tag string, layer []byte) (manifest, blob digest.Digest) {
	t.Helper()
	config := []byte(fmt.Sprintf(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"author":%q}`, tag))
	c := d.pushBlob(t, repository, config)
	blob = d.pushBlob(t, repository, layer)
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	body := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},`+
		`"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":%q,"size":%d}]}`,
		manifestType, c, len(config), blob, len(layer))
	return d.pushManifest(t, repository, tag, manifestType, body), blob
}

func put(t testing.TB, url, contentType string, body []byte) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPut, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		why, _ := io.ReadAll(resp.Body)
		t.Fatalf("push: %s: %s", resp.Status, why)
	}
}
