// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/buildinfo"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// built is a program, twice, and folders of certificates.
func built(t *testing.T) (s settings, programs []string) {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "tarn")
	// The smallest program of this module that has dependencies.
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	programs = []string{program, program}
	certificates := filepath.Join(dir, "certificates")
	if err := os.Mkdir(certificates, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"b.crt": "second\n\n", "a.crt": "first", "c.txt": "none"} {
		if err := os.WriteFile(filepath.Join(certificates, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return settings{
		name: "registry.example/tarn:1.2.3", version: "1.2.3", commit: "abc", created: time.Unix(1_800_000_000, 0).UTC(),
		certificates: certificates, certsVersion: "20230311+deb12u1", license: filepath.Join("..", "..", "LICENSE"),
	}, programs
}

// unpacked are the files of a tar file.
func unpacked(t *testing.T, r io.Reader) (headers map[string]*tar.Header, files map[string][]byte) {
	t.Helper()
	headers, files = make(map[string]*tar.Header), make(map[string][]byte)
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return headers, files
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		headers[h.Name], files[h.Name] = h, data
	}
}

func decode[T any](t *testing.T, data []byte) (v T) {
	t.Helper()
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestTheImageHasTheProgramAndItsCertificatesAndNothingThatRuns(t *testing.T) {
	t.Parallel()
	s, programs := built(t)
	s.out, s.sbom = filepath.Join(t.TempDir(), "a.tar"), filepath.Join(t.TempDir(), "sbom")
	if err := s.write(programs); err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(s.out)
	if err != nil {
		t.Fatal(err)
	}
	_, layout := unpacked(t, bytes.NewReader(first))
	blob := func(d v1.Descriptor) []byte {
		data := layout["blobs/sha256/"+d.Digest.Encoded()]
		if digest.FromBytes(data) != d.Digest || int64(len(data)) != d.Size {
			t.Fatalf("%s is not what its name says", d.Digest)
		}
		return data
	}
	named := decode[v1.Index](t, layout["index.json"]).Manifests[0]
	if named.Annotations[v1.AnnotationRefName] != "1.2.3" || named.Annotations["io.containerd.image.name"] != s.name {
		t.Errorf("named %v", named.Annotations)
	}
	images := decode[v1.Index](t, blob(named)).Manifests
	if len(images) != 2 || images[0].Platform.Architecture != runtime.GOARCH || images[1].Platform.OS != "linux" {
		t.Fatalf("%+v", images)
	}
	for i, m := range images {
		manifest := decode[v1.Manifest](t, blob(m))
		image := decode[v1.Image](t, blob(manifest.Config))
		c := image.Config
		if c.User != "15050:15050" || !slices.Equal(c.Entrypoint, []string{"/usr/local/bin/tarn"}) || !slices.Equal(c.Cmd, []string{"serve"}) {
			t.Errorf("%+v", c)
		}
		if !slices.ContainsFunc(c.Env, func(e string) bool {
			return strings.HasPrefix(e, "PATH=") && strings.Contains(e, ":/usr/local/bin:")
		}) {
			t.Errorf("tarn is not in the PATH: %v", c.Env)
		}
		if c.Labels[v1.AnnotationVersion] != "1.2.3" || c.Labels[v1.AnnotationRevision] != "abc" || image.Architecture != m.Platform.Architecture {
			t.Errorf("%v, %v", c.Labels, image.Platform)
		}
		z, err := gzip.NewReader(bytes.NewReader(blob(manifest.Layers[0])))
		if err != nil {
			t.Fatal(err)
		}
		headers, files := unpacked(t, z)
		var runs []string
		for name, h := range headers {
			if h.Typeflag == tar.TypeReg && h.Mode&0o111 != 0 {
				runs = append(runs, name)
			}
			if want := map[bool]int{true: user}[name == "var/lib/tarn/"]; h.Uid != want || h.Gid != want || h.Mode&0o022 != 0 || !h.ModTime.Equal(s.created) {
				t.Errorf("%s: user %d, mode %o, %s", name, h.Uid, h.Mode, h.ModTime)
			}
		}
		program, err := os.ReadFile(programs[i])
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(runs, []string{"usr/local/bin/tarn"}) || !bytes.Equal(files[runs[0]], program) {
			t.Errorf("what can be run: %v", runs)
		}
		if got := string(files["etc/ssl/certs/ca-certificates.crt"]); got != "first\nsecond\n" {
			t.Errorf("certificates %q", got)
		}
		sbom := decode[bill](t, files["usr/share/doc/tarn/sbom.cdx.json"])
		info, err := buildinfo.ReadFile(programs[i])
		if err != nil {
			t.Fatal(err)
		}
		if sbom.Format != "CycloneDX" || len(sbom.Components) != len(info.Deps)+2 || len(info.Deps) == 0 {
			t.Errorf("%d components of %d modules", len(sbom.Components), len(info.Deps))
		}
	}

	again := s
	again.out = filepath.Join(t.TempDir(), "b.tar")
	if err := again.write(programs); err != nil {
		t.Fatal(err)
	}
	if second, err := os.ReadFile(again.out); err != nil || !bytes.Equal(first, second) {
		t.Errorf("two of the same differ: %v", err)
	}
}

func TestWhatCannotBeAnImageIsRefused(t *testing.T) {
	t.Parallel()
	s, programs := built(t)
	empty := s
	empty.certificates = t.TempDir()
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		settings
		programs []string
		want     string
	}{
		"nothing":         {s, nil, "name the programs"},
		"no certificates": {empty, programs, "no certificates"},
		"no program":      {s, []string{text}, "text"},
	} {
		c.out = filepath.Join(dir, "out.tar")
		if err := c.write(c.programs); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
		if left, _ := filepath.Glob(c.out + "*"); left != nil {
			t.Errorf("%s left %v", what, left)
		}
	}
}
