// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"io"
	"time"

	"tarn/images"

	"github.com/spf13/cobra"
)

// Completion asks the daemon for what is here. Nobody waits long for a Tab key.

const (
	completePatience = time.Second
	maxCompletion    = 4 << 20 // bytes of an answer that are read for it
)

// completeImages completes any number of images.
func (d *daemon) completeImages(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var answer struct{ Images []images.Image }
	d.forCompletion(cmd, "/api/v1/images", &answer)
	var names []string
	for _, i := range answer.Images {
		names = append(names, imageName(i))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeImage completes one image.
func (d *daemon) completeImage(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return d.completeImages(cmd, args, toComplete)
}

// completePin completes one image that is pinned.
func (d *daemon) completePin(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var answer struct{ Pins []images.Pin }
	d.forCompletion(cmd, "/api/v1/pins", &answer)
	var names []string
	for _, p := range answer.Pins {
		names = append(names, p.String())
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// forCompletion reads an answer if there is one in time: an error is nothing to complete.
func (d *daemon) forCompletion(cmd *cobra.Command, path string, answer any) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completePatience)
	defer cancel()
	resp, err := d.ask(ctx, "GET", path, nil)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	if text, err := io.ReadAll(io.LimitReader(resp.Body, maxCompletion)); err == nil {
		json.Unmarshal(legible(text), answer) // each is a line for the shell
	}
}
