// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// clientKinds are the clients that are told apart by their User-Agent, which
// anybody may write: it proves nothing, and decides nothing.
var clientKinds = []struct {
	name   string
	agents []string // how the User-Agent begins, in lower case
}{
	{"containerd", []string{"containerd/"}},
	{"cri-o", []string{"cri-o/"}},
	{"docker", []string{"docker/"}},
	{"podman", []string{"libpod/", "buildah/", "skopeo/", "containers/"}},
	{"buildkit", []string{"buildkit/"}},
	{otherClient, nil},
}

const (
	otherClient = "other"
	otherKind   = 5 // in clientKinds
)

// clients are when each kind of client asked last, in nanoseconds since 1970; 0 for
// never.
type clients [6]atomic.Int64

func (c *clients) note(userAgent string, at time.Time) {
	c[clientKind(userAgent)].Store(at.UnixNano())
}

func clientKind(userAgent string) int {
	for i, kind := range clientKinds {
		for _, agent := range kind.agents {
			if len(userAgent) >= len(agent) && strings.EqualFold(userAgent[:len(agent)], agent) {
				return i
			}
		}
	}
	return otherKind
}

// clientName is the kind of client, or of others what their User-Agent begins with, as
// far as that is a product's name (RFC 9110 10.1.5).
func clientName(userAgent string) string {
	kind := clientKind(userAgent)
	if kind != otherKind {
		return clientKinds[kind].name
	}
	const most = 32 // bytes
	product, _, _ := strings.Cut(userAgent, "/")
	if product == "" || len(product) > most || strings.ContainsFunc(product, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
	}) {
		return otherClient
	}
	return product
}

// LastRequest is when a kind of client asked last for a manifest, a blob or a list.
type LastRequest struct {
	Client string    `json:"client"` // containerd, cri-o, docker, podman, buildkit or other
	At     time.Time `json:"at"`
}

func (c *clients) last() []LastRequest {
	last := []LastRequest{}
	for i := range c {
		if at := c[i].Load(); at != 0 {
			last = append(last, LastRequest{clientKinds[i].name, time.Unix(0, at)})
		}
	}
	slices.SortFunc(last, func(a, b LastRequest) int { return b.At.Compare(a.At) })
	return last
}

var lastRequest = prometheus.NewDesc("tarn_client_last_request_timestamp_seconds",
	"Seconds since 1970 when a client of that kind, by its User-Agent, asked last for a manifest, a blob or a list. Absent for who never did.",
	[]string{"client"}, nil)

// Describe implements prometheus.Collector.
func (c *clients) Describe(descs chan<- *prometheus.Desc) { descs <- lastRequest }

// Collect implements prometheus.Collector.
func (c *clients) Collect(metrics chan<- prometheus.Metric) {
	for i := range c {
		if at := c[i].Load(); at != 0 {
			metrics <- prometheus.MustNewConstMetric(lastRequest, prometheus.GaugeValue, float64(at)/1e9, clientKinds[i].name)
		}
	}
}
