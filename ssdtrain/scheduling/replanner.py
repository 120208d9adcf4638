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
from functools import partial

from ssdtrain.io.host_space import host_limit_nbytes
from ssdtrain.io.timed_calls import run
from ssdtrain.planner import Buffers, Goal, Machine, Plan, Step, Tier, choose, make_plan, make_probe, reserve_nbytes
from ssdtrain.policy import ActivationPolicy, staging_under
from ssdtrain.scheduling.bandwidth import DRIFT, FIRST_PATIENCE, MAX_PATIENCE, Meter, Others, Speeds, differs
from ssdtrain.scheduling.consensus import Consensus, consensus_of_job
from ssdtrain.scheduling.plan_cursor import PreparedPlan, Shape
from ssdtrain.stats import Counters

_NUM_REMEMBERED = 16
_LEAST_STEPS = 2  # between plans
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
    """Most bytes of saved tensors in memory at once; of an accelerator's, where they are its."""
    seconds: float
    """From its beginning to that of the next, waits included."""
    stall_seconds: float
    """What of it was waiting."""
    followed: Plan | None = None
    """The plan it followed to its end."""
    is_accelerated: bool = False
    """Whether its tensors are an accelerator's, which a host tier may hold. Of those not all steps are told of."""
    num_steps: int = 1
    """How many steps there were since the last one that was told of, with this one."""
    recomputed: frozenset[str] | None = None
    """Blocks that were recomputed in it; None: those that are now."""


