// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
)

// processReport is what a bug report has of the daemon's process: the document of
// /api/v1/process.
type processReport struct {
	Version string `json:"version"`
	Commit  string `json:"commit"`
	Go      string `json:"go"`
	PID     int    `json:"pid"`
	// Config is the path of the configuration file; "" for none.
	Config      string   `json:"config"`
	Arguments   []string `json:"arguments"`   // without secrets
	Environment []string `json:"environment"` // of what bears upon tarn, NAME=value, without secrets
	// Goroutines are all that run, as runtime/pprof writes them: by their stacks, with
	// how many have each.
	Goroutines string `json:"goroutines"`
}

// maxGoroutines bounds the text: stacks are few, however many goroutines have them.
const maxGoroutines = 4 << 20

func newProcessReport(config string) processReport {
	if abs, err := filepath.Abs(config); err == nil && config != "" {
		config = abs
	}
	r := processReport{
		Version: version, Commit: commit, Go: runtime.Version(), PID: os.Getpid(), Config: config,
		Arguments: []string{}, Environment: reportedEnvironment(os.Environ()),
	}
	for _, a := range os.Args {
		r.Arguments = append(r.Arguments, valueWithoutSecrets(a))
	}
	var text cappedBuffer
	// The other forms have arguments, or labels, of which nobody knows what they are.
	if err := pprof.Lookup("goroutine").WriteTo(&text, 1); err != nil && !errors.Is(err, errFull) {
		r.Goroutines = err.Error()
		return r
	}
	r.Goroutines = text.String()
	return r
}

// cappedBuffer takes no more than maxGoroutines bytes.
type cappedBuffer struct{ bytes.Buffer }

var errFull = errors.New("the rest is left out")

func (b *cappedBuffer) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxGoroutines {
		return 0, errFull
	}
	return b.Buffer.Write(p)
}
