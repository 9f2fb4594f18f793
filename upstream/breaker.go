// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sony/gobreaker/v2"
)

// A host that cannot be reached, or that is silent, is not asked again by every
// request, each of which would wait for it: it has a breaker, which opens when
// a connection fails or two requests in a row time out. While it is open,
// requests fail at once, and the host is probed in the background, where it is
// one of a registry that the operator listed, so that no request has to find
// out. Any answer closes it; what an answer says is not its affair.

const (
	// probeEvery is how long after its host's recovery a breaker may be open.
	probeEvery = 300 * time.Millisecond
	// reopenAfter is when one request is let through where nobody probes.
	reopenAfter = time.Second
	// probeFor ends the probing when nobody has asked for so long.
	probeFor = time.Minute
	// maxBreakers bounds what a registry can make tarn remember by naming
	// token services.
	maxBreakers = 16
)

// errOpen is wrapped together with what the host failed with, ErrUnreachable or
// ErrTimeout: this time it was not asked.
var errOpen = errors.New("it failed a moment ago, and is asked again when it answers a probe")

type breaker struct {
	circuit *gobreaker.CircuitBreaker[*http.Response]

	mu      sync.Mutex
	refused bool // the last failure was to connect
	probing bool
	dropped bool      // others took its place, and nobody asks it any more
	silent  string    // the last question that timed out, to be probed with; "" for /v2/
	asked   time.Time // when it was last wanted
	since   time.Time // when it opened; zero when it is closed
	cause   error     // of the last failure: ErrUnreachable or ErrTimeout
	// How it was asked last, and so how it is probed.
	far  reach
	home bool
}

// breaker returns the one of the host that u names.
func (r *Registry) breaker(u *url.URL) *breaker {
	key := u.Scheme + "://" + u.Host
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.breakers[key]
	if b == nil {
		if len(r.breakers) >= maxBreakers {
			r.dropBreaker()
		}
		b = r.newBreaker(key)
		r.breakers[key] = b
	}
	return b
}

// dropBreaker drops one of a token service: it opens again if it has to. Called
// with the lock.
func (r *Registry) dropBreaker() {
	for key, b := range r.breakers {
		if !slices.ContainsFunc(r.endpoints, func(e Endpoint) bool { return e.URL.Scheme+"://"+e.URL.Host == key }) {
			b.mu.Lock()
			b.dropped = true
			b.mu.Unlock()
			delete(r.breakers, key)
			return
		}
	}
}

func (r *Registry) newBreaker(origin string) *breaker {
	b := &breaker{cause: ErrUnreachable}
	timeout := reopenAfter
	if r.listed {
		timeout = 1 // at once: nobody but the probing gets as far as that
	}
	b.circuit = gobreaker.NewCircuitBreaker[*http.Response](gobreaker.Settings{
		Name:    origin,
		Timeout: timeout,
		ReadyToTrip: func(c gobreaker.Counts) bool {
			b.mu.Lock()
			defer b.mu.Unlock()
			return b.refused || c.ConsecutiveFailures >= 2
		},
		IsSuccessful: func(err error) bool { return err == nil || !refusedConnection(err) && !errors.Is(err, ErrTimeout) },
		// Who leaves says nothing about the host, nor who gave it little time,
		// nor what this process is short of.
		IsExcluded: func(err error) bool {
			return errors.Is(err, ErrGuard) || errors.Is(err, errHasty) || lacking(err) || errors.Is(err, context.Canceled) && !errors.Is(err, ErrTimeout)
		},
		OnStateChange: func(_ string, _, to gobreaker.State) {
			b.mu.Lock()
			defer b.mu.Unlock()
			switch {
			case to == gobreaker.StateClosed:
				b.since = time.Time{}
			case to == gobreaker.StateOpen && b.since.IsZero():
				b.since = time.Now()
			}
			if to == gobreaker.StateOpen && r.listed && !b.probing {
				b.probing = true
				r.client.probing.Go(func() { r.probe(b, origin) })
			}
		},
	})
	return b
}

