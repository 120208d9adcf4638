"""A record read back. Knows what the blocks mean; what of it to show is the report's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ssdtrain.run_log.encode import COUNTERS
from ssdtrain.run_log.format import RecordError, read_blocks
from ssdtrain.run_log.schema import parse

_NO_ENVIRONMENT: dict[str, Any] = {
    "python": "unknown", "packages": {}, "system": "unknown", "processor": "unknown", "num_cpus": 0, "memory_nbytes": 0,
    "num_threads": 0, "accelerators": [], "rank": 0, "world_size": 1, "directories": [],
}  # fmt: skip


@dataclass(frozen=True)
class Detail:
    """The timeline of one step; all times are microseconds since it began, -1 for never."""

    step: int
    """Its number, from 1."""
    why: str
    """``"first"``, ``"sample"`` or ``"worst"``."""
    began: float
    """When it began, on the clock that `began` of the rows has."""
    seconds: float
    """How long it took."""
    num_omitted: int
    """Records too many, the smallest."""
    is_wall_time: bool
    """Whether saves and needs have the times of the computation: a host ahead of an accelerator knows none."""
    modules: list[str]
    """Names, by the number that `records` has."""
    records: dict[str, list[int]]
    """Columns: nbytes, module, micro_batch, saved, needed, released, where, planned (empty without a plan)."""
    writes: list[list[int]]
    """Record, nbytes, in the host tier, cancelled, queued, copy begun, copied, write begun, done."""
    reads: list[list[int]]
    """Record, nbytes, from memory, queued, read begun, done."""
    stalls: list[list[Any]]
    """Tier, record or -1, begun, microseconds."""
    other: list[list[int]]
    """Memory no record stands for: from each of these moments on, so many bytes."""


@dataclass(frozen=True)
class Run:
    """One run as far as it was recorded."""

    policy: dict[str, Any]
    """Fields of the `ActivationPolicy`."""
    environment: dict[str, Any]
    """Versions and machine."""
    steps: list[dict[str, Any]]
    """Rows, as `encode.row` makes them, `counters` as a dict."""
    details: list[Detail]
    """Timelines of some steps, in order."""
    stats: dict[str, Any]
    """`Stats.as_dict()` after step `stats_step`."""
    stats_step: int
    """When that was."""
    modules: dict[str, list[float]]
    """Sums by module: records, bytes kept, bytes to the host tier, bytes to the drive, seconds waited."""
    is_complete: bool
    """Whether the run closed its record; else it was ended, or is still going on."""
    num_lost_nbytes: int
    """Bytes at the end that could not be read."""
    num_damaged: int
    """Blocks whose checksum was wrong."""

    @property
    def num_steps(self) -> int:
        """Steps recorded."""
        return sum([row["num_steps"] for row in self.steps])


def read_run(path: str | os.PathLike[str]) -> Run:
    """Reads a record, also one that is cut or still being written.

    Raises:
        RecordError: it is no record, of a newer version, cut too early, has no finished step, or holds what no run
            writes; in one line.
        OSError: it cannot be read.
    """
    blocks = read_blocks(path, parse)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for block in blocks.found:
        by_kind.setdefault(block.pop("kind"), []).append(block)
    heads, rows, states = by_kind.get("run", []), by_kind.get("step", []), by_kind.get("state", [])
    if not heads:
        raise RecordError(f"Expected a whole run record, got one without its beginning: {path}; run again")
    if not rows:
        raise RecordError(
            f"Expected a record of at least one finished step, got an empty one: {path}; a step is over when the next"
            " forward begins or the offload is closed, and only tensors of at least min_nbytes count"
        )
    head = heads[0]
    if any(len(row["counters"]) != len(head["counters"]) for row in rows):
        raise RecordError(f"Expected a run record, got one whose steps have not the counters of its beginning: {path}")
    none = dict.fromkeys(COUNTERS, 0)  # older records have fewer
    steps = [row | {"counters": none | dict(zip(head["counters"], row["counters"], strict=True))} for row in rows]
    state: dict[str, Any] = states[-1] if states else {"stats": {}, "step": 0, "modules": {}}
    return Run(
        policy=head["policy"],
        environment=_NO_ENVIRONMENT | head["environment"],
        steps=steps,
        details=[Detail(**block) for block in by_kind.get("detail", [])],
        stats=state["stats"],
        stats_step=state["step"],
        modules=state["modules"],
        is_complete="end" in by_kind,
        num_lost_nbytes=blocks.cut_nbytes,
        num_damaged=blocks.num_damaged,
    )
