// SPDX-License-Identifier: Apache-2.0

package images

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"tarn/blobstore"
	"tarn/cache/store"
	"tarn/index"
	"tarn/internal/manifest"
	"tarn/internal/regular"

	"github.com/opencontainers/go-digest"
)

// A Pin keeps an image from being evicted: all of it that is stored now or comes
// to be. By tag, it follows the tag; by digest, the tag is empty. A pin is no right
// to anything, and no confirmation.
type Pin struct {
	Upstream   string        `json:"upstream"`
	Repository string        `json:"repository"`
	Tag        string        `json:"tag,omitempty"`
	Digest     digest.Digest `json:"digest,omitempty"`
	// Platforms of an index, as os/architecture[/variant]; without a variant it is
	// any. None: all platforms.
	Platforms []string `json:"platforms,omitempty"`
	// Meant is what the tag meant last, for when an index that was lost is rebuilt.
	Meant digest.Digest `json:"meant,omitempty"`
}

func (p Pin) key() index.RepositoryKey {
	return index.RepositoryKey{Upstream: p.Upstream, Repository: p.Repository}
}

// String is the name of the image that is pinned.
func (p Pin) String() string {
	if p.Digest != "" {
		return p.Upstream + "/" + p.Repository + "@" + p.Digest.String()
	}
	return p.Upstream + "/" + p.Repository + ":" + p.Tag
}

func (p Pin) same(q Pin) bool {
	return p.key() == q.key() && p.Tag == q.Tag && p.Digest == q.Digest
}

var platformPattern = regexp.MustCompile(`^[a-z0-9._-]+(/[a-z0-9._-]+){1,2}$`)

const (
	// What people pin are tens of images. The bounds keep what is written with each
	// change, and walked with each eviction, to that order.
	maxPins      = 1000
	maxPinsBytes = 1 << 20 // of pins.json
	// maxPinsFile is what is read of it: pins grow a little as they follow their tags.
	maxPinsFile = 2 * maxPinsBytes
	// maxName is as long as upstreams' and repositories' names may be, and maxTag as
	// tags (OCI distribution-spec "Pulling manifests").
	maxName = 255
	maxTag  = 128
	// An index has one platform, or all: 32 are more than there are to choose from.
	maxPlatforms = 32
	maxPlatform  = 64
)

func (p Pin) check() error {
	switch {
	case len(p.Upstream) > maxName || len(p.Repository) > maxName || len(p.Tag) > maxTag:
		return fmt.Errorf("%w: it has a name that is longer than names may be", ErrNoPin)
	case len(p.Platforms) > maxPlatforms:
		return fmt.Errorf("%w: it is for %d platforms, of at most %d", ErrNoPin, len(p.Platforms), maxPlatforms)
	case p.Upstream == "" || p.Repository == "":
		return fmt.Errorf("%w: it names no repository", ErrNoPin)
	case p.Tag == "" && p.Digest == "" || p.Tag != "" && p.Digest != "":
		return fmt.Errorf("%w: it has neither just a tag nor just a digest", ErrNoPin)
	case p.Digest != "" && blobstore.CheckDigest(p.Digest) != nil:
		return fmt.Errorf("%w: %.200q is no digest", ErrNoPin, p.Digest)
	}
	for _, platform := range p.Platforms {
		if len(platform) > maxPlatform || !platformPattern.MatchString(platform) {
			return fmt.Errorf("%w: the platform %.100q is not os/architecture or os/architecture/variant, such as linux/arm64", ErrNoPin, platform)
		}
	}
	return nil
}

var (
	// ErrPinsTooLarge: what is pinned would not fit.
	ErrPinsTooLarge = errors.New("pins would take more than there is room for")
	// ErrPinned: the image is pinned.
	ErrPinned = errors.New("the image is pinned")
	// ErrNoPin: it names no image, or no platform.
	ErrNoPin = errors.New("not a pin")
	// ErrNotPinned: there is no such pin.
	ErrNotPinned = errors.New("the image is not pinned")
	// ErrNotHere: nothing of the image is here.
	ErrNotHere = errors.New("the image is not here")
	// ErrShared: the image is one of another's, which stays.
	ErrShared = errors.New("the image belongs to another one that is here")
)

const brokenSuffix = ".broken"

// pins is what the committer knows of them.
type pins struct {
	trees  map[string]map[digest.Digest]int64 // what each led to last, by its name
	wanted map[digest.Digest]bool             // by any of them
	leases map[digest.Digest]store.Lease
	due    bool  // they may lead to more by now
	partly error // why what they lead to is not all known
	unread error // of the file, which says them still
	// unwritten: the file does not say them, or it is not known whether it does.
	unwritten bool
}

