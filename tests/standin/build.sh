#!/usr/bin/env bash
# build.sh PYTHON OUT: builds the stand-in's two libraries into OUT. PYTHON has torch 2.11 for CUDA, whose headers are used.
set -euo pipefail
python=$(realpath -s "$1") out=$(realpath -m "$2")
cd "$(dirname "$0")/driver"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13/include
[ -f "$include/cuda_runtime_api.h" ] || {
  echo "Expected torch 2.11 for CUDA 13 beside $python, got no $include; pip install torch==2.11.0" >&2 && exit 1
}
mkdir -p "$out"
gcc -std=gnu11 -O1 -g -shared -fPIC -pthread -Wall -Wextra -Wno-unused-parameter -I"$include" \
  -Wl,-soname,libcudart.so.13 -Wl,--version-script=exports.map -o "$out/libcudart.so.13" \
  streams.c capture.c memory.c virtual_memory.c copies.c device.c kernels.c driver.c unsupported.c -ldl
gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -Wl,--no-as-needed -Wl,-rpath,'$ORIGIN' -o "$out/libcuda.so.1" \
  marker.c -L"$out" -l:libcudart.so.13
