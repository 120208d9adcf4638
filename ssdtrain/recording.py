"""One step as it happens: what was saved when, how large, when backward needed it, when the graph let it go.

A step is all passes alive together, from the first save to the moment when nothing is alive: with gradient accumulation
one micro-batch, in a pipeline all micro-batches that overlap. No optimizer has to be known for it. It costs a clock
reading per event and stays on; finished, it becomes the `Step` that the planner reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ssdtrain.planner import Lifetime, Step

if TYPE_CHECKING:
    from ssdtrain.record import Record

_MAX_RECORDS = 50_000  # a step that never ends, because something is alive all the time, is not recorded any further
_UNRECORDED = -1


class Surroundings(Protocol):
    """What a recording asks of the world."""

    resident_nbytes: int
    """Saved tensors in memory that no record stands for."""

    def compute_seconds(self) -> float:
        """A clock that stands still while the training thread waits for a drive."""


class StepRecording:
    """One step. Records have a *place*: their number among all saves of the step. Guarded by the store's lock."""

    def __init__(self, surroundings: Surroundings, ended: Callable[[StepRecording], None]) -> None:
        """An empty step. `ended` is called when its last record is released."""
        self._surroundings, self._ended = surroundings, ended
        self._num_live = self._num_passes = 0
        self.records: list[Record | None] = []
        self.shape: list[tuple[int, int]] = []
        """By place: size, and number of the pass."""
        self._saved: list[float] = []
        self._needed: list[float] = []
        self._released: list[float] = []
        self._modules: list[str] = []
        self._aliases: list[int] = []
        self._other: list[tuple[float, int]] = []
        self.is_over = False
        self.is_abandoned = False
        """Whether an interrupt left it in the middle of a change."""
        self.is_wall_time = True
        """Whether its times are those of the computation: a host that runs ahead of an accelerator knows none."""

    @property
    def began_at(self) -> float:
        """When the first record was saved."""
        return self._saved[0]

    @property
    def ended_at(self) -> float:
        """When the last of its records was released."""
        return max([at for at in self._released if at < math.inf], default=self.began_at)

    @property
    def is_complete(self) -> bool:
        """Whether it can be planned: backward used it, and everything was seen."""
        return self.is_wall_time and len(self.records) < _MAX_RECORDS and any(at < math.inf for at in self._needed)

    def begin_pass(self) -> int:
        """The number of another pass, which is its micro-batch."""
        self._num_passes += 1
        return self._num_passes - 1

    def save(self, record: Record, number: int) -> int:
        """Notes a new record of pass `number`; its place."""
        self._num_live += 1
        if len(self.records) >= _MAX_RECORDS:
            return _UNRECORDED
        now, other_nbytes = self._surroundings.compute_seconds(), self._surroundings.resident_nbytes
        self.records.append(record)
        self.shape.append((record.nbytes, number))
        self._saved.append(now)
        self._needed.append(math.inf)
        self._released.append(math.inf)
        self._modules.append("")
        self._aliases.append(1)
        if not self._other or self._other[-1][1] != other_nbytes:
            self._other.append((now, other_nbytes))
        if record.device.driver is not None:
            self.is_wall_time = False
        return len(self.records) - 1

    def need(self, place: int, num_aliases: int) -> None:
        """Notes that backward asks for a record; the first time counts."""
        if place != _UNRECORDED and self._needed[place] == math.inf:
            self._needed[place] = self._surroundings.compute_seconds()
            self._aliases[place] = num_aliases

    def release(self, place: int) -> None:
        """Notes that the graph let a record go."""
        if place != _UNRECORDED:
            record = self.records[place]
            assert record is not None
            self.records[place] = None
            self._modules[place] = record.where.removeprefix(" of ")
            self._released[place] = self._surroundings.compute_seconds()
        self._num_live -= 1
        if self._num_live == 0:
            self.is_over = True
            self._ended(self)

    def as_step(self, next_began_at: float) -> Step:
        """The step as the planner reads it; the next one began at `next_began_at`."""
        begin = self.began_at
        rows = zip(self.shape, self._saved, self._needed, self._released, self._modules, self._aliases, strict=True)
        records = [
            Lifetime(nbytes, saved - begin, needed - begin, released - begin, number, module, aliases)
            for (nbytes, number), saved, needed, released, module, aliases in rows
        ]
        return Step(tuple(records), next_began_at - begin, tuple((at - begin, nbytes) for at, nbytes in self._other))
