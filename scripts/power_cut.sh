#!/bin/bash
# Cuts the power under a server: its data lie on an ext4 image on a loop mount, which is shut down in the middle of a load
# without writing its journal (FS_IOC_SHUTDOWN), so that all that was not synced is gone. Then the process is killed, the image
# is mounted again, the server is started on it, and every write that was acknowledged is asked for.
#
#   scripts/power_cut.sh
#   FILES=60 scripts/power_cut.sh      no server: cuts the power so often under a program that appends to files and syncs them
#
# fsync=always must have lost nothing; fsync=everysec may have lost the last second and what one sync takes, which is reported:
# how old the oldest lost write was when the power went. Each connection writes to one shard: what is lost must be the last
# of what it wrote. Answers that come once the cut has begun are counted apart and may be lost: a sync that meets the shutdown may
# return 0 without effect (FILES shows it), and a real cut lets no answer out.
#
# Needs root, a loop device and mkfs.ext4; where they are not permitted it says so and ends with 0.
# Options, as environment variables: VASTO=path of the binary, SETTINGS="always everysec", ROUNDS=3 (for each of them),
# WRITES=5000 (acknowledged before the cut, at least), OLDEST_MS=3000 (more than that lost with everysec is a failure), PORT=17100,
# WORK=folder for image and logs (else a temporary one, removed in the end).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

vasto=${VASTO:-${CARGO_TARGET_DIR:-target}/release/vasto}
settings=${SETTINGS:-always everysec}
rounds=${ROUNDS:-3}
writes=${WRITES:-5000}
oldest_ms=${OLDEST_MS:-3000}
port=${PORT:-17100}
export LC_ALL=C

[ -n "${FILES:-}" ] || [ -x "$vasto" ] || {
    echo "no $vasto: run 'make build' first, or name the binary in VASTO" >&2
    exit 1
}

if [ -n "${WORK:-}" ]; then
    work=$WORK
    mkdir -p "$work"
else
    work=$(mktemp -d)
fi
image=$work/disk.img
mounted=$work/disk
ledger=$work/ledger
pid=

clean_up() {
    kill_server
    umount "$mounted" 2>/dev/null || true
    if [ -z "${WORK:-}" ]; then
        rm -rf "$work"
    fi
}
trap clean_up EXIT

skip() {
    echo "skipped: $*"
    exit 0
}

kill_server() {
    if [ -n "$pid" ]; then
        kill -9 "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
        pid=
    fi
}

# start FSYNC: waits for the line that says it serves.
start() {
    local waited=0
    : >"$work/out"
    "$vasto" server --listen "127.0.0.1:$port" --data "$mounted/data" --shards 2 --fsync "$1" \
        --row-cache 16mb --block-cache 16mb --write-buffer 32mb >"$work/out" 2>>"$work/log" &
    pid=$!
    until grep -q ' ready: ' "$work/out"; do
        if ! kill -0 "$pid" 2>/dev/null || [ $waited -gt 600 ]; then
            echo "FAIL  the server does not serve:" >&2
            tail -n 20 "$work/log" >&2
            exit 1
        fi
        waited=$((waited + 1))
        sleep 0.1
    done
}

[ "$(id -u)" = 0 ] || skip "only root may mount"
command -v mkfs.ext4 >/dev/null || skip "no mkfs.ext4 here"
mkdir -p "$mounted"

# fresh_disk: mounts an empty file system.
fresh_disk() {
    rm -f "$image"
    truncate -s 1G "$image"
    mkfs.ext4 -q -F "$image"
    mount -o loop "$image" "$mounted" 2>"$work/mount" || skip "cannot mount: $(cat "$work/mount")"
}

# cut_power COMMAND...: the command that ends with the cut.
cut_power() {
    local status=0
    "$@" || status=$?
    [ $status != 3 ] || skip "the file system cannot be shut down"
    [ $status = 0 ] || exit 1
    kill_server
    umount "$mounted"
    mount -o loop "$image" "$mounted"
}

failures=0
cuts=0
if [ -n "${FILES:-}" ]; then
    settings=
    for cuts in $(seq "$FILES"); do
        fresh_disk
        cut_power python3 scripts/power_cut.py cut-files "$ledger" "$mounted"
        echo -n "files, round $cuts: "
        python3 scripts/power_cut.py check-files "$ledger" "$mounted" || failures=$((failures + 1))
        umount "$mounted"
    done
fi
for fsync in $settings; do
    for round in $(seq "$rounds"); do
        fresh_disk
        : >"$work/log"
        start "$fsync"
        cut_power python3 scripts/power_cut.py cut "$port" "$ledger" "$mounted" "$writes"
        echo "--- second life" >>"$work/log"
        start "$fsync"
        cuts=$((cuts + 1))
        echo -n "fsync=$fsync round $round: "
        limit=0
        if [ "$fsync" = everysec ]; then
            limit=$oldest_ms
        fi
        python3 scripts/power_cut.py check "$port" "$ledger" "$limit" || {
            failures=$((failures + 1))
            sed -n '/--- second life/,$p' "$work/log" | grep ERROR >&2 || true
        }
        kill_server
        umount "$mounted"
    done
done
[ $failures = 0 ] || {
    echo "FAIL  $failures of $cuts rounds lost more than they may"
    exit 1
}
echo "PASS  $cuts power cuts"
