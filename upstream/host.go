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
	"strings"
	"syscall"
	"time"
)

// What is remembered of a host's trouble is little, and no question is refused
// for it. A host that cannot be connected to says so at once, each time. One
// that was silent about a repository, and answers nobody, is given silentPatience
// for each further question about that repository, until it answers anybody
// anything; the answer to such a question counts for that also when it comes too
// late for whoever asked. Others have their time: who brings about the silence of
// one repository takes nothing from them.
//
// A connection that lay idle may be dead without anybody's knowing: balancers
// on the way forget such connections, and what is sent on one is lost. So a
// question on a connection that was idle for idleDoubt, and that hears nothing
// for idlePatience, is put once more on a new one, and the first answer counts.

const (
	// silentPatience is what a host has for its headers after it was silent.
	silentPatience = time.Second
	// idleDoubt: a pull's requests follow each other faster.
	idleDoubt = 3 * time.Second
	// idlePatience is long for a registry that is well, and leaves the second
	// question most of the time that a client waits.
	idlePatience = 2 * time.Second
	// slowFor is how long a host is not asked twice that answered the first
	// question after all: it is slow, and twice the questions make it slower.
	slowFor = time.Minute
	// maxSilent bounds the repositories that a host is known to be silent about.
	maxSilent = 256
	// maxHosts bounds what a registry can make tarn remember by naming
	// redirect targets and token services.
	maxHosts = 32
)

// host is what is known of one host, by its origin. The registry's lock guards
// it.
type host struct {
	answered time.Time            // when it last answered anybody anything
	cause    error                // why it does not: ErrTimeout or ErrUnreachable; nil when it does
	failing  *HostFailing         // what ails it, for people; nil for nothing
	warned   map[string]time.Time // when, by kind of trouble
	silent   map[string]bool      // repositories that it was silent about since it answered; at most maxSilent
	late     bool                 // somebody listens for a late answer
	slow     time.Time            // until when no question is put to it twice
}

// host returns the one that u names. Called with the lock.
func (r *Registry) host(u *url.URL) *host {
	origin := originOf(u)
	h := r.hosts[origin]
	if h != nil {
		return h
	}
	if len(r.hosts) >= maxHosts {
		for other := range r.hosts { // any but an endpoint's: it costs a little patience
			if !slices.ContainsFunc(r.endpoints, func(e Endpoint) bool { return originOf(e.URL) == other }) {
				delete(r.hosts, other)
				break
			}
		}
	}
	h = &host{}
	r.hosts[origin] = h
	return h
}

// patience is how long the host has for its headers about a repository, 0 for
// what the question as a whole has, and whether a question may be put to it twice.
func (r *Registry) patience(u *url.URL, about string, now time.Time) (d time.Duration, twice bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host(u)
	if h.silent[about] {
		d = silentPatience
	}
	return d, now.After(h.slow)
}

func originOf(u *url.URL) string { return u.Scheme + "://" + u.Host }

// heard takes how an exchange with a host about a repository ended that began at
// sent. A silence counts when the host had its time.
func (r *Registry) heard(u *url.URL, about string, sent time.Time, err error, cut bool) (silent bool) {
	now := time.Now()
	if err == nil {
		r.heardAnswer(u, now)
		return false
	}
	r.mu.Lock()
	h := r.host(u)
	timeout := errors.Is(err, ErrTimeout)
	if h.answered.After(sent) || // it answers others
		timeout && (cut || now.Sub(sent) < r.headTimeout*3/4) { // whoever asked had little time
		r.mu.Unlock()
		return false
	}
	switch {
	case timeout:
		h.cause = ErrTimeout
		if h.silent == nil || len(h.silent) >= maxSilent {
			h.silent = make(map[string]bool)
		}
		h.silent[about] = true
	case refusedConnection(err):
		h.cause = ErrUnreachable
	default: // who left says nothing about the host, nor what this process is short of
	}
	var e *HostError
	due := false
	if errors.As(err, &e) {
		due = h.trouble(originOf(u), e.Trouble, now)
	}
	failing := h.failing
	r.mu.Unlock()
	if e != nil {
		r.tellTrouble(e, *failing, due)
	}
	return timeout
}

