"""Keeps plans in step with what is measured: bandwidths averaged over steps, a new plan when they or the steps drift.

[Note: when to plan]
The first plan for a kind of step is made when it was seen twice: the very first step of a run is slower than others,
and a step that never comes again needs none. A plan holds while bandwidths and compute time stay within a quarter of
those it was made for, but for a step or two of noise. Beyond that, and when a step waited although no wait was
predicted, another one is made from what was measured last; every wait also makes it more cautious for a while: it
counts on less read bandwidth than measured.
After a plan some steps pass before the next, so that one slow moment does not bring one plan and the next moment
another, and so that planning, however short the steps are, takes a small part of the time.

[Note: probes]
While nothing is written, nothing is measured: a drive that was slow once would be taken for slow forever. So a plan
that sends nothing is left for one step now and then, after 32 steps, then 64, and at last every 1024, to send a few
records.

[Note: bursts]
A drive's cache, or the credit of a rate limiter, takes a few megabytes at once much faster than the next ones. What the
drive did while it was busy therefore says too much of it when it was busy for moments only; a quarter of a second
without a pause says what it can keep up. The slower of both is counted on. A plan that leaves pauses teaches nothing of
the second kind, so it is forgotten after 32 steps without, then 64, and at last every 1024: the drive may have
recovered.

[Note: recomputation]
Which blocks are recomputed is decided from a step in which none was, remembered for later decisions. Once some are,
steps look different; they are seen twice and planned like any others.
"""

from __future__ import annotations

import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ssdtrain.agreement import Agreement, agreement_of_job
from ssdtrain.planner import SECONDS_PER_DAY, Goal, Machine, Plan, Step, Tier, choose, make_plan, make_probe
from ssdtrain.policy import ActivationPolicy
from ssdtrain.route import Route, Shape
from ssdtrain.stats import Counters

_NUM_REMEMBERED = 16
_DRIFT = 0.25
_LEAST_NBYTES = 1 << 20  # of traffic that says something about a drive
_NEW_SHARE = 0.5  # of the latest step in the averages
_OLD_SHARE = 0.99  # what a step leaves of the sums before it
_LEAST_STEPS = 2  # between plans
_FIRST_PROBE, _MAX_PROBE = 32, 1024  # steps without traffic before one
_PROBE_NBYTES = 4 << 20
_PLANNING_SHARE, _FIRST_SHARE, _NUM_FIRST = 0.005, 0.02, 4  # of the time; of the first plans, while much is new
_PATIENCE = 3  # steps in a row that differ: fewer are noise
_WAIT = 0.005  # of a step: more is not noise
_CAUTION, _LEAST_CAUTION, _LESS_CAUTION, _RECOVERY = 0.85, 0.3, 0.8, 1.01


Key = tuple[tuple[int, int], ...]
"""What makes two steps look the same: size and pass of every record."""


@dataclass(frozen=True)
class Measured:
    """What a step was like."""

    peak_nbytes: int
    """Most bytes of saved tensors in memory at once."""
    seconds: float
    """From its beginning to that of the next, waits included."""
    stall_seconds: float
    """What of it was waiting."""


class Rate:
    """Bytes per second, averaged over steps."""

    def __init__(self) -> None:
        self.average = 0.0
        self.nbytes, self.seconds = 0, 0.0  # totals at the latest note that taught something

    def note(self, nbytes: int, seconds: float) -> bool:
        """Takes running totals of traffic and time; whether there was enough of both to learn from."""
        new_nbytes, new_seconds = nbytes - self.nbytes, seconds - self.seconds
        if new_nbytes < _LEAST_NBYTES or new_seconds <= 0:
            return False
        self.nbytes, self.seconds = nbytes, seconds
        rate = new_nbytes / new_seconds
        self.average = rate if not self.average else self.average + _NEW_SHARE * (rate - self.average)
        return True


class Bandwidth:
    """One direction of a drive. See [Note: bursts]."""

    def __init__(self) -> None:
        self._burst, self._sustained = Rate(), Rate()
        self._last_sustained = 0.0
        self._num_since, self._patience = 0, _FIRST_PROBE  # steps without a long period; until it is forgotten

    @property
    def average(self) -> float:
        """Bytes per second to count on; 0.0 while nothing is known."""
        known = [rate.average for rate in (self._burst, self._sustained) if rate.average]
        return min(known, default=0.0)

    def note(self, nbytes: int, seconds: float, sustained_nbytes: int, sustained_seconds: float) -> None:
        """Takes running totals of traffic and busy time, and of long busy periods, after a step."""
        self._burst.note(nbytes, seconds)
        if self._sustained.note(sustained_nbytes, sustained_seconds):
            self._num_since = 0
            if _differs(self._sustained.average, self._last_sustained):
                self._patience = _FIRST_PROBE
            self._last_sustained = self._sustained.average
            return
        self._num_since += 1
        if self._num_since >= self._patience:
            self._num_since, self._patience = 0, min(_MAX_PROBE, 2 * self._patience)
            self._sustained.average = 0.0


