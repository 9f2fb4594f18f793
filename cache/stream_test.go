// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/opencontainers/go-digest"
)

// from is a source that has the body at once.
func from(body []byte) Fetch {
	return func(_ context.Context, off, _ int64) (io.ReadCloser, Info, error) {
		return io.NopCloser(bytes.NewReader(body[off:])), Info{Size: int64(len(body)), Offset: off}, nil
	}
}

// TestWholeNoRangesThatPassThroughAddUp reads parts of an object that cannot be
// stored, some at the same time, each from a source that is right or has a
// byte wrong: whoever has a part for each byte must have none that is wrong.
// Who starts from byte 0 after that went wrong starts anew.
func TestWholeNoRangesThatPassThroughAddUp(t *testing.T) {
	t.Parallel()
	const size, trials, parts = 3*ledgerStep + 300_000, 60, 6
	good := random(size)
	d := digest.FromBytes(good)
	complete := 0
	for trial := range trials {
		rnd := rand.New(rand.NewPCG(1, uint64(trial)))
		c := open(t, t.TempDir(), 1)
		wrongAt, given := make(map[int]bool), make([]bool, size)
		var streams []*Object
		read := func(o *Object, n int) {
			pos, err := o.Content.Seek(0, io.SeekCurrent)
			if err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, n)
			n, _ = io.ReadFull(o.Content, buf)
			for i, b := range buf[:n] {
				at := int(pos) + i
				given[at] = true
				if b != good[at] {
					wrongAt[at] = true
				}
			}
		}
		zero := rnd.IntN(parts)
		for part := range parts {
			body := good
			if rnd.IntN(3) == 0 {
				body = bytes.Clone(good)
				body[rnd.IntN(size)] ^= 1
			}
			off := 1 + rnd.Int64N(size-1)
			switch {
			case part == zero:
				off = 0
			case rnd.IntN(2) == 0:
				off = 1 + off%(ledgerStep+1000) // often near the start, so that all is covered
			}
			if off == 0 && c.taint.spoiled(Key{domain, d}, "r") {
				// What it had before was told to be bad, and this is all of it.
				clear(wrongAt)
				clear(given)
			}
			o, err := c.Open(context.Background(), Request{Key: Key{domain, d}, Reader: "r", Authorised: true, Ranged: true, Offset: off, Fetch: from(body)})
			if err != nil {
				continue
			}
			if _, err := o.Content.Seek(off, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			streams = append(streams, o)
			for range rnd.IntN(4) {
				read(streams[rnd.IntN(len(streams))], rnd.IntN(2*ledgerStep))
			}
			if rnd.IntN(3) == 0 {
				streams[len(streams)-1].Close()
				streams = streams[:len(streams)-1]
			}
		}
		for _, o := range streams {
			read(o, size)
			o.Close()
		}
		all := true
		for _, ok := range given {
			all = all && ok
		}
		if all {
			complete++
			if len(wrongAt) > 0 {
				t.Fatalf("trial %d: a complete object with wrong bytes at %v", trial, wrongAt)
			}
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if complete < trials/10 {
		t.Errorf("%d of %d trials had all parts, so this proves little", complete, trials)
	}
	t.Logf("%d of %d trials had a part for each byte", complete, trials)
}

func TestWholeAPartThatWasVerifiedHoldsOthersToIt(t *testing.T) {
	t.Parallel()
	const size, cut = 2*ledgerStep + 300_000, ledgerStep + 1000
	good := random(size)
	bad := bytes.Clone(good)
	bad[5] ^= 1
	d := digest.FromBytes(good)
	for _, order := range []string{"the end first", "the beginning first, and open still"} {
		c := open(t, t.TempDir(), 1)
		part := func(off, n int, body []byte) (*Object, error) {
			o, err := c.Open(context.Background(), Request{Key: Key{domain, d}, Reader: "r", Authorised: true, Ranged: true, Offset: int64(off), Fetch: from(body)})
			if err != nil {
				return nil, err
			}
			if _, err := o.Content.Seek(int64(off), io.SeekStart); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(o.Content, make([]byte, n)); err != nil {
				o.Close()
				return nil, fmt.Errorf("read: %w", err)
			}
			return o, nil
		}
		var first, second error
		if order == "the end first" {
			var o *Object
			if o, first = part(cut, size-cut, good); first == nil {
				o.Close()
				if o, second = part(0, cut-1000, bad); second == nil {
					o.Close()
				}
			}
		} else {
			var o, p *Object
			if o, first = part(0, cut-1000, bad); first == nil {
				if p, second = part(cut-1000, size-cut+1000, good); second == nil {
					p.Close()
				}
				o.Close()
			}
		}
		if first != nil || second == nil {
			t.Errorf("%s: %v, then %v", order, first, second)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWholeWhatPassedThroughIsRememberedInACrash: the next process knows that
// somebody holds a bad beginning.
func TestWholeWhatPassedThroughIsRememberedInACrash(t *testing.T) {
	t.Parallel()
	dir, left := t.TempDir(), t.TempDir()
	c := openChaos(t, dir, 1<<20)
	defer c.Close()
	body := randomBytes(3 << 20)
	bad := bytes.Clone(body)
	bad[100] ^= 1
	lying, honest := &origin{body: bad}, &origin{body: body}
	req := parallelRequest(honest, "a")
	req.Fetch = lying.fetch
	got, err := readAll(c, req)
	if err == nil || len(got) != len(body)-tailHold {
		t.Fatalf("%d bytes: %v", len(got), err)
	}
	copyAll(t, dir, left) // as a kill leaves it
	next := openChaos(t, left, 1<<20)
	defer next.Close()
	req.Fetch, req.Offset, req.Ranged = honest.fetch, int64(len(got)), true
	if tail, err := readAll(next, req); !errors.Is(err, ErrTainted) {
		t.Errorf("%d bytes were joined to %d bad ones: %v", len(tail), len(got), err)
	}
}
