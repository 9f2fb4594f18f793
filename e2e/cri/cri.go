// SPDX-License-Identifier: Apache-2.0

// Package cri asks a container runtime what a kubelet asks it: to pull images,
// with each kind of credential that the interface knows, and to run pods and
// containers.
//
// It speaks the Container Runtime Interface v1 over a unix socket. Errors are
// those of the runtime, wrapped with the call that failed. It never retries.
package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Auth is a credential for a pull. Every field goes to the runtime as it is,
// the empty ones too: which of them are set decides what a runtime does, for
// instance containerd shows a mirror no credential that has a ServerAddress.
type Auth struct {
	Username, Password string
	Auth               string // base64 of "user:password", in place of the two
	ServerAddress      string
	IdentityToken      string
	RegistryToken      string
}

// Client is a connection to one runtime.
type Client struct {
	conn    *grpc.ClientConn
	images  runtime.ImageServiceClient
	runtime runtime.RuntimeServiceClient
}

// Dial prepares a client for the runtime at this unix socket; the first call
// connects.
func Dial(socket string) (*Client, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", socket, err)
	}
	return &Client{conn, runtime.NewImageServiceClient(conn), runtime.NewRuntimeServiceClient(conn)}, nil
}

// Close closes the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Ready says whether the runtime can run pods now; the network may be missing,
// since pods of the host's network need none.
func (c *Client) Ready(ctx context.Context) error {
	r, err := c.runtime.Status(ctx, &runtime.StatusRequest{})
	if err != nil {
		return fmt.Errorf("ask the runtime for its status: %w", err)
	}
	for _, cond := range r.GetStatus().GetConditions() {
		if cond.GetType() == runtime.RuntimeReady && !cond.GetStatus() {
			return fmt.Errorf("the runtime is not ready: %s: %s", cond.GetReason(), cond.GetMessage())
		}
	}
	return nil
}

// PullImage pulls an image and returns the runtime's own reference to it. A nil
// auth sends none, as a kubelet does for a pod without pull secrets.
func (c *Client) PullImage(ctx context.Context, image string, auth *Auth) (ref string, err error) {
	req := &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: image}}
	if auth != nil {
		req.Auth = &runtime.AuthConfig{
			Username:      auth.Username,
			Password:      auth.Password,
			Auth:          auth.Auth,
			ServerAddress: auth.ServerAddress,
			IdentityToken: auth.IdentityToken,
			RegistryToken: auth.RegistryToken,
		}
	}
	r, err := c.images.PullImage(ctx, req)
	if err != nil {
		return "", fmt.Errorf("PullImage %s: %w", image, err)
	}
	return r.GetImageRef(), nil
}

// ListImages returns the digests and tags of all images that the runtime has.
func (c *Client) ListImages(ctx context.Context) ([]string, error) {
	r, err := c.images.ListImages(ctx, &runtime.ListImagesRequest{})
	if err != nil {
		return nil, fmt.Errorf("ListImages: %w", err)
	}
	var names []string
	for _, i := range r.GetImages() {
		names = append(append(names, i.GetRepoTags()...), i.GetRepoDigests()...)
	}
	return names, nil
}

// ImageDigests returns the repository digests of an image, none when the
// runtime does not have it.
func (c *Client) ImageDigests(ctx context.Context, image string) ([]string, error) {
	r, err := c.images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: image}})
	if err != nil {
		return nil, fmt.Errorf("ImageStatus %s: %w", image, err)
	}
	return r.GetImage().GetRepoDigests(), nil
}

// RemoveImage removes an image with all its names. One that is not there is no
// error.
func (c *Client) RemoveImage(ctx context.Context, image string) error {
	if _, err := c.images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: image}}); err != nil {
		return fmt.Errorf("RemoveImage %s: %w", image, err)
	}
	return nil
}

// Pod is a running pod sandbox on the host's network.
type Pod struct {
	client *Client
	config *runtime.PodSandboxConfig
	id     string
}

