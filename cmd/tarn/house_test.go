// SPDX-License-Identifier: Apache-2.0

package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// house lists the floors: what each package may import of ours. No package
// below proxy knows HTTP serving, and none below cmd the configuration.
var house = map[string][]string{
	"internal/fault":        {},
	"internal/evict":        {},
	"internal/manifest":     {"blobstore"},
	"internal/nodeca":       {},
	"internal/evictsim":     {"internal/evict"},
	"internal/regular":      {},
	"internal/probe":        {},
	"hosts":                 {"internal/probe"},
	"blobstore":             {"internal/fault", "internal/regular"},
	"index":                 {"internal/fault", "internal/regular"},
	"cache/store":           {"blobstore", "index", "internal/evict", "internal/fault", "internal/manifest", "internal/regular"},
	"images":                {"blobstore", "cache/store", "index", "internal/manifest", "internal/regular"},
	"cache/flight":          {"blobstore", "index", "internal/manifest"},
	"cache":                 {"blobstore", "cache/flight", "cache/store", "images", "index", "internal/fault", "internal/manifest", "internal/regular"},
	"rights":                {"index"},
	"history":               {"internal/regular"},
	"upstream":              {},
	"proxy":                 {"blobstore", "cache", "history", "index", "internal/manifest", "internal/probe", "rights", "upstream"},
	"explain":               {"cache", "cache/store", "history", "images", "proxy", "upstream"},
	"admin":                 {"cache", "cache/store", "explain", "history", "images", "index", "proxy"},
	"internal/registrytest": {},
	"tools/image":           {},
	"cmd/tarn":              {"admin", "cache", "cache/store", "explain", "history", "hosts", "images", "index", "internal/nodeca", "proxy", "upstream"},
}

func TestImportsOnlyPointDown(t *testing.T) {
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != root {
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil || strings.HasPrefix(d.Name(), ".") {
				return filepath.SkipDir // a module of its own
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		rel, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		allowed, known := house[rel]
		if !known {
			t.Errorf("%s is in no room of the house", path)
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(string(text), "// SPDX-License-Identifier: Apache-2.0\n") {
			t.Errorf("%s does not start with the SPDX line", path)
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, text, parser.ImportsOnly)
		if err != nil {
			return err
		}
		test := strings.HasSuffix(path, "_test.go")
		for _, i := range file.Imports {
			name := strings.Trim(i.Path.Value, `"`)
			ours, ok := strings.CutPrefix(name, "tarn/")
			switch {
			case ok && !slices.Contains(allowed, ours) && !(test && (ours == "internal/registrytest" || ours == "internal/evictsim")):
				t.Errorf("%s imports %s", path, name)
			case !test && name == "net/http" && (rel == "blobstore" || rel == "index" || rel == "images" || strings.HasPrefix(rel, "cache")):
				t.Errorf("%s knows HTTP", path)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestTheDocsNameTestsThatExist: a promise is worth what shows it. A name that
// ends with dots stands for all tests that begin so.
func TestTheDocsNameTestsThatExist(t *testing.T) {
	root := filepath.Join("..", "..")
	var sources strings.Builder
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, "_test.go") {
			var text []byte
			text, err = os.ReadFile(path)
			sources.Write(text)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	docs, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil || len(docs) < 2 {
		t.Fatalf("%v, %v", docs, err)
	}
	named := regexp.MustCompile("`((?:Test|Benchmark)[A-Z][A-Za-z0-9]*)(\\.\\.\\.)?`")
	for _, doc := range docs {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range named.FindAllStringSubmatch(string(text), -1) {
			want := "func " + m[1]
			if m[2] == "" {
				want += "("
			}
			if !strings.Contains(sources.String(), want) {
				t.Errorf("%s names %s, which there is not", doc, m[1]+m[2])
			}
		}
	}
}
