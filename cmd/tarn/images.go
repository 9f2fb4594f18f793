// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"tarn/admin"
	"tarn/images"

	"github.com/spf13/cobra"
)

func newImagesCommand() *cobra.Command {
	d := daemon{formats: []string{"wide"}}
	var filters []string
	cmd := d.register(&cobra.Command{
		Use:     "images [IMAGE]...",
		Aliases: []string{"image", "ls", "list"},
		Short:   "List the images that are here",
		Long: `List the images that are here, or those that are named: by repository, by tag, or
by a digest, which may be cut short as the list does; pin, unpin, evict and explain
take it so, too. HERE is how much of an image is, for the platforms of which anything
is. In a terminal a long name is cut in its middle; -o wide, or a pipe, has all of it.

Filters are given as --filter KEY=VALUE. Of one key any may match, and all keys must:
  upstream=ghcr.io      of that registry; * is all but a slash
  repository=team/*     with or without the registry before it
  tag=v1*               by tag
  platform=linux/arm64  of which that platform is here
  pinned, partial       or pinned=false, partial=false
  unused=24h            what nobody has asked for in that time`,
		ValidArgsFunction: d.completeImages,
		RunE: func(cmd *cobra.Command, args []string) error {
			path := "/api/v1/images"
			if query := (url.Values{"image": args, "filter": filters}).Encode(); query != "" {
				path += "?" + query
			}
			var answer struct{ Images []images.Image }
			return d.do(cmd, "GET", path, nil, &answer, func(w io.Writer) {
				if d.output == "wide" {
					showImagesWide(w, answer.Images)
				} else {
					showImages(w, answer.Images, terminalWidth(os.Stdout))
				}
			})
		},
	})
	cmd.Flags().StringArrayVar(&filters, "filter", nil, "only images that `KEY=VALUE` lets pass; may be given more than once")
	return cmd
}

// showImages has the short columns first, so that in a terminal of that width only names
// must be cut; 0 cuts none.
func showImages(w io.Writer, all []images.Image, width int) {
	const gap = 2
	rows := [][]string{{"DIGEST", "HERE", "USED", "PINNED", "IMAGE"}}
	for _, i := range all {
		pinned := "-"
		if i.Pinned {
			pinned = "pinned"
		}
		rows = append(rows, []string{fmt.Sprintf("%.19s", i.Digest), hereOf(i), age(i.Used), pinned, imageName(i)})
	}
	last := len(rows[0]) - 1
	widths := make([]int, last)
	for _, row := range rows {
		for c := range widths {
			widths[c] = max(widths[c], len(row[c]))
		}
	}
	for _, row := range rows {
		left := width
		for c, n := range widths {
			fmt.Fprintf(w, "%-*s", n+gap, row[c])
			left -= n + gap
		}
		fmt.Fprintln(w, cutMiddle(row[last], width, left))
	}
}

// cutMiddle has a name of at most left characters in a terminal, but never fewer than
// some that say anything. Its beginning is the registry's, and its end the tag.
func cutMiddle(name string, width, left int) string {
	const least = 12
	left = max(left, least)
	if width == 0 || len(name) <= left {
		return name
	}
	head := (left - 1) / 2
	return name[:head] + "…" + name[len(name)-(left-1-head):]
}

func showImagesWide(w io.Writer, all []images.Image) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer tw.Flush()
	fmt.Fprintln(tw, "DIGEST\tHERE\tOF\tUSED\tCONFIRMED\tPINNED\tPLATFORMS\tIMAGE")
	for _, i := range all {
		pinned := "-"
		if i.Pinned {
			pinned = "pinned"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", i.Digest, size(i.HereBytes), size(i.TotalBytes), age(i.Used), age(i.Confirmed),
			pinned, cmp.Or(strings.Join(i.Platforms, ","), "-"), imageName(i))
	}
}

// oneImage is for commands that take exactly one.
func oneImage(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("%d images are named; this takes one at a time", len(args))
	}
	return nil
}

// imageName is the image as other commands take it.
func imageName(i images.Image) string {
	name := i.Upstream + "/" + i.Repository
	if i.Tag != "" {
		return name + ":" + i.Tag
	}
	return name + "@" + i.Digest.String()
}

