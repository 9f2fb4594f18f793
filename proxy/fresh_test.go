// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tarn/internal/registrytest"

	"github.com/anishathalye/porcupine"
	"github.com/opencontainers/go-digest"
)

// tagRegister is a registry with one tag whose value is a number, as the
// digest of that number.
type tagRegister struct {
	*registrytest.Registry
	value  atomic.Int64
	linger atomic.Int64 // how often others get to run between reading the value and the answer

	mu     sync.Mutex
	values map[digest.Digest]int64
}

func newTagRegister(t testing.TB) *tagRegister {
	g := &tagRegister{Registry: registrytest.New(t), values: make(map[digest.Digest]int64)}
	g.linger.Store(20)
	g.write(0)
	g.Hook = func(w http.ResponseWriter, r *http.Request) bool {
		d := digestOf(g.value.Load())
		// The value is read; the answer takes its time, and the tag may move
		// meanwhile: what it was is then only true of who asked before.
		for range g.linger.Load() {
			runtime.Gosched()
		}
		w.Header().Set("Docker-Content-Digest", d.String())
		w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		w.Header().Set("Content-Length", "100")
		return true
	}
	return g
}

func digestOf(v int64) digest.Digest { return digest.FromString(fmt.Sprint(v)) }

func (g *tagRegister) write(v int64) {
	g.mu.Lock()
	g.values[digestOf(v)] = v
	g.mu.Unlock()
	g.value.Store(v)
}

// read asks tarn what the tag means. The request goes straight to the handler;
// what tarn asks goes over HTTP.
func (g *tagRegister) read(p *Proxy) (int64, error) {
	w := httptest.NewRecorder()
	p.ServeHTTP(w, httptest.NewRequest("HEAD", "http://tarn"+manifestPath("app", "v1"), nil))
	g.mu.Lock()
	defer g.mu.Unlock()
	v, ok := g.values[digest.Digest(w.Header().Get("Docker-Content-Digest"))]
	if w.Code != 200 || !ok {
		return 0, fmt.Errorf("status %d, digest %q", w.Code, w.Header().Get("Docker-Content-Digest"))
	}
	return v, nil
}

func TestFreshNoReadIsOlderThanItsRequest(t *testing.T) {
	const reads, readers, perWrite = 100_000, 32, 25
	g := newTagRegister(t)
	d := start(t, setup{listed: map[string]*registrytest.Registry{lab: g.Registry}})

	type interval struct{ call, ret time.Duration }
	begin := time.Now()
	// written[v] is when v was written; only the writer appends, and readers
	// look after it has ended.
	written := make([]interval, 1, reads/perWrite+1)
	type observed struct {
		value int64
		interval
	}
	results := make([][]observed, readers)
	pace := make(chan struct{}, reads/perWrite)
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			for n := range reads / readers {
				call := time.Since(begin)
				v, err := g.read(d.proxy)
				if err != nil {
					t.Error(err)
					return
				}
				results[i] = append(results[i], observed{v, interval{call, time.Since(begin)}})
				if n%perWrite == 0 {
					pace <- struct{}{}
				}
			}
		})
	}
	stop := make(chan struct{})
	writerDone := make(chan struct{})
	go func() {
		defer close(writerDone)
		for {
			select {
			case <-pace:
				v := int64(len(written))
				call := time.Since(begin)
				g.write(v)
				written = append(written, interval{call, time.Since(begin)})
			case <-stop:
				return
			}
		}
	}()
	wg.Wait()
	close(stop)
	<-writerDone

	checked, stale := 0, 0
	for _, rs := range results {
		for _, o := range rs {
			checked++
			if o.ret < written[o.value].call {
				t.Fatalf("value %d was read before it was written", o.value)
			}
			if next := int(o.value) + 1; next < len(written) && written[next].ret < o.call {
				stale++
			}
		}
	}
	if stale > 0 {
		t.Errorf("%d of %d reads were replaced before the read began", stale, checked)
	}
	heads := g.Count("HEAD", "")
	t.Logf("%d reads, %d writes, %d HEADs upstream (%.1f reads a HEAD)", checked, len(written)-1, heads, float64(checked)/float64(heads))
	if heads >= checked/2 {
		t.Errorf("%d HEADs for %d concurrent reads: nothing was shared", heads, checked)
	}
}

