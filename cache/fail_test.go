// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"
)

// held is a source whose first question waits for an end.
func held(body []byte, end chan error) (o *origin, asked chan struct{}) {
	o, asked = &origin{body: body}, make(chan struct{}, 1)
	o.answer = func(n int, _, _ int64) (io.ReadCloser, Info, error) {
		if n > 0 {
			return nil, Info{}, nil
		}
		asked <- struct{}{}
		return nil, Info{}, <-end
	}
	return o, asked
}

func (c *Cache) waitingFor(k Key) int { return c.flights.Waiting(k) }

// TestFiveWaitForAFlightThatFails: all get the error, none hangs, and the next
// starts anew.
func TestFiveWaitForAFlightThatFails(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	end := make(chan error)
	o, asked := held(randomBytes(300_000), end)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for n := range 5 {
		wg.Go(func() {
			if _, err := c.Open(ctx, parallelRequest(o, fmt.Sprint(n))); !errors.Is(err, errReset) {
				t.Errorf("request %d: %v", n, err)
			}
		})
	}
	<-asked
	until(t, "all five wait", func() bool { return c.waitingFor(parallelRequest(o, "").Key) == 5 })
	end <- errReset
	wg.Wait()
	if n := len(o.questions()); n != 1 {
		t.Errorf("%d questions", n)
	}
	if got, err := readAll(c, parallelRequest(o, "next")); err != nil || !bytes.Equal(got, o.body) {
		t.Errorf("the next: %d bytes, %v", len(got), err)
	}
}

// TestOnesLimitIsNotAnothers: a source that limits who began the flight does not
// limit who waits for it.
func TestOnesLimitIsNotAnothers(t *testing.T) {
	t.Parallel()
	c := openChaos(t, t.TempDir(), 1<<30)
	defer c.Close()
	end := make(chan error)
	o, asked := held(randomBytes(300_000), end)
	limited := fmt.Errorf("%w: 429", ErrLimited)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := readAll(c, parallelRequest(o, "limited")); !errors.Is(err, ErrLimited) {
			t.Error(err)
		}
	})
	<-asked
	wg.Go(func() {
		if got, err := readAll(c, parallelRequest(o, "another")); err != nil || !bytes.Equal(got, o.body) {
			t.Errorf("%d bytes: %v", len(got), err)
		}
	})
	until(t, "both wait", func() bool { return c.waitingFor(parallelRequest(o, "").Key) == 2 })
	end <- limited
	wg.Wait()
}