// Pins returns the pins.
func (im *Images) Pins() []Pin {
	im.mu.Lock()
	defer im.mu.Unlock()
	return slices.Clone(im.pinned)
}

// Pin adds a pin, or changes the platforms of one, and returns how many bytes of
// it are here and how many it has, as far as its manifests are here. It fails
// with ErrNoPin, also when an index that is here has nothing for its platforms, with
// ErrPinsTooLarge, and when it cannot be written.
func (im *Images) Pin(p Pin) (t Tree, err error) {
	if err := p.check(); err != nil {
		return t, err
	}
	err = im.store.Do(func() error {
		list := slices.DeleteFunc(im.Pins(), p.same)
		if list = append(list, p); len(list) > maxPins {
			return fmt.Errorf("%w: there may be %d of them: unpin something", ErrPinsTooLarge, maxPins)
		}
		if data, err := encodePins(list); err != nil || len(data) > maxPinsBytes {
			return fmt.Errorf("%w: their list would have %d bytes, of at most %d: unpin something", ErrPinsTooLarge, len(data), maxPinsBytes)
		}
		all := make(map[digest.Digest]int64)
		for _, p := range list {
			t = im.treeOf(p)
			maps.Copy(all, t.sizes)
		}
		switch {
		case t.err != nil:
			return fmt.Errorf("what is pinned cannot be read: %w", t.err)
		case len(t.sizes) >= maxTree || slices.ContainsFunc(t.barren, im.leadsTooFar):
			return fmt.Errorf("%w: it leads to more objects than tarn keeps account of: %d, or %d from one manifest", ErrPinsTooLarge, maxTree, manifest.MaxDescriptors)
		case len(t.others) > 0:
			return fmt.Errorf("%w: the image is for %s, and not for %s", ErrNoPin, strings.Join(t.others[:min(len(t.others), maxPlatforms)], ", "), strings.Join(p.Platforms, ", "))
		}
		var sum int64
		for _, size := range all {
			sum = addSizes(sum, store.OnDisk(size))
		}
		room, err := im.store.Room()
		if err != nil {
			return err
		}
		if sum > room {
			return fmt.Errorf("%w: with this one they take %d bytes, and max_size and min_free leave %d: unpin something", ErrPinsTooLarge, sum, room)
		}
		before := im.Pins()
		if err := im.setPins(list); err != nil {
			im.takePins(before)
			im.repin()
			return err
		}
		return nil
	})
	return t, err
}

// Unpin removes a pin. It fails with ErrNotPinned, and when that cannot be written, and
// then it is done all the same: with what goes now, there may be room to write it.
func (im *Images) Unpin(p Pin) error {
	return im.store.Do(func() error {
		if err := im.unreadPins(); err != nil {
			return err
		}
		before := im.Pins()
		list := slices.DeleteFunc(slices.Clone(before), p.same)
		if len(list) == len(before) {
			return ErrNotPinned
		}
		return im.setPins(list)
	})
}

// setPins has other pins hold, and writes them: first they hold, since what is
// pinned must not make room for that.
func (im *Images) setPins(list []Pin) error {
	im.takePins(list)
	im.repin()
	return im.writePins()
}

func (im *Images) takePins(list []Pin) {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.pinned = list
}

// unreadPins is an error where the file says more than is known.
func (im *Images) unreadPins() error {
	if im.pins.unread == nil {
		return nil
	}
	return fmt.Errorf("what is pinned could not be read when tarn started, and stays: restart it when it can be: %w", im.pins.unread)
}

func (im *Images) writePins() error {
	if err := im.unreadPins(); err != nil {
		return err
	}
	data, err := encodePins(im.Pins())
	if err == nil {
		err = im.store.WriteFile("pins", store.PinsName, data, true)
	}
	if im.pins.unwritten = err != nil; err != nil {
		return fmt.Errorf("write the pins: %w", err)
	}
	return nil
}

func encodePins(list []Pin) ([]byte, error) {
	return json.MarshalIndent(append([]Pin{}, list...), "", "  ") // a list also when it is empty
}

