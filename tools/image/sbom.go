// SPDX-License-Identifier: Apache-2.0

package main

import (
	"debug/buildinfo"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
)

// bill is a bill of materials (CycloneDX 1.5), without a time or a serial number, so
// that the same materials give the same one.
type bill struct {
	Format     string      `json:"bomFormat"`
	Spec       string      `json:"specVersion"`
	Version    int         `json:"version"`
	Metadata   metadata    `json:"metadata"`
	Components []component `json:"components"`
}

type metadata struct {
	Component component `json:"component"`
}

type component struct {
	Type       string     `json:"type"`
	Name       string     `json:"name"`
	Version    string     `json:"version"`
	PURL       string     `json:"purl,omitempty"`
	Properties []property `json:"properties,omitempty"`
}

type property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// billOf lists what a program is made of, as its build says itself, and what else is in
// the image.
func billOf(s settings, info *buildinfo.BuildInfo) ([]byte, error) {
	goVersion := strings.TrimPrefix(info.GoVersion, "go")
	b := bill{
		Format: "CycloneDX", Spec: "1.5", Version: 1,
		Metadata: metadata{component{
			Type: "application", Name: "tarn", Version: s.version,
			Properties: []property{{"commit", s.commit}},
		}},
		Components: []component{
			{Type: "library", Name: "stdlib", Version: goVersion, PURL: "pkg:golang/stdlib@" + goVersion},
			{Type: "data", Name: "ca-certificates", Version: s.certsVersion, PURL: "pkg:deb/debian/ca-certificates@" + url.QueryEscape(s.certsVersion)},
		},
	}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		b.Components = append(b.Components, component{
			Type: "library", Name: m.Path, Version: m.Version, PURL: "pkg:golang/" + m.Path + "@" + url.QueryEscape(m.Version),
			Properties: []property{{"go.sum", m.Sum}},
		})
	}
	slices.SortFunc(b.Components, func(a, b component) int { return strings.Compare(a.Name, b.Name) })
	text, err := json.MarshalIndent(b, "", " ")
	return append(text, '\n'), err
}
