#!/bin/sh
# Compares Vasto with redis-server and with nutcracker in front of three of them, all in one run on this machine.
# Prints a markdown table, writes every single measurement as a line of JSON, asserts nothing.
#
#   bench/run.sh                  everything: about 40 minutes on two cores
#   QUICK=1 bench/run.sh          a look: two minutes
#
# Options, as environment variables:
#   KEYS=1000000  CLIENTS=50  PIPELINES="1 16 64"  SIZES="64 1024"  ROUNDS=3
#   REQUESTS=n                    of each run (default: 500000 with a pipeline of 1, else 2500000)
#   VARIANTS="redis redis-everysec nutcracker-3 vasto vasto-1 vasto-3"
#   LOADGEN=vasto | redis-benchmark
#   OUTPUT=target/bench/side-by-side.jsonl
#   BASELINE=path/to/vasto        another binary, an older one, as further variants: base, base-1, base-3
#   VASTO=target/release/vasto    the binary to measure; VASTO_BENCH: the binary that generates the load, if another
#   VASTO_SERVER_ARGS, VASTO_MASTER_ARGS, VASTO_STORE_ARGS, VASTO_GATEWAY_ARGS: more options for these roles
set -eu

folder=$(cd "$(dirname "$0")" && pwd)
. "$folder/prepare.sh"

case " ${VARIANTS:-nutcracker-3} " in
*nutcracker*) require nutcracker nutcracker ;;
esac
require redis-server redis-server
require redis-benchmark redis-tools
build_vasto

exec python3 -B "$folder/side_by_side.py"
