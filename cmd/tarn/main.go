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
		var refused *refusal
		if errors.As(err, &refused) && refused.next != "" {
			fmt.Fprintln(os.Stderr, "  to do:", refused.next)
		}
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
	root.Version = versionLine()
	root.SetVersionTemplate("{{.Version}}\n")
	root.AddCommand(otherWords()...)
	root.AddCommand(newServeCommand(), newStatusCommand(), newHostsCommand(), newImagesCommand(), newPinCommand(), newUnpinCommand(), newEvictCommand(), newPullCommand(), newVerifyCommand(), newReloadCommand(), &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintln(cmd.OutOrStdout(), versionLine())
		},
	})
	return root
}

func versionLine() string {
	return fmt.Sprintf("tarn %s (commit %s) %s %s/%s", version, commit, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
