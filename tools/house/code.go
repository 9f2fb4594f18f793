// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/token"
	"io"
	"math"
	"path"
	"slices"
	"strings"

	"golang.org/x/tools/cover"
)

// counts say how often each block of each file ran.
type counts map[string][]cover.ProfileBlock

func readCounts(profile string) (counts, error) {
	profiles, err := cover.ParseProfiles(profile)
	c := make(counts)
	for _, p := range profiles {
		c[p.FileName] = p.Blocks // sorted by where they begin
	}
	return c, err
}

// place is a point of a file, or what lies between two.
type place struct {
	file     string
	from, to token.Position
}

// at says how often the innermost block around the place's beginning ran.
func (c counts) at(p place) (n int) {
	at := point{p.from.Line, p.from.Column}
	for _, b := range c[p.file] {
		if at.within(point{b.StartLine, b.StartCol}, point{b.EndLine, b.EndCol}) {
			n = b.Count
		}
	}
	return n
}

// into says how often the first block within the place ran.
func (c counts) into(p place) int {
	from, to := point{p.from.Line, p.from.Column}, point{p.to.Line, p.to.Column}
	for _, b := range c[p.file] {
		if (point{b.StartLine, b.StartCol}).within(from, to) {
			return b.Count
		}
	}
	return 0
}

type point struct{ line, column int }

func (p point) within(from, to point) bool { return !p.before(from) && p.before(to) }

func (p point) before(q point) bool {
	return p.line < q.line || p.line == q.line && p.column < q.column
}

// function is one that was declared, or a literal in one.
type function struct {
	name    string
	literal bool
	body    place
}

// code is where functions begin and locks are taken.
type code struct {
	functions []function
	locks     []place
}

// readCode reads the sources of modules, each in its directory.
func readCode(modules map[string]string) (*code, error) {
	c := new(code)
	for module, dir := range modules {
		err := eachSource(dir, func(rel string, fset *token.FileSet, f *ast.File) {
			c.read(path.Join(module, rel), fset, f)
		})
		if err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *code) read(file string, fset *token.FileSet, f *ast.File) {
	between := func(from, to token.Pos) place { return place{file, fset.Position(from), fset.Position(to)} }
	for _, d := range f.Decls {
		name := path.Dir(file) + "."
		ast.Inspect(d, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				name += functionName(n)
				if n.Body != nil {
					c.functions = append(c.functions, function{name, false, between(n.Body.Pos(), n.Body.End())})
				}
			case *ast.FuncLit:
				body := between(n.Body.Pos(), n.Body.End())
				c.functions = append(c.functions, function{fmt.Sprintf("%s, literal on line %d", name, body.from.Line), true, body})
			case *ast.CallExpr:
				if s, ok := n.Fun.(*ast.SelectorExpr); ok && len(n.Args) == 0 && (s.Sel.Name == "Lock" || s.Sel.Name == "RLock") {
					c.locks = append(c.locks, between(n.Pos(), n.End()))
				}
			}
			return true
		})
	}
}

// print prints what one request runs through, given what N and 2N did.
func (c *code) print(w io.Writer, once, twice counts, names bool) {
	var declared, literals, calls, reading, writing int
	var named []sized
	for _, f := range c.functions {
		n := perRequest(once.into(f.body), twice.into(f.body))
		switch {
		case f.name == database+".DB.beginTx":
			reading = n
		case f.name == database+".DB.beginRWTx":
			writing = n
		case n == 0 || isDatabase(f.body):
		case f.literal:
			literals++
			calls += n
		default:
			declared++
			calls += n
		}
		if n > 0 {
			named = append(named, sized{f.name, n})
		}
	}
	var own, databases int
	for _, l := range c.locks {
		if n := perRequest(once.at(l), twice.at(l)); isDatabase(l) {
			databases += n
		} else {
			own += n
		}
	}
	fmt.Fprintf(w, "%7d  functions of tarn, and %d literals; called %d times\n", declared, literals, calls)
	fmt.Fprintf(w, "%7d  transactions that read, and %d that write\n", reading, writing)
	fmt.Fprintf(w, "%7d  locks taken, and %d in bbolt\n", own, databases)
	if !names {
		return
	}
	slices.SortFunc(named, func(a, b sized) int { return cmp.Compare(a.name, b.name) })
	for _, f := range named {
		fmt.Fprintf(w, "%11d  %s\n", f.lines, f.name)
	}
}

func isDatabase(p place) bool { return strings.HasPrefix(p.file, database+"/") }

func perRequest(once, twice int) int { return int(math.Round(float64(twice-once) / requests)) }
