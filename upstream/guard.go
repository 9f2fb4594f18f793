// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"
)

// ErrGuard is wrapped by the error of a connection that the dial guard
// refused. Nothing was sent.
var ErrGuard = errors.New("address not allowed")

// refusedAddress is what the guard says of a host. It wraps ErrGuard.
type refusedAddress struct {
	host string
	at   netip.AddrPort
	zone zone
}

func (e *refusedAddress) Error() string {
	return fmt.Sprintf("%v: %s is at %s (%s)", ErrGuard, e.host, e.at, e.zone)
}

func (e *refusedAddress) Unwrap() error { return ErrGuard }

// reach says how far a connection may go. It is decided by whose word named
// the host: a stranger's word reaches public addresses only.
type reach int

const (
	// reachPublic is for registries that are not listed, and for whatever a
	// registry on a public address redirects to or names as its realm.
	reachPublic reach = iota
	// reachPrivate is for what a listed registry on a private address names.
	reachPrivate
	// reachAny is for the endpoints that the operator wrote down, and for
	// what a listed registry on loopback names.
	reachAny
)

// zone is what kind of address this is, in the order of what may reach it.
type zone int

const (
	zonePublic zone = iota
	zonePrivate
	zoneLoopback
	zoneNever
)

func (z zone) String() string {
	return [...]string{"public", "private", "loopback", "never dialled"}[z]
}

// allows tells whether a connection of this reach may go to an address of
// that zone.
func (r reach) allows(z zone) bool {
	switch z {
	case zonePublic:
		return true
	case zonePrivate:
		return r >= reachPrivate
	case zoneLoopback:
		return r == reachAny
	default:
		return false
	}
}

// reachFrom is how far the word of a listed registry at addr goes.
func reachFrom(z zone) reach {
	switch z {
	case zoneLoopback:
		return reachAny
	case zonePrivate:
		return reachPrivate
	default:
		return reachPublic
	}
}

// neverDialled are the link-local range, where clouds answer with credentials
// to whoever asks, the addresses of such services outside that range, and what
// is no unicast address at all.
var neverDialled = prefixes(
	"0.0.0.0/8", "::/128", // unspecified, "this network"
	"169.254.0.0/16", "fe80::/10", // link-local, the metadata services of most clouds
	"100.100.100.200/32",      // metadata of Alibaba Cloud
	"168.63.129.16/32",        // WireServer of Azure
	"192.0.0.192/32",          // metadata of Oracle Cloud
	"fd00:ec2::/32",           // metadata of EC2 over IPv6
	"fd20:ce::254/128",        // metadata of Google Cloud over IPv6
	"224.0.0.0/4", "ff00::/8", // multicast
	"255.255.255.255/32",
)

// notPublic are the ranges of the IANA special-purpose registries that a
// stranger must not make this node talk to.
var notPublic = prefixes(
	"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", // RFC 1918
	"100.64.0.0/10",                                // RFC 6598
	"192.0.0.0/24", "198.18.0.0/15", "240.0.0.0/4", // protocol assignments, benchmarks, reserved
	"192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20", // documentation
	"fc00::/7",       // unique local
	"fec0::/10",      // site-local, deprecated
	"2001::/32",      // Teredo
	"64:ff9b:1::/48", // NAT64, local use
	"100::/64",       // discard
	"5f00::/16",      // segment routing
)

// globalUnicast is all of IPv6 that IANA has given out; what lies outside may
// mean anything to a translator on the way.
var globalUnicast = netip.MustParsePrefix("2000::/3")

var (
	sixToFour = netip.MustParsePrefix("2002::/16")
	nat64     = netip.MustParsePrefix("64:ff9b::/96")
	v4Compat  = netip.MustParsePrefix("::/96")
)

func prefixes(ss ...string) []netip.Prefix {
	ps := make([]netip.Prefix, len(ss))
	for i, s := range ss {
		ps[i] = netip.MustParsePrefix(s)
	}
	return ps
}

// classify tells the zone of an address by its own bits. An IPv4 address that
// is wrapped into an IPv6 one (mapped, compatible, 6to4, NAT64) is what it
// wraps.
func classify(a netip.Addr) zone {
	a = a.Unmap().WithZone("")
	if a == netip.IPv6Loopback() {
		return zoneLoopback
	}
	for _, p := range neverDialled {
		if p.Contains(a) {
			return zoneNever
		}
	}
	if a.Is6() {
		b := a.As16()
		switch {
		case sixToFour.Contains(a):
			return classify(netip.AddrFrom4([4]byte(b[2:6])))
		case nat64.Contains(a), v4Compat.Contains(a):
			return classify(netip.AddrFrom4([4]byte(b[12:16])))
		}
	}
	if a.IsLoopback() {
		return zoneLoopback
	}
	for _, p := range notPublic {
		if p.Contains(a) {
			return zonePrivate
		}
	}
	if a.Is6() && !globalUnicast.Contains(a) {
		return zoneNever
	}
	return zonePublic
}