class Replanner:
    """The plans of one offload context, one per kind of step."""

    def __init__(
        self,
        machine: Machine,
        goal: Goal,
        blocks: Callable[[], Sequence[str]] | None = None,
        join: Callable[[], Consensus | None] = consensus_of_job,
        buffers: Buffers | None = None,
    ) -> None:
        """`machine` has the tiers and their bounds; how fast they are is measured.

        `blocks`: names those that may be recomputed. None: nothing is. `join`: joins the other ranks. `buffers`: which
        grow, those of `machine` are their limits.
        """
        self._machine, self._goal, self._blocks = machine, goal, blocks
        self._buffers = buffers
        self._meter = Meter()
        self._speeds: Speeds = (0.0, 0.0, 0.0, 0.0)
        self._others = Others(time.perf_counter())
        self._join: Callable[[], Consensus | None] | None = join
        self._consensus = join()  # or with the first step, when the job is set up later
        self.recomputed: frozenset[str] = frozenset()
        """Blocks to recompute from now on, by the plan with the latest measurements."""
        self._whole: Step | None = None  # a step in which nothing was recomputed
        self._statement = ""
        self._caution = _CAUTION
        self._prepared_plans: OrderedDict[Key, PreparedPlan] = OrderedDict()  # the latest last
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._planned_for: Machine = machine
        self._bounds = Counters()  # what the store allows now
        self._num_since_plan = self._num_plans = self._num_differing = 0
        self._probe: PreparedPlan | None = None  # for one step,
        self._probed: PreparedPlan | None = None  # in place of this one
        self._num_idle, self._num_busy, self._probe_after = 0, 0, FIRST_PATIENCE
        self._no_plan_before = 0.0  # time.perf_counter()

    @property
    def latest(self) -> PreparedPlan | None:
        """The plan that was made or confirmed last, or a probe in its place."""
        return self._or_probe(next(reversed(self._prepared_plans.values()), None))

    def prepared_of(self, shape: Shape) -> PreparedPlan | None:
        """A plan for a step that began like this."""
        return self._or_probe(
            next((prepared for prepared in reversed(self._prepared_plans.values()) if prepared.fits(shape)), None)
        )

    def _or_probe(self, prepared: PreparedPlan | None) -> PreparedPlan | None:
        return self._probe if self._probe is not None and prepared is self._probed else prepared

    def note_followed(self, plan: Plan | None) -> None:
        """A step has followed this plan to its end: a probe then has served."""
        if self._probe is not None and plan is self._probe.plan:
            self._probe = self._probed = None

    def review(self, step: Step, measured: Measured, totals: Counters) -> None:
        """Takes a finished step and the engine's totals; makes a plan where there is none or it holds no more."""
        speeds = self._meter.note(totals, measured.num_steps)
        self._others.note(totals.shared_written_nbytes, time.perf_counter())
        if not any(speeds):
            return
        self._speeds = self._agreed(speeds)
        self._bounds = totals
        now = self._machine_now(is_accelerated=measured.is_accelerated)
        is_stale = measured.recomputed is not None and measured.recomputed != self.recomputed
        if is_stale or (now.disk is None and now.host is None):
            return
        key = tuple((record.nbytes, record.micro_batch) for record in step.records)
        prepared = self._prepared_plans.pop(key, None)
        self._num_since_plan += 1
        is_due = key in self._seen if prepared is None else self._has_drifted(prepared, step, measured, now)
        self._seen[key] = None
        if is_due and time.perf_counter() >= self._no_plan_before:
            self._goal = self._with_own_buffers(step, measured)
            prepared = self._plan(step, self._machine_now(is_accelerated=measured.is_accelerated))
        if prepared is not None:
            self._prepared_plans[key] = prepared
            self._fit_buffers(measured)
            self._probe_if_due(prepared, measured.num_steps)
        for known in (self._prepared_plans, self._seen):
            if len(known) > _NUM_REMEMBERED:
                known.popitem(last=False)

    def _probe_if_due(self, prepared: PreparedPlan, num_steps: int) -> None:
        """See [Note: probes]."""
        is_idle = prepared.plan.is_declined
        self._num_idle, self._num_busy = (self._num_idle + num_steps, 0) if is_idle else (0, self._num_busy + num_steps)
        if self._num_busy >= self._probe_after:  # the drive kept what it promised
            self._num_busy, self._probe_after = 0, FIRST_PATIENCE
        is_pending = self._probe is not None and any([known is self._probed for known in self._prepared_plans.values()])
        if self._num_idle < self._probe_after or is_pending or self._machine.disk is None:
            return
        self._num_idle, self._probe_after = 0, min(MAX_PATIENCE, 2 * self._probe_after)
        probe = make_probe(prepared.step, self._goal, _PROBE_NBYTES)
        if probe is not None:
            self._probe, self._probed = PreparedPlan(prepared.step, probe), prepared

    def _agreed(self, own: Speeds) -> Speeds:
        """The lowest of all ranks."""
        if self._join is not None and self._consensus is None:
            self._consensus = self._join()
        self._join = None
        return self._consensus.lowest(own) if self._consensus is not None else own

    def _with_own_buffers(self, step: Step, measured: Measured) -> Goal:
        """What our buffers take, and what of a budget stays free for a step unlike its plan."""
        largest = max([record.nbytes for record in step.records], default=0)
        reserve = reserve_nbytes(self._goal.memory_budget or 0, largest)
        if self._buffers is None or measured.is_accelerated:
            return replace(self._goal, buffers_nbytes=reserve, staging_limit_nbytes=0)
        most = self._buffers.staging_limit_nbytes
        own = self._buffers.staging_nbytes if self._goal.memory_budget is None else most  # which may come to be in use
        return replace(self._goal, buffers_nbytes=reserve + own, staging_limit_nbytes=most)

    def _fit_buffers(self, measured: Measured) -> None:
        """Staging follows what the plans send; under a budget it was fixed."""
        if self._buffers is not None and not measured.is_accelerated and self._goal.memory_budget is None:
            self._buffers.note_planned(max([known.plan.disk_nbytes for known in self._prepared_plans.values()]))

    def _plan(self, step: Step, machine: Machine) -> PreparedPlan:
        begin = time.perf_counter()
        self._planned_for, self._num_since_plan = machine, 0
        self._goal = replace(self._goal, others_daily_nbytes=self._others.daily_nbytes)
        prepared = PreparedPlan(step, self._make_plan(step))
        end = time.perf_counter()
        is_final = self.recomputed == frozenset(prepared.plan.recomputed)  # else the steps to come look different
        self._num_plans += 1
        share = _FIRST_SHARE if self._num_plans <= _NUM_FIRST else _PLANNING_SHARE
        self._no_plan_before = end + (end - begin) / share if is_final else end
        return prepared

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
        own = make_plan(step, self._planned_for, self._goal)  # for steps that still look like this one
        return replace(own, statement=plan.statement, needed_nbytes=plan.needed_nbytes) if chosen else own

    def _has_drifted(self, prepared: PreparedPlan, step: Step, measured: Measured, now: Machine) -> bool:
        """Whether the plan holds no more. A wait under another plan, a probe perhaps, says nothing of this one."""
        is_own = measured.followed is prepared.plan
        waited = is_own and measured.stall_seconds - prepared.plan.stall_seconds > _WAIT * measured.seconds
        self._caution = max(_LEAST_CAUTION, self._caution * _LESS_CAUTION) if waited else self._caution
        self._caution = self._caution if waited else min(_CAUTION, self._caution * _RECOVERY)
        is_different = (
            _has_other_tiers(now, self._planned_for)
            or differs(step.seconds, prepared.step.seconds)
            or abs(self._others.daily_nbytes - self._goal.others_daily_nbytes) > DRIFT * self._goal.daily_nbytes
        )
        self._num_differing = self._num_differing + 1 if is_different else 0
        patience = 1 if self._num_plans <= _NUM_FIRST else _PATIENCE
        return self._num_since_plan >= _LEAST_STEPS and (waited or self._num_differing >= patience)

    def _machine_now(self, *, is_accelerated: bool) -> Machine:
        """The bounds, with the tiers that are known, as fast as may be counted on."""
        write, read, copy_out, copy_in = self._speeds
        machine, bounds, buffers = self._machine, self._bounds, self._buffers
        host = _measured(machine.host, copy_out, self._caution * copy_in) if is_accelerated else None
        if host is not None and host.capacity_nbytes == math.inf:
            host = replace(host, capacity_nbytes=bounds.host_limit_nbytes)  # which grows with the memory there is
        prefetch = max(machine.prefetch_nbytes, bounds.prefetch_limit_nbytes)
        if buffers is not None:
            prefetch = min(prefetch, buffers.prefetch_nbytes)
            machine = replace(machine, idle_nbytes=buffers.idle_nbytes)
        return replace(
            machine,
            disk=_measured(machine.disk, write, self._caution * read),
            host=host,
            staging_nbytes=max(machine.staging_nbytes, bounds.staging_limit_nbytes),
            prefetch_nbytes=prefetch,
            idle_nbytes=0.0 if is_accelerated else machine.idle_nbytes,
        )


