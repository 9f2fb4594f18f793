// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"tarn/history"
)

// What the page shows comes as server-sent events (WHATWG HTML 9.2): each is the whole
// of it, so that who missed some has missed nothing. It is made once for all who
// listen, while somebody does.

const (
	// maxStreams bounds who listens at once: a browser has one for all its tabs.
	maxStreams = 16
	// liveEvery is how often it is looked whether something has changed.
	liveEvery = time.Second
	// quietAfter is how long nothing may be sent before a comment is, so that who has
	// left is found.
	quietAfter = 15 * time.Second
	// streamPatience is how long a client may take nothing.
	streamPatience = 10 * time.Second
	// liveFlights is how many downloads each event has, those that are running first.
	// The status says how many there are.
	liveFlights = 100
	// liveDecisions is how many of the last decisions each event has.
	liveDecisions = 50
)

// Live is the document of an event.
type Live struct {
	Status  any           `json:"status"`
	Flights []Flight      `json:"flights"`
	Day     []history.Sum `json:"day"`
	// Decisions are the last ones. Names says, where it is not there, where names of
	// images are told.
	Decisions *Decisions `json:"decisions,omitempty"`
	Names     string     `json:"names,omitempty"`
}

// live is what there is to show now.
func (o Options) live() Live {
	running := flights(o.Store)
	slices.SortStableFunc(running, func(a, b Flight) int {
		switch {
		case a.Parked == b.Parked:
			return 0
		case b.Parked:
			return -1
		}
		return 1
	})
	l := Live{Status: o.Status(), Flights: running[:min(len(running), liveFlights)], Day: o.History.Day(), Names: o.NamesElsewhere}
	if l.Names == "" {
		found := o.History.Find(func(*history.Entry) bool { return true }, liveDecisions)
		l.Decisions = &Decisions{Since: o.History.Reach(), Decisions: told(found), Day: []history.Sum{}}
	}
	return l
}

// feed sends the same to all who listen.
type feed struct {
	live    func() Live
	closing <-chan struct{} // closed when nobody is to be sent anything any more

	mu        sync.Mutex
	listeners map[chan []byte]bool
	last      []byte
	watching  bool
}

func newFeed(live func() Live, closing <-chan struct{}) *feed {
	return &feed{live: live, closing: closing, listeners: make(map[chan []byte]bool)}
}

// join returns where each event comes, the first of them at once; nil where too many
// listen.
func (f *feed) join() chan []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.listeners) >= maxStreams {
		return nil
	}
	c := make(chan []byte, 1)
	f.listeners[c] = true
	if !f.watching {
		f.watching, f.last = true, f.make()
		go f.watch()
	}
	c <- f.last
	return c
}

func (f *feed) leave(c chan []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.listeners, c)
}

func (f *feed) make() []byte {
	data, err := json.Marshal(f.live())
	if err != nil {
		return []byte("{}") // there is nothing in it that cannot be
	}
	return data
}

// watch ends when nobody listens any more.
func (f *feed) watch() {
	tick := time.NewTicker(liveEvery)
	defer tick.Stop()
	for range tick.C {
		next := f.make()
		f.mu.Lock()
		if len(f.listeners) == 0 {
			f.watching = false
			f.mu.Unlock()
			return
		}
		if !bytes.Equal(next, f.last) {
			f.last = next
			for c := range f.listeners {
				select {
				case <-c: // who has not taken the one before has no use for it now
				default:
				}
				c <- next
			}
		}
		f.mu.Unlock()
	}
}

func (f *feed) serve(w http.ResponseWriter, r *http.Request) {
	c := f.join()
	if c == nil {
		w.Header().Set("Retry-After", "5")
		refuse(w, http.StatusServiceUnavailable, "too_many", fmt.Sprintf("%d listen to events already, and more may not", maxStreams), "close one, or ask /api/v1/status now and then")
		return
	}
	defer f.leave(c)
	out := http.NewResponseController(w)
	w.Header().Set("Content-Type", "text/event-stream")
	w.WriteHeader(http.StatusOK)
	quiet := time.NewTicker(quietAfter)
	defer quiet.Stop()
	for {
		var text []byte
		select {
		case <-r.Context().Done():
			return
		case <-f.closing: // a stop that waited for this one would wait in vain
			return
		case data := <-c:
			text = append(append([]byte("data: "), data...), "\n\n"...)
			quiet.Reset(quietAfter)
		case <-quiet.C:
			text = []byte(":\n\n")
		}
		out.SetWriteDeadline(time.Now().Add(streamPatience))
		if _, err := w.Write(text); err != nil {
			return
		}
		if err := out.Flush(); err != nil {
			return
		}
	}
}
