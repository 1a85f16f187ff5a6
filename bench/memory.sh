#!/bin/sh
# Measures what memory Vasto takes: over many requests, for idle connections, and for a client that never reads.
# Prints markdown tables, asserts nothing.
#
#   bench/memory.sh               everything: about five minutes on two cores
#   QUICK=1 bench/memory.sh       a look: one minute
#
# Options, as environment variables:
#   PARTS="requests idle flood"
#   REQUESTS=100000000  SAMPLES=20  KEYS=1000000  VALUE_BYTES=64  CLIENTS=50  PIPELINE=64
#   IDLE_CONNECTIONS=5000
#   FLOOD_BYTES=1073741824  FLOOD_VALUE_BYTES=1024  FLOOD_SECONDS=120 (how long the client stays at most)
#   VARIANT=vasto-1 | vasto | vasto-3 | redis
#   VASTO, VASTO_BENCH, VASTO_..._ARGS as in run.sh
set -eu

folder=$(cd "$(dirname "$0")" && pwd)
. "$folder/prepare.sh"

[ "${VARIANT:-vasto-1}" = redis ] && require redis-server redis-server
build_vasto
# The limit of open files may be raised as far as the system lets us.
ulimit -n "$(ulimit -Hn)"

exec python3 -B "$folder/memory.py"
