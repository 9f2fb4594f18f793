// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
)

// envSpeed has cold pulls measured that often.
const envSpeed = "TARN_E2E_SPEED"

// TestColdPullsBesideDirectOnes says what a cold pull costs in proportion to one
// without tarn: containerd, tarn and the registry on one machine, 500 MB in ten layers,
// in turns.
func TestColdPullsBesideDirectOnes(t *testing.T) {
	rounds, err := strconv.Atoi(os.Getenv(envSpeed))
	if err != nil {
		t.Skip("set " + envSpeed + " to a number of rounds: a figure of one machine")
	}
	n := newNode(t)
	var layers []file
	for i := range 10 {
		layers = append(layers, noise(fmt.Sprint("layer", i), 50_000_000, byte(i+1)))
	}
	i := pushSaying(t, "speed", "v1", "fast", layers...)
	c := n.ctr("default")
	emptied := func() {
		n.tarn.stop(t)
		entries, err := filepath.Glob(filepath.Join(n.tarnDir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if err := os.RemoveAll(e); err != nil {
				t.Fatal(err)
			}
		}
		n.tarn = startTarn(t, n.tarnDir, "")
	}
	fetch := func() error {
		_, err := c.command(t.Context(), "content", "fetch", "--skip-metadata", "--hosts-dir", c.hosts, i.ref())
		return err
	}
	for _, way := range []struct {
		name string
		get  func() error
	}{
		{"content fetch", fetch},
		{"images pull", func() error { return c.pull(t.Context(), i.ref()) }},
	} {
		took := make(map[string][]time.Duration)
		for round := range rounds {
			for turn := range 2 {
				through := []string{"tarn", "direct"}[(round+turn)%2]
				if through == "tarn" {
					emptied()
					c.mirror(t, tarnAddr)
				} else {
					c.direct(t)
				}
				n.registry.take()
				begun := time.Now()
				if err := way.get(); err != nil {
					t.Fatal(err)
				}
				took[through] = append(took[through], time.Since(begun))
				if len(n.registry.take()) == 0 {
					t.Fatal("nobody asked the registry: it was not cold")
				}
				c.forget(t, i.ref())
			}
		}
		median := func(through string) time.Duration {
			slices.Sort(took[through])
			return took[through][len(took[through])/2]
		}
		cold, direct := median("tarn"), median("direct")
		t.Logf("%s: %v cold through tarn, %v direct: %.2f", way.name, cold.Round(time.Millisecond), direct.Round(time.Millisecond), cold.Seconds()/direct.Seconds())
	}
}