// readPins is for the start. Of a file that was damaged, the pins that say
// something hold, and it is kept as it was under another name. A file that the disk
// does not give stays.
func (im *Images) readPins() {
	im.pins.leases = make(map[digest.Digest]store.Lease)
	path := filepath.Join(im.store.Dir(), store.PinsName)
	os.Remove(path + ".new") // of a process that ended while it wrote
	data, err := regular.Read(path, maxPinsFile)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		im.pins.unread = fmt.Errorf("%s: %w", store.PinsName, err)
		im.log.Sugar().Errorw("the pins cannot be read: nothing is pinned until tarn is restarted and can", "cause", err.Error())
		return
	}
	im.pinned, err = parsePins(data)
	im.pins.unread = err // so that it is not written over
	im.repin()           // so that they do not make room for that
	if err != nil {
		kept, kerr := "", im.store.Expand(int64(len(data)))
		if kerr == nil {
			kept, kerr = keepBroken(path, data)
		}
		if im.pins.unread = kerr; kerr == nil {
			kerr = im.writePins()
		}
		im.log.Sugar().Errorw("the pins are damaged: what is not in pins.json any more is not pinned", "cause", err.Error(), "pinned", len(im.pinned), "kept_as", filepath.Base(kept), "error", kerr)
	}
}

func parsePins(data []byte) (list []Pin, err error) {
	var all []json.RawMessage
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, err
	}
	if all == nil {
		return nil, errors.New("there is no list")
	}
	const maxSaid = 5 // of what is wrong, in a line of the log
	wrong := 0
	for i, one := range all {
		if len(list) >= maxPins {
			return list, errors.Join(err, fmt.Errorf("there are %d pins, of at most %d", len(all), maxPins))
		}
		var p Pin
		perr := json.Unmarshal(one, &p)
		if perr == nil {
			perr = p.check()
		}
		if perr != nil {
			if wrong++; wrong <= maxSaid {
				err = errors.Join(err, fmt.Errorf("pin %d: %w", i+1, perr))
			}
			continue
		}
		list = append(list, p)
	}
	return list, err
}

// maxBroken bounds how many damaged files are kept.
const maxBroken = 100

// keepBroken writes what a damaged file says into one beside it, under a name that
// none has.
func keepBroken(path string, data []byte) (kept string, err error) {
	var f *os.File
	kept = path + brokenSuffix
	for n := 2; n <= maxBroken; n++ {
		if f, err = os.OpenFile(kept, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); !errors.Is(err, os.ErrExist) {
			break
		}
		kept = fmt.Sprintf("%s%s.%d", path, brokenSuffix, n)
	}
	if err != nil {
		return kept, err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		os.Remove(kept)
	}
	return kept, err
}

// repin holds what the pins lead to now, and nothing else any more, unless a manifest
// cannot be read just now. It runs in the committer.
func (im *Images) repin() {
	before := im.pins.trees
	im.pins.trees = make(map[string]map[digest.Digest]int64)
	im.pins.wanted = make(map[digest.Digest]bool)
	im.pins.due, im.pins.partly = false, nil
	list := im.Pins()
	moved := false
	for i, p := range list {
		if im.moved(p) {
			list[i].Meant, moved = im.means(p), true
		}
	}
	for _, p := range list {
		t := im.treeOf(p)
		if t.err != nil {
			im.pins.partly = t.err
			maps.Copy(t.sizes, before[p.String()])
		}
		if also := im.pins.trees[p.String()]; also != nil { // somebody has written it twice
			maps.Copy(t.sizes, also)
		}
		im.pins.trees[p.String()] = t.sizes
		for d := range t.sizes {
			im.pins.wanted[d] = true
		}
	}
	for d, l := range im.pins.leases {
		if !im.pins.wanted[d] {
			delete(im.pins.leases, d)
			im.store.Release(l)
		}
	}
	for d := range im.pins.wanted {
		im.pins.leases[d] = im.store.Rehold(d, im.pins.leases[d])
	}
	if moved {
		im.takePins(list)
		if err := im.writePins(); err != nil {
			im.log.Sugar().Warnw("a pin follows its tag, and that cannot be written", "cause", err.Error())
		}
	}
}

// means is the digest that a pin is of, "" while its tag has meant nothing.
func (im *Images) means(p Pin) digest.Digest {
	if p.Digest != "" {
		return p.Digest
	}
	tag, _ := im.store.Index().Tag(p.key().TagKey(p.Tag))
	return cmp.Or(tag.Digest, p.Meant)
}

// moved tells whether a pin's tag means something else than when it was followed last.
func (im *Images) moved(p Pin) bool { return p.Digest == "" && im.means(p) != p.Meant }

// treeOf is what a pin leads to.
func (im *Images) treeOf(p Pin) Tree { return im.tree(im.means(p), p.Platforms) }
