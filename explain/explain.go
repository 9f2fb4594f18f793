// SPDX-License-Identifier: Apache-2.0

// Package explain says of an image what is here and what its registry says now, who
// may have it, what the next pull costs, and what became of the last ones.
//
// Contract: the verdict is a state, a sentence, and whether a pull of this node's
// platform would be served from the disk. The registry is asked one question, as
// anonymous or as the node, and nothing is stored.
//
// Failure model: what cannot be known is said to be so. No credential is ever named.
package explain

import (
	"context"
	"runtime"
	"slices"
	"strings"
	"time"

	"tarn/cache"
	"tarn/history"
	"tarn/images"
	"tarn/proxy"
	"tarn/upstream"

	"github.com/opencontainers/go-digest"
)

// State is the verdict in a word.
type State string

const (
	NotAllowed State = "not-allowed" // tarn does not ask that registry
	Fetching   State = "fetching"    // it is on its way
	NeverSeen  State = "never-seen"  // nothing of it is here, nor was
	Current    State = "current"     // what the registry means is here, whole
	Moved      State = "moved"       // the tag means something that is not here
	Partly     State = "partly"      // some of it is here
	Stale      State = "stale"       // the registry cannot be asked, and need not be for now
	Away       State = "away"        // the registry cannot be asked
	Private    State = "private"     // the registry refuses who shows no credential
	Missing    State = "missing"     // the registry has no such image
)

// Explanation is the document of /api/v1/explain.
type Explanation struct {
	Image string `json:"image"` // its canonical name
	State State  `json:"state"`
	// FromHere: a pull would have its bytes from this node's disk.
	FromHere bool `json:"fromHere"`
	// Verdict, Next and Advice are sentences: how it stands, what the next pull costs,
	// and what to do, where there is something.
	Verdict string        `json:"verdict"`
	Next    string        `json:"next"`
	Advice  string        `json:"advice,omitempty"`
	There   proxy.Inquiry `json:"there"`
	Here    Here          `json:"here"`
	Access  proxy.Access  `json:"access"`
	// Who says in a sentence who may have it.
	Who string `json:"who"`
	// StaleUntil is until when the image is answered from here while the registry cannot
	// be asked, where the operator allows that.
	StaleUntil time.Time `json:"staleUntil,omitzero"`
	// Since is how far back is remembered what happened, and Happened the last of it,
	// the latest first.
	Since    time.Time `json:"since"`
	Happened []Event   `json:"happened"`
}

// Here is what is on the disk of an image.
type Here struct {
	// Digest is what the tag meant when the registry said so last, at Confirmed; what
	// is counted is what the registry means now, where that is known and here.
	Digest     digest.Digest `json:"digest,omitempty"`
	Confirmed  time.Time     `json:"confirmed,omitzero"`
	Platforms  []string      `json:"platforms"`
	HereBytes  int64         `json:"hereBytes"`
	TotalBytes int64         `json:"totalBytes"` // as far as its manifests are here
	Objects    int           `json:"objects"`    // as far as they are known
	Missing    []Gap         `json:"missing"`
	Pinned     bool          `json:"pinned"`
	Fetching   bool          `json:"fetching"`
}

// Gap is an object of an image that is not here, and why.
type Gap struct {
	Digest digest.Digest `json:"digest"`
	Bytes  int64         `json:"bytes"`
	Cause  history.Cause `json:"cause"`
	At     time.Time     `json:"at,omitzero"` // when it went
}

// Event is an entry of the history in words.
type Event struct {
	history.Entry
	Words string `json:"words"`
}

// Sources are where it looks. All are required, but for the history.
type Sources struct {
	Proxy   *proxy.Proxy
	Cache   *cache.Cache
	History *history.History
	Now     func() time.Time
}

const (
	// maxEvents and maxGaps bound a document.
	maxEvents = 50
	maxGaps   = 100
)

// nodePlatform is what a pull on this node takes of an index.
var nodePlatform = []string{runtime.GOOS + "/" + runtime.GOARCH}

