"""A group of processes that may not use more memory than a cap: Linux control groups, version 1 or 2. Needs root."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_IS_V2 = (_ROOT / "cgroup.controllers").exists()
_PARENT = _ROOT if _IS_V2 else _ROOT / "memory"
_LIMITS = ("memory.max",) if _IS_V2 else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
_EVENTS = "memory.events" if _IS_V2 else "memory.oom_control"
_PEAK = "memory.peak" if _IS_V2 else "memory.max_usage_in_bytes"


def why_not() -> str | None:
    """Why no group can be made here; None if one can."""
    if os.access(_PARENT, os.W_OK) and (not _IS_V2 or "memory" in (_ROOT / "cgroup.subtree_control").read_text()):
        return None
    return f"needs root and the memory controller under {_PARENT}"


class MemoryGroup:
    """A group under a cap; nothing of it is swapped. A process that needs more is killed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def command(self) -> list[str]:
        """What to put before a command so that it runs inside, from its first byte on."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._path / "cgroup.procs")]

    @property
    def num_kills(self) -> int:
        """Processes killed because they needed more."""
        lines = dict(line.split() for line in (self._path / _EVENTS).read_text().splitlines())
        return int(lines["oom_kill"])

    @property
    def peak_nbytes(self) -> int:
        """Most memory in use at once, cached pages of files included."""
        return int((self._path / _PEAK).read_text())


@contextlib.contextmanager
def memory_group(nbytes: int) -> Iterator[MemoryGroup]:
    """Inside there is a group that may use `nbytes`; its processes must have ended when it is left."""
    path = Path(tempfile.mkdtemp(prefix="ssdtrain-", dir=_PARENT))
    try:
        for name in _LIMITS:
            if (path / name).exists():  # without swap accounting there is no second limit
                (path / name).write_text(str(nbytes))
        if (path / "memory.swap.max").exists():
            (path / "memory.swap.max").write_text("0")
        yield MemoryGroup(path)
    finally:
        path.rmdir()
