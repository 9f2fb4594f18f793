// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"runtime"
	"strings"
	"time"

	"tarn/hosts"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// maxSupportFile bounds what one file of the archive takes of this process' memory.
const maxSupportFile = 16 << 20

// supportPatience bounds how long the daemon, or the runtime, is waited for, for each
// file.
const supportPatience = 20 * time.Second

func newSupportCommand() *cobra.Command {
	var d daemon
	cmd := d.register(&cobra.Command{
		Use:   "support [FILE]",
		Short: "Write an archive for a bug report",
		Long: `Write an archive for a bug report: FILE, or tarn-support-TIME.tar.gz here, which
only you may read; with - it is written to standard output, as from a pod that can
write nowhere:

  kubectl -n tarn exec POD -- tarn support - > tarn-support.tar.gz

In it are versions, the configuration, the environment, what the daemon says of
itself, its metrics and goroutines, and what "tarn hosts check" says. What cannot be
had is named with the reason, so that it is of use also while the daemon is away.

Credentials are not in it, nor what is in the files that the configuration names.
Names of images, repositories, registries and hosts are: look through it before you
post it.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := "tarn-support-" + time.Now().UTC().Format("20060102-150405")
			file := name + ".tar.gz"
			if len(args) > 0 {
				file = args[0]
			}
			return d.support(cmd, name, file)
		},
	})
	cmd.Flags().MarkHidden("output") // it has one form
	return cmd
}

// support writes the archive, whose files lie in a folder of that name.
func (d *daemon) support(cmd *cobra.Command, name, file string) (err error) {
	out, told := io.Writer(os.Stdout), cmd.OutOrStdout()
	if file == "-" {
		told = cmd.ErrOrStderr()
	} else {
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%s is there already, and is not written over: name another file", file)
		}
		if err != nil {
			return fmt.Errorf("%w; name a file elsewhere, or - for standard output", err)
		}
		defer func() {
			if cerr := f.Close(); err == nil {
				err = cerr
			}
			if err != nil {
				os.Remove(file)
			}
		}()
		out = f
	}
	parts := d.gather(cmd.Context())
	if err := writeArchive(out, name, parts); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	if file != "-" {
		fmt.Fprintf(told, "wrote %s, which only you may read\n", file)
	}
	fmt.Fprint(told, contents(parts))
	return nil
}

// supportPart is one file of the archive, or why it is not there.
type supportPart struct {
	name, what string
	data       []byte
	err        error
}

// gather has all parts, one after the other.
func (d *daemon) gather(ctx context.Context) []supportPart {
	ctx, cancel := context.WithTimeout(ctx, 3*supportPatience) // a daemon that hangs does so each time
	defer cancel()
	process, report := d.process(ctx)
	goroutines := supportPart{name: "goroutines.txt", what: "what the daemon is at", data: []byte(report.Goroutines), err: process.err}
	config := supportPart{name: "config.yaml", what: "the configuration file, without comments and secrets"}
	config.data, config.err = readReportedConfig(cmp.Or(d.config, report.Config))
	return []supportPart{
		{name: "version.txt", what: "versions of this command and of the kernel", data: programVersions()},
		config,
		{name: "environment.txt", what: "what of this command's environment bears upon tarn", data: []byte(strings.Join(reportedEnvironment(os.Environ()), "\n") + "\n")},
		process,
		goroutines,
		d.part(ctx, "status.json", "how the daemon does", "/api/v1/status"),
		d.part(ctx, "ready.json", "what its readiness says", "/readyz"),
		d.part(ctx, "decisions.json", "what it decided last, with names of images", "/api/v1/decisions"),
		d.part(ctx, "flights.json", "downloads that run, with names of images", "/api/v1/flights"),
		d.part(ctx, "upstreams.json", "its registries", "/api/v1/upstreams"),
		d.part(ctx, "metrics.txt", "its metrics", "/metrics"),
		checked(ctx),
	}
}

// process is what the daemon says of its process, but for the goroutines, which are
// more legible as they are.
func (d *daemon) process(ctx context.Context) (p supportPart, report processReport) {
	p = d.part(ctx, "process.json", "the daemon's version, arguments and environment", "/api/v1/process")
	if p.err == nil {
		p.err = json.Unmarshal(p.data, &report)
	}
	if p.err == nil {
		short := report
		short.Goroutines = "in goroutines.txt"
		p.data, p.err = json.MarshalIndent(short, "", "  ")
	}
	return p, report
}

// part is an answer of the daemon.
func (d *daemon) part(ctx context.Context, name, what, path string) supportPart {
	p := supportPart{name: name, what: what}
	ctx, cancel := context.WithTimeout(ctx, supportPatience)
	defer cancel()
	resp, err := d.ask(ctx, "GET", path, nil)
	if err != nil {
		p.err = err
		return p
	}
	defer resp.Body.Close()
	if p.data, p.err = io.ReadAll(io.LimitReader(resp.Body, maxSupportFile+1)); len(p.data) > maxSupportFile {
		p.data, p.err = nil, fmt.Errorf("it has more than %s", size(maxSupportFile))
	}
	return p
}

// checked is what tarn hosts check says here.
func checked(ctx context.Context) supportPart {
	ctx, cancel := context.WithTimeout(ctx, supportPatience)
	defer cancel()
	var text bytes.Buffer
	printReport(&text, hosts.Check(ctx, hosts.CheckOptions{URL: hosts.DefaultURL}))
	return supportPart{name: "hosts-check.txt", what: `what "tarn hosts check" says here`, data: text.Bytes()}
}

func readReportedConfig(path string) ([]byte, error) {
	if path == "" {
		return nil, errors.New("none is named, and the daemon says none: name it with --config, if there is one")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err == nil && len(data) > maxConfigBytes {
		err = fmt.Errorf("%s has more than %d bytes", path, maxConfigBytes)
	}
	if err != nil {
		return nil, err
	}
	return reportedConfig(data)
}

func programVersions() []byte {
	var kernel unix.Utsname
	text := fmt.Sprintf("tarn %s (commit %s) %s %s/%s, %d processors\n", version, commit, runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU())
	if err := unix.Uname(&kernel); err == nil {
		text += fmt.Sprintf("%s %s %s\n", unix.ByteSliceToString(kernel.Sysname[:]), unix.ByteSliceToString(kernel.Release[:]), unix.ByteSliceToString(kernel.Version[:]))
	}
	return []byte(text)
}

// askedFor is what an error of net/http says besides the reason.
var askedFor = regexp.MustCompile(`Get "http://[^"]*": `)

// contents says what is in the archive, and what is not.
func contents(parts []supportPart) string {
	var text strings.Builder
	var reasons []string                 // why what is missing could not be had, in order
	missing := make(map[string][]string) // for which reason
	fmt.Fprintln(&text, "in it are:")
	for _, p := range parts {
		if p.err == nil {
			fmt.Fprintf(&text, "  %-16s %s (%s)\n", p.name, p.what, size(int64(len(p.data))))
			continue
		}
		reason := printable(withoutSecrets(askedFor.ReplaceAllString(p.err.Error(), "")))
		if missing[reason] == nil {
			reasons = append(reasons, reason)
		}
		missing[reason] = append(missing[reason], p.name)
	}
	for _, reason := range reasons {
		fmt.Fprintf(&text, "could not be had: %s\n  %s\n", strings.Join(missing[reason], ", "), indented(reason))
	}
	fmt.Fprintln(&text, "Look through it before you post it: names of images, repositories, registries and hosts are in it. Credentials are not.")
	return text.String()
}

// writeArchive writes what there is, and first of all what that is.
func writeArchive(out io.Writer, name string, parts []supportPart) error {
	z := gzip.NewWriter(out)
	w := tar.NewWriter(z)
	now := time.Now()
	for _, p := range append([]supportPart{{name: "README.txt", data: []byte(contents(parts))}}, parts...) {
		if p.err != nil {
			continue
		}
		if err := w.WriteHeader(&tar.Header{Name: path.Join(name, p.name), Mode: 0o600, Size: int64(len(p.data)), ModTime: now}); err != nil {
			return err
		}
		if _, err := w.Write(p.data); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), z.Close())
}
