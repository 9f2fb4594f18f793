// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"tarn/internal/registrytest"
)

// metrics are those of the admin listener.
func (p *process) metrics() string {
	p.t.Helper()
	resp, err := http.Get(p.admin + "/metrics")
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		p.t.Fatal(resp.Status, err)
	}
	return string(text)
}

func TestAReloadCountsOnAndChangesWhatIsLogged(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	blob := []byte("a blob")
	path := "/v2/app/blobs/" + r.Blob("app", blob).String() + "?ns=lab.test"
	p := runWith(t, t.TempDir(), "access_log: errors\n"+upstreamsOf(r.URL))
	p.mustGet(path, blob)
	one := `tarn_requests_total{kind="blob",outcome="miss",upstream="lab.test"} 1`
	p.until("the miss is counted", func() bool { return strings.Contains(p.metrics(), one) })
	if n := len(logged(t, p, "request")); n != 0 {
		t.Errorf("%d lines, where only errors are logged", n)
	}
	p.mustReload("access_log: all\nlog_level: warn\n"+upstreamsOf(r.URL), "reloaded\n")
	p.mustGet(path, blob)
	p.until("the hit is counted beside it", func() bool {
		return strings.Contains(p.metrics(), one) && strings.Contains(p.metrics(), `tarn_requests_total{kind="blob",outcome="hit",upstream="lab.test"} 1`)
	})
	if n := len(logged(t, p, "request")); n != 0 {
		t.Errorf("%d lines of info, where warn is the least", n)
	}
	p.mustReload("access_log: all\n"+upstreamsOf(r.URL), "reloaded\n")
	p.mustGet(path, blob)
	p.until("it is logged", func() bool { return len(logged(t, p, "request")) == 1 })
	p.terminate()
}
