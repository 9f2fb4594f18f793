// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
)

// What is longer than this does not fit into a screen or two, or into a head.
const (
	longFunction = 60
	longFile     = 500
)

// sized is something that takes lines.
type sized struct {
	name  string
	lines int
}

func longestFirst(a, b sized) int {
	return cmp.Or(cmp.Compare(b.lines, a.lines), strings.Compare(a.name, b.name))
}

// printSizes prints lines by room, and what is long, in every module of the
// checkout. Tests do not count.
func printSizes(w io.Writer, dir string) error {
	rooms := make(map[string]int)
	var files, functions []sized
	err := eachSource(dir, func(path string, fset *token.FileSet, f *ast.File) {
		lines := fset.File(f.Pos()).LineCount()
		rooms[filepath.Dir(path)] += lines
		if lines > longFile {
			files = append(files, sized{path, lines})
		}
		for _, d := range f.Decls {
			if d, ok := d.(*ast.FuncDecl); ok {
				from, to := fset.Position(d.Pos()), fset.Position(d.End())
				if n := to.Line - from.Line + 1; n > longFunction {
					functions = append(functions, sized{fmt.Sprintf("%s:%d %s", path, from.Line, functionName(d)), n})
				}
			}
		}
	})
	if err != nil {
		return err
	}
	var byRoom []sized
	all := 0
	for name, lines := range rooms {
		byRoom = append(byRoom, sized{name, lines})
		all += lines
	}
	printSized(w, fmt.Sprintf("lines by room, without tests: %d", all), byRoom)
	printSized(w, fmt.Sprintf("files above %d lines: %d", longFile, len(files)), files)
	printSized(w, fmt.Sprintf("functions above %d lines: %d", longFunction, len(functions)), functions)
	return nil
}

func printSized(w io.Writer, title string, all []sized) {
	fmt.Fprintf(w, "\n%s\n", title)
	slices.SortFunc(all, longestFirst)
	for _, s := range all {
		fmt.Fprintf(w, "%7d  %s\n", s.lines, s.name)
	}
}

// eachSource parses each Go file below dir that is no test and no test's data.
func eachSource(dir string, f func(path string, fset *token.FileSet, file *ast.File)) error {
	fset := token.NewFileSet()
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != dir && (name == "testdata" || strings.HasPrefix(name, ".")) {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || isTest(path) {
			return nil
		}
		file, err := parser.ParseFile(fset, path, nil, 0)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		f(rel, fset, file)
		return nil
	})
}

func isTest(path string) bool { return strings.HasSuffix(path, "_test.go") }

// functionName is Name, or Type.Name.
func functionName(d *ast.FuncDecl) string {
	if d.Recv == nil || len(d.Recv.List) == 0 {
		return d.Name.Name
	}
	receiver := d.Recv.List[0].Type
	for {
		switch t := receiver.(type) {
		case *ast.StarExpr:
			receiver = t.X
		case *ast.IndexExpr:
			receiver = t.X
		case *ast.IndexListExpr:
			receiver = t.X
		case *ast.Ident:
			return t.Name + "." + d.Name.Name
		default:
			return d.Name.Name
		}
	}
}
