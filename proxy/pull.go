// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"time"

	"tarn/cache"
	"tarn/history"
	"tarn/internal/manifest"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
)

// A pull that the operator asks for is a client's, as far as the registry and the rights
// are concerned: anonymous, or the node where the repository is shared. It differs in two
// ways. Nobody reads the bytes, so an object that would pass through is an error; and
// when whoever asked leaves, so does the download, unless somebody else reads it, too.

const (
	// pullsAtOnce is how many objects of an image are fetched at once; containerd
	// fetches three layers, and each may use as many connections as any other.
	pullsAtOnce = 4
	// maxPulled bounds how many objects one image may lead to: an index with all its
	// platforms has some hundreds.
	maxPulled = 4096
	// maxPulledDepth is how deep an index may lie in another.
	maxPulledDepth = 2
	// commitPatience is how long the disk may take to store what is verified, and
	// commitLook how often it is looked.
	commitPatience = time.Minute
	commitLook     = 20 * time.Millisecond
)

// NodePlatform is what a pull fetches of an index when no platform is named.
const NodePlatform = "linux/" + runtime.GOARCH

// AllPlatforms is the word for all that an index has.
const AllPlatforms = "all"

// PullOptions say what of an image is fetched, and as whom.
type PullOptions struct {
	// Platforms of an index, as os/architecture[/variant], or AllPlatforms. None is
	// NodePlatform. One image alone must be for one of them.
	Platforms []string
	// AsNode fails unless the repository is shared, and so is asked for as the node.
	AsNode bool
	// Planned is called once, when all manifests are stored and before the rest is
	// fetched; its error ends the pull. nil is not called.
	Planned func(Pulled) error
	// Report hears how an object does: when it is known, now and then, and when it is
	// stored. It is called by one goroutine at a time. nil hears nothing.
	Report func(PulledObject)
}

// pulling is one on its way.
type pulling struct {
	*Proxy
	pulled
	name    ImageName
	q       *request // who asks, for which repository
	options PullOptions
	layers  map[digest.Digest]bool // of the images that were read
}

// Pull fetches an image into the store: what the registry says now that the name means,
// its manifests, and what they lead to. What is stored when it fails, or ctx ends, stays,
// and what had begun is gone on with by who asks next. Its errors are PullErrors.
func (p *Proxy) Pull(ctx context.Context, n ImageName, o PullOptions) (Pulled, error) {
	u := &pulling{Proxy: p, name: n, options: o, layers: make(map[digest.Digest]bool)}
	u.q = &request{
		method: http.MethodGet, kind: upstream.Manifest, upstream: upstream.Name(n.Repository.Upstream), repository: n.Repository.Repository,
		tag: n.Tag, digest: n.Digest,
	}
	u.q.endsWith(ctx)
	done, err := u.all(ctx)
	sum := u.sum(done)
	fields := []zap.Field{zap.String("image", bounded(n.String())), zap.String("digest", sum.Digest.String()), zap.Int64("fetched", sum.FetchedBytes), zap.Int64("here", sum.HereBytes)}
	if err != nil {
		err = u.words(ctx, err)
		p.log.Warn("not pulled", append(fields, zap.String("error", bounded(err.Error())))...)
		return sum, err
	}
	p.log.Info("pulled", fields...)
	return sum, nil
}

// endsWith has downloads end with the context, unless others read them, too.
func (q *request) endsWith(ctx context.Context) {
	q.gone = ctx.Done()
	q.leaves = func(f func()) func() bool { return context.AfterFunc(ctx, f) }
}

// all is the pull in a straight line.
func (u *pulling) all(ctx context.Context) (root digest.Digest, err error) {
	if err := u.mayAsk(); err != nil {
		return "", err
	}
	u.identify(u.q)
	stop := u.report(ctx)
	defer stop()
	body, root, err := u.root(ctx)
	if err != nil {
		return root, err
	}
	images, err := u.manifests(ctx, body, maxPulledDepth)
	if err != nil {
		return root, err
	}
	if err := u.configs(ctx, images); err != nil {
		return root, err
	}
	layers := u.plan(images)
	if err := u.fits(); err != nil {
		return root, err
	}
	if u.options.Planned != nil {
		if err := u.options.Planned(u.sum(root)); err != nil {
			return root, err
		}
	}
	return root, u.blobs(ctx, layers)
}

