// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"

	"tarn/proxy"
)

func TestWhoPullsIsOneSentence(t *testing.T) {
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	asked := func(client string, ago time.Duration) proxy.LastRequest {
		return proxy.LastRequest{Client: client, At: now.Add(-ago)}
	}
	for want, last := range map[string][]proxy.LastRequest{
		"containerd pulled through tarn 12s ago, as its User-Agent says":                                   {asked("containerd", 12*time.Second), asked("other", time.Hour)},
		"nothing has asked for 3 hours: usual where no pod was started; tarn hosts check proves the way":   {asked("containerd", 3*time.Hour)},
		"nothing has asked for 5 minutes: usual where no pod was started; tarn hosts check proves the way": nil,
	} {
		if got := describeClients(last, now.Add(-5*time.Minute), now); got != want {
			t.Errorf("says %q, want %q", got, want)
		}
	}
}
