// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// What is measured when the systems have it already; they take turns.

// turns is how long each system's turn in a warm case is, and how many it has.
func (b *bench) turns() (n int, each time.Duration) {
	if b.short {
		return 1, 300 * time.Millisecond
	}
	return b.runs, 2 * time.Second
}

func (b *bench) warmBlob() error {
	// Several, since one file may lie luckily in memory and another not.
	layers, paths := make([]*content, 8), make([][]byte, 8)
	for i := range layers {
		layers[i] = b.u.layer(25 * megabyte)
		paths[i] = requestText("GET", "/v2/bench/app/blobs/"+layers[i].digest)
	}
	warm := append(systems()[1:3], systems()[4], nginxStatic)
	servers := make(map[string]*server)
	for _, s := range warm {
		r, err := s.start(filepath.Join(b.work, "warm", s.name), b.u)
		if err != nil {
			return err
		}
		defer r.stop()
		servers[s.name] = r
		if s.name == nginxStatic.name {
			dir := filepath.Join(r.dir, "static/v2/bench/app/blobs")
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return err
			}
			for _, l := range layers {
				if err := os.WriteFile(filepath.Join(dir, l.digest), append(slices.Clone(l.base), l.trailer...), 0o600); err != nil {
					return err
				}
			}
		}
		if err := warmUp(r, paths...); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	for _, connections := range []int{1, 16} {
		rates, costs := make(map[string][]float64), make(map[string][]float64)
		n, each := b.turns()
		for range n {
			for _, s := range warm {
				r := servers[s.name]
				b.u.reset()
				before := r.cpu()
				got, err := hammer(r.addr, connections, each, func(c, n int) []byte { return paths[(c+n)%len(paths)] })
				if err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
				rates[s.name] = append(rates[s.name], float64(got.bytes)/1e9/got.took.Seconds())
				costs[s.name] = append(costs[s.name], (r.cpu()-before).Seconds()/(float64(got.bytes)/1e9))
				if s.name == "tarn" {
					b.must(b.u.sent.Load() == 0, "upstream sent %d bytes", b.u.sent.Load())
				}
			}
		}
		for _, s := range warm {
			b.note(s, fmt.Sprintf("%d connections", connections), median(rates[s.name]), "GB/s")
			b.note(s, fmt.Sprintf("CPU at %d connections", connections), median(costs[s.name]), "s/GB")
		}
	}
	return nil
}

// warmUp asks until the system has it: some store only what was asked for
// twice, or a while later.
func warmUp(r *server, requests ...[]byte) error {
	c, err := dial(r.addr)
	if err != nil {
		return err
	}
	defer c.close()
	for range 2 {
		for _, q := range requests {
			if _, err := c.do(q); err != nil {
				return err
			}
		}
		time.Sleep(200 * time.Millisecond)
	}
	return nil
}

// tags asks for the same tag again and again.
func (b *bench) tags() error {
	i := b.u.image("bench/app", 1, 1000)
	path := "/v2/bench/app/manifests/" + i.tag
	for _, latency := range []time.Duration{0, 20 * time.Millisecond} {
		if b.short && latency > 0 {
			continue
		}
		for _, method := range []string{"HEAD", "GET"} {
			for _, connections := range []int{1, 64} {
				b.u.latency = latency
				what := fmt.Sprintf("%s, %d connections, %v", method, connections, latency)
				if err := b.small(append(systems()[:3:3], systems()[4]), what, connections, []string{path}, func(int, int) string { return path }, method); err != nil {
					return err
				}
			}
		}
	}
	b.u.latency, b.u.tagExpires = 0, "1"
	ttl := systems()[2]
	ttl.name = "nginx, 1 s TTL"
	return b.small([]system{ttl}, "HEAD, 64 connections, 0s", 64, []string{path}, func(int, int) string { return path }, "HEAD")
}

