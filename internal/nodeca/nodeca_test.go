// SPDX-License-Identifier: Apache-2.0

package nodeca

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var names = []string{"ca.crt", "ca.key", "server.crt", "server.key", "client.crt", "client.key"}

// content is what stands in each file of the directory.
func content(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		all[name] = string(text)
	}
	return all
}

// differ names the files that are not as they were.
func differ(before, after map[string]string) (changed []string) {
	for _, name := range names {
		if before[name] != after[name] {
			changed = append(changed, name)
		}
	}
	return changed
}

func ensured(t *testing.T, dir string, hosts []string, now time.Time) (Files, bool) {
	t.Helper()
	f, changed, err := Ensure(dir, hosts, now)
	if err != nil {
		t.Fatal(err)
	}
	return f, changed
}

// works has a client and a server of the set shake hands, at that time, and a client
// without a certificate be refused.
func works(t *testing.T, f Files, now time.Time, host string) {
	t.Helper()
	ca, err := os.ReadFile(f.CA)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	server, err := tls.LoadX509KeyPair(f.Server, f.ServerKey)
	if err != nil {
		t.Fatal(err)
	}
	client, err := tls.LoadX509KeyPair(f.Client, f.ClientKey)
	if err != nil {
		t.Fatal(err)
	}
	at := func() time.Time { return now }
	shake := func(certificates ...tls.Certificate) error {
		a, b := net.Pipe()
		defer a.Close()
		served := make(chan error, 1)
		go func() {
			defer b.Close()
			served <- tls.Server(b, &tls.Config{
				Certificates: []tls.Certificate{server}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, Time: at,
				SessionTicketsDisabled: true,
			}).Handshake()
		}()
		c := tls.Client(a, &tls.Config{RootCAs: pool, ServerName: host, Certificates: certificates, Time: at})
		err := c.Handshake()
		if err == nil {
			_, err = c.Read(make([]byte, 1)) // a refusal comes after the client's last message
		}
		a.Close()
		return errors.Join(<-served, ignoreEnd(err))
	}
	if err := shake(client); err != nil {
		t.Errorf("%s: %v", host, err)
	}
	if err := shake(); err == nil {
		t.Error("a client without a certificate is let in")
	}
	if err := shake(server); err == nil {
		t.Error("the server's certificate is good for a client")
	}
}

// ignoreEnd: a server that is content closes.
func ignoreEnd(err error) error {
	var alert tls.AlertError
	if errors.As(err, &alert) {
		return err
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return err
	}
	return nil
}

func TestASetIsMadeOnceAndThenLeftAlone(t *testing.T) {
	t.Parallel()
	dir, now := filepath.Join(t.TempDir(), "etc", "tls"), time.Now()
	hosts := []string{"Tarn.Corp.Example.", "[fd00::1]", "10.0.0.1"}
	f, changed := ensured(t, dir, hosts, now)
	if !changed || f != In(dir) {
		t.Errorf("changed %v, %+v", changed, f)
	}
	before := content(t, dir)
	if _, changed := ensured(t, dir, []string{"10.0.0.1", "fd00::1", "tarn.corp.example", "localhost"}, now.Add(24*time.Hour)); changed {
		t.Error("a second run changed something")
	}
	if d := differ(before, content(t, dir)); d != nil {
		t.Errorf("a second run changed %v", d)
	}
	own, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"localhost", "127.0.0.1", "::1", "tarn", "tarn.corp.example", "fd00::1", "10.0.0.1", own} {
		works(t, f, now, host)
	}
	for _, name := range names {
		want := fs.FileMode(certMode)
		if filepath.Ext(name) == ".key" {
			want = keyMode
		}
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, tempName)); left != nil {
		t.Errorf("left: %v", left)
	}
}

func TestACertificateIsRenewedWhenAThirdIsLeftAndKeepsItsKey(t *testing.T) {
	t.Parallel()
	dir, now := t.TempDir(), time.Now()
	f, _ := ensured(t, dir, nil, now)
	for _, c := range []struct {
		after time.Duration
		want  []string
	}{
		{leafLife * 2 / 3 * 99 / 100, nil},
		{leafLife*2/3 + 24*time.Hour, []string{"server.crt", "client.crt"}},
		{leafLife*2/3 + 48*time.Hour, nil},
		{caLife*2/3 + 24*time.Hour, []string{"ca.crt", "server.crt", "client.crt"}},
		{caLife * 3, []string{"ca.crt", "server.crt", "client.crt"}},
	} {
		before := content(t, dir)
		at := now.Add(c.after)
		_, changed := ensured(t, dir, nil, at)
		if d := differ(before, content(t, dir)); !slices.Equal(d, c.want) || changed != (c.want != nil) {
			t.Errorf("after %v: changed %v, want %v", c.after, d, c.want)
		}
		works(t, f, at, "localhost")
	}
}

