// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// drip gives a beginning, and then a byte each second, until its context ends.
type drip struct {
	io.Reader
	rest []byte
	ctx  context.Context
}

func (d *drip) Read(p []byte) (int, error) {
	if n, err := d.Reader.Read(p); n > 0 {
		return n, nil
	} else if err != io.EOF {
		return n, err
	}
	if len(d.rest) == 0 {
		return 0, io.EOF
	}
	select {
	case <-d.ctx.Done():
		return 0, context.Cause(d.ctx)
	case <-time.After(time.Second):
	}
	p[0], d.rest = d.rest[0], d.rest[1:]
	return 1, nil
}

func (d *drip) Close() error { return nil }

// TestWhoDripsIsGivenUpForAnother reader's way to ask, or another endpoint, while
// somebody waits; with nobody else to ask, it is borne.
func TestWhoDripsIsGivenUpForAnother(t *testing.T) {
	const begin, dripped = 200_000, 200
	body := random(begin + dripped + tailHold)
	for name, c := range map[string]struct {
		another   bool // a reader joins, who asks elsewhere
		endpoints int
		most      time.Duration
	}{
		"another reader's way": {another: true, endpoints: 1, most: 3 * slowFor},
		"another endpoint":     {endpoints: 2, most: 3 * slowFor},
		"nobody":               {endpoints: 1, most: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cache := open(t, t.TempDir(), 1<<30)
				defer cache.Close()
				endpoint, asked := 0, 0
				req := parallelRequest(&origin{body: body}, "a")
				good := req.Fetch
				req.Fetch = func(ctx context.Context, off, n int64) (io.ReadCloser, Info, error) {
					asked++
					if endpoint > 0 {
						return good(ctx, off, n)
					}
					start := max(off, min(begin, off+1))
					d := &drip{bytes.NewReader(body[off:start]), body[start:min(start+dripped, int64(len(body)))], ctx}
					return struct {
							io.Reader
							io.Closer
						}{io.MultiReader(d, bytes.NewReader(body[min(start+dripped, int64(len(body))):])), d}, Info{Size: int64(len(body)), Offset: off, Elsewhere: func() bool {
							if c.endpoints > 1 {
								endpoint++
							}
							return c.endpoints > 1
						}}, nil
				}
				req.Parallel = 1
				began := time.Now()
				if c.another {
					first := mustOpen(t, goOpen(cache, req))
					defer first.Close()
					req = parallelRequest(&origin{body: body}, "b")
					req.Source = "elsewhere"
				}
				got, err := readAll(cache, req)
				took := time.Since(began)
				if err != nil || !bytes.Equal(got, body) || took > c.most {
					t.Errorf("%d bytes in %v: %v", len(got), took, err)
				}
				if c.endpoints == 1 && asked != 1 {
					t.Errorf("who drips was asked %d times", asked)
				}
			})
		})
	}
}
