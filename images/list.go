// SPDX-License-Identifier: Apache-2.0

package images

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tarn/cache/store"
	"tarn/index"
	"tarn/internal/manifest"
	"tarn/internal/regular"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is what a tag means, or what a pin keeps by digest, as people know it.
type Image struct {
	Upstream   string        `json:"upstream"`
	Repository string        `json:"repository"`
	Tag        string        `json:"tag,omitempty"`
	Digest     digest.Digest `json:"digest"`
	Platforms  []string      `json:"platforms"` // that are here
	HereBytes  int64         `json:"hereBytes"`
	TotalBytes int64         `json:"totalBytes"` // of the platforms that are here
	Confirmed  time.Time     `json:"confirmed,omitzero"`
	Used       time.Time     `json:"used,omitzero"`
	Pinned     bool          `json:"pinned"`
}

// List returns the images of which at least the manifest that names them is
// stored, by name.
func (im *Images) List() (images []Image) {
	pins := im.Pins()
	add := func(k index.RepositoryKey, tag string, d digest.Digest, confirmed time.Time) {
		if _, ok := im.store.Index().Row(d); !ok {
			return
		}
		t := im.tree(d, nil)
		i := Image{Upstream: k.Upstream, Repository: k.Repository, Tag: tag, Digest: d, Platforms: append([]string{}, t.Platforms...), HereBytes: t.Here, TotalBytes: t.Total, Confirmed: confirmed}
		u, _ := im.store.Index().Use(d)
		i.Used = u.Time
		i.Pinned = slices.ContainsFunc(pins, func(p Pin) bool {
			return p.key() == k && (p.Digest == d || p.Digest == "" && p.Tag == tag)
		})
		images = append(images, i)
	}
	tags := make(map[index.TagKey]index.Tag)
	im.store.Index().Tags(func(k index.TagKey, t index.Tag) {
		if t.Digest != "" {
			tags[k] = t
		}
	})
	for k, t := range tags {
		add(k.RepositoryKey, k.Tag, t.Digest, t.Confirmed)
	}
	for _, p := range pins {
		if p.Digest != "" {
			add(p.key(), "", p.Digest, time.Time{})
		}
	}
	slices.SortFunc(images, func(a, b Image) int {
		return cmp.Or(strings.Compare(a.Upstream, b.Upstream), strings.Compare(a.Repository, b.Repository), strings.Compare(a.Tag, b.Tag), strings.Compare(string(a.Digest), string(b.Digest)))
	})
	return images
}

// Evict removes what a tag means, or a digest, under whatever other names it is
// known, and all that nothing else that is stored leads to. Who reads
// something of it reads on. It fails with ErrNotHere, with ErrPinned, and with ErrShared.
func (im *Images) Evict(k index.RepositoryKey, tag string, d digest.Digest) (e store.Evicted, err error) {
	err = im.store.Do(func() error {
		if d == "" {
			t, _ := im.store.Index().Tag(k.TagKey(tag))
			d = t.Digest
		}
		if _, ok := im.store.Index().Row(d); d == "" || !ok {
			return ErrNotHere
		}
		im.follow()
		if im.pins.wanted[d] {
			return fmt.Errorf("%w, as %s: unpin that first", ErrPinned, im.pinnedAs(d))
		}
		mine := im.under([]digest.Digest{d}, nil)
		var kept []digest.Digest // by what stays
		im.store.Index().Tags(func(_ index.TagKey, t index.Tag) {
			if t.Digest != d {
				kept = append(kept, t.Digest)
			}
		})
		var others []string // that lead to it
		leads := make(map[digest.Digest][]digest.Digest)
		im.store.Index().Children(func(parent digest.Digest, children []digest.Digest) { leads[parent] = children })
		for parent, children := range leads {
			if im.store.IsLost(parent) || mine[parent] && !im.pins.wanted[parent] {
				continue
			}
			kept = append(kept, children...)
			if slices.Contains(children, d) {
				others = append(others, parent.String())
			}
		}
		if len(others) > 0 {
			const named = 10 // there may be thousands
			return fmt.Errorf("%w, %s: evict that", ErrShared, strings.Join(others[:min(len(others), named)], ", "))
		}
		stay := im.under(kept, mine) // what is kept keeps its own
		var going []digest.Digest
		for d := range mine {
			if !stay[d] && !im.pins.wanted[d] {
				going = append(going, d)
			}
		}
		e, err = im.store.Remove(going)
		return err
	})
	return e, err
}

