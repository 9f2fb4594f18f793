// SPDX-License-Identifier: Apache-2.0

package cache

import "context"

// Pass gives the reader what its own Fetch brings, from byte 0 on, held to the
// digest, and touches nothing of what is here: it is for who was answered, but
// not with a yes that opens what is stored.
func (c *Cache) Pass(ctx context.Context, req Request) (*Object, error) {
	return c.passOver(ctx, req, nil, nil, nil)
}

// passOver gives the reader a stream of its own from byte 0 on: over the answer
// first, which was asked for in sctx, or over one that it asks for itself.
func (c *Cache) passOver(ctx context.Context, req Request, first *answer, sctx context.Context, cancel context.CancelFunc) (*Object, error) {
	if first == nil {
		sctx, cancel = context.WithCancel(c.ctx)
		// Until the headers are there, the caller's context ends it too.
		stop := context.AfterFunc(ctx, cancel)
		body, info, err := req.Fetch(sctx, 0, -1)
		if !stop() && err == nil {
			body.Close()
			err = context.Cause(ctx)
		}
		if err != nil {
			cancel()
			return nil, err
		}
		first = &answer{info, body}
	}
	s, err := newStream(c, req, req.Digest.Algorithm().Hash(), first.Info)
	if err != nil {
		first.body.Close()
		cancel()
		return nil, err
	}
	s.take(newSteady(sctx, req.Fetch, first), cancel)
	if size := first.Size; size >= 0 && size <= tailHold {
		// As with a flight: what is held back altogether is verified before
		// there is an answer.
		stop := context.AfterFunc(ctx, s.interrupt)
		err := s.verifyAll()
		if !stop() && err != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			s.Close()
			return nil, err
		}
	}
	return &Object{Size: first.Size, Source: Passed, Content: s, close: s.Close, interrupt: s.interrupt}, nil
}
