// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"tarn/upstream"

	"github.com/agnivade/levenshtein"
	"go.yaml.in/yaml/v3"
)

// mistake is one thing that is wrong in a file, and where.
type mistake struct {
	line int
	text string
}

// decoder reads a parsed file. It goes on after a mistake, so that one run names
// them all.
type decoder struct {
	file     string
	listed   map[upstream.Name]int // the line on which each upstream begins
	mistakes []mistake
}

// parseConfig parses the file's content; file is its name for errors.
func parseConfig(file string, data []byte) (Config, error) {
	d, c := &decoder{file: file, listed: make(map[upstream.Name]int)}, defaultConfig()
	if root := d.document(data); root != nil {
		d.mapping(root, "", c.keys())
	}
	if err := d.err(); err != nil {
		return Config{}, err
	}
	return c, nil
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

// mapping reads the mapping n, which stands at path: "", or as in
// "upstreams[0].". What the file does not set stays as it is.
func (d *decoder) mapping(n *yaml.Node, path string, keys []key) {
	if n.Kind != yaml.MappingNode {
		if path == "" {
			d.add(n.Line, "must be a mapping of keys to values, not %s", describe(n))
		} else {
			d.addKey(n, strings.TrimSuffix(path, "."), "must be a mapping of keys to values, not %s", describe(n))
		}
		return
	}
	given := make(map[string][2]*yaml.Node, len(n.Content)/2)
	for i := 0; i < len(n.Content); i += 2 {
		k := n.Content[i]
		first, duplicate := given[k.Value]
		switch {
		case k.Kind != yaml.ScalarNode:
			d.add(k.Line, "a key must be a word, not %s", describe(k))
		case duplicate:
			d.add(k.Line, "duplicate key %q, first on line %d", path+k.Value, first[0].Line)
		case !slices.ContainsFunc(keys, func(known key) bool { return known.name == k.Value }):
			d.add(k.Line, "unknown key %q%s", path+k.Value, suggestion(k.Value, keys))
		default:
			given[k.Value] = [2]*yaml.Node{k, n.Content[i+1]}
		}
	}
	for _, k := range keys {
		if node, ok := given[k.name]; ok {
			d.value(node[1], path+k.name, k.read)
		}
	}
}

// suggestion names the key that was meant, as far as one is close, or says where one of
// that name belongs.
func suggestion(word string, keys []key) string {
	known := func(keys []key) bool { return slices.ContainsFunc(keys, func(k key) bool { return k.name == word }) }
	switch {
	case known(new(Defaults).keys()):
		return "; it belongs under defaults:, or to one of the upstreams:"
	case known(new(Upstream).keys()):
		return "; it belongs to one of the upstreams:, as in upstreams: [{name: registry.corp:5000, " + word + ": ...}]"
	case known(new(Config).keys()):
		return "; it belongs to the top of the file"
	}
	best, distance := "", 2+len(word)/3 // a letter or two, more in long words
	for _, k := range keys {
		if d := levenshtein.ComputeDistance(word, k.name); d < distance {
			best, distance = k.name, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// reader reads the value n of the key at, or says what is wrong with it.
type reader func(d *decoder, n *yaml.Node, at string)

func (d *decoder) value(n *yaml.Node, at string, read reader) {
	if n.Kind == yaml.AliasNode {
		d.addKey(n, at, "aliases (*%s) are not supported; write the value out", n.Value)
		return
	}
	read(d, n, at)
}

// section reads a mapping that may be left empty, as when all that stands under
// it is commented out.
func section(keys []key) reader {
	return func(d *decoder, n *yaml.Node, at string) {
		if !isNull(n) {
			d.mapping(n, at+".", keys)
		}
	}
}

// list reads a list that may be left empty, too.
func list[T any](p *[]T, item func(*T) reader) reader {
	return func(d *decoder, n *yaml.Node, at string) {
		if isNull(n) {
			return
		}
		if n.Kind != yaml.SequenceNode {
			d.addKey(n, at, "must be a list, not %s", describe(n))
			return
		}
		*p = make([]T, len(n.Content))
		for i, node := range n.Content {
			d.value(node, fmt.Sprintf("%s[%d]", at, i), item(&(*p)[i]))
		}
	}
}

// text, boolean, number, duration and bytesOrShare read one value each, and hold
// it to its rule; nil means that there is none.

func text(p *string, rule func(string) error) reader {
	return scalar(p, "a string", "!!str", func(s string) (string, error) { return s, nil }, rule)
}

func boolean(p *bool) reader {
	return scalar(p, "true or false", "!!bool", strconv.ParseBool, nil)
}

func number(p *int, rule func(int) error) reader {
	return scalar(p, "a whole number", "!!int", parseNumber, rule)
}

func duration(p *time.Duration, rule func(time.Duration) error) reader {
	return scalar(p, "a duration", "", parseDuration, rule)
}

func bytesOrShare(p *Size, rule func(Size) error) reader {
	return scalar(p, "a size", "", parseSize, rule)
}

// scalar reads one value into p. tag is the type that YAML must have seen in it;
// "" takes any scalar as it is written, since 1073741824 and 0 are a size and a
// duration as well as numbers.
func scalar[T any](p *T, what, tag string, parse func(string) (T, error), rule func(T) error) reader {
	return func(d *decoder, n *yaml.Node, at string) {
		if n.Kind != yaml.ScalarNode || isNull(n) || tag != "" && n.ShortTag() != tag {
			d.addKey(n, at, "must be %s, not %s", what, describe(n))
			return
		}
		v, err := parse(n.Value)
		if err == nil && rule != nil {
			err = rule(v)
		}
		if err != nil {
			d.addKey(n, at, "%v", err)
			return
		}
		*p = v
	}
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

func parseNumber(s string) (int, error) {
	v, err := strconv.Atoi(s)
	if err != nil {
		return 0, fmt.Errorf("%q is not a whole number", s)
	}
	return v, nil
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
