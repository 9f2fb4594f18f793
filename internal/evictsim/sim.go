// SPDX-License-Identifier: Apache-2.0

package evictsim

import (
	"container/heap"
	"math"
)

// A Result is what was asked for, and what of it was there.
type Result struct {
	Requests, Hits  int
	Bytes, BytesHit int64
}

// ByteHitRatio is the share of all bytes that came from the cache.
func (r Result) ByteHitRatio() float64 { return float64(r.BytesHit) / float64(r.Bytes) }

// HitRatio is the share of all requests that were saved.
func (r Result) HitRatio() float64 { return float64(r.Hits) / float64(r.Requests) }

// Run plays a trace to a policy with so many bytes of room.
func Run(t *Trace, p Policy, room int64) (r Result) {
	stored := make(map[int]bool)
	tags := make(map[int]int)
	guided, _ := p.(guide)
	var used int64
	for _, e := range t.Events {
		if e.Tag > 0 {
			if old, known := tags[e.Tag]; guided != nil && (!known || old != e.Object) {
				if known {
					guided.Untag(old)
				}
				guided.Tag(e.Object)
			}
			tags[e.Tag] = e.Object
			continue
		}
		o := t.Objects[e.Object]
		r.Requests++
		r.Bytes += o.Size
		if stored[e.Object] {
			r.Hits++
			r.BytesHit += o.Size
			p.Use(e.Object)
			continue
		}
		if o.Size > room {
			continue
		}
		for used+o.Size > room {
			k, ok := p.Victim()
			if !ok {
				break
			}
			p.Evict(k)
			delete(stored, k)
			used -= t.Objects[k].Size
		}
		stored[e.Object] = true
		used += o.Size
		p.Add(e.Object, o.Size)
		if guided != nil {
			guided.Lead(e.Object, o.Children)
		}
	}
	return r
}

// belady returns an upper bound on the bytes that any policy can have saved:
// Belady's MIN, which knows what is asked for next, on single bytes, as if a
// part of an object could be kept. The requests that it saves are those whose
// object is there whole, and no bound.
func belady(t *Trace, room int64) (r Result) {
	next := make([]int, len(t.Events))
	last := make(map[int]int)
	for i := len(t.Events) - 1; i >= 0; i-- {
		e := t.Events[i]
		if e.Tag > 0 {
			continue
		}
		next[i] = math.MaxInt
		if at, ok := last[e.Object]; ok {
			next[i] = at
		}
		last[e.Object] = i
	}
	there := make(map[int]*weighed)
	var order lightest // by how soon it is asked for again
	var used int64
	for i, e := range t.Events {
		if e.Tag > 0 {
			continue
		}
		size := t.Objects[e.Object].Size
		r.Requests++
		r.Bytes += size
		k := there[e.Object]
		if k != nil {
			r.BytesHit += k.size
			if k.size == size {
				r.Hits++
			}
			heap.Remove(&order, k.at)
			used -= k.size
		}
		delete(there, e.Object)
		if next[i] == math.MaxInt {
			continue
		}
		k = &weighed{k: e.Object, size: size, weight: -float64(next[i])}
		there[e.Object] = k
		heap.Push(&order, k)
		for used += size; used > room; {
			f := order[0]
			off := min(f.size, used-room)
			used -= off
			if f.size -= off; f.size == 0 {
				heap.Pop(&order)
				delete(there, f.k)
			}
		}
	}
	return r
}

// weighed is an object in a heap.
type weighed struct {
	k      int
	size   int64 // of which there is this much
	uses   float64
	weight float64
	at     int
}

// lightest is a heap.
type lightest []*weighed

func (o lightest) Len() int           { return len(o) }
func (o lightest) Less(i, j int) bool { return o[i].weight < o[j].weight }
func (o lightest) Swap(i, j int) {
	o[i], o[j] = o[j], o[i]
	o[i].at, o[j].at = i, j
}
func (o *lightest) Push(x any) {
	w := x.(*weighed)
	w.at = len(*o)
	*o = append(*o, w)
}
func (o *lightest) Pop() any {
	last := len(*o) - 1
	w := (*o)[last]
	*o = (*o)[:last]
	return w
}
