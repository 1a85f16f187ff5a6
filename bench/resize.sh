#!/bin/sh
# Measures what growing and shrinking cost: how fast rows move and what clients beside it notice, for how long a fence stands, what is read
# and written, and what `redis-cli --cluster reshard` takes for as much data. Prints markdown tables, asserts nothing.
#
#   bench/resize.sh                  about half an hour on two cores, 10 GB on disk at most
#   QUICK=1 bench/resize.sh          a look: a few minutes
#
# Options, as environment variables:
#   PARTS="speed fences reshard cost"
#   VALUES_MB=5000  VALUE_BYTES=1024      of speed; half of it moves
#   TINY_KEYS=5000000  TINY_BYTES=8
#   RATES="0 default"                     --resize-rate of the stores, MB/s; 0 is unlimited
#   CLIENTS=20  READ_RATIO=0.5            of the load beside
#   RESIZES=10                            of fences
#   RESHARD_MB=1000                       of reshard; a quarter of it moves
#   COST_MB="1000 2000 4000"              of cost
#   VASTO, VASTO_BENCH, VASTO_STORE_ARGS, VASTO_GATEWAY_ARGS, VASTO_MASTER_ARGS as in run.sh
set -eu

folder=$(cd "$(dirname "$0")" && pwd)
. "$folder/prepare.sh"

require redis-server redis-server
require redis-cli redis-tools
build_vasto

exec python3 -B "$folder/resize.py"
