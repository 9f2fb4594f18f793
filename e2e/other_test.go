// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package e2e

import (
	"fmt"
	"os"
	"testing"
)

func TestMain(*testing.M) {
	fmt.Fprintln(os.Stderr, "e2e: these tests run containerd, which needs Linux")
	os.Exit(1)
}
