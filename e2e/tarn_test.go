// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// startTarn runs the built tarn on this directory, with these lines in its
// configuration, and returns when it serves. A wrapper, such as a tracer with
// its options, goes in front of its command line.
func startTarn(t *testing.T, dir, settings string, wrapper ...string) *process {
	t.Helper()
	// The machine's disk may be nearly full; what is left is enough for this.
	config := filepath.Join(t.TempDir(), "tarn.yaml")
	if !strings.Contains(settings, "min_free:") {
		settings += "min_free: 0\n"
	}
	if err := os.WriteFile(config, []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	line := append(wrapper, filepath.Join(work(), "tarn"), "serve",
		"--config", config,
		"--dir", dir,
		"--listen", tarnAddr,
		"--admin-listen", tarnAdminAddr,
		"--upstream", upstreamName+"=http://"+forTarnAddr,
	)
	p := start(t, "tarn", line[0], line[1:]...)
	waitFor(t, "tarn serves", func() error {
		if err := p.alive(); err != nil {
			t.Fatalf("%v; its log:\n%s", err, p.tail(t))
		}
		resp, err := http.Get("http://" + tarnAddr + "/v2/")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if strings.Contains(settings, "tls:") && resp.StatusCode == http.StatusBadRequest { // for plain http
			return nil
		}
		if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusUnauthorized { // with a token broker
			return fmt.Errorf("GET /v2/ answers %s", resp.Status)
		}
		return nil
	})
	return p
}
