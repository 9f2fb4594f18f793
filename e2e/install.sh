#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts on a bare Debian machine what the end-to-end tests drive: runc, strace and ip from Debian, containerd with its
# shim and ctr built from source. Says on its last line, alone on standard output, the folder with containerd's programs.
# Nothing is done twice: a second run costs a few milliseconds.
set -euo pipefail

containerd_version=2.4.2
programs=(containerd ctr containerd-shim-runc-v2)

log() { printf 'e2e/install.sh: %s\n' "$*" >&2; }

# Debian keeps runc and ip in sbin, which is not on every root shell's PATH.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

packages=()
command -v runc >/dev/null || packages+=(runc)
command -v strace >/dev/null || packages+=(strace)
command -v ip >/dev/null || packages+=(iproute2)
if ((${#packages[@]})); then
	if [[ $(id -u) != 0 ]]; then
		log "missing ${packages[*]}; run as root to install them"
		exit 1
	fi
	log "installing ${packages[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q </dev/null >&2
	apt-get install -q -y --no-install-recommends "${packages[@]}" </dev/null >&2
fi

home=${HOME:-/root} # a service manager may start us without HOME
export HOME=$home
cache=${XDG_CACHE_HOME:-$home/.cache}/tarn-ci
want=$cache/containerd@$containerd_version
if [[ ! -d $want ]]; then
	mkdir -p "$cache"
	# Built under another name and renamed whole: a folder under the final name is complete, even after a kill.
	building=$(mktemp -d "$cache/building.XXXXXX")
	trap 'rm -rf "$building"' EXIT
	log "building containerd $containerd_version (about five minutes on two cores)"
	for program in "${programs[@]}"; do
		# From a folder outside every module, so that no go.mod or go.work near us has a say in the versions.
		(cd "$building" && CGO_ENABLED=0 GOWORK=off GOFLAGS=-trimpath GOBIN=$building/bin \
			go install "github.com/containerd/containerd/v2/cmd/$program@v$containerd_version") </dev/null >&2
	done
	# Another run may have been quicker; its folder is as good as ours.
	mv -T "$building/bin" "$want" 2>/dev/null || [[ -d $want ]]
fi
printf '%s\n' "$want"
