// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"
)

// terminalWidth is how many columns a terminal has, 0 where it is none or does not know.
func terminalWidth(f *os.File) int {
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return width
}

// newBars are for a terminal, nil where it is none, or says that it has no columns, as
// some do that nobody has told.
func newBars(f *os.File) *mpb.Progress {
	if terminalWidth(f) == 0 {
		return nil
	}
	return mpb.New(mpb.WithOutput(f))
}

// newBar is a bar of so many bytes, of which the first had are there when it begins: its
// speed is that of the others.
func newBar(bars *mpb.Progress, name string, total, had int64, options ...mpb.BarOption) *mpb.Bar {
	begun := time.Now()
	speed := func(s decor.Statistics) string {
		seconds := time.Since(begun).Seconds()
		if seconds < 0.1 || s.Current <= had { // too early to say
			return ""
		}
		return size(int64(float64(s.Current-had)/seconds)) + "/s"
	}
	counts := func(s decor.Statistics) string { return size(s.Current) + "/" + size(s.Total) }
	bar := bars.New(total, mpb.BarStyle(), append(options,
		mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR)),
		mpb.AppendDecorators(decor.Any(counts, decor.WCSyncSpace), decor.Any(speed, decor.WC{W: len("1023.9MiB/s") + 1})),
	)...)
	bar.SetCurrent(had)
	return bar
}
