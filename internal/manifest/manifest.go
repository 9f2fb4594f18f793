// SPDX-License-Identifier: Apache-2.0

// Package manifest reads what a manifest or an index leads to (OCI image-spec
// "Image Manifest", "Image Index", and Docker's of the same shape).
//
// Contract: whoever wrote the body may be anybody, so all that is kept of it
// has a bound: what a Manifest takes in memory is little beside the body, and so
// is what reading it takes.
//
// Failure model: what is no JSON object, or calls itself what is no media type,
// is an error. What leads to more than the bound, or to what is no descriptor,
// is a manifest all the same; it says so, and leads to nothing.
//
// It never judges whether a manifest may be served, and never follows where one
// leads.
package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"tarn/blobstore"

	"github.com/opencontainers/go-digest"
)

const (
	// MaxSize is the size in bytes of the largest manifest that is read: what
	// containerd takes at most, and what distribution-spec "Pushing Manifests"
	// has registries support at least.
	MaxSize = 4 << 20
	// MaxDescriptors bounds what one manifest leads to. Runtimes refuse images of
	// more than some 500 layers, and artifacts of a few thousand files are known;
	// as many digests take 1 MiB of the index.
	MaxDescriptors = 10_000
	// maxMediaType is how long a media type may be: a type and a subtype of 127
	// characters each (RFC 6838 4.2).
	maxMediaType = 255
	// maxPlatformPart is how much is kept of an operating system's name, an
	// architecture's or a variant's. None that is in use has more than 16.
	maxPlatformPart = 64
	// Prefix is how many bytes of an object Looks is to be given, where there are
	// as many.
	Prefix = 512
)

var (
	// errNotJSON: the body is no JSON object, or larger than a manifest may be.
	errNotJSON = errors.New("it is no JSON object")
	// errMediaType: what the body says in mediaType is none.
	errMediaType = errors.New("its mediaType is none")
)

// Manifest is what is read of a manifest or an index.
type Manifest struct {
	// MediaType is the body's own, "" when it has none.
	MediaType string
	// HasConfig, HasLayers and HasManifests tell which fields there are, whatever
	// is in them; one that is null is not there.
	HasConfig, HasLayers, HasManifests bool

	Config    Descriptor // the zero value when there is none
	Layers    []Descriptor
	Manifests []Descriptor
	// Truncated: it leads to more than MaxDescriptors, or to what is no
	// descriptor, and so to nothing.
	Truncated bool
}

// Descriptor is what is read of one. Its digest is of an algorithm that objects
// may be named by, and its size not negative; others are left out.
type Descriptor struct {
	Digest   digest.Digest
	Size     int64     // bytes
	Platform *Platform // nil: it has none
}

// Platform is what an image runs on, each part cut to a length that no name has.
type Platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
}

// ParsePlatform reads what an image's config says that it runs on (OCI image-spec
// "Image Configuration"), nothing of anything else.
func ParsePlatform(config []byte) (p Platform) {
	if len(config) > MaxSize || json.Unmarshal(config, &p) != nil {
		return Platform{}
	}
	p.cut()
	return p
}

// Descriptors are all that it leads to, each digest once; no subject.
func (m Manifest) Descriptors() (all []Descriptor) {
	seen := make(map[digest.Digest]bool)
	for _, list := range [][]Descriptor{{m.Config}, m.Layers, m.Manifests} {
		for _, d := range list {
			if d.Digest != "" && !seen[d.Digest] {
				seen[d.Digest] = true
				all = append(all, d)
			}
		}
	}
	return all
}

// Parse reads a manifest. Its error says why the body is none.
func Parse(body []byte) (Manifest, error) {
	if len(body) > MaxSize {
		return Manifest{}, fmt.Errorf("%w: it has %d bytes, of at most %d", errNotJSON, len(body), MaxSize)
	}
	r := &reading{left: MaxDescriptors}
	m := struct {
		MediaType mediaType `json:"mediaType"`
		Config    one       `json:"config"`
		Layers    list      `json:"layers"`
		Manifests list      `json:"manifests"`
	}{Config: one{reading: r}, Layers: list{reading: r}, Manifests: list{reading: r}}
	if err := json.Unmarshal(body, &m); err != nil {
		return Manifest{}, errNotJSON
	}
	if m.MediaType.bad {
		return Manifest{}, errMediaType
	}
	read := Manifest{
		MediaType: m.MediaType.is,
		HasConfig: m.Config.there, HasLayers: m.Layers.there, HasManifests: m.Manifests.there,
		Truncated: r.failed,
	}
	if !r.failed {
		read.Config, read.Layers, read.Manifests = m.Config.is, m.Layers.are, m.Manifests.are
	}
	return read, nil
}

