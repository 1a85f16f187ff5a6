#!/bin/bash
# Installs what is missing on a Debian or Ubuntu machine: `install.sh build` to compile, `install.sh test` to compare with Redis.
# Where nothing is missing it asks nothing, needs no rights and no network.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
policy=/usr/sbin/policy-rc.d
policy_is_ours=no

fail() {
    echo "error: $*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "this needs root or sudo: $*"
    fi
}

remove_policy() {
    if [ "$policy_is_ours" = yes ]; then
        as_root rm -f "$policy"
    fi
}

# install PACKAGE...: without starting any service that comes along, so that port 6379 stays free.
install() {
    command -v apt-get >/dev/null || fail "please install: $* (there is no apt-get here)"
    echo "installing $*" >&2
    if [ ! -e "$policy" ]; then
        trap remove_policy EXIT
        policy_is_ours=yes
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends "$@" >&2
}

# The package lists of a fresh machine may be empty or old: fetched once, and only when something is to be installed.
update_lists() {
    command -v apt-get >/dev/null || return 0
    as_root apt-get update --quiet >&2 || echo "warning: the package lists could not be updated" >&2
}

# The library that bindgen loads while RocksDB is built, with or without its -dev package.
has_libclang() {
    local file
    for file in "${LIBCLANG_PATH:-/nonexistent}"/libclang*.so* /usr/lib/llvm-*/lib/libclang{,-[0-9]*}.so* \
        /usr/lib/*/libclang{,-[0-9]*}.so* /usr/lib64/libclang.so* /usr/local/lib/libclang.so*; do
        [ -e "$file" ] && return
    done
    return 1
}

# The headers of the compiler itself, such as stddef.h, which libclang reads; those of g++ will do as well.
has_compiler_headers() {
    local file
    for file in /usr/lib/llvm-*/lib/clang/*/include/stddef.h /usr/lib/clang/*/include/stddef.h \
        /usr/lib64/clang/*/include/stddef.h; do
        [ -e "$file" ] && return
    done
    return 1
}

# The version of libclang that this release of Debian or Ubuntu takes by default.
clang_version() {
    local version
    version=$(apt-cache depends libclang1 2>/dev/null | sed -n 's/.*Depends: libclang1-\([0-9]*\).*/\1/p' | head -n 1)
    if [ -z "$version" ]; then
        version=$(apt-cache search --names-only '^libclang1-[0-9]+$' | sed 's/libclang1-\([0-9]*\).*/\1/' | sort -n | tail -n 1)
    fi
    echo "$version"
}

for_build() {
    command -v cargo >/dev/null || fail "cargo is missing: install Rust first, see https://rustup.rs"
    local missing=()
    command -v c++ >/dev/null && command -v cc >/dev/null || missing+=(g++)
    local clang=no
    has_libclang && has_compiler_headers || clang=yes
    if [ ${#missing[@]} -eq 0 ] && [ "$clang" = no ]; then
        return
    fi
    update_lists
    if [ "$clang" = yes ]; then
        local version
        version=$(clang_version)
        [ -n "$version" ] || fail "please install libclang: no package libclang1 is known here"
        missing+=("libclang1-$version" "libclang-common-$version-dev")
    fi
    install "${missing[@]}"
}

for_test() {
    local missing=()
    command -v redis-server >/dev/null || missing+=(redis-server)
    command -v redis-cli >/dev/null && command -v redis-benchmark >/dev/null || missing+=(redis-tools)
    # The Python of the system: others on the path do not see its packages.
    /usr/bin/python3 -c 'import redis' 2>/dev/null || missing+=(python3-redis)
    # For partitions, which only root can make: the tests say so and pass where they cannot.
    if [ "$(id -u)" = 0 ]; then
        command -v ip >/dev/null || missing+=(iproute2)
        command -v nft >/dev/null || missing+=(nftables)
    fi
    if [ ${#missing[@]} -eq 0 ]; then
        return
    fi
    update_lists
    install "${missing[@]}"
}

case "${1:-}" in
build) for_build ;;
test) for_test ;;
*) fail "usage: install.sh build|test" ;;
esac
