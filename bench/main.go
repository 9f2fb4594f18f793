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
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
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
