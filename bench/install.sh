#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts on a bare Debian machine what tarn is compared with: nginx from Debian, unpacked and not installed, since nothing may
# start or listen on its own; distribution, built from source. Says on its last line, alone on standard output, the folders
# with the programs, as on a PATH. Nothing is done twice.
set -euo pipefail

log() { printf 'bench/install.sh: %s\n' "$*" >&2; }

home=${HOME:-/root}
export HOME=$home
cache=${XDG_CACHE_HOME:-$home/.cache}/tarn-ci
mkdir -p "$cache"
building=
trap '[[ -z $building ]] || rm -rf "$building"' EXIT

folders=()
# keep NAME COMMAND... makes the folder NAME in the cache by running the command in an empty one; under its final name it is
# complete, even after a kill.
keep() {
	local want=$cache/$1
	if [[ ! -d $want ]]; then
		building=$(mktemp -d "$cache/building.XXXXXX")
		log "making $1"
		(cd "$building" && "${@:2}") </dev/null >&2
		mv -T "$building" "$want" 2>/dev/null || [[ -d $want ]]
		rm -rf "$building"
	fi
	folders+=("$want")
}
unpack_nginx() {
	export DEBIAN_FRONTEND=noninteractive
	# Its libraries; most machines have them.
	if ! ldconfig -p | grep -q libpcre2-8.so.0; then
		apt-get update -q
		apt-get install -q -y --no-install-recommends libpcre2-8-0 libssl3 zlib1g libcrypt1
	fi
	apt-get download -q nginx 2>/dev/null || { apt-get update -q && apt-get download -q nginx; }
	dpkg -x nginx_*.deb deb
	mv deb/usr/sbin/nginx .
	rm -rf deb ./*.deb
}
build_distribution() {
	CGO_ENABLED=0 GOWORK=off GOFLAGS=-trimpath GOBIN=$PWD go install github.com/distribution/distribution/v3/cmd/registry@v3.0.0
}

command -v taskset >/dev/null || { log "taskset is missing: apt-get install util-linux"; exit 1; }
keep nginx@debian unpack_nginx
keep distribution@3.0.0 build_distribution
(IFS=:; printf '%s\n' "${folders[*]}")
