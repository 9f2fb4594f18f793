// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// chaos is a source that does whatever sources do wrong, at random.
type chaos struct {
	body []byte
	lies bool // other bytes, sizes and versions, too, and not just failures

	mu   sync.Mutex
	rand *rand.Rand
}

func (c *chaos) roll(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rand.IntN(n)
}

func (c *chaos) fetch(ctx context.Context, off, n int64) (io.ReadCloser, Info, error) {
	size := int64(len(c.body))
	end := size
	if n >= 0 {
		end = min(end, off+n)
	}
	if off >= size && off > 0 {
		return nil, Info{}, ErrRange
	}
	info := Info{Size: size, Offset: off, End: end}
	part := c.body[off:end]
	if len(part) == 0 {
		panic(fmt.Sprint("asked for nothing: ", off, " ", n, " of ", size))
	}
	what := c.roll(16)
	if what >= 8 && !c.lies {
		what = 15
	}
	switch what {
	case 0:
		return nil, Info{}, errReset
	case 1:
		return nil, Info{}, fmt.Errorf("%w: 416", ErrRange)
	case 2, 3: // breaks off
		return io.NopCloser(io.MultiReader(bytes.NewReader(part[:c.roll(len(part))]), failing{})), info, nil
	case 4: // ends early
		return io.NopCloser(bytes.NewReader(part[:c.roll(len(part))])), info, nil
	case 5: // does not know ranges
		info.Offset, info.End, part = 0, size, c.body
	case 6: // one byte, and then nothing
		return io.NopCloser(io.MultiReader(bytes.NewReader(part[:1]), failing{})), info, nil
	case 7: // refuses this credential
		return nil, Info{}, fmt.Errorf("%w: 403", ErrRefused)
	case 8: // too much
		part = append(bytes.Clone(part), "more"...)
	case 9: // other bytes
		part = bytes.Clone(part)
		part[c.roll(len(part))] ^= 1
	case 10: // all other bytes
		part = make([]byte, len(part))
	case 11: // another size
		info.Size += int64(c.roll(100) - 50)
	case 12: // another range
		info.Offset += int64(c.roll(1000))
	case 13: // another end
		info.End -= int64(c.roll(1000))
	case 14: // no size
		info.Size, info.End = -1, 0
	}
	return io.NopCloser(bytes.NewReader(part)), info, nil
}

// assemble reads the object as a client does that goes on where it broke off,
// from its own offset to the end, and says how it ended.
func (c *chaos) assemble(cache *Cache, reader string, from int64, patience int) error {
	var have []byte
	var last error
	passed := false // some of it passed through, which he checks himself
	for range patience {
		at := from + int64(len(have))
		err := func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			o, err := cache.Open(ctx, Request{
				Key: Key{Domain: domain, Digest: digest.FromBytes(c.body)}, Reader: reader, Authorised: true,
				Source: reader[len(reader)-1:], Offset: at, Ranged: at > 0, Parallel: 4, Fetch: c.fetch,
			})
			if err != nil {
				return err
			}
			defer o.Close()
			if o.Size >= 0 && o.Size != int64(len(c.body)) {
				return fmt.Errorf("%w: it says %d bytes", ErrBroken, o.Size)
			}
			if _, err := o.Content.Seek(at, io.SeekStart); err != nil {
				return err
			}
			defer time.AfterFunc(20*time.Second, o.Interrupt).Stop()
			limit := int64(len(c.body))
			if c.roll(4) == 0 {
				limit = int64(c.roll(len(c.body))) // leaves early
			}
			got, err := io.ReadAll(io.LimitReader(struct{ io.Reader }{o.Content}, limit))
			have = append(have, got...)
			passed = passed || o.Passing()
			if err != nil && strings.Contains(err.Error(), "reader has left") {
				return fmt.Errorf("hangs at byte %d", from+int64(len(have)))
			}
			return err
		}()
		switch {
		case err != nil && errors.Is(err, context.DeadlineExceeded):
			return fmt.Errorf("Open hangs: %w", err)
		case err != nil && err.Error()[:min(5, len(err.Error()))] == "hangs":
			return err
		case errors.Is(err, ErrDropped):
			have, passed = have[:0], false // as it is told: from the start
			if from > 0 {
				return nil
			}
		}
		if last = err; from+int64(len(have)) >= int64(len(c.body)) {
			if !bytes.Equal(have, c.body[from:]) && !passed { // else he finds it himself
				return errors.New("wrong bytes, whole")
			}
			return nil
		}
	}
	_ = last // not to have it is an honest end
	return nil
}

