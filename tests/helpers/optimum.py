"""The lowest peak any placement can reach on one step, as a mixed-integer model solved by HiGHS.

The rules are those of `ssdtrain.planner.timeline`: [Note: the rules of a step]. Variables, per record and tier:

    x         the record moves to this tier
    end       its write is done; not before what was saved earlier and moves there too is written
    start     its reload starts; not after what is needed later starts
    u, v      at every instant between its save and its need: its write is done, its reload has started

An instant is when something is saved, needed or released. Memory at an instant is what is alive, less what is written
and not coming back yet. Between two instants the model does not look, and there memory can only be higher: its optimum
is a lower bound of the true one. The timeline then tells when the solver's placement really has its peak; that moment
becomes an instant too and the model is solved again, until both agree: that is the optimum. The rows over windows of
time (what is written between two instants fits the bandwidth) say nothing new, they help the solver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ssdtrain.planner import Machine, Step, Where
from ssdtrain.planner.timeline import Timeline

_INSTANT = 3e-5  # of the step: just after, and beyond the solver's tolerance
_EXACT = 1e-3


@dataclass(frozen=True)
class Optimum:
    """What the solver found out."""

    bound_nbytes: float
    """No placement has a lower peak."""
    peak_nbytes: float
    """Peak of the solver's last placement."""
    num_solved: int
    """Models solved."""


def lowest_peak(step: Step, machine: Machine, max_rounds: int = 12, seconds: float = 5.0) -> Optimum:
    """Solves the model of the module's docstring; the bound holds even when rounds or time are over first."""
    timeline, instants, bound, peak = Timeline(step, machine), set[float](), 0.0, math.inf
    num_solved = 0
    while num_solved < max_rounds:
        num_solved += 1
        model = _Model(step, machine, instants)
        model.build()
        new_bound, placement = model.solve(seconds)
        bound = max(bound, new_bound)
        peak = min(peak, timeline.peak(placement))
        if peak <= bound * (1 + _EXACT):
            break
        instants.add(timeline.moment_of_peak(timeline.moves(placement)) + _INSTANT * step.seconds)
    return Optimum(bound, peak, num_solved)


