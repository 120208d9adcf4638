# make demo    trains a GPT without and with ssdtrain and compares them; DEMO="--layers 6" passes options on
# make test    runs all tests on all cores; PYTEST="-k demo" passes options on, WORKERS=0 runs them in one process
# make test-long  the same with whole products and full doses, some hours, and again with AddressSanitizer in the extension
# make test-standin  tests what runs on CUDA without a GPU (tests/standin); downloads 5 GB, once, unless STANDIN_VENV names
#              a virtual environment with torch 2.11 for CUDA; STANDIN="-k streams" passes options on
# make docs    builds the documentation into build/site; warnings are errors
# make notebooks  runs the notebooks of the documentation and keeps what they show
# make wheels  builds source distribution and wheel into dist/, and tries them in an empty environment
# make lint    ruff, mypy, pyright, clang-format
# make clean   removes what was built, and the virtual environment

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?=
PYTEST ?=
WORKERS ?= auto
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder --durations=10

# Every pip, those of isolated builds included, keeps to the pinned torch: another may be gigabytes larger.
export PIP_CONSTRAINT := $(CURDIR)/.constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# An extra (the one for tests, unless another is named), without building the package a second time.
REQUIREMENTS := import importlib; from importlib.util import find_spec; \
    toml = importlib.import_module("tomllib" if find_spec("tomllib") else "pip._vendor.tomli"); \
    extra = (*importlib.import_module("sys").argv[1:], "test")[0]; \
    print(*toml.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][extra], sep="\n")

.PHONY: help demo test test-long test-standin docs notebooks wheels lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.package
	$(BIN)/ssdtrain demo $(DEMO)

test: $(VENV)/.package $(VENV)/.tests
	$(TESTS) $(PYTEST)

test-long: $(VENV)/.package $(VENV)/.tests
	$(TESTS) --long $(PYTEST)
	PYTHON=$(BIN)/python tests/stress/asan.sh

# -- on the stand-in of tests/standin --

STANDIN_OWN := .venv-standin
STANDIN_VENV ?= $(STANDIN_OWN)
STANDIN_BUILD := build/standin
STANDIN ?=
STANDIN_SUITES := $(shell sed -n '/--devices cuda/,/[^\\]$$/p' recipes/benchmarks/gpu.sh | grep -o 'tests/[a-z_/]*\.py' | sort -u)

# Whoever names an environment has all that is installed in our own.
test-standin: $(if $(filter $(STANDIN_OWN),$(STANDIN_VENV)),$(STANDIN_OWN)/.standin)
	tests/standin/build.sh $(STANDIN_VENV)/bin/python $(STANDIN_BUILD)
	$(STANDIN_VENV)/bin/python setup.py -q build_ext --inplace
	PYTHONPATH=$(CURDIR) FAIL_WITHOUT_CUDA=1 tests/standin/run.sh $(STANDIN_BUILD) $(STANDIN_VENV)/bin/python -m pytest \
	    -n $${JOBS:-2} --dist loadfile --devices cuda tests/standin tests/devices/test_cuda.py $(STANDIN_SUITES) $(STANDIN)

# An environment of its own: the pinned torch of the other one is for the CPU.
$(STANDIN_OWN)/.standin:
	[ -x $(STANDIN_OWN)/bin/python ] || $(PYTHON) -m venv $(STANDIN_OWN)
	env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $(STANDIN_OWN)/bin/pip install torch==2.11.0 'setuptools>=77,<82' pybind11 \
	    'nvidia-cuda-crt==13.0.*' pydantic typer rich numpy pytest pytest-xdist hypothesis expecttest scipy psutil
	@touch $@

# -- documentation and distributions: environments of their own --

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(CURDIR) .venv-docs/bin/mkdocs build --strict --quiet

notebooks: $(VENV)/.package
	$(BIN)/pip install nbclient ipykernel
	$(BIN)/python docs/notebook.py

.venv-docs/.installed: pyproject.toml
	[ -x .venv-docs/bin/python ] || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c '$(REQUIREMENTS)' docs | xargs -d '\n' .venv-docs/bin/pip install
	@touch $@

wheels:
	rm -rf build/wheels dist && mkdir -p build/wheels
	$(PYTHON) -m venv build/wheels/tools
	build/wheels/tools/bin/pip install build
	build/wheels/tools/bin/python -m build --outdir dist .
	$(PYTHON) -m venv build/wheels/empty
	build/wheels/empty/bin/pip install torch
	cd build/wheels && CC=false CXX=false empty/bin/pip install --only-binary :all: ../../dist/ssdtrain-*.whl && \
	    empty/bin/python ../../tests/release/wheel_smoke.py

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict ssdtrain tests/release/typed_usage.py
	$(BIN)/python docs/code.py build/docs-code
	$(BIN)/mypy --follow-imports=silent build/docs-code
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python build/docs-code tests/release/typed_usage.py
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h

# torch comes first: whatever is installed later finds it there and asks for no other.
$(VENV)/.torch: .constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	    "Expected Python 3.10 or newer, got " + sys.version.split()[0] + " from `$(PYTHON)`. " \
	    "Name another one: make PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "Expected $(PYTHON) to have venv and ensurepip. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/pip install -e .
	@touch $@

# What the tests need. DeepSpeed's build looks at the torch of the environment it is for, hence no isolation; its
# operators are compiled at first use (DS_BUILD_OPS=0), and the tests use none. kvikio comes without what it needs a GPU
# for (gigabytes); its wheels begin with Python 3.11, and without it its tests skip.
$(VENV)/.tests: pyproject.toml .constraints.txt | $(VENV)/.package
	$(BIN)/pip install 'setuptools>=77' wheel
	DS_BUILD_OPS=0 $(BIN)/pip install --no-build-isolation deepspeed
	$(BIN)/python -c '$(REQUIREMENTS)' | xargs -d '\n' $(BIN)/pip install
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(BIN)/pip install --no-deps \
	    kvikio-cu13 libkvikio-cu13 rapids-logger cuda-pathfinder nvidia-cufile numpy packaging; fi
	@touch $@

$(VENV)/.linters: .constraints.txt | $(VENV)/.package
	$(BIN)/pip install ruff mypy basedpyright clang-format
	@touch $@

clean:
	rm -rf $(VENV) .venv-standin .venv-docs build dist *.egg-info ssdtrain/*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
