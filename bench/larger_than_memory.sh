#!/bin/sh
# Measures Vasto with ten times more data than its caches hold, beside redis-server with all of it in memory, in one run.
# Prints a markdown table, asserts nothing.
#
#   bench/larger_than_memory.sh           640 MiB of data, 64 MiB of caches: about six minutes on two cores
#   QUICK=1 bench/larger_than_memory.sh   a look at a tenth of that: two minutes
#
# Options, as environment variables:
#   DATA_MIB=640  VALUE_BYTES=256    bytes of all values, and of one
#   CACHE_MIB=64                      row cache and block cache together, half each
#   WRITE_BUFFER_MIB=32               memtables; rows in them are in memory too
#   CLIENTS=50  PIPELINES="1 16"  DURATION_SECONDS=10 (of each measurement)
#   EVICT_MILLISECONDS=250            how often the kernel is told to forget the pages of the data files, which it would
#                                     keep in memory beside our caches; 0 = only before each measurement
#   VARIANTS="redis vasto-1"          or vasto, vasto-3, base-1 …
#   BASELINE, VASTO, VASTO_BENCH, VASTO_..._ARGS as in run.sh
set -eu

folder=$(cd "$(dirname "$0")" && pwd)
. "$folder/prepare.sh"

case " ${VARIANTS:-redis} " in
*redis*) require redis-server redis-server ;;
esac
build_vasto

exec python3 -B "$folder/larger_than_memory.py"
