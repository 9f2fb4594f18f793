// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"tarn/internal/registrytest"
)

// logged are the lines of a tarn's log with that message.
func logged(t testing.TB, p *process, message string) (all []map[string]any) {
	t.Helper()
	text := p.output.String()
	text = text[:strings.LastIndexByte(text, '\n')+1] // the last line may still be on its way
	lines := bufio.NewScanner(strings.NewReader(text))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line map[string]any
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("no JSON in the log: %s", lines.Text())
		}
		if strings.HasPrefix(line["msg"].(string), message) {
			all = append(all, line)
		}
	}
	return all
}

// TestTheLogSaysWhatIsServedAndWarnsOfWhatIsNot.
func TestTheLogSaysWhatIsServedAndWarnsOfWhatIsNot(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	d := r.Blob("app", []byte("a blob"))
	dir := t.TempDir()
	p := run(t, dir, "--upstream", "lab.test="+r.URL)
	p.mustGet("/v2/app/blobs/"+d.String()+"?ns=lab.test", []byte("a blob"))
	r.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	}
	resp, err := http.Get(p.url + "/v2/app/manifests/v1?ns=lab.test")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	p.until("the last request is in the log", func() bool { return strings.Contains(p.output.String(), `"status":502`) })
	serving := logged(t, p, "serving")
	if len(serving) != 1 {
		t.Fatalf("the log says %d times that tarn serves", len(serving))
	}
	for key, want := range map[string]string{
		"listen": strings.TrimPrefix(p.url, "http://"), "admin_listen": strings.TrimPrefix(p.admin, "http://"),
		"dir": dir, "admin_socket": "unix:" + socketIn(t, dir), "config": "tarn.yaml",
	} {
		if got, _ := serving[0][key].(string); got != want && filepath.Base(got) != want {
			t.Errorf("it says that %s is %q, and not %q", key, got, want)
		}
	}
	for _, line := range logged(t, p, "request") {
		if _, ok := line["took"].(float64); !ok {
			t.Errorf("a duration is no number: %v", line["took"])
		}
		want := "info"
		if line["status"].(float64) >= 500 {
			want = "warn"
		}
		if line["level"] != want {
			t.Errorf("a %v is on the level of %s", line["status"], line["level"])
		}
	}
}