// registerModel is a register as porcupine wants it.
var registerModel = porcupine.Model{
	Init: func() any { return int64(0) },
	Step: func(state, input, out any) (bool, any) {
		if in := input.(registerInput); in.write {
			return true, in.value
		}
		return out == state, state
	},
}

type registerInput struct {
	write bool
	value int64
}

func TestFreshTagReadsAreLinearizable(t *testing.T) {
	for run := range 20 {
		g := newTagRegister(t)
		d := start(t, setup{listed: map[string]*registrytest.Registry{lab: g.Registry}})
		g.linger.Store(200)
		const readers, reads, perWrite = 6, 130, 4 // 976 operations at most
		pace := make(chan struct{}, readers*reads)
		begin := time.Now()
		var mu sync.Mutex
		var ops []porcupine.Operation
		note := func(client int, in registerInput, out int64, call int64) {
			op := porcupine.Operation{ClientId: client, Input: in, Output: out, Call: call, Return: time.Since(begin).Nanoseconds()}
			mu.Lock()
			defer mu.Unlock()
			ops = append(ops, op)
		}
		var wg sync.WaitGroup
		for i := range readers {
			wg.Go(func() {
				for n := range reads {
					if n%perWrite == i%perWrite {
						pace <- struct{}{}
					}
					call := time.Since(begin).Nanoseconds()
					v, err := g.read(d.proxy)
					if err != nil {
						t.Error(err)
						return
					}
					note(i, registerInput{}, v, call)
				}
			})
		}
		writerDone := make(chan struct{})
		go func() {
			defer close(writerDone)
			v := int64(0)
			for range pace {
				v++
				call := time.Since(begin).Nanoseconds()
				g.write(v)
				note(readers, registerInput{write: true, value: v}, 0, call)
			}
		}()
		wg.Wait()
		close(pace)
		<-writerDone
		if res := porcupine.CheckOperationsTimeout(registerModel, ops, time.Minute); res != porcupine.Ok {
			t.Fatalf("run %d: %d operations: %v", run, len(ops), res)
		}
		d.stop()
	}
}

// heads is an ask whose answers come when the test says so.
type heads struct {
	mu    sync.Mutex
	sent  []uint64
	gates map[uint64]chan *confirmation
}

func newHeads() (*heads, *freshness) {
	h := &heads{gates: make(map[uint64]chan *confirmation)}
	f := &freshness{queues: make(map[headKey]*headQueue), sequence: new(atomic.Uint64)}
	f.ask = func(ctx context.Context, _ headKey, sequence uint64) (*confirmation, error) {
		gate := make(chan *confirmation, 1)
		h.mu.Lock()
		h.sent = append(h.sent, sequence)
		h.gates[sequence] = gate
		h.mu.Unlock()
		select {
		case c := <-gate:
			return c, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return h, f
}

func (h *heads) answer(sequence uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.gates[sequence] <- &confirmation{size: int64(sequence)}
}

func (h *heads) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.sent)
}