// mayAsk tells whether the registry may be asked at all.
func (u *pulling) mayAsk() error {
	switch {
	case u.names.listedOnly && !u.names.listed(u.q.upstream):
		return ErrNotAsked
	case u.q.repository == "" || u.name.Prefix != "":
		return errNoRepository
	case u.options.AsNode && !u.shared(u.q):
		return errNotShared
	}
	return nil
}

// root fetches what the name means, and returns its bytes.
func (u *pulling) root(ctx context.Context) ([]byte, digest.Digest, error) {
	if u.q.digest != "" {
		body, err := u.manifest(ctx, manifest.Descriptor{Digest: u.q.digest})
		return body, u.q.digest, err
	}
	asking, cancel := context.WithTimeout(ctx, headerDeadline)
	defer cancel()
	w := &response{timing: timing{start: u.now()}}
	c, _, err := u.confirmTag(asking, asking, u.q, false)
	var o *cache.Object
	if err == nil {
		o, err = u.openTag(asking, w, u.q, c)
	}
	if c != nil && c.body == nil && goesByTag(err) {
		if c, _, err = u.confirmTag(asking, asking, u.q, true); err == nil {
			o, err = u.openTag(asking, w, u.q, c)
		}
	}
	if err != nil {
		return nil, "", err
	}
	body, err := u.read(ctx, o, c.digest)
	if err == nil {
		u.notePending(u.q, c.digest)
	}
	return body, c.digest, err
}

// manifest fetches a manifest by its digest, and returns its bytes.
func (u *pulling) manifest(ctx context.Context, d manifest.Descriptor) ([]byte, error) {
	one := *u.q
	one.tag, one.digest, one.size = "", d.Digest, d.Size
	asking, cancel := context.WithTimeout(ctx, headerDeadline)
	defer cancel()
	o, _, _, err := u.openDigest(asking, &response{timing: timing{start: u.now()}}, &one)
	if err != nil {
		return nil, err
	}
	return u.read(ctx, o, d.Digest)
}

// read reads a manifest, which it closes, and returns once it is stored.
func (u *pulling) read(ctx context.Context, o *cache.Object, d digest.Digest) ([]byte, error) {
	defer o.Close()
	defer context.AfterFunc(ctx, o.Interrupt)()
	if o.Source == cache.Passed {
		return nil, u.notStored()
	}
	data, release, err := u.readManifest(ctx, u.q.upstream, o.Content, o.Size)
	defer release()
	if err != nil {
		return nil, err
	}
	m, err := manifest.Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", errManifest, d, err)
	}
	if m.Truncated {
		return nil, fmt.Errorf("%w: %s leads to more than %d objects, or to what is none", errManifest, d, manifest.MaxDescriptors)
	}
	object := &PulledObject{Digest: d, Kind: "manifest", Size: int64(len(data)), Bytes: int64(len(data)), Stored: true}
	if len(m.Manifests) > 0 {
		object.Kind = "index"
	}
	if o.Source == cache.Hit {
		object.HereBytes = object.Size
	}
	u.sizes.note(u.q.repositoryKey(), data)
	if err := u.stored(ctx, d); err != nil {
		return nil, err
	}
	u.remember(o, upstream.Manifest, d, object.Size)
	return data, u.enter(object)
}

