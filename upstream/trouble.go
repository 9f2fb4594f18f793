// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Trouble is why a host gave no answer, for whoever runs tarn.
type Trouble struct {
	// Kind is one word, the same for what is mended in the same way.
	Kind string `json:"kind"`
	// Cause is the error itself, of at most maxCause bytes.
	Cause string `json:"cause"`
	// Advice is what to do, with the line of configuration where there is one.
	Advice string `json:"advice,omitempty"`
}

// The kinds of trouble.
const (
	troubleAddress     = "address"     // the dial guard refuses
	troubleUnlisted    = "unlisted"    // only listed registries are served
	troubleEgress      = "egress"      // it is not asked by a proxy
	troubleProxy       = "proxy"       // the proxy cannot be reached, or refuses
	troubleName        = "name"        // it does not resolve
	troubleCertificate = "certificate" // it is not believed
	troubleTLS         = "tls"         // there is none
	troubleRefused     = "refused"     // there is no connection
	troubleSilent      = "silent"      // nothing came in time
	troubleBroken      = "broken"      // the connection ended
)

// maxCause bounds what a certificate or a name server can put into a log.
const maxCause = 512

// HostError is the error of an exchange without an answer. It wraps ErrTimeout,
// ErrUnreachable or ErrGuard.
type HostError struct {
	// Host is whom was asked, with its port where the URL has one.
	Host string
	Trouble
	brief string // the cause for clients
	asked string // the URL for the log
	err   error
}

func (e *HostError) Error() string { return e.err.Error() }
func (e *HostError) Unwrap() error { return e.err }

// Brief is the cause for clients: without addresses of this node's network, which
// are not theirs to know.
func (e *HostError) Brief() string { return e.brief }

// bounded is what another side has said as people may see it: its beginning, in one line,
// and without what a terminal obeys.
func bounded(said string) string {
	said = strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, said[:min(len(said), maxCause)])
	return strings.ToValidUTF8(said[:min(len(said), maxCause)], "")
}

// newHostError says why u was not answered; nil where that says nothing of the host.
func (r *Registry) newHostError(u *url.URL, w *wire, home bool, err error) *HostError {
	if lacking(err) || errors.Is(err, context.Canceled) && !errors.Is(err, ErrTimeout) {
		return nil
	}
	e := &HostError{Host: u.Host, asked: shown(u, home)}
	e.Cause = bounded(strings.TrimPrefix(err.Error(), ErrGuard.Error()+": "))
	e.err = unreachable(u.Hostname(), err)
	switch {
	case errors.Is(err, ErrGuard):
		r.adviseGuard(e, u, home, err)
	case errors.Is(err, ErrTimeout):
		e.Kind, e.brief, e.Advice = w.silence()
		e.Cause = e.brief
		e.err = fmt.Errorf("%w: %s: %s", ErrTimeout, u.Hostname(), e.Cause)
	case behindProxy(err):
		e.Kind, e.brief, e.Advice = adviseProxy(err)
	default:
		r.adviseHost(e, u, home, err)
	}
	return e
}

// behindProxy tells whether it is the proxy that opens no way.
func behindProxy(err error) bool {
	var op *net.OpError
	var refused *proxyRefused
	return errors.As(err, &op) && op.Op == "proxyconnect" || errors.As(err, &refused) || errors.Is(err, errProxySilent)
}

func adviseProxy(err error) (kind, brief, advice string) {
	var refused *proxyRefused
	var cert *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &refused) && refused.status == 407:
		return troubleProxy, refused.Error(), "name them in a file: proxy: {url: ..., credentials_file: /path/to/file} of the upstream, or in HTTPS_PROXY as http://USER:PASSWORD@HOST:PORT"
	case errors.As(err, &refused):
		return troubleProxy, refused.Error(), "have the proxy allow this host and port, or reach it without: NO_PROXY"
	case errors.As(err, &cert):
		return troubleProxy, "the proxy's certificate is not believed", "name the proxy's CA: defaults: {ca_file: /path/to/ca.pem}"
	case errors.As(err, &record):
		return troubleProxy, "the proxy speaks no TLS", "write http:// in the proxy's own URL, whatever it is used for"
	}
	return troubleProxy, "the proxy cannot be reached", "check HTTPS_PROXY, HTTP_PROXY, or the upstream's proxy:"
}

// adviseGuard fills in what the guard refused.
func (r *Registry) adviseGuard(e *HostError, u *url.URL, home bool, err error) {
	var at *refusedAddress
	line := fmt.Sprintf("upstreams: [{name: %q}]", r.name)
	e.Kind, e.brief = troubleAddress, "this registry's address is not public"
	switch {
	case errors.Is(err, errPlain):
		e.Kind, e.brief = troubleEgress, e.Cause
		e.Advice = "reach it without the proxy, by NO_PROXY, or by an https endpoint"
	case errors.Is(err, errUnlistedBehind):
		e.Kind, e.brief = troubleEgress, "this registry is not listed, and would be reached by a proxy, where its address cannot be checked"
		e.Advice = fmt.Sprintf("in tarn's configuration, list it: %s, or allow all such: allow_via_proxy: true", line)
	case errors.Is(err, errOddAddress):
		e.brief, e.Advice = errOddAddress.Error(), "write the address with its four numbers"
	case errors.Is(err, errInside) && !r.listed:
		e.brief, e.Advice = errInside.Error(), "to allow it, list it in tarn's configuration: "+line
	case errors.As(err, &at) && at.zone == zoneNever:
		e.brief = "this registry's address is one that tarn never connects to"
		e.Advice = "tarn's own listeners, link-local, metadata and multicast addresses are never dialled: have the name lead elsewhere"
	case !r.listed && home:
		e.Advice = "to allow it, list it in tarn's configuration: " + line
	default:
		e.brief = fmt.Sprintf("%s sends to %s, whose address is not public", r.name, u.Hostname())
		e.Advice = "only a listed registry that is itself at a private address may send to one; list it with that as its endpoint"
	}
}

