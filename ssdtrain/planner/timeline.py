"""One step under one placement when nothing waits: when writes end, when reloads start, and how high memory gets.

[Note: the rules of a step]
- A record is in memory from its save until its write is done, and from the start of its reload until its release.
- Each tier writes one record after the other in the order of saves, and reads one after the other in the order of
  needs, each at its own bandwidth, independently of the other direction.
- A write begins when the record is saved and the channel is free. A reload begins as late as it may: it ends when the
  record is needed, or when the next reload begins. It cannot begin before the write is done.
- When a record joins those on their way to the drive, all of them fit `staging_nbytes`, or it is alone.
- What was reloaded, or is being reloaded, and is not asked for yet fits `prefetch_nbytes`, or is one record alone. With
  `prefetch_nbytes` 0 nothing comes back ahead of need.
- What is on a tier fits its capacity, and what is written to the drive its endurance budget.
A record that breaks a rule would be waited for, or be kept after all: it is *refused*.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from operator import itemgetter

from ssdtrain.planner.recorded_step import Machine, Step, Tier, Where

_DELTA = itemgetter(1)  # of an event: how many bytes more or less

Placement = Sequence[int]
"""A `Where` for every record."""


@dataclass
class Moves:
    """When the writes of a placement end and its reloads start, by position; -1 for what does not move."""

    written: list[float]
    reloaded: list[float]
    refused: list[int] = field(default_factory=list)
    """Positions there is no room for; they take no part in the rest."""
    late: list[int] = field(default_factory=list)
    """Positions that would not be back in time; they take no part in the reloads."""

    @property
    def is_clean(self) -> bool:
        """Whether no rule is broken."""
        return not self.refused and not self.late


class Timeline:
    """Evaluates placements of one step on one machine."""

    def __init__(self, step: Step, machine: Machine) -> None:
        self.step, self.machine = step, machine
        records = step.records
        self.nbytes = [record.nbytes for record in records]
        self.saved = [record.saved for record in records]
        self.needed = [record.needed for record in records]
        self.released = [record.released for record in records]
        needs = sorted([(record.needed, record.nbytes, i) for i, record in enumerate(records)], reverse=True)
        self.by_need = [i for _, _, i in needs]  # the last first; of equals the largest
        self.tiers = machine.tiers()
        self._unmoved = self._events_of_memory_kept()

    def _events_of_memory_kept(self) -> list[tuple[float, int]]:
        events = [(record.saved, record.nbytes) for record in self.step.records]
        events += [(record.released, -record.nbytes) for record in self.step.records]
        before = 0
        for seconds, nbytes in self.step.other:
            events.append((seconds, nbytes - before))
            before = nbytes
        return sorted(events)

    def kept_level(self, at: float, is_past: bool) -> int:
        """Bytes in memory at a moment if nothing moves, after or before what happens then."""
        times, levels = self._kept
        return levels[(bisect_right if is_past else bisect_left)(times, at)]

    @cached_property
    def _kept(self) -> tuple[list[float], list[int]]:
        """When memory changes if nothing moves, and the bytes before the first change and after each."""
        return [at for at, _ in self._unmoved], [0, *accumulate(map(_DELTA, self._unmoved))]

    def can_be_away(self, i: int, where: Where, at: float, *, is_past: bool = True) -> bool:
        """Whether a record would be on this tier at a moment if it had the tier for itself."""
        tier, size, needed = self.tiers[where], self.nbytes[i], self.needed[i]
        if not self.machine.prefetch_nbytes:
            return False
        written = self.saved[i] + size * (1 / tier.write_bandwidth)
        start = needed - size * (1 / tier.read_bandwidth) if needed < math.inf else self.released[i]
        return written <= at < start if is_past else written < at <= start

    def peak(self, placement: Placement) -> float:
        """Most bytes in memory at once; infinite when a rule is broken."""
        levels = self.levels(placement)
        return math.inf if levels is None else max(levels, default=0)

    def levels(self, placement: Placement, at: float = -1.0, most: float = math.inf) -> list[int] | None:
        """Bytes in memory after every change; None when a rule is broken, or when there are more than `most` `at` once.

        The latter is found out before the changes are put in order, which takes half of the time.
        """
        moves = self.moves(placement, stops_at_refusal=True)
        if not moves.is_clean or (most < math.inf and self.level_at(at, moves) > most):
            return None
        return self.levels_of(moves)

    def level_at(self, at: float, moves: Moves) -> int:
        """Bytes in memory at a moment, after what happens then."""
        whole = zip(self.nbytes, moves.written, moves.reloaded, strict=True)
        return self.kept_level(at, True) - sum([size for size, gone, back in whole if 0 <= gone <= at < back])

    def levels_of(self, moves: Moves) -> list[int]:
        """Bytes in memory after every change, when the times are known already."""
        return list(accumulate(map(_DELTA, self.events(moves))))

    def moment_of_peak(self, moves: Moves) -> float:
        """When most bytes are in memory."""
        events = self.events(moves)
        levels = list(accumulate(map(_DELTA, events)))
        return events[levels.index(max(levels))][0]

    def events(self, moves: Moves) -> list[tuple[float, int]]:
        """Changes of memory in order; of simultaneous ones those that free memory come first."""
        sizes = self.nbytes
        events = self._unmoved.copy()
        events += [(at, -nbytes) for at, nbytes in zip(moves.written, sizes, strict=True) if at >= 0]
        events += [(at, nbytes) for at, nbytes in zip(moves.reloaded, sizes, strict=True) if at >= 0]
        events.sort()
        return events

    def moves(self, placement: Placement, *, stops_at_refusal: bool = False) -> Moves:
        """The times of a placement. With `stops_at_refusal` they are incomplete when something is refused."""
        num = len(placement)
        moves = Moves([-1.0] * num, [-1.0] * num)
        for where, tier in self.tiers.items():
            there = [i for i, at in enumerate(placement) if at == where]
            if not self._within_endurance(there, where):
                moves.refused = there
                return moves
            self._write(there, where, tier, moves)
            if moves.refused and stops_at_refusal:
                return moves
        self._reload(placement, moves, stops_at_refusal)
        return moves

    def _within_endurance(self, there: list[int], where: Where) -> bool:
        limit = self.machine.max_written_nbytes
        return where != Where.DISK or limit == math.inf or sum([self.nbytes[i] for i in there]) <= limit

    def _write(self, there: list[int], where: Where, tier: Tier, moves: Moves) -> None:
        """Queues the writes of one tier; see [Note: the rules of a step]."""
        saved, nbytes, written, per_byte = self.saved, self.nbytes, moves.written, 1 / tier.write_bandwidth
        staging = self.machine.staging_nbytes if where == Where.DISK else math.inf
        room = _Room(tier.capacity_nbytes) if tier.capacity_nbytes < math.inf else None
        free, num_in_flight = 0.0, 0
        in_flight: deque[int] = deque()
        for i in there:
            now, size = saved[i], nbytes[i]
            while in_flight and written[in_flight[0]] <= now:
                num_in_flight -= nbytes[in_flight.popleft()]
            is_refused = num_in_flight and num_in_flight + size > staging
            if is_refused or (room is not None and not room.take(now, self.released[i], size)):
                moves.refused.append(i)
                continue
            num_in_flight += size
            in_flight.append(i)
            free = written[i] = (free if free > now else now) + size * per_byte

    def _reload(self, placement: Placement, moves: Moves, stops_at_refusal: bool) -> None:
        """Places the reloads, the last one first; see [Note: the rules of a step]."""
        needed, nbytes, written, starts = self.needed, self.nbytes, moves.written, moves.reloaded
        per_byte, most = self._seconds_per_byte_read(), self.machine.prefetch_nbytes
        free = [math.inf] * len(Where)
        ahead: tuple[deque[int], ...] = tuple(deque() for _ in Where)  # reloads of each tier, the last to start first
        queues = [ahead[where] for where in self.tiers]
        num_ahead = 0
        for i in self.by_need:
            if written[i] < 0:
                continue
            where, due, size = placement[i], needed[i], nbytes[i]
            if due == math.inf:  # backward never asks for it: it does not come back
                starts[i] = self.released[i]
                continue
            for started in queues:
                while started and starts[started[0]] >= due:
                    num_ahead -= nbytes[started.popleft()]
            start = (due if due < free[where] else free[where]) - size * per_byte[where]
            is_too_much = num_ahead + size > most and (num_ahead or not most)
            if is_too_much or start < written[i]:
                moves.late.append(i)
                written[i] = -1.0
                if stops_at_refusal:
                    return
                continue
            num_ahead += size
            starts[i] = free[where] = start
            ahead[where].append(i)

    def _seconds_per_byte_read(self) -> list[float]:
        return [1 / self.tiers[where].read_bandwidth if where in self.tiers else 0.0 for where in Where]


class _Room:
    """Room on a tier, given back when records are released."""

    def __init__(self, nbytes: float) -> None:
        self._free = nbytes
        self._tenants: list[tuple[float, int]] = []

    def take(self, now: float, until: float, nbytes: int) -> bool:
        while self._tenants and self._tenants[0][0] <= now:
            self._free += heapq.heappop(self._tenants)[1]
        if nbytes > self._free:
            return False
        self._free -= nbytes
        heapq.heappush(self._tenants, (until, nbytes))
        return True
