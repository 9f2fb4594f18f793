// SPDX-License-Identifier: Apache-2.0

// Command image writes tarn's container image as an OCI archive, from programs that
// are built and from Debian's certificates.
//
// Contract: the same input gives the same bytes, wherever and whenever it is run. The
// image has no shell and no loader, and everything in it stands in entries.
//
// Failure model: the archive is written under another name first; what is under the
// final one is whole.
//
// It never builds a program, and never uses the network.
package main

import (
	"debug/buildinfo"
	"debug/elf"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// settings are what the command line says.
type settings struct {
	out          string
	name         string // of the image, with its tag
	version      string
	commit       string
	created      time.Time
	certificates string // a folder of *.crt
	certsVersion string // of the package that they are from
	license      string
	sbom         string
}

func main() {
	var s settings
	var epoch int64
	flag.StringVar(&s.out, "out", "tarn.oci.tar", "the archive")
	flag.StringVar(&s.sbom, "sbom", "", "also write the bill of materials of the first program here")
	flag.StringVar(&s.name, "name", "registry.example/tarn:devel", "name of the image")
	flag.StringVar(&s.version, "version", "devel", "version of tarn")
	flag.StringVar(&s.commit, "commit", "unknown", "commit that it is built from")
	flag.Int64Var(&epoch, "epoch", 0, "time of that, in seconds since 1970")
	flag.StringVar(&s.certificates, "certificates", "/usr/share/ca-certificates/mozilla", "folder of Debian's ca-certificates")
	flag.StringVar(&s.certsVersion, "certificates-version", "unknown", "version of that package")
	flag.StringVar(&s.license, "license", "LICENSE", "text of the licence")
	flag.Parse()
	s.created = time.Unix(epoch, 0).UTC()
	if err := s.write(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

// write makes the archive of these programs, one for each platform.
func (s settings) write(programs []string) error {
	if len(programs) == 0 {
		return errors.New("name the programs, one for each platform")
	}
	a := newArchive(s.created)
	var manifests []v1.Descriptor
	for i, program := range programs {
		platform, deps, err := inspect(program)
		if err != nil {
			return err
		}
		bill, err := billOf(s, deps)
		if err != nil {
			return err
		}
		if i == 0 && s.sbom != "" {
			if err := os.WriteFile(s.sbom, bill, 0o644); err != nil {
				return err
			}
		}
		files, err := entries(s, program, bill)
		if err != nil {
			return err
		}
		m, err := a.image(s, platform, files)
		if err != nil {
			return fmt.Errorf("%s: %w", program, err)
		}
		manifests = append(manifests, m)
	}
	if err := a.index(s, manifests); err != nil {
		return err
	}
	if err := a.write(s.out); err != nil {
		return err
	}
	fmt.Println(a.top.Digest, s.out)
	return nil
}

// inspect reads what platform a program is for, and refuses one that needs a loader,
// which the image does not have.
func inspect(program string) (p v1.Platform, info *buildinfo.BuildInfo, err error) {
	if info, err = buildinfo.ReadFile(program); err != nil {
		return p, nil, err
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "GOOS":
			p.OS = s.Value
		case "GOARCH":
			p.Architecture = s.Value
		}
	}
	f, err := elf.Open(program)
	if err != nil {
		return p, nil, fmt.Errorf("%s: %w", program, err)
	}
	defer f.Close()
	for _, s := range f.Progs {
		if s.Type == elf.PT_INTERP {
			return p, nil, fmt.Errorf("%s needs a loader: build it with CGO_ENABLED=0", program)
		}
	}
	return p, info, nil
}

// entries are all that the image has. The folder of the data is tarn's own; everything
// else is root's, and tarn cannot change it.
func entries(s settings, program string, bill []byte) ([]entry, error) {
	binary, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	license, err := os.ReadFile(s.license)
	if err != nil {
		return nil, err
	}
	certificates, err := bundle(s.certificates)
	if err != nil {
		return nil, err
	}
	return []entry{
		{"etc/group", 0o644, fmt.Appendf(nil, "root:x:0:\ntarn:x:%d:\n", user), 0},
		{"etc/passwd", 0o644, fmt.Appendf(nil, "root:x:0:0:root:/:/nonexistent\ntarn:x:%[1]d:%[1]d:tarn:/%[2]s:/nonexistent\n", user, dataFolder), 0},
		{"etc/ssl/certs/ca-certificates.crt", 0o644, certificates, 0},
		{"usr/local/bin/tarn", 0o755, binary, 0},
		{"usr/share/doc/tarn/LICENSE", 0o644, license, 0},
		{"usr/share/doc/tarn/sbom.cdx.json", 0o644, bill, 0},
		{dataFolder + "/", 0o700, nil, user},
	}, nil
}

// bundle joins Debian's certificates as its update-ca-certificates does. The file that
// a machine has of that may have others besides, of its operator's.
func bundle(folder string) ([]byte, error) {
	files, err := filepath.Glob(filepath.Join(folder, "*.crt"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no certificates in %s: install Debian's ca-certificates", folder)
	}
	slices.Sort(files)
	var all strings.Builder
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		all.WriteString(strings.TrimRight(string(text), "\n") + "\n")
	}
	return []byte(all.String()), nil
}
