// SPDX-License-Identifier: Apache-2.0

package evict

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// drain evicts everything, in order.
func drain(q *Queue[string]) (order []string) {
	for {
		k, ok := q.Take()
		if !ok {
			return order
		}
		q.Evict(k)
		order = append(order, k)
	}
}

func mustGo(t *testing.T, q *Queue[string], want ...string) {
	t.Helper()
	if got := drain(q); !slices.Equal(got, want) {
		t.Errorf("%q go, not %q", got, want)
	}
}

func TestWhatWouldBeMissedLeastGoesFirst(t *testing.T) {
	q := New[string]()
	q.Add("manifest", 4<<10) // for a request saved in 4 KiB
	q.Add("layer", 10<<20)
	q.Add("popular", 10<<20)
	q.Use("popular")
	q.Add("small layer", 1<<20)
	mustGo(t, q, "layer", "small layer", "popular", "manifest")
}

func TestWhatWasPopularAges(t *testing.T) {
	q := New[string]()
	q.Add("once", 1<<30)
	for range 1000 {
		q.Use("once")
	}
	for n := 0; ; n++ {
		q.Add("new", 1<<30)
		k, _ := q.Take()
		q.Evict(k)
		if k == "once" {
			if n < maxUses/2 || n > 2*maxUses {
				t.Errorf("it went after %d others", n)
			}
			return
		}
		if n > 1000 {
			t.Fatal("it never goes")
		}
	}
}

func TestWhatNothingLeadsToGoesFirst(t *testing.T) {
	image := func(q *Queue[string], tag bool, name string, children ...string) {
		q.Add(name, 4<<10)
		q.Lead(name, children)
		if tag {
			q.Tag(name)
		}
		for _, c := range children {
			q.Add(c, 10<<20)
		}
	}
	const n = 4
	make := func() *Queue[string] {
		q := New[string]()
		image(q, true, "old", "base", "old app")
		image(q, true, "other", "other app")
		image(q, false, "by digest", "its app")
		for range n {
			q.Use("old app")
		}
		return q
	}
	t.Run("superseded", func(t *testing.T) {
		q := make()
		q.Untag("old")
		image(q, true, "new", "base", "new app")
		mustGo(t, q, "old app", "old", "other app", "its app", "new app", "base", "other", "by digest", "new")
	})
	t.Run("tagged twice", func(t *testing.T) {
		q := make()
		q.Tag("old")
		q.Untag("old")
		mustGo(t, q, "base", "other app", "its app", "old app", "old", "other", "by digest")
	})
	t.Run("used all the same", func(t *testing.T) {
		q := make()
		q.Untag("old")
		q.Use("old")
		mustGo(t, q, "base", "other app", "its app", "old app", "other", "by digest", "old")
	})
	t.Run("tagged again", func(t *testing.T) {
		q := make()
		q.Untag("old")
		q.Tag("old")
		mustGo(t, q, "base", "other app", "its app", "old app", "old", "other", "by digest")
	})
	t.Run("a manifest that went", func(t *testing.T) {
		q := make()
		q.Remove("by digest")
		mustGo(t, q, "its app", "base", "other app", "old app", "old", "other")
	})
	t.Run("an index", func(t *testing.T) {
		q := make()
		image(q, true, "index", "old", "by digest")
		q.Untag("old") // the index leads there still
		q.Untag("index")
		if got := drain(q)[:5]; slices.Contains(got, "other app") || !slices.Contains(got, "its app") {
			t.Errorf("%q go first", got)
		}
	})
	t.Run("lost before", func(t *testing.T) {
		q := make()
		q.Lose("by digest")
		q.Lose("old") // which has its tag
		mustGo(t, q, "its app", "by digest", "base", "other app", "old app", "old", "other")
	})
	t.Run("nothing is left of what is gone", func(t *testing.T) {
		q := make()
		q.Untag("old")
		q.Untag("other")
		drain(q)
		if len(q.links)+len(q.entries) > 0 {
			t.Errorf("%d links, %d entries", len(q.links), len(q.entries))
		}
	})
}

