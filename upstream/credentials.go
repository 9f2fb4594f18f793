// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
	"oras.land/oras-go/v2/registry/remote/credentials/trace"
)

// Credentials are where the node's credentials for a registry come from. Images are
// HOST[:PORT]/REPOSITORY. Errors wrap ErrCredentials and hold no secret.
type Credentials interface {
	// Check tells what can be seen to be wrong without running a program.
	Check() error
	// Get returns the secret for the image, the zero value for none.
	Get(ctx context.Context, image string) (Secret, error)
	// Forget makes a later Get look again: the registry has refused the secret.
	Forget(image string)
	// Close ends what still runs.
	Close()
}

// DockerConfig finds the node's credential for one registry in a file like
// docker's config.json: auths, credsStore, credHelpers. The file is looked at
// again when it changes, a helper is asked again after credentialFor or a
// refusal. It is safe for concurrent use.
//
// Its errors wrap ErrCredentials and name the file or the program. They never
// repeat what either said: that may be the secret itself.
type DockerConfig struct {
	path   string
	server string // the registry as docker's file calls it
	// timeout is how long a helper may take; helperTimeout, save in tests.
	timeout time.Duration

	asking singleflight.Group

	mu    sync.Mutex
	known lookup
}

// lookup is the outcome of the last one.
type lookup struct {
	secret Secret
	err    error
	read   time.Time // when it was begun
	until  time.Time
	file   fileState
}

// fileState tells one version of a file from another.
type fileState struct {
	modified time.Time
	size     int64
}

const (
	// credentialFor is how long what a helper said is used; ECR's tokens,
	// the shortest-lived that helpers hand out, hold for hours.
	credentialFor = 5 * time.Minute
	// failureFor keeps a broken helper from being run for each request, and
	// one that hangs from delaying each. A file that was mended is read at
	// once.
	failureFor = 30 * time.Second
	// helperTimeout is how long a helper may take. A pull waits for it.
	helperTimeout = 5 * time.Second
)

// NewDockerConfig reads nothing yet.
func NewDockerConfig(path string, name Name) *DockerConfig {
	return &DockerConfig{path: path, server: credentials.ServerAddressFromRegistry(string(name)), timeout: helperTimeout}
}

// Check tells whether the file is there and is what docker writes. It runs no
// program.
func (c *DockerConfig) Check() error {
	if _, err := c.stat(); err != nil {
		return err
	}
	_, err := c.open()
	return err
}

func (c *DockerConfig) open() (*credentials.DynamicStore, error) {
	store, err := credentials.NewStore(c.path, credentials.StoreOptions{})
	switch {
	case err == nil:
		return store, nil
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w: docker_config %s cannot be read: permission denied", ErrCredentials, c.path)
	}
	return nil, fmt.Errorf("%w: docker_config %s is not what docker writes (JSON with auths, credsStore, credHelpers)", ErrCredentials, c.path)
}

// Forget makes the next Get look again, unless it has just looked: a registry
// may refuse a good secret as often as somebody asks for what there is not.
func (c *DockerConfig) Forget(string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.known.read) > failureFor {
		c.known = lookup{}
	}
}

// Close does nothing: a helper is killed after helperTimeout.
func (c *DockerConfig) Close() {}

// Get returns the secret, the zero value when the file has none for this
// registry, whichever the image.
func (c *DockerConfig) Get(ctx context.Context, _ string) (Secret, error) {
	now := time.Now()
	file, err := c.stat()
	if err != nil {
		return Secret{}, err
	}
	c.mu.Lock()
	known := c.known
	c.mu.Unlock()
	if now.Before(known.until) && known.file == file {
		return known.secret, known.err
	}
	// The lookup has a context of its own, and nobody waits longer for it
	// than a helper may take: one that hangs although it was killed, because
	// a child of it holds the pipe, hangs alone.
	done := c.asking.DoChan("", func() (any, error) {
		hctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.timeout)
		defer cancel()
		found := lookup{file: file, read: time.Now()}
		found.secret, found.err = c.read(hctx)
		found.until = time.Now().Add(credentialFor)
		if found.err != nil {
			found.until = time.Now().Add(failureFor)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.known = found
		return found.secret, found.err
	})
	timeout := time.NewTimer(c.timeout + c.timeout/5)
	defer timeout.Stop()
	select {
	case res := <-done:
		return res.Val.(Secret), res.Err
	case <-timeout.C:
		err := fmt.Errorf("%w: docker_config %s: its credential helper hangs", ErrCredentials, c.path)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.known = lookup{err: err, until: time.Now().Add(failureFor), file: file}
		return Secret{}, err
	case <-ctx.Done():
		return Secret{}, context.Cause(ctx)
	}
}

func (c *DockerConfig) stat() (fileState, error) {
	info, err := os.Stat(c.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fileState{}, fmt.Errorf("%w: docker_config %s does not exist", ErrCredentials, c.path)
	case err != nil:
		return fileState{}, fmt.Errorf("%w: docker_config %s cannot be read: %w", ErrCredentials, c.path, errors.Unwrap(err))
	case !info.Mode().IsRegular():
		return fileState{}, fmt.Errorf("%w: docker_config %s is no file", ErrCredentials, c.path)
	}
	return fileState{info.ModTime(), info.Size()}, nil
}

// maxHelperName is more than any program is called.
const maxHelperName = 100

func (c *DockerConfig) read(ctx context.Context) (Secret, error) {
	store, err := c.open()
	if err != nil {
		return Secret{}, err
	}
	helper := ""
	ctx = trace.WithExecutableTrace(ctx, &trace.ExecutableTrace{
		ExecuteStart: func(name, _ string) { helper = name[:min(len(name), maxHelperName)] },
	})
	found, err := store.Get(ctx, c.server)
	if err == nil {
		return secretOf(found), nil
	}
	if helper == "" {
		return Secret{}, fmt.Errorf("%w: docker_config %s: the entry for %s is not what docker writes", ErrCredentials, c.path, c.server)
	}
	// The error itself holds what the program printed.
	what := "failed"
	var syntax *json.SyntaxError
	var mistyped *json.UnmarshalTypeError
	switch {
	case ctx.Err() != nil:
		what = fmt.Sprintf("did not answer in %v", c.timeout)
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		what = "is not in the PATH"
	case errors.Is(err, fs.ErrPermission):
		what = "may not be executed"
	case errors.As(err, &syntax), errors.As(err, &mistyped):
		what = "printed something that is no credential"
	}
	return Secret{}, fmt.Errorf("%w: docker_config %s: the program %q %s", ErrCredentials, c.path, filepath.Base(helper), what)
}

func secretOf(c auth.Credential) Secret {
	return Secret{Username: c.Username, Password: c.Password, IdentityToken: c.RefreshToken, RegistryToken: c.AccessToken}
}