// The types below read a field from the body as it lies there, which json gives
// to an Unmarshaler and copies for anything else. None of them fails for what is
// in a field: the body is JSON already, and is served whatever it leads to.

// reading is what the fields of one body have in common.
type reading struct {
	left   int  // how many descriptors may still come
	failed bool // more came, or something else
}

// descriptor reads one, and returns it if it is of use.
func (r *reading) descriptor(decode func(any) error) (d Descriptor, ok bool) {
	if r.left--; r.left < 0 {
		r.failed = true
		return d, false
	}
	var is struct {
		Digest   digest.Digest `json:"digest"`
		Size     int64         `json:"size"`
		Platform *Platform     `json:"platform"`
	}
	if decode(&is) != nil {
		r.failed = true
		return d, false
	}
	if blobstore.CheckDigest(is.Digest) != nil || is.Size < 0 {
		return d, false
	}
	d = Descriptor{Digest: is.Digest, Size: is.Size}
	if is.Platform != nil {
		is.Platform.cut()
		d.Platform = is.Platform
	}
	return d, true
}

// cut lets go of what is too long.
func (p *Platform) cut() {
	for _, part := range []*string{&p.OS, &p.Architecture, &p.Variant} {
		if len(*part) > maxPlatformPart {
			*part = strings.Clone((*part)[:maxPlatformPart]) // so that the rest does not stay in memory
		}
	}
}

// one is a field that has a descriptor.
type one struct {
	*reading
	there bool
	is    Descriptor
}

func (o *one) UnmarshalJSON(data []byte) error {
	if isNull(data) {
		return nil
	}
	o.there = true
	o.is, _ = o.descriptor(func(into any) error { return json.Unmarshal(data, into) })
	return nil
}

// isNull tells whether a field is null: clients read it as one that is not there.
func isNull(data []byte) bool { return string(data) == "null" }

// list is a field that has any number of them.
type list struct {
	*reading
	there bool
	are   []Descriptor
}

func (l *list) UnmarshalJSON(data []byte) error {
	if isNull(data) {
		return nil
	}
	if l.there { // of a field that comes twice, the last one counts
		l.left--
	}
	l.there, l.are = true, nil
	if l.failed = l.failed || l.left < 0; l.failed {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if begin, _ := dec.Token(); begin != json.Delim('[') {
		l.failed = true
		return nil
	}
	for dec.More() && !l.failed {
		if d, ok := l.descriptor(dec.Decode); ok {
			l.are = append(l.are, d)
		}
	}
	return nil
}

// mediaType is a field that has a media type.
type mediaType struct {
	is  string
	bad bool
}

func (m *mediaType) UnmarshalJSON(data []byte) error {
	*m = mediaType{}
	const escaped = 6 // bytes at most that a character takes in JSON
	if len(data) <= escaped*maxMediaType+len(`""`) && json.Unmarshal(data, &m.is) == nil && (m.is == "" || ValidMediaType(m.is)) {
		return nil
	}
	*m = mediaType{bad: true}
	return nil
}

// ValidMediaType tells whether s is a media type as RFC 6838 4.2 has them, without
// parameters.
func ValidMediaType(s string) bool {
	kind, sub, ok := strings.Cut(s, "/")
	return ok && len(s) <= maxMediaType && restrictedName(kind) && restrictedName(sub)
}

func restrictedName(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case i > 0 && strings.IndexByte("!#$&-^_.+", c) >= 0:
		default:
			return false
		}
	}
	return s != ""
}

// keys are those that a manifest may begin with.
var keys = []string{"schemaVersion", "mediaType", "artifactType", "config", "layers", "manifests", "blobs", "subject", "annotations"}

// Looks tells whether an object of that size may be a manifest, by the keys in
// its first bytes: others are not read whole to find out.
func Looks(prefix []byte, size int64) bool {
	if size > MaxSize {
		return false
	}
	dec := json.NewDecoder(bytes.NewReader(prefix))
	if begin, err := dec.Token(); err != nil || begin != json.Delim('{') {
		return false
	}
	for dec.More() {
		t, _ := dec.Token()
		name, _ := t.(string)
		if slices.ContainsFunc(keys, func(k string) bool { return strings.EqualFold(k, name) }) { // as json has it
			return true
		}
		var value json.RawMessage
		if dec.Decode(&value) != nil {
			return false // the first bytes end in it
		}
	}
	return false
}

// Children are the digests of all that a body leads to, nil where it is no manifest.
func Children(body []byte) (children []digest.Digest) {
	m, err := Parse(body)
	if err != nil {
		return nil
	}
	for _, d := range m.Descriptors() {
		children = append(children, d.Digest)
	}
	return children
}
