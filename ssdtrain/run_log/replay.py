"""A recorded timeline as the step that a planner reads: for a drive or a budget that the run did not have."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate

from ssdtrain.planner import Lifetime, Step
from ssdtrain.run_log.reader import Detail, Run

_MICROSECONDS = 1e6


def latest_detail(run: Run) -> Detail | None:
    """The latest timeline of a step like most: neither the first, which is slower, nor the worst, unless all are."""
    ordinary = [detail for detail in run.details if detail.why == "sample"]
    return (ordinary or run.details or [None])[-1]  # type: ignore[list-item]


def step_of(detail: Detail) -> Step:
    """The step without its waits, in seconds of computation."""
    stalls: list[tuple[int, int]] = sorted((begun, microseconds) for _, _, begun, microseconds in detail.stalls)
    begins = [begun for begun, _ in stalls]
    waited = [0, *accumulate(microseconds for _, microseconds in stalls)]

    def computed(at: int) -> float:
        if at < 0:
            return math.inf
        return max(0.0, at - waited[bisect_left(begins, at)]) / _MICROSECONDS

    columns = detail.records
    rows = zip(*[columns[n] for n in ("nbytes", "module", "micro_batch", "saved", "needed", "released")], strict=True)
    records = [
        Lifetime(nbytes, computed(saved), computed(needed), computed(released), micro_batch, _name(detail, module))
        for nbytes, module, micro_batch, saved, needed, released in rows
    ]
    other = tuple((computed(at), nbytes) for at, nbytes in detail.other)
    return Step(tuple(records), detail.seconds - waited[-1] / _MICROSECONDS, other)


def _name(detail: Detail, module: int) -> str:
    return detail.modules[module] if 0 <= module < len(detail.modules) else ""
