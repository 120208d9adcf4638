"""On what a run was made: versions and machine. Nothing that names a person, a host or a command line."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("ssdtrain", "torch", "deepspeed", "megatron-core", "transformers", "kvikio-cu13")


def describe_environment(directories: Sequence[str]) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "num_cpus": os.cpu_count() or 0,
        "memory_nbytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "num_threads": torch.get_num_threads(),
        "accelerators": _accelerators(),
        "unix_clock_ahead_seconds": time.time() - time.monotonic(),
        "rank": int(os.environ.get("RANK", "0")),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "directories": [_directory(path) for path in directories],
    }


def _version(package: str) -> str:
    if package in ("torch",):
        return torch.__version__
    if package not in ("ssdtrain",) and package.partition("-")[0] not in sys.modules:
        return ""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _accelerators() -> list[str]:
    """Of this process; a driver that nobody uses is left alone."""
    if not torch.cuda.is_initialized():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _directory(path: str) -> dict[str, Any]:
    size = os.statvfs(path)
    return {"path": path, "nbytes": size.f_blocks * size.f_frsize, "free_nbytes": size.f_bavail * size.f_frsize}