// guard makes every outgoing connection. The decision is taken on the resolved
// address, at the moment of connecting, so that a name that changes its mind
// between two look-ups gains nothing.
type guard struct {
	own     []netip.AddrPort // tarn's own listeners
	lookup  func(ctx context.Context, host string) ([]netip.Addr, error)
	connect func(ctx context.Context, network, addr string) (net.Conn, error)

	mu        sync.Mutex
	local     map[netip.Addr]bool // addresses of this node
	localTill time.Time
}

// localAddrsFor is how long the node's own addresses are believed: a new one
// is rare, and asking the kernel for each connection is not free.
const localAddrsFor = 10 * time.Second

// isLocal tells whether a is an address of this node.
func (g *guard) isLocal(a netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now := time.Now(); now.After(g.localTill) {
		addrs, err := net.InterfaceAddrs()
		if err == nil {
			g.local = make(map[netip.Addr]bool, len(addrs))
			for _, ia := range addrs {
				if p, err := netip.ParsePrefix(ia.String()); err == nil {
					g.local[p.Addr().Unmap()] = true
				}
			}
			g.localTill = now.Add(localAddrsFor)
		}
	}
	return g.local[a.Unmap().WithZone("")]
}

// zoneOf is classify, and what only this node can know: which addresses are
// its own, and where tarn itself listens.
func (g *guard) zoneOf(ap netip.AddrPort) zone {
	a := ap.Addr().Unmap()
	z := classify(a)
	local := z == zoneLoopback || g.isLocal(a)
	for _, own := range g.own {
		if own.Port() == ap.Port() && (own.Addr().Unmap() == a || own.Addr().IsUnspecified() && local) {
			return zoneNever
		}
	}
	if local && z == zonePublic {
		return zonePrivate // it may be routed everywhere, but it is this node
	}
	return z
}

// connectStagger is how long an attempt may take before the next address is
// tried beside it (RFC 8305 5 recommends 250 ms).
const connectStagger = 250 * time.Millisecond

const (
	// dialTimeout ends attempts that nobody waits for any more: the transport
	// lets a dial outlive the request that it was for.
	dialTimeout = DefaultHeadTimeout
	// maxAddresses of one name are tried.
	maxAddresses = 8
)

// dial connects to the first address of host:port that r allows and that
// answers. It fails with ErrGuard when the name has addresses and none is
// allowed.
func (g *guard) dial(ctx context.Context, network, hostport string, r reach) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	portNum, err := net.LookupPort("tcp", port)
	if err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	if a, err := netip.ParseAddr(host); err == nil {
		addrs = []netip.Addr{a}
	} else if addrs, err = g.lookup(ctx, host); err != nil {
		return nil, err
	}
	var allowed []netip.AddrPort
	var refused error = &net.DNSError{Err: "it has no address", Name: host, IsNotFound: true}
	for _, a := range addrs {
		ap := netip.AddrPortFrom(a.Unmap(), uint16(portNum))
		if z := g.zoneOf(ap); r.allows(z) {
			allowed = append(allowed, ap)
		} else {
			refused = &refusedAddress{host, ap, z}
		}
	}
	if len(allowed) == 0 {
		return nil, refused
	}
	return g.connectFirst(ctx, network, allowed[:min(len(allowed), maxAddresses)])
}

// connectFirst starts an attempt for each address, connectStagger apart or as
// soon as the one before failed, and returns the first connection. The others
// are closed as they come in; all goroutines end with ctx or their attempt.
func (g *guard) connectFirst(ctx context.Context, network string, addrs []netip.AddrPort) (net.Conn, error) {
	type attempt struct {
		conn net.Conn
		err  error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan attempt, len(addrs))
	started, ended := 0, 0
	start := func() {
		addr := addrs[started].String()
		started++
		go func() {
			conn, err := g.connect(ctx, network, addr)
			results <- attempt{conn, err}
		}()
	}
	start()
	stagger := time.NewTimer(connectStagger)
	defer stagger.Stop()
	var firstErr error
	for {
		select {
		case <-stagger.C:
			if started < len(addrs) {
				start()
				stagger.Reset(connectStagger)
			}
		case a := <-results:
			ended++
			if a.err == nil {
				if left := started - ended; left > 0 {
					go func() { // the losers: connect returns soon, its context has ended
						for range left {
							if l := <-results; l.conn != nil {
								l.conn.Close()
							}
						}
					}()
				}
				return a.conn, nil
			}
			if firstErr == nil {
				firstErr = a.err
			}
			if ended == len(addrs) {
				return nil, firstErr
			}
			if started < len(addrs) && started == ended {
				start()
				stagger.Reset(connectStagger)
			}
		}
	}
}