// Explain explains an image, which has a repository.
func Explain(ctx context.Context, s Sources, n proxy.ImageName) Explanation {
	x := Explanation{Image: n.String(), Since: s.History.Reach(), Access: s.Proxy.Access(n, n.Digest)}
	if x.Access.Allowed {
		x.There = s.Proxy.Inquire(ctx, n)
	}
	s.look(&x, n)
	if x.Here.Digest != "" {
		x.Access = s.Proxy.Access(n, x.Here.Digest)
	}
	x.StaleUntil = staleUntil(&x, n, s.Now())
	judge(&x, n, s.Now())
	s.tell(&x, n)
	return x
}

// staleUntil is until when what was said of the image stands: what its tag means, and
// that somebody may have it. What a clock said that was ahead then stands for nothing.
func staleUntil(x *Explanation, n proxy.ImageName, now time.Time) time.Time {
	last := x.Access.Anonymous
	if x.Access.Served.After(last) {
		last = x.Access.Served
	}
	if n.Tag != "" && x.Here.Confirmed.Before(last) {
		last = x.Here.Confirmed
	}
	if x.Access.StaleIfError == 0 || last.IsZero() || last.After(now) {
		return time.Time{}
	}
	return last.Add(time.Duration(x.Access.StaleIfError * float64(time.Second)))
}

// look says what is here: of what the registry means now where that is here or on its
// way, else of what it meant.
func (s Sources) look(x *Explanation, n proxy.ImageName) {
	x.Here.Digest = n.Digest
	if n.Tag != "" {
		t, _ := s.Cache.Index().Tag(n.Repository.TagKey(n.Tag))
		x.Here.Digest, x.Here.Confirmed = t.Digest, t.Confirmed
	}
	registry := upstream.Name(n.Repository.Upstream)
	d := x.Here.Digest
	if now := x.There.Digest; now != "" && now != d {
		_, here := s.Cache.Store().IsHere(now)
		if here || s.Proxy.Coming(registry, now) {
			d = now
			x.Here.Digest, x.Here.Confirmed = now, x.There.Asked
		}
	}
	x.Here.Platforms, x.Here.Missing = []string{}, []Gap{}
	if d == "" {
		return
	}
	tree := s.Cache.Images().Look(d, nodePlatform)
	x.Here.Platforms = append(x.Here.Platforms, tree.Platforms...)
	x.Here.HereBytes, x.Here.TotalBytes, x.Here.Objects = tree.Here, tree.Total, len(tree.Objects())
	for object, size := range tree.Objects() {
		if _, here := s.Cache.Store().IsHere(object); here {
			continue
		}
		x.Here.Fetching = x.Here.Fetching || s.Proxy.Coming(registry, object)
		if len(x.Here.Missing) < maxGaps {
			x.Here.Missing = append(x.Here.Missing, s.gap(object, size))
		}
	}
	slices.SortFunc(x.Here.Missing, func(a, b Gap) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	x.Here.Pinned = slices.ContainsFunc(s.Cache.Images().Pins(), func(p images.Pin) bool {
		return p.Upstream == n.Repository.Upstream && p.Repository == n.Repository.Repository && (p.Digest == d || p.Digest == "" && p.Tag == n.Tag)
	})
}

// gap says why an object is not here, and since when.
func (s Sources) gap(d digest.Digest, size int64) Gap {
	g := Gap{Digest: d, Bytes: size, Cause: s.History.Why(d)}
	if last := s.History.Find(func(e *history.Entry) bool { return e.Digest == d && e.Outcome == history.OutcomeGone }, 1); len(last) > 0 && last[0].Cause == g.Cause {
		g.At = last[0].At
	}
	return g
}

// tell says what happened to the image: requests for its tag, and for what it led to in
// its repository; and what went of it from the disk.
func (s Sources) tell(x *Explanation, n proxy.ImageName) {
	own := map[digest.Digest]bool{}
	add := func(d digest.Digest) {
		for object := range s.Cache.Images().Look(d, nil).Objects() {
			own[object] = true
		}
	}
	add(x.Here.Digest)
	add(x.There.Digest)
	x.Happened = []Event{}
	for _, e := range s.History.Find(func(e *history.Entry) bool {
		if e.Outcome == history.OutcomeGone {
			return own[e.Digest]
		}
		return e.Upstream == n.Repository.Upstream && e.Repository == n.Repository.Repository &&
			(e.Tag == n.Tag && n.Tag != "" || e.Tag == "" && own[e.Digest])
	}, maxEvents) {
		x.Happened = append(x.Happened, Event{e, Words(e)})
	}
}
