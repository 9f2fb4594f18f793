// SPDX-License-Identifier: Apache-2.0

// Package evictsim compares eviction policies on traces of image pulls.
//
// Everything is made from a seed, so that a table is the same each time.
package evictsim

import (
	"math"
	"math/rand/v2"
	"slices"
)

// An Object is a manifest, a config or a layer.
type Object struct {
	Size     int64
	Children []int // of a manifest
}

// An Event is a request for an object, or the news that a tag means it.
type Event struct {
	Object int
	Tag    int // 0: a request
}

// A Trace is what one node asks for, in order.
type Trace struct {
	Name    string
	Objects []Object
	Events  []Event
}

// WorkingSet is the size in bytes of all objects that are asked for.
func (t *Trace) WorkingSet() (n int64) {
	asked := make([]bool, len(t.Objects))
	for _, e := range t.Events {
		if e.Tag == 0 && !asked[e.Object] {
			asked[e.Object] = true
			n += t.Objects[e.Object].Size
		}
	}
	return n
}

// image is what a tag may mean.
type image struct {
	index  int // the manifest that the tag names
	others []int
}

// author makes images. Sizes are divided by scale.
type author struct {
	*Trace
	rand  *rand.Rand
	scale float64
}

func newAuthor(name string, scale float64) *author {
	return &author{&Trace{Name: name}, rand.New(rand.NewPCG(1, 2)), scale}
}

func (a *author) object(size float64, children ...int) int {
	a.Objects = append(a.Objects, Object{int64(max(32, size/a.scale)), children})
	return len(a.Objects) - 1
}

// base is one to three large layers, of 3 to 80 MB: a distribution and a runtime.
func (a *author) base() (layers []int) {
	for range 1 + a.rand.IntN(3) {
		layers = append(layers, a.object(3e6*math.Pow(80./3, a.rand.Float64())))
	}
	return layers
}

// layer is one of an application: half are below 1.5 MB, and some are huge.
func (a *author) layer() int {
	return a.object(min(600e6, 1.5e6*math.Exp(2*a.rand.NormFloat64())))
}

func (a *author) build(layers []int) image {
	config := a.object(6000)
	manifest := a.object(2000, append([]int{config}, layers...)...)
	return image{a.object(1500, manifest), append([]int{manifest, config}, layers...)}
}

// app is an application on a base, and the layers of its own.
func (a *author) app(base []int) (own []int, i image) {
	for range 2 + a.rand.IntN(6) {
		own = append(own, a.layer())
	}
	return own, a.build(slices.Concat(base, own))
}

func (a *author) pull(tag int, i image) {
	if tag > 0 {
		a.Events = append(a.Events, Event{i.index, tag})
	}
	a.Events = append(a.Events, Event{Object: i.index})
	for _, o := range i.others {
		a.Events = append(a.Events, Event{Object: o})
	}
}

// zipf draws ranks from 0 to n-1, rank r with a weight of 1/(r+1)^s.
func zipf(r *rand.Rand, s float64, n int) func() int {
	sums := make([]float64, n)
	sum := 0.
	for i := range sums {
		sum += math.Pow(float64(i+1), -s)
		sums[i] = sum
	}
	return func() int {
		i, _ := slices.BinarySearch(sums, r.Float64()*sum)
		return min(i, n-1)
	}
}

const (
	bases = 20
	apps  = 300
	// popularity is Zipf's exponent for images, and for what they are built on.
	popularity = 1.0
)

func (a *author) catalogue() (onBase [][]int, images []image, owns [][]int) {
	all := make([][]int, bases)
	for i := range all {
		all[i] = a.base()
	}
	pick := zipf(a.rand, popularity, bases)
	for range apps {
		base := all[pick()]
		own, i := a.app(base)
		onBase, owns, images = append(onBase, base), append(owns, own), append(images, i)
	}
	return onBase, images, owns
}

// Zipf is pulls of 300 images on 20 bases, some far more popular than others.
func Zipf(pulls int, scale float64) *Trace {
	a := newAuthor("popular images", scale)
	_, images, _ := a.catalogue()
	next := zipf(a.rand, popularity, apps)
	for range pulls {
		i := next()
		a.pull(i+1, images[i])
	}
	return a.Trace
}

// scan is the same, and in the middle of it a job pulls a thousand images once,
// on the same bases.
func scan(pulls int, scale float64) *Trace {
	const scanned, every = 1000, 3
	a := newAuthor("a scan in between", scale)
	onBase, images, _ := a.catalogue()
	next, base := zipf(a.rand, popularity, apps), zipf(a.rand, popularity, apps)
	for n := range pulls {
		i := next()
		a.pull(i+1, images[i])
		if m := n - pulls/3; m >= 0 && m < scanned*every && m%every == 0 {
			_, once := a.app(onBase[base()])
			a.pull(0, once)
		}
	}
	return a.Trace
}

// moving is the same, but every night some tags move: to a build with other
// layers at its end, and now and then on another version of the base.
func moving(pulls int, scale float64) *Trace {
	const aDay, moved, rebased = 300, 0.15, 0.1
	a := newAuthor("tags that move", scale)
	onBase, images, owns := a.catalogue()
	next := zipf(a.rand, popularity, apps)
	for n := range pulls {
		if n%aDay == aDay-1 {
			renewed := make(map[int][]int) // by the base's first layer
			for i := range images {
				if a.rand.Float64() >= moved {
					continue
				}
				if a.rand.Float64() < rebased {
					old := onBase[i]
					if renewed[old[0]] == nil {
						renewed[old[0]] = a.base()
					}
					onBase[i] = renewed[old[0]]
				}
				own := slices.Clone(owns[i])
				for j := range min(1+a.rand.IntN(3), len(own)) {
					own[len(own)-1-j] = a.layer()
				}
				owns[i], images[i] = own, a.build(slices.Concat(onBase[i], own))
			}
		}
		i := next()
		a.pull(i+1, images[i])
	}
	return a.Trace
}
