// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// nameless has all registries as one: it takes the label upstream away and adds up
// what it parted. Each family with another label that is not known to name nothing is
// left out.
type nameless struct{ prometheus.Gatherer }

// harmless labels have values of tarn's own choice, or of a standard's.
var harmless = []string{"kind", "outcome", "code", "method", "cause", "habit", "client", "version", "commit", "goversion"}

// leastOf are the families of which a sum would say nothing: what counts is the
// registry that grants least.
var leastOf = []string{"tarn_upstream_ratelimit_limit", "tarn_upstream_ratelimit_remaining"}

func (n nameless) Gather() ([]*dto.MetricFamily, error) {
	all, err := n.Gatherer.Gather()
	for i, f := range all {
		all[i] = withoutUpstream(f)
	}
	return slices.DeleteFunc(all, func(f *dto.MetricFamily) bool {
		return slices.ContainsFunc(f.Metric, func(m *dto.Metric) bool {
			return slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return !slices.Contains(harmless, l.GetName()) })
		})
	}), err
}

// withoutUpstream is the family without that label; f itself, whose parts are others',
// is not changed.
func withoutUpstream(f *dto.MetricFamily) *dto.MetricFamily {
	isUpstream := func(l *dto.LabelPair) bool { return l.GetName() == "upstream" }
	if !slices.ContainsFunc(f.Metric, func(m *dto.Metric) bool { return slices.ContainsFunc(m.Label, isUpstream) }) {
		return f
	}
	out := &dto.MetricFamily{Name: f.Name, Help: f.Help, Type: f.Type, Unit: f.Unit}
	merged := make(map[string]*dto.Metric)
	for _, m := range f.Metric {
		labels := slices.DeleteFunc(slices.Clone(m.Label), isUpstream)
		var key strings.Builder
		for _, l := range labels {
			key.WriteString(l.GetValue() + "\x00")
		}
		if first := merged[key.String()]; first != nil {
			merge(first, m, slices.Contains(leastOf, f.GetName()))
			continue
		}
		one := proto.Clone(m).(*dto.Metric)
		one.Label = labels
		merged[key.String()] = one
		out.Metric = append(out.Metric, one)
	}
	return out
}

// merge adds from to m, or with least takes the smaller gauge.
func merge(m, from *dto.Metric, least bool) {
	switch {
	case m.Counter != nil:
		m.Counter.Value = proto.Float64(m.Counter.GetValue() + from.Counter.GetValue())
	case m.Gauge != nil && least:
		m.Gauge.Value = proto.Float64(min(m.Gauge.GetValue(), from.Gauge.GetValue()))
	case m.Gauge != nil:
		m.Gauge.Value = proto.Float64(m.Gauge.GetValue() + from.Gauge.GetValue())
	case m.Histogram != nil:
		h, other := m.Histogram, from.Histogram
		h.SampleCount = proto.Uint64(h.GetSampleCount() + other.GetSampleCount())
		h.SampleSum = proto.Float64(h.GetSampleSum() + other.GetSampleSum())
		for i, b := range h.Bucket { // one family's have the same bounds
			b.CumulativeCount = proto.Uint64(b.GetCumulativeCount() + other.Bucket[i].GetCumulativeCount())
		}
	}
}
