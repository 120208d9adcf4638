"""What was recorded of forward and backward: sizes, order and times of everything saved, and of when it was needed.

A *pass* is a run of saves not interrupted by backward. Two passes that saved the same sizes in the same order look the
same; the order in which the earlier one was unpacked is then the best guess for the later one. A *recording* is one
step: all passes alive together, from the first save to the moment when nothing is alive. With gradient accumulation that
is one micro-batch, in a pipeline all that overlap. No optimizer has to be known for it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from ssdtrain.planner import Lifetime, Step

if TYPE_CHECKING:
    from ssdtrain.record import Record

_NUM_REMEMBERED = 16

Signature = tuple[int, ...]
Clock = Callable[[], float]
"""Seconds of compute: time that stands still while the training thread waits for a drive."""


class Recording:
    """One step while it happens. Records have a *place*: their number among all saves of the step."""

    __slots__ = (
        "_clock",
        "_ended",
        "aliases",
        "ended_at",
        "modules",
        "needed",
        "num_live",
        "num_passes",
        "numbers",
        "other",
        "records",
        "released",
        "saved",
        "sizes",
    )

    def __init__(self, clock: Clock, ended: Callable[[Recording], None]) -> None:
        """An empty step. `ended` is called when its last record is released."""
        self._clock, self._ended = clock, ended
        self.num_live = self.num_passes = 0
        self.records: list[Record | None] = []
        self.sizes: list[int] = []
        self.numbers: list[int] = []  # of the pass, that is the micro-batch
        self.saved: list[float] = []
        self.needed: list[float] = []
        self.released: list[float] = []
        self.modules: list[str] = []
        self.aliases: list[int] = []
        self.other: list[tuple[float, int]] = []
        self.ended_at = math.inf

    @property
    def is_over(self) -> bool:
        """Whether everything saved in it was released."""
        return self.ended_at < math.inf

    def save(self, record: Record, number: int, other_nbytes: int) -> int:
        """Notes a new record of pass `number`; its place."""
        now = self._clock()
        self.records.append(record)
        self.sizes.append(record.nbytes)
        self.numbers.append(number)
        self.saved.append(now)
        self.needed.append(math.inf)
        self.released.append(math.inf)
        self.modules.append("")
        self.aliases.append(1)
        if not self.other or self.other[-1][1] != other_nbytes:
            self.other.append((now, other_nbytes))
        self.num_live += 1
        return len(self.sizes) - 1

    def need(self, place: int, num_aliases: int) -> None:
        """Notes that backward asks for a record for the first time."""
        self.needed[place] = self._clock()
        self.aliases[place] = num_aliases

    def release(self, place: int) -> None:
        """Notes that the graph let a record go."""
        record = self.records[place]
        assert record is not None
        self.records[place] = None
        self.modules[place] = record.where
        now = self.released[place] = self._clock()
        self.num_live -= 1
        if self.num_live == 0:
            self.ended_at = now
            self._ended(self)

    def as_step(self, next_begins: float) -> Step:
        """The step as the planner reads it; the next one begins at `next_begins`."""
        begin = self.saved[0]
        rows = zip(
            self.sizes, self.saved, self.needed, self.released, self.numbers, self.modules, self.aliases, strict=True
        )
        records = [Lifetime(n, s - begin, d - begin, r - begin, k, module, a) for n, s, d, r, k, module, a in rows]
        return Step(tuple(records), next_begins - begin, tuple((at - begin, nbytes) for at, nbytes in self.other))


class Pass:
    """Records of one forward pass by position, and the positions in the order backward first asked for them."""

    __slots__ = (
        "_finished",
        "cursor",
        "is_closed",
        "num_live",
        "number",
        "order",
        "places",
        "rank",
        "recording",
        "records",
        "sizes",
        "unpacked",
    )

    def __init__(self, finished: Callable[[Pass], None], recording: Recording) -> None:
        """An open pass; the first unpack closes it. `finished` is called when its last record is released."""
        self._finished = finished
        self.recording = recording
        self.number = recording.num_passes
        recording.num_passes += 1
        self.records: list[Record | None] = []
        self.places: list[int] = []  # in the recording
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
        self.recording.release(self.places[index])

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
