// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"tarn/cache"
	"tarn/upstream"

	"github.com/docker/go-units"
)

// PullError says why an image was not pulled, and what to do about it.
type PullError struct {
	// Code is one word for programs, see docs of the admin API.
	Code string
	// Next is what to do.
	Next string
	err  error
}

func (e *PullError) Error() string { return e.err.Error() }
func (e *PullError) Unwrap() error { return e.err }

var (
	errNoRepository = errors.New("a pull needs the registry's own name of the image: registry/name:tag or registry/name@digest, the digest whole")
	errNotShared    = errors.New("the repository is not under share: of its upstream")
)

// platformError: the image is not for that one.
type platformError struct {
	platform string
	there    Offered
}

func (e *platformError) Error() string {
	const most = 20 // as many as somebody reads
	var names []string
	for _, p := range e.there.Platforms[:min(most, len(e.there.Platforms))] {
		names = append(names, PlatformName(p))
	}
	return fmt.Sprintf("it is for %s, and not for %.100q", cmp.Or(strings.Join(names, ", "), "no platform that it names"), e.platform)
}

// storeError: the object was not stored. Its trouble is the disk's, "" where that has none.
type storeError struct{ trouble string }

func (e *storeError) Error() string {
	if e.trouble == "" {
		return "it was not stored: the registry's answer does not say that it is this object, or what is here of it was changed"
	}
	return "it was not stored: " + e.trouble
}

// roomError: the image is larger than what may ever be stored, in bytes.
type roomError struct{ room int64 }

func (e *roomError) Error() string {
	return fmt.Sprintf("the image is larger than the %s that max_size and min_free leave", units.BytesSize(float64(e.room)))
}

// words turns what went wrong into words for whoever asked for the pull.
func (u *pulling) words(ctx context.Context, err error) error {
	name := u.q.upstream
	var refused *upstream.StatusError
	var host *upstream.HostError
	var platform *platformError
	var room *roomError
	var disk *storeError
	switch {
	case ctx.Err() != nil:
		return &PullError{"canceled", "pull it again: what came is here, and the rest is gone on with", context.Cause(ctx)}
	case errors.Is(err, ErrNotAsked):
		return &PullError{"not_listed", fmt.Sprintf("add {name: %s} to upstreams: in tarn's configuration", name), err}
	case errors.Is(err, errNoRepository):
		return &PullError{"invalid", "tarn images lists the names of what is here", err}
	case errors.Is(err, errNotShared):
		return &PullError{"not_shared", "leave out --as-node, or " + u.toShare() + "; every client of this node may have it then", err}
	case errors.As(err, &platform):
		return &PullError{"no_platform", "name one of these with --platform, or all", err}
	case errors.As(err, &room):
		return &PullError{"too_large", "raise max_size, or pull fewer platforms", err}
	case errors.As(err, &disk):
		return &PullError{"not_stored", "tarn status says what is wrong with the disk; unpin or evict something, or raise max_size, and pull it again", err}
	case errors.As(err, &refused):
		return u.refused(refused, err)
	case errors.As(err, &host):
		_, e := hostTrouble(host)
		return &PullError{"unreachable", cmp.Or(host.Advice, "tarn status says since when; pull it again later"), errors.New(e.Message)}
	case errors.Is(err, errManifest):
		return &PullError{"invalid_image", fmt.Sprintf("have it pushed to %s anew, or pull fewer platforms of it", name), err}
	case errors.Is(err, cache.ErrBroken):
		return &PullError{"wrong_bytes", "pull it again; if it stays so, the registry's copy is damaged", fmt.Errorf("%s sent something else than the digest names: %w", name, err)}
	case errors.Is(err, context.DeadlineExceeded):
		return &PullError{"unreachable", "tarn status says since when; pull it again later", fmt.Errorf("%s did not answer in time", name)}
	}
	return &PullError{"failed", "tarn's log may say more", err}
}

// toShare is how the repository comes to be asked for as the node.
func (u *pulling) toShare() string {
	return fmt.Sprintf("add %s to share: of the upstream %s, which needs credentials:", u.q.repository, u.q.upstream)
}

// refused says what the registry's own no means here.
func (u *pulling) refused(e *upstream.StatusError, err error) error {
	name := u.q.upstream
	switch e.Status {
	case http.StatusUnauthorized, http.StatusForbidden:
		if u.shared(u.q) {
			return &PullError{"unauthorized", fmt.Sprintf("look at credentials: of the upstream %s in tarn's configuration", name),
				fmt.Errorf("%s answers %d to the node's credentials", name, e.Status)}
		}
		return &PullError{"unauthorized", "look for a typing error; to have a private image pulled as the node, " + u.toShare() + "; else the first pod with its pull secret brings it here",
			fmt.Errorf("%s answers %d to who shows no credential, and a pull shows none", name, e.Status)}
	case http.StatusNotFound, http.StatusGone:
		return &PullError{"not_found", "look for a typing error in its name or tag", fmt.Errorf("%s says that it has %w, or not all of it", name, ErrNoImage)}
	case http.StatusTooManyRequests:
		wait := max(e.RetryAfter, time.Second).Round(time.Second)
		return &PullError{"rate_limited", fmt.Sprintf("pull it again in %s; with credentials: of that upstream, the node's own quota is used", wait), fmt.Errorf("%s limits the rate of requests", name)}
	}
	return &PullError{"unreachable", "tarn status says since when; pull it again later", fmt.Errorf("%s: %w", name, err)}
}
