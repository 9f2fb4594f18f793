// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	_ "crypto/sha256" // go-digest asks for it by name
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// user is nobody else's: 65532 is every image's that calls itself nonroot, and of
	// two users with one number each may open the other's files, whatever their mode.
	user       = 15050
	dataFolder = "var/lib/tarn"
)

// entry is a file of the image, or a folder, whose name ends in a slash.
type entry struct {
	name  string
	mode  int64
	data  []byte
	owner int
}

// archive is an OCI image layout that becomes a tar file (OCI image-spec
// "image-layout").
type archive struct {
	created time.Time
	files   map[string][]byte
	top     v1.Descriptor
}

func newArchive(created time.Time) *archive {
	return &archive{created: created, files: make(map[string][]byte)}
}

// blob adds what is named by its digest.
func (a *archive) blob(mediaType string, data []byte) v1.Descriptor {
	d := digest.FromBytes(data)
	a.files["blobs/"+d.Algorithm().String()+"/"+d.Encoded()] = data
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func (a *archive) document(mediaType string, v any) (v1.Descriptor, error) {
	data, err := json.Marshal(v)
	return a.blob(mediaType, data), err
}

// image adds one for a platform, and returns its manifest.
func (a *archive) image(s settings, platform v1.Platform, files []entry) (v1.Descriptor, error) {
	plain, err := a.pack(withFolders(files))
	if err != nil {
		return v1.Descriptor{}, err
	}
	var packed bytes.Buffer
	z, err := gzip.NewWriterLevel(&packed, gzip.BestCompression) // its header has no time and no name
	if err == nil {
		_, err = z.Write(plain)
	}
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		return v1.Descriptor{}, err
	}
	layer := a.blob(v1.MediaTypeImageLayerGzip, packed.Bytes())
	config, err := a.document(v1.MediaTypeImageConfig, v1.Image{
		Created:  &a.created,
		Platform: platform,
		Config: v1.ImageConfig{
			User: fmt.Sprintf("%d:%d", user, user),
			// Who is not root and brings no configuration keeps data in tarn, here.
			Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "XDG_CACHE_HOME=/" + path.Dir(dataFolder)},
			Entrypoint: []string{"/usr/local/bin/tarn"},
			Cmd:        []string{"serve"},
			Volumes:    map[string]struct{}{"/" + dataFolder: {}},
			Labels:     labels(s),
		},
		RootFS:  v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(plain)}},
		History: []v1.History{{Created: &a.created, CreatedBy: "make image"}},
	})
	if err != nil {
		return v1.Descriptor{}, err
	}
	m, err := a.document(v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: config, Layers: []v1.Descriptor{layer}, Annotations: labels(s),
	})
	m.Platform = &platform
	return m, err
}

func labels(s settings) map[string]string {
	return map[string]string{
		v1.AnnotationTitle:       "tarn",
		v1.AnnotationDescription: "A node-local caching proxy for OCI registries",
		v1.AnnotationLicenses:    "Apache-2.0",
		v1.AnnotationVersion:     s.version,
		v1.AnnotationRevision:    s.commit,
		v1.AnnotationCreated:     s.created.Format(time.RFC3339),
	}
}

// index adds that of the image, and that of the layout, which gives it its names: as
// the specification has them, and as containerd reads them.
func (a *archive) index(s settings, manifests []v1.Descriptor) (err error) {
	a.top, err = a.document(v1.MediaTypeImageIndex, v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex,
		Manifests: manifests, Annotations: labels(s),
	})
	if err != nil {
		return err
	}
	named := a.top
	_, tag, _ := strings.Cut(path.Base(s.name), ":")
	named.Annotations = map[string]string{v1.AnnotationRefName: tag, "io.containerd.image.name": s.name}
	layout, err := json.Marshal(v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{named},
	})
	if err != nil {
		return err
	}
	a.files[v1.ImageIndexFile] = layout
	a.files[v1.ImageLayoutFile], err = json.Marshal(v1.ImageLayout{Version: v1.ImageLayoutVersion})
	return err
}

// write replaces the archive by this one.
func (a *archive) write(name string) error {
	var files []entry
	for _, f := range slices.Sorted(maps.Keys(a.files)) {
		files = append(files, entry{name: f, mode: 0o644, data: a.files[f]})
	}
	data, err := a.pack(withFolders(files))
	if err != nil {
		return err
	}
	if err := os.WriteFile(name+".new", data, 0o644); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// withFolders adds the folders that files lie in, and sorts all by name.
func withFolders(files []entry) []entry {
	all := make(map[string]entry)
	for _, f := range files {
		all[f.name] = f
		for dir := path.Dir(strings.TrimSuffix(f.name, "/")); dir != "."; dir = path.Dir(dir) {
			if _, there := all[dir+"/"]; !there {
				all[dir+"/"] = entry{name: dir + "/", mode: 0o755}
			}
		}
	}
	var sorted []entry
	for _, name := range slices.Sorted(maps.Keys(all)) {
		sorted = append(sorted, all[name])
	}
	return sorted
}

// pack writes a tar file. Nothing of it comes from the machine that it is made on.
func (a *archive) pack(files []entry) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		h := &tar.Header{
			Name: f.name, Mode: f.mode, Size: int64(len(f.data)), Uid: f.owner, Gid: f.owner,
			ModTime: a.created, Format: tar.FormatUSTAR, Typeflag: tar.TypeReg,
		}
		if strings.HasSuffix(f.name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.Copy(w, bytes.NewReader(f.data)); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return out.Bytes(), err
}
