#!/usr/bin/env bash
# Runs the tests that drive the extension with AddressSanitizer inside it, in a copy that is deleted afterwards.
#
#     tests/stress/asan.sh                                           # tests/io/test_engine.py and tests/activations/test_cache.py
#     tests/stress/asan.sh tests/activations/test_training.py -k gpt    # what pytest is told instead
#
# Leaks are not reported: the interpreter keeps what it has. Tests that preload a library of their own do not work here.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

cp -r "$root"/{csrc,ssdtrain,tests,setup.py,pyproject.toml,README.md,LICENSE} "$copy"
rm -f "$copy"/ssdtrain/_C.*.so
cd "$copy"
flags="-fsanitize=address -fno-omit-frame-pointer -g"
CFLAGS=$flags CXXFLAGS=$flags LDFLAGS="-fsanitize=address" \
    "$python" setup.py --quiet build_ext --inplace

# The C++ library too: the sanitizer looks for its exceptions when the process starts, before Python loads the extension.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:strict_string_checks=1:detect_stack_use_after_return=1"
export PYTHONPATH="$copy"
"$python" -c "
from ssdtrain import _C
assert _C.__file__.startswith('$copy'), _C.__file__
assert b'__asan_init' in open(_C.__file__, 'rb').read(), 'the extension is not instrumented'
"
if [ $# -eq 0 ]; then
    set -- tests/io/test_engine.py tests/activations/test_cache.py
fi
"$python" -m pytest -q -p no:cacheprovider "$@"
