// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"tarn/internal/probe"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// dialPatience is for a socket on this machine, and what its process answers
	// from memory.
	dialPatience = 3 * time.Second
	// pullPatience is longer than containerd waits for a mirror that is silent.
	pullPatience = 45 * time.Second
)

// Sockets are where the runtimes of the field listen for the kubelet; the first that
// is there is asked.
var Sockets = []string{
	"/run/containerd/containerd.sock",
	"/run/k3s/containerd/containerd.sock", // and RKE2
	"/run/crio/crio.sock",
}

// runtime is a container runtime behind its socket, asked by the Container Runtime
// Interface v1.
type runtime struct {
	conn   *grpc.ClientConn
	images cri.ImageServiceClient
}

func connect(socket string) (*runtime, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &runtime{conn, cri.NewImageServiceClient(conn)}, nil
}

func (r *runtime) close() { r.conn.Close() }

// version is the runtime's name and version, as in "containerd", "v2.4.2".
func (r *runtime) version(ctx context.Context) (name, version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, dialPatience)
	defer cancel()
	v, err := cri.NewRuntimeServiceClient(r.conn).Version(ctx, &cri.VersionRequest{})
	return v.GetRuntimeName(), v.GetRuntimeVersion(), err
}

// errUnknown is wrapped by what tells nothing of how images are pulled.
var errUnknown = errors.New("cannot tell")

// prove pulls the probe under a name that nobody has pulled, and removes it again.
func (r *runtime) prove(ctx context.Context) (image string, err error) {
	ctx, cancel := context.WithTimeout(ctx, pullPatience)
	defer cancel()
	image = probe.Registry + "/" + strings.ToLower(rand.Text()[:12]) + ":1"
	spec := &cri.ImageSpec{Image: image}
	_, err = r.images.PullImage(ctx, &cri.PullImageRequest{Image: spec})
	// Also after an error: the runtime may have got it after this has given up.
	removing, stop := context.WithTimeout(context.WithoutCancel(ctx), dialPatience)
	defer stop()
	_, rerr := r.images.RemoveImage(removing, &cri.RemoveImageRequest{Image: spec})
	switch code := status.Code(err); {
	case err == nil && rerr != nil:
		return image, fmt.Errorf("it was pulled, and cannot be removed: %s", status.Convert(rerr).Message())
	case err == nil:
		return image, nil
	case code == codes.Unimplemented, code == codes.DeadlineExceeded, code == codes.Canceled, code == codes.PermissionDenied:
		return image, fmt.Errorf("%w: %s: %s", errUnknown, code, status.Convert(err).Message())
	}
	return image, errors.New(status.Convert(err).Message())
}
