# make demo    trains a GPT without and with ssdtrain and compares them; DEMO="--layers 6" passes options on
# make test    runs all tests on all cores; PYTEST="-k demo" passes options on, WORKERS=0 runs them in one process
# make lint    ruff, mypy, clang-format
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

# Every pip, those of isolated builds included, keeps to the pinned torch: another may be gigabytes larger.
export PIP_CONSTRAINT := $(CURDIR)/.constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The test extra, without building the package a second time.
REQUIREMENTS := import importlib; from importlib.util import find_spec; \
    toml = importlib.import_module("tomllib" if find_spec("tomllib") else "pip._vendor.tomli"); \
    print(*toml.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"])

.PHONY: help demo test lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.package
	$(BIN)/ssdtrain demo $(DEMO)

test: $(VENV)/.package $(VENV)/.tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations=10 $(PYTEST)

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict ssdtrain
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
	$(BIN)/python -c '$(REQUIREMENTS)' | xargs $(BIN)/pip install
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(BIN)/pip install --no-deps \
	    kvikio-cu13 libkvikio-cu13 rapids-logger cuda-pathfinder nvidia-cufile numpy packaging; fi
	@touch $@

$(VENV)/.linters: .constraints.txt | $(VENV)/.package
	$(BIN)/pip install ruff mypy clang-format
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info ssdtrain/*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
