"""How much more memory this process may take before the machine, its control group or a limit of its own says no.

Knows files and limits of Linux; where one cannot be read, it does not count.
"""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Iterator
from pathlib import Path

from ssdtrain.io.host_space import available_nbytes

_LIMITS = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))
_FILES = {False: ("memory.max", "memory.current"), True: ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Of a control group: the limit and what is used, in version 2 and in version 1."""
_CACHE = ("inactive_file", "total_inactive_file")  # counted as used, and given up when memory is short


def spare_nbytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of host memory that can still be had; infinite where nothing is known. Takes less than a millisecond."""
    found = [*_within_limits(proc), *_within_groups(proc, groups)]
    with contextlib.suppress(OSError, ValueError):
        found.append(available_nbytes())
    return max(0.0, min(found, default=math.inf))


def _within_limits(proc: Path) -> Iterator[float]:
    for limit, name in _LIMITS:
        most = resource.getrlimit(limit)[0]
        if most == resource.RLIM_INFINITY:
            continue
        for line in _lines(proc / "self" / "status"):
            if line.startswith(f"{name}:"):
                yield most - int(line.split()[1]) * 1024


def _within_groups(proc: Path, groups: Path) -> Iterator[float]:
    """Of the process's own control group and of those that it is in."""
    for line in _lines(proc / "self" / "cgroup"):
        _, kinds, own = line.split(":", 2)
        is_first_version = "memory" in kinds.split(",")
        if kinds and not is_first_version:
            continue
        root = groups / "memory" if is_first_version else groups
        folder = root / own.lstrip("/")
        while root in (folder, *folder.parents):
            yield from _within_group(folder, *_FILES[is_first_version])
            folder = folder.parent


def _within_group(folder: Path, limit: str, used: str) -> Iterator[float]:
    most, now = _number(folder / limit), _number(folder / used)
    if most < math.inf and now < math.inf:
        stats = dict(line.rsplit(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
        yield most - now + max([int(stats[name]) for name in _CACHE if name in stats], default=0)


def _number(path: Path) -> float:
    """What a file says; infinite where it says "max", nothing, or is not there."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else math.inf


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
