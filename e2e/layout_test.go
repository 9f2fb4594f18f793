// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestTheDirectoryOfAKilledTarnIsAnImageLayout: skopeo reads cached images out of
// it, by tag, and other clients by digest.
func TestTheDirectoryOfAKilledTarnIsAnImageLayout(t *testing.T) {
	newRegistry(t, nil)
	dir := folder(t, work(), "layout")
	tarn := startTarn(t, dir, "")
	images := []image{
		pushSaying(t, "app/one", "v1", "hello", noise("a", 1<<20, 1)),
		pushSaying(t, "app/two", "v1.2.3", "hello", noise("b", 1<<20, 2)),
		pushIndex(t, "team/three", "latest", "hello"),
	}
	for _, i := range images {
		mustRun(t, "skopeo", "--insecure-policy", "copy", "--src-tls-verify=false",
			"docker://"+tarnAddr+"/"+upstreamName+"/"+i.repo+":"+i.tag, "oci:"+t.TempDir()+":x")
	}
	waitFor(t, "the list has them all", func() error {
		data, err := os.ReadFile(filepath.Join(dir, "index.json"))
		if err != nil {
			return err
		}
		for _, i := range images {
			if !strings.Contains(string(data), i.top.Digest.String()) {
				return fmt.Errorf("%s is missing", i.ref())
			}
		}
		return nil
	})
	tarn.kill(t)
	for _, i := range images {
		for _, read := range [][]string{
			{"oras", "manifest", "fetch", "--oci-layout", dir + "@" + i.top.Digest.String()},
			{"regctl", "manifest", "get", "--format", "raw-body", "ocidir://" + dir + "@" + i.top.Digest.String()},
		} {
			if os.Getenv(envAllClients) == "" {
				break
			}
			if out, err := exec.Command(read[0], read[1:]...).Output(); err != nil || digest.FromBytes(out) != i.top.Digest {
				t.Errorf("%v reads %q: %v", read, out, err)
			}
		}
		out := t.TempDir()
		mustRun(t, "skopeo", "--insecure-policy", "copy", "oci:"+dir+":"+i.ref(), "oci:"+out+":x")
		data, err := os.ReadFile(filepath.Join(out, "index.json"))
		var ix v1.Index
		if err == nil {
			err = json.Unmarshal(data, &ix)
		}
		if err != nil || len(ix.Manifests) != 1 {
			t.Fatalf("%s: %v", data, err)
		}
		// Of an index, skopeo takes this platform's manifest.
		want := i.top.Digest
		if i.top.MediaType == v1.MediaTypeImageIndex {
			want = i.objects[1].Digest
		}
		if got := ix.Manifests[0].Digest; got != want {
			t.Errorf("%s is %s, not %s", i.ref(), got, want)
		}
		for _, o := range i.objects[len(i.objects)-2:] {
			body, err := os.ReadFile(filepath.Join(out, "blobs", "sha256", o.Digest.Encoded()))
			if err != nil || digest.FromBytes(body) != o.Digest {
				t.Errorf("%s: %d bytes: %v", o.Digest, len(body), err)
			}
		}
	}
}