def _measured(tier: Tier | None, write: float, read: float) -> Tier | None:
    return replace(tier, write_bandwidth=write, read_bandwidth=read) if tier is not None and write else None


def _has_other_tiers(now: Machine, then: Machine) -> bool:
    """Whether there are others, or their speeds have drifted."""
    tiers, before = now.tiers(), then.tiers()
    return tiers.keys() != before.keys() or any(
        differs(tier.write_bandwidth, before[where].write_bandwidth)
        or differs(tier.read_bandwidth, before[where].read_bandwidth)
        for where, tier in tiers.items()
    )


def replanner_for(
    policy: ActivationPolicy,
    directories: Sequence[str],
    blocks: Callable[[], Sequence[str]] | None = None,
    buffers: Buffers | None = None,
) -> Replanner | None:
    """What mode ``"auto"`` adapts with; None where nothing is to be decided.

    `blocks`: names the model's blocks that may be recomputed.
    """
    host_nbytes = host_limit_nbytes(policy.host_nbytes, has_directories=bool(directories))
    if policy.mode != "auto" or not policy.enabled or not (directories or host_nbytes != 0):
        return None
    capacity = math.inf if policy.disk_nbytes is None else policy.disk_nbytes
    machine = Machine(
        Tier(1.0, 1.0, capacity) if directories else None,
        Tier(1.0, 1.0, math.inf if host_nbytes is None else host_nbytes) if host_nbytes != 0 else None,
        staging_nbytes=policy.staging_nbytes,
        prefetch_nbytes=policy.prefetch_nbytes,
        idle_nbytes=policy.idle_nbytes,
    )
    own_blocks = blocks if policy.recompute == "auto" else None
    return Replanner(machine, _goal(policy, directories), own_blocks, buffers=buffers)


def _goal(policy: ActivationPolicy, directories: Sequence[str]) -> Goal:
    daily, endurance = math.inf, math.inf
    if policy.drive_writes_per_day is not None:
        asks = [(partial(os.statvfs, directory), directory) for directory in directories]
        sizes = [run(ask, policy.io_timeout_seconds, directory, "its size") for ask, directory in asks]
        daily = policy.drive_writes_per_day * sum([size.f_blocks * size.f_frsize for size in sizes])
    if policy.endurance_tbw is not None:
        endurance = policy.endurance_tbw * 1e12
        daily = min(daily, endurance / (policy.drive_life_years * 365.25))
    budget = policy.memory_budget
    is_set = budget is None or policy.staging_nbytes != staging_under(budget)
    return Goal(budget, daily, endurance, is_staging_set=is_set)
