// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"tarn/admin"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
)

// defaultVerifyRate leaves a disk time for others.
const defaultVerifyRate = "100MiB"

func newVerifyCommand() *cobra.Command {
	var d daemon
	var rate string
	cmd := d.register(&cobra.Command{
		Use:   "verify",
		Short: "Check every stored file against its digest",
		Long: `Check every stored file against its digest. What is not what its digest says is
dropped and named, and the exit code is 1 then. What is asked for meanwhile is served.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			bytesPerSecond, err := parseSize(rate)
			if err != nil || strings.HasSuffix(rate, "%") {
				return fmt.Errorf("--rate: %w", cmp.Or(err, errSize))
			}
			// Who interrupts it ends it in the daemon, too.
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			resp, err := d.ask(ctx, "POST", "/api/v1/verify", admin.Order{Rate: bytesPerSecond.bytes})
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			return d.follow(cmd, resp.Body)
		},
	})
	cmd.Flags().StringVar(&rate, "rate", defaultVerifyRate, "how much is read a second, a `size`; 0 is as fast as the disk")
	return cmd
}

// follow shows how far verifying has come, and what came out.
func (d *daemon) follow(cmd *cobra.Command, body io.Reader) error {
	bars := newBars(os.Stderr)
	var bar *mpb.Bar
	var v admin.Verified
	for lines := newAnswerLines(body); ; {
		next := admin.Verified{}
		if !lines.next(&next) {
			break
		}
		v = next
		if bars != nil && bar == nil {
			bar = newBar(bars, "verify", max(1, v.OfBytes), 0)
		}
		if bar != nil {
			bar.SetCurrent(v.Bytes)
		}
	}
	if bar != nil {
		bar.Abort(false)
	}
	if bars != nil {
		bars.Wait()
	}
	if err := shown(cmd, func(w io.Writer) {
		if d.output == "json" {
			e := json.NewEncoder(w)
			e.SetIndent("", "  ")
			e.Encode(v.Verification)
			return
		}
		for _, b := range v.Bad {
			fmt.Fprintln(w, "bad, dropped:", b)
		}
		for _, m := range v.Missing {
			fmt.Fprintln(w, "missing:     ", m)
		}
		fmt.Fprintf(w, "%d of %d files, %s: %d bad, %d missing\n", v.Files, v.OfFiles, size(v.Bytes), len(v.Bad), len(v.Missing))
	}); err != nil {
		return err
	}
	switch {
	case v.Error != "":
		return errors.New(v.Error)
	case !v.Done:
		return errors.New("verify has not come to its end")
	}
	if n := len(v.Bad) + len(v.Missing); n > 0 {
		return fmt.Errorf("%d of %d files were not as they were stored", n, v.OfFiles)
	}
	return nil
}