func TestWhatIsHeldStays(t *testing.T) {
	q := New[string]()
	q.Add("a", 1<<20)
	q.Add("b", 2<<20)
	a := q.Hold("a")
	q.Hold("a")
	q.Use("a")
	q.Release(a)
	mustGo(t, q, "b")
	q.Release(a)
	mustGo(t, q, "a")
	if q.Hold("a") != nil {
		t.Error("it is gone")
	}
}

func TestTheRoomOfWhatIsHeldIsFreeAfterwards(t *testing.T) {
	q := New[string]()
	q.Add("a", 1<<20)
	first, second := q.Hold("a"), q.Hold("a")
	if n := q.Remove("a"); n != 0 || q.Free() != 0 || q.Lingering() != 1<<20 {
		t.Error(n, q.Free(), q.Lingering())
	}
	q.Add("a", 3<<20) // another one, which who held the first does not hold
	third := q.Hold("a")
	if n := q.Release(first); n != 0 {
		t.Error(n)
	}
	if n := q.Release(second); n != 1<<20 || q.Lingering() != 0 {
		t.Error(n, q.Lingering())
	}
	if _, ok := q.Take(); ok {
		t.Error("a held one goes")
	}
	if n := q.Release(third); n != 0 || q.Free() != 3<<20 {
		t.Error(n, q.Free())
	}
	if n := q.Evict("a"); n != 3<<20 || q.Free() != 0 {
		t.Error(n, q.Free())
	}
}

func TestWhatIsAwaitedStays(t *testing.T) {
	q := New[string]()
	early, other := q.Await("a"), q.Await("b")
	q.Release(other)
	q.Add("a", 1<<20)
	q.Add("b", 1<<20)
	mustGo(t, q, "b")
	q.Release(early)
	if k, ok := q.Take(); k != "a" || !ok {
		t.Fatal(k, ok)
	}
	late := q.Await("a") // it goes, and somebody reads it
	if n := q.Evict("a"); n != 0 || q.Lingering() != 1<<20 {
		t.Error(n, q.Lingering())
	}
	if n := q.Release(late); n != 1<<20 || q.Lingering() != 0 {
		t.Error(n, q.Lingering())
	}
}

// TestMemoryForLinksIsBounded: manifests that lead to as much as one can.
func TestMemoryForLinksIsBounded(t *testing.T) {
	q := New[int]()
	const manifests, children = 100, 45_000
	for k := range manifests {
		q.Add(-k-1, 1)
		var leads []int
		for c := range children {
			leads = append(leads, k*children+c)
		}
		q.Lead(-k-1, leads)
	}
	if len(q.links) > maxLinks+manifests || len(q.links) < maxLinks/2 {
		t.Errorf("%d links", len(q.links))
	}
	for range manifests {
		k, _ := q.Take()
		q.Evict(k)
	}
	if len(q.links) != 0 || q.leading != 0 {
		t.Errorf("%d links are left, %d children", len(q.links), q.leading)
	}
}

func TestARestartKeepsTheOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	one, two := New[string](), New[string]()
	keys := []string{"a", "b", "c", "d", "e", "f", "g", "h"}
	for range 200 {
		k := keys[r.IntN(len(keys))]
		one.Add(k, 1<<20+r.Int64N(10<<20))
		if r.IntN(4) == 0 {
			k, _ := one.Take()
			one.Evict(k)
		}
	}
	for _, k := range keys {
		if rank, ok := one.Rank(k); ok {
			two.Restore(k, one.entries[k].size, rank)
		}
	}
	two.Resume()
	two.Add("new", 5<<20) // and what comes is not behind all that was there
	order := drain(two)
	if order[0] == "new" {
		t.Error("what is new goes first")
	}
	mustGo(t, one, slices.DeleteFunc(order, func(k string) bool { return k == "new" })...)
}

