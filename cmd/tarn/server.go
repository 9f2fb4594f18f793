// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"net/http"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"

	"tarn/proxy"

	"go.uber.org/zap"
)

const (
	// readHeaderTimeout bounds how long a client may take for its request.
	readHeaderTimeout = 10 * time.Second
	// idleTimeout closes connections that nobody uses; containerd opens new
	// ones for each pull.
	idleTimeout = 2 * time.Minute
	// writeTimeout is how long a client may take nothing; the proxy begins it
	// anew with each piece that it sends.
	writeTimeout = proxy.DefaultWriteTimeout
	// maxHeaderBytes is room for the longest tokens that registries hand out, and
	// with as many connections as there may be less than the memory of a pod.
	maxHeaderBytes = 32 << 10
)

// newServer is a server that speaks HTTP/1.1 only: a body that breaks off must
// be a closed connection.
func newServer(h http.Handler, log *zap.Logger) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	errorLog, err := zap.NewStdLogAt(log, zap.DebugLevel)
	if err != nil {
		panic(err) // the level is a constant
	}
	return &http.Server{
		Handler:           h,
		Protocols:         protocols,
		ReadHeaderTimeout: readHeaderTimeout,
		WriteTimeout:      writeTimeout,
		ConnState:         limitConnections(maxConnections(connectionMemory)),
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          errorLog,
	}
}

// limitConnections closes connections at once that are too many: who is refused
// goes to the registry itself, who is left waiting does not.
func limitConnections(most int64) func(net.Conn, http.ConnState) {
	var open atomic.Int64
	return func(c net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			if open.Add(1) > most {
				c.Close() // and then its state is closed, too
			}
		case http.StateClosed, http.StateHijacked:
			open.Add(-1)
		}
	}
}

const (
	// connectionMemory is what a connection takes at most: a question with the longest
	// headers, which waits for its registry.
	connectionMemory = 128 << 10
	// handshakeMemory is what it may take besides, over TLS, before anybody knows who
	// that is: crypto/tls takes a certificate of a quarter of a megabyte, in a buffer
	// that has grown to twice as much.
	handshakeMemory = 512 << 10
)

// maxConnections leaves three of four descriptors to files and registries: a
// client's download may take a file and several connections. It leaves half of the
// memory, too, where each of them takes as many bytes. A node's runtime has some ten.
func maxConnections(each int64) int64 {
	const share, least, most = 4, 16, 1 << 12
	const memoryShare = 2
	n := min(most, debug.SetMemoryLimit(-1)/memoryShare/each)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err == nil {
		n = min(n, int64(min(limit.Cur, share*most)/share))
	}
	return max(n, least)
}
