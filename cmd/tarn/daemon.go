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
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tarn/admin"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

// How a command finds the daemon, and asks it.

// daemon is the running tarn that a command speaks to.
type daemon struct {
	config, dir, admin, output string
	// formats are those that the command has besides table and json.
	formats []string
	words   io.Writer // standard error; nil has nothing said
}

// adminVariable has the daemon's address where --admin does not.
const adminVariable = "TARN_ADMIN"

func (d *daemon) register(cmd *cobra.Command) *cobra.Command {
	set := cmd.Flags()
	set.StringVar(&d.config, "config", os.Getenv(configVariable), "configuration `file` of the daemon, for where it is asked; without it, $"+configVariable)
	set.StringVar(&d.dir, "dir", "", "data `directory` of the daemon that is meant, where there are several")
	set.StringVar(&d.admin, "admin", os.Getenv(adminVariable), "`address` of the daemon: unix:/path of its admin socket, or host:port or http://host:port of its admin listener; without it, $"+adminVariable+", or as the daemon chooses it")
	set.StringVarP(&d.output, "output", "o", "table", "`format`: "+strings.Join(append([]string{"table", "json"}, d.formats...), ", "))
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		d.words = cmd.ErrOrStderr()
		formats := append([]string{"table", "json"}, d.formats...)
		if !slices.Contains(formats, d.output) {
			return fmt.Errorf("--output: %q is none of %s", d.output, strings.Join(formats, ", "))
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
		address, err := parseAdmin(d.admin)
		if err != nil {
			return nil, fmt.Errorf("--admin, or $%s: %w", adminVariable, err)
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

// parseAdmin reads an address as people copy it.
func parseAdmin(written string) (address string, err error) {
	wrong := fmt.Errorf("%.200q is neither host:port, http://host:port nor unix:/path", written)
	if path, ok := strings.CutPrefix(written, unixPrefix); ok {
		path = strings.TrimPrefix(path, "//") // as URLs have it
		if !filepath.IsAbs(path) {
			return "", wrong
		}
		return unixPrefix + path, nil
	}
	address = strings.TrimSuffix(strings.TrimPrefix(written, "http://"), "/")
	if _, _, err := net.SplitHostPort(address); err != nil || strings.ContainsAny(address, "/?#@") {
		return "", wrong
	}
	return address, nil
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
			warnOfVersion(d.words, resp.Header.Get(admin.VersionHeader))
			return resp, nil
		case resp.StatusCode == http.StatusMethodNotAllowed: // no command asks a path that it has so
			resp.Body.Close()
			return nil, fmt.Errorf("the daemon does not know this yet: it is tarn %.64s, and this command %s", cmp.Or(printable(resp.Header.Get(admin.VersionHeader)), "of an earlier version"), version)
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

// warnOfVersion says in a line that the daemon is another one than this command. What both
// know works: a version of the API only ever has more.
func warnOfVersion(to io.Writer, daemon string) {
	if to == nil || daemon == version {
		return
	}
	fmt.Fprintf(to, "tarn: note: the daemon is tarn %.64s, this command %s: what one of them does not know yet is missing\n", cmp.Or(printable(daemon), "of an earlier version"), version)
}

// words are what the daemon says to an order that it does not carry out.
func words(resp *http.Response) error {
	defer resp.Body.Close()
	var said admin.Failure
	json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&said)
	return &refusal{cmp.Or(printable(said.Message), "the daemon answers "+resp.Status), printable(said.Next)}
}

// refusal is what the daemon says to what it does not do, and what to do next.
type refusal struct{ message, next string }

func (r *refusal) Error() string { return r.message }

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
	text, err := readAnswer(resp.Body)
	if err == nil && d.output != "json" {
		text = legible(text)
	}
	if err == nil {
		err = json.Unmarshal(text, answer)
	}
	if err != nil {
		return fmt.Errorf("the daemon's answer: %w", err)
	}
	if d.output == "json" {
		_, err := cmd.OutOrStdout().Write(text)
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

// size is in the units of 1024s that the configuration has, too.
func size(n int64) string { return units.BytesSize(float64(n)) }

func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return strings.ToLower(units.HumanDuration(max(0, time.Since(t)))) + " ago"
}
