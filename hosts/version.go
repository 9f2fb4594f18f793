// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"fmt"
	"regexp"
	"strconv"
)

// version is a release of containerd as far as it matters here; the zero value is one
// that nobody has told.
type version struct{ major, minor int }

func (v version) String() string { return fmt.Sprintf("%d.%d", v.major, v.minor) }

func (v version) before(major, minor int) bool {
	return v.major < major || v.major == major && v.minor < minor
}

var versionNumber = regexp.MustCompile(`^v?([0-9]{1,4})\.([0-9]{1,4})`)

// parseVersion reads what runtimes say: v2.4.2, 1.6.20~ds1, 2.2.0-k3s1.
func parseVersion(s string) (v version, ok bool) {
	m := versionNumber.FindStringSubmatch(s)
	if m == nil {
		return v, false
	}
	v.major, _ = strconv.Atoi(m[1])
	v.minor, _ = strconv.Atoi(m[2])
	return v, true
}

// The releases in which what is read here changed.
//
//	2.0  version 3 of the file, and cri.v1.images in place of grpc.v1.cri
//	2.1  pulls by the transfer service, unless the file has what that does not know
//	2.2  without config_path two folders, of which the transfer service reads none;
//	     the capability referrers
//	2.3  version 4 of the file
//
// containerds are one of each, for whom no version was told.
var containerds = []version{{1, 7}, {2, 0}, {2, 1}, {2, 2}, {2, 4}}

// fileVersion is the newest version of the configuration file that it reads.
func (v version) fileVersion() int {
	switch {
	case v.before(2, 0):
		return 2
	case v.before(2, 3):
		return 3
	}
	return 4
}
