// SPDX-License-Identifier: Apache-2.0

// Program is the whole content of the images that the tests make:
//
//	program say MESSAGE CODE   prints the message and exits with the code
//	program pause              waits for SIGTERM, as the container that holds a pod's namespaces does
package main

import (
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
)

func main() {
	switch {
	case len(os.Args) == 4 && os.Args[1] == "say":
		code, err := strconv.Atoi(os.Args[3])
		if err != nil {
			fmt.Fprintln(os.Stderr, "program:", err)
			os.Exit(2)
		}
		fmt.Println(os.Args[2])
		os.Exit(code)
	case len(os.Args) == 2 && os.Args[1] == "pause":
		term := make(chan os.Signal, 1)
		signal.Notify(term, syscall.SIGTERM, syscall.SIGINT)
		<-term
	default:
		fmt.Fprintf(os.Stderr, "program: cannot make sense of %q\n", os.Args[1:])
		os.Exit(2)
	}
}
