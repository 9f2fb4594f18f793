// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// saysCode is the exit code of the images that say something: not one that a
// container has by accident.
const saysCode = 7

// image is what a test pushed.
type image struct {
	repo, tag string
	says      string
	top       v1.Descriptor   // the manifest, or the index
	objects   []v1.Descriptor // all that a node of this platform fetches, top first
}

// ref is the image by tag, as a user writes it.
func (i image) ref() string { return upstreamName + "/" + i.repo + ":" + i.tag }

// refByDigest is the image by digest.
func (i image) refByDigest() string {
	return upstreamName + "/" + i.repo + "@" + i.top.Digest.String()
}

// headTag is the request that asks what the tag means.
func (i image) headTag() string { return "HEAD " + i.repo + "/manifests/" + i.tag }

// headTop is the request that asks for the image's digest.
func (i image) headTop() string { return "HEAD " + i.repo + "/manifests/" + i.top.Digest.String() }

// gets are the requests that fetch each object once.
func (i image) gets() []string {
	var out []string
	for _, o := range i.objects {
		kind := "blobs"
		if o.MediaType == v1.MediaTypeImageManifest || o.MediaType == v1.MediaTypeImageIndex {
			kind = "manifests"
		}
		out = append(out, "GET "+i.repo+"/"+kind+"/"+o.Digest.String())
	}
	return out
}

// file is the only file of a layer.
type file struct {
	name    string
	content []byte
}

// program is the static program that the images run.
func program(t *testing.T) file {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(work(), "program"))
	if err != nil {
		t.Fatal(err)
	}
	return file{"program", b}
}

// noise is a file that no compression makes smaller. The same seed gives the
// same bytes, so that a failure can be seen again.
func noise(name string, size int, seed byte) file {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return file{name, b}
}

// pushSaying pushes an image that prints a message and exits with saysCode. Its
// layers are the program and the further files.
func pushSaying(t *testing.T, repo, tag, message string, more ...file) image {
	t.Helper()
	i := pushManifest(t, repo, runtime.GOARCH, []string{"say", message, strconv.Itoa(saysCode)}, append([]file{program(t)}, more...)...)
	i.tag, i.says = tag, message
	pushTag(t, i)
	return i
}

// pushPause pushes the image that holds a pod's namespaces.
func pushPause(t *testing.T) {
	t.Helper()
	i := pushManifest(t, "pause", runtime.GOARCH, []string{"pause"}, program(t))
	i.tag = "1"
	pushTag(t, i)
}

// pushIndex pushes an index of two images: one for this platform, and one for
// another, whose layer no node of this platform must fetch.
func pushIndex(t *testing.T, repo, tag, message string) image {
	t.Helper()
	foreign := "s390x"
	if runtime.GOARCH == foreign {
		foreign = "riscv64"
	}
	own := pushSaying(t, repo, tag+"-own", message)
	other := pushManifest(t, repo, foreign, []string{"say", "wrong platform", "1"}, noise("other", 1<<10, 9))
	list := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	// The other platform comes first: taking the first would be wrong.
	for _, m := range []struct {
		desc v1.Descriptor
		arch string
	}{{other.top, foreign}, {own.top, runtime.GOARCH}} {
		m.desc.Platform = &v1.Platform{OS: "linux", Architecture: m.arch}
		list.Manifests = append(list.Manifests, m.desc)
	}
	i := image{repo: repo, tag: tag, says: message}
	i.top = pushJSON(t, repo, v1.MediaTypeImageIndex, list)
	i.objects = append([]v1.Descriptor{i.top}, own.objects...)
	pushTag(t, i)
	return i
}

// pushManifest pushes the layers, the config and the manifest of an image for
// one platform, under no tag.
func pushManifest(t *testing.T, repo, arch string, args []string, files ...file) image {
	t.Helper()
	config := v1.Image{
		Platform: v1.Platform{OS: "linux", Architecture: arch},
		Config:   v1.ImageConfig{Entrypoint: []string{"/program"}, Cmd: args},
		RootFS:   v1.RootFS{Type: "layers"},
	}
	manifest := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
	for _, f := range files {
		layer, diffID := f.layer(t)
		desc := v1.Descriptor{MediaType: v1.MediaTypeImageLayerGzip, Digest: digest.FromBytes(layer), Size: int64(len(layer))}
		push(t, repository(t, repo), desc, layer)
		manifest.Layers = append(manifest.Layers, desc)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	}
	manifest.Config = pushJSON(t, repo, v1.MediaTypeImageConfig, config)
	top := pushJSON(t, repo, v1.MediaTypeImageManifest, manifest)
	return image{repo: repo, top: top, objects: append([]v1.Descriptor{top, manifest.Config}, manifest.Layers...)}
}

// layer packs the file, and says what the packed layer is called once unpacked.
func (f file) layer(t *testing.T) (packed []byte, diffID digest.Digest) {
	t.Helper()
	var plain, zipped bytes.Buffer
	tw := tar.NewWriter(&plain)
	if err := tw.WriteHeader(&tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.content))}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(f.content); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	diffID = digest.FromBytes(plain.Bytes())
	zw := gzip.NewWriter(&zipped)
	if _, err := plain.WriteTo(zw); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return zipped.Bytes(), diffID
}

func pushJSON(t *testing.T, repo, mediaType string, value any) v1.Descriptor {
	t.Helper()
	b, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	desc := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	push(t, repository(t, repo), desc, b)
	return desc
}

// pushTag points the image's tag at it, wherever it pointed before.
func pushTag(t *testing.T, i image) {
	t.Helper()
	if err := repository(t, i.repo).Tag(t.Context(), i.top, i.tag); err != nil {
		t.Fatalf("tag %s: %v", i.ref(), err)
	}
}
