// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"tarn/hosts"
	"tarn/internal/nodeca"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// exitError ends the program with a status of its own, and without another word.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func newHostsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hosts",
		Short: "Have this node's container runtime ask tarn first",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newHostsInstallCommand(), newHostsCheckCommand(), newHostsRemoveCommand(), newHostsSyncCommand())
	return cmd
}

func certsDirFlag(flags *pflag.FlagSet, dir *string) {
	flags.StringVar(dir, "certs-dir", hosts.DefaultCertsDir, "the runtime's `directory` of registries; dockerd's is /etc/docker/certs.d")
}

func mirrorFlags(flags *pflag.FlagSet, m *hosts.Mirror) {
	flags.StringVar(&m.URL, "url", hosts.DefaultURL, "where tarn listens")
	flags.StringVar(&m.CA, "ca", "", "`file` with what tarn's certificate is signed by")
	flags.StringVar(&m.ClientCert, "client-cert", "", "`file` with the certificate that the runtime shows tarn")
	flags.StringVar(&m.ClientKey, "client-key", "", "`file` with its key")
}

func newHostsInstallCommand() *cobra.Command {
	var o hosts.Options
	var format, config, tlsDir, tlsUser string
	var dry, withTLS bool
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Write the hosts.toml that has containerd ask tarn first",
		Long: `Write _default/hosts.toml, which has containerd, and dockerd 29 and later, ask
tarn first for each registry that has no directory of its own, and the registry
itself while tarn does not answer. It is read at each pull: nothing is restarted.

What somebody else has written is left alone, and said. Registries whose
directory has certificates, or settings, go past tarn; --registry writes one's
settings so that its certificates stay in use.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			switch format {
			case "hosts.toml":
			case "registries.conf":
				names, err := registriesOf(o.Registries, config)
				if err != nil {
					return err
				}
				text, err := hosts.RegistriesConf(o.Mirror.URL, names)
				fmt.Fprint(out, text)
				return err
			default:
				return fmt.Errorf("--format %q: must be hosts.toml or registries.conf", format)
			}
			if withTLS {
				if err := useTLS(out, &o.Mirror, tlsDir, tlsUser, cmd.Flags().Changed("url"), dry); err != nil {
					return err
				}
			}
			plan, err := hosts.PlanInstall(o)
			if err != nil {
				return err
			}
			return carryOut(out, plan, dry, "wrote", "nothing to do: it is installed already")
		},
	}
	certsDirFlag(cmd.Flags(), &o.CertsDir)
	mirrorFlags(cmd.Flags(), &o.Mirror)
	cmd.Flags().StringArrayVar(&o.Registries, "registry", nil, "write settings for this `HOST[:PORT]` only; may be given more than once")
	cmd.Flags().BoolVar(&withTLS, "tls", false, "make certificates for this node, or renew them, and have containerd and tarn show them to each other")
	cmd.Flags().StringVar(&tlsDir, "tls-dir", "/etc/tarn/tls", "the `directory` for them")
	cmd.Flags().StringVar(&tlsUser, "tls-user", "", "the `user` that tarn runs as, who may read its key (default tarn, where there is such a user)")
	cmd.Flags().StringVar(&format, "format", "hosts.toml", "registries.conf prints settings for podman, buildah, skopeo and CRI-O instead")
	cmd.Flags().StringVar(&config, "config", os.Getenv(configVariable), "tarn's configuration `file`, whose registries have a table in registries.conf; without it, $"+configVariable)
	cmd.Flags().BoolVar(&dry, "dry-run", false, "show what would be changed, and change nothing")
	return cmd
}

// registriesOf are those that are named, or else those that tarn's configuration lists
// and those that most images come from.
func registriesOf(named []string, config string) ([]string, error) {
	if len(named) > 0 {
		return named, nil
	}
	cfg, err := loadConfig(config)
	if err != nil {
		return nil, err
	}
	names := slices.Clone(hosts.PublicRegistries)
	for _, u := range cfg.Upstreams {
		if !slices.Contains(names, u.Name) {
			names = append(names, u.Name)
		}
	}
	return names, nil
}

// useTLS makes what certificates are missing or old, and names them in the mirror.
func useTLS(out io.Writer, m *hosts.Mirror, dir, owner string, urlGiven, dry bool) error {
	if !urlGiven {
		m.URL = strings.Replace(hosts.DefaultURL, "http:", "https:", 1)
	}
	u, err := url.Parse(m.URL)
	if err != nil || u.Scheme != "https" {
		return fmt.Errorf("--url %q: must be https://HOST:PORT with --tls", m.URL)
	}
	files := nodeca.In(dir)
	m.CA, m.ClientCert, m.ClientKey = files.CA, files.Client, files.ClientKey
	if dry {
		fmt.Fprintf(out, "would make certificates in %s, or leave those that are good\n", dir)
		return nil
	}
	_, changed, err := nodeca.Ensure(dir, []string{u.Hostname()}, time.Now())
	if err != nil {
		return err
	}
	if err := giveTo(owner, files.ServerKey); err != nil {
		return err
	}
	if changed {
		fmt.Fprintf(out, "made certificates in %s\n", dir)
	}
	fmt.Fprintf(out, "tarn shows and asks for them with this in its configuration:\n  tls: {cert_file: %s, key_file: %s, client_ca_file: %s}\n", files.Server, files.ServerKey, files.CA)
	return nil
}

// giveTo has the user that tarn runs as own its key, which nobody else may read. A
// user that nobody named need not be there.
func giveTo(name, key string) error {
	u, err := user.Lookup(cmp.Or(name, "tarn"))
	if err != nil && name == "" {
		return nil
	}
	if err != nil {
		return fmt.Errorf("--tls-user: %w", err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return fmt.Errorf("--tls-user %s: its id %q is not a number", u.Username, u.Uid)
	}
	return os.Chown(key, uid, -1)
}

// carryOut applies the plan and says what was done, or shows what would be.
func carryOut(out io.Writer, plan hosts.Plan, dry bool, done, nothing string) error {
	if !dry {
		if err := plan.Apply(); err != nil {
			return err
		}
	}
	switch {
	case plan.Empty():
		fmt.Fprintln(out, nothing)
	case dry:
		fmt.Fprint(out, printable(plan.Diff()))
	default:
		for _, path := range plan.Paths() {
			fmt.Fprintln(out, done, path)
		}
	}
	for _, line := range plan.Notes {
		fmt.Fprintln(out, indented(line))
	}
	return nil
}

// printable is text out of files that others have written, without what a terminal
// obeys; indented has none of its further lines look like one of tarn's own.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && r != '\t' && !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, text)
}

func indented(text string) string { return strings.ReplaceAll(printable(text), "\n", "\n    ") }

func newHostsRemoveCommand() *cobra.Command {
	var dir string
	var registries []string
	var dry bool
	cmd := &cobra.Command{
		Use:   "remove",
		Short: "Take away what tarn hosts install wrote",
		Long: `Take away what tarn hosts install wrote, with the directories that it made, and
nothing else. Pulls go to the registries themselves from then on.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			plan, err := hosts.PlanRemove(dir, registries)
			if err != nil {
				return err
			}
			return carryOut(cmd.OutOrStdout(), plan, dry, "removed", "nothing to do: install wrote nothing that is still there")
		},
	}
	certsDirFlag(cmd.Flags(), &dir)
	cmd.Flags().StringArrayVar(&registries, "registry", nil, "only the settings of this `HOST[:PORT]`; may be given more than once")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "show what would be removed, and remove nothing")
	return cmd
}

