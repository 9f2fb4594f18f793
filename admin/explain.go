// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"tarn/explain"
	"tarn/history"
	"tarn/proxy"
)

// maxDecisions is the most that one answer has.
const maxDecisions = 1000

const (
	// maxExplaining bounds how many images a listener explains at once: each asks a
	// registry. At the socket others count than at a port, where anybody may fill it.
	maxExplaining = 4
	// explainPatience is how long one may wait for its turn, which is less than a
	// command does.
	explainPatience = 10 * time.Second
)

// explains serves explanations, so many at once.
func (o Options) explains() http.HandlerFunc {
	turns := make(chan struct{}, maxExplaining)
	return func(w http.ResponseWriter, r *http.Request) {
		n, ok := o.explained(w, r)
		if !ok {
			return
		}
		select {
		case turns <- struct{}{}:
			defer func() { <-turns }()
		case <-time.After(explainPatience):
			w.Header().Set("Retry-After", "5")
			refuse(w, http.StatusServiceUnavailable, "busy", fmt.Sprintf("%d images are being explained, and more are not at once", maxExplaining), "ask again, or over the admin socket, which has turns of its own")
			return
		case <-r.Context().Done():
			return
		}
		serveJSON(w, http.StatusOK, o.Explain(r.Context(), n))
	}
}

// explained reads which image is meant.
func (o Options) explained(w http.ResponseWriter, r *http.Request) (n proxy.ImageName, ok bool) {
	n, err := o.Parse(r.URL.Query().Get("image"))
	if err != nil {
		invalid(w, err.Error())
		return n, false
	}
	if n.Repository.Upstream == "" || n.Prefix != "" {
		invalid(w, "an image is explained by its name, with a tag or a whole digest: without a registry nobody can be asked")
		return n, false
	}
	return n, true
}

// Decisions is the document of /api/v1/decisions.
type Decisions struct {
	// Since is how far back all is remembered.
	Since time.Time `json:"since"`
	// Decisions are the earliest first; the next ones are those after the last ID.
	Decisions []explain.Event `json:"decisions"`
	// Day are the sums of the last 24 hours in quarters of an hour.
	Day []history.Sum `json:"day"`
}

// decisions takes limit, how many are wanted at most, after, the ID of the last that is
// known, and image, what repository, tag or digest must contain.
func (o Options) decisions(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	limit, after := int64(100), int64(0)
	for name, n := range map[string]*int64{"limit": &limit, "after": &after} {
		if s := query.Get(name); s != "" {
			v, err := strconv.ParseInt(s, 10, 64)
			if err != nil || v < 0 || name == "limit" && (v == 0 || v > maxDecisions) {
				invalid(w, name+" is a number, and limit at most "+strconv.Itoa(maxDecisions))
				return
			}
			*n = v
		}
	}
	image := query.Get("image")
	found := o.History.Find(func(e *history.Entry) bool {
		return e.ID > after && (image == "" || strings.Contains(e.Upstream+"/"+e.Repository+":"+e.Tag+"@"+string(e.Digest), image))
	}, int(limit))
	serveJSON(w, http.StatusOK, Decisions{Since: o.History.Reach(), Day: o.History.Day(), Decisions: told(found)})
}

// told are entries in words, the earliest first, of entries that are the latest first.
func told(found []history.Entry) []explain.Event {
	events := make([]explain.Event, len(found))
	for i, e := range found {
		events[len(found)-1-i] = explain.Event{Entry: e, Words: explain.Words(e)}
	}
	return events
}