class Others:
    """What is written to the same drive for parameters and optimizer state, averaged over the last hundred steps or so.

    An optimizer writes once for several micro-batches, and not while a context is active: so all bytes are set against
    all time.
    """

    def __init__(self, now: float) -> None:
        self._nbytes, self._moment = 0, now
        self._sum_nbytes = self._sum_seconds = 0.0

    @property
    def daily_nbytes(self) -> float:
        """Written per day."""
        return self._sum_nbytes / self._sum_seconds * SECONDS_PER_DAY if self._sum_seconds > 0 else 0.0

    def note(self, nbytes: int, now: float) -> None:
        """Takes the running total, after a step."""
        self._sum_nbytes = _OLD_SHARE * self._sum_nbytes + nbytes - self._nbytes
        self._sum_seconds = _OLD_SHARE * self._sum_seconds + now - self._moment
        self._nbytes, self._moment = nbytes, now


class Adaptation:
    """The plans of one offload context, one per kind of step."""

    def __init__(
        self,
        machine: Machine,
        goal: Goal,
        blocks: Callable[[], Sequence[str]] | None = None,
        join: Callable[[], Agreement | None] = agreement_of_job,
    ) -> None:
        """`machine` has the bounds; its drive is replaced by what is measured.

        `blocks`: names those that may be recomputed. None: nothing is. `join`: joins the other ranks.
        """
        self._machine, self._goal, self._blocks = machine, goal, blocks
        self._bandwidths = (0.0, 0.0)
        self._others = Others(time.perf_counter())
        self._join: Callable[[], Agreement | None] | None = join
        self._agreement = join()  # or with the first step, when the job is set up later
        self.recomputed: frozenset[str] = frozenset()
        """Blocks to recompute from now on, by the plan with the latest measurements."""
        self._whole: Step | None = None  # a step in which nothing was recomputed
        self._statement = ""
        self._write, self._read = Bandwidth(), Bandwidth()
        self._caution = _CAUTION
        self._routes: OrderedDict[Key, Route] = OrderedDict()  # the latest last
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._planned_for: Machine = machine
        self._num_since_plan = self._num_plans = self._num_differing = 0
        self._probed: Route | None = None  # the plan that a probe stands in for
        self._num_idle, self._num_busy, self._probe_after = 0, 0, _FIRST_PROBE
        self._no_plan_before = 0.0  # time.perf_counter()

    @property
    def latest(self) -> Route | None:
        """The plan that was made or confirmed last."""
        return next(reversed(self._routes.values()), None)

    def route_of(self, shape: Shape) -> Route | None:
        """A plan for a step that began like this."""
        return next((route for route in reversed(self._routes.values()) if route.fits(shape)), None)

    def review(self, step: Step, measured: Measured, totals: Counters) -> None:
        """Takes a finished step and the engine's totals; makes a plan where there is none or it holds no more."""
        self._write.note(
            totals.written_nbytes,
            totals.write_busy_seconds,
            totals.sustained_written_nbytes,
            totals.sustained_write_seconds,
        )
        self._read.note(
            totals.read_nbytes, totals.read_busy_seconds, totals.sustained_read_nbytes, totals.sustained_read_seconds
        )
        self._others.note(totals.shared_written_nbytes, time.perf_counter())
        if not self._write.average:
            return
        self._bandwidths = self._agreed(self._write.average, self._read.average or self._write.average)
        key = tuple((record.nbytes, record.micro_batch) for record in step.records)
        route, measured = self._without_probe(self._routes.pop(key, None), measured)
        self._num_since_plan += 1
        is_due = key in self._seen if route is None else self._has_drifted(route, step, measured)
        self._seen[key] = None
        if is_due and time.perf_counter() >= self._no_plan_before:
            route = self._plan(step)
        if route is not None:
            self._routes[key] = self._with_probe(route)
        for known in (self._routes, self._seen):
            if len(known) > _NUM_REMEMBERED:
                known.popitem(last=False)

    def _with_probe(self, route: Route) -> Route:
        """See [Note: probes]: the plan, or a probe in its place for one step."""
        is_idle = route.plan.is_declined
        self._num_idle, self._num_busy = (self._num_idle + 1, 0) if is_idle else (0, self._num_busy + 1)
        if self._num_busy == self._probe_after:  # the drive kept what it promised
            self._probe_after = _FIRST_PROBE
        if self._num_idle < self._probe_after:
            return route
        self._num_idle, self._probe_after = 0, min(_MAX_PROBE, 2 * self._probe_after)
        probe = make_probe(route.step, self._goal, _PROBE_NBYTES)
        if probe is None:
            return route
        self._probed = route
        return Route(route.step, probe)

    def _without_probe(self, route: Route | None, measured: Measured) -> tuple[Route | None, Measured]:
        """The plan that was left for a probe; that the probe made the step wait says nothing of the plan."""
        probed = self._probed
        if route is None or probed is None or route.step is not probed.step:
            return route, measured
        self._probed = None
        return probed, replace(measured, stall_seconds=0.0)

    def _agreed(self, write: float, read: float) -> tuple[float, float]:
        """The lowest of all ranks."""
        if self._join is not None and self._agreement is None:
            self._agreement = self._join()
        self._join = None
        return self._agreement.lowest((write, read)) if self._agreement is not None else (write, read)

    def _plan(self, step: Step) -> Route:
        begin = time.perf_counter()
        self._planned_for, self._num_since_plan = self._machine_now(), 0
        self._goal = replace(self._goal, others_daily_nbytes=self._others.daily_nbytes)
        route = Route(step, self._make_plan(step))
        end = time.perf_counter()
        is_final = self.recomputed == frozenset(route.plan.recomputed)  # else the steps to come look different
        self._num_plans += 1
        share = _FIRST_SHARE if self._num_plans <= _NUM_FIRST else _PLANNING_SHARE
        self._no_plan_before = end + (end - begin) / share if is_final else end
        return route

    def _make_plan(self, step: Step) -> Plan:
        """See [Note: recomputation]."""
        if self._blocks is None:
            return make_plan(step, self._planned_for, self._goal)
        if not self.recomputed:
            self._whole = step
        assert self._whole is not None
        chosen, plan = choose(self._whole, self._blocks(), self._planned_for, self._goal, self.recomputed)
        if chosen == self.recomputed and chosen:
            own = make_plan(step, self._planned_for, self._goal)
            return replace(own, recomputed=plan.recomputed, statement=f"{own.statement}; {self._statement}")
        self.recomputed, self._statement = chosen, plan.statement.rpartition("; ")[2]
        return make_plan(step, self._planned_for, self._goal)

    def _has_drifted(self, route: Route, step: Step, measured: Measured) -> bool:
        waited = measured.stall_seconds - route.plan.stall_seconds > _WAIT * measured.seconds
        self._caution = max(_LEAST_CAUTION, self._caution * _LESS_CAUTION) if waited else self._caution
        self._caution = self._caution if waited else min(_CAUTION, self._caution * _RECOVERY)
        now, then = self._machine_now().disk, self._planned_for.disk
        assert now is not None and then is not None
        is_different = (
            _differs(now.write_bandwidth, then.write_bandwidth)
            or _differs(now.read_bandwidth, then.read_bandwidth)
            or _differs(step.seconds, route.step.seconds)
            or abs(self._others.daily_nbytes - self._goal.others_daily_nbytes) > _DRIFT * self._goal.daily_nbytes
        )
        self._num_differing = self._num_differing + 1 if is_different else 0
        patience = 1 if self._num_plans <= _NUM_FIRST else _PATIENCE
        return self._num_since_plan >= _LEAST_STEPS and (waited or self._num_differing >= patience)

    def _machine_now(self) -> Machine:
        """The bounds, with bandwidths to count on. A drive not read from yet is taken to read as it writes."""
        room = self._machine.disk.capacity_nbytes if self._machine.disk is not None else 0
        write, read = self._bandwidths
        return replace(self._machine, disk=Tier(write, self._caution * read, room))


