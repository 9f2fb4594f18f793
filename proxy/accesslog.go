// SPDX-License-Identifier: Apache-2.0

package proxy

import "net/http"

// AccessLog is which requests have a line in the log.
type AccessLog uint8

const (
	// LogAll has one for each request.
	LogAll AccessLog = iota
	// LogUpstream has one for each that a registry was asked for, and for what
	// LogErrors has.
	LogUpstream
	// LogErrors has one for each that did not get what it asked for. A 401 is no
	// error: it is how a client learns what to show, and each pull begins with one.
	LogErrors
)

// wants tells whether the request has a line.
func (l AccessLog) wants(w *response, ended outcome) bool {
	switch {
	case l == LogAll, ended == outcomeError, ended == outcomeRefused && w.status != http.StatusUnauthorized:
		return true
	}
	return l == LogUpstream && w.waits.asked()
}