// RunPodSandbox starts a pod in the host's network namespace. Its containers
// log below logs; its cgroups are below cgroupParent.
func (c *Client) RunPodSandbox(ctx context.Context, name, logs, cgroupParent string) (*Pod, error) {
	config := &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		LogDirectory: logs,
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent: cgroupParent,
			SecurityContext: &runtime.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE},
			},
		},
	}
	r, err := c.runtime.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config})
	if err != nil {
		return nil, fmt.Errorf("RunPodSandbox %s: %w", name, err)
	}
	return &Pod{c, config, r.GetPodSandboxId()}, nil
}

// Remove stops the pod and removes it with its containers.
func (p *Pod) Remove(ctx context.Context) error {
	if _, err := p.client.runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("StopPodSandbox: %w", err)
	}
	if _, err := p.client.runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("RemovePodSandbox: %w", err)
	}
	return nil
}

// Run creates a container of the image with the image's own command, starts it,
// waits until it has ended or ctx is done, and returns what it wrote to its
// standard output and its exit code. The image has to be there: as everywhere in
// this interface, running does not pull.
func (p *Pod) Run(ctx context.Context, name, image string) (output string, code int, err error) {
	logFile := name + ".log"
	created, err := p.client.runtime.CreateContainer(ctx, &runtime.CreateContainerRequest{
		PodSandboxId:  p.id,
		SandboxConfig: p.config,
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: name},
			Image:    &runtime.ImageSpec{Image: image},
			LogPath:  logFile,
			Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{
				NamespaceOptions: &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE},
			}},
		},
	})
	if err != nil {
		return "", 0, fmt.Errorf("CreateContainer %s: %w", name, err)
	}
	id := created.GetContainerId()
	if _, err := p.client.runtime.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: id}); err != nil {
		return "", 0, fmt.Errorf("StartContainer %s: %w", name, err)
	}
	status, err := p.client.waitExited(ctx, id)
	if err != nil {
		return "", 0, err
	}
	if _, err := p.client.runtime.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id}); err != nil {
		return "", 0, fmt.Errorf("RemoveContainer %s: %w", name, err)
	}
	raw, err := os.ReadFile(filepath.Join(p.config.GetLogDirectory(), logFile))
	if err != nil {
		return "", 0, fmt.Errorf("read the container's log: %w", err)
	}
	return stdoutOf(string(raw)), int(status.GetExitCode()), nil
}

// pollEvery is short against the start of a container, which takes a tenth of a
// second.
const pollEvery = 10 * time.Millisecond

func (c *Client) waitExited(ctx context.Context, id string) (*runtime.ContainerStatus, error) {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		r, err := c.runtime.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: id})
		if err != nil {
			return nil, fmt.Errorf("ContainerStatus: %w", err)
		}
		if r.GetStatus().GetState() == runtime.ContainerState_CONTAINER_EXITED {
			return r.GetStatus(), nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("the container is still %s: %w", r.GetStatus().GetState(), ctx.Err())
		}
	}
}

// stdoutOf takes a container log in the CRI format apart, a line of which is
// "TIME STREAM TAG TEXT", where the tag P says that the line goes on.
func stdoutOf(log string) string {
	var out strings.Builder
	for line := range strings.Lines(log) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 || f[1] != "stdout" {
			continue
		}
		out.WriteString(f[3])
		if f[2] == "F" {
			out.WriteByte('\n')
		}
	}
	return out.String()
}

// RemovePods stops and removes every pod with its containers, whoever made it.
func (c *Client) RemovePods(ctx context.Context) error {
	list, err := c.runtime.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("ListPodSandbox: %w", err)
	}
	for _, pod := range list.GetItems() {
		if _, err := c.runtime.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: pod.GetId()}); err != nil {
			return fmt.Errorf("StopPodSandbox: %w", err)
		}
		if _, err := c.runtime.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: pod.GetId()}); err != nil {
			return fmt.Errorf("RemovePodSandbox: %w", err)
		}
	}
	return nil
}
