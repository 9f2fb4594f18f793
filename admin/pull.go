// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"tarn/proxy"
)

const (
	// maxPulls is how many orders are carried out at once: each has four objects on
	// their way.
	maxPulls = 4
	// maxImages is how many images one order may name: a cluster's.
	maxImages = 1000
)

// errPulling: there are as many pulls as there may be.
var errPulling = fmt.Errorf("%d pulls are running, and there are no more at once", maxPulls)

// PullLine is a line of the answer to a pull. It is about one of the images, or, at the
// end, has a Summary.
type PullLine struct {
	// Image is its canonical name, or what was named where that is none.
	Image string `json:"image,omitempty"`
	// Planned is what the image has, once that is known.
	Planned *proxy.Pulled `json:"planned,omitempty"`
	// Object is how one of its objects does.
	Object *proxy.PulledObject `json:"object,omitempty"`
	// Pulled is what came of the image, and Failure why not all of it did.
	Pulled  *proxy.Pulled `json:"pulled,omitempty"`
	Pinned  bool          `json:"pinned,omitempty"`
	Failure *Failure      `json:"failure,omitempty"`
	// Summary ends the answer: one without it was broken off.
	Summary *PullSummary `json:"summary,omitempty"`
}

// PullSummary is what all of it came to.
type PullSummary struct {
	Images       int   `json:"images"`
	Failed       int   `json:"failed"`
	HereBytes    int64 `json:"hereBytes"`
	FetchedBytes int64 `json:"fetchedBytes"`
}

// pull fetches the images one after the other, and answers with a line for each step. It
// ends when the client leaves.
func (i imageAPI) pull(w http.ResponseWriter, r *http.Request) {
	o, ok := readOrder(w, r)
	if !ok {
		return
	}
	switch {
	case len(o.Images) == 0:
		invalid(w, "no image is named: images is a list of names")
		return
	case len(o.Images) > maxImages:
		invalid(w, fmt.Sprintf("%d images are named; %d is the most", len(o.Images), maxImages))
		return
	case i.fetch == nil:
		refuse(w, http.StatusServiceUnavailable, "closing", "nothing can be pulled now", "ask again")
		return
	}
	select {
	case i.pulls <- struct{}{}:
		defer func() { <-i.pulls }()
	default:
		serveFailure(w, errPulling)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := &lines{control: http.NewResponseController(w), to: json.NewEncoder(w)}
	var sum PullSummary
	for _, name := range o.Images {
		if r.Context().Err() != nil {
			return // nobody hears any more
		}
		end := i.pullOne(r.Context(), name, o, out)
		sum.Images++
		if end.Failure != nil {
			sum.Failed++
		}
		if end.Pulled != nil {
			sum.HereBytes += end.Pulled.HereBytes
			sum.FetchedBytes += end.Pulled.FetchedBytes
		}
		out.send(end)
	}
	out.send(PullLine{Summary: &sum})
}

// pullOne pulls one image, and returns the line that says what came of it.
func (i imageAPI) pullOne(ctx context.Context, name string, o Order, out *lines) PullLine {
	n, err := i.parse(name)
	if err != nil {
		return PullLine{Image: name, Failure: &Failure{err.Error(), codeInvalid, "write it as an image is written in a pod"}}
	}
	end := PullLine{Image: n.String()}
	pulled, err := i.fetch(ctx, n, proxy.PullOptions{
		Platforms: o.Platforms,
		AsNode:    o.AsNode,
		Planned: func(p proxy.Pulled) error {
			if o.Pin {
				if _, err := i.cache.Images().Pin(withPlatforms(pinOf(n), o.Platforms)); err != nil {
					return err
				}
				end.Pinned = true
			}
			out.send(PullLine{Image: n.String(), Planned: &p})
			return nil
		},
		Report: func(object proxy.PulledObject) { out.send(PullLine{Image: n.String(), Object: &object}) },
	})
	end.Pulled = &pulled
	if err != nil {
		end.Failure = pullFailure(err)
	}
	return end
}

// pullFailure is a pull's error, whose own words go before those of what it wraps, but for
// a pin that was refused.
func pullFailure(err error) *Failure {
	_, f := failureOf(err)
	var said *proxy.PullError
	if errors.As(err, &said) {
		f.Message = said.Error()
		if said.Code != "failed" {
			f.Code, f.Next = said.Code, cmp.Or(said.Next, f.Next)
		}
	}
	return &f
}

// lines are an answer line by line. It is safe for concurrent use.
type lines struct {
	mu      sync.Mutex
	control *http.ResponseController
	to      *json.Encoder
}

// send sends a line at once. A client that takes none for so long is gone; its context
// ends then.
func (l *lines) send(v any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.control.SetWriteDeadline(time.Now().Add(reportTimeout))
	l.to.Encode(v)
	l.control.Flush()
}
