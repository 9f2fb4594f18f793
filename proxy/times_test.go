// SPDX-License-Identifier: Apache-2.0

package proxy

import "time"

// What the package rights holds to, as it is promised in docs/SECURITY.md.
const (
	finishFor  = 10 * time.Minute
	finishIdle = 30 * time.Second
	refusedFor = 5 * time.Second
)
