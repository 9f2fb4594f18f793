// SPDX-License-Identifier: Apache-2.0

package flight

import (
	"context"
	"errors"
	"fmt"
	"io"

	"tarn/index"

	"github.com/opencontainers/go-digest"
)

var (
	// ErrClosed: the engine is being closed.
	ErrClosed = index.ErrClosed
	// ErrLookAgain: the object is stored by now, or what was waited for was somebody
	// else's affair.
	ErrLookAgain = errors.New("look at the store again")
	// ErrChanged is an ErrBroken: the stored file is not what it was.
	ErrChanged = fmt.Errorf("%w: the file on the disk was changed", ErrBroken)
	// ErrAuthorise: the object is here, and the request has not said that it
	// may have it.
	ErrAuthorise = errors.New("the object is cached: authorise first")
	// ErrRefused is what a Fetch wraps when the refusal concerns its own
	// credential only, so that others who wait must ask for themselves.
	ErrRefused = errors.New("refused")
	// ErrLimited is what a Fetch wraps when its own credential is to wait:
	// others may ask for themselves, and it may ask again.
	ErrLimited = errors.New("limited")
	// ErrBroken: the source sent something else than what the digest names,
	// or stopped in the middle.
	ErrBroken = errors.New("broken body")
	// ErrRange is what a Fetch wraps when the source answers with neither the
	// bytes that were asked for nor the whole object.
	ErrRange = errors.New("not the range that was asked for")
	// ErrDropped: bytes of this object that somebody may have were dropped a short
	// while ago; what is wanted now must not be joined to them. See dropped.go.
	ErrDropped = errors.New("an earlier part of this object may be wrong: read it from the start")
)

// ListedDomain is the source domain that all listed upstreams share.
const ListedDomain = index.ListedDomain

// Key names an object as one source domain delivered it.
type Key struct {
	Domain string
	Digest digest.Digest
}

// Fetch opens the object at its source from byte off on, n bytes, or to the
// end when n is negative; fewer only where the object ends. A source that does
// not honour ranges may give all of it instead, and says so in Info. The
// context covers the body too. It may be called again, and by several
// goroutines at once, for as long as the flight lasts; whether it may still ask
// is its own affair.
type Fetch func(ctx context.Context, off, n int64) (io.ReadCloser, Info, error)

// Info is what a source says of a body.
type Info struct {
	Size   int64 // of the whole object in bytes, -1 when it does not say
	Offset int64 // first byte of the body
	End    int64 // byte after the body's last, 0 when that is the object's
	// From is the name of the one that sent it, for people; "" when it has none.
	From string
	// Elsewhere has the next Fetch ask another one than this body came from, and
	// tells whether there is one. nil: there is none.
	Elsewhere func() bool
	// Doubtful: nothing tells yet that what was answered is the object at all.
	Doubtful bool
}

func (i Info) end() int64 {
	if i.End > 0 {
		return i.End
	}
	return i.Size
}

// sound tells whether it is the description of a part of an object.
func (i Info) sound() bool {
	if i.Size < 0 {
		return i.Offset == 0
	}
	return 0 <= i.Offset && i.Offset <= i.end() && i.end() <= i.Size
}

// Request asks for an object.
type Request struct {
	Key
	// Reader names who reads, such as repository and credential: only the answer to
	// his own question is his, see Wait.
	Reader string
	// Source names who the Fetch asks. Several of one domain may be asked for
	// the same object; the failures of one are nothing to who asks another.
	Source string
	// Offset is the first byte that is wanted, and Length how many; 0: all that
	// follow.
	Offset, Length int64
	// Ranged: the reader asked for a part, also if that begins at byte 0. It
	// may be asking for the others at the same time.
	Ranged bool
	// Authorised: the authority has said yes to this reader.
	Authorised bool
	// Wait is for who is not Authorised. When the same Reader's question is
	// on its way, as a Fetch that has not answered yet, its answer is waited
	// for: a refusal is this request's too, and after a yes the error is
	// ErrAuthorise as ever, but the caller may know more by then.
	Wait bool
	// Fetch asks the source with this reader's credential.
	Fetch Fetch
	// Ahead has all of the object asked for as soon as its size is known: the
	// right may end before the download does, and an answer that was begun is
	// read to its end.
	Ahead bool
	// Size is what the object's manifest says, 0 where nobody knows it, or where the
	// first question alone is to be put before there is an answer. It only saves a
	// round trip, and nothing depends on it. nil: nobody knows.
	Size func() int64
	// Parallel is how many answers of the source a flight may have open at
	// once; with 1 or less it asks for all bytes in one.
	Parallel int
	// Verified is called when the bytes that the Fetch may have brought are the
	// object's, before any reader has the last of them. nil means nobody wants
	// to know.
	Verified func()
	// Wrong is called when bytes that the Fetch may have brought are not the
	// object's, or contradict what came before, and before anybody can ask anew.
	// Where several brought parts, nobody knows whose were wrong: each is told. nil
	// means nobody wants to know.
	Wrong func()
	// Check looks at the verified bytes before they are stored; its error
	// fails the flight. nil checks nothing. It is for manifests, which the
	// Fetch has bounded, since it is given the whole body.
	Check func(body []byte) error
}

// Source tells where an object came from.
type Source int

const (
	Hit     Source = iota // complete and verified before this request
	Fetched               // this request started the flight
	Joined                // this request joined a flight
	Passed                // not storable: a stream of its own
)

// Object is an open object. It is for one goroutine; Close it.
type Object struct {
	// Size in bytes, -1 while the source has not said.
	Size   int64
	Source Source
	// Doubtful: it is what another reader is being sent, and nothing tells yet that
	// it is the object. Who knows its size can compare that.
	Doubtful bool
	// Content reads it. It has a method Section where the kernel may send it.
	// Seeking to the end is only possible when Size is known.
	Content io.ReadSeeker

	close     func()
	interrupt func() // nil when nothing can wait
	wait      func() // nil when there is nothing to wait for
}

// Rereadable tells whether Content can be read from the start again, because it
// lies in a file.
func (o *Object) Rereadable() bool {
	_, forward := o.Content.(*stream)
	return !forward
}

// Passing tells whether the reader is being sent the source's own answer, which is
// not stored.
func (o *Object) Passing() bool {
	switch c := o.Content.(type) {
	case *follower:
		f := c.flight
		f.mu.Lock()
		defer f.mu.Unlock()
		return c.own != nil || f.state == passing
	case *stream, *relay:
		return true
	}
	return false
}

// Wait returns when nothing more is coming of a flight, or after Interrupt.
func (o *Object) Wait() {
	if o.wait != nil {
		o.wait()
	}
}

// Close ends the reading. A flight goes on without its readers.
func (o *Object) Close() { o.close() }

// Interrupt ends a Read that waits for a flight, and all later ones. Any
// goroutine may call it, before Close.
func (o *Object) Interrupt() {
	if o.interrupt != nil {
		o.interrupt()
	}
}

// Stored is an object of which nothing more is coming.
func Stored(size int64, content io.ReadSeeker, close func()) *Object {
	return &Object{Size: size, Source: Hit, Content: content, close: close}
}