// TestWholeWhateverTheSourceDoes has readers assemble objects from a source that
// fails and lies at random, over restarts of the cache, with much room and with
// little.
func TestWholeWhateverTheSourceDoes(t *testing.T) {
	rounds := testRounds(6)
	goroutines, files := runtime.NumGoroutine(), descriptors(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for _, little := range []bool{false, true} {
		for _, lies := range []bool{false, true} {
			maxSize := int64(1 << 30)
			if little {
				maxSize = 40 << 20
			}
			dir := t.TempDir()
			c := openChaos(t, dir, maxSize)
			for round := range rounds {
				r := rand.New(rand.NewPCG(seed, uint64(round)))
				body := make([]byte, 200_000+r.IntN(14<<20))
				rand.NewChaCha8([32]byte(binary.LittleEndian.AppendUint64(make([]byte, 24), r.Uint64()))).Read(body)
				source := &chaos{body: body, lies: lies, rand: r}
				var readers sync.WaitGroup
				for i := range 5 {
					from := int64(0)
					if i > 1 {
						from = int64(source.roll(len(body)))
					}
					readers.Go(func() {
						if err := source.assemble(c, fmt.Sprint("reader ", i), from, 6); err != nil {
							t.Errorf("little room %v, lies %v, round %d, reader %d: %v", little, lies, round, i, err)
						}
					})
				}
				if round%3 == 2 { // in the middle of it
					source.assemble(c, "another", 0, 1)
					closed := make(chan error, 1)
					go func() { closed <- c.Close() }()
					select {
					case err := <-closed:
						if err != nil {
							t.Error(err)
						}
					case <-time.After(30 * time.Second):
						t.Fatal("Close hangs")
					}
					readers.Wait()
					c = openChaos(t, dir, maxSize)
				}
				readers.Wait()
			}
			settle(t, "flights", func() bool { return c.Stats().Flights == 0 })
			settle(t, "claims", func() bool { return claimsOfParked(c) == nil })
			parked := c.Stats().Parked
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			// Each parked one has a journal. Empty ones only have a name.
			if n := len(pendingFiles(t, dir)); n > 2*parked {
				t.Errorf("%d files under pending/, of %d parked", n, parked)
			}
		}
	}
	settle(t, "goroutines", func() bool { return runtime.NumGoroutine() <= goroutines })
	settle(t, "descriptors", func() bool { return descriptors(t) <= files })
}

func openChaos(t *testing.T, dir string, maxSize int64) *Cache {
	t.Helper()
	c, err := New(Options{Dir: dir, MaxSize: maxSize})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// pendingFiles are those that take room.
func pendingFiles(t *testing.T, dir string) (files []string) {
	t.Helper()
	entries, err := os.ReadDir(dir + "/pending")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Size() > 0 {
			files = append(files, e.Name())
		}
	}
	return files
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// testRounds is how often a test at random goes round, n times or as TARN_TEST_ROUNDS
// has it.
func testRounds(n int) int {
	if rounds, err := strconv.Atoi(os.Getenv("TARN_TEST_ROUNDS")); err == nil {
		return rounds
	}
	return n
}

func settle(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 6000 { // half a minute, for a machine that has other work
		if ok() {
			return
		}
		<-tick.C
	}
	t.Errorf("%s did not come back to where they were", what)
}
