// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"tarn/images"
)

// A filter of the list of images is key=value, as docker and podman have them. Of one key
// any may match; all keys must. Names are patterns, in which * is all but a slash.

// errNoFilter: it is none that there is.
var errNoFilter = errors.New("no such filter")

// filters are the tests by their key. Each reads its value once.
var filters = map[string]func(value string, now time.Time) (func(images.Image) bool, error){
	"upstream":   named(func(i images.Image) []string { return []string{i.Upstream} }),
	"repository": named(func(i images.Image) []string { return []string{i.Repository, i.Upstream + "/" + i.Repository} }),
	"tag":        named(func(i images.Image) []string { return []string{i.Tag} }),
	"platform":   named(func(i images.Image) []string { return i.Platforms }),
	"pinned":     flagged(func(i images.Image) bool { return i.Pinned }),
	"partial":    flagged(func(i images.Image) bool { return i.HereBytes < i.TotalBytes }),
	"unused":     unusedFor,
}

func named(of func(images.Image) []string) func(string, time.Time) (func(images.Image) bool, error) {
	return func(pattern string, _ time.Time) (func(images.Image) bool, error) {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			return nil, fmt.Errorf("%.100q is no pattern", pattern)
		}
		return func(i images.Image) bool {
			return slices.ContainsFunc(of(i), func(name string) bool {
				ok, _ := path.Match(pattern, name)
				return ok
			})
		}, nil
	}
}

func flagged(is func(images.Image) bool) func(string, time.Time) (func(images.Image) bool, error) {
	return func(value string, _ time.Time) (func(images.Image) bool, error) {
		want := true
		if value != "" {
			var err error
			if want, err = strconv.ParseBool(value); err != nil {
				return nil, fmt.Errorf("%.100q is neither true nor false", value)
			}
		}
		return func(i images.Image) bool { return is(i) == want }, nil
	}
}

// unusedFor lets pass what nobody has asked for in that time.
func unusedFor(value string, now time.Time) (func(images.Image) bool, error) {
	age, err := time.ParseDuration(value)
	if err != nil || age < 0 {
		return nil, fmt.Errorf("%.100q is no duration, such as 24h or 30m", value)
	}
	return func(i images.Image) bool { return now.Sub(i.Used) >= age }, nil
}

// parseFilters returns the test that they are together. It fails with errNoFilter.
func parseFilters(all []string, now time.Time) (passes func(images.Image) bool, err error) {
	byKey := make(map[string][]func(images.Image) bool)
	for _, f := range all {
		key, value, _ := strings.Cut(f, "=")
		parse, ok := filters[key]
		if !ok {
			return nil, fmt.Errorf("%w: %.100q; there are upstream=, repository=, tag=, platform=, pinned, partial and unused=", errNoFilter, key)
		}
		test, err := parse(value, now)
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", errNoFilter, key, err)
		}
		byKey[key] = append(byKey[key], test)
	}
	return func(i images.Image) bool {
		for _, tests := range byKey {
			if !slices.ContainsFunc(tests, func(test func(images.Image) bool) bool { return test(i) }) {
				return false
			}
		}
		return true
	}, nil
}
