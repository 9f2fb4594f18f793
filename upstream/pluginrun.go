// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pluginTimeout is how long a run may take; the kubelet's own limit.
	pluginTimeout = time.Minute
	// maxPluginAnswer bounds what is read of an answer; real ones have some KiB.
	maxPluginAnswer = 1 << 20
	// maxPluginStderr is how much of the end of its stderr is kept.
	maxPluginStderr = 4 << 10
	// pluginPipes is how long the pipes of a run that has ended are waited for: a
	// process that left its group may hold them.
	pluginPipes = time.Second
)

// pluginEnv are the variables of tarn's own environment that a plugin gets: where
// programs and certificates are, and the way out. The kubelet passes all of its own,
// but tarn's may be anything's.
var pluginEnv = []string{
	"PATH", "HOME", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR",
	"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
}

// pluginRequest is a CredentialProviderRequest.
type pluginRequest struct {
	Kind       string `json:"kind"`
	APIVersion string `json:"apiVersion"`
	Image      string `json:"image"`
}

// pluginAnswer is a CredentialProviderResponse.
type pluginAnswer struct {
	Kind          string          `json:"kind"`
	APIVersion    string          `json:"apiVersion"`
	CacheKeyType  string          `json:"cacheKeyType"`
	CacheDuration *pluginDuration `json:"cacheDuration"`
	Auth          map[string]struct {
		Username string `json:"username"`
		Password string `json:"password"`
	} `json:"auth"`
}

// pluginError is why a plugin gave no credential. It wraps ErrCredentials.
type pluginError struct {
	plugin string // its file
	what   string
	stderr string // its last line, "" for none; for the log, not for clients
}

func (e *pluginError) Error() string {
	if e.stderr == "" {
		return e.Brief()
	}
	return e.Brief() + ": " + e.stderr
}
func (e *pluginError) Unwrap() error { return ErrCredentials }

// Brief is the error without what the program wrote.
func (e *pluginError) Brief() string {
	return fmt.Sprintf("%v: the kubelet's plugin %s %s", ErrCredentials, e.plugin, e.what)
}

// run asks the plugin about an image. It ends with the plugin and all of its process
// group, after limit, or when stop is closed.
func (p *provider) run(image string, limit time.Duration, stop <-chan struct{}) (*pluginAnswer, error) {
	request, err := json.Marshal(pluginRequest{"CredentialProviderRequest", p.APIVersion, image})
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(p.plugin, p.Args...)
	cmd.Env = p.environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = pluginPipes
	stderr := &tail{}
	stdout := &capped{full: make(chan struct{})}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(request), stdout, stderr
	if err := cmd.Start(); err != nil {
		return nil, &pluginError{plugin: p.plugin, what: cannotStart(p.plugin, err)}
	}
	killed := supervise(cmd, limit, stop, stdout.full)
	err = cmd.Wait()
	last := p.lastLine(stderr.data, stdout.data, image)
	var exit *exec.ExitError
	switch {
	case killed != "":
		return nil, &pluginError{p.plugin, killed, last}
	case errors.As(err, &exit):
		return nil, &pluginError{p.plugin, "ended with " + exit.Error(), last}
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		return nil, &pluginError{p.plugin, "cannot be spoken to", last}
	}
	return p.decode(stdout.data)
}

