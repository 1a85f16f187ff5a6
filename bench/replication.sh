#!/bin/sh
# Measures what copies cost and give: how far replicas are behind under a steady load, what a write costs all servers with 1, 2 and 3
# copies, and how long a shard takes no write after its primary was killed. Prints markdown tables, asserts nothing.
#
#   bench/replication.sh                  about four minutes on two cores
#   QUICK=1 bench/replication.sh          a look: one and a half
#
# Options, as environment variables:
#   VARIANTS="1/0 2/0 3/0 3/1"            copies/min-replicas
#   RATE=20000                            writes per second, by a timetable
#   DURATION_SECONDS=15  KEYS=200000  VALUE_BYTES=64  CLIENTS=50  SHARDS=3
#   KILLS=5                               of primaries, for each variant
#   VASTO, VASTO_BENCH, VASTO_STORE_ARGS, VASTO_GATEWAY_ARGS, VASTO_MASTER_ARGS as in run.sh
set -eu

folder=$(cd "$(dirname "$0")" && pwd)
. "$folder/prepare.sh"

build_vasto

exec python3 -B "$folder/replication.py"
