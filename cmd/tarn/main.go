// SPDX-License-Identifier: Apache-2.0

// Command tarn is a node-local caching proxy for OCI registries.
package main

import (
	"errors"
	"fmt"
	"io"
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
		complain(os.Stderr, err)
		os.Exit(1)
	}
}

// complain says what went wrong, and, where the daemon said so, what to do.
func complain(to io.Writer, err error) {
	fmt.Fprintln(to, "tarn:", err)
	var refused *refusal
	if errors.As(err, &refused) && refused.next != "" {
		fmt.Fprintln(to, "  to do:", refused.next)
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
	root.AddCommand(newServeCommand(), newStatusCommand(), newExplainCommand(), newHostsCommand(), newImagesCommand(), newPinCommand(), newUnpinCommand(), newEvictCommand(), newPullCommand(), newVerifyCommand(), newReloadCommand(), newSupportCommand(), newPrepareCommand(), newCleanupCommand(), &cobra.Command{
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
