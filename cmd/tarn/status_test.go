// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"tarn/admin"

	"github.com/opencontainers/go-digest"
)

func TestWhatIsOnItsWayIsALineEach(t *testing.T) {
	total := int64(3 << 20)
	var flights []admin.Flight
	for range 12 {
		flights = append(flights, admin.Flight{Digest: digest.FromString("one"), Upstream: "ghcr.io", HereBytes: 1 << 20, TotalBytes: &total, Readers: 2, Since: time.Now().Add(-time.Minute)})
	}
	flights = append(flights, admin.Flight{Digest: digest.FromString("parked"), Parked: true}, admin.Flight{Digest: digest.FromString("one"), SourceDomain: "listed", Since: time.Now()})
	var text bytes.Buffer
	showFlights(&text, flights)
	lines := strings.Split(text.String(), "\n")
	if len(lines) != maxShownFlights+2 || lines[0] != "fetching sha256:7692c3ad3540 from ghcr.io: 1MiB of 3MiB, 2 readers, begun about a minute ago" || lines[maxShownFlights] != "and 3 more: /api/v1/flights" {
		t.Errorf("%q", lines)
	}
}
