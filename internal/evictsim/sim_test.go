// SPDX-License-Identifier: Apache-2.0

package evictsim

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the tables of docs/EVICTION.md")

var policies = []struct {
	name string
	make func(room int64) Policy
}{
	{"LRU", NewLRU}, {"SIEVE", newSIEVE}, {"S3-FIFO", newS3FIFO}, {"GDSF, a miss costs 1", newGDSF}, {"LFU-DA: GDSF, a miss costs its bytes", newLFUDA},
	{"GDSF, a miss costs its bytes and 1 MiB", newGDSFBytes}, {"tarn: the same, orphans first", NewTarn},
}

const pulls = 12_000

func traces() []*Trace { return []*Trace{Zipf(pulls, 1), scan(pulls, 1), moving(pulls, 1)} }

var shares = []int64{10, 30, 60}

// TestTheTables runs every policy on every trace, holds tarn's to what it is
// chosen for, and docs/EVICTION.md to what comes out.
func TestTheTables(t *testing.T) {
	var tables strings.Builder
	for i, tr := range traces() {
		total := tr.WorkingSet()
		fmt.Fprintf(&tables, "\n### %s: %d pulls, %.1f GB\n\n| policy |", tr.Name, pulls, float64(total)/1e9)
		for _, s := range shares {
			fmt.Fprintf(&tables, " bytes at %d%% | requests |", s)
		}
		tables.WriteString("\n|---|" + strings.Repeat("---:|---:|", len(shares)) + "\n")
		bounds := make(map[int64]float64)
		fmt.Fprintf(&tables, "| Belady's bound |")
		for _, s := range shares {
			bounds[s] = belady(tr, total/100*s).ByteHitRatio()
			fmt.Fprintf(&tables, " %.3f | |", bounds[s])
		}
		tables.WriteString("\n")
		at30 := make(map[string]float64)
		for _, p := range policies {
			fmt.Fprintf(&tables, "| %s |", p.name)
			for _, s := range shares {
				room := total / 100 * s
				r := Run(tr, p.make(room), room)
				fmt.Fprintf(&tables, " %.3f | %.3f |", r.ByteHitRatio(), r.HitRatio())
				if r.ByteHitRatio() > bounds[s] {
					t.Errorf("%s, %s: better than the bound", tr.Name, p.name)
				}
				if s == 30 {
					at30[p.name] = r.ByteHitRatio()
				}
			}
			tables.WriteString("\n")
		}
		tarn := at30[policies[len(policies)-1].name]
		if tarn <= at30["LRU"] {
			t.Errorf("%s: %.4f of the bytes, and LRU has %.4f", tr.Name, tarn, at30["LRU"])
		}
		if i == 0 && tarn < 0.9*bounds[30] {
			t.Errorf("%s: %.4f of the bytes, and the bound is %.4f", tr.Name, tarn, bounds[30])
		}
	}
	const path, begin, end = "../../docs/EVICTION.md", "<!-- tables -->\n", "<!-- end of the tables -->\n"
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, _ := strings.Cut(string(doc), begin)
	_, after, ok := strings.Cut(rest, end)
	want := before + begin + tables.String() + "\n" + end + after
	switch {
	case !ok:
		t.Fatal("the document has no place for the tables")
	case *update:
		if err := os.WriteFile(path, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
	case want != string(doc):
		t.Error("docs/EVICTION.md has other tables: go test ./internal/evictsim -update")
	}
}

// TestPoliciesKeepToTheRoom plays traces that have what may go wrong in them.
func TestPoliciesKeepToTheRoom(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	tr := &Trace{}
	for range 200 {
		tr.Objects = append(tr.Objects, Object{Size: 1 + int64(math.Exp(10*r.Float64()))})
	}
	for range 20_000 {
		tr.Events = append(tr.Events, Event{Object: r.IntN(len(tr.Objects))})
	}
	for _, room := range []int64{0, 1, 100, 20_000, 1 << 40} {
		bound := belady(tr, room)
		for _, p := range policies {
			used, stored := int64(0), map[int]bool{}
			res := Run(tr, &watched{p.make(room), func(k int, n int) {
				if stored[k] == (n > 0) {
					t.Fatalf("%s: %d twice", p.name, k)
				}
				stored[k] = n > 0
				if used += int64(n) * tr.Objects[k].Size; used > room {
					t.Fatalf("%s: %d bytes of %d", p.name, used, room)
				}
			}}, room)
			if res.BytesHit > bound.BytesHit || room == 1<<40 && res.Requests-res.Hits != len(tr.Objects) {
				t.Errorf("%s in %d: %+v", p.name, room, res)
			}
		}
	}
}

type watched struct {
	Policy
	change func(k, n int)
}

func (w *watched) Add(k int, size int64) { w.change(k, 1); w.Policy.Add(k, size) }
func (w *watched) Evict(k int)           { w.change(k, -1); w.Policy.Evict(k) }

// TestTheBoundIsOne: all ways to keep objects of one size, tried out.
func TestTheBoundIsOne(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for range 300 {
		tr := &Trace{Objects: slices.Repeat([]Object{{Size: 1}}, 4)}
		for range 9 {
			tr.Events = append(tr.Events, Event{Object: r.IntN(4)})
		}
		const room = 2
		if got, want := belady(tr, room).Hits, best(tr.Events, 0, room); got != want {
			t.Fatalf("%d hits, not %d: %v", got, want, tr.Events)
		}
	}
}

// best tries what to keep after each request, out of what is there.
func best(events []Event, there uint, room int) (most int) {
	if len(events) == 0 {
		return 0
	}
	bit := uint(1) << events[0].Object
	hit := 0
	if there&bit != 0 {
		hit = 1
	}
	there |= bit
	for keep := uint(0); keep <= there; keep++ {
		n := 0
		for b := keep; b != 0; b &= b - 1 {
			n++
		}
		if keep&^there == 0 && n <= room {
			most = max(most, best(events[1:], keep, room))
		}
	}
	return hit + most
}
