"""Measures one directory: by request size and depth, sustained, both ways at once, and the ceiling."""

from __future__ import annotations

import errno
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from ssdtrain.stats import nbytes_text
from ssdtrain.tools.bench.ceiling import open_ceiling
from ssdtrain.tools.bench.memory import Memory
from ssdtrain.tools.bench.passes import Passes

_KIB, _MIB = 1 << 10, 1 << 20
_LEAST_NBYTES = 64 * _MIB
_MARGIN = 0.05  # of the file system, left free
_NUM_LATENCIES = 16
_WINDOW_SECONDS = 0.25


@dataclass(frozen=True)
class Options:
    """What to measure."""

    file_nbytes: int = 512 * _MIB
    sustained_nbytes: int = 16 << 30
    sustained_seconds: float = 20.0
    requests: tuple[int, ...] = (256 * _KIB, _MIB, 4 * _MIB)
    depths: tuple[int, ...] = (1, 8, 32)
    repeats: int = 3


@dataclass(frozen=True)
class Row:
    """One request size and depth; medians."""

    request_nbytes: int
    """Size of one."""
    depth: int
    """So many at a time."""
    write_gbs: float
    """GB/s (1e9 bytes) through ssdtrain's engine."""
    read_gbs: float
    write_ceiling_gbs: float
    """The same requests without ssdtrain, in turn with it."""
    read_ceiling_gbs: float
    write_seconds: float
    """Latency of one write; measured alone at depth 1, else what the bandwidth makes of it."""
    read_seconds: float

    @property
    def hidden_gbs(self) -> float:
        """What one second of forward hides: backward, which reads, takes about twice as long."""
        return min(self.write_gbs, 2 * self.read_gbs)


@dataclass
class Report:
    """All that was measured."""

    directory: str
    engine: str
    """What moved the bytes."""
    engine_reason: str
    """Why this one."""
    ceiling: str
    """What measured the drive without ssdtrain."""
    file_nbytes: int
    """What one pass writes or reads."""
    rows: list[Row] = field(default_factory=list)
    sustained_gbs: list[float] = field(default_factory=list)
    """Writing on and on, by quarters of a second."""
    sustained_written_nbytes: int = 0
    """Meanwhile."""
    mixed_gbs: float = 0.0
    """Written, and as much read, at the same time."""

    @property
    def best(self) -> Row:
        """The one that moves most in both directions."""
        return max(self.rows, key=lambda row: row.hidden_gbs)

    @property
    def steady_gbs(self) -> float:
        """Writing in the long run: the median of the last half of the sustained pass."""
        return statistics.median(self.sustained_gbs[len(self.sustained_gbs) // 2 :]) if self.sustained_gbs else 0.0


def bench_drive(directory: str, options: Options, progress: Callable[[str, float], None]) -> Report:
    """Measures.

    Args:
        directory: an existing, writable directory.
        options: sizes and times.
        progress: told what is being measured, and how much of everything is done, 0 to 1.

    Raises:
        OSError: no space, or the drive refused.
    """
    nbytes = _file_nbytes(directory, options)
    memory = Memory(nbytes)
    report = Report(directory, "", "", "", nbytes)
    cells = [(request, depth) for request in options.requests for depth in options.depths if request * depth <= nbytes]
    with open_ceiling(directory, nbytes) as ceiling:
        report.ceiling = ceiling.tool
        for i, (request, depth) in enumerate(cells):
            progress(f"{nbytes_text(request)}, depth {depth}", 0.7 * i / len(cells))
            passes = Passes(directory, memory, request, depth)
            try:
                report.engine, report.engine_reason = passes.choice.kind, passes.choice.reason
                report.rows.append(_row(passes, ceiling.seconds, options, nbytes, (request, depth)))
            finally:
                passes.close()
        report.ceiling = ceiling.tool
    _long_run(directory, memory, report, options, progress)
    progress("done", 1.0)
    return report


def _row(
    passes: Passes,
    ceiling: Callable[[str, int, int], float],
    options: Options,
    nbytes: int,
    cell: tuple[int, int],
) -> Row:
    request, depth = cell
    moved = nbytes // request * request / 1e9
    times: dict[str, list[float]] = {"write": [], "read": [], "write ceiling": [], "read ceiling": []}
    for _ in range(options.repeats):  # in turn, so that what else happens on the drive hits all
        times["write"].append(passes.write())
        times["write ceiling"].append(ceiling("write", request, depth))
        times["read"].append(passes.read())
        times["read ceiling"].append(ceiling("read", request, depth))
    speed = {name: moved / statistics.median(seconds) for name, seconds in times.items()}
    if depth == 1:
        write_seconds, read_seconds = map(statistics.median, passes.latencies(_NUM_LATENCIES))
    else:
        write_seconds, read_seconds = (depth * request / 1e9 / speed[way] for way in ("write", "read"))
    ceilings = speed["write ceiling"], speed["read ceiling"]
    return Row(request, depth, speed["write"], speed["read"], *ceilings, write_seconds, read_seconds)


def _long_run(
    directory: str, memory: Memory, report: Report, options: Options, progress: Callable[[str, float], None]
) -> None:
    best = report.best
    passes = Passes(directory, memory, best.request_nbytes, best.depth)
    try:
        progress("reading and writing at once", 0.7)
        seconds = statistics.median([passes.mixed() for _ in range(options.repeats)])
        report.mixed_gbs = memory.nbytes / 2 / 1e9 / seconds
        before = passes.choice.engine.written_nbytes

        def advance(written: int) -> None:
            progress(f"writing on and on: {nbytes_text(written)}", 0.75 + 0.25 * written / options.sustained_nbytes)

        speeds = passes.sustained(options.sustained_nbytes, options.sustained_seconds, _WINDOW_SECONDS, advance)
        report.sustained_gbs = [speed / 1e9 for speed in speeds]
        report.sustained_written_nbytes = passes.choice.engine.written_nbytes - before
    finally:
        passes.close()


def _file_nbytes(directory: str, options: Options) -> int:
    """What fits twice (our file and the ceiling's) beside a margin, in whole requests."""
    state = os.statvfs(directory)
    free, total = state.f_bavail * state.f_frsize, state.f_blocks * state.f_frsize
    room = (free - int(_MARGIN * total)) // 2
    largest = max(options.requests)
    nbytes = min(options.file_nbytes, room) // largest * largest
    if nbytes < min(_LEAST_NBYTES, options.file_nbytes) or nbytes == 0:
        raise OSError(
            errno.ENOSPC,
            f"Expected {nbytes_text(2 * _LEAST_NBYTES)} and a twentieth of the file system free, got "
            f"{nbytes_text(free)} of {nbytes_text(total)}: free some, or choose another directory",
            directory,
        )
    return nbytes
