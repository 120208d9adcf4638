"""Finished steps as the dicts of a record: one short row, and the whole timeline where it is worth the room.

[Note: two clocks]
A step is recorded in seconds of computation, which stand still while training waits; requests and waits have times of a
clock on the wall. In a record all times are microseconds on the wall since the step began, so that both can be drawn
together: every wait moves what comes after it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ssdtrain.planner import Step, Where

if TYPE_CHECKING:
    from ssdtrain.stats import Counters
    from ssdtrain.tracing.finished_step import FinishedStep
    from ssdtrain.tracing.request_log import Requests, StallRow

COUNTERS = (
    "num_saved num_offloaded num_prefetched num_demand_reloads offloaded_nbytes deduplicated_nbytes forwarded_nbytes "
    "kept_nbytes cancelled_write_nbytes written_nbytes read_nbytes shared_written_nbytes shared_read_nbytes "
    "hosted_nbytes host_read_nbytes write_busy_seconds "
    "read_busy_seconds stalled_seconds ahead_seconds peak_staging_nbytes peak_disk_nbytes peak_host_nbytes "
    "peak_saved_nbytes peak_device_nbytes"
).split()
"""What a row has of the counters: running totals, so that a row left out loses nothing."""

MAX_RECORDS = 4096
"""In one timeline: of more, the largest."""


def counters_row(totals: Counters) -> list[float]:
    """`COUNTERS` of a snapshot."""
    return [round(getattr(totals, name), 6) for name in COUNTERS]


def peak_if_kept(step: Step) -> int:
    """The peak of the step if everything had stayed in memory."""
    events = [(record.saved, record.nbytes) for record in step.records]
    events += [(record.released, -record.nbytes) for record in step.records]
    before = 0
    for seconds, nbytes in step.other:
        events.append((seconds, nbytes - before))
        before = nbytes
    return max(accumulate([nbytes for _, nbytes in sorted(events)]), default=0)


def placements(finished: FinishedStep, requests: Requests) -> list[Where]:
    """Where each record of the step went."""
    where = [Where.KEEP] * len(finished.step.records)
    for place, _, is_in_host, was_cancelled, *_ in requests.writes:
        if 0 <= place < len(where) and not was_cancelled:
            where[place] = Where.HOST if is_in_host else Where.DISK
    return where


def row(number: int, finished: FinishedStep) -> dict[str, Any]:
    """One step in short."""
    plan = finished.plan
    return {
        "step": number,
        "num_steps": 1,
        "began": finished.began_at,
        "seconds": finished.seconds,
        "worst_seconds": finished.seconds,
        "stall_seconds": finished.stall_seconds,
        "peak_nbytes": finished.peak_nbytes,
        "peak_if_kept_nbytes": peak_if_kept(finished.step),
        "predicted_peak_nbytes": plan.peak_nbytes if plan is not None else 0,
        "predicted_seconds": plan.step_seconds if plan is not None else 0.0,
        "counters": counters_row(finished.totals),
    }


def merge(row: dict[str, Any], next_row: dict[str, Any]) -> dict[str, Any]:
    """Two neighbouring rows as one: sums of times, the highest peaks, the totals of the second."""
    merged = next_row | {"began": row["began"]}
    for name in ("num_steps", "seconds", "stall_seconds", "predicted_seconds"):
        merged[name] = row[name] + next_row[name]
    for name in ("worst_seconds", "peak_nbytes", "peak_if_kept_nbytes", "predicted_peak_nbytes"):
        merged[name] = max(row[name], next_row[name])
    return merged


def detail(number: int, finished: FinishedStep, requests: Requests, why: str) -> dict[str, Any]:
    """One step in full."""
    clock = _Wall(finished.began_at, requests.stalls)
    records = finished.step.records
    chosen = sorted(range(len(records)), key=lambda place: -records[place].nbytes)[:MAX_RECORDS]
    renamed = {place: i for i, place in enumerate(sorted(chosen))}
    kept = [records[place] for place in renamed]
    modules = sorted({record.module for record in kept})
    numbers = {module: i for i, module in enumerate(modules)}
    where, planned = placements(finished, requests), finished.plan.placement if finished.plan is not None else ()
    return {
        "kind": "detail",
        "step": number,
        "why": why,
        "began": finished.began_at,
        "seconds": finished.seconds,
        "num_omitted": len(records) - len(kept),
        "is_wall_time": finished.trace.is_wall_time,
        "modules": modules,
        "records": {
            "nbytes": [record.nbytes for record in kept],
            "module": [numbers[record.module] for record in kept],
            "micro_batch": [record.micro_batch for record in kept],
            "saved": [clock.of_compute(record.saved) for record in kept],
            "needed": [clock.of_compute(record.needed) for record in kept],
            "released": [clock.of_compute(record.released) for record in kept],
            "where": [int(where[place]) for place in renamed],
            "planned": [int(planned[place]) for place in renamed] if planned else [],
        },
        "writes": [
            [renamed[place], *rest[:3], *[clock.of_wall(at) for at in rest[3:]]]
            for place, *rest in requests.writes
            if place in renamed
        ],
        "reads": [
            [renamed[place], *rest[:2], *[clock.of_wall(at) for at in rest[2:]]]
            for place, *rest in requests.reads
            if place in renamed
        ],
        "stalls": [
            [tier, renamed.get(place, -1), clock.of_wall(begin), round(seconds * 1e6)]
            for tier, place, begin, seconds in requests.stalls
        ],
        "other": [[clock.of_compute(seconds), nbytes] for seconds, nbytes in finished.step.other],
    }


class _Wall:
    """Microseconds since the step began, on the wall: see [Note: two clocks]. -1 for never."""

    def __init__(self, began_at: float, stalls: Sequence[StallRow]) -> None:
        self._began_at = began_at
        rows = sorted([(begin - began_at, seconds) for _, _, begin, seconds in stalls if begin >= began_at])
        self._waited = [0.0, *accumulate([seconds for _, seconds in rows])]
        self._begins = [begin - waited for (begin, _), waited in zip(rows, self._waited, strict=False)]

    def of_compute(self, seconds: float) -> int:
        if seconds == math.inf:
            return -1
        return round((seconds + self._waited[bisect_left(self._begins, seconds)]) * 1e6)

    def of_wall(self, at: float) -> int:
        return round((at - self._began_at) * 1e6) if at else -1
