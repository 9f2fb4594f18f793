// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"time"

	"tarn/history"
	"tarn/proxy"

	"github.com/docker/go-units"
)

// quietFor is how long nothing may have asked before that is worth a word: a node
// on which pods are started asks more often.
const quietFor = time.Hour

// describeClients is one sentence on who pulls through this tarn: last are the kinds
// of clients, the latest first, and day is what was served within a day.
func describeClients(last []proxy.LastRequest, day history.Sum, started, now time.Time) string {
	since := started
	if len(last) > 0 {
		since = last[0].At
		if ago := now.Sub(since); ago < quietFor {
			client := last[0].Client
			if client == "other" {
				client = "a client that is not known by its User-Agent"
			}
			return fmt.Sprintf("%s pulls through tarn: last request %s ago%s", client, ago.Round(time.Second), describeDay(day))
		}
	}
	return fmt.Sprintf("nothing has asked for %s, which is usual where no pod was started: tarn hosts check proves the way%s",
		strings.ToLower(units.HumanDuration(now.Sub(since))), describeDay(day))
}

// describeDay says how much of what was served came from the disk; "" where nothing
// was.
func describeDay(day history.Sum) string {
	all := day.FromDisk + day.FromRegistry
	if all == 0 {
		return ""
	}
	return fmt.Sprintf(", %d%% of %s from the disk in 24 hours", day.FromDisk*100/all, size(all))
}

// lastRequests are the kinds of clients that have asked since the start, or before it
// as far as that is remembered, the latest first.
func (a *api) lastRequests() []proxy.LastRequest {
	last := a.metrics.LastRequests()
	if len(last) > 0 {
		return last
	}
	for _, e := range a.history.Find(func(e *history.Entry) bool { return e.Client != "" && !e.Own }, 1) {
		at := e.At
		if e.Last.After(at) {
			at = e.Last
		}
		last = append(last, proxy.LastRequest{Client: e.Client, At: at})
	}
	return last
}
