// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"

	"tarn/history"
	"tarn/proxy"

	"github.com/prometheus/client_golang/prometheus"
)

func TestWhoPullsIsOneSentence(t *testing.T) {
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	asked := func(client string, ago time.Duration) proxy.LastRequest {
		return proxy.LastRequest{Client: client, At: now.Add(-ago)}
	}
	day := history.Sum{FromDisk: 24 << 30, FromRegistry: 1 << 30}
	for want, last := range map[string][]proxy.LastRequest{
		"containerd pulls through tarn: last request 12s ago, 96% of 25GiB from the disk in 24 hours":                                                     {asked("containerd", 12*time.Second), asked("other", time.Hour)},
		"a client that is not known by its User-Agent pulls through tarn: last request 1s ago, 96% of 25GiB from the disk in 24 hours":                    {asked("other", time.Second)},
		"nothing has asked for 3 hours, which is usual where no pod was started: tarn hosts check proves the way, 96% of 25GiB from the disk in 24 hours": {asked("containerd", 3*time.Hour)},
	} {
		if got := describeClients(last, day, now.Add(-5*time.Minute), now); got != want {
			t.Errorf("says %q, want %q", got, want)
		}
	}
	want := "nothing has asked for 5 minutes, which is usual where no pod was started: tarn hosts check proves the way"
	if got := describeClients(nil, history.Sum{}, now.Add(-5*time.Minute), now); got != want {
		t.Errorf("says %q, want %q", got, want)
	}
}

// TestAPullOfTarnsOwnIsNobodyWhoPullsThroughIt, or the status would say that all is well
// where no runtime asks.
func TestAPullOfTarnsOwnIsNobodyWhoPullsThroughIt(t *testing.T) {
	t.Parallel()
	a := &api{metrics: proxy.NewMetrics(prometheus.NewRegistry()), history: history.New(time.Now)}
	a.history.Add(history.Entry{At: time.Now().Add(-time.Minute), Client: "podman", Outcome: "hit", Count: 1})
	a.history.Add(history.Entry{At: time.Now(), Client: "tarn pull", Own: true, Outcome: "miss", Count: 1})
	if last := a.lastRequests(); len(last) != 1 || last[0].Client != "podman" {
		t.Errorf("%+v", last)
	}
}
