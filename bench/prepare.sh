# What the scripts of this folder need before they start; to be read by them with `.`.

# require PROGRAM PACKAGE: installs the Debian package when the program is missing and we may.
require() {
    PATH=$PATH:/usr/sbin
    command -v "$1" >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing $2" >&2
        # Debian starts a server that it installs, unless a policy forbids it; ours start their own.
        RUNLEVEL=1 apt-get install --yes --quiet "$2" >&2
    else
        echo "error: $1 is missing (Debian: apt-get install $2)" >&2
        exit 1
    fi
}

# Builds the binary unless the caller names one.
build_vasto() {
    [ -n "${VASTO:-}" ] && return
    (cd "$folder/.." && cargo build --release --package vasto >&2)
}
