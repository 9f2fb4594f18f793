# SPDX-License-Identifier: Apache-2.0
# Names for the commands that people type. What each change has to pass is in .ci/run.

FUZZTIME ?= 30s

.PHONY: test race lint e2e e2e-clients e2e-cluster soak nightly bench house fuzz image deb ci

test:
	go test ./...
	cd deploy && go test ./...

race:
	go test -race ./...

lint:
	test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet ./...
	go tool staticcheck ./...
	staticcheck=$$(go tool -n staticcheck); for module in bench deploy e2e tools/house; do \
		(cd $$module && go vet ./... && "$$staticcheck" ./...) || exit 1; \
	done

# Real clients against the built binary. Needs Linux and root; installs what is missing.
e2e:
	e2e/install.sh
	cd e2e && go test -count=1 ./...

# The same with all clients that we know; installs and builds some more.
e2e-clients:
	e2e/install.sh clients
	cd e2e && TARN_E2E_CLIENTS=1 go test -count=1 ./...

# The chart, installed by helm on a real cluster of one node. Builds Kubernetes, half an hour on two cores, once.
e2e-cluster:
	e2e/install.sh cluster
	cd e2e && TARN_E2E_CLUSTER=1 go test -count=1 -timeout 20m -run OnACluster -v .

# Everything going wrong at once, at random, for SOAK.
SOAK ?= 10m

soak:
	e2e/install.sh
	cd e2e && TARN_E2E_SOAK=$(SOAK) go test -count=1 -timeout 0 -run TestSoak -v .

# What CI has samples of: each fault at each step, each system call up to the 200th, more rounds. Takes some hours.
nightly: soak
	TARN_TEST_FAULTS=all TARN_TEST_ROUNDS=2000 go test -count=1 -timeout 0 ./cache
	TARN_TEST_DIRECT=100000 go test -count=1 -timeout 0 -run TestAsIfTheRegistryHadBeenAskedDirectly ./proxy
	cd e2e && TARN_E2E_FAULTS=200 TARN_E2E_ROUNDS=10 TARN_E2E_BOUND=1024 go test -count=1 -timeout 0 -run 'FailingDisk|LargerThan|TheBoundHolds' -v .

# tarn beside other systems, in turns on one machine; see docs/PERFORMANCE.md. BENCH are its flags. Wants two cores.
BENCH ?=

bench:
	bench/run.sh $(BENCH)
	go test -run '^$$' -bench . -benchmem ./...

# How wide the house is, and what requests for what is cached run through.
house:
	cd tools/house && go run . ../.. && go run . -warm ../..

# Each fuzz target for FUZZTIME.
fuzz:
	set -e; for package in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$package; \
		done; \
	done

# What nodes run, in bin/: a container image for amd64 and arm64, and a package for this machine's architecture. VERSION
# names them. One commit gives the same bytes wherever it is built.
export VERSION IMAGE OUT

image:
	deploy/build.sh image

deb:
	deploy/build.sh deb

ci:
	.ci/run
