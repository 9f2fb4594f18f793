// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"tarn/images"
	"tarn/index"
	"tarn/proxy"
)

// What people name when they name an image: a repository without a tag, the
// beginning of a digest, or a digest alone mean an image that is here, if they mean
// one. Where they mean none or several, the answer says which there are.

// errSeveral: what was named means more than one image.
var errSeveral = errors.New("which one is meant?")

// means tells whether a name means an image, as a filter: a bare repository means
// all that are here of it.
func means(n proxy.ImageName, image images.Image) bool {
	return (n.Repository == index.RepositoryKey{} || n.Repository == keyOf(image)) &&
		(n.Tag == "" || n.Bare || n.Tag == image.Tag) &&
		(n.Digest == "" || n.Digest == image.Digest) &&
		strings.HasPrefix(image.Digest.String(), n.Prefix)
}

func keyOf(image images.Image) index.RepositoryKey {
	return index.RepositoryKey{Upstream: image.Upstream, Repository: image.Repository}
}

func pinOf(n proxy.ImageName) images.Pin {
	return images.Pin{Upstream: n.Repository.Upstream, Repository: n.Repository.Repository, Tag: n.Tag, Digest: n.Digest}
}

// toPin is the image that is meant to be pinned.
func (i imageAPI) toPin(n proxy.ImageName) (proxy.ImageName, error) {
	if !n.Bare && n.Prefix == "" && n.Repository != (index.RepositoryKey{}) {
		return n, nil
	}
	all := i.cache.Images().List()
	if n.Bare {
		// Nothing of it is here: then it is what a pull without a tag would get.
		return bare(n, all, true)
	}
	return byDigest(n, all, func(a, b images.Image) bool { return a.Digest == b.Digest && keyOf(a) == keyOf(b) })
}

// toEvict is the image that is meant to be evicted.
func (i imageAPI) toEvict(n proxy.ImageName) (proxy.ImageName, error) {
	if !n.Bare && n.Prefix == "" {
		return n, nil // of a whole digest the repository says nothing
	}
	all := i.cache.Images().List()
	if n.Bare {
		return bare(n, all, false)
	}
	// Under whatever names it is known, it is the same image.
	return byDigest(n, all, func(a, b images.Image) bool { return a.Digest == b.Digest })
}

// bare is latest where that is here, as everywhere; but who has others here means
// one of them.
func bare(n proxy.ImageName, all []images.Image, otherwise bool) (proxy.ImageName, error) {
	here := slices.ContainsFunc(all, func(image images.Image) bool { return means(n, image) })
	n.Bare = false
	if here && !slices.ContainsFunc(all, func(image images.Image) bool { return means(n, image) }) || !here && !otherwise {
		return n, notHere(n, all)
	}
	return n, nil
}

// byDigest finds the one image that a digest, or the beginning of one, means.
func byDigest(n proxy.ImageName, all []images.Image, same func(a, b images.Image) bool) (proxy.ImageName, error) {
	var found []images.Image
	for _, image := range all {
		if means(n, image) && !slices.ContainsFunc(found, func(f images.Image) bool { return same(f, image) }) {
			found = append(found, image)
		}
	}
	switch len(found) {
	case 0:
		return n, notHere(n, all)
	case 1:
		return proxy.ImageName{Repository: keyOf(found[0]), Digest: found[0].Digest}, nil
	}
	return n, several(n, found)
}

