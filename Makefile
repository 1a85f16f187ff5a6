# What a person does with Vasto. Everything that is missing on a Debian or Ubuntu machine with Rust is installed first, and only then.

SHELL := /bin/bash
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
VASTO := $(TARGET)/release/vasto
# More options for `make run`, such as ARGS="--shards 12".
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run build test check format-check lint bench packages install-build install-test

help: ## shows this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: build ## builds and serves Redis clients on 127.0.0.1:6379, data in ./data; ARGS="..." for more options
	@$(VASTO) server --listen 127.0.0.1:6379 --data ./data $(ARGS)

build: install-build ## builds the one binary, target/release/vasto
	$(CARGO) build --release --package vasto

# One profile for all: RocksDB is compiled once.
test: install-build install-test ## all tests; those over the wire compare with redis-server
	$(CARGO) build --release --package vasto
	$(CARGO) test --release --workspace

check: format-check lint ## formatting and lints, as the CI does

format-check:
	$(CARGO) fmt --all --check

lint: install-build
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

bench: build ## ours beside redis-server and nutcracker: figures, no judgement
	bash bench/run.sh

packages: build install-test ## the package records of apt through gateways and stores, stopped, killed, compared byte for byte
	bash scripts/packages.sh

install-build: ## installs g++ and libclang, where they are missing
	@bash scripts/install.sh build

install-test: ## installs redis-server, redis-tools, python3-redis, and for root nftables, where they are missing
	@bash scripts/install.sh test
