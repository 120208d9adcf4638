"""The recorded forward pass: what was saved, in which order, and in which order backward asked for it.

A pass is a run of saves not interrupted by backward. Two passes that saved the same sizes in the same order look the
same; the order in which the earlier one was unpacked is then the best guess for the later one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdtrain.record import Record

_NUM_REMEMBERED = 16

Signature = tuple[int, ...]


class Pass:
    """Records of one forward pass by position, and the positions in the order backward first asked for them."""

    __slots__ = ("_finished", "cursor", "is_closed", "num_live", "order", "rank", "records", "sizes", "unpacked")

    def __init__(self, finished: Callable[[Pass], None]) -> None:
        """An open pass; the first unpack closes it. `finished` is called when its last record is released."""
        self._finished = finished
        self.records: list[Record | None] = []
        self.sizes: list[int] = []
        self.unpacked: list[int] = []
        self.num_live = 0
        self.is_closed = False
        self.order: list[int] = []  # predicted, set by the schedule when the pass is closed
        self.rank: dict[int, int] = {}
        self.cursor = 0  # first place in `order` whose reload was not begun

    def append(self, record: Record) -> int:
        """Adds a record; its position."""
        self.records.append(record)
        self.sizes.append(record.nbytes)
        self.num_live += 1
        return len(self.records) - 1

    def remove(self, index: int) -> None:
        """Forgets a released record."""
        self.records[index] = None
        self.num_live -= 1
        if self.num_live == 0:
            self.is_closed = True
            self._finished(self)

    @property
    def signature(self) -> Signature:
        """What makes two passes look the same."""
        return tuple(self.sizes)


class History:
    """Unpack orders of the latest passes, by signature."""

    def __init__(self) -> None:
        """Empty."""
        self._orders: OrderedDict[Signature, list[int]] = OrderedDict()

    def learn(self, finished: Pass) -> None:
        """Remembers how a pass was unpacked; one that backward never used teaches nothing."""
        if finished.unpacked:
            key = finished.signature
            self._orders[key] = finished.unpacked
            self._orders.move_to_end(key)
            if len(self._orders) > _NUM_REMEMBERED:
                self._orders.popitem(last=False)

    def order_of(self, signature: Signature) -> list[int] | None:
        """The order in which the last pass of this signature was unpacked."""
        return self._orders.get(signature)
