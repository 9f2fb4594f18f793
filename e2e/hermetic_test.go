// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"errors"
	"net"
	"syscall"
	"testing"
)

func TestNothingCanLeaveTheMachine(t *testing.T) {
	// TEST-NET-1 of RFC 5737: nobody's address, but one that a machine with a
	// way out sends to.
	if conn, err := net.DialTimeout("tcp", "192.0.2.1:443", patience); !errors.Is(err, syscall.ENETUNREACH) {
		if err == nil {
			conn.Close()
		}
		t.Errorf("connecting to another machine gives %v, want that there is no network", err)
	}
	if addrs, err := net.DefaultResolver.LookupHost(t.Context(), "registry-1.docker.io"); err == nil {
		t.Errorf("a name of the outside is known here: %v", addrs)
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		if i.Flags&net.FlagLoopback == 0 && i.Flags&net.FlagUp != 0 {
			t.Errorf("the interface %s is up", i.Name)
		}
	}
}
