// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"tarn/upstream"

	"go.yaml.in/yaml/v3"
)

// mistake is one thing that is wrong in a file, and where.
type mistake struct {
	line int
	text string
}

// decoder turns a parsed file into a Config. It goes on after a mistake, so
// that one run names them all.
type decoder struct {
	file     string
	config   Config
	listed   map[upstream.Name]int // the line on which each upstream begins
	mistakes []mistake
}

// parseConfig parses the file's content; file is its name for errors.
func parseConfig(file string, data []byte) (Config, error) {
	d := &decoder{file: file, config: defaultConfig(), listed: make(map[upstream.Name]int)}
	if root := d.document(data); root != nil {
		d.mapping(root, "", reflect.ValueOf(&d.config).Elem())
	}
	if err := d.err(); err != nil {
		return Config{}, err
	}
	return d.config, nil
}

func (d *decoder) add(line int, format string, args ...any) {
	d.mistakes = append(d.mistakes, mistake{line, fmt.Sprintf(format, args...)})
}

func (d *decoder) addKey(n *yaml.Node, key, format string, args ...any) {
	d.add(n.Line, "key %q: %s", key, fmt.Sprintf(format, args...))
}

func (d *decoder) err() error {
	slices.SortStableFunc(d.mistakes, func(a, b mistake) int { return a.line - b.line })
	var errs []error
	for _, m := range d.mistakes {
		errs = append(errs, fmt.Errorf("%s:%d: %s", d.file, m.line, m.text))
	}
	return errors.Join(errs...)
}

var yamlLine = regexp.MustCompile(`^line ([0-9]+): `)

// document parses data to the one mapping that it may have; nil when it is
// empty, or wrong.
func (d *decoder) document(data []byte) *yaml.Node {
	var doc, second yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	err := dec.Decode(&doc)
	if err == nil {
		if err = dec.Decode(&second); err == nil {
			d.add(second.Line, "a second document; only one is read")
			return nil
		}
		if err == io.EOF {
			if isNull(doc.Content[0]) {
				return nil
			}
			return doc.Content[0]
		}
	}
	if err == io.EOF { // nothing, or comments only
		return nil
	}
	text, line := strings.TrimPrefix(err.Error(), "yaml: "), 1
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		line, _ = strconv.Atoi(m[1])
		text = text[len(m[0]):]
	}
	// The parser gives the line where the construct begins, or the one above.
	d.add(line, "not YAML, here or just below: %s", text)
	return nil
}

// field is one key that a mapping may have.
type field struct {
	key   string
	value reflect.Value
}

// fields lists the keys of a struct, an inlined struct's among them.
func fields(v reflect.Value) (all []field) {
	for i := range v.NumField() {
		tag := v.Type().Field(i).Tag.Get("yaml")
		if tag == ",inline" {
			all = append(all, fields(v.Field(i))...)
		} else if tag != "-" {
			all = append(all, field{tag, v.Field(i)})
		}
	}
	return all
}

// mapping sets the struct v from the mapping n, which stands at path: "", or
// as in "upstreams[0].". What the file does not set stays as it is.
func (d *decoder) mapping(n *yaml.Node, path string, v reflect.Value) {
	if n.Kind != yaml.MappingNode {
		if path == "" {
			d.add(n.Line, "must be a mapping of keys to values, not %s", describe(n))
		} else {
			d.addKey(n, strings.TrimSuffix(path, "."), "must be a mapping of keys to values, not %s", describe(n))
		}
		return
	}
	// In the order of the struct, since upstreams begin with defaults.
	given := make(map[string][2]*yaml.Node, len(n.Content)/2)
	known := fields(v)
	for i := 0; i < len(n.Content); i += 2 {
		k := n.Content[i]
		first, duplicate := given[k.Value]
		switch {
		case k.Kind != yaml.ScalarNode:
			d.add(k.Line, "a key must be a word, not %s", describe(k))
		case duplicate:
			d.add(k.Line, "duplicate key %q, first on line %d", path+k.Value, first[0].Line)
		case !slices.ContainsFunc(known, func(f field) bool { return f.key == k.Value }):
			d.add(k.Line, "unknown key %q", path+k.Value)
		default:
			given[k.Value] = [2]*yaml.Node{k, n.Content[i+1]}
		}
	}
	for _, f := range known {
		if node, ok := given[f.key]; ok {
			d.value(node[1], path+f.key, f.value)
		}
	}
}

