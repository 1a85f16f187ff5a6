#!/bin/bash
# Real input through separate processes: every package record that apt knows is loaded with `redis-cli --pipe` through
# one gateway, read back and compared byte for byte through another, and walked with --scan; then all is stopped with
# SIGTERM, started and checked again; then killed with kill -9, started and checked again.
#
#   scripts/packages.sh
#
# Options, as environment variables: VASTO=path of the binary, STORES=3, SHARDS=6, PORTS=17000 (the first of ten free
# ports), WORK=folder for data and logs (else a temporary one, removed in the end).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

vasto=${VASTO:-${CARGO_TARGET_DIR:-target}/release/vasto}
stores=${STORES:-3}
shards=${SHARDS:-6}
ports=${PORTS:-17000}
export LC_ALL=C

[ -x "$vasto" ] || {
    echo "no $vasto: run 'make build' first, or name the binary in VASTO" >&2
    exit 1
}
bash scripts/install.sh test

if [ -n "${WORK:-}" ]; then
    work=$WORK
    mkdir -p "$work"
else
    work=$(mktemp -d)
fi
master_address=127.0.0.1:$ports
gateway_ports=($((ports + 8)) $((ports + 9)))
declare -A pids=()
failures=0
# Where the load's file, the expected keys and what was found lie.
load=$work/load.resp
keys=$work/keys
libraries=$work/libraries

clean_up() {
    local name
    for name in "${!pids[@]}"; do
        kill -9 "${pids[$name]}" 2>/dev/null || true
    done
    if [ -z "${WORK:-}" ]; then
        rm -rf "$work"
    fi
}
trap clean_up EXIT

# verdict TRUE-OR-FALSE TEXT
verdict() {
    if [ "$1" = true ]; then
        echo "PASS  $2"
    else
        echo "FAIL  $2"
        failures=$((failures + 1))
    fi
}

# start NAME OPTION...: one process; its line on standard output says that it serves.
start() {
    local name=$1
    shift
    : >"$work/$name.out"
    "$vasto" "$@" >"$work/$name.out" 2>>"$work/$name.log" &
    pids[$name]=$!
}

await() {
    local name=$1 waited=0
    until grep -q ' ready: ' "$work/$name.out"; do
        if ! kill -0 "${pids[$name]}" 2>/dev/null || [ $waited -gt 1200 ]; then
            echo "FAIL  $name does not serve:" >&2
            tail -n 20 "$work/$name.log" >&2
            exit 1
        fi
        waited=$((waited + 1))
        sleep 0.1
    done
    echo "      $(cat "$work/$name.out")"
}

start_all() {
    local number name
    start master master --listen "$master_address" --bootstrap-shards "$shards" --bootstrap-stores "$stores"
    for number in $(seq "$stores"); do
        start "store-$number" store --master "$master_address" --listen "127.0.0.1:$((ports + number))" \
            --data "$work/data-$number"
    done
    for number in 0 1; do
        start "gateway-$number" gateway --master "$master_address" --listen "127.0.0.1:${gateway_ports[$number]}"
    done
    for name in master $(seq -f 'store-%g' "$stores") gateway-0 gateway-1; do
        await "$name"
    done
    # The shards of a restarted store report to the master one after the other.
    for number in 0 1; do
        local waited=0
        until redis-cli -p "${gateway_ports[$number]}" DBSIZE 2>/dev/null | grep -qE '^[0-9]+$'; do
            waited=$((waited + 1))
            if [ $waited -gt 600 ]; then
                echo "FAIL  gateway-$number does not serve: $(redis-cli -p "${gateway_ports[$number]}" DBSIZE 2>&1)"
                exit 1
            fi
            sleep 0.1
        done
    done
}

# stop_all SIGNAL: to all at once, and waits; with TERM every process must end well.
stop_all() {
    local name status all_well=true
    for name in "${!pids[@]}"; do
        kill "-$1" "${pids[$name]}"
    done
    for name in "${!pids[@]}"; do
        status=0
        wait "${pids[$name]}" 2>/dev/null || status=$?
        if [ "$1" = TERM ] && [ $status != 0 ]; then
            echo "      $name ended with status $status"
            all_well=false
        fi
        unset "pids[$name]"
    done
    verdict $all_well "all processes ended after SIG$1"
}

check() {
    local when=$1 found=$work/found count
    if /usr/bin/python3 -B scripts/package_records.py compare "$work/records" "${gateway_ports[1]}" >"$work/compared"; then
        verdict true "$when: $(cat "$work/compared")"
    else
        verdict false "$when: $(tail -n 3 "$work/compared")"
    fi
    redis-cli -p "${gateway_ports[0]}" --scan >"$found.raw"
    sort "$found.raw" >"$found"
    count=$(wc -l <"$found")
    verdict "$(cmp -s "$found" "$keys" && echo true || echo false)" \
        "$when: --scan lists each of the $(wc -l <"$keys") keys exactly once ($count lines, $(uniq -d "$found" | wc -l) twice)"
    redis-cli -p "${gateway_ports[1]}" --scan --pattern 'pkg:lib*' | sort >"$found"
    verdict "$(cmp -s "$found" "$libraries" && echo true || echo false)" \
        "$when: --scan --pattern 'pkg:lib*' lists the $(wc -l <"$libraries") keys that a filter gives ($(wc -l <"$found") lines)"
}

apt-cache dumpavail >"$work/records"
/usr/bin/python3 -B scripts/package_records.py keys "$work/records" | sort >"$keys"
grep '^pkg:lib' "$keys" >"$libraries" || true
echo "      $(wc -l <"$keys") packages, $(wc -c <"$work/records") bytes"
[ -s "$keys" ] || {
    echo "FAIL  apt knows no packages: run 'apt-get update' first" >&2
    exit 1
}

start_all
# Half through each gateway, at the same time; a package that comes twice comes in one half, in order.
/usr/bin/python3 -B scripts/package_records.py load "$work/records" 0 2 >"$load.0"
/usr/bin/python3 -B scripts/package_records.py load "$work/records" 1 2 >"$load.1"
begin=$(date +%s.%N)
redis-cli -p "${gateway_ports[0]}" --pipe <"$load.0" >"$work/loaded.0" 2>&1 &
first=$!
redis-cli -p "${gateway_ports[1]}" --pipe <"$load.1" >"$work/loaded.1" 2>&1 || true
wait $first || true
end=$(date +%s.%N)
for number in 0 1; do
    report=$(tail -n 1 "$work/loaded.$number")
    verdict "$(grep -q '^errors: 0, ' <<<"$report" && echo true || echo false)" "loaded through gateway-$number with redis-cli --pipe: $report"
done
echo "      loading took $(echo "$begin $end" | awk '{ printf "%.1f", $2 - $1 }') s"
check "loaded"
stop_all TERM
start_all
check "stopped with SIGTERM and restarted"
stop_all KILL
start_all
check "killed with kill -9 and restarted"
stop_all TERM

if [ $failures = 0 ]; then
    echo "PASS  everything"
else
    echo "FAIL  $failures checks; logs and data: WORK=folder keeps them"
    exit 1
fi
