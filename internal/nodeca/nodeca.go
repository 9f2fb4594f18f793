// SPDX-License-Identifier: Apache-2.0

// Package nodeca keeps the certificates by which containerd and tarn know each other
// on one node: a CA of that node's own, tarn's certificate, and containerd's.
//
// Contract: Ensure leaves a directory with a whole set, whatever it finds there, and
// changes nothing where nothing needs it. A certificate that is renewed keeps its
// key, so that at no moment a file does not fit the other one of its pair, or
// a client's CA the server: each file is replaced by one rename. A key is made anew only
// where it is missing, cannot be read, or could be read by everybody; with the CA's
// key all that it signed goes.
//
// Failure model: what is on the disk is synced before it is renamed. An error, or a
// crash, leaves each file as it was or as it becomes, and the next Ensure mends what
// does not go together.
//
// It never makes the directory, or a key, readable or writable for others, and it never
// lets one run change what another one is at.
package nodeca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	// caLife and leafLife are how long a certificate is good for. It is renewed when
	// a third of that is left.
	caLife, leafLife = 10 * 365 * 24 * time.Hour, 365 * 24 * time.Hour
	renewWithin      = 3
	// clockSkew is how far ahead the clock may be that makes a certificate, of one
	// that reads it.
	clockSkew = 5 * time.Minute
	// maxHosts bounds the names of a certificate, which each handshake carries.
	maxHosts = 64
)

// Files are the paths of a set, in PEM form. The certificates may be read by all, each
// key by the owner only.
type Files struct {
	// CA is what each side believes of the other.
	CA string
	// Server and its key are tarn's, and Client and its key containerd's.
	Server, ServerKey, Client, ClientKey string

	caKey string
}

// In names the files of a set in the directory, whether they are there or not.
func In(dir string) Files {
	at := func(name string) string { return filepath.Join(dir, name) }
	return Files{
		CA: at("ca.crt"), caKey: at("ca.key"),
		Server: at("server.crt"), ServerKey: at("server.key"),
		Client: at("client.crt"), ClientKey: at("client.key"),
	}
}

// Ensure leaves a whole set in the directory, which it makes where it is not there,
// and tells whether it changed anything. The server's certificate is for localhost,
// the loopback addresses, tarn, this host's own name, and these hosts, names or IP addresses.
func Ensure(dir string, hosts []string, now time.Time) (f Files, changed bool, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return f, false, fmt.Errorf("node CA: %w", err)
	}
	names, err := allHosts(hosts)
	if err != nil {
		return f, false, fmt.Errorf("node CA: %w", err)
	}
	f = In(dir)
	unlock, err := open(dir)
	if err != nil {
		return f, false, fmt.Errorf("node CA: %w", err)
	}
	defer unlock()
	authority, madeCA, err := ensure(f.CA, f.caKey, caTemplate(), nil, now)
	if err != nil {
		return f, madeCA, fmt.Errorf("node CA: %w", err)
	}
	_, madeServer, err := ensure(f.Server, f.ServerKey, serverTemplate(names), authority, now)
	if err != nil {
		return f, madeCA || madeServer, fmt.Errorf("node CA: %w", err)
	}
	_, madeClient, err := ensure(f.Client, f.ClientKey, clientTemplate(), authority, now)
	if err != nil {
		err = fmt.Errorf("node CA: %w", err)
	}
	return f, madeCA || madeServer || madeClient, err
}

// pair is a certificate with its key.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// ensure leaves a pair in these files that is what the template says, is signed by the
// authority (nil: by itself), and is good for long enough. The key is written first: a
// certificate whose key is not there says so to the next run, and a key alone is one
// that has no certificate yet.
func ensure(certPath, keyPath string, template *x509.Certificate, authority *pair, now time.Time) (p *pair, changed bool, err error) {
	key, err := readKey(keyPath)
	if err != nil {
		return nil, false, err
	}
	if key == nil {
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, false, err
		}
		if err := writeKey(keyPath, key); err != nil {
			return nil, false, err
		}
		changed = true
	}
	have, err := readCert(certPath)
	if err != nil {
		return nil, changed, err
	}
	if have != nil && !changed && sound(have, key, template, authority, now) {
		return &pair{have, key}, false, nil
	}
	made, err := sign(template, key, authority, now)
	if err != nil {
		return nil, changed, err
	}
	return &pair{made, key}, true, writeCert(certPath, made)
}

