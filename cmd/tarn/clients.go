// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"tarn/proxy"

	"github.com/docker/go-units"
)

// quietFor is how long nothing may have asked before that is worth a word: a node
// on which pods are started asks more often.
const quietFor = time.Hour

// describeClients is one sentence on who pulls through this tarn: last are the kinds
// of clients, the latest first.
func describeClients(last []proxy.LastRequest, started, now time.Time) string {
	since := started
	if len(last) > 0 {
		since = last[0].At
		if ago := now.Sub(since); ago < quietFor {
			client := last[0].Client
			if client == "other" {
				return fmt.Sprintf("a client that is not known by its User-Agent asked tarn %s ago", ago.Round(time.Second))
			}
			return fmt.Sprintf("%s pulled through tarn %s ago, as its User-Agent says", client, ago.Round(time.Second))
		}
	}
	return fmt.Sprintf("nothing has asked for %s: usual where no pod was started; tarn hosts check proves the way",
		units.HumanDuration(now.Sub(since)))
}
