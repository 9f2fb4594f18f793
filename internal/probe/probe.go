// SPDX-License-Identifier: Apache-2.0

// Package probe is an image of some KB that tarn answers for itself, so that who
// pulls it knows that the pull went through tarn: nobody else can answer for a name
// under .invalid, which no resolver has (RFC 6761 6.4).
//
// The image is the same under every repository and tag of Registry. It runs on Linux,
// as nobody and with a read-only root, and ends with status 0. It is made in memory
// when it is asked for first, and is the same in every process of one version of
// tarn: nothing of it is stored.
package probe

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"sync"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Registry is the name of the registry that there is not.
const Registry = "probe.tarn.invalid"

// CacheStatus is the header of each answer with something of the image (RFC 9211),
// by which tarn is told from another server.
const CacheStatus = "tarn; fwd=bypass; detail=probe"

// InstanceHeader is the header of the same answers that says which tarn gives them: the
// Instance of what TARN_INSTANCE is there, where that is set.
const InstanceHeader = "Tarn-Instance"

// Instance is a name that everybody on the node may know of one that only who started
// tarn should, such as the UID of its pod. That of "" is "".
func Instance(name string) string {
	if name == "" {
		return ""
	}
	return digest.FromString("tarn instance " + name).Encoded()[:32]
}

// Object is a manifest or blob of the image.
type Object struct {
	MediaType string
	Digest    digest.Digest
	Content   []byte
}

// Index is what each tag means: the image for all its platforms.
func Index() Object { return image().index }

// Find returns the object with that digest.
func Find(d digest.Digest) (o Object, ok bool) {
	o, ok = image().objects[d]
	return o, ok
}

type built struct {
	index   Object
	objects map[digest.Digest]Object
}

var image = sync.OnceValue(func() built {
	b := built{objects: make(map[digest.Digest]Object)}
	var manifests []v1.Descriptor
	for _, architecture := range []string{"amd64", "arm64"} {
		platform := v1.Platform{OS: "linux", Architecture: architecture}
		layer := b.add(v1.MediaTypeImageLayer, layer(program(architecture)))
		config := b.add(v1.MediaTypeImageConfig, encode(v1.Image{
			Platform: platform,
			// Nobody, as a number: a kubelet that wants runAsNonRoot looks.
			Config: v1.ImageConfig{User: "65534:65534", Entrypoint: []string{"/probe"}},
			RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.Digest}},
		}))
		manifest := b.add(v1.MediaTypeImageManifest, encode(v1.Manifest{
			Versioned: specs.Versioned{SchemaVersion: 2},
			MediaType: v1.MediaTypeImageManifest,
			Config:    config,
			Layers:    []v1.Descriptor{layer},
		}))
		manifest.Platform = &platform
		manifests = append(manifests, manifest)
	}
	index := b.add(v1.MediaTypeImageIndex, encode(v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageIndex,
		Manifests: manifests,
	}))
	b.index = b.objects[index.Digest]
	return b
})

func (b built) add(mediaType string, content []byte) v1.Descriptor {
	d := digest.FromBytes(content)
	b.objects[d] = Object{mediaType, d, content}
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(content))}
}

func encode(v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // they are structs of the specification
	}
	return text
}

// layer is not compressed, so that its bytes do not depend on a compressor's version.
func layer(program []byte) []byte {
	var file bytes.Buffer
	w := tar.NewWriter(&file)
	err := w.WriteHeader(&tar.Header{Name: "probe", Mode: 0o755, Size: int64(len(program)), Format: tar.FormatUSTAR})
	if err == nil {
		_, err = w.Write(program)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		panic(err) // memory does not refuse
	}
	return file.Bytes()
}