// pinnedAs names the pins that lead to a digest.
func (im *Images) pinnedAs(d digest.Digest) string {
	var names []string
	for name, tree := range im.pins.trees {
		if _, ok := tree[d]; ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// under returns what these lead to, and they themselves, of those within; nil is all.
func (im *Images) under(ds []digest.Digest, within map[digest.Digest]bool) map[digest.Digest]bool {
	all := make(map[digest.Digest]bool)
	for len(ds) > 0 {
		last := len(ds) - 1
		d := ds[last]
		ds = ds[:last]
		if !all[d] && (within == nil || within[d]) {
			all[d] = true
			ds = append(ds, im.store.Index().ChildrenOf(d)...)
		}
	}
	return all
}

const (
	// maxList bounds index.json, in bytes: nobody reads an index that is larger. It
	// is written anew with each change, and has room for 10,000 tags of usual names.
	// What is beyond it is stored all the same, and not in the list.
	maxList = manifest.MaxSize
	// entryRoom is what an entry has besides the name and the type, sha512 included.
	entryRoom = 400
)

// imageList is index.json, in the committer.
type imageList struct {
	due     bool // it may say something else by now
	written []byte
	types   map[meaning]string // media types of what it named last
	marked  bool               // the directory says that it is a layout
	failing bool               // which was said
}

// meaning is what a repository has a tag mean.
type meaning struct {
	in index.RepositoryKey
	d  digest.Digest
}

// layOut makes the directory an OCI image layout, whose list of images is
// some seconds behind (OCI image-spec "Image Layout"). A manifest in it may lead
// to layers that are not here, as the specification allows.
func (im *Images) layOut() {
	if !im.list.marked {
		im.list.marked = im.markLayout()
	}
	if !im.list.due {
		return
	}
	ix := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	var unread bool
	ix.Manifests, unread = im.entries()
	data, err := json.MarshalIndent(ix, "", "  ")
	im.list.due = unread // or what it names goes to make room for it
	if err == nil && !bytes.Equal(data, im.list.written) {
		err = im.store.WriteFile("list", store.ListName, data, false)
	}
	if failing := err != nil; failing != im.list.failing {
		if im.list.failing = failing; failing {
			im.log.Sugar().Warnw("the list of images is not written", "file", store.ListName, "cause", err.Error())
		} else {
			im.log.Sugar().Infow("the list of images is written again", "file", store.ListName)
		}
	}
	if err != nil {
		im.list.due = true
		return
	}
	im.list.written = data
}

// entries are what the list has: the tags whose manifests are here, those of listed
// registries first, as many as there is room for. unread: a manifest cannot be read now.
func (im *Images) entries() (entries []v1.Descriptor, unread bool) {
	meant := make(map[string]meaning)
	im.store.Index().Tags(func(k index.TagKey, t index.Tag) {
		if t.Digest != "" {
			meant[k.Upstream+"/"+k.Repository+":"+k.Tag] = meaning{k.RepositoryKey, t.Digest}
		}
	})
	names := slices.SortedFunc(maps.Keys(meant), func(a, b string) int {
		listed := func(name string) int {
			if im.store.Listed(meant[name].in.Upstream) {
				return 0
			}
			return 1
		}
		return cmp.Or(listed(a)-listed(b), strings.Compare(a, b))
	})
	entries = []v1.Descriptor{} // a list also when it is empty
	types := make(map[meaning]string)
	left, strangers := maxList, maxList/store.StrangersShare
	for _, name := range names {
		said := meant[name]
		row, ok := im.store.Index().Row(said.d)
		if !ok {
			continue
		}
		if types[said] == "" {
			mediaType, err := im.typeOf(said)
			unread = unread || err != nil && !errors.Is(err, store.ErrNotStored)
			types[said] = mediaType
		}
		if types[said] == "" {
			continue
		}
		size := entryRoom + len(name) + len(types[said])
		if !im.store.Listed(said.in.Upstream) {
			strangers -= size
		}
		if left -= size; left < 0 || strangers < 0 {
			break
		}
		entries = append(entries, v1.Descriptor{
			MediaType: types[said], Digest: said.d, Size: row.Size,
			Annotations: map[string]string{v1.AnnotationRefName: name},
		})
	}
	im.list.types = types
	return entries, unread
}

// typeOf is the media type of a manifest as its registry calls it, or else as it says
// itself, "" where it is none.
func (im *Images) typeOf(said meaning) (string, error) {
	if before := im.list.types[said]; before != "" {
		return before, nil
	}
	m, ok := im.store.Index().Membership(said.in.MembershipKey("manifests", said.d))
	if ok && manifest.ValidMediaType(m.MediaType) && strings.HasSuffix(m.MediaType, "+json") {
		return m.MediaType, nil
	}
	body, _, err := im.storedManifest(said.d)
	if err != nil || body.Descriptors() == nil {
		return "", err
	}
	return mediaTypeOf(body), nil
}

// markLayout writes what says that the directory is a layout, and tells whether it is
// there. Without it, the directory is as good for everybody else, and the list, which is
// written next, says why it is not.
func (im *Images) markLayout() bool {
	data, err := json.Marshal(v1.ImageLayout{Version: v1.ImageLayoutVersion})
	if there, rerr := regular.Read(filepath.Join(im.store.Dir(), store.LayoutName), store.MaxLayout); rerr == nil && bytes.Equal(there, data) {
		return true
	}
	return err == nil && im.store.WriteFile("layout", store.LayoutName, data, false) == nil
}
