// SPDX-License-Identifier: Apache-2.0

// Package fault marks the steps in which tarn changes what is on the disk, or
// reads what an earlier process left there, so that tests can have each of them
// fail, fail and take effect nevertheless, or be the process's last.
package fault

// Steps is what stands in for the steps. The zero value takes each as it is.
type Steps func(name string, do func() error) error

// Do takes a step: do, unless s has it otherwise. Its name says what it does to
// what, such as "rename blob".
func (s Steps) Do(name string, do func() error) error {
	if s == nil {
		return do()
	}
	return s(name, do)
}
