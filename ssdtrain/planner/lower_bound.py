"""What no placement gets below: how much must be in memory at one moment of a step, whatever moves.

[Note: the bound]
At a moment a record can be away only if its write, begun when it was saved, would be done by then, and if its reload,
ending when it is needed, would not have begun. Of those that can, a channel carries no more than its bandwidth allows
since they were saved, or until they are needed, were records divisible like a fluid. Neither is more offloaded than the
bounds on what is on its way leave room for: what overflows stays. What is left after that is in memory, and the peak of
every placement is at least that high. Where a placement has its peak shows at which moments to ask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate

from ssdtrain.planner.recorded_step import Where
from ssdtrain.planner.timeline import Moves, Timeline

Moment = tuple[float, bool]
"""Seconds, and whether what happens then has happened already."""

_ROUNDING = 1e-9  # of a number of bytes


def moments_near_peak(timeline: Timeline, moves: Moves, level: float) -> list[Moment]:
    """Both ends of every period in which at least `level` bytes are in memory, of the highest first."""
    events = timeline.events(moves)
    found: list[tuple[int, float, bool]] = []
    for (at, _), (end, _), now in zip(events, events[1:], accumulate([delta for _, delta in events]), strict=False):
        if now >= level and end > at:
            found += [(-now, at, True), (-now, end, False)]
    return [(at, is_past) for _, at, is_past in sorted(found)]


def least_at(timeline: Timeline, moment: Moment) -> float:
    """Bytes that are in memory at this moment whatever moves; see [Note: the bound]."""
    at, is_past = moment
    away, can_leave = 0.0, set[int]()
    for where in timeline.tiers:
        some = [i for i in range(len(timeline.nbytes)) if timeline.can_be_away(i, where, at, is_past=is_past)]
        can_leave.update(some)
        away += _most_away(timeline, where, some, at)
    return timeline.kept_level(at, is_past) - min(away, sum([timeline.nbytes[i] for i in can_leave]))


def _most_away(timeline: Timeline, where: Where, some: list[int], at: float) -> float:
    """Bytes of these that one tier can have written by then and need not have begun to reload."""
    if not some:
        return 0.0
    tier, sizes, needed, machine = timeline.tiers[where], timeline.nbytes, timeline.needed, timeline.machine
    is_disk = where == Where.DISK
    writes = sorted([(timeline.saved[i], sizes[i]) for i in some])
    reloads = sorted([(-needed[i], sizes[i]) for i in some if needed[i] < math.inf])
    stays_away = sum([sizes[i] for i in some if needed[i] == math.inf])
    most = min(
        _carried(writes, at, tier.write_bandwidth, machine.staging_nbytes if is_disk else math.inf),
        _carried(reloads, -at, tier.read_bandwidth, machine.prefetch_nbytes) + stays_away,
        tier.capacity_nbytes,
        machine.max_written_nbytes if is_disk else math.inf,
    )
    unit = math.gcd(*[sizes[i] for i in some])
    return math.floor(most / unit * (1 + _ROUNDING)) * unit


def _carried(arrivals: Iterable[tuple[float, int]], until: float, bandwidth: float, room: float) -> float:
    """Bytes a channel has carried by `until` of what arrived in this order; more than `room` never waits."""
    total, waiting, last = 0.0, 0.0, -math.inf
    for at, nbytes in arrivals:
        if waiting:
            waiting = max(0.0, waiting - (at - last) * bandwidth) if at > last else waiting
        joins = min(nbytes, max(room, nbytes) - waiting)
        total, waiting, last = total + joins, waiting + joins, at
    left = waiting - (until - last) * bandwidth if until > last else waiting
    return total - max(0.0, left)
