// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// small has something of each thing that is measured.
var small = map[string]string{
	"go.mod": "module small\n\ngo 1.26.0\n",
	"low/a.go": `package low

type Base struct{ count int }

type Wide struct {
	Base
	One, Two int
	Tagged   int ` + "`json:\"tagged\"`" + `
}

func (w *Wide) Sum() int { return w.count + helped() }

// String is there for fmt.
func (w *Wide) String() string { return "" }

type twin[T any] struct{ of T }
`,
	"low/b.go": `package low

func helped() int { return new(Wide).One + len(new(twin[string]).of) }

func Nobody() {}

func Tested() {}

func Abroad() {}
`,
	"low/alone.go": "package low\n\nconst alone = 1\n" + strings.Repeat("// and so on\n", 500),
	"low/low_test.go": `package low

import "testing"

func Test(t *testing.T) { Tested() }
`,
	"main.go": `package main

import (
	"fmt"
	"small/low"
)

func main() {
	low.Abroad()
	fmt.Println(&low.Wide{Two: new(low.Wide).Sum()})
` + strings.Repeat("\n", 60) + `}
`,
}

const smallFigures = `
lines by room, without tests: 599
    528  low
     71  .

files above 500 lines: 1
    503  low/alone.go

functions above 60 lines: 1
     64  main.go:8 main

largest structs: fields, an embedded one being one, and methods
      4    2  low.Wide
      1    0  low.Base
      1    0  low.twin

tied pairs of files, of those possible; both ways
      1 of   3 (33%)    1  small/low

exported, and named by no other room
    own  small/low.Base
 nobody  small/low.Nobody
  tests  small/low.Tested
    own  small/low.Wide.One
`

func TestTheFiguresOfASmallHouse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range small {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var got strings.Builder
	if err := run(&got, dir, false, false); err != nil {
		t.Fatal(err)
	}
	if got.String() != smallFigures {
		t.Errorf("got %s\nwant %s", got.String(), smallFigures)
	}
}

// TestAWarmRequestIsCountedOnce: what is known to happen once for each request is
// counted once, and what happens at the start, or with each tick, is not.
func TestAWarmRequestIsCountedOnce(t *testing.T) {
	t.Parallel()
	var got strings.Builder
	if err := run(&got, filepath.Join("..", ".."), true, true); err != nil {
		t.Fatal(err)
	}
	blob, tag, _ := strings.Cut(got.String(), "a GET of a warm tag\n")
	for name, part := range map[string]string{"blob": blob, "tag": tag} {
		if !strings.Contains(part, "          1  tarn/proxy.Proxy.ServeHTTP\n") {
			t.Errorf("a %s is not served once:\n%s", name, part)
		}
		if strings.Contains(part, "tarn/cmd/tarn.newServeCommand") {
			t.Errorf("a %s starts a command:\n%s", name, part)
		}
	}
	// The question that a tag's answer is worth, and a blob's is not.
	const asks = "tarn/upstream.Registry.Do\n"
	if strings.Contains(blob, asks) || !strings.Contains(tag, "          1  "+asks) {
		t.Errorf("a blob asks the registry, or a tag not once:\n%s", got.String())
	}
}
