// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"tarn/admin"

	"github.com/spf13/cobra"
)

const (
	// maxPullList bounds what a list of images may have, in bytes, and maxPullImages in
	// images, as the daemon does.
	maxPullList   = 1 << 20
	maxPullImages = 1000
)

func newPullCommand() *cobra.Command {
	var d daemon
	var order admin.Order
	cmd := d.register(&cobra.Command{
		Use:   "pull IMAGE...",
		Short: "Fetch images into the store, before anybody asks",
		Long: `Fetch images into the store, before anybody asks: what the registry says now that the
name means, of an index for this node's platform, and all that it leads to. What is
here is not fetched again, and what comes stays, also where the pull fails or is ended
with ctrl-C, which stops it at once; the next one goes on with it.

With - the images are read from standard input, as many on a line as there are, but for
what follows a #. So a node gets all that a cluster runs:

  kubectl get pods -A -o jsonpath='{range .items[*].spec.containers[*]}{.image}{"\n"}{end}' | tarn pull -

tarn asks as anonymous, or as the node for what is under share: in its configuration;
--as-node makes sure of that. A private image that is not shared comes with the first pod
that has its pull secret. The exit code is 1 when any image has not come.`,
		Example: `  tarn pull alpine:3.20 ghcr.io/org/app:v1
  tarn pull --pin --platform linux/amd64 --platform linux/arm64 registry.k8s.io/pause:3.10`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("name an image, or - for a list on standard input")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if order.Images, err = pullList(args, cmd.InOrStdin()); err != nil {
				return err
			}
			return d.pull(cmd, order)
		},
	})
	set := cmd.Flags()
	set.StringSliceVar(&order.Platforms, "platform", nil, "`platforms` of an index, such as linux/arm64, or all (default the node's)")
	set.BoolVar(&order.Pin, "pin", false, "pin what is pulled, too: it is not evicted then")
	set.BoolVar(&order.AsNode, "as-node", false, "only with the node's credentials, and so only what is under share:")
	return cmd
}

// pullList are the images that are named, each once, and those of a list where one of them
// is -.
func pullList(args []string, list io.Reader) (all []string, err error) {
	for _, arg := range args {
		if arg != "-" {
			all = append(all, arg)
			continue
		}
		read := &io.LimitedReader{R: list, N: maxPullList + 1}
		lines := bufio.NewScanner(read)
		for lines.Scan() {
			line, _, _ := strings.Cut(lines.Text(), "#") // which no image has in its name
			all = append(all, strings.Fields(line)...)
		}
		switch {
		case read.N == 0:
			return nil, fmt.Errorf("the list has more than %d bytes", maxPullList)
		case lines.Err() != nil:
			return nil, fmt.Errorf("the list cannot be read: %w", lines.Err())
		}
	}
	var once []string
	for _, name := range all {
		if !slices.Contains(once, name) {
			once = append(once, name)
		}
	}
	switch {
	case len(once) == 0:
		return nil, errors.New("the list names no image")
	case len(once) > maxPullImages:
		return nil, fmt.Errorf("%d images are named; %d is the most at once", len(once), maxPullImages)
	}
	return once, nil
}

// pull has the daemon pull, and shows how far it has come.
func (d *daemon) pull(cmd *cobra.Command, order admin.Order) error {
	// Who interrupts it ends it in the daemon, too.
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	resp, err := d.ask(ctx, "POST", "/api/v1/pull", order)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if d.output == "json" {
		return d.pullAsJSON(cmd, resp.Body)
	}
	show := newPullView(cmd.OutOrStdout(), cmd.ErrOrStderr())
	var sum *admin.PullSummary
	for lines := newAnswerLines(resp.Body); ; {
		var line admin.PullLine
		if !lines.next(&line) {
			break
		}
		show.line(line)
		sum = line.Summary
	}
	show.end()
	switch {
	case ctx.Err() != nil:
		show.interrupted()
		return exitError(signalled + int(syscall.SIGINT))
	case sum == nil:
		return errors.New("the daemon has broken off: tarn status says whether it runs; what came stays, and the same command goes on")
	}
	if show.summary(*sum); sum.Failed > 0 {
		return exitError(1)
	}
	return show.failed
}

// pullAsJSON prints the lines as they are.
func (d *daemon) pullAsJSON(cmd *cobra.Command, body io.Reader) error {
	var last admin.PullLine
	for lines := newAnswerLines(body); lines.Scan(); {
		if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\n", lines.Bytes()); err != nil {
			return err
		}
		last = admin.PullLine{}
		json.Unmarshal(lines.Bytes(), &last)
	}
	switch {
	case last.Summary == nil:
		return errors.New("the pull has not come to its end")
	case last.Summary.Failed > 0:
		return exitError(1)
	}
	return nil
}

// newPullView has bars where both outputs are terminals, and else plain lines.
func newPullView(out, words io.Writer) *pullView {
	v := &pullView{out: out, words: words, seen: make(map[string]bool)}
	if terminalWidth(os.Stderr) > 0 {
		v.width = terminalWidth(os.Stdout)
	}
	return v
}
