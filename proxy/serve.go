// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"tarn/cache"

	"github.com/opencontainers/go-digest"
)

// How an object that may go out goes out: whole or in part, by ranges and
// conditions, with its length or, where nobody knows that, without.

// serveObject sends the object, or the range of it that was asked for.
func serveObject(w *response, r *http.Request, o *cache.Object, d digest.Digest, mediaType string) error {
	h := w.Header()
	h.Set("Content-Type", mediaType)
	setDigest(h, d)
	if o.Source != cache.Hit { // and so may have to wait
		defer context.AfterFunc(r.Context(), o.Interrupt)()
	}
	if o.Size < 0 {
		return serveUnsized(w, r, o, d)
	}
	quoteCondition(r)
	return serveContent(w, r, o.Content)
}

// serveContent is http.ServeContent, which knows ranges and conditions (RFC 9110 13,
// 14) and hands a complete file to the kernel (sendfile). A body that broke off is
// shorter than its Content-Length, and net/http closes the connection on that.
func serveContent(w *response, r *http.Request, content io.ReadSeeker) error {
	if len(r.Header["Range"]) == 0 {
		http.ServeContent(w, r, "", noTime, content)
		return nil
	}
	part := &partResponse{response: w}
	http.ServeContent(part, r, "", noTime, content)
	if part.refused {
		return &rangeError{w.Header().Get("Content-Range")}
	}
	return nil
}

// partResponse keeps back the 416 of http.ServeContent, so that it becomes an error
// like all others.
type partResponse struct {
	*response // and its io.ReaderFrom
	refused   bool
}

func (w *partResponse) WriteHeader(status int) {
	if w.refused = status == http.StatusRequestedRangeNotSatisfiable; !w.refused {
		w.response.WriteHeader(status)
	}
}

func (w *partResponse) Write(p []byte) (int, error) {
	if w.refused {
		return len(p), nil
	}
	return w.response.Write(p)
}

// quoteCondition adds the quotes that some clients leave out of If-None-Match;
// the standard library knows no such entity tag.
func quoteCondition(r *http.Request) {
	if inm := r.Header.Get("If-None-Match"); inm != "" {
		if d, err := digest.Parse(inm); err == nil {
			r.Header.Set("If-None-Match", `"`+d.String()+`"`)
		}
	}
}

// serveUnsized sends a body of unknown length, chunked; its end is only
// written when all was right. Conditions hold as ever, ranges wait for the
// length: the whole is a legal answer to one (RFC 9110 14.2).
func serveUnsized(w *response, r *http.Request, o *cache.Object, d digest.Digest) error {
	if inm := r.Header.Get("If-None-Match"); inm != "" && quoted(inm, d) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	if !r.ProtoAtLeast(1, 1) {
		return errNoLength
	}
	w.WriteHeader(http.StatusOK)
	_, err := io.Copy(w, onlyReader{o.Content})
	return aborted(err)
}

// onlyReader hides Seek, which io.Copy has no use for.
type onlyReader struct{ io.Reader }

// aborted marks an error after the headers: the connection must be cut, or a
// chunked body would seem to end well.
func aborted(err error) error {
	if err != nil {
		return fmt.Errorf("%w: %w", errAborted, err)
	}
	return nil
}

var errAborted = errors.New("body broke off")

// serveHead answers a HEAD without opening anything. size is -1 when nobody
// knows it.
func serveHead(w *response, r *http.Request, d digest.Digest, mediaType string, size int64) error {
	h := w.Header()
	h.Set("Content-Type", mediaType)
	setDigest(h, d)
	if size < 0 {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	quoteCondition(r)
	http.ServeContent(w, r, "", noTime, sizeOnly(size))
	return nil
}

// sizeOnly is the content of an answer to HEAD: it has a size and no bytes.
type sizeOnly int64

func (s sizeOnly) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		offset += int64(s)
	}
	return offset, nil
}

func (sizeOnly) Read([]byte) (int, error) { return 0, io.EOF }
