"""The recorded forward pass: what was saved, in which order, and in which order backward asked for it.

A pass is a run of saves not interrupted by backward. Two passes that saved the same sizes in the same order look the
same; the order in which the earlier one was unpacked is then the best guess for the later one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdtrain.tracing.step_trace import StepTrace, Traced

_NUM_REMEMBERED = 16

Signature = tuple[int, ...]
Spot = tuple[int, int, int]
"""Which save of which pass of a step it is, of those that could be offloaded, and its size: as in the next step."""


@dataclass(frozen=True)
class FinishedPass:
    """A finished pass: sizes by position, and the positions in the order backward first asked for them."""

    sizes: Signature
    order: list[int]

    @cached_property
    def needed_nbytes(self) -> dict[int, int]:
        """By position: bytes backward had asked for, this one included; what it never asked for comes last."""
        total, needed = 0, dict.fromkeys(range(len(self.sizes)), sum(self.sizes))
        for index in self.order:
            total += self.sizes[index]
            needed[index] = total
        return needed


class PassTrace:
    """Records of one forward pass by position, and the positions in the order backward first asked for them."""

    __slots__ = (
        "_finished",
        "cursor",
        "expected",
        "is_closed",
        "num_live",
        "num_spots",
        "number",
        "order",
        "positions",
        "rank",
        "records",
        "saves",
        "sizes",
        "starts",
        "step",
        "unpacked",
    )

    def __init__(
        self, finished: Callable[[PassTrace], None], step: StepTrace, expected: FinishedPass | None = None
    ) -> None:
        """An open pass of `step`; the first unpack closes it. `finished` is called when its last record is released.

        `expected`: the pass this one may be like; forgotten when it turns out not to be.
        """
        self._finished = finished
        self.step = step
        self.number = step.begin_pass()
        self.positions: list[int] = []  # of its records in the step
        self.expected = expected
        self.records: list[Traced | None] = []
        self.sizes: list[int] = []
        self.saves: list[int] = []  # positions of records in the order they were saved, once more for every time, and
        self.starts: list[int] = []  # where in it each operator began to save
        self.unpacked: list[int] = []
        self.num_live = 0
        self.num_spots = 0  # saves that could be offloaded, records or not
        self.is_closed = False
        self.order: list[int] = []  # predicted when the pass is closed
        self.rank: dict[int, int] = {}
        self.cursor = 0  # first position in `order` whose reload was not begun

    def next_spot(self, nbytes: int) -> Spot:
        """Names another save that could be offloaded."""
        self.num_spots += 1
        return self.number, self.num_spots, nbytes

    @property
    def spot(self) -> Spot:
        """The latest save, of `append` too."""
        return self.number, self.num_spots, self.sizes[-1]

    def append(self, record: Traced) -> int:
        """Adds a record; its position."""
        self.records.append(record)
        self.positions.append(self.step.save(record, self.number))
        self.sizes.append(record.nbytes)
        self.num_live += 1
        index = len(self.records) - 1
        self.saves.append(index)
        if self.expected is not None and self.expected.sizes[index : index + 1] != (record.nbytes,):
            self.expected = None
        return index

    def close(self, order: list[int]) -> None:
        """Backward begins; `order`: of its records, as backward will probably want them."""
        self.is_closed, self.order = True, order
        self.rank = {index: rank for rank, index in enumerate(order)}

    def likely_order(self) -> list[int]:
        """While nothing is known: the last operator first, and what it saved in one go, as its node will ask for it."""
        starts = [0, *self.starts, len(self.saves)]
        nodes = [self.saves[begin:end] for begin, end in pairwise(starts)]
        return list(dict.fromkeys([index for node in reversed(nodes) for index in node]))

    def go_on_after(self, rank: int) -> None:
        """Reloads of this pass go on with the record after this one of `order`."""
        self.cursor = rank + 1

    def remove(self, index: int) -> None:
        """Forgets a released record."""
        self.records[index] = None
        self.num_live -= 1
        if self.num_live == 0:
            self.is_closed = True
            self._finished(self)
        self.step.release(self.positions[index])

    @property
    def signature(self) -> Signature:
        """What makes two passes look the same."""
        return tuple(self.sizes)


class History:
    """Unpack orders of the latest passes, by signature."""

    def __init__(self) -> None:
        """Empty."""
        self._passes: OrderedDict[Signature, FinishedPass] = OrderedDict()

    @property
    def latest(self) -> FinishedPass | None:
        """The pass that finished last."""
        return next(reversed(self._passes.values()), None)

    def learn(self, finished: PassTrace) -> None:
        """Remembers how a pass was unpacked; one that backward never used teaches nothing."""
        if finished.unpacked:
            key = finished.signature
            self._passes[key] = FinishedPass(key, finished.unpacked)
            self._passes.move_to_end(key)
            if len(self._passes) > _NUM_REMEMBERED:
                self._passes.popitem(last=False)

    def order_of(self, signature: Signature) -> list[int] | None:
        """The order in which the last pass of this signature was unpacked."""
        found = self._passes.get(signature)
        return found.order if found is not None else None