// hereOf is how much of an image is here.
func hereOf(i images.Image) string {
	const percent = 100
	if i.HereBytes >= i.TotalBytes {
		return size(i.HereBytes)
	}
	return fmt.Sprintf("%d%% of %s", int64(float64(i.HereBytes)/float64(i.TotalBytes)*percent), size(i.TotalBytes))
}

// age is how long ago that was, in as few characters as people read.
func age(t time.Time) string {
	const day = 24 * time.Hour
	d := max(0, time.Since(t))
	switch {
	case t.IsZero():
		return "never"
	case d < time.Minute:
		return fmt.Sprintf("%ds ago", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm ago", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh ago", d/time.Hour)
	}
	return fmt.Sprintf("%dd ago", d/day)
}

func newPinCommand() *cobra.Command {
	var d daemon
	var platforms []string
	cmd := d.register(&cobra.Command{
		Use:               "pin [IMAGE]",
		ValidArgsFunction: d.completeImage,
		Short:             "Keep an image from being evicted",
		Long: `Keep an image from being evicted: what is here of it, and what comes to be.
By tag (name:tag), the pin follows the tag; by digest (name@sha256:...) it stays.
Of what is here, a digest alone will do, also one that is cut short as in the list.
Nothing is downloaded. It is refused when all pins together would not fit, and when
the registry says that there is no such image, or not for these platforms.
Without an image, the pins are listed.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return d.listPins(cmd)
			}
			var answer admin.Pinned
			return d.do(cmd, "POST", "/api/v1/pins", admin.Order{Image: args[0], Platforms: platforms}, &answer, func(w io.Writer) {
				if answer.Warning != "" {
					fmt.Fprintln(cmd.ErrOrStderr(), "tarn: warning:", answer.Warning)
				}
				fmt.Fprintf(w, "pinned %s: %s of %s are here\n", answer.Image, size(answer.HereBytes), size(answer.TotalBytes))
				if answer.HereBytes < answer.TotalBytes || answer.TotalBytes == 0 {
					fmt.Fprintln(w, "what is missing is kept when it is pulled")
				}
			})
		},
	})
	cmd.Flags().StringSliceVar(&platforms, "platform", nil, "`platforms` of an index, such as linux/arm64, or all (default the node's)")
	return cmd
}

func (d *daemon) listPins(cmd *cobra.Command) error {
	var answer struct{ Pins []images.Pin }
	return d.do(cmd, "GET", "/api/v1/pins", nil, &answer, func(w io.Writer) {
		tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		defer tw.Flush()
		fmt.Fprintln(tw, "IMAGE\tPLATFORMS")
		for _, p := range answer.Pins {
			fmt.Fprintf(tw, "%s\t%s\n", p, cmp.Or(strings.Join(p.Platforms, ","), "all"))
		}
	})
}

func newUnpinCommand() *cobra.Command {
	var d daemon
	return d.register(&cobra.Command{
		Use:               "unpin IMAGE",
		ValidArgsFunction: d.completePin,
		Short:             "Let a pinned image be evicted again",
		Args:              oneImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			var answer admin.Unpinned
			return d.do(cmd, "DELETE", "/api/v1/pins", admin.Order{Image: args[0]}, &answer, func(w io.Writer) {
				fmt.Fprintln(w, "unpinned", answer.Image)
			})
		},
	})
}

func newEvictCommand() *cobra.Command {
	var d daemon
	return d.register(&cobra.Command{
		Use:               "evict IMAGE",
		Aliases:           []string{"rm", "rmi", "remove", "delete"},
		ValidArgsFunction: d.completeImage,
		Short:             "Remove an image from the store",
		Long: `Remove an image from the store, under whatever names it is known, with all that
no other stored image has. By digest, which may be cut short as in the list, the name
says nothing. Who pulls it just now gets
it whole; the next one has it fetched anew.`,
		Args: oneImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			var answer admin.Evicted
			return d.do(cmd, "POST", "/api/v1/evict", admin.Order{Image: args[0]}, &answer, func(w io.Writer) {
				fmt.Fprintf(w, "evicted %s: %d objects, %s\n", answer.Image, answer.Objects, size(answer.Bytes))
			})
		},
	})
}
