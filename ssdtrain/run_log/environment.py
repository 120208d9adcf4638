"""On what a run was made: when, where and by which command, versions and machine. Values of secrets are left out."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ssdtrain.io.files.paths import printable

_PACKAGES = ("ssdtrain", "torch", "deepspeed", "megatron-core", "transformers", "kvikio-cu13")
_SECRET = re.compile(r"(?i)^-.*(token|secret|password|passwd|key)$")
_MAX_COMMAND = 2000  # characters


def describe_environment(directories: Sequence[str]) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "began": datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        "host": platform.node(),
        "command": _command(getattr(sys, "argv", [])),
        "commit": _commit(Path()),
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


def _command(arguments: Sequence[str]) -> str:
    """As it can be typed; what follows an option for a password, key or token is not shown."""
    shown: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        follows = bool(shown) and bool(_SECRET.search(shown[-1])) and "=" not in shown[-1]
        hides = bool(equals) and bool(_SECRET.search(name))
        shown.append(f"{name}=..." if hides else "..." if follows and not argument.startswith("-") else argument)
    return shlex.join(shown)[:_MAX_COMMAND].encode(errors="replace").decode()  # not all that a system takes is text


def _commit(directory: Path) -> str:
    """The commit that is checked out where training was started; empty where there is none."""
    try:
        directory = directory.resolve()
        top = next((each for each in (directory, *directory.parents) if (each / ".git").exists()), None)
        if top is None:
            return ""
        git = top / ".git"
        if git.is_file():  # a work tree beside the repository
            git = top / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:40]
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        reference = head.removeprefix("ref: ")
        if (common / reference).exists():
            return (common / reference).read_text().strip()[:40]
        packed = (common / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {reference}")), "")
    except (OSError, ValueError):
        return ""


def _version(package: str) -> str:
    if package in ("torch", "ssdtrain"):  # what runs: metadata may be of another checkout
        return str(sys.modules[package].__version__)
    if package.partition("-")[0] not in sys.modules:
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
    return {
        "path": printable(path),
        "nbytes": size.f_blocks * size.f_frsize,
        "free_nbytes": size.f_bavail * size.f_frsize,
    }