def _differs(now: float, then: float) -> bool:
    return abs(now - then) > _DRIFT * then


def adaptation_for(
    policy: ActivationPolicy, directories: Sequence[str], blocks: Callable[[], Sequence[str]] | None = None
) -> Adaptation | None:
    """What mode ``"auto"`` adapts with; None where nothing is to be decided.

    `blocks`: names the model's blocks that may be recomputed.
    """
    if policy.mode != "auto" or not policy.enabled or not directories:
        return None
    capacity = math.inf if policy.disk_nbytes is None else policy.disk_nbytes
    machine = Machine(
        Tier(1.0, 1.0, capacity),
        staging_nbytes=policy.staging_nbytes,
        prefetch_nbytes=policy.prefetch_nbytes,
        idle_nbytes=policy.idle_nbytes,
    )
    return Adaptation(machine, _goal(policy, directories), blocks if policy.recompute == "auto" else None)


def _goal(policy: ActivationPolicy, directories: Sequence[str]) -> Goal:
    daily, endurance = math.inf, math.inf
    if policy.drive_writes_per_day is not None:
        sizes = [os.statvfs(directory) for directory in directories]
        daily = policy.drive_writes_per_day * sum([size.f_blocks * size.f_frsize for size in sizes])
    if policy.endurance_tbw is not None:
        endurance = policy.endurance_tbw * 1e12
        daily = min(daily, endurance / (policy.drive_life_years * 365.25))
    return Goal(policy.memory_budget, daily, endurance)
