"""Learns from finished steps: what was measured goes to the replanner, also what an accelerator knows later.

Knows traces and the replanner, neither records nor who is told of a step. Steps end under the store's lock; a review
may take a tenth of a second and runs without it.

[Note: steps of an accelerator]
The host queues the next step while an accelerator is still in this one, so what this one taught is known a step or so
later: then it is planned with. Timed events cost the host a call each; once there is a plan, one step in four, drawn by
lot, is enough to see whether it still holds.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ssdtrain.scheduling.replanner import Measured, Replanner
from ssdtrain.tracing.finished_step import FinishedStep
from ssdtrain.tracing.step_trace import StepClock, StepTrace

if TYPE_CHECKING:
    from ssdtrain.devices.base import TimedEvent
    from ssdtrain.planner import Plan
    from ssdtrain.stats import Counters
    from ssdtrain.tracing.device_trace import DeviceTrace, Times

_MOST_UNTIMED = 6  # steps in a row of an accelerator, once there is a plan
_MAX_UNDER_WAY = 4  # steps that an accelerator may be behind; of more nothing is learned


@dataclass(frozen=True)
class _UnderWay:
    """A step that the host is done with and an accelerator perhaps not."""

    trace: StepTrace
    timing: DeviceTrace
    end: TimedEvent
    measured: Measured
    totals: Counters


class StepReview:
    """Finished steps of one schedule, and what they taught."""

    def __init__(self, clock: StepClock, replanner: Replanner | None) -> None:
        """No step is over yet. Without `replanner` steps are only told of."""
        self._clock, self._replanner = clock, replanner
        self.num_reviewed = 0
        """Steps that were."""
        self._is_watched = False
        self._lot = random.Random(0)
        self._num_untimed = 0  # steps to come
        self._num_since_told = 0  # steps, since the replanner was told of one
        self._remarks: list[str] = []
        self._under_way: deque[_UnderWay] = deque()
        self._finished: StepTrace | None = None  # and not reviewed
        self._followed: Plan | None = None  # to its end
        self._stalled_before = 0.0  # seconds, until the running step began

    def observe(self) -> None:
        """Has every step reviewed, also one that teaches nothing: somebody wants to be told of it."""
        self._is_watched = True

    def is_next_timed(self) -> bool:
        """Whether an accelerator is to time the step that begins, see [Note: steps of an accelerator]."""
        replanner = self._replanner
        self._num_untimed -= 1
        is_timed = replanner is not None and (replanner.latest is None or self._num_untimed < 0)
        if is_timed:
            self._num_untimed = self._lot.randint(0, _MOST_UNTIMED)
        return is_timed

    def end(self, step: StepTrace, followed: Plan | None) -> None:
        """A step is over, which followed a plan to its end or none. Under the store's lock."""
        replanner = self._replanner
        if step is not self._finished:  # else it went on before anybody was told that it was over
            self._clock.end_step()
        if self._is_watched or (replanner is not None and step.is_complete):
            self._finished, self._followed = step, followed
            if replanner is not None:
                replanner.note_followed(followed)
        if replanner is not None and step.is_mixed:
            self._remarks.append("steps whose saved tensors are on several devices are not planned: they have no clock")

    def give_up(self) -> None:
        """Drops steps that were not reviewed yet: they cannot be relied on."""
        self._finished = None

    def forget_accelerators(self) -> None:
        """This is a forked child, which must not ask them anything."""
        self._under_way.clear()

    def take_remarks(self) -> list[str]:
        """Sentences for the user, each handed over once."""
        remarks, self._remarks = self._remarks, []
        return remarks

    @property
    def has_finished(self) -> bool:
        """Whether a step is over that was not reviewed."""
        return self._finished is not None

    @property
    def has_remarks(self) -> bool:
        """Whether something else is to be told."""
        return bool(self._remarks)

    def finished(self, totals: Counters, *, is_last: bool = False) -> FinishedStep | None:
        """The step that is over and not reviewed, if the next one began now; changes nothing.

        `is_last`: no other follows. It then lasted until its last record was released: how long is not known better.
        """
        trace = self._finished
        if trace is None:
            return None
        step = trace.as_step(trace.ended_at if is_last else self._clock.compute_seconds())
        stalled = totals.stalled_seconds - self._stalled_before
        return FinishedStep(
            trace=trace,
            step=step,
            began_at=trace.began_at + self._stalled_before,
            seconds=step.seconds + stalled,
            stall_seconds=stalled,
            peak_nbytes=totals.last_memory_nbytes if trace.is_wall_time else totals.step_device_peak_nbytes,
            plan=self._followed,
            totals=totals,
        )

    def review(self, counters: Counters, totals: Counters) -> FinishedStep | None:
        """Learns from the finished step; the next one begins now. May take a tenth of a second: not under the lock.

        `totals` are `counters` with what the engine has done; into `counters` goes how well the step was predicted.
        """
        finished, self._finished = self.finished(totals), None
        if finished is None:
            return None
        self._stalled_before = totals.stalled_seconds
        recomputed = self._replanner.recomputed if self._replanner is not None else None
        self._review_what_arrived(counters)
        measured = Measured(
            finished.peak_nbytes, finished.seconds, finished.stall_seconds, self._followed, recomputed=recomputed
        )
        if self._replanner is not None and finished.trace.is_complete and not counters.is_declining:
            if finished.trace.is_wall_time:
                self._replanner.review(finished.step, measured, totals)
            else:
                self._review_later(finished.trace, measured, totals)
        self._review_what_arrived(counters)
        counters.begin_step()
        self.num_reviewed += 1
        if self._followed is not None:
            counters.predicted_peak_nbytes = self._followed.peak_nbytes
            counters.predicted_step_seconds = self._followed.step_seconds
            counters.measured_peak_nbytes, counters.measured_step_seconds = measured.peak_nbytes, measured.seconds
        return finished

    def _review_later(self, trace: StepTrace, measured: Measured, totals: Counters) -> None:
        """See [Note: steps of an accelerator]."""
        self._num_since_told += 1
        end, timing = trace.mark(), trace.timing
        if end is None or timing is None or len(self._under_way) >= _MAX_UNDER_WAY:
            return
        measured = replace(measured, is_accelerated=True, num_steps=self._num_since_told)
        self._under_way.append(_UnderWay(trace, timing, end, measured, totals))
        self._num_since_told = 0

    def _review_what_arrived(self, counters: Counters) -> None:
        """Learns from steps that an accelerator is through with; one that it cannot tell of teaches nothing."""
        while self._under_way:
            step = self._under_way[0]
            try:
                if not step.timing.is_over:
                    return
                times = step.timing.times(step.end)
            except RuntimeError as error:  # the accelerator's: it did not expect the question just now
                self._under_way.popleft()
                self._remarks.append(f"a step on an accelerator could not be timed: {error}")
                continue
            self._under_way.popleft()
            self._learn_from(step, times, counters)

    def _learn_from(self, step: _UnderWay, times: Times, counters: Counters) -> None:
        seconds = times.seconds + times.waited
        counters.device_step_seconds, counters.device_wait_seconds = seconds, times.waited
        if self._replanner is not None and times.seconds > 0:
            measured = replace(step.measured, seconds=seconds, stall_seconds=times.waited_for_reloads)
            self._replanner.review(step.trace.as_device_step(times), measured, step.totals)