// heardAnswer takes that a host answered.
func (r *Registry) heardAnswer(u *url.URL, now time.Time) {
	r.mu.Lock()
	h := r.host(u)
	was := h.failing
	h.answered, h.cause, h.silent, h.failing = now, nil, nil, nil
	due := was != nil && h.due(back, now)
	r.mu.Unlock()
	r.tellAnswer(u, now, was, due)
}

// Away tells whether the authority's host cannot be reached, or was silent about
// this repository for as long as it may be, and has answered nobody since.
func (r *Registry) Away(repository string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host(r.endpoints[0].URL)
	return errors.Is(h.cause, ErrUnreachable) || h.silent[repository]
}

// proveSlow notes that the host answered a question that was put twice.
func (r *Registry) proveSlow(u *url.URL) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.host(u).slow = time.Now().Add(slowFor)
}

// within sends the request with a bound on the time to its headers, for a host
// that was silent; cut tells that it ran out. One such question at a time is
// listened to for longer, so that a host which is only slow is found out to be.
func (r *Registry) within(hreq *http.Request, patience time.Duration, send func(*http.Request) (*http.Response, error)) (resp *http.Response, cut bool, err error) {
	if patience == 0 {
		resp, err = send(hreq)
		return resp, false, err
	}
	type outcome struct {
		resp *http.Response
		err  error
	}
	life, end := context.WithCancel(context.WithoutCancel(hreq.Context()))
	done := make(chan outcome, 1)
	go func() { // ends with life at the latest
		resp, err := send(hreq.WithContext(life))
		done <- outcome{resp, err}
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case o := <-done:
		if o.err != nil {
			end()
			return nil, false, o.err
		}
		context.AfterFunc(hreq.Context(), end) // its body is read in it
		return o.resp, false, nil
	case <-timer.C:
		err = fmt.Errorf("%w: it was silent, and is so still", ErrTimeout)
	case <-hreq.Context().Done():
		err = context.Cause(hreq.Context())
	}
	listens := r.listen(hreq.URL, true)
	if listens {
		time.AfterFunc(r.headTimeout, end)
	} else {
		end()
	}
	go func() {
		o := <-done
		end()
		if o.err == nil {
			o.resp.Body.Close()
			r.heardAnswer(hreq.URL, time.Now())
		}
		if listens {
			r.listen(hreq.URL, false)
		}
	}()
	return nil, true, err
}

// listen begins to listen for a late answer of the host, if nobody does, or ends it.
func (r *Registry) listen(u *url.URL, begin bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.host(u)
	if begin && h.late {
		return false
	}
	h.late = begin
	return true
}

// sendTwice sends the request over one of the transport's connections, and once
// more over a new one when that had lain idle and brings nothing.
//
// send is one exchange; it tells how long its connection had lain idle as soon as
// it has one.
func (r *Registry) sendTwice(hreq *http.Request, way transports, send func(http.RoundTripper, *http.Request, func(idle time.Duration)) (*http.Response, error)) (*http.Response, error) {
	type outcome struct {
		resp *http.Response
		err  error
	}
	var timer *time.Timer
	var second chan outcome
	var leaveSecond context.CancelFunc
	first, leaveFirst := context.WithCancel(hreq.Context())
	resp, err := send(way.kept, hreq.WithContext(first), func(idle time.Duration) {
		if idle < idleDoubt || timer != nil {
			return
		}
		second = make(chan outcome, 1)
		again, leave := context.WithCancel(hreq.Context())
		leaveSecond = leave
		timer = time.AfterFunc(idlePatience, func() {
			resp, err := send(way.fresh, hreq.WithContext(again), func(time.Duration) {})
			if err == nil {
				leaveFirst()
			}
			second <- outcome{resp, err}
		})
	})
	if timer == nil || timer.Stop() {
		if leaveSecond != nil {
			leaveSecond()
		}
		if err != nil {
			leaveFirst()
		}
		return resp, err // its context ends with the request's
	}
	if err == nil { // the host took its time
		leaveSecond()
		r.proveSlow(hreq.URL)
		go func() {
			if o := <-second; o.err == nil {
				o.resp.Body.Close()
			}
		}()
		return resp, nil
	}
	leaveFirst()
	o := <-second
	if o.err != nil {
		leaveSecond()
		return nil, o.err
	}
	context.AfterFunc(hreq.Context(), leaveSecond) // the body is read in it
	way.kept.CloseIdleConnections()                // the others have lain as long
	return o.resp, nil
}

