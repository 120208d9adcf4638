"""A plan on its way through a step: what stays, and which reloads are due after each thing that happens.

Nothing happens between two hooks, so after each of them the reloads begin that should start before the next one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator

from ssdtrain.planner import Plan, Step, Where

Shape = list[tuple[int, int]]
"""By position in a step: size of the record, and number of its pass."""


class PreparedPlan:
    """One step that was recorded, and the plan for those that look like it."""

    def __init__(self, step: Step, plan: Plan) -> None:
        """Prepares `plan`, which was made for `step`."""
        self.step, self.plan = step, plan
        self.shape = [(record.nbytes, record.micro_batch) for record in step.records]
        self.reloads = sorted([(start, i) for i, start in enumerate(plan.starts) if start > -math.inf])
        """When reloads start, and of which position, the earliest first."""
        times = sorted({record.saved for record in step.records} | {record.needed for record in step.records})
        times.append(math.inf)
        self._after_save = [times[bisect_right(times, record.saved)] for record in step.records]
        self._after_need = [
            times[bisect_right(times, record.needed)] if record.needed < math.inf else math.inf
            for record in step.records
        ]

    def fits(self, shape: Shape) -> bool:
        """Whether a step with this beginning may still be one of these."""
        return self.shape[: len(shape)] == shape

    def expects(self, position: int, nbytes: int, number: int) -> bool:
        """Whether a record of this size and pass comes at this position."""
        return position < len(self.shape) and self.shape[position] == (nbytes, number)

    def keeps(self, position: int) -> bool:
        """Whether the record at this position stays in memory."""
        return self.plan.placement[position] == Where.KEEP

    def is_for_host(self, position: int) -> bool:
        """Whether the record at this position goes to the host tier."""
        return self.plan.placement[position] == Where.HOST

    def next_after_save(self, position: int) -> float:
        """When the next thing happens after this save."""
        return self._after_save[position]

    def next_after_need(self, position: int) -> float:
        """When the next thing happens after this first use."""
        return self._after_need[position]


class PlanCursor:
    """How far a running step has come in the plan it follows, and which reloads that makes due.

    Guarded by the store's lock, but for `due`, which several threads may walk at once.
    """

    def __init__(self) -> None:
        """Follows no plan."""
        self.prepared: PreparedPlan | None = None
        """The plan that is followed, if one is."""
        self.is_lost = False
        """Whether backward went elsewhere than planned: reloads then go by the order of the last pass."""
        self._num_begun = 0  # reloads
        self._horizon = -math.inf  # until when reloads are due

    def follow(self, prepared: PreparedPlan | None) -> None:
        """Follows a plan from its beginning, or none."""
        self.prepared, self.is_lost, self._num_begun, self._horizon = prepared, False, 0, -math.inf

    def lose(self) -> None:
        """Backward went elsewhere than planned."""
        self.is_lost = True

    def note_saved(self, position: int) -> None:
        """The record at this position of the step was saved, as planned."""
        if self.prepared is not None:
            self._horizon = max(self._horizon, self.prepared.next_after_save(position))

    def note_needed(self, position: int) -> None:
        """Backward asked for the record at this position."""
        if self.prepared is not None and position < len(self.prepared.shape):
            self._horizon = max(self._horizon, self.prepared.next_after_need(position))

    def due(self) -> Iterator[int]:
        """Positions whose reloads the plan wants begun by now, the earliest deadline first.

        The caller asks for one more only after it began the last one.
        """
        prepared = self.prepared
        while prepared is not None and prepared is self.prepared and self._num_begun < len(prepared.reloads):
            num_begun = self._num_begun  # read once: another thread may walk the same graph
            start, position = prepared.reloads[num_begun]
            if start > self._horizon:
                return
            yield position
            self._num_begun = max(self._num_begun, num_begun + 1)
