// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"testing"

	"tarn/index"
)

// TestWhatIsWrittenIsNotFreeOnce, and not once more because it was claimed; what is claimed
// meanwhile and what the index may grow by is to be written yet.
func TestWhatIsWrittenIsNotFreeOnce(t *testing.T) {
	t.Parallel()
	const much = 1 << 40 // more than other tests write meanwhile
	s, _, _, err := Open(Options{Dir: t.TempDir(), MaxSize: 1 << 50, MinFree: 1})
	if err != nil {
		t.Fatal(err)
	}
	s.Start(Hooks{})
	defer s.Close()
	claim := func(n int64) {
		s.room.mu.Lock()
		defer s.room.mu.Unlock()
		s.room.claim(index.ListedDomain, n)
	}
	claim(much)
	for _, step := range []struct {
		what    string
		pending func() int64
		short   bool
	}{
		{"nothing is written yet", func() int64 { return 0 }, true},
		{"all is written", func() int64 { return much }, false},
		{"more is claimed meanwhile", func() int64 { claim(much); return much }, true},
		{"that is given back", func() int64 { claim(-much); return 2 * much }, false},
	} {
		if short, _, err := s.tryWith(index.ListedDomain, 0, step.pending); short > 0 != step.short || errors.Is(err, errMinFree) != step.short {
			t.Errorf("%s: %d bytes short: %v", step.what, short, err)
		}
	}
	claim(-much)
	s.room.mu.Lock()
	s.room.ahead += much
	s.room.mu.Unlock()
	if short, _, err := s.tryReserve(index.ListedDomain, 0); short <= 0 || !errors.Is(err, errMinFree) {
		t.Errorf("the index: %d bytes short: %v", short, err)
	}
}
