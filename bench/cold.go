// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// What is measured with an empty cache, which each system has for each run.

// coldPull is an image of ten layers and 500 MB.
func (b *bench) coldPull(latency time.Duration, rate int64, redirect bool) error {
	layers, size := 10, 50*megabyte
	cold := append(systems(), ahead)
	if b.short {
		size = 10 * megabyte
	}
	took := make(map[string][]float64)
	for range b.runs {
		for _, s := range cold {
			b.u.latency, b.u.rate, b.u.redirect = latency, rate, redirect && s.name != "nginx" && s.name != "nginx without lock"
			if redirect != b.u.redirect {
				continue // nginx would pass the redirect on
			}
			if redirect && s.command == nil {
				continue // this client does not follow
			}
			i := b.u.image("bench/app", layers, size)
			err := b.fresh(s, func(r *server) error {
				b.u.reset()
				before := r.cpu()
				d, err := pull(r.addr, i)
				if err != nil {
					return err
				}
				took[s.name] = append(took[s.name], d.Seconds())
				if len(took[s.name]) == 1 {
					b.note(s, "upstream bytes", float64(b.u.sent.Load())/float64(i.bytes()), "x")
					b.note(s, "upstream requests", float64(b.u.requests.Load()), "")
					b.note(s, "CPU", (r.cpu() - before).Seconds(), "s")
				}
				if s.name == "tarn" {
					b.must(b.u.sent.Load() == i.bytes(), "upstream sent %d bytes of %d", b.u.sent.Load(), i.bytes())
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	for _, s := range cold {
		if len(took[s.name]) > 0 {
			b.note(s, "wall", median(took[s.name]), "s")
		}
	}
	b.note(system{name: "sha256"}, "wall", hashing(layers, size).Seconds(), "s")
	return nil
}

// hashing is how long that many bytes take to hash.
func hashing(times, size int) time.Duration {
	buf := make([]byte, 1<<20)
	start := time.Now()
	h := sha256.New()
	for range times {
		for n := 0; n < size; n += len(buf) {
			h.Write(buf)
		}
	}
	return time.Since(start)
}

func (b *bench) firstByte() error {
	const latency = 20 * time.Millisecond
	first := make(map[string][]float64)
	for range b.runs {
		for _, s := range systems() {
			i := b.u.image("bench/app", 1, 50*megabyte)
			err := b.fresh(s, func(r *server) error {
				b.u.latency, b.u.rate = latency, 50e6
				c, err := dial(r.addr)
				if err != nil {
					return err
				}
				defer c.close()
				a, err := c.do(requestText("GET", "/v2/bench/app/blobs/"+i.blobs[1].digest))
				first[s.name] = append(first[s.name], a.first.Seconds()*1000)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	for _, s := range systems() {
		b.note(s, "time to first byte", median(first[s.name]), "ms")
	}
	return nil
}

// manyCold is 50 clients that pull the same image at once.
func (b *bench) manyCold() error {
	clients, size := 50, 10*megabyte
	if b.short {
		size = 2 * megabyte
	}
	const layers = 10
	took := make(map[string][]float64)
	for range b.runs {
		for _, s := range systems() {
			i := b.u.image("bench/app", layers, size)
			err := b.fresh(s, func(r *server) error {
				time.Sleep(100 * time.Millisecond)
				idle := r.memory()
				b.u.reset()
				peak := r.watch()
				errs := make(chan error, clients)
				start := time.Now()
				for range clients {
					go func() {
						_, err := pull(r.addr, i)
						errs <- err
					}()
				}
				var err error
				for range clients {
					err = errors.Join(err, <-errs)
				}
				took[s.name] = append(took[s.name], time.Since(start).Seconds())
				most := peak()
				if len(took[s.name]) == 1 {
					b.note(s, "upstream bytes", float64(b.u.sent.Load())/float64(i.bytes()), "x")
					b.note(s, "idle memory", float64(idle)/(1<<20), "MiB")
					b.note(s, "peak memory", float64(most)/(1<<20), "MiB")
				}
				if s.name == "tarn" {
					b.must(b.u.sent.Load() == i.bytes(), "upstream sent %d bytes of %d", b.u.sent.Load(), i.bytes())
					b.must(most < 64<<20, "%d MiB of memory at the peak", most>>20)
					b.must(idle < 25<<20, "%d MiB of memory when idle", idle>>20)
				}
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	for _, s := range systems() {
		b.note(s, "wall", median(took[s.name]), "s")
	}
	return nil
}

// fresh runs a system with an empty cache for one measurement.
func (b *bench) fresh(s system, f func(*server) error) error {
	dir := filepath.Join(b.work, "fresh")
	defer os.RemoveAll(dir)
	latency, rate := b.u.latency, b.u.rate
	r, err := s.start(dir, b.u)
	if err != nil {
		return err
	}
	defer r.stop()
	b.u.latency, b.u.rate = latency, rate
	if err := f(r); err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	return nil
}