var position = regexp.MustCompile(`\[[0-9]+\]`)

// general is a key as it stands in rules: without positions.
func general(key string) string { return position.ReplaceAllString(key, "[]") }

// value sets v from n, the value of key.
func (d *decoder) value(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind == yaml.AliasNode {
		d.addKey(n, key, "aliases (*%s) are not supported; write the value out", n.Value)
		return
	}
	switch p := v.Addr().Interface().(type) {
	case *string:
		set(d, n, key, p, "!!str", func(s string) (string, error) { return s, nil })
	case *bool:
		set(d, n, key, p, "!!bool", strconv.ParseBool)
	case *int:
		set(d, n, key, p, "!!int", func(s string) (int, error) {
			i, err := strconv.Atoi(s)
			if err != nil {
				err = fmt.Errorf("%q is not a whole number", s)
			}
			return i, err
		})
	case *time.Duration:
		set(d, n, key, p, "", parseDuration)
	case *Size:
		set(d, n, key, p, "", parseSize)
	case *Endpoint:
		if n.Kind == yaml.ScalarNode {
			d.value(n, key, reflect.ValueOf(&p.URL).Elem())
			return
		}
		d.mapping(n, key+".", v)
		d.require(n, key+".", "url")
	case *Upstream:
		p.UpstreamDefaults = d.config.Defaults // which stand before upstreams in Config
		d.mapping(n, key+".", v)
		d.require(n, key+".", "name")
		if (p.CertFile == "") != (p.KeyFile == "") {
			d.addKey(n, key, "cert_file and key_file go together")
		}
		if name, err := upstream.ParseName(p.Name); err == nil {
			if line, twice := d.listed[name]; twice {
				d.addKey(n, key+".name", "%s is listed before, on line %d", name, line)
			} else {
				d.listed[name] = n.Line
			}
		}
	default:
		if isNull(n) { // as when all that stands under it is commented out
			return
		}
		if v.Kind() == reflect.Slice {
			d.sequence(n, key, v)
		} else {
			d.mapping(n, key+".", v)
		}
	}
}

// set parses a scalar and holds it to its key's rule. tag is the type that
// YAML must have seen in it; "" takes any scalar as it is written, since
// 1073741824 and 0 are a size and a duration as well as numbers.
func set[T any](d *decoder, n *yaml.Node, key string, p *T, tag string, parse func(string) (T, error)) {
	if n.Kind != yaml.ScalarNode || isNull(n) || tag != "" && n.ShortTag() != tag {
		d.addKey(n, key, "must be %s, not %s", describeType(*p), describe(n))
		return
	}
	v, err := parse(n.Value)
	if rule := rules[general(key)]; err == nil && rule != nil {
		err = rule(v)
	}
	if err != nil {
		d.addKey(n, key, "%v", err)
		return
	}
	*p = v
}

// require finds the key in the mapping n, whatever its value.
func (d *decoder) require(n *yaml.Node, path, key string) {
	if n.Kind != yaml.MappingNode { // and said so
		return
	}
	for i := 0; i < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return
		}
	}
	d.addKey(n, path+key, "must be given")
}

func (d *decoder) sequence(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind != yaml.SequenceNode {
		d.addKey(n, key, "must be a list, not %s", describe(n))
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, item := range n.Content {
		d.value(item, fmt.Sprintf("%s[%d]", key, i), v.Index(i))
	}
}

func parseDuration(s string) (time.Duration, error) {
	v, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf(`%q is not a duration, as in "500ms", "8s", "24h"`, s)
	}
	if v < 0 {
		return 0, errors.New("must not be negative")
	}
	return v, nil
}

func isNull(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	switch n.ShortTag() {
	case "!!null":
		return "nothing"
	case "!!str":
		return "a string"
	case "!!bool":
		return "a boolean"
	case "!!int", "!!float":
		return "a number"
	}
	return "a value of type " + n.ShortTag()
}

func describeType(v any) string {
	switch v.(type) {
	case string:
		return "a string"
	case bool:
		return "true or false"
	case int:
		return "a whole number"
	case time.Duration:
		return "a duration"
	}
	return "a size"
}
