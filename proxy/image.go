// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"tarn/blobstore"
	"tarn/index"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImageName is an image as somebody named it, in canonical words.
type ImageName struct {
	// Repository is zero where only a digest was given.
	Repository index.RepositoryKey
	// Tag is "" where a digest was given, and latest where neither was.
	Tag string
	// Bare: only a repository was given, and nobody wrote the tag.
	Bare   bool
	Digest digest.Digest
	// Prefix is the beginning of a digest, as lists show it: sha256:0123456789ab.
	Prefix string
}

// String is the image's canonical name.
func (n ImageName) String() string {
	d := n.Prefix + n.Digest.String()
	switch {
	case n.Repository == index.RepositoryKey{}:
		return d
	case d != "":
		return n.RepositoryName() + "@" + d
	}
	return n.RepositoryName() + ":" + n.Tag
}

// RepositoryName is the canonical name of the repository.
func (n ImageName) RepositoryName() string {
	return n.Repository.Upstream + "/" + n.Repository.Repository
}

const (
	// maxImageName is more than a host, a repository, a tag and a sha512 have.
	maxImageName = 1024
	// minPrefix is how many digits of a digest are taken for one: enough that they
	// name one image of those on a node.
	minPrefix = 6
)

// digestPattern is a digest or the beginning of one. It has no other meaning: a
// repository that is called sha256 must be written with its registry.
var digestPattern = regexp.MustCompile(`^(sha256|sha512):[0-9a-f]+$`)

// ParseImage reads an image as people write it: [registry/]name[:tag][@digest],
// where the registry is a component with a dot or a port, localhost, or one that
// is listed, or a digest alone. A digest may be cut short. Without a registry it is
// the default upstream's. With tag and digest, the digest is what counts.
func (p *Proxy) ParseImage(s string) (n ImageName, err error) {
	if len(s) > maxImageName {
		return n, fmt.Errorf("the image's name has %d characters; %d is the most", len(s), maxImageName)
	}
	wrong := func(cause string) error {
		return fmt.Errorf("%q is not an image: %s; it is written as registry/name:tag or registry/name@digest", s, cause)
	}
	name, encoded, byDigest := strings.Cut(s, "@")
	if !byDigest && digestPattern.MatchString(s) {
		name, encoded, byDigest = "", s, true
	}
	if byDigest {
		algorithm, hex, _ := strings.Cut(encoded, ":")
		switch {
		case blobstore.CheckDigest(digest.Digest(encoded)) == nil:
			n.Digest = digest.Digest(encoded)
		case !digestPattern.MatchString(encoded) || len(hex) > digest.Algorithm(algorithm).Size()*2:
			return ImageName{}, wrong("its digest is none of sha256 or sha512")
		case len(hex) < minPrefix:
			return ImageName{}, wrong(fmt.Sprintf("of its digest at least %d digits are wanted", minPrefix))
		default:
			n.Prefix = encoded
		}
		if name == "" {
			return n, nil
		}
	}
	n.Tag, n.Bare = "latest", !byDigest
	if colon := strings.LastIndexByte(name, ':'); colon > strings.LastIndexByte(name, '/') {
		if name, n.Tag, n.Bare = name[:colon], name[colon+1:], false; !validTag(n.Tag) {
			return ImageName{}, wrong("its tag is none")
		}
	}
	q := &request{upstream: p.names.defaultUpstream, repository: name}
	if first, rest, more := strings.Cut(name, "/"); more && (first == "localhost" || strings.Contains(first, ":") || p.names.looksLikeUpstream(first)) {
		if q.upstream, err = upstream.ParseName(first); err != nil {
			return ImageName{}, wrong(err.Error())
		}
		// Its canonical name would be read as an organisation's (corp:443/app).
		if q.upstream != "localhost" && !strings.ContainsAny(string(q.upstream), ".:") && !p.names.listed(q.upstream) {
			return ImageName{}, wrong(fmt.Sprintf("%q is no registry that is listed", q.upstream))
		}
		q.repository = rest
	}
	if err := q.completeRepository(); err != nil {
		return ImageName{}, wrong(err.Error())
	}
	if byDigest {
		n.Tag = ""
	}
	n.Repository = q.repositoryKey()
	return n, nil
}

