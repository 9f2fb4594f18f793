// SPDX-License-Identifier: Apache-2.0

// Command bench runs tarn and other systems side by side, each before the same
// synthetic registry, and prints what they take in proportion to each other.
//
// The systems take turns, each with a fresh cache, on a core of its own; the
// registry and the clients have the other one. Figures of one run are to be
// compared with each other and with nothing else. The short form checks what
// does not depend on the machine's speed, and fails when that is not right.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// figure is one measured thing of one system.
type figure struct {
	Case   string  `json:"case"`
	System string  `json:"system"`
	What   string  `json:"what"`
	Value  float64 `json:"value"`
	Unit   string  `json:"unit"`
}

type bench struct {
	u       *upstream
	work    string
	runs    int
	short   bool
	figures []figure
	wrong   []string // what does not depend on the machine, and is not right
	case_   string
}

func main() {
	only := flag.String("only", "", "run the cases that match this expression")
	short := flag.Bool("short", false, "the short form, for CI")
	runs := flag.Int("runs", 3, "how often each cold case is run; the median counts")
	file := flag.String("json", "", "write the figures into this file, too")
	pinned := flag.Bool("pinned", false, "this process is on its core already")
	flag.Parse()
	if !*pinned { // the load and the registry on one core, the systems on the other
		cmd := exec.Command("taskset", append([]string{"-c", "0", os.Args[0], "-pinned"}, os.Args[1:]...)...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if err := run(*only, *short, *runs, *file); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(only string, short bool, runs int, file string) error {
	match, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "tarn-bench.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	u, err := newUpstream(64 << 20)
	if err != nil {
		return err
	}
	b := &bench{u: u, work: work, runs: runs, short: short}
	for _, c := range cases {
		if !match.MatchString(c.name) || short && !c.short {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s ...\n", c.name)
		b.case_ = c.name
		u.latency, u.rate, u.redirect, u.tagExpires = 0, 0, false, "@1"
		if err := c.run(b); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	b.print()
	if file != "" {
		data, err := json.MarshalIndent(b.figures, "", "\t")
		if err == nil {
			err = os.WriteFile(file, data, 0o644)
		}
		if err != nil {
			return err
		}
	}
	if len(b.wrong) > 0 {
		return errors.New(strings.Join(b.wrong, "\n"))
	}
	return nil
}

func (b *bench) note(s system, what string, value float64, unit string) {
	b.figures = append(b.figures, figure{b.case_, s.name, what, value, unit})
}

// must holds what does not depend on the machine to its bound.
func (b *bench) must(ok bool, format string, args ...any) {
	if !ok {
		b.wrong = append(b.wrong, b.case_+": "+fmt.Sprintf(format, args...))
	}
}

var cases = []struct {
	name  string
	short bool
	run   func(*bench) error
}{
	{"cold pull", true, func(b *bench) error { return b.coldPull(0, 0, false) }},
	{"cold pull, 20 ms", false, func(b *bench) error { return b.coldPull(20*time.Millisecond, 0, false) }},
	{"cold pull, 50 MB/s a connection", false, func(b *bench) error { return b.coldPull(0, 50e6, false) }},
	{"cold pull, 50 MB/s a connection, 20 ms", false, func(b *bench) error { return b.coldPull(20*time.Millisecond, 50e6, false) }},
	{"cold pull, 50 MB/s a connection, 20 ms, redirects", false, func(b *bench) error { return b.coldPull(20*time.Millisecond, 50e6, true) }},
	{"first byte of a cold layer", false, (*bench).firstByte},
	{"50 cold clients", true, (*bench).manyCold},
	{"warm blob", true, (*bench).warmBlob},
	{"tag, confirmed", true, (*bench).tags},
	{"manifest by digest", false, (*bench).manifests},
	{"100,000 objects", false, (*bench).manyObjects},
	{"many small objects", true, (*bench).fewerObjects},
}

const megabyte = 1_000_000

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

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

// print shows each case as a table, a row for each thing and a column for each
// system, with tarn's as a multiple of the others'.
func (b *bench) print() {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, c := range cases {
		values := make(map[string]map[string]figure)
		var rows, columns []string
		for _, f := range b.figures {
			if f.Case != c.name {
				continue
			}
			if values[f.What] == nil {
				values[f.What] = make(map[string]figure)
				rows = append(rows, f.What)
			}
			if !slices.Contains(columns, f.System) {
				columns = append(columns, f.System)
			}
			values[f.What][f.System] = f
		}
		if len(rows) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n%s\t%s\n", c.name, strings.Join(columns, "\t"))
		for _, row := range rows {
			unit := ""
			for f := range maps.Values(values[row]) {
				unit = f.Unit
			}
			fmt.Fprintf(w, "%s (%s)", row, unit)
			ours, known := values[row]["tarn"]
			for _, col := range columns {
				f, ok := values[row][col]
				switch {
				case !ok:
					fmt.Fprint(w, "\t-")
				case known && col != "tarn" && f.Value > 0 && !strings.Contains(row, "upstream"):
					fmt.Fprintf(w, "\t%.3g [%.2f]", f.Value, ours.Value/f.Value)
				default:
					fmt.Fprintf(w, "\t%.4g", f.Value)
				}
			}
			fmt.Fprintln(w)
		}
	}
	w.Flush()
	fmt.Println("\n[x]: tarn's figure is x times that one.")
}
