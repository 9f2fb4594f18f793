// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"net/http"
	"slices"
	"time"

	"tarn/cache"

	"github.com/opencontainers/go-digest"
)

// Flight is a download that is running, or broke off and is gone on with.
type Flight struct {
	Digest digest.Digest `json:"digest"`
	// Upstream is the registry that was asked first; none for what is parked.
	Upstream string `json:"upstream,omitempty"`
	// SourceDomain is whose bytes these are: those of all listed registries, or those
	// of the one that it names.
	SourceDomain string `json:"sourceDomain"`
	HereBytes    int64  `json:"hereBytes"`
	// TotalBytes is not there while the registry has not said.
	TotalBytes *int64    `json:"totalBytes,omitempty"`
	Readers    int       `json:"readers"`
	Since      time.Time `json:"since"` // begun, or parked
	Parked     bool      `json:"parked"`
}

// allListed is the source domain of the listed registries, for people.
const allListed = "listed"

func (i imageAPI) flights(w http.ResponseWriter, _ *http.Request) {
	serveJSON(w, http.StatusOK, map[string]any{"flights": flights(i.cache)})
}

// flights are the downloads of a cache, the oldest first.
func flights(c *cache.Cache) []Flight {
	all := []Flight{}
	for _, p := range c.Progress() {
		f := Flight{Digest: p.Digest, Upstream: p.Source, SourceDomain: p.Domain, HereBytes: p.Here, Readers: p.Readers, Since: p.Since, Parked: p.Parked}
		if p.Domain == cache.ListedDomain {
			f.SourceDomain = allListed
		}
		if p.Size >= 0 {
			f.TotalBytes = &p.Size
		}
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b Flight) int { return a.Since.Compare(b.Since) })
	return all
}
