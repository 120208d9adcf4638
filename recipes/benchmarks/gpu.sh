#!/usr/bin/env bash
# Everything that needs a GPU, in two calls on a machine that has torch with CUDA, pytest, pytest-xdist, hypothesis,
# pybind11 and a C++ compiler. What it lacks beyond that comes from .wheels/ (see gpu_wheels.sh).
#
#     recipes/benchmarks/gpu.sh one RESULTS [--toy]   at most 330 s: facts, build, smoke test, test_cuda.py, host tier
#     recipes/benchmarks/gpu.sh two RESULTS [--toy]   at most 300 s: all suites, host tier, drive tier, memcheck, doctor
#
# RESULTS: a folder for what is measured. `two` uses what `one` built, and builds it where that is gone. Every part has
# a limit of its own, within which all of them fit, and ends by SIGINT, so that what it printed survives; parts.jsonl
# says how each began and ended, as they do. --toy: smallest sizes, to rehearse every command without a GPU's time.
set -uo pipefail
cd "$(dirname "$0")/../.."
call=${1:?one or two}
results=$(realpath -m "${2:?a folder for the results}")
toy=${3:-}
python=${PYTHON:-python3}
site=$PWD/build/gpu-site # what was in .wheels/: the environment of the machine stays as it is
patience=${SSDTRAIN_PATIENCE:-1} # all limits times this, for a rehearsal where others compute too
begun=$SECONDS
failed=0
mkdir -p "$results" build

on_a_drive() { # a new folder in the first of these places that is no memory
  local place
  for place in "${TMPDIR:-/tmp}" /var/tmp "$PWD/build"; do
    case $(stat -f -c %T "$place" 2>/dev/null || echo none) in
    tmpfs | ramfs | none) ;;
    *) mktemp -d -p "$place" ssdtrain-XXXXXX 2>/dev/null && return ;;
    esac
  done
  mktemp -d
}

if [ -n "${SSDTRAIN_BENCH_DIRECTORY:-}" ]; then
  directory=$SSDTRAIN_BENCH_DIRECTORY
  mkdir -p "$directory"
else
  directory=$(on_a_drive)
  trap 'rm -rf "$directory"' EXIT
fi
export PYTHONPATH=$PWD:$site:${PYTHONPATH:-} FAIL_WITHOUT_CUDA=1 CUBLAS_WORKSPACE_CONFIG=:4096:8

left() { echo $((budget * patience - 6 - (SECONDS - begun))); } # but for those in which the last part is killed

least() { # least LIMIT: that, or what is left
  local limit=$(($1 * patience)) now
  now=$(left)
  echo $((limit < now ? limit : now))
}

note() { echo "{\"part\": \"$1\", $2}" >>"$results/parts.jsonl"; }

part() { # part SECONDS NAME COMMAND...: runs it for so long at most, keeps what it says, goes on
  local limit name=$2 begin=$SECONDS rc
  limit=$1
  shift 2
  if [ "$limit" -lt 5 ]; then
    echo "== $name: no time left"
    rc=none
  else
    echo "== $name ($limit s): $*"
    note "$name" "\"begun\": $((begin - begun))"
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$results/$name.txt" 2>&1
    rc=$?
    [ $rc = 0 ] || failed=1
    tail -n 3 "$results/$name.txt" | cut -c1-200
  fi
  note "$name" "\"rc\": \"$rc\", \"limit\": $limit, \"seconds\": $((SECONDS - begin))"
}

bench() { # bench LIMIT NAME ARGUMENTS...: gpu.py, whose JSON is written as it goes and which ends in time by itself
  local limit name=$2
  limit=$(least "$1")
  shift 2
  part "$limit" "$name" "$python" recipes/benchmarks/gpu.py "$directory" --json "$results/$name.json" \
    --seconds $((limit - 15)) "${small[@]}" "$@"
}

suite() { # suite LIMIT NAME WORKERS ARGUMENTS...: each test in the output as it ends; one that hangs ends alone
  local limit=$1 name=$2 workers=$3 hang=()
  shift 3
  "$python" -c 'import pytest_timeout' 2>/dev/null && hang=(--timeout=60 --timeout-method=thread)
  limit=$(least "$limit")
  part "$limit" "$name" env OMP_NUM_THREADS=1 "$python" -m pytest -v --tb=short -W default -n "$workers" --dist load \
    --durations=10 "${hang[@]}" "${few[@]}" "$@"
}

prepare() { # what this machine lacks, and the extension
  if compgen -G ".wheels/*.whl" >/dev/null && [ ! -d "$site" ]; then
    part "$(least 15)" wheels "$python" -c 'import sys, zipfile
for wheel in sys.argv[2:]: zipfile.ZipFile(wheel).extractall(sys.argv[1])' "$site" .wheels/*.whl
  fi
  if [ "$call" = one ] || ! "$python" -c 'import ssdtrain._C' 2>/dev/null; then
    part "$(least 90)" build env SSDTRAIN_BUILD_JOBS="$(getconf _NPROCESSORS_ONLN)" "$python" setup.py build_ext --inplace
  fi
}

small=() few=() smoke=() most=12 some=4
if [ "$toy" = --toy ]; then
  small=(--hidden 64 --heads 2 --layers 2 --sequence 64 --batch 2 --repeats 1 --warm-up 2 --link-nbytes 1048576
    --dtype float32 --policy '{"min_nbytes": 0, "staging_nbytes": "256KiB", "prefetch_nbytes": "256KiB"}')
  few=(-k "(equal_to_the_bit and host) or second_unpack")
  smoke=(--toy) most=2 some=2
fi
size() { [ -n "$toy" ] || echo --hidden "$1" --heads "$2" --layers "$3" --sequence "$4" --batch "$5"; }

one() {
  budget=330
  part "$(least 40)" smoke "$python" recipes/benchmarks/gpu_smoke.py "$results/smoke.json" "${smoke[@]}"
  prepare
  suite 90 cuda $some tests/devices/test_cuda.py
  bench 330 host-8192 --tier host $(size 8192 64 4 4096 4)
}

two() {
  budget=300
  prepare
  suite 100 suites $most --devices cuda tests/devices/test_accelerator.py tests/scheduling/test_accelerator_plans.py \
    tests/activations/test_autograd.py tests/activations/test_inplace.py tests/activations/test_saved_tensors.py \
    tests/activations/test_weights.py tests/activations/test_checkpoint.py tests/activations/test_training.py \
    tests/devices/test_state_devices.py tests/optimizer/test_cpu_updates.py tests/optimizer/test_delayed_update.py
  bench 80 host-16384 --tier host $(size 16384 128 2 2048 4)
  bench 55 drive-8192 --tier drive $(size 8192 64 2 2048 2)
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -n "$sanitizer" ]; then
    part "$(least 45)" memcheck "$sanitizer" --tool memcheck --error-exitcode 9 "$python" tests/helpers/cuda_small.py "$directory"
  fi
  part "$(least 20)" doctor "$python" -m ssdtrain doctor "$directory"
  if [ -n "$sanitizer" ] && [ "$(left)" -gt 20 ]; then
    part "$(least 40)" stream-races env PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync "$sanitizer" --tool memcheck \
      --track-stream-ordered-races all --error-exitcode 9 "$python" tests/helpers/cuda_small.py "$directory"
  fi
}

case $call in
one | two) $call ;;
*) echo "Expected 'one' or 'two', got '$call'" >&2 && exit 2 ;;
esac
echo "== $call: $((SECONDS - begun)) s of $((budget * patience))"
exit $failed