// TestWhatNeverGoesSaysNothingOfTheInflation: it was used last when that was low.
func TestWhatNeverGoesSaysNothingOfTheInflation(t *testing.T) {
	q := New[string]()
	q.Restore("pinned", 1<<20, Rank{Uses: 1, Priority: 2})
	q.Restore("unused", 1<<20, Rank{Uses: 1, Priority: 700})
	q.Restore("used", 1<<20, Rank{Uses: 2, Priority: 700})
	q.Restore("too late for a rank", 1<<20, Rank{})
	q.Hold("pinned")
	q.Resume()
	q.Use("used")
	if order := drain(q); !slices.Equal(order, []string{"unused", "too late for a rank", "used"}) {
		t.Error(order)
	}
}

// TestInvariants has a great many operations in random order.
func TestInvariants(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	q := New[int]()
	held, tags := make(map[int][]*Entry[int]), make(map[int]int)
	const n = 60
	for range 100_000 {
		k := r.IntN(n)
		switch r.IntN(11) {
		case 0, 1:
			q.Add(k, 1+r.Int64N(1<<24))
		case 2:
			q.Use(k)
		case 3:
			if k < n-10 { // digests cannot lead in a circle
				q.Lead(k, []int{k + 1 + r.IntN(9), k + 1 + r.IntN(9)})
			}
		case 4:
			q.Tag(k)
			tags[k]++
		case 5:
			if tags[k] > -1 {
				q.Untag(k)
				tags[k]--
			}
		case 6:
			if e := q.Hold(k); e != nil {
				held[k] = append(held[k], e)
			}
		case 7:
			if es := held[k]; len(es) > 0 {
				q.Release(es[0])
				held[k] = es[1:]
			}
		case 8:
			if v, ok := q.Take(); ok {
				if q.Hold(v) != nil {
					t.Fatal("one that goes is held")
				}
				if slices.ContainsFunc(held[v], func(e *Entry[int]) bool { return !e.gone }) {
					t.Fatal("a held one goes")
				}
				if r.IntN(2) == 0 {
					q.PutBack(v)
				}
				if r.IntN(2) == 0 { // or put back, used, or let lie
					q.Evict(v)
				}
			}
		case 9:
			q.Remove(k)
		case 10:
			held[k] = append(held[k], q.Await(k))
		}
		mustHold(t, q, tags)
	}
}

func mustHold(t *testing.T, q *Queue[int], tags map[int]int) {
	t.Helper()
	parents := make(map[int]int)
	for k, l := range q.links {
		if l.children != nil && q.entries[k] == nil {
			t.Fatal("what is gone leads somewhere")
		}
		if l.tags != tags[k] {
			t.Fatal("tags are miscounted")
		}
		if !l.lost {
			for _, c := range l.children {
				parents[c]++
			}
		}
		if l.lost && (l.tags > 0 || l.parents > 0) {
			t.Fatal("lost, and reached")
		}
		if q.entries[k] == nil && l.tags == 0 && l.parents == 0 {
			t.Fatal("a link that is nobody's")
		}
	}
	for k, l := range q.links {
		if l.parents != parents[k] {
			t.Fatalf("%d parents, not %d", l.parents, parents[k])
		}
	}
	leading := 0
	for _, l := range q.links {
		leading += len(l.children)
	}
	if leading != q.leading {
		t.Fatalf("%d children, not %d", leading, q.leading)
	}
	for k, e := range q.awaited {
		if e.held == 0 || q.entries[k] != nil {
			t.Fatalf("%+v is awaited", e)
		}
	}
	for _, e := range q.entries {
		if e.orphan != q.isLost(e.key) || (e.at < 0) != (e.held > 0 || e.going) {
			t.Fatalf("%+v", e)
		}
	}
	free := int64(0)
	for i, e := range q.order {
		free += e.size
		if int(e.at) != i || i > 0 && q.order.Less(i, (i-1)/2) {
			t.Fatal("no heap")
		}
	}
	if free != q.free {
		t.Fatalf("%d bytes are free, not %d", free, q.free)
	}
}

// BenchmarkDecision is one eviction and what comes in its place, among 100,000.
func BenchmarkDecision(b *testing.B) {
	q := New[int]()
	for k := range 100_000 {
		q.Add(k, int64(k)<<8)
	}
	k := 100_000
	for b.Loop() {
		v, _ := q.Take()
		q.Evict(v)
		q.Add(k, int64(k%1000)<<8)
		k++
	}
}