// adviseHost fills in what became of the name, the connection or TLS.
func (r *Registry) adviseHost(e *HostError, u *url.URL, home bool, err error) {
	var dns *net.DNSError
	var cert *tls.CertificateVerificationError
	var alert tls.AlertError
	var record tls.RecordHeaderError
	var op *net.OpError
	var errno syscall.Errno
	switch {
	case errors.As(err, &dns) && dns.IsNotFound:
		e.Kind, e.brief = troubleName, "there is no such host"
		e.Advice = "correct the name, or have this node's name servers know it (/etc/resolv.conf)"
	case errors.As(err, &dns):
		e.Kind, e.brief, e.Advice = troubleName, "its name cannot be looked up", adviceNameServer
	case errors.As(err, &cert):
		e.Kind, e.brief = troubleCertificate, bounded(cert.Err.Error())
		e.Advice = r.adviseCertificate(u, home, cert.Err)
	case errors.As(err, &alert):
		e.Kind, e.brief = troubleCertificate, alert.Error()
		e.Advice = fmt.Sprintf("where it wants a certificate of tarn's: upstreams: [{name: %q, cert_file: /path/to/cert.pem, key_file: /path/to/key.pem}]", r.name)
	case errors.As(err, &record):
		e.Kind, e.brief = troubleTLS, "it speaks no TLS there"
		e.Advice = fmt.Sprintf("check the port; where the registry really has no TLS: upstreams: [{name: %q, endpoints: [\"http://%s\"]}]", r.name, u.Host)
	case errors.As(err, &op) && op.Op == "dial":
		e.Kind, e.brief = troubleRefused, "there is no connection"
		if errors.As(err, &errno) {
			e.brief = errno.Error()
		}
		e.Advice = "check that the registry runs, and the endpoint's host and port"
	default:
		e.Kind, e.brief = troubleBroken, "it ended the connection without an answer"
		e.Advice = "check that a registry answers at this host and port, and the scheme (http or https)"
	}
}

const adviceNameServer = "this node's name servers do not answer: check /etc/resolv.conf, in a pod its dnsPolicy"

// adviseCertificate says what to do about a certificate of u.
func (r *Registry) adviseCertificate(u *url.URL, home bool, err error) string {
	var other x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &other):
		return fmt.Sprintf("the certificate is for other names than %s: name the endpoint as the certificate does", u.Hostname())
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return adviseDates(invalid.Cert, time.Now())
	case home:
		return fmt.Sprintf("name its CA: upstreams: [{name: %q, ca_file: /path/to/ca.pem}]; where a proxy opens TLS: defaults: {ca_file: /path/to/ca.pem}", r.name)
	}
	return "name its CA: defaults: {ca_file: /path/to/ca.pem}"
}

// longEnded: who serves a certificate for that long after its end would have been told,
// and so the clock may be wrong that judges it.
const longEnded = 30 * 24 * time.Hour

// adviseDates says what to do about a certificate that is not valid at this time. After
// a restart without a battery, or in a virtual machine that was paused, it is this
// node's clock as often as the certificate.
func adviseDates(cert *x509.Certificate, now time.Time) string {
	clock := "this node's clock says " + now.UTC().Format(dateFormat)
	switch {
	case cert == nil:
		return "renew the certificate; " + clock
	case now.Before(cert.NotBefore):
		return fmt.Sprintf("%s, and the certificate begins at %s: set this node's clock, or have the certificate made anew", clock, cert.NotBefore.UTC().Format(dateFormat))
	case now.Sub(cert.NotAfter) > longEnded:
		return fmt.Sprintf("%s, and the certificate ended at %s: set this node's clock where it is wrong, else renew the certificate", clock, cert.NotAfter.UTC().Format(dateFormat))
	}
	return fmt.Sprintf("renew the certificate, which ended at %s; %s", cert.NotAfter.UTC().Format(dateFormat), clock)
}

const dateFormat = "2006-01-02 15:04 MST"

// silence says what was waited for when the time was over.
func (w *wire) silence() (kind, brief, advice string) {
	if w.via != nil && w.step.Load() <= stepConnect {
		return troubleProxy, "the proxy did not connect in time", "check HTTPS_PROXY, HTTP_PROXY, or the upstream's proxy:"
	}
	switch w.step.Load() {
	case stepName:
		return troubleName, "no name server answered in time", adviceNameServer
	case stepConnect:
		return troubleSilent, "it did not take a connection in time", "check that the registry runs, the endpoint's host and port, and what filters packets on the way"
	case stepTLS:
		return troubleSilent, "it did not end its TLS handshake in time", "check that the port is one for TLS"
	}
	return troubleSilent, "it sent no answer in time", ""
}

// shown is how a log names a URL: without query, and without the path where it is
// not an endpoint's own, since some signatures stand there.
func shown(u *url.URL, home bool) string {
	out := url.URL{Scheme: u.Scheme, Host: u.Host}
	if home {
		out.Path = cmp.Or(u.Path, "/")
	}
	text := out.String()
	return text[:min(len(text), maxCause)]
}