// supervise returns when the program has ended, and says why it was killed, if it was.
// What it leaves of its process group is killed, too: before the program is waited for,
// while its number, and so the group's, is no other process's.
func supervise(cmd *exec.Cmd, limit time.Duration, stop, full <-chan struct{}) (killed string) {
	ended := make(chan struct{})
	go func() { // it ends with the program
		defer close(ended)
		for {
			err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	select {
	case <-ended:
	case <-timeout.C:
		killed = fmt.Sprintf("did not answer in %v, and was killed", limit)
	case <-full:
		killed = fmt.Sprintf("printed more than %d bytes, and was killed", maxPluginAnswer)
	case <-stop:
		killed = "was stopped with tarn"
	}
	_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) // ESRCH is as good
	<-ended
	return killed
}

// decode takes an answer as the kubelet does. Its errors quote nothing of it.
func (p *provider) decode(data []byte) (*pluginAnswer, error) {
	a := new(pluginAnswer)
	bad := func(what string) (*pluginAnswer, error) { return nil, &pluginError{plugin: p.plugin, what: what} }
	if err := json.Unmarshal(data, a); err != nil {
		return bad("printed something that is no CredentialProviderResponse")
	}
	switch {
	case a.APIVersion != p.APIVersion:
		return bad("answered in another apiVersion than " + p.APIVersion + ", in which it was asked")
	case a.Kind != "CredentialProviderResponse":
		return bad("printed something that is no CredentialProviderResponse")
	case a.CacheKeyType != "Image" && a.CacheKeyType != "Registry" && a.CacheKeyType != "Global":
		return bad("answered with a cacheKeyType that is not Image, Registry or Global")
	}
	return a, nil
}

func (p *provider) environment() (env []string) {
	for _, name := range pluginEnv {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	for _, v := range p.Env { // the last of a name counts
		env = append(env, v.Name+"="+v.Value)
	}
	return env
}

// cannotStart says why the program did not begin, in what has to be mended.
func cannotStart(path string, err error) string {
	if lacking := lacks(path); lacking != "" {
		return lacking
	}
	if errors.Is(err, syscall.ENOEXEC) {
		return "is no program of this machine (exec format error)"
	}
	return "cannot be started: " + unwrapped(err)
}

func unwrapped(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return "it is not understood why"
}

// lacks says what the program needs and does not have here, "" for nothing that can
// be seen without running it.
func lacks(path string) string {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "does not exist where tarn runs: in a container, bin_dir must be mounted"
	case err != nil:
		return "cannot be looked at: " + unwrapped(err)
	case !info.Mode().IsRegular():
		return "is no file"
	case unix.Access(path, unix.X_OK) != nil:
		return "may not be executed by tarn's user"
	}
	needs := interpreter(path)
	if needs == "" {
		return ""
	}
	if _, err := os.Stat(needs); err != nil {
		return fmt.Sprintf("needs %s, which is not where tarn runs: take a program that is linked statically, or an image of tarn that has it", bounded(needs))
	}
	return ""
}

// interpreter is the file that the kernel starts in the program's place: a script's
// first line names it, and a dynamic program its loader. "" for none.
func interpreter(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	head := make([]byte, 256)
	n, _ := io.ReadFull(f, head)
	if line, ok := strings.CutPrefix(string(head[:n]), "#!"); ok {
		line, _, _ = strings.Cut(line, "\n")
		if words := strings.Fields(line); len(words) > 0 {
			return words[0]
		}
		return ""
	}
	program, err := elf.NewFile(f)
	if err != nil {
		return ""
	}
	for _, part := range program.Progs {
		if part.Type == elf.PT_INTERP && part.Filesz <= 4096 {
			name, _ := io.ReadAll(part.Open())
			return string(bytes.TrimRight(name, "\x00"))
		}
	}
	return ""
}

var (
	secretInURL  = regexp.MustCompile(`//[^/\s@]+@`)
	queryInURL   = regexp.MustCompile(`\?\S+`)
	secretNamed  = regexp.MustCompile(`(?i)((?:bearer|basic)\s+|(?:token|password|secret|key)["']?\s*[=:]\s*)\S+`)
	secretLooked = regexp.MustCompile(`[A-Za-z0-9+/_=.-]{40,}`)
)

// minSecret is the shortest word that is taken out of stderr because it was in stdout.
const minSecret = 4

// lastLine is the last line of stderr, as far as it may be shown: without the image,
// which is a client's affair, without words that stand in the answer or in the configured
// environment, and without what looks like a secret.
func (p *provider) lastLine(stderr, stdout []byte, image string) string {
	lines := strings.Split(strings.TrimSpace(string(stderr)), "\n")
	line := strings.TrimSpace(lines[len(lines)-1])
	_, repository, _ := strings.Cut(image, "/")
	line = strings.ReplaceAll(line, repository, "...")
	secrets := strings.FieldsFunc(string(stdout), func(r rune) bool { return strings.ContainsRune("\" \n\t,{}:", r) })
	for _, v := range p.Env {
		secrets = append(secrets, v.Value)
	}
	for _, s := range secrets {
		if len(s) >= minSecret && strings.Contains(line, s) {
			line = strings.ReplaceAll(line, s, "***")
		}
	}
	line = secretInURL.ReplaceAllString(line, "//")
	line = queryInURL.ReplaceAllString(line, "?...")
	line = secretNamed.ReplaceAllString(line, "$1***")
	line = secretLooked.ReplaceAllString(line, "***")
	return bounded(line)
}

// capped keeps what is written to it up to maxPluginAnswer, and closes full after that.
type capped struct {
	data []byte
	full chan struct{}
}

func (c *capped) Write(p []byte) (int, error) {
	if len(c.data)+len(p) > maxPluginAnswer {
		close(c.full) // once: who writes stops at the first error
		return 0, errors.New("too much")
	}
	c.data = append(c.data, p...)
	return len(p), nil
}

// tail keeps the last maxPluginStderr bytes that are written to it.
type tail struct{ data []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.data = append(t.data, p[max(0, len(p)-maxPluginStderr):]...)
	if over := len(t.data) - maxPluginStderr; over > 0 {
		t.data = append(t.data[:0], t.data[over:]...)
	}
	return len(p), nil
}