// TestARenewalNeverKeepsAClientFromTarn: whatever of a new set is there already, and
// whatever each side has read already, they go together.
func TestARenewalNeverKeepsAClientFromTarn(t *testing.T) {
	t.Parallel()
	dir, now := t.TempDir(), time.Now()
	ensured(t, dir, nil, now)
	late := now.Add(caLife * 2 / 3)
	ensured(t, dir, nil, late.Add(-leafLife*2/3)) // the leaves are nearly as old as they get
	before := content(t, dir)
	at := late.Add(24 * time.Hour)
	ensured(t, dir, nil, at)
	after := content(t, dir)
	if d := differ(before, after); !slices.Equal(d, []string{"ca.crt", "server.crt", "client.crt"}) {
		t.Fatalf("renewed: %v", d)
	}
	for mask := range 8 {
		mixed := filepath.Join(t.TempDir(), "mixed")
		if err := os.Mkdir(mixed, dirMode); err != nil {
			t.Fatal(err)
		}
		for i, name := range names {
			text := after[name]
			if filepath.Ext(name) == ".crt" && mask>>(i/2)&1 == 0 {
				text = before[name]
			}
			if err := os.WriteFile(filepath.Join(mixed, name), []byte(text), keyMode); err != nil {
				t.Fatal(err)
			}
		}
		works(t, In(mixed), at, "tarn")
	}
}

