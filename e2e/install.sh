#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts on a bare Debian machine what the end-to-end tests drive: runc, strace, ip, skopeo, mkfs.ext4 and chromium from Debian; containerd with
# its shim and ctr, and crane, built from source; prometheus and promtool from Debian; what drives chromium, from npm by page/package-lock.json. With the argument "clients", the further clients as well: podman and
# docker from Debian, oras, regctl and BuildKit from source. Says on its last line, alone on standard output, the folders
# with the programs, as on a PATH. Nothing is done twice: a second run costs a few milliseconds. With the argument "cluster", all that a cluster of one node is made
# of: etcd from Debian, Kubernetes and helm from source; half an hour on two cores.
set -euo pipefail

log() { printf 'e2e/install.sh: %s\n' "$*" >&2; }

# Debian keeps runc and ip in sbin, which is not on every root shell's PATH.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

packages=()
command -v runc >/dev/null || packages+=(runc)
command -v strace >/dev/null || packages+=(strace)
[[ -d /usr/share/ca-certificates/mozilla ]] || packages+=(ca-certificates) # for tarn's own image
command -v ip >/dev/null || packages+=(iproute2)
command -v skopeo >/dev/null || packages+=(skopeo)
command -v mkfs.ext4 >/dev/null || packages+=(e2fsprogs)
command -v chromium >/dev/null || packages+=(chromium)
command -v npm >/dev/null || packages+=(nodejs npm)
if [[ ${1:-} == clients ]]; then
	command -v podman >/dev/null || packages+=(podman)
	command -v debootstrap >/dev/null || packages+=(debootstrap)
fi
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

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${HOME:-/root} # a service manager may start us without HOME
export HOME=$home
cache=${XDG_CACHE_HOME:-$home/.cache}/tarn-ci
mkdir -p "$cache"
building=
trap '[[ -z $building ]] || rm -rf "$building"' EXIT

# keep NAME COMMAND... makes the folder NAME in the cache by running the command in an empty one. That has another name
# until it is whole: a folder under the final name is complete, even after a kill.
folders=()
keep() {
	local want=$cache/$1
	if [[ ! -d $want ]]; then
		building=$(mktemp -d "$cache/building.XXXXXX")
		log "making $1"
		(cd "$building" && "${@:2}") </dev/null >&2
		# Another run may have been quicker; its folder is as good as ours.
		mv -T "$building" "$want" 2>/dev/null || [[ -d $want ]]
		rm -rf "$building"
	fi
	folders+=("$want")
}
# build PACKAGE@VERSION... from a folder outside every module, so that no go.mod or go.work near us has a say.
build() {
	local package
	for package; do
		CGO_ENABLED=0 GOWORK=off GOFLAGS=-trimpath GOBIN=$PWD go install "$package"
	done
}
# A Debian of a later release in a folder, and how its clients are started: by chroot, in mounts that the tests make.
unpack_debian13() {
	local mirror program
	mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk '$2 ~ /^(bookworm|oldstable|stable)$/ { print $1; exit }')
	debootstrap --variant=minbase --include=podman,skopeo,docker.io,docker-cli,ca-certificates,crun trixie root "$mirror"
	rm -rf root/var/cache/apt root/var/lib/apt/lists
	for program in skopeo podman docker dockerd; do
		printf '#!/bin/sh\nexec chroot "$(dirname "$0")/root" %s "$@"\n' "$program" >"$program-of-debian13"
		chmod +x "$program-of-debian13"
	done
}
# An older containerd without its service, which would start at once.
unpack_containerd_of_debian() {
	apt-get download containerd
	dpkg -x containerd_*.deb root
	cp root/usr/bin/containerd containerd-of-debian
	rm -rf root containerd_*.deb
}
# Prometheus and promtool without the service, which would start at once.
unpack_prometheus() {
	apt-get download prometheus
	dpkg -x prometheus_*.deb root
	cp root/usr/bin/prometheus root/usr/bin/promtool .
	rm -rf root prometheus_*.deb
}
# What the lock file names, checked against the sums in it. No script of a package runs, and no browser is fetched.
install_page() {
	cp "$here"/page/package.json "$here"/page/package-lock.json .
	npm ci --ignore-scripts --no-audit --no-fund
}
# docker's programs without its service, which would start at once.
unpack_docker() {
	apt-get download docker.io
	dpkg -x docker.io_*.deb root
	cp root/usr/sbin/dockerd root/usr/bin/docker .
	rm -rf root docker.io_*.deb
}
# etcd without its service, which would start at once.
unpack_etcd() {
	apt-get download etcd-server
	dpkg -x etcd-server_*.deb root
	cp root/usr/bin/etcd .
	rm -rf root etcd-server_*.deb
}
# Kubernetes replaces its own parts in its go.mod, which go install does not take: so from a module that does the same.
# Without a version of its own a kubelet takes itself for one of the year nought.
build_kubernetes() {
	local version=$1 part
	mkdir module
	cd module
	export GOWORK=off CGO_ENABLED=0
	go mod init build
	go mod edit -require="k8s.io/kubernetes@v$version"
	go mod download -json "k8s.io/kubernetes@v$version" >kubernetes.json
	go mod edit -json "$(sed -n 's/.*"GoMod": "\(.*\)".*/\1/p' kubernetes.json)" |
		sed -n 's|.*"Path": "\./staging/src/\(k8s\.io/.*\)".*|\1|p' >staged
	while read -r part; do
		go mod edit -replace="$part=$part@v0.${version#*.}"
	done <staged
	go get k8s.io/kubernetes/cmd/{kubelet,kube-apiserver,kube-controller-manager,kube-scheduler,kubectl}@"v$version"
	go build -trimpath -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=v$version" -o .. \
		k8s.io/kubernetes/cmd/{kubelet,kube-apiserver,kube-controller-manager,kube-scheduler,kubectl}
	cd ..
	chmod -R u+w module
	rm -rf module
}

containerd=github.com/containerd/containerd/v2/cmd
keep containerd@2.4.2 build $containerd/{containerd,ctr,containerd-shim-runc-v2}@v2.4.2 # about five minutes on two cores
keep containerd@debian unpack_containerd_of_debian
keep prometheus@debian unpack_prometheus
keep crane@0.22.1 build github.com/google/go-containerregistry/cmd/crane@v0.22.1
keep conformance@97274622c111 build github.com/opencontainers/distribution-spec/conformance@v0.0.0-20260831232431-97274622c111
lock=$(sha256sum "$here/page/package-lock.json")
keep "page@${lock:0:12}" install_page
if [[ ${1:-} == clients ]]; then
	keep docker@debian unpack_docker
	keep clients@debian13 unpack_debian13
	keep oras@1.2.3 build oras.land/oras/cmd/oras@v1.2.3
	keep regctl@0.11.7 build github.com/regclient/regclient/cmd/regctl@v0.11.7
	keep buildkit@0.17.3 build github.com/moby/buildkit/cmd/{buildctl,buildkitd}@v0.17.3
fi
if [[ ${1:-} == cluster ]]; then
	keep etcd@debian unpack_etcd
	keep kubernetes@1.36.3 build_kubernetes 1.36.3
	keep helm@3.22.0 build helm.sh/helm/v3/cmd/helm@v3.22.0
	keep cni@1.9.1 build github.com/containernetworking/plugins/plugins/{main/ptp,main/loopback,ipam/host-local}@v1.9.1
fi
(
	IFS=:
	printf '%s\n' "${folders[*]}"
)
