"""What stays and what to prefetch next: by the plan while a step is like one before, else as in the last pass.

Decides and moves nothing: it names records, the store begins their reloads. Records are noted under the store's lock.
What finished steps teach is `step_review`'s, how far a step has come in its plan `plan_cursor`'s.

[Note: following a plan]
A step follows a plan as long as every record saved has the size and the pass that the plan expects at this position. At
the first one that has not, it falls back to another plan that fits so far, or to none: then everything is offloaded
that the drive has time for, and reloads go by the order of the last pass. Reloads also do so after a miss, which says
that backward goes elsewhere than it used to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from ssdtrain.scheduling.plan_cursor import PlanCursor
from ssdtrain.scheduling.replanner import Replanner
from ssdtrain.scheduling.step_review import StepReview
from ssdtrain.tracing.finished_step import FinishedStep
from ssdtrain.tracing.pass_trace import History, PassTrace
from ssdtrain.tracing.step_trace import StepClock, StepTrace

if TYPE_CHECKING:
    from ssdtrain.devices.base import TimedEvent
    from ssdtrain.planner import Plan
    from ssdtrain.stats import Counters
    from ssdtrain.store.record import SavedRecord

_NUM_UNLIKE = 3  # steps, after which there would be a plan if two had been alike
_UNLIKE = "no two steps were alike: all is sent that the drive has time for, and comes back in the last step's order"


class Schedule:
    """Decides by plan, or predicts the order of reloads of each pass.

    Without a plan it is the last step's order when the step looks the same, else the rule "what was saved just before
    what was unpacked last, and all of one operator together", which also fits each micro-batch of a pipeline.
    """

    def __init__(self, clock: StepClock, replanner: Replanner | None) -> None:
        """Knows nothing yet: the first step goes by the rule. Without `replanner`, all do."""
        self.review = StepReview(clock, replanner)
        """What finished steps teach."""
        self._history = History()
        self._clock = clock
        self._replanner = replanner
        self._cursor = PlanCursor()
        self._step = self._new_step()
        self._passes: list[PassTrace] = []  # of the step

    # -- steps and passes ------------------------------------------------------------------------------------------

    def new_pass(self) -> PassTrace:
        """A pass that will teach its order when its last record is released."""
        if self._step.is_over:
            self._step, self._passes = self._new_step(), []
        if not self._passes:
            self._cursor.follow(self._replanner.latest if self._replanner is not None else None)
        self._passes.append(PassTrace(self._history.learn, self._step, self._history.latest))
        return self._passes[-1]

    def _new_step(self) -> StepTrace:
        return StepTrace(self._clock, self._end_step, is_timed=self.review.is_next_timed())

    def _end_step(self, step: StepTrace) -> None:
        prepared = self._cursor.prepared
        is_followed = prepared is not None and len(prepared.shape) == len(step.shape)
        self.review.end(step, prepared.plan if prepared is not None and is_followed else None)
        self._passes = []

    def reset(self) -> None:
        """Gives the running step up; what is being saved from here on belongs to another."""
        self._step.abandon()
        self._step, self._passes = self._new_step(), []
        self.review.give_up()
        self._cursor.follow(None)

    def forget_accelerators(self) -> None:
        """This is a forked child, which must not ask them anything."""
        self._step.forget_timing()
        self.review.forget_accelerators()

    @property
    def plan(self) -> Plan | None:
        """The plan of the running or next step."""
        prepared = self._cursor.prepared or (self._replanner.latest if self._replanner is not None else None)
        return prepared.plan if prepared is not None else None

    @property
    def has_news(self) -> bool:
        """Whether a step is over that was not reviewed, or something else is to be told."""
        return (self.review.has_finished and self._step.is_over) or self.review.has_remarks

    def review_step(self, counters: Counters, totals: Counters) -> FinishedStep | None:
        """See `StepReview.review`; `counters` also say what the next step's plan is."""
        finished = self.review.review(counters, totals)
        if finished is not None:
            unlike = _UNLIKE if self._replanner is not None and self.review.num_reviewed >= _NUM_UNLIKE else ""
            counters.plan = self.plan.statement if self.plan is not None else unlike
        return finished

    # -- what stays ------------------------------------------------------------------------------------------------

    def note_saved(self, record: SavedRecord) -> None:
        """Follows the plan past a new record, or leaves it."""
        position, cursor = record.pass_.positions[record.index], self._cursor
        if cursor.prepared is None:
            return
        if not cursor.prepared.expects(position, record.nbytes, record.pass_.number):
            assert self._replanner is not None
            cursor.follow(self._replanner.prepared_of(self._step.shape))
        cursor.note_saved(position)

    @property
    def is_planned(self) -> bool:
        """Whether a plan is followed."""
        return self._cursor.prepared is not None

    @property
    def needed_nbytes(self) -> int:
        """What the plan that is followed needs beyond a budget that cannot be met; 0 where it can."""
        prepared = self._cursor.prepared
        return prepared.plan.needed_nbytes if prepared is not None else 0

    @property
    def next_nbytes(self) -> int | None:
        """How much is saved next, by the plan that is followed; None where nobody knows."""
        prepared, position = self._cursor.prepared, len(self._step.shape)
        if prepared is None or self._step.is_over or position > len(prepared.shape):
            return None
        return prepared.shape[position][0] if position < len(prepared.shape) else 0

    def keeps(self, record: SavedRecord) -> bool:
        """Whether the plan, if one is followed, has a record stay in memory."""
        prepared, pass_ = self._cursor.prepared, record.pass_
        return prepared is not None and pass_.step is self._step and prepared.keeps(pass_.positions[record.index])

    def goes_to_host(self, record: SavedRecord, nbytes: int | None) -> bool:
        """Whether a record is for the host tier, where there is room: by plan, else the `nbytes` needed first."""
        prepared = self._cursor.prepared
        if prepared is not None and record.pass_.step is self._step:
            return prepared.is_for_host(record.pass_.positions[record.index])
        return self._is_needed_soon(record, nbytes)

    def _is_needed_soon(self, record: SavedRecord, nbytes: int | None) -> bool:
        """Whether backward, if it goes as last time, wants the record among the first `nbytes` of its pass.

        True while there is nothing to go by, or no bound.
        """
        expected = record.pass_.expected
        return nbytes is None or expected is None or expected.needed_nbytes[record.index] <= nbytes

    # -- what comes back -------------------------------------------------------------------------------------------

    def begin_backward(self, pass_: PassTrace) -> None:
        """Closes a pass at its first unpack and predicts its order."""
        pass_.close(self._history.order_of(pass_.signature) or pass_.likely_order())

    def note_unpacked(
        self, record: SavedRecord, *, is_first: bool, is_miss: bool, event: TimedEvent | None = None
    ) -> None:
        """Adds a backward event. `event`: when an accelerator gets there, if that was marked already.

        A miss (bytes neither in memory nor on their way) means that backward went elsewhere than predicted, to another
        micro-batch or through a graph for the second time: prediction goes on from there.
        """
        pass_ = record.pass_
        if pass_.step.is_abandoned:
            return
        if not pass_.is_closed:
            self.begin_backward(pass_)
        if is_first:
            pass_.unpacked.append(record.index)
        if is_miss and pass_.step is self._step:
            self._cursor.lose()
        position = pass_.positions[record.index]
        pass_.step.need(position, record.num_handles, event)
        if pass_.step is self._step and self._cursor.prepared is not None:
            self._cursor.note_needed(position)
        rank = pass_.rank.get(record.index)
        if rank is not None and (is_miss or rank >= pass_.cursor):
            pass_.go_on_after(rank)

    def upcoming(self, pass_: PassTrace) -> Iterator[SavedRecord]:
        """Records to reload next, soonest first. The caller asks for one more only after it began the last one."""
        if self._cursor.prepared is not None and pass_.step is self._step and not self._cursor.is_lost:
            return self.due()
        return self._next_of(pass_) if not pass_.step.is_abandoned else iter(())

    def due(self) -> Iterator[SavedRecord]:
        """Records whose reloads the plan wants begun by now, the earliest deadline first; none without a plan."""
        step = self._step
        for position in self._cursor.due():
            record = step.records[position] if position < len(step.records) else None
            if record is not None:
                yield cast("SavedRecord", record)

    def hinted(self, micro_batch: int) -> Iterator[SavedRecord]:
        """Records of a micro-batch of this step in the order of the last one: its backward comes next."""
        for pass_ in [pass_ for pass_ in self._passes if pass_.number == micro_batch]:
            if not pass_.order:
                self.begin_backward(pass_)
            yield from self._next_of(pass_)

    def _next_of(self, pass_: PassTrace) -> Iterator[SavedRecord]:
        order = pass_.order
        while (cursor := pass_.cursor) < len(order):  # read once: another thread may walk the same graph
            record = cast("SavedRecord | None", pass_.records[order[cursor]])
            if record is not None:
                yield record
            pass_.go_on_after(max(pass_.cursor - 1, cursor))