func TestGroupCommit(t *testing.T) {
	type reader struct{ got chan int64 }
	read := func(ctx context.Context, f *freshness) reader {
		r := reader{make(chan int64, 1)}
		go func() {
			c, _, err := f.confirm(ctx, ctx, context.Background(), headKey{tag: "v1"})
			if err != nil {
				r.got <- -1
				return
			}
			r.got <- c.size
		}()
		synctest.Wait()
		return r
	}
	for name, run := range map[string]func(t *testing.T, h *heads, f *freshness){
		"one request goes out at once": func(t *testing.T, h *heads, f *freshness) {
			r := read(t.Context(), f)
			if h.count() != 1 {
				t.Fatal("it waited")
			}
			h.answer(1)
			if got := <-r.got; got != 1 {
				t.Fatal(got)
			}
		},
		"a HEAD that was sent is not joined": func(t *testing.T, h *heads, f *freshness) {
			first, second := read(t.Context(), f), read(t.Context(), f)
			time.Sleep(gatherFor) // the bubble's clock: no real time passes
			synctest.Wait()
			if h.count() != 2 {
				t.Fatalf("%d HEADs", h.count())
			}
			h.answer(1)
			if got := <-first.got; got != 1 {
				t.Fatal(got)
			}
			select {
			case got := <-second.got:
				t.Fatalf("the second request was answered by HEAD %d", got)
			default:
			}
			h.answer(2)
			if got := <-second.got; got != 2 {
				t.Fatal(got)
			}
		},
		"a burst shares the next, and at most two are in flight": func(t *testing.T, h *heads, f *freshness) {
			first := read(t.Context(), f)
			var burst, late []reader
			for range 10 {
				burst = append(burst, read(t.Context(), f))
			}
			time.Sleep(gatherFor)
			synctest.Wait()
			for range 10 {
				late = append(late, read(t.Context(), f))
			}
			time.Sleep(time.Second)
			synctest.Wait()
			if h.count() != 2 {
				t.Fatalf("%d HEADs in flight", h.count())
			}
			h.answer(2)
			synctest.Wait()
			for _, r := range burst {
				if got := <-r.got; got != 2 {
					t.Fatal(got)
				}
			}
			if h.count() != 3 {
				t.Fatal("a slot was free and the late ones were not sent")
			}
			h.answer(3)
			for _, r := range late {
				if got := <-r.got; got != 3 {
					t.Fatal(got)
				}
			}
			h.answer(1)
			if got := <-first.got; got != 1 {
				t.Fatal(got)
			}
		},
		"what nobody waits for any more is called off": func(t *testing.T, h *heads, f *freshness) {
			ctx, cancel := context.WithCancel(t.Context())
			sent, gathers := read(ctx, f), read(ctx, f)
			cancel()
			if a, b := <-sent.got, <-gathers.got; a != -1 || b != -1 {
				t.Fatal(a, b)
			}
			f.asking.Wait() // the HEAD has ended without an answer
			time.Sleep(gatherFor)
			synctest.Wait()
			if h.count() != 1 {
				t.Fatalf("%d HEADs", h.count())
			}
			r := read(t.Context(), f)
			h.answer(2)
			if got := <-r.got; got != 2 {
				t.Fatal(got)
			}
		},
		"who leaves does not take the HEAD along": func(t *testing.T, h *heads, f *freshness) {
			ctx, cancel := context.WithCancel(t.Context())
			read(t.Context(), f)
			leaver, stayer := read(ctx, f), read(t.Context(), f)
			cancel()
			if got := <-leaver.got; got != -1 {
				t.Fatal(got)
			}
			time.Sleep(gatherFor)
			synctest.Wait()
			h.answer(2)
			if got := <-stayer.got; got != 2 {
				t.Fatal(got)
			}
			h.answer(1)
		},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h, f := newHeads()
				run(t, h, f)
				f.asking.Wait()
				if len(f.queues) != 0 {
					t.Errorf("%d queues are left", len(f.queues))
				}
			})
		})
	}
}

// TestFreshWhoTakesAnothersPlaceNumbersOn: an answer that the old one still waits for
// would else seem to be newer than one to a question that was sent after it.
func TestFreshWhoTakesAnothersPlaceNumbersOn(t *testing.T) {
	t.Parallel()
	d := start(t, setup{})
	next, err := New(Options{Upstreams: d.proxy.upstreams, Cache: d.cache, Replaces: d.proxy})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	last := uint64(0)
	for i, p := range []*Proxy{d.proxy, next, d.proxy, next} {
		n := p.fresh.number()
		if n <= last {
			t.Errorf("question %d has number %d, and the one before it %d", i, n, last)
		}
		last = n
	}
}