// toUnpin is the pin that is meant.
func (i imageAPI) toUnpin(n proxy.ImageName) (images.Pin, error) {
	var found, ofRepository []images.Pin
	for _, p := range i.cache.Images().Pins() {
		if k := (index.RepositoryKey{Upstream: p.Upstream, Repository: p.Repository}); k != n.Repository && n.Repository != (index.RepositoryKey{}) {
			continue
		}
		ofRepository = append(ofRepository, p)
		switch {
		case n.Tag != "" && p.Tag == n.Tag:
			found = append(found, p)
		// By tag, too, where a list shows its digest.
		case n.Tag == "" && n.Prefix != "" && (strings.HasPrefix(p.Digest.String(), n.Prefix) || strings.HasPrefix(p.Meant.String(), n.Prefix)),
			n.Tag == "" && n.Digest != "" && (p.Digest == n.Digest || n.Repository == index.RepositoryKey{} && p.Meant == n.Digest):
			found = append(found, p)
		}
	}
	var names []string
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		for _, p := range found {
			names = append(names, p.String())
		}
		return images.Pin{}, fmt.Errorf("%s: %w There are %s", n, errSeveral, listed(names))
	case len(ofRepository) > 0 && n.Repository != index.RepositoryKey{}:
		for _, p := range ofRepository {
			names = append(names, strings.TrimPrefix(strings.TrimPrefix(p.String(), n.RepositoryName()), ":"))
		}
		return images.Pin{}, fmt.Errorf("%s: %w; of this repository these are: %s", n, images.ErrNotPinned, listed(names))
	}
	return images.Pin{}, fmt.Errorf("%s: %w", n, images.ErrNotPinned)
}

// notHere says what is here instead.
func notHere(n proxy.ImageName, all []images.Image) error {
	var names, alike []string
	for _, image := range all {
		switch {
		case keyOf(image) == n.Repository && image.Tag != "":
			names = append(names, image.Tag)
		case keyOf(image) == n.Repository:
			names = append(names, "@"+short(image))
		case path.Base(image.Repository) == path.Base(n.Repository.Repository): // of "" it is none that a repository has
			alike = append(alike, image.Upstream+"/"+image.Repository)
		}
	}
	switch alike = slices.Compact(alike); {
	case len(names) > 0:
		return fmt.Errorf("%s: %w; of this repository here are: %s", n, images.ErrNotHere, listed(names))
	case len(alike) > 0:
		return fmt.Errorf("%s: %w; nothing of this repository is, but of %s", n, images.ErrNotHere, listed(alike))
	}
	return fmt.Errorf("%s: %w", n, images.ErrNotHere)
}

func several(n proxy.ImageName, found []images.Image) error {
	var names []string
	for _, image := range found {
		names = append(names, image.Upstream+"/"+image.Repository+"@"+short(image))
	}
	return fmt.Errorf("%s: %w There are %s", n, errSeveral, listed(names))
}

// short is a digest as the list of images shows it.
func short(image images.Image) string {
	const shown = len("sha256:") + 12
	d := image.Digest.String()
	return d[:min(shown, len(d))]
}

// listed names as many as somebody reads.
func listed(names []string) string {
	const most = 20
	if n := len(names) - most; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), n)
	}
	return strings.Join(names, ", ")
}

// checked has the registry say whether there is such an image to pin, for the
// platforms that were named, or, of an index, for this node's. What nobody can know, for want of a credential or of an answer, is
// taken, with a warning. So is what is here, when the registry says that it has it
// not: it may say so to who shows no credential, and what it had once is what a pin
// is for.
func (i imageAPI) checked(ctx context.Context, n proxy.ImageName, platforms []string) (warning string, err error) {
	if i.ask == nil {
		return "", nil
	}
	offered, err := i.ask(ctx, n)
	switch {
	case errors.Is(err, proxy.ErrNoImage) && i.isHere(n):
		return err.Error() + "; what is here of it is kept", nil
	case errors.Is(err, proxy.ErrNoImage), errors.Is(err, proxy.ErrNotAsked):
		return "", err
	case err != nil:
		return err.Error() + "; what is pulled of it is kept", nil
	}
	if len(platforms) == 0 && offered.Index {
		platforms = []string{nodePlatform}
	}
	for _, p := range platforms {
		if p != allPlatforms && len(offered.Platforms) > 0 && !offered.For(p) {
			var names []string
			for _, o := range offered.Platforms {
				names = append(names, proxy.PlatformName(o))
			}
			return "", fmt.Errorf("%w: %s is for %s, and not for %q", images.ErrNoPin, n, listed(names), p)
		}
	}
	return "", nil
}

func (i imageAPI) isHere(n proxy.ImageName) bool {
	d := n.Digest
	if d == "" {
		t, _ := i.cache.Index().Tag(n.Repository.TagKey(n.Tag))
		d = t.Digest
	}
	_, ok := i.cache.Index().Row(d)
	return ok
}