// errHasty marks a timeout that came before the host had its time.
var errHasty = errors.New("it had little time")

// do sends a request through the breaker. A host that was silent for less than
// patience is not held to be down.
func (b *breaker) do(req *http.Request, patience time.Duration, far reach, home bool, send func() (*http.Response, error)) (*http.Response, error) {
	ctx, sent := req.Context(), time.Now()
	b.mu.Lock()
	b.asked, b.far, b.home = time.Now(), far, home
	probing, open := b.probing, fmt.Errorf("%w: %w", b.cause, errOpen)
	b.mu.Unlock()
	if probing {
		return nil, open // also while it is half open: a probe finds out
	}
	resp, err := b.circuit.Execute(func() (*http.Response, error) {
		resp, err := send()
		if cause := context.Cause(ctx); err != nil && (errors.Is(cause, ErrTimeout) || errors.Is(cause, context.DeadlineExceeded)) {
			err = fmt.Errorf("%w: %w", ErrTimeout, err)
			if time.Since(sent) < patience {
				return nil, fmt.Errorf("%w: %w", errHasty, err)
			}
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		b.refused = refusedConnection(err) && !errors.Is(err, ErrTimeout)
		switch {
		case errors.Is(err, ErrTimeout):
			b.cause, b.silent = ErrTimeout, ""
			if req.Method == http.MethodGet || req.Method == http.MethodHead {
				b.silent = req.URL.String()
			}
		case err != nil:
			b.silent = ""
			b.cause = ErrUnreachable
		}
		return resp, err
	})
	switch {
	case errors.Is(err, gobreaker.ErrOpenState):
		return nil, open
	case errors.Is(err, gobreaker.ErrTooManyRequests):
		return send() // another finds out now, and who comes meanwhile is not refused for it
	}
	return resp, err
}

// probe asks the host until it answers, or nobody wants it any more: for what it
// was silent about, since some are silent about that only, or else for /v2/.
// Probes overlap: one that hangs must not delay the one that would be answered.
func (r *Registry) probe(b *breaker, origin string) {
	ctx, cancel := context.WithCancel(r.client.life)
	answered := make(chan struct{}, 1)
	var probes sync.WaitGroup
	defer func() {
		cancel()
		probes.Wait()
		b.mu.Lock()
		defer b.mu.Unlock()
		b.probing, b.since = false, time.Time{} // from now on nothing is known
	}()
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for {
		probes.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, r.headTimeout)
			defer cancel()
			b.mu.Lock()
			far, home, method, url := b.far, b.home, http.MethodHead, b.silent
			b.mu.Unlock()
			if url == "" {
				method, url = http.MethodGet, origin+"/v2/"
			}
			req, err := http.NewRequestWithContext(ctx, method, url, nil)
			if err != nil {
				return
			}
			resp, _, err := r.roundTrip(req, far, home)
			if err != nil {
				return
			}
			resp.Body.Close()
			select {
			case answered <- struct{}{}:
			default:
			}
		})
		select {
		case <-ctx.Done():
			return
		case <-answered:
			b.circuit.Execute(func() (*http.Response, error) { return nil, nil })
			return
		case <-tick.C:
		}
		b.mu.Lock()
		unwanted := b.dropped || time.Since(b.asked) > probeFor
		b.mu.Unlock()
		if unwanted {
			return
		}
	}
}

// lacking tells whether there is no connection for want of something here.
func lacking(err error) bool {
	return slices.ContainsFunc([]error{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL,
	}, func(own error) bool { return errors.Is(err, own) })
}

// refusedConnection tells whether there was no connection to send a request on:
// name resolution, connect or TLS failed.
func refusedConnection(err error) bool {
	var op *net.OpError
	var dns *net.DNSError
	var cert *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var alert tls.AlertError
	if lacking(err) {
		return false
	}
	return errors.As(err, &op) && op.Op == "dial" || errors.As(err, &dns) ||
		errors.As(err, &cert) || errors.As(err, &record) || errors.As(err, &alert)
}
