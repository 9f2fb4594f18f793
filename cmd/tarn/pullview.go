// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"tarn/admin"
	"tarn/proxy"

	"github.com/vbauerster/mpb/v8"
)

// pullView shows a pull. In a terminal, each object that is on its way has a bar, and the
// image one for all of them, until it is there; lines that stay say what came of each
// image. In a pipe there is a line for each object, too.
type pullView struct {
	out, words io.Writer
	width      int // of the terminal; 0: it is none
	failed     error

	image    string // whose lines these are
	planned  bool
	seen     map[string]bool // objects of which it was said that they are here
	bars     *mpb.Progress   // nil: there are none now
	bar      map[string]*mpb.Bar
	total    *mpb.Bar
	had      int64 // of the image, before
	progress map[string]int64
}

// line takes a line of the daemon's answer.
func (v *pullView) line(l admin.PullLine) {
	if l.Image != v.image {
		v.end()
		v.image, v.planned, v.seen, v.progress = l.Image, false, make(map[string]bool), make(map[string]int64)
	}
	switch {
	case l.Planned != nil:
		v.plan(*l.Planned)
	case l.Object != nil:
		v.object(*l.Object)
	case l.Pulled != nil || l.Failure != nil:
		v.end()
		v.came(l)
	}
}

// plan says what there is to fetch.
func (v *pullView) plan(p proxy.Pulled) {
	v.planned = true
	left := p.TotalBytes - p.HereBytes - p.FetchedBytes
	if left <= 0 {
		return // and what came of it says so
	}
	v.say("%s: %.19s, %s to fetch, %s are here", v.name(v.image), p.Digest, size(left), size(p.HereBytes))
	if v.width == 0 {
		return
	}
	v.bars = newBars(os.Stderr)
	if v.bars == nil { // it has just gone
		return
	}
	v.bar = make(map[string]*mpb.Bar)
	v.had = p.TotalBytes - left
	v.total = newBar(v.bars, "total", p.TotalBytes, v.had, mpb.BarPriority(maxPullImages), mpb.BarRemoveOnComplete())
}

// object shows how an object does.
func (v *pullView) object(o proxy.PulledObject) {
	name := string(o.Digest)
	v.progress[name] = o.Bytes
	if v.width == 0 {
		if o.Stored && !v.seen[name] {
			v.seen[name] = true
			how := "fetched"
			switch {
			case o.HereBytes >= o.Size:
				how = "is here"
			case o.HereBytes > 0:
				how = fmt.Sprintf("fetched, all but %s", size(o.HereBytes))
			}
			v.say("%s: %s %.19s, %s: %s", v.name(v.image), o.Kind, o.Digest, size(o.Size), how)
		}
		return
	}
	if v.bars == nil {
		return
	}
	var sum int64
	for _, n := range v.progress {
		sum += n
	}
	v.total.SetCurrent(sum)
	bar := v.bar[name]
	switch {
	case bar == nil && !o.Stored && o.Bytes > 0 && o.Bytes < o.Size || bar == nil && o.Stored && o.HereBytes < o.Size:
		short := strings.TrimPrefix(name, "sha256:")
		bar = newBar(v.bars, fmt.Sprintf("%s %.12s", o.Kind, short), o.Size, o.HereBytes, mpb.BarRemoveOnComplete())
		v.bar[name] = bar
	case bar == nil:
		return
	}
	if bar.SetCurrent(o.Bytes); o.Stored {
		bar.SetTotal(o.Size, true)
	}
}

// came says what came of an image.
func (v *pullView) came(l admin.PullLine) {
	pinned := ""
	if l.Pinned {
		pinned = ", pinned"
	}
	if f := l.Failure; f != nil {
		cost := ""
		if l.Pulled != nil && l.Pulled.FetchedBytes > 0 {
			cost = fmt.Sprintf(" (%s came, and stay%s)", size(l.Pulled.FetchedBytes), pinned)
		}
		fmt.Fprintf(v.words, "tarn: %s: %s%s\n  to do: %s\n", printable(l.Image), printable(f.Message), cost, printable(f.Next))
		return
	}
	p := l.Pulled
	if p.FetchedBytes == 0 {
		v.say("%s: %.19s, all of it is here: %s%s", v.name(l.Image), p.Digest, size(p.HereBytes), pinned)
		return
	}
	v.say("%s: %.19s%s, %s came, %s were here", v.name(l.Image), p.Digest, pinned, size(p.FetchedBytes), size(p.HereBytes))
}

// summary says in a line what several images cost.
func (v *pullView) summary(s admin.PullSummary) {
	if s.Images > 1 {
		v.say("%d of %d images are here: %s came from registries, %s were here", s.Images-s.Failed, s.Images, size(s.FetchedBytes), size(s.HereBytes))
	}
}

func (v *pullView) interrupted() {
	var sum int64
	for _, n := range v.progress {
		sum += n
	}
	fmt.Fprintf(v.words, "tarn: interrupted: of %s there are %s here, and the same command goes on with the rest\n", printable(v.image), size(sum))
}

// name is an image's name, so short that what is said of it fits beside it.
func (v *pullView) name(image string) string {
	const said = len(": sha256:0123456789ab, pinned, 1023MiB came, 1023MiB were here")
	return cutMiddle(printable(image), v.width, max(v.width-said, v.width/2))
}

// say prints a line that stays. That it cannot be printed is an error in the end.
func (v *pullView) say(format string, args ...any) {
	if _, err := fmt.Fprintf(v.out, format+"\n", args...); err != nil {
		v.failed = err
	}
}

// end takes the bars away.
func (v *pullView) end() {
	if v.bars == nil {
		return
	}
	for _, bar := range v.bar {
		bar.Abort(true)
	}
	v.total.Abort(true)
	v.bars.Wait()
	v.bars, v.bar, v.total = nil, nil, nil
}
