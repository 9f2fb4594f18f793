// SPDX-License-Identifier: Apache-2.0

// Command tarn is a node-local caching proxy for OCI registries.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/spf13/cobra"
)

// version and commit are set when a release is linked.
var (
	version = "devel"
	commit  = "unknown"
)

func main() {
	err := newCommand().Execute()
	var exit exitError
	if errors.As(err, &exit) {
		os.Exit(int(exit))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tarn:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "tarn",
		Short:         "A node-local caching proxy for OCI registries",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(newServeCommand(), newStatusCommand(), newExplainCommand(), newHostsCommand(), newImagesCommand(), newPinCommand(), newUnpinCommand(), newEvictCommand(), newVerifyCommand(), newReloadCommand(), newSupportCommand(), &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintf(cmd.OutOrStdout(), "tarn %s (commit %s) %s %s/%s\n", version, commit, runtime.Version(), runtime.GOOS, runtime.GOARCH)
		},
	})
	return root
}
