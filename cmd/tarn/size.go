// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
)

// Size is a number of bytes, or a share of a filesystem. The zero value is no
// bytes.
type Size struct {
	bytes int64 // when share is 0
	share int64 // in hundredths of a percent, so that it is exact
}

// percent is one percent in the unit of Size.share, filesystem all of it.
const (
	percent    = 100
	filesystem = 100 * percent
)

// Bytes is the size in bytes, on a filesystem of total bytes.
func (s Size) Bytes(total int64) int64 {
	if s.share == 0 {
		return s.bytes
	}
	// Divided first, so that no filesystem is too large to multiply.
	total = max(total, 0)
	return total/filesystem*s.share + total%filesystem*s.share/filesystem
}

// String is the size as the file can have it.
func (s Size) String() string {
	if s.share != 0 {
		return strconv.FormatFloat(float64(s.share)/percent, 'f', -1, 64) + "%"
	}
	return strconv.FormatInt(s.bytes, 10)
}

var (
	sizePattern = regexp.MustCompile(`^([0-9]{1,19})(?:\.([0-9]{1,6}))? ?([A-Za-z]*|%)$`)
	errSize     = errors.New("not a size: allowed are bytes (1073741824), with a unit of 1000s (500MB; K, M, G, T) or of 1024s (50GiB; Ki, Mi, Gi, Ti), and a share of the filesystem from 0% to 100% (40%)")
)

var sizeUnits = map[string]int64{
	"":  1,
	"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
}

// parseSize parses what errSize says, a B after the unit or not. A fraction
// needs a unit, and is rounded down to whole bytes, or to hundredths of a
// percent.
func parseSize(s string) (Size, error) {
	wrong := fmt.Errorf("%q is %w", s, errSize)
	m := sizePattern.FindStringSubmatch(s)
	if m == nil {
		return Size{}, wrong
	}
	isShare := m[3] == "%"
	unit, known := sizeUnits[strings.TrimSuffix(m[3], "B")]
	if isShare {
		unit, known = percent, true
	}
	whole, err := strconv.ParseInt(m[1], 10, 64)
	if !known || err != nil || whole > math.MaxInt64/unit || unit == 1 && m[2] != "" {
		return Size{}, wrong
	}
	// Six digits times a terabyte fit in an int64; the sum may not.
	fraction, scale := int64(0), int64(1)
	for _, digit := range m[2] {
		fraction, scale = fraction*10+int64(digit-'0'), scale*10
	}
	n := whole*unit + fraction*unit/scale
	switch {
	case n < 0, isShare && n > filesystem:
		return Size{}, wrong
	case isShare:
		return Size{share: n}, nil
	}
	return Size{bytes: n}, nil
}
