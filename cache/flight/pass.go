// SPDX-License-Identifier: Apache-2.0

package flight

import "context"

// Pass gives the reader what its own Fetch brings, from byte 0 on and held to the
// digest as a flight's bytes are, and touches nothing of what is here: it is for
// who was answered, but not with a yes that opens what is stored. It looks like
// the flight of what is not.
func (e *Engine) Pass(ctx context.Context, req Request) (*Object, error) {
	req.Wrong = nil // it may be a sign-on page, see below
	o, err := e.openStream(ctx, req, ownAnswer{})
	if err != nil {
		return nil, err
	}
	// It may be a sign-on page, whoever asks: what is wrong with that is no reason
	// to refuse ranges of the object to those who may have it.
	o.Content.(*stream).alone = true
	o.Source = Fetched // which is how the flight of what is not here would look
	return o, nil
}
