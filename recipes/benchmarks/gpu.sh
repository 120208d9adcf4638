#!/usr/bin/env bash
# Everything that needs a GPU, in one call, on a machine that has torch with CUDA, pytest, hypothesis, pybind11 and a
# C++ compiler: tests, compute-sanitizer, benchmark. Results are left as JSON and text.
#
#     recipes/benchmarks/gpu.sh RESULTS [DIRECTORY]
#
# RESULTS: a folder for what is measured. DIRECTORY: a folder on the drive (default: a temporary one).
set -uo pipefail
cd "$(dirname "$0")/../.."
results=$(realpath -m "${1:?a folder for the results}")
directory=${2:-$(mktemp -d)}
mkdir -p "$results" "$directory"
export PYTHONPATH=$PWD FAIL_WITHOUT_CUDA=1
failed=0

part() { # part NAME COMMAND...: runs it, keeps what it says, goes on when it fails
  local name=$1
  shift
  echo "== $name: $*"
  timeout "${LIMIT:-240}" "$@" >"$results/$name.txt" 2>&1 || { echo "FAILED: $name ($?)"; failed=1; }
  tail -n 4 "$results/$name.txt"
}

part build python3 setup.py build_ext --inplace
part versions python3 -m torch.utils.collect_env
part tests python3 -m pytest tests/test_cuda.py -q -x
part cache python3 -m pytest tests/test_autograd.py tests/test_inplace.py tests/test_saved_tensors.py \
  tests/test_weights.py tests/test_checkpoint.py tests/test_training.py --devices cuda -q
LIMIT=120 part plans python3 -m pytest tests/test_accelerator_plans.py --devices cuda -q
LIMIT=120 part state python3 -m pytest tests/test_state_devices.py tests/test_cpu_updates.py tests/test_delayed_update.py \
  --devices cuda -q
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -n "$sanitizer" ]; then
  part memcheck "$sanitizer" --tool memcheck --error-exitcode 9 python3 tests/cuda_small.py "$directory"
  part racecheck "$sanitizer" --tool racecheck --error-exitcode 9 python3 tests/cuda_small.py "$directory"
else
  echo "compute-sanitizer is not installed" | tee "$results/memcheck.txt"
fi
part gpu-4096 python3 recipes/benchmarks/gpu.py "$directory" --hidden 4096 --layers 12 --sequence 4096 --batch 4
part gpu-8192 python3 recipes/benchmarks/gpu.py "$directory" --hidden 8192 --heads 64 --layers 4 --sequence 2048 --batch 8
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True part gpu-expandable \
  python3 recipes/benchmarks/gpu.py "$directory" --hidden 4096 --layers 6 --sequence 2048 --batch 4 --repeats 3
for name in gpu-4096 gpu-8192 gpu-expandable; do
  tail -n 1 "$results/$name.txt" >"$results/$name.json"
done
exit $failed
