// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// wire is what the transport tells of one exchange while it runs. Dials outlive
// what they were for, so all of it may be told late.
type wire struct {
	guard *guard
	via   *url.URL     // the proxy; nil for none
	at    atomic.Int64 // the zone of the address that answered
	step  atomic.Int64 // the last one that was begun
}

// The steps of an exchange, in their order.
const (
	stepName int64 = iota + 1
	stepConnect
	stepTLS
	stepAnswer
)

// send is one exchange over t; idle hears how long its connection had lain idle.
func (w *wire) send(t http.RoundTripper, hreq *http.Request, idle func(time.Duration)) (*http.Response, error) {
	trace := &httptrace.ClientTrace{
		DNSStart:          func(httptrace.DNSStartInfo) { w.step.Store(stepName) },
		ConnectStart:      func(string, string) { w.step.Store(stepConnect) },
		TLSHandshakeStart: func() { w.step.Store(stepTLS) },
		GotConn: func(info httptrace.GotConnInfo) {
			w.step.Store(stepAnswer)
			if w.via != nil { // the address is the proxy's; the registry's may be anywhere
				w.at.Store(int64(zonePublic))
			} else if tcp, ok := info.Conn.RemoteAddr().(*net.TCPAddr); ok {
				w.at.Store(int64(w.guard.zoneOf(unmapped(tcp.AddrPort()))))
			}
			if info.WasIdle {
				idle(info.IdleTime)
			}
		},
	}
	resp, err := t.RoundTrip(hreq.WithContext(httptrace.WithClientTrace(hreq.Context(), trace)))
	if err == nil && w.via != nil && hreq.URL.Scheme == "http" && resp.StatusCode == http.StatusProxyAuthRequired {
		resp.Body.Close()
		return nil, &proxyRefused{resp.StatusCode}
	}
	return resp, err
}

func unmapped(ap netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// roundTrip is one exchange with a host, at the endpoint itself when home is
// set: only that is shown tarn's certificate. about is the repository that it is
// about, "" for none, and cause what for. It returns besides the zone of the address
// that answered.
func (r *Registry) roundTrip(hreq *http.Request, cause Cause, about string, far reach, home bool) (*http.Response, zone, error) {
	hreq.Header.Set("User-Agent", r.client.opts.UserAgent)
	w := &wire{guard: r.client.guard, via: r.proxies.of(hreq.URL)}
	w.at.Store(int64(zoneNever))
	way := r.foreign.to(far, w.via)
	if home {
		way = r.pool.to(far, w.via)
	}
	sent := time.Now()
	resp, cut, err := r.put(hreq, about, w, way)
	if cause := context.Cause(hreq.Context()); err != nil && (errors.Is(cause, ErrTimeout) || errors.Is(cause, context.DeadlineExceeded)) {
		err = fmt.Errorf("%w: %w", ErrTimeout, err)
	}
	if err != nil {
		if told := r.newHostError(hreq.URL, w, home, err); told != nil {
			err = told
		} else {
			err = unreachable(hreq.URL.Hostname(), err)
		}
	}
	status := 0
	if err == nil {
		status = resp.StatusCode
	}
	if r.client.opts.Observe != nil {
		received := r.client.opts.Observe(Exchange{r.name, r.listed, hreq.Method, cause, status})
		if err == nil && received != nil && resp.Body != http.NoBody {
			resp.Body = &countedBody{resp.Body, received}
		}
	}
	if ce := r.client.log.Check(zap.DebugLevel, "asked"); ce != nil {
		ce.Write(zap.String("upstream", string(r.name)), zap.String("method", hreq.Method), zap.String("url", shown(hreq.URL, home)),
			zap.Bool("proxy", w.via != nil), zap.Int("status", status), zap.Duration("took", time.Since(sent)), zap.Error(err))
	}
	if r.heard(hreq.URL, about, sent, err, cut) {
		way.kept.CloseIdleConnections() // they may be what is dead
	}
	if err != nil {
		return nil, zone(w.at.Load()), err
	}
	return resp, zone(w.at.Load()), nil
}

// put sends the request in the time that its host has, and twice where it should be.
func (r *Registry) put(hreq *http.Request, about string, w *wire, way transports) (resp *http.Response, cut bool, err error) {
	if w.via != nil {
		if err := r.checkEgress(hreq); err != nil {
			return nil, false, err
		}
	}
	patience, twice := r.patience(hreq.URL, about, time.Now())
	return r.within(hreq, patience, func(hreq *http.Request) (*http.Response, error) {
		if twice && (hreq.Method == http.MethodGet || hreq.Method == http.MethodHead) {
			return r.sendTwice(hreq, way, w.send)
		}
		return w.send(way.kept, hreq, func(time.Duration) {})
	})
}