// Health is how a registry does, for people.
type Health struct {
	Name Name `json:"name"`
	// Failing are the hosts that gave no answer when they were asked last.
	Failing []HostFailing `json:"failing,omitempty"`
	// Credentials is why the node's credentials could not be had last, "" when they
	// could.
	Credentials string `json:"credentials,omitempty"`
	// Effect is what the failing hosts come to, in words.
	Effect string `json:"effect,omitempty"`
	// LimitedUntil is until when a question is not put again that the registry
	// answered with 429.
	LimitedUntil *time.Time `json:"limitedUntil,omitempty"`
	RateLimit    *RateLimit `json:"rateLimit,omitempty"`
	// InFlight is how many questions wait for its headers, or for their turn.
	InFlight int `json:"-"`
	// Habits are what the registry was seen to do that tarn works around.
	Habits []Habit `json:"habits,omitempty"`
}

// HostFailing is an endpoint's host, a redirect target's or a token service's.
type HostFailing struct {
	Origin string    `json:"origin"`
	Since  time.Time `json:"since"`
	Last   time.Time `json:"last"` // when it was asked
	Trouble
}

// Habit is what a registry does that the specification does not have.
type Habit string

const (
	// HeadRefused: a HEAD was refused where GET of the same was not.
	HeadRefused Habit = "head-refused"
	// NoRanges: a part of a blob was asked for, and all of it came.
	NoRanges Habit = "no-ranges"
	// Labelled: a body carried a Content-Encoding that nobody asked for.
	Labelled Habit = "content-encoding"
	// Redirected: it sends its whole API elsewhere, where tokens are wanted.
	Redirected Habit = "redirected-to-tokens"
)

// Habits are all that there are.
var Habits = []Habit{HeadRefused, NoRanges, Labelled, Redirected}

// Saw notes a habit.
func (r *Registry) Saw(h Habit) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.habits[h] = true
}

// Has tells whether the registry was seen to have the habit.
func (r *Registry) Has(h Habit) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.habits[h]
}

func (r *Registry) health() Health {
	h := Health{Name: r.name, InFlight: r.asking.inFlight()}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, one := range r.hosts {
		if one.failing != nil {
			h.Failing, h.Effect = append(h.Failing, *one.failing), effect
		}
	}
	if r.ailing != nil {
		h.Credentials = r.ailing.Error()
	}
	slices.SortFunc(h.Failing, func(a, b HostFailing) int { return strings.Compare(a.Origin, b.Origin) })
	for _, until := range r.limits {
		if time.Until(until) > 0 && (h.LimitedUntil == nil || until.After(*h.LimitedUntil)) {
			h.LimitedUntil = &until
		}
	}
	if !r.rate.Seen.IsZero() {
		rate := r.rate
		h.RateLimit = &rate
	}
	for habit := range r.habits {
		h.Habits = append(h.Habits, habit)
	}
	slices.Sort(h.Habits)
	return h
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
	return errors.As(err, &op) && op.Op == "dial" || errors.As(err, &dns) || behindProxy(err) ||
		errors.As(err, &cert) || errors.As(err, &record) || errors.As(err, &alert)
}
