// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"tarn/blobstore"
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
	// ErrNotStored: nothing of the image is here.
	ErrNotStored = errors.New("the image is not here")
	// ErrShared: the image is one of another's, which stays.
	ErrShared = errors.New("the image belongs to another one that is here")
)

const (
	pinsName     = "pins.json"
	brokenSuffix = ".broken"
)

// pins is the committer's, but for the list.
type pins struct {
	list   []Pin                              // guarded by the cache's mutex; replaced, never changed
	trees  map[string]map[digest.Digest]int64 // what each led to last, by its name
	wanted map[digest.Digest]bool             // by any of them
	leases map[digest.Digest]lease
	due    bool  // they may lead to more by now
	partly error // why what they lead to is not all known
	unread error // of the file, which says them still
	// unwritten: the file does not say them, or it is not known whether it does.
	unwritten bool
}

// Pins returns the pins.
func (c *Cache) Pins() []Pin {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.pins.list)
}

// Pin adds a pin, or changes the platforms of one, and returns how many bytes of
// it are here and how many it has, as far as its manifests are here. It fails
// with ErrNoPin, also when an index that is here has nothing for its platforms, with
// ErrPinsTooLarge, and when it cannot be written.
func (c *Cache) Pin(p Pin) (t Tree, err error) {
	if err := p.check(); err != nil {
		return t, err
	}
	err = c.inCommitter(func() error {
		list := slices.DeleteFunc(c.Pins(), p.same)
		if list = append(list, p); len(list) > maxPins {
			return fmt.Errorf("%w: there may be %d of them: unpin something", ErrPinsTooLarge, maxPins)
		}
		if data, err := encodePins(list); err != nil || len(data) > maxPinsBytes {
			return fmt.Errorf("%w: their list would have %d bytes, of at most %d: unpin something", ErrPinsTooLarge, len(data), maxPinsBytes)
		}
		all := make(map[digest.Digest]int64)
		for _, p := range list {
			t = c.pinned(p)
			maps.Copy(all, t.sizes)
		}
		switch {
		case t.err != nil:
			return fmt.Errorf("what is pinned cannot be read: %w", t.err)
		case len(t.sizes) >= maxTree || slices.ContainsFunc(t.barren, c.leadsTooFar):
			return fmt.Errorf("%w: it leads to more objects than tarn keeps account of: %d, or %d from one manifest", ErrPinsTooLarge, maxTree, manifest.MaxDescriptors)
		case len(t.others) > 0:
			return fmt.Errorf("%w: the image is for %s, and not for %s", ErrNoPin, strings.Join(t.others[:min(len(t.others), maxPlatforms)], ", "), strings.Join(p.Platforms, ", "))
		}
		var sum int64
		for _, size := range all {
			sum = addSizes(sum, roundUp(min(size, math.MaxInt64-fsBlock)))
		}
		room, err := c.room()
		if err != nil {
			return err
		}
		if sum > room {
			return fmt.Errorf("%w: with this one they take %d bytes, and max_size and min_free leave %d: unpin something", ErrPinsTooLarge, sum, room)
		}
		before := c.Pins()
		if err := c.setPins(list); err != nil {
			c.takePins(before)
			c.repin()
			return err
		}
		return nil
	})
	return t, err
}

// room is how many bytes could be stored if all that is went.
func (c *Cache) room() (int64, error) {
	free, _, err := c.store.Free()
	c.mu.Lock()
	defer c.mu.Unlock()
	return min(c.opts.MaxSize-c.overhead, c.used+free-c.ahead-c.opts.MinFree), err
}

// Unpin removes a pin. It fails with ErrNotPinned, and when that cannot be written, and
// then it is done all the same: with what goes now, there may be room to write it.
func (c *Cache) Unpin(p Pin) error {
	return c.inCommitter(func() error {
		if err := c.unreadPins(); err != nil {
			return err
		}
		before := c.Pins()
		list := slices.DeleteFunc(slices.Clone(before), p.same)
		if len(list) == len(before) {
			return ErrNotPinned
		}
		return c.setPins(list)
	})
}

// setPins has other pins hold, and writes them: first they hold, since what is
// pinned must not make room for that.
func (c *Cache) setPins(list []Pin) error {
	c.takePins(list)
	c.repin()
	return c.writePins()
}

func (c *Cache) takePins(list []Pin) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pins.list = list
}

// unreadPins is an error where the file says more than is known.
func (c *Cache) unreadPins() error {
	if c.pins.unread == nil {
		return nil
	}
	return fmt.Errorf("what is pinned could not be read when tarn started, and stays: restart it when it can be: %w", c.pins.unread)
}

func (c *Cache) writePins() error {
	if err := c.unreadPins(); err != nil {
		return err
	}
	data, err := encodePins(c.Pins())
	if err == nil {
		err = c.writeFile("pins", pinsName, data, true)
	}
	if c.pins.unwritten = err != nil; err != nil {
		return fmt.Errorf("write the pins: %w", err)
	}
	return nil
}

