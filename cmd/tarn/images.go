// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"tarn/admin"
	"tarn/images"

	"github.com/docker/go-units"
	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// daemon is the running tarn that a command speaks to.
type daemon struct {
	config, dir, admin, output string
}

func (d *daemon) register(cmd *cobra.Command) *cobra.Command {
	set := cmd.Flags()
	set.StringVar(&d.config, "config", os.Getenv(configVariable), "configuration `file` of the daemon, for where it is asked; without it, $"+configVariable)
	set.StringVar(&d.dir, "dir", "", "data `directory` of the daemon that is meant, where there are several")
	set.StringVar(&d.admin, "admin", "", "`address` of the daemon: unix:/path of its admin socket, or host:port of its admin listener (default found as the daemon chooses it)")
	set.StringVarP(&d.output, "output", "o", "table", "`format`: table or json")
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if d.output != "table" && d.output != "json" {
			return fmt.Errorf("--output: %q is none of table, json", d.output)
		}
		return run(cmd, args)
	}
	return cmd
}

// place is where a daemon may be asked.
type place struct {
	address string // unix:/path or host:port
	// meant is the data directory of the tarn that must answer; "" takes any.
	meant string
}

// places are where the daemon may be asked, in order: the sockets, by the rule by
// which it chose one, but its data directory first, since what is there is nobody
// else's; and then its admin listener.
func (d *daemon) places() (all []place, err error) {
	if d.admin != "" {
		address := strings.TrimSuffix(strings.TrimPrefix(d.admin, "http://"), "/") // as people copy it
		if strings.Contains(address, "://") {
			return nil, fmt.Errorf("--admin: %q is neither host:port nor unix:/path", d.admin)
		}
		return []place{{address: address}}, nil
	}
	c, err := loadConfig(d.config)
	if err != nil {
		return nil, err
	}
	// A directory that nobody named is where one looks first; one that somebody
	// named is the one that is meant.
	meant := ""
	if d.dir != "" {
		c.Dir = d.dir
	}
	dir := realDir(c.Dir)
	if d.dir != "" || c.Dir != defaultDir && c.Dir != userConfig(os.Geteuid()).Dir {
		meant = dir
	}
	switch {
	case c.AdminSocket == socketOff:
	case c.AdminSocket != "":
		all = append(all, place{unixPrefix + c.AdminSocket, meant})
	case !strings.HasPrefix(c.AdminListen, unixPrefix):
		all = append(all, place{unixPrefix + filepath.Join(dir, socketName), ""})
		for _, dir := range runPlaces() {
			all = append(all, place{unixPrefix + filepath.Join(dir, socketName), meant})
		}
	}
	if c.AdminListen != "" {
		all = append(all, place{c.AdminListen, meant})
	}
	if len(all) == 0 {
		return nil, errors.New("admin_socket and admin_listen are off: the daemon cannot be asked")
	}
	return all, nil
}

// ask sends an order and returns the answer, which is the caller's to close. An
// answer that is not 200 is an error with the daemon's words. The order goes to the
// first place where the daemon that is meant answers.
func (d *daemon) ask(ctx context.Context, method, path string, order any) (*http.Response, error) {
	places, err := d.places()
	if err != nil {
		return nil, err
	}
	var data []byte
	if order != nil {
		if data, err = json.Marshal(order); err != nil {
			return nil, err
		}
	}
	var denied, tried []string
	var last, other, readOnly error
	for i := 0; i < len(places); i++ {
		p := places[i]
		resp, err := p.ask(ctx, method, path, data)
		switch {
		case errors.Is(err, fs.ErrPermission):
			denied = append(denied, p.address)
		case err != nil && ctx.Err() != nil:
			return nil, err
		case err != nil:
			tried, last = append(tried, p.address), err
		case resp.StatusCode == http.StatusOK:
			return resp, nil
		case resp.StatusCode == http.StatusMisdirectedRequest: // another tarn's
			tried, other = append(tried, p.address), words(resp)
		case resp.StatusCode == http.StatusForbidden:
			// A listener that only reads. It says where the socket is that was not
			// found, when the daemon was told more than this command.
			readOnly = words(resp)
			if socket := p.socket(ctx); socket != "" && !slices.ContainsFunc(places, func(p place) bool { return p.address == socket }) {
				places = append(places, place{socket, p.meant})
			}
		default:
			return nil, words(resp)
		}
	}
	switch {
	case len(denied) > 0:
		return nil, fmt.Errorf("only the user that tarn runs as may open %s: run this with sudo, or in tarn's pod (kubectl exec)", strings.Join(denied, ", "))
	case readOnly != nil:
		return nil, readOnly
	}
	return nil, fmt.Errorf("is tarn running? It does not answer at %s: %w", strings.Join(tried, ", "), cmp.Or(other, last))
}

