// SPDX-License-Identifier: Apache-2.0

// Command house measures how easy a checkout of tarn is to hold in one's head,
// so that a change which is to make it easier can be held to figures.
//
//	house [DIR]         what stands in the sources
//	house -warm [DIR]   what requests for what is cached run through
//
// A package is a room. It reads sources and builds tarn elsewhere; it never
// writes into the checkout.
package main

import (
	"cmp"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

func main() {
	warm := flag.Bool("warm", false, "count what warm requests run through, rather than what stands in the sources")
	names := flag.Bool("names", false, "with -warm: also name each function, with its calls by request")
	flag.Parse()
	if err := run(os.Stdout, cmp.Or(flag.Arg(0), "."), *warm, *names); err != nil {
		fmt.Fprintln(os.Stderr, "house:", err)
		os.Exit(1)
	}
}

func run(w io.Writer, dir string, warm, names bool) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if warm {
		return printWarm(w, dir, names)
	}
	if err := printSizes(w, dir); err != nil {
		return err
	}
	return printTypes(w, dir)
}