// Errors of AskImage.
var (
	// ErrNoImage: the registry says that it has no such image.
	ErrNoImage = errors.New("no such image")
	// ErrNotAsked: this tarn serves nobody from that registry.
	ErrNotAsked = errors.New("the registry is not listed, and allow is set to listed")
)

// Offered is what a registry says that an image is for, as far as it can be known.
type Offered struct {
	// Index: it is a choice of images; else it is one.
	Index bool
	// Platforms, of an index as it says, of one image as its config does. None: it
	// is not known.
	Platforms []v1.Platform
}

// For tells whether a platform is among them; one without a variant, whatever the
// variant.
func (o Offered) For(platform string) bool {
	platform = strings.Replace(platform, "/arm64/v8", "/arm64", 1) // see PlatformName
	return slices.ContainsFunc(o.Platforms, func(p v1.Platform) bool {
		name := PlatformName(p)
		return name == platform || strings.HasPrefix(name, platform+"/")
	})
}

// AskImage asks the authority for an image, as anonymous, or as the node where the
// repository is shared. Nothing is stored, and no right comes from it. It fails
// with ErrNoImage, ErrNotAsked, or words that say why nobody knows.
func (p *Proxy) AskImage(ctx context.Context, n ImageName) (o Offered, err error) {
	ctx, cancel := context.WithTimeout(ctx, headerDeadline)
	defer cancel()
	q := &request{upstream: upstream.Name(n.Repository.Upstream), repository: n.Repository.Repository}
	if p.names.listedOnly && !p.names.listed(q.upstream) {
		return o, ErrNotAsked
	}
	req := upstream.Request{Method: http.MethodGet, Repository: q.repository, Kind: upstream.Manifest, Reference: n.Tag + n.Digest.String(), Accept: defaultAccept}
	if p.shared(q) {
		req.As = upstream.Node
	}
	registry := p.upstreams.Registry(q.upstream)
	read := func(req upstream.Request, into any) error {
		resp, err := registry.Do(ctx, req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest))
		if err == nil {
			// What cannot be read says nothing of platforms, and is not refused here.
			json.Unmarshal(data, into)
		}
		return err
	}
	var manifest struct {
		Config    v1.Descriptor
		Manifests []struct{ Platform *v1.Platform }
	}
	var refused *upstream.StatusError
	switch err := read(req, &manifest); {
	case errors.As(err, &refused) && refused.Status == http.StatusNotFound:
		return o, fmt.Errorf("%s says that it has %w: %s", q.upstream, ErrNoImage, n)
	case errors.As(err, &refused) && req.As == upstream.Anonymous && (refused.Status == http.StatusUnauthorized || refused.Status == http.StatusForbidden):
		return o, fmt.Errorf("%s answers %d to who shows no credential, so it is not known whether it has this image", q.upstream, refused.Status)
	case err != nil:
		return o, fmt.Errorf("%s could not be asked whether it has this image: %w", q.upstream, err)
	}
	o.Index = len(manifest.Manifests) > 0
	for _, m := range manifest.Manifests {
		if m.Platform != nil && m.Platform.OS != "unknown" { // as attestations have it
			o.Platforms = append(o.Platforms, *m.Platform)
		}
	}
	if !o.Index && blobstore.CheckDigest(manifest.Config.Digest) == nil {
		var config v1.Platform
		req.Kind, req.Reference, req.Accept = upstream.Blob, manifest.Config.Digest.String(), nil
		if err := read(req, &config); err == nil && config.OS != "" {
			o.Platforms = append(o.Platforms, config)
		}
	}
	return o, nil
}

// PlatformName is os/architecture[/variant], without what a manifest may say that is
// not for a terminal. v8 is what arm64 is without a variant.
func PlatformName(p v1.Platform) string {
	name := p.OS + "/" + p.Architecture
	if p.Variant != "" && (p.Architecture != "arm64" || p.Variant != "v8") {
		name += "/" + p.Variant
	}
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f {
			return '?'
		}
		return r
	}, name)
}
