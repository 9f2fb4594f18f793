// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"encoding/xml"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const conformanceAddr = "127.0.0.1:5010"

// TestTheConformanceSuitePassesAsThroughTheRegistryAlone runs the suite of the OCI
// distribution-spec: what writes goes to the registry, what reads through tarn.
// Each of its tests passes as often as it does with the registry alone, or more
// often: tarn names a blob by the digest that it was asked for.
func TestTheConformanceSuitePassesAsThroughTheRegistryAlone(t *testing.T) {
	newRegistry(t, nil)
	startTarn(t, folder(t, work(), "data"), "default_upstream: "+upstreamName+"\n")
	to := func(addr string) http.Handler {
		u := &url.URL{Scheme: "http", Host: addr}
		return &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { // the Host stays, so that links lead back here
			r.SetURL(u)
			r.Out.Host = r.In.Host
		}}
	}
	registry, tarn := to(pushAddr), to(tarnAddr)
	serve(t, conformanceAddr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead || strings.Contains(r.URL.Path, "/blobs/uploads/") {
			registry.ServeHTTP(w, r)
			return
		}
		tarn.ServeHTTP(w, r)
	}))
	alone, through := conformance(t, "alone", pushAddr), conformance(t, "through", conformanceAddr)
	passed := 0
	for name, results := range alone {
		if a, b := passes(results), passes(through[name]); b < a {
			t.Errorf("%s: %s with the registry alone, %s through tarn", name, results, through[name])
		} else if a > 0 {
			passed++
		}
	}
	if t.Logf("%d tests, %d of them passed", len(alone), passed); passed < 20 {
		t.Error("the suite did not run")
	}
}

func passes(results string) int { return strings.Count(results, "passed") }

// conformance returns how each test of the suite ended.
func conformance(t *testing.T, name, addr string) map[string]string {
	t.Helper()
	dir := folder(t, work(), "conformance-"+name)
	env := []string{
		"OCI_REGISTRY=" + addr, "OCI_TLS=disabled", "OCI_REPO1=" + name + "/one", "OCI_REPO2=" + name + "/two",
		"OCI_RESULTS_DIR=" + dir, "OCI_VERSION=1.1",
	}
	if err := command(t, env, "conformance"); err != nil {
		t.Logf("%s: %.300v", name, err) // the registry itself does not pass all
	}
	raw, err := os.ReadFile(filepath.Join(dir, "junit.xml"))
	if err != nil {
		t.Fatal(err)
	}
	var report struct {
		Cases []struct {
			Name   string `xml:"name,attr"`
			Status string `xml:"status,attr"`
		} `xml:"testsuite>testcase"`
	}
	if err := xml.Unmarshal(raw, &report); err != nil {
		t.Fatal(err)
	}
	results := make(map[string]string)
	for _, c := range report.Cases {
		key := strings.ReplaceAll(c.Name, name+"/", "")
		results[key] = strings.TrimSpace(results[key] + " " + c.Status)
	}
	return results
}
