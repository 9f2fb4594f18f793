// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"tarn/internal/registrytest"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
)

// described is the API as its own document has it, closed: in the test nothing may be
// answered that is not described, though v1 may have more for everybody else.
func described(t *testing.T, p *process) *openapi3.T {
	t.Helper()
	resp, err := p.overSocket().Get("http://tarn/api/v1/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := openapi3.NewLoader().LoadFromData(bytes.ReplaceAll(text, []byte("      type: object\n"), []byte("      type: object\n      additionalProperties: false\n")))
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return doc
}

// document is an answer, or a line of one, as its schema is held to it.
func document(t *testing.T, doc *openapi3.T, template string, req *http.Request, status int, header http.Header, body []byte) {
	t.Helper()
	item := doc.Paths.Value(template)
	if item == nil {
		t.Errorf("%s is not described", template)
		return
	}
	route := &routers.Route{Spec: doc, Path: template, PathItem: item, Method: req.Method, Operation: item.GetOperation(req.Method)}
	if route.Operation == nil {
		t.Errorf("%s %s is not described", req.Method, template)
		return
	}
	header = header.Clone()
	if header.Get("Content-Type") == "application/x-ndjson" {
		header.Set("Content-Type", "application/json") // of which each line is one
		for _, r := range route.Operation.Responses.Map() {
			if m := r.Value.Content.Get("application/x-ndjson"); m != nil {
				r.Value.Content["application/json"] = m
			}
		}
	}
	err := openapi3filter.ValidateResponse(t.Context(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: req, Route: route},
		Status:                 status, Header: header, Body: io.NopCloser(bytes.NewReader(body)),
		Options: &openapi3filter.Options{IncludeResponseStatus: true},
	})
	if err != nil {
		t.Errorf("%s %s: %d is not as it is described: %.600v\n%.300s", req.Method, template, status, err, body)
	}
}

// exchange is a question to the admin API, and the status of its answer.
type exchange struct {
	method, template, path, body string
	status                       int
}

var exchanges = []exchange{
	{"GET", "/healthz", "", "", 200},
	{"GET", "/readyz", "", "", 200},
	{"GET", "/metrics", "", "", 200},
	{"GET", "/api/v1", "", "", 200},
	{"GET", "/api/v1/openapi.yaml", "", "", 200},
	{"POST", "/api/v1/pull", "", `{"images":["lab.test/team/app:v1","lab.test/team/app:none","lab.test/Team","lab.test/team/app:held"],"pin":true}`, 200},
	{"POST", "/api/v1/pull", "", `{"images":[]}`, 400},
	{"POST", "/api/v1/pull", "", `{"image":1}`, 400},
	{"GET", "/api/v1/status", "", "", 200},
	{"GET", "/api/v1/upstreams", "", "", 200},
	{"GET", "/api/v1/flights", "", "", 200},
	{"GET", "/api/v1/images", "", "", 200},
	{"GET", "/api/v1/images", "/api/v1/images?image=lab.test/team/app&filter=pinned&filter=unused=0s", "", 200},
	{"GET", "/api/v1/images", "/api/v1/images?image=lab.test/team/none", "", 404},
	{"GET", "/api/v1/images", "/api/v1/images?filter=size=1", "", 400},
	{"GET", "/api/v1/images", "/api/v1/images?filter=" + strings.Repeat("a", maxHeaderBytes/2), "", 414},
	{"GET", "/api/v1/images", "/api/v1/images?filter=pinned" + strings.Repeat("&filter=pinned", 64), "", 400},
	{"GET", "/api/v1/images/{ref}", "/api/v1/images/lab.test/team/app:v1", "", 200},
	{"GET", "/api/v1/images/{ref}", "/api/v1/images/lab.test%2Fteam%2Fapp%3Av1", "", 200},
	{"GET", "/api/v1/images/{ref}", "/api/v1/images/lab.test/team/app:v9", "", 404},
	{"GET", "/api/v1/images/{ref}", "/api/v1/images/lab.test/Team", "", 400},
	{"GET", "/api/v1/explain", "/api/v1/explain?image=lab.test/team/app:v1", "", 200},
	{"GET", "/api/v1/explain", "/api/v1/explain?image=lab.test/team/app:none", "", 200},
	{"GET", "/api/v1/explain", "/api/v1/explain?image=sha256:012345", "", 400},
	{"GET", "/api/v1/decisions", "/api/v1/decisions?limit=10", "", 200},
	{"GET", "/api/v1/decisions", "/api/v1/decisions?limit=x", "", 400},
	{"GET", "/api/v1/process", "", "", 200},
	{"GET", "/api/v1/pins", "", "", 200},
	{"POST", "/api/v1/pins", "", `{"image":"lab.test/team/app:v1","platforms":["linux/amd64"]}`, 200},
	{"POST", "/api/v1/pins", "", `{"image":"lab.test/team/app:v1","platforms":["linux/mips"]}`, 400},
	{"POST", "/api/v1/evict", "", `{"image":"lab.test/team/app:v1"}`, 409},
	{"DELETE", "/api/v1/pins", "", `{"image":"lab.test/team/app:v1"}`, 200},
	{"DELETE", "/api/v1/pins", "", `{"image":"lab.test/team/app:v1"}`, 404},
	{"POST", "/api/v1/verify", "", `{}`, 200},
	{"POST", "/api/v1/verify", "", `{"rate":-1}`, 400},
	{"POST", "/api/v1/evict", "", `{"image":"lab.test/team/app:v1"}`, 200},
	{"POST", "/api/v1/evict", "", `{"image":"lab.test/team/app:v1"}`, 404},
	{"POST", "/api/v1/reload", "", `{}`, 200},
	{"POST", "/api/v1/reload", "", `{"x":1}`, 400},
}