// manifests are the images that a body is, or leads to, for the platforms that were named.
func (u *pulling) manifests(ctx context.Context, body []byte, depth int) (images []manifest.Manifest, err error) {
	m, err := manifest.Parse(body)
	if err != nil {
		return nil, err
	}
	if len(m.Manifests) == 0 {
		return []manifest.Manifest{m}, u.leadsTo(&m)
	}
	if depth == 0 {
		return nil, fmt.Errorf("%w: an index lies in an index that lies in another", errManifest)
	}
	wanted, err := u.chosen(m.Manifests)
	if err != nil {
		return nil, err
	}
	for _, d := range wanted {
		if d.Digest == "" || u.known(d.Digest) {
			continue
		}
		data, err := u.manifest(ctx, d)
		if err != nil {
			return nil, err
		}
		below, err := u.manifests(ctx, data, depth-1)
		if err != nil {
			return nil, err
		}
		images = append(images, below...)
	}
	return images, nil
}

// leadsTo keeps of an image the layers that none before it has. Each of thousands of
// manifests may name thousands, and all of them are in memory until the plan is made.
func (u *pulling) leadsTo(m *manifest.Manifest) error {
	m.Layers = slices.Clip(slices.DeleteFunc(m.Layers, func(d manifest.Descriptor) bool {
		was := u.layers[d.Digest]
		u.layers[d.Digest] = true
		return was || d.Digest == ""
	}))
	if len(u.layers) > maxPulled {
		return fmt.Errorf("%w: it leads to more than %d objects", errManifest, maxPulled)
	}
	return nil
}

// chosen are the manifests of an index that are wanted. Each platform that was named must
// be there.
func (u *pulling) chosen(all []manifest.Descriptor) (wanted []manifest.Descriptor, err error) {
	platforms := u.options.Platforms
	if slices.Contains(platforms, AllPlatforms) {
		return all, nil
	}
	var there Offered
	for _, d := range all {
		if d.Platform != nil && d.Platform.OS != "unknown" { // as attestations have it
			there.Platforms = append(there.Platforms, v1.Platform{OS: d.Platform.OS, Architecture: d.Platform.Architecture, Variant: d.Platform.Variant})
		}
	}
	if len(platforms) == 0 {
		if d, ok := ownPlatform(all); ok {
			return []manifest.Descriptor{d}, nil
		}
		return nil, &platformError{NodePlatform, there}
	}
	for _, platform := range platforms {
		if !there.For(platform) {
			return nil, &platformError{platform, there}
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(d manifest.Descriptor) bool {
		if d.Platform == nil {
			return true
		}
		one := Offered{Platforms: []v1.Platform{{OS: d.Platform.OS, Architecture: d.Platform.Architecture, Variant: d.Platform.Variant}}}
		return !slices.ContainsFunc(platforms, one.For)
	}), nil
}

// configs fetches the images' configs, and fails where platforms were named and an image
// that no index chose is for none of them.
func (u *pulling) configs(ctx context.Context, images []manifest.Manifest) error {
	for _, m := range images {
		if m.Config.Digest == "" || u.known(m.Config.Digest) {
			continue
		}
		object := &PulledObject{Digest: m.Config.Digest, Kind: "config", Size: m.Config.Size}
		if err := u.enter(object); err != nil {
			return err
		}
		if err := u.blob(ctx, object); err != nil {
			return err
		}
	}
	named := u.options.Platforms
	if len(named) == 0 || slices.Contains(named, AllPlatforms) || len(images) != 1 {
		return nil
	}
	o, err := u.cache.Open(ctx, cache.Request{Key: u.key(u.q, images[0].Config.Digest), Authorised: true, Fetch: notNow})
	if err != nil {
		return nil // there is no config, and so nobody knows
	}
	defer o.Close()
	data, err := io.ReadAll(io.LimitReader(o.Content, maxManifest))
	if p := manifest.ParsePlatform(data); err == nil && p.OS != "" {
		one := Offered{Platforms: []v1.Platform{{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}}}
		if !slices.ContainsFunc(named, one.For) {
			return &platformError{named[0], one}
		}
	}
	return nil
}

// plan enters the layers, each once.
func (u *pulling) plan(images []manifest.Manifest) (layers []*PulledObject) {
	for _, m := range images {
		for _, d := range m.Layers {
			if d.Digest == "" || u.known(d.Digest) {
				continue
			}
			object := &PulledObject{Digest: d.Digest, Kind: "layer", Size: d.Size}
			if u.enter(object) != nil {
				return layers // and fits says so
			}
			layers = append(layers, object)
		}
	}
	return layers
}

// fits fails where the image is larger than all that may ever be stored.
func (u *pulling) fits() error {
	room, err := u.cache.Store().Room()
	if err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.objects) >= maxPulled {
		return fmt.Errorf("%w: it leads to more than %d objects", errManifest, maxPulled)
	}
	left := room
	for _, o := range u.objects {
		if left -= o.Size; left < 0 {
			return &roomError{room}
		}
	}
	return nil
}