// words are what the daemon says to an order that it does not carry out.
func words(resp *http.Response) error {
	defer resp.Body.Close()
	var said struct{ Error string }
	json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&said)
	return errors.New(cmp.Or(said.Error, "the daemon answers "+resp.Status))
}

// socket is where the daemon that answers here says that its admin socket is.
func (p place) socket(ctx context.Context) string {
	resp, err := p.ask(ctx, http.MethodGet, "/api/v1/status", nil)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	var s struct{ AdminSocket string }
	json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&s)
	return s.AdminSocket
}

// readPatience is for a long list of a busy daemon.
const readPatience = 20 * time.Second

func (p place) ask(ctx context.Context, method, path string, order []byte) (*http.Response, error) {
	host, transport := p.address, &http.Transport{DisableKeepAlives: true}
	if socket, ok := strings.CutPrefix(p.address, unixPrefix); ok {
		if err := checkSocketPath(socket); err != nil {
			return nil, err
		}
		host = "localhost"
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}
	} else if h, port, err := net.SplitHostPort(p.address); err == nil && (h == "" || h == "0.0.0.0" || h == "::") {
		host = net.JoinHostPort("localhost", port)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+host+path, bytes.NewReader(order))
	if err != nil {
		return nil, fmt.Errorf("--admin: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodGet { // what is read is in memory: else the daemon hangs
		transport.ResponseHeaderTimeout = readPatience
	}
	if p.meant != "" {
		req.Header.Set(admin.DirHeader, p.meant)
	}
	return (&http.Client{Transport: transport}).Do(req)
}

// do is for an answer that is one document: it is printed as it is, or shown.
func (d *daemon) do(cmd *cobra.Command, method, path string, order, answer any, show func(w io.Writer)) error {
	resp, err := d.ask(cmd.Context(), method, path, order)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var text bytes.Buffer
	if err := json.NewDecoder(io.TeeReader(resp.Body, &text)).Decode(answer); err != nil {
		return fmt.Errorf("the daemon's answer: %w", err)
	}
	if d.output == "json" {
		io.Copy(&text, resp.Body) // the end of its last line
		_, err := text.WriteTo(cmd.OutOrStdout())
		return err
	}
	return shown(cmd, show)
}

// shown prints it at once, so that it fails when it cannot be printed.
func shown(cmd *cobra.Command, show func(w io.Writer)) error {
	var text bytes.Buffer
	show(&text)
	_, err := text.WriteTo(cmd.OutOrStdout())
	return err
}

func size(n int64) string { return units.BytesSize(float64(n)) }

func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return units.HumanDuration(max(0, time.Since(t))) + " ago"
}

func newImagesCommand() *cobra.Command {
	var d daemon
	return d.register(&cobra.Command{
		Use:   "images [IMAGE]...",
		Short: "List the images that are here",
		Long: `List the images that are here, or those that are named: by repository, by tag, or
by a digest, which may be cut short as the list does.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			path := "/api/v1/images"
			if len(args) > 0 {
				path += "?" + url.Values{"image": args}.Encode()
			}
			var answer struct{ Images []images.Image }
			return d.do(cmd, "GET", path, nil, &answer, func(w io.Writer) {
				tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
				defer tw.Flush()
				fmt.Fprintln(tw, "REPOSITORY\tTAG\tDIGEST\tPLATFORMS\tHERE\tOF\tCONFIRMED\tUSED\tPINNED")
				for _, i := range answer.Images {
					pinned := ""
					if i.Pinned {
						pinned = "pinned"
					}
					fmt.Fprintf(tw, "%s/%s\t%s\t%.19s\t%s\t%s\t%s\t%s\t%s\t%s\n", i.Upstream, i.Repository, cmp.Or(i.Tag, "<none>"), i.Digest,
						strings.Join(i.Platforms, ","), size(i.HereBytes), size(i.TotalBytes), ago(i.Confirmed), ago(i.Used), pinned)
				}
			})
		},
	})
}

func newPinCommand() *cobra.Command {
	var d daemon
	var platforms []string
	cmd := d.register(&cobra.Command{
		Use:   "pin [IMAGE]",
		Short: "Keep an image from being evicted",
		Long: `Keep an image from being evicted: what is here of it, and what comes to be.
By tag (name:tag), the pin follows the tag; by digest (name@sha256:...) it stays.
Of what is here, a digest alone will do, also one that is cut short as in the list.
Nothing is downloaded. It is refused when all pins together would not fit, and when
the registry says that there is no such image, or not for these platforms.
Without an image, the pins are listed.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return d.listPins(cmd)
			}
			var answer admin.Pinned
			return d.do(cmd, "POST", "/api/v1/pins", admin.Order{Image: args[0], Platforms: platforms}, &answer, func(w io.Writer) {
				if answer.Warning != "" {
					fmt.Fprintln(cmd.ErrOrStderr(), "tarn: warning:", answer.Warning)
				}
				fmt.Fprintf(w, "pinned %s: %s of %s are here\n", answer.Image, size(answer.HereBytes), size(answer.TotalBytes))
				if answer.HereBytes < answer.TotalBytes || answer.TotalBytes == 0 {
					fmt.Fprintln(w, "what is missing is kept when it is pulled")
				}
			})
		},
	})
	cmd.Flags().StringSliceVar(&platforms, "platform", nil, "`platforms` of an index, such as linux/arm64, or all (default the node's)")
	return cmd
}

