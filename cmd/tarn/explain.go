// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"net/url"
	"time"

	"tarn/explain"

	"github.com/spf13/cobra"
)

func newExplainCommand() *cobra.Command {
	var d daemon
	var x explain.Explanation
	cmd := d.register(&cobra.Command{
		Use:   "explain IMAGE",
		Short: "Say what a pull of an image would cost, who may have it, and what happened",
		Long: `Say of an image what is here of it and what its registry says now, who may have it,
what the next pull costs, and what became of the last ones. The exit code is 0 where
a pull would have its bytes from this node's disk, 1 where it would go to the
registry, and 2 for an error.

What is local? The node, not the pod and not the cluster. imagePullPolicy is the
kubelet's, and what it calls present is in the store of this node's container runtime:
IfNotPresent asks nobody for an image that is there, and Always asks the registry each
time what the tag means; it unpacks again only what the runtime does not have. With
tarn the question costs one HEAD, and bytes that any pull on this node has fetched
come from this node's disk, also after the runtime has deleted the image. Who may have
them is asked of the registry, with the pod's own pull secret.

In Kubernetes, ask the tarn of the node where the pod runs:

  node=$(kubectl get pod POD -o jsonpath='{.spec.nodeName}')
  kubectl -n tarn exec $(kubectl -n tarn get pod -l app.kubernetes.io/name=tarn \
    --field-selector spec.nodeName=$node -o name) -- tarn explain IMAGE`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: d.completeImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			path := "/api/v1/explain?" + url.Values{"image": args}.Encode()
			return d.do(cmd, "GET", path, nil, &x, func(w io.Writer) { showExplanation(w, x) })
		},
	})
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := run(cmd, args); err != nil {
			complain(cmd.ErrOrStderr(), err)
			return exitError(2)
		}
		if !x.FromHere {
			return exitError(1)
		}
		return nil
	}
	return cmd
}

// showExplanation prints the verdict, then the reason, then what to do.
func showExplanation(w io.Writer, x explain.Explanation) {
	fmt.Fprintf(w, "%s\n  %s\n  %s\n", x.Image, x.Verdict, x.Next)
	if x.Advice != "" {
		fmt.Fprintln(w, "  to do:", x.Advice)
	}
	fmt.Fprintln(w, "  who may have it:", x.Who)
	if x.Here.TotalBytes > 0 {
		fmt.Fprintf(w, "  here:  %s, %s of %s", x.Here.Digest, size(x.Here.HereBytes), size(x.Here.TotalBytes))
		if !x.Here.Confirmed.IsZero() {
			fmt.Fprint(w, ", confirmed ", ago(x.Here.Confirmed))
		}
		fmt.Fprintln(w)
	}
	switch {
	case x.There.Digest != "":
		fmt.Fprintf(w, "  there: %s, asked now with %s as %s\n", x.There.Digest, x.There.Method, x.There.As)
	case x.There.Error != "":
		fmt.Fprintf(w, "  there: asked now with %s as %s: %s\n", x.There.Method, x.There.As, x.There.Error)
	}
	fmt.Fprintf(w, "what happened (remembered since %s):\n", x.Since.Local().Format(time.DateTime))
	for _, e := range x.Happened {
		at := e.At
		if !e.Last.IsZero() {
			at = e.Last
		}
		fmt.Fprintf(w, "  %s  %s\n", at.Local().Format(time.DateTime), e.Words)
	}
	if len(x.Happened) == 0 {
		fmt.Fprintln(w, "  nothing")
	}
}