// small measures requests for small things, once the systems have them.
func (b *bench) small(systems []system, what string, connections int, warm []string, next func(connection, n int) string, method string) error {
	type turn struct{ rate, p50, p99, cpu, upstream float64 }
	turns := make(map[string][]turn)
	servers := make(map[string]*server)
	for _, s := range systems {
		r, err := s.start(filepath.Join(b.work, "small", b.case_, s.name), b.u)
		if err != nil {
			return err
		}
		defer r.stop()
		servers[s.name] = r
		var requests [][]byte
		for _, path := range warm {
			requests = append(requests, requestText("GET", path))
		}
		if err := warmUp(r, requests...); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	n, each := b.turns()
	for range n {
		for _, s := range systems {
			r := servers[s.name]
			b.u.reset()
			before := r.cpu()
			got, err := hammer(r.addr, connections, each, func(c, n int) []byte { return requestText(method, next(c, n)) })
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			turns[s.name] = append(turns[s.name], turn{
				got.rate(),
				got.percentile(0.5).Seconds() * 1000,
				got.percentile(0.99).Seconds() * 1000,
				(r.cpu() - before).Seconds() * 1e6 / float64(got.requests),
				float64(b.u.requests.Load()) / float64(got.requests),
			})
		}
	}
	for _, s := range systems {
		pick := func(f func(turn) float64) float64 {
			var v []float64
			for _, t := range turns[s.name] {
				v = append(v, f(t))
			}
			return median(v)
		}
		b.note(s, what, pick(func(t turn) float64 { return t.rate }), "/s")
		b.note(s, what+": p50", pick(func(t turn) float64 { return t.p50 }), "ms")
		b.note(s, what+": p99", pick(func(t turn) float64 { return t.p99 }), "ms")
		upstream := pick(func(t turn) float64 { return t.upstream })
		b.note(s, what+": upstream", upstream, "requests each")
		if s.command != nil {
			b.note(s, what+": CPU", pick(func(t turn) float64 { return t.cpu }), "us each")
		}
		if s.name == "tarn" && strings.HasPrefix(b.case_, "tag") {
			b.must(upstream <= 1.01, "%g upstream requests for each", upstream)
			b.must(connections < 64 || upstream <= 0.25, "%g upstream requests for each at 64 connections", upstream)
		}
	}
	return nil
}

func (b *bench) manifests() error {
	i := b.u.image("bench/app", 1, 1000)
	path := "/v2/bench/app/manifests/" + i.manifest.digest
	return b.small(append(systems()[1:3:3], systems()[4]), "GET, 64 connections", 64, []string{path}, func(int, int) string { return path }, "GET")
}

func (b *bench) manyObjects() error  { return b.objects(100_000) }
func (b *bench) fewerObjects() error { return b.objects(2_000) }

// objects has a system hold many small blobs, of one repository and of 200,
// starts it again, and asks for them at random.
func (b *bench) objects(count int) error {
	digests := make([]string, count)
	for n := range digests {
		digests[n] = b.u.small(fmt.Appendf(nil, "%01000d", n+int(time.Now().UnixNano())), "application/octet-stream").digest
	}
	path := func(repositories, n int) string {
		return fmt.Sprintf("/v2/bench/r%d/blobs/%s", n%repositories, digests[n])
	}
	for _, repositories := range []int{1, 200} {
		for _, s := range append(systems()[1:3:3], systems()[4]) {
			if s.name == "distribution" && count > 10_000 {
				continue // it takes minutes to fill, and 200 to 300 requests a second
			}
			dir := filepath.Join(b.work, fmt.Sprintf("objects%d", repositories), s.name)
			r, err := s.start(dir, b.u)
			if err != nil {
				return err
			}
			const fillers = 16
			next := make(chan int, count)
			for n := range count {
				next <- n
			}
			close(next)
			_, err = hammer(r.addr, fillers, 10*time.Minute, func(int, int) []byte {
				n, ok := <-next
				if !ok {
					return nil
				}
				return requestText("GET", path(repositories, n))
			})
			if err != nil {
				r.stop()
				return fmt.Errorf("fill %s: %w", s.name, err)
			}
			r.stop()
			if r, err = s.start(dir, b.u); err != nil {
				return err
			}
			what := fmt.Sprintf("of %d repositories", repositories)
			b.note(s, "ready, "+what, float64(r.ready)/1e6, "ms")
			// The first round asks each repository.
			var warm [][]byte
			for n := range repositories {
				warm = append(warm, requestText("GET", path(repositories, n)))
			}
			if err := warmUp(r, warm...); err != nil {
				r.stop()
				return err
			}
			b.u.reset()
			_, each := b.turns()
			before := r.cpu()
			got, err := hammer(r.addr, 64, each, func(c, n int) []byte {
				return requestText("GET", path(repositories, (c*7919+n*104729)%count))
			})
			if err != nil {
				r.stop()
				return fmt.Errorf("%s: %w", s.name, err)
			}
			b.note(s, "GET, 64 connections, "+what, got.rate(), "/s")
			b.note(s, "CPU, "+what, (r.cpu()-before).Seconds()*1e6/float64(got.requests), "us each")
			b.note(s, "memory, "+what, float64(r.memory())/(1<<20), "MiB")
			b.note(s, "upstream, "+what, float64(b.u.requests.Load())/float64(got.requests), "requests each")
			if s.name == "tarn" {
				b.must(r.memory() < 100<<20, "%d MiB of memory", r.memory()>>20)
				b.must(b.u.sent.Load() == 0, "upstream sent %d bytes", b.u.sent.Load())
			}
			r.stop()
			os.RemoveAll(dir)
		}
	}
	return nil
}
