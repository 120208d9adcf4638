"""One recorded step as curves and bars: bytes by residency, memory with and without, who was busy when.

Everything is worked out from the times of saves, requests and releases; see [Note: two clocks] for those times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from ssdtrain.planner import Where
from ssdtrain.run_log import Detail

RESIDENCIES = ("left alone", "in memory", "leaving", "in host memory", "on the drive", "coming back")
LANES = ("forward", "backward", "copies", "writes", "reads", "stalls")

_MAX_POINTS = 2000
_STAGES = ("saved", "leaves", "is_copied", "has_left", "returns", "is_back", "released")
_Event = tuple[int, int]  # microseconds, change in bytes


@dataclass(frozen=True)
class Stay:
    """Where one record was when; microseconds, each stage ends where the next begins."""

    nbytes: int
    saved: int
    leaves: int
    is_copied: int
    has_left: int
    returns: int
    is_back: int
    released: int
    is_in_host: bool

    @classmethod
    def of(cls, detail: Detail, position: int, writes: Sequence[list[int]], reads: Sequence[list[int]]) -> Stay:
        """Puts the requests of a record together; what never left, leaves when it is released."""
        columns = detail.records
        end = round(detail.seconds * 1e6)
        released = columns["released"][position] if columns["released"][position] >= 0 else end
        needed = columns["needed"][position] if columns["needed"][position] >= 0 else released
        saved = columns["saved"][position]
        leaves = is_copied = has_left = returns = is_back = released
        if writes:
            leaves, is_copied = min(w[4] for w in writes), max(w[6] for w in writes)
            has_left, returns = max(w[8] for w in writes), needed
            is_back = returns
        if writes and reads:
            last = [read for read in reads if read[5] >= 0]
            returns = min(read[3] for read in last) if last else returns
            is_back = max([read[5] for read in last], default=returns)
        has_left = min(has_left, returns)  # it may be asked for before it has left
        ordered = [saved]
        for at in (leaves, min(is_copied, has_left), has_left, returns, is_back, released):
            ordered.append(min(max(at, ordered[-1]), max(released, saved)))
        is_in_host = bool(writes) and columns["where"][position] == Where.HOST
        begins = dict(zip(_STAGES, ordered, strict=True))
        return cls(nbytes=columns["nbytes"][position], is_in_host=is_in_host, **begins)


def stays(detail: Detail) -> list[Stay]:
    """All records of a step."""
    writes: dict[int, list[list[int]]] = {}
    reads: dict[int, list[list[int]]] = {}
    for write in detail.writes:
        if not write[3]:
            writes.setdefault(write[0], []).append(write)
    for read in detail.reads:
        reads.setdefault(read[0], []).append(read)
    positions = range(len(detail.records["nbytes"]))
    return [Stay.of(detail, position, writes.get(position, ()), reads.get(position, ())) for position in positions]


def residency(detail: Detail) -> dict[str, list[float]]:
    """Bytes by residency over the step: microseconds under ``"at"``, and one column for each of `RESIDENCIES`."""
    changes: dict[str, list[_Event]] = {name: [] for name in RESIDENCIES}
    changes["left alone"] = _other(detail)
    for stay in stays(detail):
        away = "in host memory" if stay.is_in_host else "on the drive"
        for name, begin, end in (
            ("in memory", stay.saved, stay.leaves),
            ("leaving", stay.leaves, stay.has_left),
            (away, stay.has_left, stay.returns),
            ("coming back", stay.returns, stay.is_back),
            ("in memory", stay.is_back, stay.released),
        ):
            if end > begin:
                changes[name] += [(begin, stay.nbytes), (end, -stay.nbytes)]
    return _sampled(changes)


def memory(detail: Detail) -> dict[str, list[float]]:
    """Bytes of saved tensors in memory over the step, staging included, with ssdtrain and if all had stayed."""
    other = _other(detail)
    changes: dict[str, list[_Event]] = {"with ssdtrain": list(other), "without": list(other)}
    for stay in stays(detail):
        held = [(stay.saved, stay.has_left), (stay.returns, stay.released)]
        if stay.is_in_host:  # the host tier counts for itself
            held[0] = stay.saved, stay.is_copied
        for begin, end in held:
            if end > begin:
                changes["with ssdtrain"] += [(begin, stay.nbytes), (end, -stay.nbytes)]
        changes["without"] += [(stay.saved, stay.nbytes), (stay.released, -stay.nbytes)]
    return _sampled(changes)


def _other(detail: Detail) -> list[_Event]:
    before, changes = 0, []
    for at, nbytes in detail.other:
        changes.append((at, nbytes - before))
        before = nbytes
    return changes


def _sampled(changes: dict[str, list[_Event]]) -> dict[str, list[float]]:
    """Levels after every change; of very many, the one with most bytes in each stretch."""
    events = sorted([(at, delta, name) for name, list_ in changes.items() for at, delta in list_])
    levels = dict.fromkeys(changes, 0)
    rows: list[tuple[int, dict[str, int]]] = [(0, dict(levels))]
    for at, delta, name in events:
        levels[name] += delta
        if rows[-1][0] == at:
            rows[-1] = (at, dict(levels))
        else:
            rows.append((at, dict(levels)))
    stride = -(-len(rows) // _MAX_POINTS)
    if stride > 1:
        groups = [rows[i : i + stride] for i in range(0, len(rows), stride)]
        rows = [max(group, key=lambda row: sum(row[1].values())) for group in groups]
    columns: dict[str, list[float]] = {"at": [at for at, _ in rows]}
    for name in changes:
        columns[name] = [row[name] for _, row in rows]
    return columns


@dataclass(frozen=True)
class Bar:
    """Something that took time."""

    lane: str
    """What kind: forward, backward, copies, writes, reads, or stalls."""
    begin: int
    """Microseconds since the step began."""
    end: int
    label: str
    """What and of which module."""
    nbytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self).copy()


def bars(detail: Detail) -> list[Bar]:
    """What happened when, lane by lane; several records of one request are one bar."""
    found = [*_phases(detail), *_writes(detail), *_reads(detail)]
    for tier, position, begin, microseconds in detail.stalls:
        found.append(Bar("stalls", begin, begin + microseconds, f"waited for a {tier}{_of(detail, position)}"))
    return [bar for bar in found if bar.end > bar.begin]


def _of(detail: Detail, position: int) -> str:
    name = detail.modules[detail.records["module"][position]] if position >= 0 else ""
    return f" of {name}" if name else ""


def _phases(detail: Detail) -> Iterable[Bar]:
    columns = detail.records
    by_pass: dict[int, list[int]] = {}
    for position, number in enumerate(columns["micro_batch"]):
        by_pass.setdefault(number, []).append(position)
    for number, positions in by_pass.items():
        name = f" of micro-batch {number}" if len(by_pass) > 1 else ""
        saved = [columns["saved"][position] for position in positions]
        needed = [columns["needed"][position] for position in positions if columns["needed"][position] >= 0]
        released = [columns["released"][position] for position in positions]
        end = min(needed) if needed and len(by_pass) == 1 else max(saved)
        yield Bar("forward", min(saved), max(end, min(saved) + 1), f"forward{name}")
        if needed:
            yield Bar("backward", min(needed), max(released), f"backward{name}")


def _writes(detail: Detail) -> Iterable[Bar]:
    together: dict[tuple[int, ...], list[list[int]]] = {}
    for write in detail.writes:
        together.setdefault(tuple(write[4:]), []).append(write)
    for (_, copy_begun, copied, write_begun, done), group in together.items():
        nbytes = sum([write[1] for write in group])
        names = _of(detail, group[0][0]) + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        if copy_begun >= 0 and copied >= 0:
            yield Bar("copies", copy_begun, copied, f"copy out{names}", nbytes)
        if write_begun >= 0:
            yield Bar("writes", write_begun, done, f"write{names}", nbytes)


def _reads(detail: Detail) -> Iterable[Bar]:
    for position, nbytes, is_from_memory, queued, begun, done in detail.reads:
        if is_from_memory:
            yield Bar("copies", queued, done, f"copy in{_of(detail, position)}, from staging", nbytes)
        elif begun >= 0:
            yield Bar("reads", begun, done, f"read{_of(detail, position)}", nbytes)


def levelled(found: Iterable[Bar]) -> list[tuple[Bar, int]]:
    """Bars with a level each, so that those of one lane and level never overlap: requests run side by side."""
    busy: dict[str, list[tuple[int, int]]] = {}  # by lane, a heap: when a level ends, and its number
    free: dict[str, list[int]] = {}
    placed = []
    for bar in sorted(found, key=lambda bar: (bar.begin, -bar.end)):
        ends, levels = busy.setdefault(bar.lane, []), free.setdefault(bar.lane, [])
        while ends and ends[0][0] <= bar.begin:
            heappush(levels, heappop(ends)[1])
        level = heappop(levels) if levels else len(ends)
        heappush(ends, (bar.end, level))
        placed.append((bar, level))
    return placed
