"""What stays and what to prefetch next: by the plan while a step is like one before, else as in the last pass.

Decides and moves nothing: it names records, the store begins their reloads. Records are noted under the store's lock.

[Note: following a plan]
A step follows a plan as long as every record saved has the size and the pass that the plan expects at this place. At
the first one that has not, it falls back to another plan that fits so far, or to none: then everything travels that the
drive has time for, and reloads go by the order of the last pass. Reloads also do so after a miss, which says that
backward goes elsewhere than it used to.

[Note: steps of an accelerator]
The host queues the next step while an accelerator is still in this one, so what this one taught is known a step or so
later: then it is planned with. Marking moments costs the host a call each; once there is a plan, one step in
four, drawn by lot, is enough to see whether it still holds.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ssdtrain.scheduling.replanner import Measured, Replanner
from ssdtrain.tracing.events import FinishedStep
from ssdtrain.tracing.pass_trace import History, PassTrace
from ssdtrain.tracing.step_trace import StepClock, StepTrace

if TYPE_CHECKING:
    from ssdtrain.devices.base import Moment
    from ssdtrain.planner import Plan
    from ssdtrain.scheduling.plan_cursor import PreparedPlan
    from ssdtrain.stats import Counters
    from ssdtrain.store.record import Record
    from ssdtrain.tracing.device_trace import DeviceTrace, Times

_MOST_UNTIMED = 6  # steps in a row of an accelerator, once there is a plan
_MAX_UNDER_WAY = 4  # steps that an accelerator may be behind; of more nothing is learned


@dataclass(frozen=True)
class _UnderWay:
    """A step that the host is done with and an accelerator perhaps not."""

    recording: StepTrace
    timing: DeviceTrace
    end: Moment
    measured: Measured
    totals: Counters


class Schedule:
    """Decides by plan, or predicts the order of reloads of each pass.

    Without a plan it is the last step's order when the step looks the same, else the rule "the one saved just before
    the one unpacked last", which also fits each micro-batch of a pipeline.
    """

    def __init__(self, clock: StepClock, replanner: Replanner | None) -> None:
        """Knows nothing yet: the first step goes by the rule. Without `replanner`, all do."""
        self._history = History()
        self._clock = clock
        self._replanner = replanner
        self._lot = random.Random(0)
        self._num_untimed = 0  # steps to come
        self._num_since_told = 0  # steps, since the replanner was told of one
        self._remarks: list[str] = []
        self._step = self._new_step()
        self._passes: list[PassTrace] = []  # of the step
        self._under_way: deque[_UnderWay] = deque()
        self._finished: StepTrace | None = None  # and not reviewed
        self._followed: Plan | None = None  # to its end
        self._stalled_before = 0.0  # seconds, until the running step began
        self._prepared: PreparedPlan | None = None
        self._num_begun = 0  # reloads of the prepared
        self._horizon = -math.inf  # until when reloads are due
        self._is_lost = False  # after a miss
        self.is_watched = False
        """Whether every finished step is to be reviewed, also one that teaches nothing."""

    # -- steps and passes ------------------------------------------------------------------------------------------

    def new_pass(self) -> PassTrace:
        """A pass that will teach its order when its last record is released."""
        if self._step.is_over:
            self._step, self._passes = self._new_step(), []
        if not self._passes:
            self._take(self._replanner.latest if self._replanner is not None else None)
        self._passes.append(PassTrace(self._history.learn, self._step, self._history.latest))
        return self._passes[-1]

    def _new_step(self) -> StepTrace:
        """See [Note: steps of an accelerator]."""
        replanner = self._replanner
        self._num_untimed -= 1
        is_timed = replanner is not None and (replanner.latest is None or self._num_untimed < 0)
        if is_timed:
            self._num_untimed = self._lot.randint(0, _MOST_UNTIMED)
        return StepTrace(self._clock, self._end_step, is_timed=is_timed)

    def start_afresh(self) -> None:
        """Gives the running step up; what is being saved from here on belongs to another."""
        self._step.is_abandoned = True
        self._step, self._passes, self._finished = self._new_step(), [], None
        self._take(None)

    def forget_accelerators(self) -> None:
        """This is a forked child, which must not ask them anything."""
        self._step.timing = None
        self._under_way.clear()

    def _end_step(self, step: StepTrace) -> None:
        replanner, prepared = self._replanner, self._prepared
        if self.is_watched or (replanner is not None and step.is_complete):
            self._finished = step
            self._followed = prepared.plan if prepared is not None and len(prepared.shape) == len(step.shape) else None
            if replanner is not None:
                replanner.note_followed(self._followed)
        if replanner is not None and step.is_mixed:
            self._remarks.append("steps whose saved tensors are on several devices are not planned: they have no clock")
        self._passes = []

    def take_remarks(self) -> list[str]:
        """What somebody should know, once."""
        remarks, self._remarks = self._remarks, []
        return remarks

    def _take(self, prepared: PreparedPlan | None) -> None:
        self._prepared, self._num_begun, self._horizon, self._is_lost = prepared, 0, -math.inf, False

    @property
    def plan(self) -> Plan | None:
        """The plan of the running or next step."""
        prepared = self._prepared or (self._replanner.latest if self._replanner is not None else None)
        return prepared.plan if prepared is not None else None

    @property
    def has_news(self) -> bool:
        """Whether a step is over that was not reviewed, or something else is to be told."""
        return (self._finished is not None and self._step.is_over) or bool(self._remarks)

    def finished(self, totals: Counters, *, is_last: bool = False) -> FinishedStep | None:
        """The step that is over and not reviewed, if the next one began now; changes nothing.

        `is_last`: no other follows. It then lasted until its last record was released: how long is not known better.
        """
        recording = self._finished
        if recording is None:
            return None
        step = recording.as_step(recording.ended_at if is_last else self._clock.compute_seconds())
        stalled = totals.stalled_seconds - self._stalled_before
        return FinishedStep(
            recording=recording,
            step=step,
            began_at=recording.began_at + self._stalled_before,
            seconds=step.seconds + stalled,
            stall_seconds=stalled,
            peak_nbytes=totals.step_peak_nbytes if recording.is_wall_time else totals.step_device_peak_nbytes,
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
        if self._replanner is not None and finished.recording.is_complete:
            if finished.recording.is_wall_time:
                self._replanner.review(finished.step, measured, totals)
            else:
                self._review_later(finished.recording, measured, totals)
        self._review_what_arrived(counters)
        counters.begin_step()
        counters.plan = self.plan.statement if self.plan is not None else ""
        if self._followed is not None:
            counters.predicted_peak_nbytes = self._followed.peak_nbytes
            counters.predicted_step_seconds = self._followed.step_seconds
            counters.measured_peak_nbytes, counters.measured_step_seconds = measured.peak_nbytes, measured.seconds
        return finished

    def _review_later(self, recording: StepTrace, measured: Measured, totals: Counters) -> None:
        """See [Note: steps of an accelerator]."""
        self._num_since_told += 1
        end, timing = recording.mark(), recording.timing
        if end is None or timing is None or len(self._under_way) >= _MAX_UNDER_WAY:
            return
        measured = replace(measured, is_accelerated=True, num_steps=self._num_since_told)
        self._under_way.append(_UnderWay(recording, timing, end, measured, totals))
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
            self._replanner.review(step.recording.as_device_step(times), measured, step.totals)

    # -- what stays ------------------------------------------------------------------------------------------------

    def note_saved(self, record: Record) -> None:
        """Follows the plan past a new record, or leaves it."""
        place, prepared = record.pass_.places[record.index], self._prepared
        if prepared is None:
            return
        if not prepared.expects(place, record.nbytes, record.pass_.number):
            assert self._replanner is not None
            self._take(self._replanner.prepared_of(self._step.shape))
            prepared = self._prepared
        if prepared is not None:
            self._horizon = max(self._horizon, prepared.next_after_save(place))

    @property
    def is_planned(self) -> bool:
        """Whether a plan is followed."""
        return self._prepared is not None

    def keeps(self, record: Record) -> bool:
        """Whether the plan, if one is followed, has a record stay in memory."""
        step = record.pass_.step
        return (
            self._prepared is not None
            and step is self._step
            and self._prepared.keeps(record.pass_.places[record.index])
        )

    def goes_to_host(self, record: Record, nbytes: int | None) -> bool:
        """Whether a record is for the host tier, where there is room: by plan, else the `nbytes` needed first."""
        prepared = self._prepared
        if prepared is not None and record.pass_.step is self._step:
            return prepared.is_for_host(record.pass_.places[record.index])
        return self._is_needed_soon(record, nbytes)

    def _is_needed_soon(self, record: Record, nbytes: int | None) -> bool:
        """Whether backward, if it goes as last time, wants the record among the first `nbytes` of its pass.

        True while there is nothing to go by, or no bound.
        """
        expected = record.pass_.expected
        return nbytes is None or expected is None or expected.needed_nbytes[record.index] <= nbytes

    # -- what comes back -------------------------------------------------------------------------------------------

    def begin_backward(self, pass_: PassTrace) -> None:
        """Closes a pass at its first unpack and predicts its order."""
        pass_.is_closed = True
        pass_.order = self._history.order_of(pass_.signature) or list(range(len(pass_.records) - 1, -1, -1))
        pass_.rank = {index: rank for rank, index in enumerate(pass_.order)}

    def note_unpacked(self, record: Record, *, is_first: bool, is_miss: bool, moment: Moment | None = None) -> None:
        """Adds a backward event. `moment`: when an accelerator gets there, if that was marked already.

        A miss (bytes neither in memory nor on their way) means that backward went elsewhere than predicted, to another
        micro-batch or through a graph for the second time: prediction goes on from there.
        """
        pass_ = record.pass_
        if pass_.is_abandoned:
            return
        if not pass_.is_closed:
            self.begin_backward(pass_)
        if is_first:
            pass_.unpacked.append(record.index)
        if is_miss and pass_.step is self._step:
            self._is_lost = True
        self._note_needed(record, moment)
        rank = pass_.rank.get(record.index)
        if rank is not None and (is_miss or rank >= pass_.cursor):
            pass_.cursor = rank + 1

    def _note_needed(self, record: Record, moment: Moment | None) -> None:
        pass_ = record.pass_
        place, prepared = pass_.places[record.index], self._prepared
        pass_.step.need(place, record.num_handles, moment)
        if prepared is not None and pass_.step is self._step and place < len(prepared.shape):
            self._horizon = max(self._horizon, prepared.next_after_need(place))

    def upcoming(self, pass_: PassTrace) -> Iterator[Record]:
        """Records to reload next, soonest first. The caller asks for one more only after it began the last one."""
        if self._prepared is not None and pass_.step is self._step and not self._is_lost:
            return self.due()
        return self._next_of(pass_) if not pass_.is_abandoned else iter(())

    def due(self) -> Iterator[Record]:
        """Records whose reloads the plan wants begun by now, the earliest deadline first; none without a plan."""
        prepared, step = self._prepared, self._step
        while prepared is not None and prepared is self._prepared and self._num_begun < len(prepared.reloads):
            num_begun = self._num_begun  # read once: another thread may walk the same graph
            start, place = prepared.reloads[num_begun]
            if start > self._horizon:
                return
            record = cast("Record | None", step.records[place]) if place < len(step.records) else None
            if record is not None:
                yield record
            self._num_begun = max(self._num_begun, num_begun + 1)

    def hinted(self, micro_batch: int) -> Iterator[Record]:
        """Records of a micro-batch of this step in the order of the last one: its backward comes next."""
        for pass_ in [pass_ for pass_ in self._passes if pass_.number == micro_batch]:
            if not pass_.order:
                self.begin_backward(pass_)
            yield from self._next_of(pass_)

    def _next_of(self, pass_: PassTrace) -> Iterator[Record]:
        order = pass_.order
        while (cursor := pass_.cursor) < len(order):  # read once: another thread may walk the same graph
            record = cast("Record | None", pass_.records[order[cursor]])
            if record is not None:
                yield record
            pass_.cursor = max(pass_.cursor, cursor + 1)