func TestEachAnswerIsAsItIsDescribed(t *testing.T) {
	t.Parallel()
	r := registrytest.New(t)
	layer := noises(1, 5<<20)[0]
	r.Image("team/app", "v1", layer)
	held := r.Image("team/app", "held", noises(2, 9<<20)[1])
	r.Hook = func(w http.ResponseWriter, req *http.Request) bool { // so that there is something parked
		if !strings.HasSuffix(req.URL.Path, held.Layers[0].String()) {
			return false
		}
		w.WriteHeader(http.StatusForbidden)
		return true
	}
	p := run(t, t.TempDir(), "--upstream", "lab.test="+r.URL, "--upstream", "gone.test=http://127.0.0.1:1")
	doc := described(t, p)
	p.pull("team/app", "v1")
	p.get("/v2/app/manifests/v1?ns=gone.test") // which is in trouble then
	asked := make(map[string]bool)
	for _, e := range exchanges {
		if e.path == "" {
			e.path = e.template
		}
		asked[e.method+" "+e.template] = true
		req, err := http.NewRequest(e.method, "http://tarn"+e.path, strings.NewReader(e.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := p.overSocket().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != e.status {
			t.Errorf("%s %.100s: %s, %v: %.300s", e.method, e.path, resp.Status, err, body)
			continue
		}
		var f struct{ Error, Code, Next string }
		if json.Unmarshal(body, &f); e.status >= 400 && (f.Error == "" || f.Code == "" || f.Next == "") {
			t.Errorf("%s %.100s says too little: %s", e.method, e.path, body)
		}
		switch resp.Header.Get("Content-Type") {
		case "application/json":
			document(t, doc, e.template, req, resp.StatusCode, resp.Header, body)
		case "application/x-ndjson":
			for line := range bytes.Lines(body) {
				document(t, doc, e.template, req, resp.StatusCode, resp.Header, line)
			}
		}
	}
	asked["GET /api/v1/events"] = true
	live(t, doc, p)
	var listing struct {
		Paths []struct{ Method, Path string }
	}
	fetchJSON(t, p.admin+"/api/v1", &listing)
	var listed []string
	for _, l := range listing.Paths {
		name := l.Method + " " + strings.Replace(l.Path, "{ref...}", "{ref}", 1)
		if listed = append(listed, name); !asked[name] {
			t.Errorf("%s is nowhere asked", name)
		}
	}
	for template, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			if name := method + " " + template; !asked[name] || strings.HasPrefix(template, "/api/v1/") && !slices.Contains(listed, name) {
				t.Errorf("%s is described, and not asked or not there", name)
			}
		}
	}
}

// live holds the first event to its description.
func live(t *testing.T, doc *openapi3.T, p *process) {
	t.Helper()
	resp, err := p.overSocket().Get("http://tarn/api/v1/events")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	line, err := bufio.NewReader(resp.Body).ReadBytes('\n')
	data, ok := bytes.CutPrefix(line, []byte("data: "))
	if err != nil || !ok || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("%v, %s: %s", err, resp.Header.Get("Content-Type"), line)
	}
	var event any
	if err := json.Unmarshal(data, &event); err != nil {
		t.Fatal(err)
	}
	if err := doc.Components.Schemas["Live"].Value.VisitJSON(event); err != nil {
		t.Errorf("an event is not as it is described: %.600v", err)
	}
}

// TestTheAdminAPIRefusesInWords what nobody may ask.
func TestTheAdminAPIRefusesInWords(t *testing.T) {
	t.Parallel()
	p := run(t, t.TempDir())
	for name, c := range map[string]struct {
		method, path string
		status       int
		says, allow  string
	}{
		"a wrong method":        {"POST", "/api/v1/images", 405, "only GET, HEAD", "GET, HEAD"},
		"a wrong one for a ref": {"DELETE", "/api/v1/images/lab.test/app", 405, "only GET, HEAD", "GET, HEAD"},
		"GET of an order":       {"GET", "/api/v1/pull", 405, "only POST", "POST"},
		"three methods":         {"PUT", "/api/v1/pins", 405, "only GET, HEAD, POST, DELETE", "GET, HEAD, POST, DELETE"},
		"no such path":          {"GET", "/api/v2/images", 404, "flights", ""},
		"a long query":          {"GET", "/api/v1/images?image=" + strings.Repeat("a", 20_000), 414, "16384 is the most", ""},
		"a query of a megabyte": {"GET", "/api/v1/images?image=" + strings.Repeat("a", 1<<20), 431, "Request Header Fields Too Large", ""},
		"a pull over TCP":       {"POST", "/api/v1/pull", 403, p.socket(), ""},
	} {
		status, said := order(t, http.DefaultClient, c.method, p.admin+c.path, `{"images":["app"]}`)
		if status != c.status || !strings.Contains(said, c.says) {
			t.Errorf("%s: %d %.300s", name, status, said)
		}
		if c.allow == "" {
			continue
		}
		req, err := http.NewRequest(c.method, p.admin+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if got := resp.Header.Get("Allow"); got != c.allow {
			t.Errorf("%s: Allow is %q", name, got)
		}
	}
}
