// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"os"
	"strings"
	"time"
)

// span is the bytes from start up to and without end.
type span struct{ start, end int64 }

// header and progress are a journal's records.
type header struct {
	Domain string
	Digest string
	Size   int64
}

type progress struct {
	Filled [][2]int64
	Booted string
}

// bootID names this run of the machine.
func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
}

// What flights go by, for tests that are about just these sizes.
const (
	tailHold     = 64 << 10
	firstSegment = 4 << 20
	minSegment   = 4 << 20
	maxSegment   = 64 << 20
	noteStep     = 8 << 20
	slowFor      = 5 * time.Second
	dropFor      = time.Minute
	maxTickets   = 64
	maxFailures  = 6
	goodProgress = 1 << 20
)
