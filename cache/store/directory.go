// SPDX-License-Identifier: Apache-2.0

package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"tarn/internal/regular"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	lockName    = "lock"
	blobsName   = "blobs"
	pendingName = "pending"
	indexName   = "index.db"
	brokenName  = "index.db.broken"
	probeName   = ".probe"
	// PinsName, ListName and LayoutName are small files that others keep here, see
	// WriteFile.
	PinsName   = "pins.json"
	ListName   = v1.ImageIndexFile
	LayoutName = v1.ImageLayoutFile
	// HistoryName is where who opens the store may keep what became of requests.
	HistoryName = "decisions.jsonl"
	// MaxLayout is what is read of an oci-layout file. Ours has 30 bytes.
	MaxLayout = 4096
)

// ownNames are those that tarn's own files may have, with suffixes.
var ownNames = []string{lockName, blobsName, pendingName, indexName, PinsName, ListName, LayoutName, "admin.sock", "stale.key", probeName, HistoryName}

// isOwn tells whether a name in the data directory is one of tarn's.
func isOwn(name string) bool {
	return slices.ContainsFunc(ownNames, func(own string) bool { return name == own || strings.HasPrefix(name, own+".") })
}

// checkDir refuses a directory in which somebody else keeps something: tarn removes
// from blobs/ and pending/ what it does not know. A directory is tarn's when it has
// what every tarn has left, whatever else has been lost: the lock and the pending
// files, or the index.
func checkDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("data directory: %w", bare(err))
	}
	if err := checkLayout(filepath.Join(dir, LayoutName)); err != nil {
		return err
	}
	has := func(name string) bool {
		return slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == name })
	}
	if has(lockName) && (has(pendingName) || has(indexName)) {
		return nil
	}
	if has(LayoutName) {
		return fmt.Errorf("%w: it is an OCI image layout that tarn has not made", ErrForeign)
	}
	for _, e := range entries {
		if !isOwn(e.Name()) && e.Name() != "lost+found" { // which a new filesystem has
			return fmt.Errorf("%w: it has others' files, such as %.100q", ErrForeign, e.Name())
		}
	}
	return nil
}

// checkLayout refuses a layout of another version than ours. One that says nothing is
// what a power cut may leave, and written anew.
func checkLayout(path string) error {
	data, err := regular.Read(path, MaxLayout)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var layout v1.ImageLayout
	if err == nil && json.Unmarshal(data, &layout) == nil && layout.Version != "" && layout.Version != v1.ImageLayoutVersion {
		return fmt.Errorf("%w: its %s is of version %.40q, and this tarn knows %s", ErrForeign, LayoutName, layout.Version, v1.ImageLayoutVersion)
	}
	return nil
}
