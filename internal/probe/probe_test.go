// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestTheImageIsWhole follows the index to each platform's program.
func TestTheImageIsWhole(t *testing.T) {
	var index v1.Index
	read(t, Index().Digest, v1.MediaTypeImageIndex, &index)
	if len(index.Manifests) != 2 {
		t.Fatalf("it is for %d platforms", len(index.Manifests))
	}
	for _, m := range index.Manifests {
		var manifest v1.Manifest
		read(t, m.Digest, v1.MediaTypeImageManifest, &manifest)
		var config v1.Image
		read(t, manifest.Config.Digest, v1.MediaTypeImageConfig, &config)
		layer, ok := Find(manifest.Layers[0].Digest)
		if !ok || layer.Digest != config.RootFS.DiffIDs[0] || config.Platform.Architecture != m.Platform.Architecture {
			t.Fatalf("%s: layer %v, %v; config %+v", m.Platform.Architecture, layer.Digest, ok, config)
		}
		if size := len(layer.Content); size > 4<<10 {
			t.Errorf("the layer has %d bytes", size)
		}
		program := unpack(t, layer.Content)
		file, err := elf.NewFile(bytes.NewReader(program))
		if err != nil {
			t.Fatal(err)
		}
		if file.Machine != machines[m.Platform.Architecture].machine {
			t.Errorf("the program for %s is for %v", m.Platform.Architecture, file.Machine)
		}
		if m.Platform.Architecture != runtime.GOARCH {
			continue
		}
		path := filepath.Join(t.TempDir(), "probe")
		if err := os.WriteFile(path, program, 0o755); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(path).CombinedOutput(); err != nil {
			t.Errorf("it ends with %v, %s", err, out)
		}
	}
}

func read(t *testing.T, d digest.Digest, mediaType string, v any) {
	t.Helper()
	o, ok := Find(d)
	if !ok || o.MediaType != mediaType || digest.FromBytes(o.Content) != d {
		t.Fatalf("%s: %v, %s", d, ok, o.MediaType)
	}
	if err := json.Unmarshal(o.Content, v); err != nil {
		t.Fatal(err)
	}
}

func unpack(t *testing.T, layer []byte) []byte {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(layer))
	header, err := r.Next()
	if err != nil || header.Name != "probe" || header.Mode != 0o755 {
		t.Fatalf("%+v, %v", header, err)
	}
	program, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return program
}
