// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"encoding/base64"
	"net/http"
	"testing"

	"tarn/e2e/cri"
)

func TestAPrivateImageOnDiskIsServedOnlyToWhoMayHaveIt(t *testing.T) {
	n := newNode(t)
	c := &criClient{n.containerd, n.containerd.dialCRI(t)}
	i := pushSaying(t, "team/secret", "v1", "a secret")
	n.registry.lock("s3cret")
	right := &cri.Auth{Username: "lab", Password: "s3cret"}
	pull := func(auth *cri.Auth) error {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err := c.client.PullImage(ctx, i.ref(), auth)
		return err
	}

	if err := pull(nil); err == nil {
		t.Error("a stranger pulled the private image that no one had asked for yet")
	}
	n.registry.take()
	if err := pull(right); err != nil {
		t.Fatal(err)
	}
	served := map[string]int{}
	for _, r := range n.registry.take() {
		if r.route == byTarn && r.method == http.MethodGet && r.status == http.StatusOK {
			served[r.method+" "+r.path]++
		}
	}
	for _, get := range i.gets() {
		if served[get] != 1 {
			t.Errorf("the registry answered %d times %s by tarn, want 1", served[get], get)
		}
	}

	// From here on tarn has every byte.
	c.forget(t, i.ref())
	for _, stranger := range []struct {
		what string
		auth *cri.Auth
	}{
		{"nobody", nil},
		{"a wrong password", &cri.Auth{Username: "lab", Password: "guess"}},
		{"another user", &cri.Auth{Username: "eve", Password: "s3cret"}},
	} {
		if err := pull(stranger.auth); err == nil {
			t.Errorf("%s pulled the private image from tarn's disk", stranger.what)
			c.forget(t, i.ref())
		}
	}
	n.registry.take()

	// The same credential in the interface's other form.
	if err := pull(&cri.Auth{Auth: base64.StdEncoding.EncodeToString([]byte("lab:s3cret"))}); err != nil {
		t.Fatalf("who may have the image did not get it from tarn's disk: %v", err)
	}
	for _, r := range n.registry.take() {
		if r.route == pastTarn || r.method == http.MethodGet {
			t.Errorf("the image was not served from tarn's disk: the registry got %s %s, answered %d", r.route, r, r.status)
		}
	}
	wantDigest(t, c, i.ref(), i)
}
