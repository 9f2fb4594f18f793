// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/distribution/distribution/v3/configuration"
)

// node is a machine with a tarn and a containerd that asks it, both empty, and
// the registry that both can reach.
type node struct {
	registry   *registry
	tarn       *process
	tarnDir    string
	containerd *containerd
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{registry: newRegistry(t, nil), tarnDir: folder(t, work(), "tarn")}
	n.tarn = startTarn(t, n.tarnDir, "")
	n.containerd = startContainerd(t)
	return n
}

func (n *node) ctr(namespace string) ctr { return ctr{n.containerd, namespace} }

// newPrivateNode is a node whose registry asks who is there.
func newPrivateNode(t *testing.T, protect configuration.Auth, settings string) *node {
	t.Helper()
	n := &node{registry: newRegistry(t, protect), tarnDir: folder(t, work(), "tarn")}
	n.tarn = startTarn(t, n.tarnDir, settings)
	n.containerd = startContainerd(t)
	return n
}

// restartTarn starts tarn again on the same directory.
func (n *node) restartTarn(t *testing.T) {
	t.Helper()
	n.tarn.stop(t)
	n.tarn = startTarn(t, n.tarnDir, "")
}

func mustPull(t *testing.T, c client, ref string) {
	t.Helper()
	if err := c.pull(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
}

// wantSays runs an image that was pulled.
func wantSays(t *testing.T, c client, ref string, i image) {
	t.Helper()
	out, code := c.run(t, ref)
	if out != i.says+"\n" || code != saysCode {
		t.Errorf("the container of %s wrote %q and ended with code %d, want %q and %d", ref, out, code, i.says+"\n", saysCode)
	}
}

// wantDigest fails the test unless the client has this image under the reference.
func wantDigest(t *testing.T, c client, ref string, i image) {
	t.Helper()
	if got := c.digests(t, ref); !strings.Contains(got, i.top.Digest.String()) {
		t.Errorf("%s is %q in containerd, want %s", ref, got, i.top.Digest)
	}
}

func TestAnImageIsPulledByTagWithOneRequestForEachObjectAndRuns(t *testing.T) {
	eachClient(t, func(t *testing.T, n *node, c client) {
		pushPause(t)
		i := pushSaying(t, "app/hello", "v1", "hello by tag")
		mustPull(t, c, i.ref())
		n.registry.wantRequests(t, "a cold pull by tag", append(i.gets(), i.headTag())...)
		wantDigest(t, c, i.ref(), i)
		wantSays(t, c, i.ref(), i)
	})
}

func TestAnIndexIsPulledByTagAndOnlyThisPlatformIsFetched(t *testing.T) {
	eachClient(t, func(t *testing.T, n *node, c client) {
		pushPause(t)
		i := pushIndex(t, "app/many", "v1", "hello from an index")
		mustPull(t, c, i.ref())
		n.registry.wantRequests(t, "a cold pull of an index", append(i.gets(), i.headTag())...)
		wantDigest(t, c, i.ref(), i)
		wantSays(t, c, i.ref(), i)
	})
}

func TestAnImageIsPulledByDigestAndRuns(t *testing.T) {
	eachClient(t, func(t *testing.T, n *node, c client) {
		pushPause(t)
		i := pushSaying(t, "app/hello", "v1", "hello by digest")
		mustPull(t, c, i.refByDigest())
		n.registry.wantRequests(t, "a cold pull by digest", append(i.gets(), i.headTop())...)
		wantSays(t, c, i.refByDigest(), i)
	})
}

func TestAnUnchangedTagIsPulledAgainWithOneHead(t *testing.T) {
	eachClient(t, func(t *testing.T, n *node, c client) {
		i := pushIndex(t, "app/many", "v1", "hello twice")
		mustPull(t, c, i.ref())
		n.registry.take()
		mustPull(t, c, i.ref())
		n.registry.wantRequests(t, "the second pull", i.headTag())
	})
}

func TestAnImageThatContainerdForgotComesBackFromDisk(t *testing.T) {
	eachClient(t, func(t *testing.T, n *node, c client) {
		pushPause(t)
		i := pushIndex(t, "app/many", "v1", "hello from disk")
		mustPull(t, c, i.ref())
		c.forget(t, i.ref())
		n.registry.take()
		mustPull(t, c, i.ref())
		n.registry.wantFromDisk(t, "a pull into an empty containerd", i)
		wantSays(t, c, i.ref(), i)
	})
}

func TestAMovedTagIsSeenAtOnce(t *testing.T) {
	eachClient(t, func(t *testing.T, n *node, c client) {
		pushPause(t)
		first := pushSaying(t, "app/hello", "v1", "hello before the move")
		mustPull(t, c, first.ref())
		second := pushSaying(t, "app/hello", "v1", "hello after the move")
		n.registry.take()
		mustPull(t, c, second.ref())
		// The layer with the program is in both images.
		n.registry.wantRequests(t, "the pull after the move", append(second.gets()[:2], second.headTag())...)
		wantDigest(t, c, second.ref(), second)
		wantSays(t, c, second.ref(), second)
	})
}

func TestColdPullsOfEightClientsAtOnceFetchEachObjectOnce(t *testing.T) {
	const clients = 8
	n := newNode(t)
	i := pushSaying(t, "app/layers", "v1", "hello in layers",
		noise("one", 3<<20, 1), noise("two", 3<<20, 2), noise("three", 3<<20, 3))

	ended := make(chan error, clients)
	for k := range clients {
		go func() { ended <- n.ctr(fmt.Sprintf("client-%d", k)).pull(t.Context(), i.ref()) }()
	}
	for range clients {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	requests := n.registry.take()
	wantBodyBytes(t, "eight cold pulls", requests, i.objects)
	count := map[string]int{}
	for _, r := range requests {
		if r.route == pastTarn {
			t.Errorf("containerd asked the registry past tarn: %s", r)
		}
		count[r.method+" "+r.path]++
	}
	for _, get := range i.gets() {
		if count[get] != 1 {
			t.Errorf("the registry got %d times %s, want 1", count[get], get)
		}
	}
	if heads := count[i.headTag()]; heads < 1 || heads > clients {
		t.Errorf("the registry got %d times %s, want 1 to %d", heads, i.headTag(), clients)
	}
	t.Logf("%d clients: %d requests for the tag, %d in all", clients, count[i.headTag()], len(requests))
}

func TestAPullGoesAroundAStoppedTarnAndARestartedOneServesFromDisk(t *testing.T) {
	eachClient(t, func(t *testing.T, n *node, c client) {
		i := pushIndex(t, "app/many", "v1", "hello again")
		mustPull(t, c, i.ref())
		c.forget(t, i.ref())

		n.tarn.stop(t)
		n.registry.take()
		mustPull(t, c, i.ref())
		var past []string
		for _, r := range n.registry.take() {
			if r.route == byTarn {
				t.Errorf("a stopped tarn asked the registry: %s", r)
			}
			past = append(past, r.String())
		}
		if len(past) != 1+len(i.objects) {
			t.Errorf("without tarn containerd asked the registry\n\t%s\nwant the tag and %d objects", strings.Join(past, "\n\t"), len(i.objects))
		}

		c.forget(t, i.ref())
		n.restartTarn(t)
		mustPull(t, c, i.ref())
		n.registry.wantFromDisk(t, "a pull from the restarted tarn", i)
	})
}

func TestAPullOutlivesATarnThatIsKilledInTheMiddleOfALayer(t *testing.T) {
	eachClient(t, func(t *testing.T, n *node, c client) {
		pushPause(t)
		i := pushSaying(t, "app/big", "v1", "hello in spite of it", noise("big", 12<<20, 4))
		big := i.objects[len(i.objects)-1]
		brake := n.registry.stopMidway(big.Digest, 6<<20)
		release := func() {
			select {
			case <-brake.release:
			default:
				close(brake.release)
			}
		}
		defer release()

		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		pulled := make(chan error, 1)
		go func() { pulled <- c.pull(ctx, i.ref()) }()
		select {
		case <-brake.reached:
		case err := <-pulled:
			t.Fatalf("the pull ended before tarn was killed: %v", err)
		case <-ctx.Done():
			t.Fatalf("tarn never fetched the layer; the registry was asked %v", n.registry.take())
		}
		n.waitPartOf(t, c, big.Digest.Encoded())

		n.tarn.kill(t)
		release()
		if err := <-pulled; err != nil {
			t.Fatalf("the pull after the kill: %v", err)
		}
		var rest []string
		for _, r := range n.registry.take() {
			if r.route == pastTarn {
				rest = append(rest, r.String())
			}
		}
		if len(rest) == 0 || !strings.Contains(strings.Join(rest, " "), big.Digest.String()+" (bytes=") {
			t.Errorf("past tarn the registry was asked %v, want the rest of %s", rest, big.Digest)
		}
		wantDigest(t, c, i.ref(), i)

		// What the killed one left on its disk must not be in the way.
		c.forget(t, i.ref())
		n.tarn = startTarn(t, n.tarnDir, "")
		mustPull(t, c, i.ref())
		for _, r := range n.registry.take() {
			if r.route == pastTarn {
				t.Errorf("with tarn back, containerd asked the registry past it: %s", r)
			}
		}
		wantSays(t, c, i.ref(), i)
	})
}

// waitPartOf waits until containerd has some bytes of an object and not all:
// from then on it is in the middle of a download.
func (n *node) waitPartOf(t *testing.T, c client, hex string) {
	t.Helper()
	in := n.ctr("k8s.io")
	if own, ok := c.(ctr); ok {
		in = own
	}
	waitFor(t, "containerd has a part of the layer", func() error {
		out, err := in.command(t.Context(), "content", "active")
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) > 2 && strings.Contains(f[0], hex) && !strings.HasPrefix(f[1], "0") {
				return nil
			}
		}
		return fmt.Errorf("active downloads:\n%s", out)
	})
}

// The other tests prove something only if a pull of theirs that should be cold
// is cold: without blobs from the registry it has to fail.
func TestAColdPullFailsWhenTheRegistryRefusesBlobs(t *testing.T) {
	eachClient(t, func(t *testing.T, n *node, c client) {
		i := pushSaying(t, "app/hello", "v1", "never said")
		n.registry.switchBlobsOff(true)
		if err := c.pull(t.Context(), i.ref()); err == nil {
			t.Fatal("the pull succeeded although the registry gave no blob")
		}
		refused := map[route]int{}
		for _, r := range n.registry.take() {
			if strings.Contains(r.path, "/blobs/") && r.status == http.StatusServiceUnavailable {
				refused[r.route]++
			}
		}
		if refused[byTarn] == 0 || refused[pastTarn] == 0 {
			t.Errorf("refused requests for blobs: %v, want some by each route", refused)
		}

		// Nothing of the failure may stay behind.
		n.registry.switchBlobsOff(false)
		mustPull(t, c, i.ref())
	})
}
