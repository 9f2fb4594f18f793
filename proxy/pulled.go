// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"tarn/cache"

	"github.com/opencontainers/go-digest"
)

// What there is to say of a pull: its objects, how far each has come, and what it cost.

// Pulled is an image that is being pulled, or was.
type Pulled struct {
	// Digest is what the name means, as the registry has said just now.
	Digest digest.Digest `json:"digest,omitempty"`
	// Objects is how many it leads to, manifests included.
	Objects int `json:"objects"`
	// TotalBytes of all of them, as their manifests say.
	TotalBytes int64 `json:"totalBytes"`
	// HereBytes were here before, and FetchedBytes have come since.
	HereBytes    int64 `json:"hereBytes"`
	FetchedBytes int64 `json:"fetchedBytes"`
}

// PulledObject is one object of an image.
type PulledObject struct {
	Digest digest.Digest `json:"digest"`
	// Kind is index, manifest, config or layer.
	Kind      string `json:"kind"`
	Size      int64  `json:"size"`      // bytes
	HereBytes int64  `json:"hereBytes"` // that were here before
	Bytes     int64  `json:"bytes"`     // that are here now
	Stored    bool   `json:"stored"`
}

// pulled are the objects of a pull.
type pulled struct {
	// mu guards what follows, the objects, too.
	mu      sync.Mutex
	objects []*PulledObject
}

// pullReport is how often it is said how far the objects have come.
const pullReport = 200 * time.Millisecond

// known tells whether an object was entered.
func (u *pulling) known(d digest.Digest) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.ContainsFunc(u.objects, func(o *PulledObject) bool { return o.Digest == d })
}

// enter takes an object into account, and says what there is of it.
func (u *pulling) enter(o *PulledObject) error {
	if !o.Stored {
		if size, here := u.cache.Has(u.key(u.q, o.Digest)); here {
			o.HereBytes = size
		} else {
			o.HereBytes = u.progress()[u.key(u.q, o.Digest)]
		}
		o.Bytes = o.HereBytes
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.objects) >= maxPulled {
		return fmt.Errorf("%w: it leads to more than %d objects", errManifest, maxPulled)
	}
	u.objects = append(u.objects, o)
	u.say(o)
	return nil
}

// progress is how many bytes there are of what is on its way or parked.
func (u *pulling) progress() map[cache.Key]int64 {
	here := make(map[cache.Key]int64)
	for _, p := range u.cache.Progress() {
		here[p.Key] = p.Here
	}
	return here
}

// say is called with the lock.
func (u *pulling) say(o *PulledObject) {
	if u.options.Report != nil {
		u.options.Report(*o)
	}
}

// report says now and then how far the objects have come, until stop, which waits.
func (u *pulling) report(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var reporting sync.WaitGroup
	reporting.Go(func() {
		tick := time.NewTicker(pullReport)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				u.look()
			}
		}
	})
	return func() { cancel(); reporting.Wait(); u.look() }
}

// look takes how far the objects have come.
func (u *pulling) look() {
	here := u.progress()
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, o := range u.objects {
		if n := here[u.key(u.q, o.Digest)]; !o.Stored && n > o.Bytes {
			o.Bytes = n
			u.say(o)
		}
	}
}

// sum is what there is to say of all objects.
func (u *pulling) sum(root digest.Digest) Pulled {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := Pulled{Digest: root, Objects: len(u.objects)}
	for _, o := range u.objects {
		s.TotalBytes += o.Size
		s.HereBytes += o.HereBytes
		s.FetchedBytes += max(0, o.Bytes-o.HereBytes)
	}
	return s
}