class _Model:
    """Variables and rows of one model. Variable 0 is the peak."""

    def __init__(self, step: Step, machine: Machine, instants: set[float]) -> None:
        self._step, self._machine = step, machine
        self._records = step.records
        times = instants | {time for r in step.records for time in (r.saved, r.needed, r.released)}
        self._times = sorted(times - {math.inf})
        self._num, self._unit = 1, max(r.nbytes for r in step.records)
        self._far: dict[tuple[int, Where], float] = {}
        self._rows: list[tuple[dict[int, float], float]] = []  # coefficients, upper bound
        self._x: dict[tuple[int, Where], int] = {}
        self._u: dict[tuple[int, Where, int], int] = {}
        self._v: dict[tuple[int, Where, int], int] = {}
        self._end: dict[tuple[int, Where], int] = {}
        self._start: dict[tuple[int, Where], int] = {}
        self._horizon = max([r.released for r in step.records])

    def solve(self, seconds: float) -> tuple[float, list[int]]:
        """The bound, and the placement the solver chose."""
        data, rows, columns, upper = [], [], [], []
        for row, (coefficients, bound) in enumerate(self._rows):
            scale = max(abs(value) for value in coefficients.values())
            upper.append(bound / scale)
            for column, value in coefficients.items():
                rows.append(row)
                columns.append(column)
                data.append(value / scale)
        matrix = csr_array((data, (rows, columns)), shape=(len(self._rows), self._num))
        cost, most, is_whole = np.zeros(self._num), np.ones(self._num), np.ones(self._num)
        cost[0] = 1.0
        for column in (0, *self._end.values(), *self._start.values()):
            most[column], is_whole[column] = np.inf, 0
        result = milp(
            cost,
            constraints=LinearConstraint(matrix, -np.inf, np.array(upper)),
            bounds=Bounds(np.zeros(self._num), most),
            integrality=is_whole,
            options={"time_limit": seconds, "mip_rel_gap": 1e-4},
        )
        assert result.mip_dual_bound is not None, result.message
        placement = [int(Where.KEEP)] * len(self._records)
        for (i, where), x in self._x.items():
            if result.x is not None and result.x[x] > 0.5:
                placement[i] = int(where)
        return result.mip_dual_bound * self._unit, placement

    def build(self) -> None:
        for where, tier in self._machine.tiers().items():
            self._add_variables(where)
            self._add_writes(where, tier.write_bandwidth)
            self._add_reloads(where, tier.read_bandwidth)
            self._add_order_of_writes(where, tier.write_bandwidth)
            self._add_order_of_reloads(where, tier.read_bandwidth)
            if tier.capacity_nbytes < math.inf:
                self._add_capacity(where, tier.capacity_nbytes)
        self._add_staging()
        self._add_prefetch()
        self._add_one_tier()
        self._add_memory()

    def _add_order_of_writes(self, where: Where, bandwidth: float) -> None:
        """`end` follows `saved` and the `end` before it; u says that it is over."""
        before, far = None, 0.0
        for i, record in enumerate(self._records):
            if (i, where) not in self._x:
                continue
            seconds, x = record.nbytes / bandwidth, self._x[i, where]
            end = self._end[i, where] = self._variable()
            far = self._far[i, where] = max(far, record.saved) + seconds
            self._row({x: record.saved + seconds, end: -1.0}, 0.0)
            if before is not None:
                self._row({before: 1.0, x: seconds, end: -1.0}, 0.0)
            for k, at in enumerate(self._times):
                if (i, where, k) in self._u:
                    big = max(0.0, far - at)
                    self._row({end: 1.0, self._u[i, where, k]: big}, at + big)
            before = end

    def _add_order_of_reloads(self, where: Where, bandwidth: float) -> None:
        """`start` is early enough, and before the `start` after it; unless v says so, it comes after an instant."""
        after, near = None, self._horizon
        for _, _, i in sorted([(r.needed, r.nbytes, i) for i, r in enumerate(self._records)], reverse=True):
            record = self._records[i]
            if (i, where) not in self._x or record.needed == math.inf:
                continue
            seconds, x = record.nbytes / bandwidth, self._x[i, where]
            start = self._start[i, where] = self._variable()
            near = min(near, record.needed) - seconds  # no chain of reloads starts earlier
            slack = self._horizon - record.needed + seconds
            self._row({start: 1.0, x: slack}, self._horizon)
            if after is not None:
                self._row({start: 1.0, x: seconds, after: -1.0}, 0.0)
            big = max(0.0, self._far[i, where] - near)
            self._row({self._end[i, where]: 1.0, start: -1.0, x: big}, big)
            for k, at in enumerate(self._times):
                if (i, where, k) in self._v and at > near:
                    big = at - near
                    self._row({start: -1.0, x: big, self._v[i, where, k]: -big}, big - at)
            after = start

    def _row(self, coefficients: dict[int, float], bound: float) -> None:
        """At most `bound`."""
        if coefficients:
            self._rows.append((coefficients, bound))

    def _variable(self) -> int:
        self._num += 1
        return self._num - 1

    def _add_variables(self, where: Where) -> None:
        """x, u and v, with u and v growing, u at most x, v at most u; what is needed has begun to come back by then."""
        for i, record in enumerate(self._records):
            if record.nbytes > self._machine.prefetch_nbytes:
                continue
            x = self._x[i, where] = self._variable()
            before_u = before_v = None
            for k, at in enumerate(self._times):
                if not record.saved < at <= record.needed:
                    continue
                u = self._u[i, where, k] = self._variable()
                v = self._v[i, where, k] = self._variable()
                self._at_most(u, x)
                self._at_most(v, u)
                if before_u is not None:
                    self._at_most(before_u, u)
                    self._at_most(before_v, v)
                if at == record.needed:
                    self._at_most(x, v)
                before_u, before_v = u, v

    def _at_most(self, left: int, right: int) -> None:
        self._row({left: 1.0, right: -1.0}, 0.0)

    def _add_writes(self, where: Where, bandwidth: float) -> None:
        begins = sorted({r.saved for r in self._records})
        for k, end in enumerate(self._times):
            for begin in begins:
                if begin >= end:
                    break
                row = {
                    self._u[i, where, k]: r.nbytes
                    for i, r in enumerate(self._records)
                    if r.saved >= begin and (i, where, k) in self._u
                }
                if sum(row.values()) > bandwidth * (end - begin):
                    self._row(row, bandwidth * (end - begin))

    def _add_reloads(self, where: Where, bandwidth: float) -> None:
        ends = sorted({r.needed for r in self._records if r.needed < math.inf})
        for k, begin in enumerate(self._times):
            for end in ends:
                if end <= begin:
                    continue
                row: dict[int, float] = {}
                for i, r in enumerate(self._records):
                    if r.needed <= end and (i, where, k) in self._v:
                        row[self._x[i, where]] = r.nbytes
                        row[self._v[i, where, k]] = -r.nbytes
                if sum(value for value in row.values() if value > 0) > bandwidth * (end - begin):
                    self._row(row, bandwidth * (end - begin))

    def _add_capacity(self, where: Where, capacity: float) -> None:
        for now in self._times:
            row = {
                self._x[i, where]: r.nbytes
                for i, r in enumerate(self._records)
                if r.saved <= now < r.released and (i, where) in self._x
            }
            self._row(row, capacity)

    def _add_staging(self) -> None:
        """When a record moves, those before it that are not written yet leave room for it, or are none."""
        if self._machine.disk is None:
            return
        disk, limit = Where.DISK, self._machine.max_written_nbytes
        if limit < math.inf:
            self._row({self._x[i, w]: self._records[i].nbytes for i, w in self._x if w == disk}, limit)
        if self._machine.staging_nbytes == math.inf:
            return
        for i, record in enumerate(self._records):
            if (i, disk) not in self._x:
                continue
            k = self._times.index(record.saved)
            row: dict[int, float] = {}
            for j, earlier in enumerate(self._records[:i]):
                if (j, disk, k) in self._u:
                    row[self._x[j, disk]] = earlier.nbytes
                    row[self._u[j, disk, k]] = -earlier.nbytes
            most = sum(value for value in row.values() if value > 0)
            room = max(0.0, self._machine.staging_nbytes - record.nbytes)
            if most > room:
                row[self._x[i, disk]] = most - room
                self._row(row, most)

    def _add_prefetch(self) -> None:
        if self._machine.prefetch_nbytes == math.inf:
            return
        for k, now in enumerate(self._times):
            row = {
                v: self._records[i].nbytes
                for (i, _, at), v in self._v.items()
                if at == k and self._records[i].needed >= now
            }
            if any(r.needed == now for r in self._records):
                self._row(row, self._machine.prefetch_nbytes)

    def _add_one_tier(self) -> None:
        for i in range(len(self._records)):
            row = {x: 1.0 for (j, _), x in self._x.items() if j == i}
            if len(row) > 1:
                self._row(row, 1.0)

    def _add_memory(self) -> None:
        """The peak is at least what is in memory just before and just after what happens at an instant."""
        for k, now in enumerate(self._times):
            before = sum(r.nbytes for r in self._records if r.saved < now <= r.released)
            after = sum(r.nbytes for r in self._records if r.saved <= now < r.released)
            row: dict[int, float] = {0: -self._unit}
            for (i, _, at), u in self._u.items():
                if at == k:
                    row[u] = -self._records[i].nbytes
            for (i, _, at), v in self._v.items():
                if at == k:
                    row[v] = self._records[i].nbytes
            other = ([0] + [nbytes for at, nbytes in self._step.other if at <= now])[-1]
            other_before = ([0] + [nbytes for at, nbytes in self._step.other if at < now])[-1]
            self._row(row, -max(before + other_before, after + other))
