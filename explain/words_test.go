// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"regexp"
	"testing"
	"time"
)

func TestOneMissingObjectIsOne(t *testing.T) {
	several := regexp.MustCompile(`\b(were|are|have|they|them|their)\b`)
	for _, c := range causes {
		if words := gaps(&Here{Objects: 3, Missing: []Gap{{Cause: c.cause}}}, time.Now()); several.MatchString(words) {
			t.Errorf("%s: %s", c.cause, words)
		}
	}
}
