// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"tarn/admin"
	"tarn/index"
	"tarn/upstream"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

func newStatusCommand() *cobra.Command {
	var d daemon
	return d.register(&cobra.Command{
		Use:   "status",
		Short: "Say who pulls through tarn, and how it does",
		Long: `Say who pulls through tarn, by what their User-Agent says, what is kept, and which
registries are in trouble. As JSON it is the document of /api/v1/status.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s struct {
				status
				Index index.Counts `json:"index"`
			}
			if err := d.do(cmd, "GET", "/api/v1/status", nil, &s, func(w io.Writer) {
				showStatus(w, s.status, s.Index)
			}); err != nil || s.Cache.Flights == 0 || d.output == "json" {
				return err
			}
			var f struct{ Flights []admin.Flight }
			return d.do(cmd, "GET", "/api/v1/flights", nil, &f, func(w io.Writer) { showFlights(w, f.Flights) })
		},
	})
}

// showStatus prints the verdict first, and then what it rests on.
func showStatus(w io.Writer, s status, rows index.Counts) {
	fmt.Fprintln(w, s.Clients)
	fmt.Fprintf(w, "store: %s of %s in %s, %d objects, %d tags, %d downloads running\n",
		size(s.Cache.UsedBytes), size(s.Cache.MaxBytes), s.Dir, rows.Objects, rows.Tags, s.Cache.Flights)
	if d := s.Day; d.Requests > 0 {
		fmt.Fprintf(w, "24 hours: %d requests, %s from the disk, %s as it came; registries sent %s\n",
			d.Requests, size(d.FromDisk), size(d.FromRegistry), size(d.Received))
	}
	if s.Cache.Trouble != "" {
		fmt.Fprintln(w, "trouble: the disk refuses, and objects pass through:", s.Cache.Trouble)
	}
	for _, u := range append(s.Upstreams, s.Unlisted...) {
		showUpstream(w, u)
	}
	fmt.Fprintf(w, "tarn %s at %s since %s\n", s.Version, s.Listen, s.Started.Local().Format(time.DateTime))
}

// maxShownFlights bounds a list that is for people.
const maxShownFlights = 10

// showFlights says what is on its way, a line each.
func showFlights(w io.Writer, flights []admin.Flight) {
	flights = slices.DeleteFunc(flights, func(f admin.Flight) bool { return f.Parked })
	for i, f := range flights {
		if i == maxShownFlights {
			fmt.Fprintf(w, "and %d more: /api/v1/flights\n", len(flights)-i)
			return
		}
		of := ""
		if f.TotalBytes != nil {
			of = " of " + size(*f.TotalBytes)
		}
		fmt.Fprintf(w, "fetching %.19s from %s: %s%s, %d readers, begun %s\n", f.Digest, cmp.Or(f.Upstream, f.SourceDomain), size(f.HereBytes), of, f.Readers, ago(f.Since))
	}
}

// showUpstream says how a registry does, in a line, and what to do about what does not
// answer, in a line each.
func showUpstream(w io.Writer, u upstream.Health) {
	var parts []string
	if u.Effect != "" {
		parts = append(parts, u.Effect)
	}
	if u.Credentials != "" {
		parts = append(parts, "clients' own credentials are used")
	}
	if u.LimitedUntil != nil {
		parts = append(parts, "limits requests until "+u.LimitedUntil.Local().Format(time.DateTime))
	}
	if u.RateLimit != nil {
		parts = append(parts, quota(*u.RateLimit))
	}
	fmt.Fprintf(w, "%s: %s\n", u.Name, cmp.Or(strings.Join(parts, "; "), "no trouble seen"))
	if u.Credentials != "" {
		fmt.Fprintf(w, "  %s\n", u.Credentials)
	}
	for _, f := range u.Failing {
		fmt.Fprintf(w, "  %s since %s: %s\n", f.Origin, f.Since.Local().Format(time.DateTime), f.Cause)
		if f.Advice != "" {
			fmt.Fprintf(w, "  to do: %s\n", f.Advice)
		}
	}
}

// quota says how many requests a registry still grants, and for how long that holds.
func quota(l upstream.RateLimit) string {
	said := fmt.Sprintf("grants %d more requests", l.Remaining)
	if l.Limit > 0 {
		said = fmt.Sprintf("grants %d of %d requests still", l.Remaining, l.Limit)
	}
	if seconds, err := strconv.Atoi(l.Window); err == nil && seconds > 0 {
		said += " in " + strings.ToLower(units.HumanDuration(time.Duration(seconds)*time.Second))
	}
	return said + ", as it said " + ago(l.Seen)
}
