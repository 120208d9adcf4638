"""From a step, a machine and a goal to a plan: which of the possible placements, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from ssdtrain.planner.buffers import budget_text, reserve_nbytes, smallest_budget, staging_nbytes_for
from ssdtrain.planner.plan import SECONDS_PER_DAY, Goal, Plan
from ssdtrain.planner.predict import Prediction, latest_starts, predict
from ssdtrain.planner.recorded_step import Machine, Step, Tier, Where
from ssdtrain.planner.search import Search
from ssdtrain.planner.timeline import Timeline
from ssdtrain.stats import nbytes_text

_LEAST_GAIN = 0.01  # of the peak: for less nothing moves
_WORK = 100_000  # records times shares
_MIN_PLAYS, _MAX_PLAYS = 6, 200  # so many shares of the records are told apart
_LONG_STRIDES = 16  # plays before those around the best
_NEAR_LOWEST = 1.02  # of the lowest peak: where a budget cannot be met, less than that is not worth waiting for


def make_plan(step: Step, machine: Machine, goal: Goal) -> Plan:
    """Plans one step.

    Args:
        step: as recorded, without waits.
        machine: measured bandwidths and the bounds in force.
        goal: without a memory budget the lowest peak at which nothing waits; with one, the least step time under it.

    Returns:
        A plan. When moving cannot help, it keeps everything, and its statement says why.
    """
    daily_steps = SECONDS_PER_DAY / step.seconds if step.seconds > 0 else math.inf
    per_step = min(machine.max_written_nbytes, goal.own_daily_nbytes / daily_steps)
    return _Decision(step, replace(machine, max_written_nbytes=per_step), goal).plan()


class _Decision:
    """One decision while it is being made."""

    def __init__(self, step: Step, machine: Machine, goal: Goal) -> None:
        self._step, self._goal = step, goal
        self._timeline = Timeline(step, machine)
        self._search = Search(self._timeline)
        self._kept: list[int] = [int(Where.KEEP)] * len(step.records)

    def plan(self) -> Plan:
        budget = self._goal.memory_budget
        if budget is not None:
            asked, budget = budget, max(0, budget - self._goal.buffers_nbytes)
            if self._search.kept_peak <= budget:
                return self._as_plan(self._kept, f"nothing moves: everything fits the budget of {nbytes_text(asked)}")
        placement = self._search.run(enough=budget or 0)
        if budget is not None and self._search.best_peak > budget:
            return self._plan_with_waits(budget)
        if self._gain(self._search.best_peak) < _LEAST_GAIN:
            return self._as_plan(self._kept, self._why_declined())
        gain = self._gain(self._predict(placement, is_patient=False).peak_nbytes)
        does = f"falls by {gain:.0%}" if gain >= _LEAST_GAIN else "does not fall, as staging takes what is freed"
        return self._as_plan(placement, f"the peak {does}, and nothing waits{self._but(placement)}")

    def _gain(self, peak: float) -> float:
        kept = self._search.kept_peak
        return 1 - peak / kept if kept else 0.0

    def _predict(self, placement: list[int], *, is_patient: bool) -> Prediction:
        """With the staging that it needs."""
        moved = self._sent_nbytes(placement, Where.DISK)
        staging = min(moved, staging_nbytes_for(moved, self._goal.staging_limit_nbytes))
        return predict(self._timeline, placement, is_patient=is_patient, staging_nbytes=staging)

    def _sent_nbytes(self, placement: list[int], where: Where) -> int:
        return sum([n for n, w in zip(self._timeline.nbytes, placement, strict=True) if w == where])

    def _but(self, placement: list[int]) -> str:
        """What keeps the peak from falling further, where that is the drive's endurance and not the drive's speed."""
        nbytes = self._timeline.nbytes
        left = self._timeline.machine.max_written_nbytes - self._sent_nbytes(placement, Where.DISK)
        staying = [n for n, where in zip(nbytes, placement, strict=True) if where == Where.KEEP]
        if not staying or left >= min(staying):
            return ""
        return f"; the drive's endurance allows {self._share()}"

    def _share(self) -> str:
        allowed = self._timeline.machine.max_written_nbytes
        return f"{nbytes_text(allowed)} of the {nbytes_text(self._step.nbytes)} of a step"

    def _why_declined(self) -> str:
        if not self._step.records:
            return "declined: nothing that could move was saved"
        if not self._timeline.tiers:
            return "declined: there is nowhere to move to"
        at_once = Timeline(self._step, Machine(Tier(math.inf, math.inf)))
        everything = [int(Where.DISK)] * len(self._kept)
        if self._gain(at_once.peak(everything)) < _LEAST_GAIN:
            return "declined: the peak is not in saved activations"
        if self._timeline.machine.max_written_nbytes < min(self._timeline.nbytes):
            return "declined: the drive's endurance allows no writes"
        allowed, total = self._timeline.machine.max_written_nbytes, self._step.nbytes
        if allowed < total and Where.DISK in self._timeline.tiers:
            return f"declined: the drive's endurance allows {self._share()}, which would lower the peak by less than 1%"
        where = max(self._timeline.tiers, key=lambda tier: self._timeline.tiers[tier].write_bandwidth)
        prediction = predict(self._timeline, [int(where)] * len(self._kept), is_patient=True)
        if prediction.stall_seconds / self._step.seconds < _LEAST_GAIN:
            return f"declined: it would lower the peak by less than {_LEAST_GAIN:.0%}"
        return f"declined: moving everything would cost {self._cost(prediction)}"

    def _cost(self, prediction: Prediction) -> str:
        return f"{prediction.stall_seconds / self._step.seconds:.0%} of the step time"

    # -- with waits ----------------------------------------------------------------------------------------------

    def _plan_with_waits(self, budget: int) -> Plan:
        """The least wait under the budget, or near the lowest peak when nothing gets under it."""
        best, outcome = self._least_wait(budget)
        cost = f"at a cost of {self._cost(outcome)}"
        asked = nbytes_text(self._goal.memory_budget or 0)
        if outcome.peak_nbytes <= budget:
            return self._as_plan(best, f"under the budget of {asked} {cost}", is_patient=True)
        peak, needed = outcome.peak_nbytes + self._goal.buffers_nbytes, self._smallest_budget(outcome.peak_nbytes)
        statement = (
            f"the budget of {asked} cannot be met: the lowest peak is {nbytes_text(peak)}, {cost}; "
            f"by this estimate memory_budget={budget_text(needed)} can be met"
        )
        return replace(self._as_plan(best, statement, is_patient=True), needed_nbytes=needed)

    def _smallest_budget(self, peak: int) -> int:
        """What would have to be allowed for this peak."""
        largest, goal = max(self._timeline.nbytes, default=0), self._goal
        staging = goal.buffers_nbytes - reserve_nbytes(goal.memory_budget or 0, largest)
        return smallest_budget(peak + largest, max(0, staging), is_set=goal.is_staging_set)

    def _least_wait(self, budget: int) -> tuple[list[int], Prediction]:
        """Sends more and more of the rest: in long strides first, then in shorter ones around the best of them."""
        num = max(_MIN_PLAYS, min(_MAX_PLAYS, _WORK // len(self._kept)))
        tried = {0: (self._search.best, predict(self._timeline, self._search.best, is_patient=True))}
        best_k, stride = 0, -(-num // _LONG_STRIDES)
        ks = list(range(stride, num, stride)) + [num]
        while ks:
            for k in ks:
                placement = self._with_rest(k / num)
                if self._is_within_endurance(placement):
                    tried[k] = placement, predict(self._timeline, placement, is_patient=True)
            most = most_nbytes(budget, [outcome.peak_nbytes for _, outcome in tried.values()])
            best_k = min(tried, key=lambda k: _rank(tried[k][1], most))
            stride //= 2
            ks = [k for k in (best_k - stride, best_k + stride) if 0 < k <= num] if stride else []
        return tried[best_k]

    def _with_rest(self, share: float) -> list[int]:
        """What moves without a wait, and a share of the rest: what is away the longest first."""
        placement, away = self._search.best.copy(), self._away
        for i in self._rest[: max(1, int(len(self._rest) * share))]:
            placement[i] = away[i][1]
        return placement

    @cached_property
    def _away(self) -> list[tuple[float, int]]:
        return self._search.longest_away()

    @cached_property
    def _rest(self) -> list[int]:
        return sorted([i for i, w in enumerate(self._search.best) if not w], key=lambda i: -self._away[i][0])

    def _is_within_endurance(self, placement: list[int]) -> bool:
        return self._sent_nbytes(placement, Where.DISK) <= self._timeline.machine.max_written_nbytes

    # -- the result ----------------------------------------------------------------------------------------------

    def _as_plan(self, placement: list[int], statement: str, *, is_patient: bool = False) -> Plan:
        timeline = self._timeline
        peak, stall = int(self._search.best_peak if any(placement) else self._search.kept_peak), 0.0
        if is_patient or timeline.machine.idle_nbytes or self._goal.staging_limit_nbytes:  # else the search knows it
            prediction = self._predict(placement, is_patient=is_patient)
            peak, stall = prediction.peak_nbytes, prediction.stall_seconds
        return Plan(
            placement=tuple(placement),
            starts=tuple(latest_starts(timeline, placement)),
            statement=statement,
            is_patient=is_patient,
            kept_peak_nbytes=int(self._search.kept_peak),
            peak_nbytes=peak,
            compute_seconds=self._step.seconds,
            stall_seconds=stall,
            host_nbytes=self._sent_nbytes(placement, Where.HOST),
            disk_nbytes=self._sent_nbytes(placement, Where.DISK),
            endurance_nbytes=self._goal.endurance_nbytes,
            others_daily_nbytes=self._goal.others_daily_nbytes,
        )


def most_nbytes(budget: int, peaks: Iterable[int]) -> int:
    """What to stay under: the budget, or where no plan gets there, a little more than the lowest peak of them."""
    lowest = min(peaks)
    return budget if lowest <= budget else int(_NEAR_LOWEST * lowest)


def _rank(outcome: Prediction, most: int) -> tuple[float, float]:
    """Up to `most` bytes the least wait counts, above it the least memory."""
    return max(0, outcome.peak_nbytes - most), outcome.stall_seconds
