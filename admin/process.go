// SPDX-License-Identifier: Apache-2.0

package admin

import "net/http"

// process answers with what a bug report has of the process. Whoever may read it could
// read the process itself: it is for the socket's own user.
func (o Options) process(w http.ResponseWriter, _ *http.Request) {
	if o.Listener.Network() != "unix" {
		refuse(w, http.StatusForbidden, codeReadOnly, "what the process is at is told over the admin socket only, to the user that tarn runs as, and to root", "ask over the admin socket, as the user that tarn runs as")
		return
	}
	serveJSON(w, http.StatusOK, o.Process())
}