func encodePins(list []Pin) ([]byte, error) {
	return json.MarshalIndent(append([]Pin{}, list...), "", "  ") // a list also when it is empty
}

// writeFile replaces a small file of the directory as one step. For much more than the
// file takes now it makes room; less is always there. What is not durable may be empty
// after a power cut, and is what the next start writes anyway.
func (c *Cache) writeFile(what, name string, data []byte, durable bool) error {
	path := filepath.Join(c.opts.Dir, name)
	more := roundUp(int64(len(data))) - smallGrowth
	if info, err := os.Lstat(path); err == nil {
		more -= blobstore.Allocated(info)
	}
	if more > 0 {
		if err := c.expand(more); err != nil {
			return err
		}
	}
	defer c.measureOverhead()
	temporary := path + ".new"
	err := c.opts.Steps.Do("write "+what, func() error {
		if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		f, err := os.OpenFile(temporary, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		if _, err = f.Write(data); durable {
			err = errors.Join(err, f.Sync())
		}
		return errors.Join(err, f.Close())
	})
	if err == nil {
		err = c.opts.Steps.Do("rename "+what, func() error { return os.Rename(temporary, path) })
	}
	if err != nil {
		os.Remove(temporary)
		return err
	}
	if durable {
		err = c.opts.Steps.Do("fsync for "+what, func() error { return syncDir(c.opts.Dir) })
	}
	return err
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// readPins is for the start. Of a file that was damaged, the pins that say
// something hold, and it is kept as it was under another name. A file that the disk
// does not give stays.
func (c *Cache) readPins() {
	c.pins.leases = make(map[digest.Digest]lease)
	path := filepath.Join(c.opts.Dir, pinsName)
	os.Remove(path + ".new") // of a process that ended while it wrote
	data, err := regular.Read(path, maxPinsFile)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		c.pins.unread = fmt.Errorf("%s: %w", pinsName, err)
		c.log.Sugar().Errorw("the pins cannot be read: nothing is pinned until tarn is restarted and can", "cause", err.Error())
		return
	}
	c.pins.list, err = parsePins(data)
	c.pins.unread = err // so that it is not written over
	c.repin()           // so that they do not make room for that
	if err != nil {
		kept, kerr := "", c.expand(int64(len(data)))
		if kerr == nil {
			kept, kerr = keepBroken(path, data)
		}
		if c.pins.unread = kerr; kerr == nil {
			kerr = c.writePins()
		}
		c.log.Sugar().Errorw("the pins are damaged: what is not in pins.json any more is not pinned", "cause", err.Error(), "pinned", len(c.pins.list), "kept_as", filepath.Base(kept), "error", kerr)
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
func (c *Cache) repin() {
	before := c.pins.trees
	c.pins.trees = make(map[string]map[digest.Digest]int64)
	c.pins.wanted = make(map[digest.Digest]bool)
	c.pins.due, c.pins.partly = false, nil
	list := c.Pins()
	moved := false
	for i, p := range list {
		if c.moved(p) {
			list[i].Meant, moved = c.means(p), true
		}
	}
	for _, p := range list {
		t := c.pinned(p)
		if t.err != nil {
			c.pins.partly = t.err
			maps.Copy(t.sizes, before[p.String()])
		}
		if also := c.pins.trees[p.String()]; also != nil { // somebody has written it twice
			maps.Copy(t.sizes, also)
		}
		c.pins.trees[p.String()] = t.sizes
		for d := range t.sizes {
			c.pins.wanted[d] = true
		}
	}
	for d, l := range c.pins.leases {
		if !c.pins.wanted[d] {
			delete(c.pins.leases, d)
			c.letGo(l)
		}
	}
	for d := range c.pins.wanted {
		c.pin(d)
	}
	if moved {
		c.takePins(list)
		if err := c.writePins(); err != nil {
			c.log.Sugar().Warnw("a pin follows its tag, and that cannot be written", "cause", err.Error())
		}
	}
}

func (c *Cache) repinIfDue() {
	if c.pins.due || slices.ContainsFunc(c.Pins(), c.moved) {
		c.repin()
	}
}

// pin holds what is wanted, once.
func (c *Cache) pin(d digest.Digest) {
	c.order.mu.Lock()
	l := c.pins.leases[d]
	gone := l != nil && l.Gone()
	if l == nil || gone { // another one has come in its place
		c.pins.leases[d] = c.order.queue.Hold(d)
	}
	c.order.mu.Unlock()
	if gone {
		c.letGo(l)
	}
}

// means is the digest that a pin is of, "" while its tag has meant nothing.
func (c *Cache) means(p Pin) digest.Digest {
	if p.Digest != "" {
		return p.Digest
	}
	tag, _ := c.index.Tag(p.key().TagKey(p.Tag))
	return cmp.Or(tag.Digest, p.Meant)
}

// moved tells whether a pin's tag means something else than when it was followed last.
func (c *Cache) moved(p Pin) bool { return p.Digest == "" && c.means(p) != p.Meant }

// pinned is what a pin leads to.
func (c *Cache) pinned(p Pin) Tree { return c.tree(c.means(p), p.Platforms) }

// Tree is an image as far as its manifests are here.
type Tree struct {
	// Here and Total are bytes: of what is stored, and of all of it. Of an index
	// they count the manifests that are here, or all that were asked for.
	Here, Total int64
	// Platforms that there is something of.
	Platforms []string
	sizes     map[digest.Digest]int64
	err       error           // a manifest that is here cannot be read
	others    []string        // platforms of an index that has none of those asked for
	barren    []digest.Digest // named as manifests, and here, and lead nowhere
}

// tree walks from a digest over the manifests that are here, to these platforms
// of an index, or to all.
func (c *Cache) tree(root digest.Digest, platforms []string) (t Tree) {
	t.sizes = make(map[digest.Digest]int64)
	if blobstore.CheckDigest(root) != nil {
		return t
	}
	none := true
	leaf := func(child manifest.Descriptor) {
		if _, seen := t.sizes[child.Digest]; seen || len(t.sizes) >= maxTree {
			return
		}
		size := child.Size
		row, known := c.index.Row(child.Digest)
		if known {
			size = row.Size
		}
		if known || c.isStray(child.Digest) {
			t.Here += size
		}
		t.sizes[child.Digest] = size
		t.Total = addSizes(t.Total, size)
	}
	var walk func(d digest.Digest, size int64, platform *manifest.Platform)
	walk = func(d digest.Digest, size int64, platform *manifest.Platform) {
		if _, seen := t.sizes[d]; seen || len(t.sizes) >= maxTree {
			return
		}
		m, stored, err := c.storedManifest(d)
		ok := err == nil
		switch {
		case ok:
			size = stored
			t.Here += size
		case !errors.Is(err, ErrNotStored):
			t.err = err
		}
		t.sizes[d] = size
		t.Total = addSizes(t.Total, size)
		if ok && platform != nil && len(t.Platforms) < maxPlatforms {
			t.Platforms = append(t.Platforms, platformName(*platform))
		}
		children := m.Descriptors()
		if ok && children == nil {
			t.barren = append(t.barren, d)
		}
		for _, child := range children {
			if len(m.Manifests) == 0 { // nor read: of files without a row, nobody knows what they are
				leaf(child)
				continue
			}
			if child.Platform != nil && len(platforms) > 0 && !slices.ContainsFunc(platforms, func(p string) bool {
				name, p := plainArm64(platformName(*child.Platform)), plainArm64(p)
				return name == p || strings.HasPrefix(name, p+"/")
			}) {
				if d == root && child.Platform.OS != "unknown" { // as attestations have it
					t.others = append(t.others, platformName(*child.Platform))
				}
				continue
			}
			none = false
			if c.isHere(child.Digest) || len(platforms) > 0 {
				walk(child.Digest, child.Size, child.Platform)
			} else {
				t.sizes[child.Digest] = child.Size // a pin keeps it when it comes
			}
		}
		if platform == nil && m.Config.Digest != "" && d == root {
			if p, ok := c.configPlatform(m.Config); ok {
				t.Platforms = append(t.Platforms, platformName(p))
			}
		}
	}
	walk(root, 0, nil)
	if !none {
		t.others = nil
	}
	return t
}

// isHere tells whether an object is stored, if only as a file.
func (c *Cache) isHere(d digest.Digest) bool {
	_, known := c.index.Row(d)
	return known || c.isStray(d)
}

// maxTree bounds what one image leads to: a manifest of the most descriptors is within
// it, and an index may have as many such manifests.
const maxTree = 1 << 15

// plainArm64: v8 is what arm64 is without a variant.
func plainArm64(platform string) string {
	if name, ok := strings.CutSuffix(platform, "/v8"); ok && strings.HasSuffix(name, "/arm64") {
		return name
	}
	return platform
}

// addSizes adds what a manifest may only claim.
func addSizes(a, b int64) int64 {
	if b > math.MaxInt64-a {
		return math.MaxInt64
	}
	return a + b
}

// platformName is for people, too: what a manifest says is not for their terminal.
func platformName(p manifest.Platform) string {
	name := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		name += "/" + p.Variant
	}
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f {
			return '?'
		}
		return r
	}, name)
}

// configPlatform reads what an image's config says that it runs on.
func (c *Cache) configPlatform(config manifest.Descriptor) (p manifest.Platform, ok bool) {
	row, stored := c.index.Row(config.Digest)
	if !stored || row.Size > manifest.MaxSize || row.Size == 0 {
		return p, false
	}
	body, err := c.store.Read(config.Digest, row.Size)
	if err != nil {
		return p, false
	}
	p = manifest.ParsePlatform(body)
	return p, p.OS != ""
}

// inCommitter has f run in the committer, and returns its error.
func (c *Cache) inCommitter(f func() error) error {
	done := make(chan error, 1)
	select {
	case c.calls <- func() { done <- f() }:
		return <-done
	case <-c.ctx.Done():
		return ErrClosed
	}
}
