#!/usr/bin/env bash
# Everything that needs a GPU, in two calls on a machine that has torch with CUDA, pytest, pytest-xdist, hypothesis,
# pybind11 and a C++ compiler. What it lacks beyond that comes from .wheels/ (see gpu_wheels.sh).
#
#     recipes/benchmarks/gpu.sh one RESULTS [--toy]   at most 330 s: facts, build, smoke test, test_cuda.py, host tier
#     recipes/benchmarks/gpu.sh two RESULTS [--toy]   at most 300 s: all suites, memcheck, drive tier, doctor, host tier
#
# RESULTS: a folder for what is measured. `two` needs what `one` built. Every part has a limit of its own and ends by
# SIGINT, so that what it printed survives; parts.jsonl says how each ended, as they end. --toy: smallest sizes, to
# rehearse every command without a GPU's time.
set -uo pipefail
cd "$(dirname "$0")/../.."
call=${1:?one or two}
results=$(realpath -m "${2:?a folder for the results}")
toy=${3:-}
directory=${SSDTRAIN_BENCH_DIRECTORY:-$(mktemp -d)}
python=${PYTHON:-python3}
mkdir -p "$results" "$directory"
export PYTHONPATH=$PWD:${PYTHONPATH:-} FAIL_WITHOUT_CUDA=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
begun=$SECONDS
failed=0

left() { echo $((budget - (SECONDS - begun))); }

part() { # part LIMIT NAME COMMAND...: runs it within its limit and the budget, keeps what it says, goes on
  local limit=$1 name=$2 begin=$SECONDS rc
  shift 2
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then
    echo "== $name: no time left"
    rc=none
  else
    echo "== $name ($limit s): $*"
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$results/$name.txt" 2>&1
    rc=$?
    [ $rc = 0 ] || failed=1
    tail -n 3 "$results/$name.txt" | cut -c1-200
  fi
  echo "{\"part\": \"$name\", \"rc\": \"$rc\", \"limit\": $limit, \"seconds\": $((SECONDS - begin))}" >>"$results/parts.jsonl"
}

bench() { # bench LIMIT NAME ARGUMENTS...: gpu.py, whose JSON is written as it goes
  local limit=$1 name=$2
  shift 2
  part "$limit" "$name" "$python" recipes/benchmarks/gpu.py "$directory" --json "$results/$name.json" \
    --seconds $((limit - 15)) "${small[@]}" "$@"
}

suite() { # suite LIMIT NAME WORKERS ARGUMENTS...
  local limit=$1 name=$2 workers=$3
  shift 3
  part "$limit" "$name" "$python" -m pytest -q -n "$workers" --dist load --durations=10 "${few[@]}" "$@"
}

small=() few=() smoke=() most=12 some=4
if [ "$toy" = --toy ]; then
  small=(--hidden 64 --heads 2 --layers 2 --sequence 64 --batch 2 --repeats 1 --warm-up 2 --link-nbytes 1048576
    --dtype float32 --policy '{"min_nbytes": 0, "staging_nbytes": "256KiB", "prefetch_nbytes": "256KiB"}')
  few=(-k "(equal_to_the_bit and host) or second_unpack")
  smoke=(--toy) most=2 some=2
fi

one() {
  budget=330
  if [ -d .wheels ]; then
    part 40 wheels "$python" -m pip install --quiet --no-index --no-deps .wheels/*.whl
  fi
  part 90 build env SSDTRAIN_BUILD_JOBS="$(getconf _NPROCESSORS_ONLN)" "$python" setup.py build_ext --inplace
  part 60 smoke "$python" recipes/benchmarks/gpu_smoke.py "$results/smoke.json" "${smoke[@]}"
  suite 110 cuda $some tests/devices/test_cuda.py
  bench 120 host-8192 --tier host $([ -n "$toy" ] || echo --hidden 8192 --heads 64 --layers 4 --sequence 4096 --batch 4)
}

two() {
  budget=300
  suite 130 suites $most --devices cuda tests/devices/test_accelerator.py tests/scheduling/test_accelerator_plans.py \
    tests/activations/test_autograd.py tests/activations/test_inplace.py tests/activations/test_saved_tensors.py \
    tests/activations/test_weights.py tests/activations/test_checkpoint.py tests/activations/test_training.py \
    tests/devices/test_state_devices.py tests/optimizer/test_cpu_updates.py tests/optimizer/test_delayed_update.py
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -n "$sanitizer" ]; then
    part 60 memcheck "$sanitizer" --tool memcheck --error-exitcode 9 "$python" tests/helpers/cuda_small.py "$directory"
  fi
  bench 80 drive-8192 --tier drive $([ -n "$toy" ] || echo --hidden 8192 --heads 64 --layers 2 --sequence 2048 --batch 2)
  part 30 doctor "$python" -m ssdtrain doctor "$directory"
  bench 110 host-16384 --tier host $([ -n "$toy" ] || echo --hidden 16384 --heads 128 --layers 2 --sequence 2048 --batch 4)
  if [ -n "$sanitizer" ] && [ "$(left)" -gt 20 ]; then
    part 40 stream-races env PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync "$sanitizer" --tool memcheck \
      --track-stream-ordered-races all --error-exitcode 9 "$python" tests/helpers/cuda_small.py "$directory"
  fi
}

case $call in
one | two) $call ;;
*) echo "Expected 'one' or 'two', got '$call'" >&2 && exit 2 ;;
esac
echo "== $call: $((SECONDS - begun)) s of $budget"
exit $failed
