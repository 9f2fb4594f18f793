#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds tarn and the comparison, and runs it with these flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PATH=$(./install.sh):$PATH
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
(cd .. && go build -o "$bin/tarn" ./cmd/tarn)
go build -o "$bin/bench" .
PATH=$bin:$PATH
"$bin/bench" "$@"