// blobs fetches the layers, several at once. The first that fails ends the others.
func (u *pulling) blobs(ctx context.Context, layers []*PulledObject) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(pullsAtOnce)
	for _, object := range layers {
		group.Go(func() error {
			if ctx.Err() != nil { // it has not had its turn, and is nobody's error
				return context.Cause(ctx)
			}
			return u.blob(ctx, object)
		})
	}
	return group.Wait()
}

// blob fetches one object unless it is here, and returns once it is stored.
func (u *pulling) blob(ctx context.Context, object *PulledObject) error {
	one := *u.q
	one.kind, one.tag, one.digest, one.size = upstream.Blob, "", object.Digest, object.Size
	one.endsWith(ctx)
	asking, cancel := context.WithTimeout(ctx, headerDeadline)
	defer cancel()
	o, _, _, err := u.openDigest(asking, &response{timing: timing{start: u.now()}}, &one)
	if err != nil {
		return err
	}
	defer o.Close()
	defer context.AfterFunc(ctx, o.Interrupt)()
	o.Wait()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case o.Passing():
		return u.notStored()
	}
	if err := ending(o); err != nil {
		return err
	}
	if err := u.stored(ctx, object.Digest); err != nil {
		return err
	}
	u.remember(o, upstream.Blob, object.Digest, object.Size)
	u.mu.Lock()
	defer u.mu.Unlock()
	object.Bytes, object.Stored = object.Size, true
	u.say(object)
	return nil
}

// remember has the history know of what was fetched.
func (u *pulling) remember(o *cache.Object, kind upstream.Kind, d digest.Digest, size int64) {
	if o.Source != cache.Fetched {
		return
	}
	e := history.Entry{At: u.now(), Client: "tarn pull", Own: true, Method: http.MethodGet, Upstream: string(u.q.upstream), Unlisted: !u.names.listed(u.q.upstream), Repository: u.q.repository,
		Kind: string(kind), Digest: d, Outcome: outcomeNames[outcomeMiss], Status: http.StatusOK, Asked: http.MethodGet, Bytes: size}
	e.Cause = u.history.Why(d)
	u.history.Add(e)
}

// ending is why a flight that has ended has not brought all.
func ending(o *cache.Object) error {
	end, err := o.Content.Seek(0, io.SeekEnd)
	if err != nil || end == 0 {
		return err
	}
	if _, err = o.Content.Seek(-1, io.SeekEnd); err == nil {
		_, err = io.ReadFull(o.Content, make([]byte, 1))
	}
	return err
}

// stored returns when the disk has what was verified.
func (u *pulling) stored(ctx context.Context, d digest.Digest) error {
	key := u.key(u.q, d)
	look := time.NewTicker(commitLook)
	defer look.Stop()
	patience := time.NewTimer(commitPatience)
	defer patience.Stop()
	for {
		if _, ok := u.cache.Has(key); ok {
			return nil
		}
		// The row is there before the flight leaves its table.
		if _, coming := u.cache.Size(key); !coming {
			if _, ok := u.cache.Has(key); ok {
				return nil
			}
			return u.notStored()
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-patience.C:
			return u.notStored()
		case <-look.C:
		}
	}
}

// notStored says why the disk did not take it, as far as that is known.
func (u *pulling) notStored() error { return &storeError{u.cache.Stats().Trouble} }