func (d *daemon) listPins(cmd *cobra.Command) error {
	var answer struct{ Pins []images.Pin }
	return d.do(cmd, "GET", "/api/v1/pins", nil, &answer, func(w io.Writer) {
		tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		defer tw.Flush()
		fmt.Fprintln(tw, "IMAGE\tPLATFORMS")
		for _, p := range answer.Pins {
			fmt.Fprintf(tw, "%s\t%s\n", p, cmp.Or(strings.Join(p.Platforms, ","), "all"))
		}
	})
}

func newUnpinCommand() *cobra.Command {
	var d daemon
	return d.register(&cobra.Command{
		Use:   "unpin IMAGE",
		Short: "Let a pinned image be evicted again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var answer admin.Unpinned
			return d.do(cmd, "DELETE", "/api/v1/pins", admin.Order{Image: args[0]}, &answer, func(w io.Writer) {
				fmt.Fprintln(w, "unpinned", answer.Image)
			})
		},
	})
}

func newEvictCommand() *cobra.Command {
	var d daemon
	return d.register(&cobra.Command{
		Use:   "evict IMAGE",
		Short: "Remove an image from the store",
		Long: `Remove an image from the store, under whatever names it is known, with all that
no other stored image has. By digest, which may be cut short as in the list, the name
says nothing. Who pulls it just now gets
it whole; the next one has it fetched anew.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var answer admin.Evicted
			return d.do(cmd, "POST", "/api/v1/evict", admin.Order{Image: args[0]}, &answer, func(w io.Writer) {
				fmt.Fprintf(w, "evicted %s: %d objects, %s\n", answer.Image, answer.Objects, size(answer.Bytes))
			})
		},
	})
}

// defaultVerifyRate leaves a disk time for others.
const defaultVerifyRate = "100MiB"

func newVerifyCommand() *cobra.Command {
	var d daemon
	var rate string
	cmd := d.register(&cobra.Command{
		Use:   "verify",
		Short: "Check every stored file against its digest",
		Long: `Check every stored file against its digest. What is not what its digest says is
dropped and named, and the exit code is 1 then. What is asked for meanwhile is served.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			bytesPerSecond, err := parseSize(rate)
			if err != nil || strings.HasSuffix(rate, "%") {
				return fmt.Errorf("--rate: %w", cmp.Or(err, errSize))
			}
			// Who interrupts it ends it in the daemon, too.
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			resp, err := d.ask(ctx, "POST", "/api/v1/verify", admin.Order{Rate: bytesPerSecond.bytes})
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			return d.follow(cmd, resp.Body)
		},
	})
	cmd.Flags().StringVar(&rate, "rate", defaultVerifyRate, "how much is read a second, a `size`; 0 is as fast as the disk")
	return cmd
}

// follow shows how far verifying has come, and what came out.
func (d *daemon) follow(cmd *cobra.Command, lines io.Reader) error {
	var bar *progressbar.ProgressBar
	watched := term.IsTerminal(int(os.Stderr.Fd()))
	var v admin.Verified
	for dec := json.NewDecoder(lines); ; {
		next := admin.Verified{}
		if err := dec.Decode(&next); err != nil {
			break
		}
		v = next
		if watched && bar == nil {
			bar = progressbar.DefaultBytes(max(1, v.OfBytes), "verify")
		}
		if bar != nil {
			bar.Set64(v.Bytes)
		}
	}
	if bar != nil {
		bar.Exit()
	}
	if err := shown(cmd, func(w io.Writer) {
		if d.output == "json" {
			e := json.NewEncoder(w)
			e.SetIndent("", "  ")
			e.Encode(v.Verification)
			return
		}
		for _, b := range v.Bad {
			fmt.Fprintln(w, "bad, dropped:", b)
		}
		for _, m := range v.Missing {
			fmt.Fprintln(w, "missing:     ", m)
		}
		fmt.Fprintf(w, "%d of %d files, %s: %d bad, %d missing\n", v.Files, v.OfFiles, size(v.Bytes), len(v.Bad), len(v.Missing))
	}); err != nil {
		return err
	}
	switch {
	case v.Error != "":
		return errors.New(v.Error)
	case !v.Done:
		return errors.New("verify has not come to its end")
	}
	if n := len(v.Bad) + len(v.Missing); n > 0 {
		return fmt.Errorf("%d of %d files were not as they were stored", n, v.OfFiles)
	}
	return nil
}
