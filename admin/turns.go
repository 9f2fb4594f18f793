// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"fmt"
	"net/http"
	"time"
)

// Whoever may ask a listener may ask it a thousand times at once, and take none of the
// answers: a list of ten thousand images has 4 MiB, and some more while it is made. At the
// socket others count than at a port, where any process of the node may take all turns.

const (
	// maxAtOnce is how many answers of one kind are made, or taken, at once at each
	// listener.
	maxAtOnce = 4
	// turnPatience is how long one may wait for its turn, which is less than a command
	// does.
	turnPatience = 10 * time.Second
	// answerPatience is how long an answer may take from then on, of which a registry
	// may have 9 s.
	answerPatience = 20 * time.Second
)

// inTurn serves so many at once.
func inTurn(serve http.HandlerFunc) http.HandlerFunc {
	turns := make(chan struct{}, maxAtOnce)
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case turns <- struct{}{}:
			defer func() { <-turns }()
		case <-time.After(turnPatience):
			w.Header().Set("Retry-After", "5")
			refuse(w, http.StatusServiceUnavailable, "busy", fmt.Sprintf("%d others ask the same here, and no more are answered at once", maxAtOnce), "ask again, or over the admin socket, which has turns of its own")
			return
		case <-r.Context().Done():
			return
		}
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerPatience))
		serve(w, r)
	}
}
