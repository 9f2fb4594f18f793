// SPDX-License-Identifier: Apache-2.0

// Package e2e drives a real containerd through the built tarn in front of a
// real registry, and counts what the registry was asked.
//
// It has tests only. They need Linux and root, and everything they start lives
// in namespaces of its own: no packet leaves the machine, and no process,
// mount or file is left behind, however the tests end.
package e2e
