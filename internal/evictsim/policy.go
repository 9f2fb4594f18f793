// SPDX-License-Identifier: Apache-2.0

package evictsim

import (
	"container/heap"
	"container/list"

	"tarn/internal/evict"
)

// A Policy decides what goes.
type Policy interface {
	Add(k int, size int64) // it was fetched for a request
	Use(k int)             // it was asked for, and there
	Victim() (k int, ok bool)
	Evict(k int)
}

// lru evicts what was not asked for the longest.
type lru struct {
	order list.List // the latest first
	at    map[int]*list.Element
}

// NewLRU returns least recently used.
func NewLRU(int64) Policy { return &lru{at: make(map[int]*list.Element)} }

func (p *lru) Add(k int, _ int64) { p.at[k] = p.order.PushFront(k) }
func (p *lru) Use(k int)          { p.order.MoveToFront(p.at[k]) }
func (p *lru) Evict(k int)        { p.order.Remove(p.at[k]); delete(p.at, k) }
func (p *lru) Victim() (int, bool) {
	if e := p.order.Back(); e != nil {
		return e.Value.(int), true
	}
	return 0, false
}

// sieve (Zhang 2024) walks from the oldest to the newest, past what was asked
// for since it came by.
type sieve struct {
	lru
	visited map[int]bool
	hand    *list.Element
}

// newSIEVE returns SIEVE.
func newSIEVE(int64) Policy {
	return &sieve{lru: lru{at: make(map[int]*list.Element)}, visited: make(map[int]bool)}
}

func (p *sieve) Use(k int) { p.visited[k] = true }

func (p *sieve) Victim() (int, bool) {
	for p.order.Len() > 0 {
		if p.hand == nil {
			p.hand = p.order.Back()
		}
		k := p.hand.Value.(int)
		if !p.visited[k] {
			return k, true
		}
		delete(p.visited, k)
		p.hand = p.hand.Prev()
	}
	return 0, false
}

func (p *sieve) Evict(k int) {
	if p.hand == p.at[k] {
		p.hand = p.hand.Prev()
	}
	delete(p.visited, k)
	p.lru.Evict(k)
}

// s3fifo (Yang 2023) has what is new pass a tenth of the room first, and lets
// only that into the rest which is asked for again.
type s3fifo struct {
	small, main list.List // the oldest last
	in          map[int]*s3entry
	ghosts      map[int]bool
	forgotten   []int
	smallBytes  int64
	smallMost   int64
}

type s3entry struct {
	k       int
	size    int64
	uses    int
	inSmall bool
	at      *list.Element
}

// newS3FIFO returns S3-FIFO for a cache of so many bytes.
func newS3FIFO(room int64) Policy {
	return &s3fifo{in: make(map[int]*s3entry), ghosts: make(map[int]bool), smallMost: room / 10}
}

func (p *s3fifo) Add(k int, size int64) {
	e := &s3entry{k: k, size: size}
	p.in[k] = e
	if p.ghosts[k] {
		delete(p.ghosts, k)
		e.at = p.main.PushFront(e)
		return
	}
	e.inSmall, e.at = true, p.small.PushFront(e)
	p.smallBytes += size
}

func (p *s3fifo) Use(k int) { p.in[k].uses = min(3, p.in[k].uses+1) }

func (p *s3fifo) Victim() (int, bool) {
	for {
		small, main := p.small.Back(), p.main.Back()
		switch {
		case small != nil && (p.smallBytes > p.smallMost || main == nil):
			e := small.Value.(*s3entry)
			if e.uses == 0 {
				return e.k, true
			}
			p.small.Remove(small)
			p.smallBytes -= e.size
			e.inSmall, e.uses, e.at = false, 0, p.main.PushFront(e)
		case main != nil:
			e := main.Value.(*s3entry)
			if e.uses == 0 {
				return e.k, true
			}
			e.uses--
			p.main.MoveToFront(main)
		default:
			return 0, false
		}
	}
}

func (p *s3fifo) Evict(k int) {
	e := p.in[k]
	delete(p.in, k)
	if !e.inSmall {
		p.main.Remove(e.at)
		return
	}
	p.small.Remove(e.at)
	p.smallBytes -= e.size
	p.ghosts[k] = true
	p.forgotten = append(p.forgotten, k)
	for len(p.forgotten) > max(1024, len(p.in)) {
		delete(p.ghosts, p.forgotten[0])
		p.forgotten = p.forgotten[1:]
	}
}

// gdsf (Cherkasova 1998) weighs how often by what a miss costs for each byte.
type gdsf struct {
	cost      func(size int64) float64
	in        map[int]*weighed
	order     lightest
	inflation float64
}

// newGDSF returns GDSF with a cost of 1 for each request.
func newGDSF(int64) Policy { return gdsfOf(func(int64) float64 { return 1 }) }

// newLFUDA returns LFU with dynamic aging: GDSF with the bytes as the cost.
func newLFUDA(int64) Policy { return gdsfOf(func(size int64) float64 { return float64(size) }) }

// newGDSFBytes returns GDSF with bytes and a MiB for the request as the cost,
// and nothing else of what tarn does.
func newGDSFBytes(int64) Policy {
	return gdsfOf(func(size int64) float64 { return float64(size) + 1<<20 })
}

func gdsfOf(cost func(int64) float64) Policy {
	return &gdsf{cost: cost, in: make(map[int]*weighed)}
}

func (p *gdsf) Add(k int, size int64) {
	e := &weighed{k: k, size: size}
	p.in[k] = e
	heap.Push(&p.order, e)
	p.Use(k)
}

func (p *gdsf) Use(k int) {
	e := p.in[k]
	e.uses++
	e.weight = p.inflation + e.uses*p.cost(e.size)/float64(e.size)
	heap.Fix(&p.order, e.at)
}

func (p *gdsf) Victim() (int, bool) {
	if len(p.order) == 0 {
		return 0, false
	}
	return p.order[0].k, true
}

func (p *gdsf) Evict(k int) {
	e := p.in[k]
	p.inflation = e.weight
	heap.Remove(&p.order, e.at)
	delete(p.in, k)
}

// NewTarn returns what tarn does.
func NewTarn(int64) Policy { return tarn{evict.New[int]()} }

type tarn struct{ *evict.Queue[int] }

func (t tarn) Victim() (int, bool) { return t.Take() }
func (t tarn) Evict(k int)         { t.Queue.Evict(k) }

// guide is a Policy that wants to know what leads to what.
type guide interface {
	Lead(k int, children []int)
	Tag(k int)
	Untag(k int)
}
