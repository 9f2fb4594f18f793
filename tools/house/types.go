// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"go/types"
	"io"
	"slices"
	"strings"

	"golang.org/x/tools/go/packages"
	"golang.org/x/tools/go/types/objectpath"
)

// largest is how many structs are named.
const largest = 12

// printTypes prints what only the types tell: structs, which files are tied, and
// what is exported for nobody. It looks at the module at dir, since no other
// module of the checkout imports it.
func printTypes(w io.Writer, dir string) error {
	all, err := packages.Load(&packages.Config{
		Mode: packages.NeedName | packages.NeedFiles | packages.NeedImports | packages.NeedSyntax |
			packages.NeedTypes | packages.NeedTypesInfo | packages.NeedForTest,
		Dir:   dir,
		Tests: true,
	}, "./...")
	if err != nil {
		return err
	}
	var rooms []*packages.Package
	for _, p := range all {
		for _, e := range p.Errors {
			return errors.New(e.Error())
		}
		if p.ForTest == "" && !strings.HasSuffix(p.ID, ".test") {
			rooms = append(rooms, p)
		}
	}
	printStructs(w, rooms)
	printTies(w, rooms)
	printUnused(w, rooms, all)
	return nil
}

func printStructs(w io.Writer, rooms []*packages.Package) {
	type structure struct {
		name            string
		fields, methods int
	}
	var structs []structure
	for _, p := range rooms {
		for _, name := range p.Types.Scope().Names() {
			t, ok := p.Types.Scope().Lookup(name).(*types.TypeName)
			if !ok || t.IsAlias() {
				continue
			}
			named := t.Type().(*types.Named)
			if s, ok := named.Underlying().(*types.Struct); ok {
				structs = append(structs, structure{p.Name + "." + name, s.NumFields(), named.NumMethods()})
			}
		}
	}
	slices.SortFunc(structs, func(a, b structure) int {
		return cmp.Or(cmp.Compare(b.fields, a.fields), cmp.Compare(b.methods, a.methods), strings.Compare(a.name, b.name))
	})
	fmt.Fprintf(w, "\nlargest structs: fields, an embedded one being one, and methods\n")
	for _, s := range structs[:min(largest, len(structs))] {
		fmt.Fprintf(w, "%7d %4d  %s\n", s.fields, s.methods, s.name)
	}
}

// printTies counts the pairs of a room's files of which one uses what the other
// declares: a name of the package, a field or a method.
func printTies(w io.Writer, rooms []*packages.Package) {
	fmt.Fprintf(w, "\ntied pairs of files, of those possible; both ways\n")
	for _, p := range rooms {
		ties := make(map[[2]string]bool) // who uses whom
		for id, used := range p.TypesInfo.Uses {
			from, to := p.Fset.Position(id.Pos()).Filename, p.Fset.Position(used.Pos()).Filename
			if used.Pkg() == p.Types && from != to {
				ties[[2]string{from, to}] = true
			}
		}
		both := 0
		for t := range ties {
			if ties[[2]string{t[1], t[0]}] {
				both++ // seen from each end
			}
		}
		both /= 2
		n := len(p.GoFiles)
		if possible := n * (n - 1) / 2; possible > 0 {
			tied := len(ties) - both
			fmt.Fprintf(w, "%7d of %3d (%2d%%) %4d  %s\n", tied, possible, 100*tied/possible, both, p.PkgPath)
		}
	}
}

// printUnused prints what is exported, and named by no other room and no other
// room's tests. What its own room names may do with a small letter; the type of
// what another room is given may not.
func printUnused(w io.Writer, rooms, all []*packages.Package) {
	abroad, home, tests := make(map[string]bool), make(map[string]bool), make(map[string]bool)
	for _, p := range all {
		for id, o := range p.TypesInfo.Uses {
			switch {
			case o.Pkg() == nil || !o.Exported():
			case o.Pkg().Path() != strings.TrimSuffix(p.PkgPath, "_test"):
				abroad[key(o)] = true
			case isTest(p.Fset.Position(id.Pos()).Filename):
				tests[key(o)] = true
			default:
				home[key(o)] = true
			}
		}
	}
	interfaces := interfacesOf(rooms)
	fmt.Fprintf(w, "\nexported, and named by no other room\n")
	for _, p := range rooms {
		if p.Name == "main" {
			continue // nobody can
		}
		for _, o := range exported(p.Types.Scope()) {
			k := key(o.Object)
			if abroad[k] || slices.ContainsFunc(interfaces, o.isAskedForBy) {
				continue
			}
			by := "nobody"
			if home[k] {
				by = "own"
			} else if tests[k] {
				by = "tests"
			}
			fmt.Fprintf(w, "%7s  %s.%s\n", by, p.PkgPath, o.name)
		}
	}
}

// key is the same for an object that was read from a source and from what the
// compiler wrote of it.
func key(o types.Object) string {
	if f, ok := o.(*types.Func); ok {
		o = f.Origin()
	}
	if v, ok := o.(*types.Var); ok {
		o = v.Origin()
	}
	path, err := objectpath.For(o)
	if err != nil || o.Pkg() == nil {
		return "" // a local one
	}
	return o.Pkg().Path() + " " + string(path)
}

// export is an exported name, a method or a field; owner is whose.
type export struct {
	types.Object
	name  string
	owner *types.TypeName
}

func exported(scope *types.Scope) (all []export) {
	for _, name := range scope.Names() {
		o := scope.Lookup(name)
		if !o.Exported() {
			continue
		}
		all = append(all, export{Object: o, name: name})
		owner, ok := o.(*types.TypeName)
		if !ok || owner.IsAlias() {
			continue
		}
		named := owner.Type().(*types.Named)
		for m := range named.Methods() {
			all = append(all, export{m, name + "." + m.Name(), owner})
		}
		if s, ok := named.Underlying().(*types.Struct); ok {
			for i := range s.NumFields() {
				// One with a tag is for whoever encodes it.
				if f := s.Field(i); s.Tag(i) == "" && !f.Embedded() {
					all = append(all, export{f, name + "." + f.Name(), owner})
				}
			}
		}
	}
	return slices.DeleteFunc(all, func(e export) bool { return !e.Exported() })
}

// isAskedForBy tells whether the export is a method that makes its owner an i.
func (e export) isAskedForBy(i *types.Interface) bool {
	if _, ok := e.Object.(*types.Func); !ok || e.owner == nil {
		return false
	}
	for m := range i.Methods() {
		if m.Name() == e.Name() {
			return types.Implements(types.NewPointer(e.owner.Type()), i)
		}
	}
	return false
}

// interfacesOf are the interfaces of these packages and of all that they import.
func interfacesOf(rooms []*packages.Package) (all []*types.Interface) {
	seen := make(map[*types.Package]bool)
	var walk func(*types.Package)
	walk = func(p *types.Package) {
		if seen[p] {
			return
		}
		seen[p] = true
		for _, name := range p.Scope().Names() {
			if t, ok := p.Scope().Lookup(name).(*types.TypeName); ok {
				if i, ok := t.Type().Underlying().(*types.Interface); ok && i.NumMethods() > 0 {
					all = append(all, i)
				}
			}
		}
		for _, imported := range p.Imports() {
			walk(imported)
		}
	}
	for _, p := range rooms {
		walk(p.Types)
	}
	return append(all, types.Universe.Lookup("error").Type().Underlying().(*types.Interface))
}
