// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"tarn/rights"
	"tarn/upstream"
)

// Where the bytes of an object are asked for. A request for them has one list of
// sources, in the order in which they are asked, and nothing else orders any.
// The list is in turns:
//
//	turnLent  the node's credential, at each endpoint
//	turnOwn   the client's, at each endpoint
//	turnWord  the client's, at the authority: another sent what the yes is not about
//
// Before the authority's yes, what is left of it is the authority's own place in
// turnOwn. The endpoints of a turn are counted round, beginning after the one whose
// body broke off last; those that sent wrong bytes of the object in the last ten
// minutes come after the others of their turn, the latest of them last (wrong.go).
// Tags, lists, and questions that want no bytes are not asked here: they are for the
// authority alone, see ask.go.
//
// A further source, say a cache nearby, is an entry of the list and a file with its
// ask. It has after, a turn, a place, a rest, and a yields that always says yes. What
// asks whether there is another source (wrong, elsewhere) counts endpoints so far.

// source is one place to ask for an object, with one credential.
type source struct {
	host       string
	place      string            // its URL, which is what wrong.go remembers it by
	credential rights.Credential // what it is shown
	turn       turn
	// last is until when it comes after the others of its turn: it sent wrong bytes.
	last time.Time
	// after: it is asked only after the authority's yes.
	after bool
	// authority: its no ends its turn. Any other's no is nobody's word.
	authority bool
	budget    time.Duration // the time to its headers
	// yields tells whether the next turn is taken after an error of this one. nil:
	// the error is the answer.
	yields func(error) bool
	// ask asks it for a part, within the part's budget.
	ask func(ctx context.Context, want part) (reply, error)
	// rest has the lists to come begin with the one after it: its body broke off,
	// or was too slow.
	rest func()
}

// turn is a run of sources that are asked with one credential, until one answers.
type turn int

const (
	turnLent turn = iota
	turnOwn
	turnWord
)

// earlyTimeout is the budget of a source while another one of its turn is left.
const earlyTimeout = 3 * time.Second

// reply is what a source answered.
type reply struct {
	*upstream.Response
	source source
	// yes is the authority's, to the client's own question; nil where it is nobody's
	// word, and its bytes leave only where a yes covers them.
	yes *rights.Yes
}

// name is for people: a host, and whom it takes the request for.
func (s source) name() string {
	switch {
	case s.credential.Node:
		return s.host + " as node"
	case s.credential.Anonymous():
		return s.host + " as anonymous"
	}
	return s.host + " as client"
}

// sources is the list of a request, after the authority's yes or before it, with
// the endpoint first in the first place.
func (f *fetcher) sources(after bool, first int) []source {
	registry := f.proxy.upstreams.Registry(f.q.upstream)
	endpoints := len(registry.Endpoints())
	var list []source
	round := func(t turn, c rights.Credential) {
		for n := range endpoints {
			list = append(list, f.endpoint(registry, (first+n)%endpoints, t, c))
		}
	}
	if f.proxy.lendsNode(f.q) {
		round(turnLent, rights.Credential{Node: true})
	}
	round(turnOwn, f.q.asker.Credential)
	if endpoints > 1 {
		list = append(list, f.endpoint(registry, 0, turnWord, f.q.asker.Credential))
	}
	if !after {
		list = slices.DeleteFunc(list, func(s source) bool { return s.after })
	}
	slices.SortStableFunc(list, func(a, b source) int {
		return cmp.Or(cmp.Compare(a.turn, b.turn), a.last.Compare(b.last))
	})
	for i := range list {
		list[i].budget = registry.HeadTimeout()
		if i+1 < len(list) && list[i+1].turn == list[i].turn {
			list[i].budget = min(list[i].budget, earlyTimeout)
		}
	}
	return list
}

// endpoint is one of the registry's endpoints as a source. What the authority
// answers to the client's own credential is its word; all else is bytes.
func (f *fetcher) endpoint(registry *upstream.Registry, i int, t turn, c rights.Credential) source {
	if !registry.Trusts(i) {
		c = rights.Credential{}
	}
	u := registry.Endpoints()[i].URL
	s := source{
		host:       u.Host,
		place:      u.String(),
		credential: c,
		turn:       t,
		after:      i > 0 || t != turnOwn,
		authority:  i == 0,
		rest:       func() { f.beginWith(i + 1) },
	}
	s.last = f.proxy.wrongs.last(f.q.upstream, wrong{s.place, f.digest}, f.proxy.now())
	if t == turnLent {
		s.yields = nodeRefused // the client's own credential may do
	}
	if i == 0 && t != turnLent {
		s.ask = func(ctx context.Context, want part) (reply, error) {
			resp, y, err := f.proxy.put(ctx, f.q, http.MethodGet, f.digest.String(), want)
			return reply{Response: resp, yes: &y}, err
		}
		return s
	}
	s.ask = func(ctx context.Context, want part) (reply, error) {
		req := f.proxy.upstreamRequest(f.q, c, http.MethodGet, f.digest.String(), want)
		req.Endpoint = i
		resp, err := registry.Do(ctx, req)
		return reply{Response: resp}, err
	}
	return s
}

// walk asks the sources of a list in their order, and returns the first answer
// that may be passed on: the authority's word, or bytes that its yes covers.
func (f *fetcher) walk(ctx context.Context, list []source, yes rights.Yes, want part) (reply, error) {
	for len(list) > 0 {
		first, n := list[0], 1
		for n < len(list) && list[n].turn == first.turn {
			n++
		}
		r, err := f.take(ctx, list[:n], want)
		if first.turn == turnLent {
			f.proxy.noteNode(f.q.upstream, err)
		}
		switch {
		case err == nil && (r.yes != nil || yes.Covers(r.Size)):
			return r, nil
		case err == nil:
			r.Body.Close() // the next turn tells
		case first.yields == nil || !first.yields(err):
			return reply{}, err
		}
		list = list[n:]
	}
	return reply{}, fmt.Errorf("%w: nobody is left to ask", upstream.ErrProtocol)
}

// take asks the sources of one turn. It moves on from an authority that cannot be
// reached, is too late or answers 5xx, but for no 4xx of it; from any other source
// always. When none has the object, the error is the authority's.
func (f *fetcher) take(ctx context.Context, list []source, want part) (reply, error) {
	if list[0].turn != turnLent {
		if err := f.proxy.recall(f.q.asker); err != nil {
			return reply{}, err
		}
	}
	var said error
	for _, s := range list {
		want.budget = s.budget
		r, err := s.ask(ctx, want)
		if err == nil {
			r.source = s
			return r, nil
		}
		if said == nil || s.authority {
			said = err
		}
		if s.authority && !movesOn(err) || ctx.Err() != nil {
			break
		}
	}
	return reply{}, said
}

// movesOn tells whether an authority's error lets others be asked.
func movesOn(err error) bool {
	var status *upstream.StatusError
	if errors.As(err, &status) {
		return status.Status >= 500
	}
	return errors.Is(err, upstream.ErrUnreachable) || errors.Is(err, upstream.ErrTimeout)
}
