// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"net/http"
	"strconv"
	"time"
)

// step is what a request may have to wait for before its headers go out.
type step uint8

const (
	stepRights    step = iota // whether this client may have the object
	stepHead                  // what the tag means
	stepFirstByte             // what is not here, until it begins to come
	stepDisk                  // what is here
	numSteps
)

var stepNames = [numSteps]string{"rights", "head", "first-byte", "disk"}

// waits are how long a request has waited for each.
type waits [numSteps]time.Duration

// since takes that the request has waited for the step since that time.
func (w *waits) since(s step, t time.Time) { w[s] += time.Since(t) }

// asked tells whether a registry was asked on the request's behalf.
func (w *waits) asked() bool { return w[stepRights]+w[stepHead]+w[stepFirstByte] > 0 }

// leastWait is what is worth telling: the resolution of the header, and more than a
// disk takes whose pages are in memory.
const leastWait = 100 * time.Microsecond

// tell writes what was waited for into a header (W3C Server Timing), in milliseconds,
// where there was anything.
func (w *waits) tell(h http.Header) {
	var room [len("rights;dur=9000.0, head;dur=9000.0, first-byte;dur=9000.0, disk;dur=9000.0")]byte
	text := room[:0]
	for s, d := range w {
		if d < leastWait {
			continue
		}
		if len(text) > 0 {
			text = append(text, ", "...)
		}
		text = append(append(text, stepNames[s]...), ";dur="...)
		text = strconv.AppendFloat(text, float64(d)/float64(time.Millisecond), 'f', 1, 64)
	}
	if len(text) > 0 {
		h["Server-Timing"] = []string{string(text)}
	}
}
