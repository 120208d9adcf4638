#!/usr/bin/env bash
# run.sh LIBRARIES COMMAND...: runs a command, and every Python below it, with the stand-in in the driver's place.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) libraries=$(realpath "$1")
shift
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} LD_PRELOAD=$libraries/libcudart.so.13
export PYTHONPATH=$here/python${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$@"