func newHostsCheckCommand() *cobra.Command {
	var o hosts.CheckOptions
	var output string
	cmd := &cobra.Command{
		Use:   "check [REGISTRY]",
		Short: "Say whether this node's containerd pulls through tarn, and why not",
		Long: `Read what containerd reads, and say whether its pulls go through tarn, or why
not and the line to change. With --live it is made to pull an image of some KB
that only tarn has, and to remove it again, which proves it.

The exit status is 0 where tarn is used, 1 where it is not, and 2 where that
cannot be told.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.Registry = args[0]
			}
			report := hosts.Check(cmd.Context(), o)
			switch output {
			case "json":
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				if err := e.Encode(report); err != nil {
					return err
				}
			case "text":
				printReport(cmd.OutOrStdout(), report)
			default:
				return fmt.Errorf("-o %q: must be text or json", output)
			}
			switch report.Verdict {
			case hosts.Used:
				return nil
			case hosts.NotUsed:
				return exitError(1)
			}
			return exitError(2)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&o.Live, "live", false, "have the runtime pull an image that only tarn has")
	flags.StringVar(&o.Socket, "socket", "", "the runtime's `socket`; without it, the first that is there of containerd's, k3s's and CRI-O's")
	flags.StringVar(&o.Config, "config", "", "containerd's configuration `file`; without it, the one on its command line")
	flags.StringVar(&o.Version, "containerd-version", "", "containerd's `version`, where no socket tells it")
	flags.StringVar(&o.URL, "url", hosts.DefaultURL, "where tarn listens")
	flags.StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

func printReport(out io.Writer, r hosts.Report) {
	fmt.Fprintf(out, "%s: %s\n", r.Verdict, indented(r.Reason))
	if r.Fix != "" {
		fmt.Fprintf(out, "  to do: %s\n", indented(r.Fix))
	}
	for _, note := range r.Notes {
		fmt.Fprintf(out, "  note: %s\n", indented(note))
	}
}

// instanceVariable names a tarn for who runs beside it, and nobody else.
const instanceVariable = "TARN_INSTANCE"

// syncEvery is how often sync asks whether tarn answers.
const syncEvery = time.Second

func newHostsSyncCommand() *cobra.Command {
	var s hosts.Sync
	cmd := &cobra.Command{
		Use:   "sync",
		Short: "Keep the hosts.toml in place while tarn answers, and only then",
		Long: `Keep the hosts.toml in place while tarn answers, and take it away when it does
not, and at the end. _default is a link to /run/tarn-hosts meanwhile, which leads
nowhere after a restart of the machine: then it is as if it were not there. It
is for a pod or a unit beside tarn, where nobody is to install anything. Where both
have the same $TARN_INSTANCE, such as the pod's UID, no other tarn on the port will do.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, os.Interrupt)
			defer stop()
			s.Client = &http.Client{Timeout: 2 * syncEvery, Transport: &http.Transport{DisableKeepAlives: true}}
			s.Every = syncEvery
			s.Instance = os.Getenv(instanceVariable)
			s.Told = func(message string) { fmt.Fprintln(cmd.OutOrStdout(), message) }
			err := s.Run(ctx)
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	}
	certsDirFlag(cmd.Flags(), &s.CertsDir)
	mirrorFlags(cmd.Flags(), &s.Mirror)
	return cmd
}