func TestWhatDoesNotGoTogetherIsMended(t *testing.T) {
	t.Parallel()
	now := time.Now()
	foreign := t.TempDir()
	ensured(t, foreign, nil, now)
	others := content(t, foreign)
	for what, c := range map[string]struct {
		spoil func(t *testing.T, dir string)
		want  []string
	}{
		"a certificate is missing":     {remove("server.crt"), []string{"server.crt"}},
		"a key is missing":             {remove("client.key"), []string{"client.crt", "client.key"}},
		"the CA is missing":            {remove("ca.crt"), []string{"ca.crt"}}, // from its key, which signed the others
		"the CA's key is missing":      {remove("ca.key"), []string{"ca.crt", "ca.key", "server.crt", "client.crt"}},
		"half of a certificate":        {half("client.crt"), []string{"client.crt"}},
		"half of a key":                {half("server.key"), []string{"server.crt", "server.key"}},
		"an empty CA":                  {write("ca.crt", ""), []string{"ca.crt"}},
		"another key":                  {write("server.key", others["server.key"]), []string{"server.crt", "server.key"}},
		"another CA's certificate":     {write("server.crt", others["server.crt"]), []string{"server.crt"}},
		"another CA":                   {write("ca.crt", others["ca.crt"]), []string{"ca.crt"}},
		"the client's as the server's": {swap("server", "client"), names[2:]},
		"a key that everybody reads":   {mode("ca.key", 0o644), []string{"ca.crt", "ca.key", "server.crt", "client.crt"}},
		"a key that a group reads":     {mode("server.key", 0o640), nil},
		"a link":                       {link("server.key", filepath.Join(foreign, "server.key")), []string{"server.crt", "server.key"}},
		"what a crash left":            {write(".new-123", "half"), nil},
		"all files are empty": {func(t *testing.T, dir string) {
			for _, name := range names {
				write(name, "")(t, dir)
			}
		}, names},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			f, _ := ensured(t, dir, nil, now)
			before := content(t, dir)
			c.spoil(t, dir)
			_, changed := ensured(t, dir, nil, now)
			// As against what it was before it was spoilt.
			if d := differ(before, content(t, dir)); !slices.Equal(d, c.want) || changed != (len(c.want) > 0) {
				t.Errorf("changed %v (%v), want %v", d, changed, c.want)
			}
			works(t, f, now, "localhost")
			if _, changed := ensured(t, dir, nil, now); changed {
				t.Error("a second run changed something")
			}
			if left, _ := filepath.Glob(filepath.Join(dir, tempName)); left != nil {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func at(dir, name string) string { return filepath.Join(dir, name) }

func remove(name string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		if err := os.Remove(at(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

func write(name, text string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		if err := os.WriteFile(at(dir, name), []byte(text), keyMode); err != nil {
			t.Fatal(err)
		}
	}
}

func half(name string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		info, err := os.Stat(at(dir, name))
		if err == nil {
			err = os.Truncate(at(dir, name), info.Size()/2)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func mode(name string, m fs.FileMode) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		if err := os.Chmod(at(dir, name), m); err != nil {
			t.Fatal(err)
		}
	}
}

func link(name, to string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		remove(name)(t, dir)
		if err := os.Symlink(to, at(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

func swap(a, b string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		for _, ext := range []string{".crt", ".key"} {
			for _, names := range [][2]string{{a + ext, "x"}, {b + ext, a + ext}, {"x", b + ext}} {
				if err := os.Rename(at(dir, names[0]), at(dir, names[1])); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

func TestOtherNamesNeedAnotherCertificateOnly(t *testing.T) {
	t.Parallel()
	dir, now := t.TempDir(), time.Now()
	f, _ := ensured(t, dir, nil, now)
	before := content(t, dir)
	ensured(t, dir, []string{"tarn.tarn.svc"}, now)
	if d := differ(before, content(t, dir)); !slices.Equal(d, []string{"server.crt"}) {
		t.Errorf("changed %v", d)
	}
	works(t, f, now, "tarn.tarn.svc")
}

func TestWhatIsNoHostOrNoPlaceIsRefused(t *testing.T) {
	t.Parallel()
	open := filepath.Join(t.TempDir(), "open")
	if err := errors.Join(os.Mkdir(open, 0o777), os.Chmod(open, 0o777)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var many []string
	for i := range maxHosts {
		many = append(many, fmt.Sprintf("host%d", i))
	}
	for what, c := range map[string]struct {
		dir   string
		hosts []string
	}{
		"an empty name":                   {t.TempDir(), []string{""}},
		"a name with a slash":             {t.TempDir(), []string{"a/b"}},
		"a name with a port":              {t.TempDir(), []string{"tarn:5050"}},
		"a wildcard":                      {t.TempDir(), []string{"*.corp.example"}},
		"more names than a handshake has": {t.TempDir(), many},
		"a directory that all may write":  {open, nil},
		"a file":                          {file, nil},
	} {
		if _, changed, err := Ensure(c.dir, c.hosts, time.Now()); err == nil || changed {
			t.Errorf("%s: changed %v, %v", what, changed, err)
		}
	}
}

func TestRunsAtTheSameTimeMakeOneSet(t *testing.T) {
	t.Parallel()
	dir, now := t.TempDir(), time.Now()
	var made sync.Map
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			_, changed, err := Ensure(dir, nil, now)
			if err != nil {
				t.Error(err)
			}
			if changed {
				made.Store(i, true)
			}
		})
	}
	wg.Wait()
	n := 0
	made.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d runs of 16 made something", n)
	}
	works(t, In(dir), now, "localhost")
}

// TestADirectoryThatOthersCouldSwapIsRefused: root would write into whatever they put in
// its place.
func TestADirectoryThatOthersCouldSwapIsRefused(t *testing.T) {
	root := t.TempDir()
	theirs := filepath.Join(root, "theirs")
	if err := errors.Join(os.MkdirAll(filepath.Join(theirs, "tls"), 0o755), os.Chmod(theirs, 0o777), os.Symlink(theirs, filepath.Join(root, "link"))); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{filepath.Join(theirs, "tls"), filepath.Join(root, "link/tls"), filepath.Join(root, "link/../theirs/tls")} {
		if _, _, err := Ensure(dir, nil, time.Now()); err == nil || !strings.Contains(err.Error(), theirs+" may be changed by others") {
			t.Errorf("%s: %v", dir, err)
		}
	}
	if entries, err := os.ReadDir(filepath.Join(theirs, "tls")); err != nil || len(entries) > 0 {
		t.Errorf("it made %v, %v", entries, err)
	}
	if err := os.Chmod(theirs, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Ensure(filepath.Join(theirs, "tls"), nil, time.Now()); err != nil {
		t.Errorf("where nobody can rename another's: %v", err)
	}
}
