#!/usr/bin/env bash
# Fetches what a bare GPU machine (torch with CUDA, no network) lacks into .wheels/, which git ignores: under 10 MB;
# setuptools because older ones do not read pyproject.toml. Run it where a package index can be reached, before `gpu.sh`,
# which unpacks them into build/.
#
#     recipes/benchmarks/gpu_wheels.sh [FOLDER [VERSION]]    VERSION: the Python of that machine, 3.12 unless named
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.wheels}
mkdir -p "$folder"
env -u PIP_CONSTRAINT "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: \
  --python-version "${2:-3.12}" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform any \
  --dest "$folder" \
  pydantic==2.14.4 pydantic_core==2.50.5 annotated_types==0.8.0 typing_inspection==0.4.5 typing_extensions==4.16.0 \
  setuptools==81.0.0 trl==1.16.0 kvikio_cu13==26.10.0 libkvikio_cu13==26.10.0 rapids_logger==0.3.0
du -sh "$folder"
