// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"tarn/internal/registrytest"
)

var (
	documented = regexp.MustCompile("(?m)^\\| `(tarn_[a-z_]+)` \\| (counter|gauge|histogram) \\|([a-z, ]*)\\|")
	typeLine   = regexp.MustCompile(`(?m)^# TYPE (tarn_[a-z_]+) ([a-z]+)$`)
	sampleLine = regexp.MustCompile(`(?m)^(tarn_[a-z_]+)(?:\{(.*)\})? [^ ]+$`)
	labelName  = regexp.MustCompile(`([a-z]+)="`)
)

// exposed are the metrics in what a Prometheus reads: of each the type and the names
// of its labels, in order, as METRICS.md writes them.
func exposed(text string) map[string]string {
	types, all := make(map[string]string), make(map[string]string)
	for _, m := range typeLine.FindAllStringSubmatch(text, -1) {
		types[m[1]] = m[2]
	}
	for _, m := range sampleLine.FindAllStringSubmatch(text, -1) {
		name := m[1]
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if base := strings.TrimSuffix(name, suffix); types[base] == "histogram" {
				name = base
			}
		}
		var labels []string
		for _, l := range labelName.FindAllStringSubmatch(m[2], -1) {
			if l[1] != "le" {
				labels = append(labels, l[1])
			}
		}
		slices.Sort(labels)
		all[name] = types[name] + " " + strings.Join(labels, ", ")
	}
	return all
}

func TestMetricsAreThoseOfTheDocument(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/METRICS.md")
	if err != nil {
		t.Fatal(err)
	}
	want := make(map[string]string)
	for _, m := range documented.FindAllStringSubmatch(string(text), -1) {
		want[m[1]] = m[2] + " " + strings.TrimSpace(m[3])
	}
	if n := strings.Count(string(text), "\n| `tarn_"); n != len(want) {
		t.Fatalf("%d of %d rows are read", len(want), n)
	}
	r := registrytest.New(t)
	r.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Ratelimit-Limit", "100;w=21600")
		w.Header().Set("Ratelimit-Remaining", "76;w=21600")
		return false
	}
	img := r.Image("app", "v1", []byte("a layer"))
	metrics := freePort(t)
	p := runWith(t, t.TempDir(), tlsSettings(nodeFiles(t))+"metrics_listen: "+metrics+"\n"+upstreamsOf(r.URL))
	p.mustGet("/v2/app/manifests/v1?ns=lab.test", img.Body)
	p.until("the request is counted", func() bool { return strings.Contains(p.metrics(), `outcome="miss"`) })
	got := exposed(p.metrics())
	for _, name := range slices.Sorted(maps.Keys(got)) {
		if want[name] != got[name] {
			t.Errorf("%s is %s, and the document has %q", name, got[name], want[name])
		}
	}
	for name, is := range want {
		if got[name] == "" {
			t.Errorf("the document has %s, %s, and tarn does not", name, is)
		}
	}
	// The other listener has all of them, too, without the name.
	resp, err := http.Get("http://" + metrics + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	nameless := exposed(readAll(t, resp.Body))
	for name, is := range got {
		if labels := strings.NewReplacer(", upstream", "", "upstream", "").Replace(is); nameless[name] != labels {
			t.Errorf("without names %s is %q, and not %q", name, nameless[name], labels)
		}
	}
	p.terminate()
}

// TestTheDocumentHasEachKindOutcomeAndCause that tarn's own code writes.
func TestTheDocumentHasEachKindOutcomeAndCause(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/METRICS.md")
	if err != nil {
		t.Fatal(err)
	}
	for file, pattern := range map[string]string{
		"../../proxy/metrics.go":     `(?s)(?:kindNames|outcomeNames) = \[[a-zA-Z]+\]string\{(.*?)\}`,
		"../../proxy/waits.go":       `(?s)stepNames = \[[a-zA-Z]+\]string\{(.*?)\}`,
		"../../upstream/exchange.go": `(?s)const \((.*?)\)`,
	} {
		code, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, list := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(code), -1) {
			for _, word := range regexp.MustCompile(`"([a-z-]+)"`).FindAllStringSubmatch(list[1], -1) {
				n++
				if !strings.Contains(string(text), fmt.Sprintf("`%s`", word[1])) {
					t.Errorf("%s has %s, and the document does not", file, word[1])
				}
			}
		}
		if n < 4 {
			t.Errorf("%s: %d words are read", file, n)
		}
	}
}

func readAll(t testing.TB, r io.Reader) string {
	t.Helper()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