// sound tells whether a certificate that was found can stay.
func sound(have *x509.Certificate, key *ecdsa.PrivateKey, template *x509.Certificate, authority *pair, now time.Time) bool {
	public, ok := have.PublicKey.(*ecdsa.PublicKey)
	if !ok || !public.Equal(&key.PublicKey) {
		return false
	}
	life := have.NotAfter.Sub(have.NotBefore)
	if now.Before(have.NotBefore) || have.NotAfter.Sub(now) < life/renewWithin {
		return false
	}
	parent := have
	if authority != nil {
		parent = authority.cert
	}
	return have.CheckSignatureFrom(parent) == nil && have.IsCA == template.IsCA &&
		slices.Equal(have.ExtKeyUsage, template.ExtKeyUsage) &&
		slices.Equal(have.DNSNames, template.DNSNames) &&
		slices.EqualFunc(have.IPAddresses, template.IPAddresses, net.IP.Equal)
}

// sign makes the certificate that the template says.
func sign(template *x509.Certificate, key *ecdsa.PrivateKey, authority *pair, now time.Time) (*x509.Certificate, error) {
	life := leafLife
	if template.IsCA {
		life = caLife
	}
	const serialBits = 127 // positive, and at most 20 bytes (RFC 5280 4.1.2.2)
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), serialBits))
	if err != nil {
		return nil, err
	}
	t := *template
	t.SerialNumber, t.NotBefore, t.NotAfter = serial, now.Add(-clockSkew), now.Add(life)
	t.BasicConstraintsValid = true
	parent, signer := &t, key
	if authority != nil {
		parent, signer = authority.cert, authority.key
		if t.NotAfter.After(parent.NotAfter) {
			t.NotAfter = parent.NotAfter
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, &t, parent, &key.PublicKey, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func caTemplate() *x509.Certificate {
	return &x509.Certificate{
		Subject:        pkix.Name{CommonName: "tarn's own CA on this node"},
		KeyUsage:       x509.KeyUsageCertSign,
		IsCA:           true,
		MaxPathLenZero: true, // it signs leaves only
	}
}

func serverTemplate(hosts []string) *x509.Certificate {
	t := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "tarn"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, host)
		}
	}
	return t
}

func clientTemplate() *x509.Certificate {
	return &x509.Certificate{
		Subject:     pkix.Name{CommonName: "a client of tarn on this node"},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
}

// allHosts are those that are always meant, this host's own name, and these, once
// each. One that is an address may stand in brackets.
func allHosts(hosts []string) ([]string, error) {
	all := []string{"127.0.0.1", "::1", "localhost", "tarn"}
	if name, err := os.Hostname(); err == nil { // else nobody knows it to ask under it
		short, _, _ := strings.Cut(name, ".")
		all = append(all, canonical(name), canonical(short))
	}
	for _, host := range hosts {
		name := canonical(host)
		if net.ParseIP(name) == nil && !isName(name) {
			return nil, fmt.Errorf("%.80q is neither the name nor the address of a host, as in tarn.corp.example or 10.0.0.1", host)
		}
		all = append(all, name)
	}
	all = slices.DeleteFunc(all, func(s string) bool { return net.ParseIP(s) == nil && !isName(s) }) // a host's own name may be anything
	slices.Sort(all)
	if all = slices.Compact(all); len(all) > maxHosts {
		return nil, fmt.Errorf("%d names are more than the %d that a certificate of tarn's has", len(all), maxHosts)
	}
	return all, nil
}

// canonical is a host in lower case, without brackets and the dot at the end, and an
// address in its one form.
func canonical(host string) string {
	host = strings.ToLower(strings.TrimSuffix(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"), "."))
	if ip := net.ParseIP(host); ip != nil {
		return ip.String()
	}
	return host
}

// isName tells whether a certificate can be for that name (RFC 1035 2.3.1, and the _
// that some hosts have).
func isName(s string) bool {
	const longest = 253
	if s == "" || len(s) > longest {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return true
}
