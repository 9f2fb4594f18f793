// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"tarn/e2e/cri"

	"github.com/distribution/distribution/v3/configuration"
)

// pullAs pulls with a credential as the kubelet sends it: without the address
// of a server, or containerd would show it to no mirror.
func (c *criClient) pullAs(t *testing.T, ref string, auth *cri.Auth) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := c.client.PullImage(ctx, ref, auth)
	return err
}

// eachScheme runs a test against a registry that checks passwords itself, and
// one that has a token service.
func eachScheme(t *testing.T, test func(t *testing.T, protect configuration.Auth, service *tokenService)) {
	t.Run("Basic", func(t *testing.T) { test(t, basicAuth(t), nil) })
	t.Run("Bearer", func(t *testing.T) {
		service, protect := bearerAuth(t)
		test(t, protect, service)
	})
}

func TestAPrivateImageIsServedOnlyToWhoMayHaveIt(t *testing.T) {
	eachScheme(t, func(t *testing.T, protect configuration.Auth, service *tokenService) {
		n := newPrivateNode(t, protect, "")
		c := &criClient{n.containerd, n.containerd.dialCRI(t)}
		wire := tapTarn(t)
		n.containerd.mirror(t, wireAddr)
		i := pushSaying(t, "team/secret", "v1", "a secret")
		right := &cri.Auth{Username: user, Password: password}
		strangers := map[string]*cri.Auth{
			"nobody":                          nil,
			"a wrong password":                {Username: user, Password: "guess"},
			"another user":                    {Username: stranger, Password: password},
			"a user whom nobody knows":        {Username: "mallory", Password: password},
			"the server's address, as docker": {Username: user, Password: "guess", ServerAddress: upstreamName},
		}
		refuse := func(state string) {
			t.Helper()
			for who, auth := range strangers {
				if err := c.pullAs(t, i.ref(), auth); err == nil {
					t.Errorf("%s: %s pulled the private image", state, who)
					c.forget(t, i.ref())
				}
			}
		}
		refuse("cold")
		n.registry.take()
		if err := c.pullAs(t, i.ref(), right); err != nil {
			t.Fatal(err)
		}
		served := map[string]int{}
		for _, r := range n.registry.take() {
			if r.route == pastTarn {
				t.Errorf("cold: containerd asked the registry past tarn: %s (%d)", r, r.status)
			}
			if r.method == http.MethodGet && r.status < 300 {
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
		refuse("warm")
		for form, auth := range map[string]*cri.Auth{
			"name and password": right,
			"both in one":       {Auth: base64.StdEncoding.EncodeToString([]byte(user + ":" + password))},
		} {
			n.registry.take()
			if err := c.pullAs(t, i.ref(), auth); err != nil {
				t.Fatalf("%s: who may have the image did not get it from tarn's disk: %v", form, err)
			}
			requests := n.registry.take()
			most := 2 // the 401 and the tag
			if service != nil {
				most = 4 // containerd's two tokens cost a 401 and a yes each
			}
			var seen []string
			for _, r := range requests {
				seen = append(seen, fmt.Sprintf("%s (%d, %s)", r, r.status, r.route))
				if r.route == pastTarn || r.method == http.MethodGet && strings.Contains(r.path, "team/") {
					t.Errorf("%s: not from tarn's disk: %s (%d, %s)", form, r, r.status, r.route)
				}
			}
			if len(requests) > most {
				t.Errorf("%s: %d requests, want %d at most:\n\t%s", form, len(requests), most, strings.Join(seen, "\n\t"))
			}
			t.Logf("warm, %s: %d requests", form, len(requests))
			wantDigest(t, c, i.ref(), i)
			c.forget(t, i.ref())
		}

		if service == nil {
			if !wire.has(user, password) {
				t.Error("the record of what clients send lacks what it must have")
			}
			return
		}
		if !service.sawPassword() {
			t.Error("the token service never saw the password")
		}
		if wire.has(user, password) || wire.has(stranger, password) {
			t.Error("the long-lived password came to tarn")
		}
	})
}

// TestALayerInPartsIsFinishedAfterTheRightRanOut: containerd fetches a layer in
// parallel ranges, and has nowhere else to go after the first. In the middle
// the grant ends, and the registry believes no token any more.
func TestALayerInPartsIsFinishedAfterTheRightRanOut(t *testing.T) {
	eachScheme(t, func(t *testing.T, protect configuration.Auth, _ *tokenService) {
		const part = 1 << 20
		n := &node{registry: newRegistry(t, protect), tarnDir: folder(t, work(), "tarn")}
		n.tarn = startTarn(t, n.tarnDir, "defaults:\n  grant_ttl: 1ms\n")
		n.containerd = startContainerdWith(t, part)
		wire := tapTarn(t)
		n.containerd.mirror(t, wireAddr)
		c := &criClient{n.containerd, n.containerd.dialCRI(t)}
		i := pushSaying(t, "team/big", "v1", "in parts", noise("big", 12*part, 4))
		big := i.objects[len(i.objects)-1]
		brake := n.registry.stopMidway(big.Digest, 6*part)
		ended := make(chan error, 1)
		go func() { ended <- c.pullAs(t, i.ref(), &cri.Auth{Username: user, Password: password}) }()
		select {
		case <-brake.reached:
		case err := <-ended:
			t.Fatalf("the pull ended early: %v; the registry was asked %v", err, n.registry.take())
		case <-time.After(patience):
			t.Fatalf("tarn never fetched the layer: %v", n.registry.take())
		}
		n.waitPartOf(t, c, big.Digest.Encoded())
		n.registry.refuseAll()
		before := wire.count("\r\nRange: bytes=")
		close(brake.release)
		if err := <-ended; err != nil {
			t.Fatalf("the pull after the right ran out: %v", err)
		}
		asked := 0
		for _, r := range n.registry.take() {
			if strings.HasSuffix(r.path, big.Digest.String()) {
				asked++
				if r.route == pastTarn {
					t.Errorf("containerd went around tarn: %s", r)
				}
			}
		}
		after := wire.count("\r\nRange: bytes=") - before
		if after < 1 {
			t.Error("all ranges were asked for before the right ran out, so this proves nothing")
		}
		t.Logf("ranges before the right ran out: %d, after: %d; for the layer the registry was asked %d times", before, after, asked)
		wantDigest(t, c, i.ref(), i)
	})
}
