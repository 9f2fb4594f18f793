// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"tarn/cache"
)

// response is a ResponseWriter that remembers what a log line says. It keeps
// io.ReaderFrom, without which a file would be copied through memory rather
// than sent by the kernel.
type response struct {
	http.ResponseWriter
	request     *request
	cacheStatus string // RFC 9211
	collapsed   bool
	outcome     outcome  // what the Cache-Status comes to, as far as it went well
	fetcher     *fetcher // of the bytes, where they are not here; nil for none
	err         error
	timeout     time.Duration // Options.WriteTimeout
	start       time.Time
	headers     time.Duration // from arrival to the headers
	waits       waits         // of those, what was waited for
	slow        bool          // the body may come later than the headers
	told        told
	status      int
	bytes       int64
}

func (w *response) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
		w.headers = time.Since(w.start)
		w.Header().Set("Cache-Status", w.cacheStatus)
		if status < http.StatusBadRequest { // a refusal looks the same whatever is here
			w.waits.tell(w.Header())
		}
	}
	w.ResponseWriter.WriteHeader(status)
	if w.slow {
		http.NewResponseController(w.ResponseWriter).Flush()
	}
}

func (w *response) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

const (
	// DefaultWriteTimeout is Options.WriteTimeout's.
	DefaultWriteTimeout = time.Minute
	// sendPiece is what must go out within that time, in bytes: at 70 KB/s.
	sendPiece = 4 << 20
)

// extend begins the client's time anew.
func (w *response) extend() {
	http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(w.timeout))
}

// ReadFrom implements io.ReaderFrom.
func (w *response) ReadFrom(src io.Reader) (int64, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	var sent int64
	if part, ok := src.(*io.LimitedReader); ok {
		if body, ok := part.R.(*bytes.Reader); ok && int64(body.Len()) == part.N {
			// In one piece it goes out together with the headers.
			n, err := body.WriteTo(w.ResponseWriter)
			w.bytes += n
			return n, err
		}
		var err error
		switch from := part.R.(type) {
		case sectioned:
			if sent, err = w.sendSections(from, part.N); err != nil || sent == part.N {
				return sent, err
			}
			part.N -= sent
		}
	}
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	for { // what is waited for is not the client's time
		n, err := src.Read(*buf)
		if n > 0 {
			w.extend()
			m, werr := w.Write((*buf)[:n])
			if sent += int64(m); werr != nil {
				return sent, werr
			}
		}
		if err == io.EOF {
			return sent, nil
		}
		if err != nil {
			return sent, err
		}
	}
}

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// sendFile has the kernel send the next n bytes of the file.
func (w *response) sendFile(file *os.File, n int64) (sent int64, err error) {
	for sent < n {
		w.extend()
		m, err := io.CopyN(w.ResponseWriter, file, min(sendPiece, n-sent))
		sent += m
		w.bytes += m
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// sectioned lies in a file, as far as it is there.
type sectioned interface {
	Section(most int64) (*os.File, int64, error)
}

// sendSections has the kernel send what comes, as long as it comes by a file.
func (w *response) sendSections(s sectioned, most int64) (sent int64, err error) {
	for sent < most {
		file, n, err := s.Section(most - sent)
		if err == io.EOF || file == nil && err == nil {
			return sent, nil
		}
		if err != nil {
			return sent, err
		}
		m, err := w.sendFile(file, n)
		if sent += m; err != nil {
			if f, ok := s.(interface{ Failed(error) }); ok {
				f.Failed(err)
			}
			return sent, err
		}
	}
	return sent, nil
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// detail sets the outcome and the Cache-Status, with detail "" for none.
func (w *response) detail(o outcome, status, detail string) {
	w.outcome, w.cacheStatus = o, "tarn; "+status
	if w.collapsed {
		w.cacheStatus += "; collapsed"
	}
	if detail != "" {
		w.cacheStatus += "; detail=" + detail
	}
}

// source sets the Cache-Status of an object's bytes.
func (w *response) source(s cache.Source) {
	w.slow = s != cache.Hit
	switch s {
	case cache.Hit:
		w.detail(outcomeHit, "hit", "")
	case cache.Joined:
		w.collapsed = true
		w.detail(outcomeJoined, "fwd=uri-miss; fwd-status=200; stored", "")
	case cache.Fetched:
		w.detail(outcomeMiss, "fwd=uri-miss; fwd-status=200; stored", "")
	case cache.Passed:
		w.detail(outcomeBypassed, "fwd=bypass; fwd-status=200", "not-storable")
	}
}

// ended is the outcome when all has been sent, or not.
func (w *response) ended() outcome {
	switch {
	case w.status >= http.StatusInternalServerError, w.err != nil && w.status < http.StatusBadRequest:
		return outcomeError
	case w.status >= http.StatusBadRequest:
		return outcomeRefused
	}
	return w.outcome
}

// fail answers with the error, or, when the headers are out, has the
// connection cut.
func (w *response) fail(q *request, err error) {
	w.err = err
	if w.status != 0 {
		w.err = fmt.Errorf("%w: %w", errAborted, err)
		return
	}
	status, _ := answerFor(q, err)
	// The same words whatever is cached.
	w.cacheStatus = fmt.Sprintf("tarn; fwd=miss; fwd-status=%d", status)
	serveError(w, q, err)
}
