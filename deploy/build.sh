#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds tarn as it is released, with Go and what Debian has:
#
#   deploy/build.sh image [ARCH...]   bin/tarn-VERSION.oci.tar, for amd64 and arm64 unless they are named
#   deploy/build.sh deb [ARCH]        bin/tarn_VERSION_ARCH.deb
#
# VERSION and IMAGE name what is built, OUT the folder. One commit gives the same bytes wherever it is built with one
# version of Go and of ca-certificates.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
umask 022

git() { command git -c safe.directory='*' "$@"; } # the checkout may be somebody else's
commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[[ $commit == unknown || -z $(git status --porcelain) ]] || commit+=-dirty
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
version=${VERSION:-0~${commit:0:12}}
out=${OUT:-bin}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# program ARCH prints where it is.
program() {
	local to=$out/tarn-linux-$1
	CGO_ENABLED=0 GOOS=linux GOARCH=$1 GOWORK=off GOFLAGS= go build -trimpath -buildvcs=false \
		-ldflags "-s -w -buildid= -X main.version=$version -X main.commit=$commit" -o "$to" ./cmd/tarn
	printf '%s\n' "$to"
}

image() {
	local arch programs=()
	(($#)) || set -- amd64 arm64
	for arch; do
		programs+=("$(program "$arch")")
	done
	GOWORK=off GOFLAGS=-buildvcs=false go run ./tools/image \
		-out "$out/tarn-${version//\~/-}.oci.tar" -sbom "$out/tarn-${version//\~/-}.cdx.json" \
		-name "${IMAGE:-registry.example/tarn}:${version//\~/-}" \
		-version "$version" -commit "$commit" -epoch "$epoch" \
		-certificates-version "$(dpkg-query -W -f '${Version}' ca-certificates)" "${programs[@]}"
}

deb() {
	local arch=${1:-$(dpkg --print-architecture)} root
	root=$(mktemp -d)
	# shellcheck disable=SC2064 # the name as it is now
	trap "rm -rf '$root'" EXIT
	install -D -m 0755 "$(program "$arch")" "$root/usr/bin/tarn"
	install -D -m 0644 deploy/systemd/tarn.service "$root/usr/lib/systemd/system/tarn.service"
	install -D -m 0644 deploy/systemd/tarn.sysusers "$root/usr/lib/sysusers.d/tarn.conf"
	install -D -m 0644 docs/tarn.example.yaml "$root/etc/tarn/tarn.yaml"
	install -D -m 0644 LICENSE "$root/usr/share/doc/tarn/copyright"
	install -d "$root/DEBIAN"
	install -m 0755 deploy/debian/{postinst,prerm,postrm} "$root/DEBIAN/"
	printf '/etc/tarn/tarn.yaml\n' >"$root/DEBIAN/conffiles"
	cat >"$root/DEBIAN/control" <<-END
		Package: tarn
		Version: $version
		Architecture: $arch
		Maintainer: The maintainers of tarn <maintainers@tarn.invalid>
		Installed-Size: $(du -sk --apparent-size "$root" | cut -f 1)
		Recommends: ca-certificates
		Section: net
		Priority: optional
		Description: caching proxy for OCI registries, on each node
		 containerd pulls through it, every tag is confirmed with its registry by one
		 cheap HEAD, and everything else comes from the node's own disk.
	END
	chmod -R go-w,a+X "$root"
	find "$root" -exec touch --no-dereference --date="@$epoch" {} +
	SOURCE_DATE_EPOCH=$epoch dpkg-deb --root-owner-group --build "$root" "$out/tarn_${version}_$arch.deb"
}

case ${1:-} in
image | deb) "$@" ;;
*)
	sed -n '3,10s/^# \{0,1\}//p' "$0" >&2
	exit 2
	;;
esac
