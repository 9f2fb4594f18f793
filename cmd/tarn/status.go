// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"time"

	"tarn/index"
	"tarn/upstream"

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
			return d.do(cmd, "GET", "/api/v1/status", nil, &s, func(w io.Writer) {
				fmt.Fprintln(w, s.Clients)
				fmt.Fprintf(w, "store: %s of %s in %s, %d objects, %d tags, %d downloads running\n",
					size(s.Cache.UsedBytes), size(s.Cache.MaxBytes), s.Dir, s.Index.Objects, s.Index.Tags, s.Cache.Flights)
				if s.Cache.Trouble != "" {
					fmt.Fprintln(w, "trouble: the disk refuses, and objects pass through:", s.Cache.Trouble)
				}
				for _, u := range append(s.Upstreams, s.Unlisted...) {
					showUpstream(w, u)
				}
				fmt.Fprintf(w, "tarn %s at %s since %s\n", s.Version, s.Listen, s.Started.Format(time.DateTime))
			})
		},
	})
}

// showUpstream says how a registry does, in a line, and what to do about what does not
// answer, in a line each.
func showUpstream(w io.Writer, u upstream.Health) {
	var parts []string
	if u.Effect != "" {
		parts = append(parts, u.Effect)
	}
	if u.LimitedUntil != nil {
		parts = append(parts, "limits requests until "+u.LimitedUntil.Format(time.DateTime))
	}
	if u.RateLimit != nil {
		parts = append(parts, fmt.Sprintf("grants %d more requests", u.RateLimit.Remaining))
	}
	fmt.Fprintf(w, "%s: %s\n", u.Name, cmp.Or(strings.Join(parts, "; "), "no trouble seen"))
	for _, f := range u.Failing {
		fmt.Fprintf(w, "  %s since %s: %s\n", f.Origin, f.Since.Format(time.DateTime), f.Cause)
		if f.Advice != "" {
			fmt.Fprintf(w, "  to do: %s\n", f.Advice)
		}
	}
}
