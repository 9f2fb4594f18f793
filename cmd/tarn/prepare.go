// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"tarn/cache/store"

	"github.com/spf13/cobra"
)

// What a DaemonSet wants done on its node's directory, where there is no shell: give it to
// the user that tarn runs as, since the kubelet makes it root's, and empty it when tarn
// goes for good.

func newPrepareCommand() *cobra.Command {
	var dir, user string
	cmd := &cobra.Command{
		Use:   "prepare",
		Short: "Give the data directory to the user that tarn will run as",
		Long: `Make the data directory, for its owner alone, and give it and all that is in it to
the user that tarn will run as. It is for an init container, as root: what the kubelet
makes on the node is root's. Links are not followed, and files that have other names
elsewhere are left alone.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			uid, gid, err := parseOwner(user)
			if err != nil {
				return fmt.Errorf("--user: %w", err)
			}
			changed, err := prepare(dir, uid, gid)
			if err == nil {
				fmt.Fprintf(cmd.OutOrStdout(), "%s is user %d's; %d changed hands\n", dir, uid, changed)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "dir", defaultDir, "data `directory`")
	cmd.Flags().StringVar(&user, "user", "15050:15050", "`UID:GID` that tarn will run as")
	return cmd
}

func parseOwner(s string) (uid, gid int, err error) {
	u, g, both := strings.Cut(s, ":")
	if !both {
		g = u
	}
	if uid, err = strconv.Atoi(u); err == nil {
		gid, err = strconv.Atoi(g)
	}
	if err != nil || uid < 0 || gid < 0 {
		return 0, 0, fmt.Errorf("%q is not UID:GID in numbers, as in 15050:15050", s)
	}
	return uid, gid, nil
}

// prepare tells how many files and directories were given away.
func prepare(dir string, uid, gid int) (changed int, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), ".", func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		info, err := root.Lstat(path)
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		switch {
		case int(st.Uid) == uid && int(st.Gid) == gid:
		case !info.IsDir() && (!info.Mode().IsRegular() || st.Nlink != 1):
		default:
			changed++
			return root.Lchown(path, uid, gid)
		}
		return nil
	})
	if err != nil {
		return changed, fmt.Errorf("give %s to user %d: %w", dir, uid, err)
	}
	return changed, root.Chmod(".", 0o700)
}

func newCleanupCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove what tarn keeps on this node, and wait",
		Long: `Remove what is in the data directory, where it is a tarn's and none runs on it, and
wait for the end of the container. A chart's cleanup has it run on each node before
tarn is taken away: who stops a pod does not say whether it comes back.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, os.Interrupt)
			defer stop()
			if err := store.Empty(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), dir, "is empty; waiting to be stopped")
			<-ctx.Done()
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", defaultDir, "data `directory`")
	return cmd
}
