"""What to prefetch next, from the recorded order and the last backward event.

Decides and moves nothing: it names records, the store begins their reloads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ssdtrain.trace import History, Pass

if TYPE_CHECKING:
    from ssdtrain.record import Record


class Schedule:
    """Predicts the order of reloads of each pass.

    The last step's order when the step looks the same, else the rule "the one saved just before the one unpacked last",
    which also fits each micro-batch of a pipeline.
    """

    def __init__(self) -> None:
        """Knows nothing yet: the first pass goes by the rule."""
        self._history = History()

    def new_pass(self) -> Pass:
        """A pass that will teach its order when its last record is released."""
        return Pass(self._history.learn, self._history.latest)

    def is_needed_soon(self, record: Record, nbytes: int | None) -> bool:
        """Whether backward, if it goes as last time, wants the record among the first `nbytes` of its pass.

        True while there is nothing to go by, or no bound.
        """
        expected = record.pass_.expected
        return nbytes is None or expected is None or expected.needed_nbytes[record.index] <= nbytes

    def begin_backward(self, pass_: Pass) -> None:
        """Closes a pass at its first unpack and predicts its order."""
        pass_.is_closed = True
        pass_.order = self._history.order_of(pass_.signature) or list(range(len(pass_.records) - 1, -1, -1))
        pass_.rank = {index: rank for rank, index in enumerate(pass_.order)}

    def note_unpacked(self, record: Record, *, is_first: bool, is_miss: bool) -> None:
        """Adds a backward event.

        A miss (bytes neither in memory nor on their way) means that backward went elsewhere than predicted, to another
        micro-batch or through a graph for the second time: prediction goes on from there.
        """
        pass_ = record.pass_
        if not pass_.is_closed:
            self.begin_backward(pass_)
        if is_first:
            pass_.unpacked.append(record.index)
        rank = pass_.rank.get(record.index)
        if rank is not None and (is_miss or rank >= pass_.cursor):
            pass_.cursor = rank + 1

    def upcoming(self, pass_: Pass) -> Iterator[Record]:
        """Records to reload next, soonest first. The caller asks for one more only after it began the last one."""
        order = pass_.order
        while (cursor := pass_.cursor) < len(order):  # read once: another thread may walk the same graph
            record = pass_.records[order[cursor]]
            if record is not None:
                yield record
            pass_.cursor = max(pass_.cursor, cursor + 1)
