"""Export for Perfetto and chrome://tracing: the JSON trace event format, with named tracks and counters.

[Note: one clock with the profiler]
Times are those of traces that `torch.profiler` exports: microseconds since ``baseTimeNanoseconds``, which is when the
running quarter of a year began, by the clock of the system. So the events of both can be put into one file.

Every step with a timeline is there in full, at its own time in the run; the others are single slices. Slices of one
track never overlap, as the format asks: a lane whose requests run side by side has several tracks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ssdtrain.report.timeline import LANES, RESIDENCIES, Bar, bars, levelled, residency
from ssdtrain.run_log import Detail, Run

_PROCESS = 1
_QUARTER_SECONDS = 7_889_238
_STEPS = "steps"
_MEMORY = "saved tensors, bytes by residency"

_Event = dict[str, Any]


def chrome_trace(run: Run) -> _Event:
    """The whole run as one JSON object."""
    base = _base_seconds(run)
    start = run.steps[0]["began"] if base is None else base - run.environment["unix_clock_ahead_seconds"]
    timelines = [(detail, round((detail.began - start) * 1e6), levelled(bars(detail))) for detail in run.details]
    tracks = _tracks([placed for _, _, placed in timelines])
    events = [*_names(tracks, run.environment.get("rank", 0)), *_steps(run, start, tracks[_STEPS, 0])]
    for detail, offset, placed in timelines:
        events += [_slice(bar, offset, tracks[bar.lane, level]) for bar, level in placed]
        events += _counters(detail, offset)
    clock = {} if base is None else {"baseTimeNanoseconds": base * 10**9}
    return {"traceEvents": events, "displayTimeUnit": "ms", **clock}


def _base_seconds(run: Run) -> int | None:
    """See [Note: one clock with the profiler]; None of a record that does not say when it was made."""
    ahead = run.environment.get("unix_clock_ahead_seconds")
    return None if ahead is None else int(run.steps[0]["began"] + ahead) // _QUARTER_SECONDS * _QUARTER_SECONDS


def _tracks(timelines: Iterable[list[tuple[Bar, int]]]) -> dict[tuple[str, int], int]:
    """The number of each track."""
    used = {(bar.lane, level) for placed in timelines for bar, level in placed}
    lanes = (_STEPS, *LANES)
    ordered = sorted(used | {(lane, 0) for lane in lanes}, key=lambda track: (lanes.index(track[0]), track[1]))
    return {track: i for i, track in enumerate(ordered, start=1)}


def _names(tracks: dict[tuple[str, int], int], rank: int) -> Iterable[_Event]:
    yield {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": f"ssdtrain, rank {rank}"}}
    for (lane, level), number in tracks.items():
        name = lane if level == 0 else f"{lane} {level + 1}"
        head = {"ph": "M", "pid": _PROCESS, "tid": number}
        yield head | {"name": "thread_name", "args": {"name": name}}
        yield head | {"name": "thread_sort_index", "args": {"sort_index": number}}


def _steps(run: Run, start: float, track: int) -> Iterable[_Event]:
    for row in run.steps:
        num = row["num_steps"]
        yield {
            "ph": "X",
            "name": f"step {row['step']}" if num == 1 else f"steps {row['step'] - num + 1} to {row['step']}",
            "cat": "step",
            "pid": _PROCESS,
            "tid": track,
            "ts": round((row["began"] - start) * 1e6),
            "dur": round(row["seconds"] * 1e6),
            "args": {"peak_nbytes": row["peak_nbytes"], "stall_seconds": row["stall_seconds"]},
        }


def _slice(bar: Bar, offset: int, track: int) -> _Event:
    return {
        "ph": "X",
        "name": bar.label,
        "cat": bar.lane,
        "pid": _PROCESS,
        "tid": track,
        "ts": offset + bar.begin,
        "dur": bar.end - bar.begin,
        "args": {"nbytes": bar.nbytes} if bar.nbytes else {},
    }


def _counters(detail: Detail, offset: int) -> Iterable[_Event]:
    columns = residency(detail)
    for i, at in enumerate(columns["at"]):
        values = {name: columns[name][i] for name in RESIDENCIES}
        yield {"ph": "C", "name": _MEMORY, "pid": _PROCESS, "ts": offset + at, "args": values}
    yield {
        "ph": "C",
        "name": _MEMORY,
        "pid": _PROCESS,
        "ts": offset + round(detail.seconds * 1e6),
        "args": dict.fromkeys(RESIDENCIES, 0),
    }
