// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"
)

func TestZones(t *testing.T) {
	for want, addrs := range map[zone][]string{
		zonePublic:   {"93.184.215.14", "2606:2800:220:1::1", "2002:5db8:d70e::1", "64:ff9b::5db8:d70e", "::ffff:93.184.215.14", "172.32.0.1", "100.128.0.1"},
		zonePrivate:  {"10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "fd12::1", "fec0::1", "2001::1", "2002:a00:1::1", "64:ff9b::a00:1", "::ffff:10.0.0.1", "::10.0.0.1", "64:ff9b:1::1", "198.18.0.1", "203.0.113.1", "240.0.0.1"},
		zoneLoopback: {"127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"},
		zoneNever: {"0.0.0.0", "0.1.2.3", "::", "169.254.169.254", "fe80::1", "fe80::1%eth0", "224.0.0.1", "ff02::1", "255.255.255.255", "::ffff:0:a9fe:a9fe", "4000::1", "100:0:0:1::1",
			"100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::"},
	} {
		for _, a := range addrs {
			if got := classify(netip.MustParseAddr(a)); got != want {
				t.Errorf("%s: %s, want %s", a, got, want)
			}
		}
	}
}

func TestReach(t *testing.T) {
	for _, c := range []struct {
		reach reach
		last  zone
	}{{reachPublic, zonePublic}, {reachPrivate, zonePrivate}, {reachAny, zoneLoopback}} {
		for z := zonePublic; z <= zoneNever; z++ {
			if got, want := c.reach.allows(z), z <= c.last; got != want {
				t.Errorf("reach %d, zone %s: %v", c.reach, z, got)
			}
		}
	}
}

func TestOwnListenersAreNeverDialled(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:5050", "0.0.0.0:5050", "[::]:5050"} {
		g := &guard{own: []netip.AddrPort{netip.MustParseAddrPort(listen)}}
		if z := g.zoneOf(netip.MustParseAddrPort("127.0.0.1:5050")); z != zoneNever {
			t.Errorf("%s: %s", listen, z)
		}
		if z := g.zoneOf(netip.MustParseAddrPort("127.0.0.1:5051")); z != zoneLoopback {
			t.Errorf("another port of %s: %s", listen, z)
		}
	}
}

func TestTheGuardChecksEveryAddressOfAName(t *testing.T) {
	var dialled []string
	g := &guard{
		lookup: func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("93.184.215.14"), netip.MustParseAddr("10.0.0.1")}, nil
		},
		connect: func(_ context.Context, _, addr string) (net.Conn, error) {
			dialled = append(dialled, addr)
			return nil, errors.New("refused")
		},
	}
	if _, err := g.dial(t.Context(), "tcp", "mixed.example:443", reachPublic); err == nil || errors.Is(err, ErrGuard) {
		t.Fatal(err)
	}
	if len(dialled) != 1 || dialled[0] != "93.184.215.14:443" {
		t.Fatalf("dialled %v", dialled)
	}
	if _, err := g.dial(t.Context(), "tcp", "10.0.0.1:443", reachPublic); !errors.Is(err, ErrGuard) {
		t.Fatal(err)
	}
}

func TestASlowAddressDoesNotHoldUpAnother(t *testing.T) {
	first, second := net.Pipe()
	defer second.Close()
	g := &guard{
		lookup: func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("93.184.215.14"), netip.MustParseAddr("93.184.215.15")}, nil
		},
		connect: func(ctx context.Context, _, addr string) (net.Conn, error) {
			if addr == "93.184.215.14:443" {
				<-ctx.Done() // never answers
				return nil, ctx.Err()
			}
			return first, nil
		},
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := g.dial(ctx, "tcp", "slow.example:443", reachPublic)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
