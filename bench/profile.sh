#!/bin/sh
# Says where the CPU of one variant goes under one load: by process, by part (kernel, HTTP/2, RocksDB …), by function.
#
#   VARIANT=vasto-3 OPERATION=get PIPELINE=16 bench/profile.sh
#
# Options, as environment variables: VARIANT=vasto-1 (see run.sh), OPERATION=new | get | set, PIPELINE=16, SIZE=64, KEYS=200000,
# CLIENTS=50, SECONDS_MEASURED=8, TOP=25 (functions shown), VASTO and VASTO_…_ARGS as for run.sh. Needs perf (Debian: linux-perf).
set -eu

folder=$(cd "$(dirname "$0")" && pwd)
. "$folder/prepare.sh"
require perf linux-perf
build_vasto
exec python3 -B "$folder/profile_variant.py"
