// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"tarn/explain"
	"tarn/history"
)

// maxDecisions is the most that one answer has.
const maxDecisions = 1000

func (o Options) explain(w http.ResponseWriter, r *http.Request) {
	n, err := o.Parse(r.URL.Query().Get("image"))
	if err != nil {
		invalid(w, err.Error())
		return
	}
	if n.Repository.Upstream == "" || n.Prefix != "" {
		invalid(w, "an image is explained by its name, with a tag or a whole digest: without a registry nobody can be asked")
		return
	}
	serveJSON(w, http.StatusOK, o.Explain(r.Context(), n))
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
