"""One step as it happens: what was saved when, how large, when backward needed it, when the graph let it go.

A step is all passes alive together, from the first save to the moment when nothing is alive: with gradient accumulation
one micro-batch, in a pipeline all micro-batches that overlap. No optimizer has to be known for it. It costs a clock
reading per event and stays on; finished, it becomes the `Step` that the planner reads. The host's clock says little of
a step on an accelerator, which therefore has its own: see `device_trace`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

from ssdtrain.planner import Lifetime, Step
from ssdtrain.tracing.device_trace import DeviceTrace, Times

if TYPE_CHECKING:
    from ssdtrain.devices.base import Accelerator, Device, TimedEvent

_MAX_RECORDS = 50_000  # a step that never ends, because something is alive all the time, is not recorded any further
_UNRECORDED = -1


class Traced(Protocol):
    """What a trace asks of a record: no more, so that whoever traces need not know how bytes are moved."""

    @property
    def nbytes(self) -> int:
        """The size of the record."""

    @property
    def device(self) -> Device:
        """Whose memory its bytes are from."""

    @property
    def where(self) -> str:
        """`` of ``, and the module that saved it; or nothing."""


class StepClock(Protocol):
    """What a trace asks of the world."""

    resident_nbytes: int
    """Saved tensors in memory that no record stands for."""

    def compute_seconds(self) -> float:
        """A clock that stands still while the training thread waits for a drive."""

    def end_step(self) -> None:
        """A step is over."""


class StepTrace:
    """One step. Records have a *position*: their number among all saves of the step. Guarded by the store's lock."""

    def __init__(self, clock: StepClock, ended: Callable[[StepTrace], None], *, is_timed: bool = True) -> None:
        """An empty step. `ended` is called when its last record is released.

        `is_timed`: an accelerator is to say when it got where, too.
        """
        self._clock, self._ended, self._is_timed = clock, ended, is_timed
        self._device: Device | None = None  # of the records; None: the host's, or several
        self.timing: DeviceTrace | None = None
        """What an accelerator says, if it was asked."""
        self.is_mixed = False
        """Whether records are of several devices, which have no common clock."""
        self._num_live = self._num_passes = 0
        self.records: list[Traced | None] = []
        self.shape: list[tuple[int, int]] = []
        """By position: size, and number of the pass."""
        self._saved: list[float] = []
        self._needed: list[float] = []
        self._released: list[float] = []
        self._modules: list[str] = []
        self._aliases: list[int] = []
        self._other: list[tuple[float, int, int]] = []  # when, after which save, how many bytes
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
        """Whether it can be planned: backward used it, everything was seen, and by one clock."""
        has_clock = self.is_wall_time or self._device is not None
        return has_clock and len(self.records) < _MAX_RECORDS and any(at < math.inf for at in self._needed)

    def begin_pass(self) -> int:
        """The number of another pass, which is its micro-batch."""
        self._num_passes += 1
        return self._num_passes - 1

    def save(self, record: Traced, number: int) -> int:
        """Notes a new record of pass `number`; its position."""
        self._num_live += 1
        if len(self.records) >= _MAX_RECORDS:
            self.timing = None
            return _UNRECORDED
        now, other_nbytes = self._clock.compute_seconds(), self._clock.resident_nbytes
        self.records.append(record)
        self.shape.append((record.nbytes, number))
        self._saved.append(now)
        self._needed.append(math.inf)
        self._released.append(math.inf)
        self._modules.append("")
        self._aliases.append(1)
        position = len(self.records) - 1
        if not self._other or self._other[-1][2] != other_nbytes:
            self._other.append((now, position, other_nbytes))
        if record.device.driver is not None or not self.is_wall_time:
            self._save_on_device(record.device, position)
        return position

    def _save_on_device(self, device: Device, position: int) -> None:
        if position == 0:
            self.is_wall_time, self._device = False, device
            self.timing = DeviceTrace(cast("Accelerator", device)) if self._is_timed else None
        elif device is not self._device:
            self.is_wall_time, self._device, self.timing, self.is_mixed = False, None, None, True
        timing = self._timing_now()
        if timing is not None:
            timing.save()

    def _timing_now(self) -> DeviceTrace | None:
        """None while nothing is timed, and from where the accelerator must not be asked, as in a graph capture."""
        timing = self.timing
        if timing is not None and timing.device.why_not() is not None:
            timing = self.timing = None
        return timing

    def mark(self) -> TimedEvent | None:
        """An event before a wait of an accelerator, if the step is timed."""
        timing = self._timing_now()
        return timing.mark() if timing is not None else None

    def note_wait(self, began: TimedEvent, *, is_for_reload: bool) -> None:
        """Notes a wait of an accelerator that `began` and has ended, or is queued."""
        timing = self._timing_now()
        if timing is not None:
            timing.note_wait(began, is_for_reload=is_for_reload)

    def need(self, position: int, num_aliases: int, event: TimedEvent | None = None) -> None:
        """Notes that backward asks for a record; the first time counts. `event`: when an accelerator does."""
        if position != _UNRECORDED and self._needed[position] == math.inf:
            self._needed[position] = self._clock.compute_seconds()
            self._aliases[position] = num_aliases
            timing = self._timing_now() if self.timing is not None else None
            if timing is not None:
                timing.need(position, event)

    def release(self, position: int) -> None:
        """Notes that the graph let a record go."""
        if position != _UNRECORDED:
            record = self.records[position]
            assert record is not None
            self.records[position] = None
            self._modules[position] = record.where.removeprefix(" of ")
            self._released[position] = self._clock.compute_seconds()
            timing = self._timing_now() if self.timing is not None else None
            if timing is not None:
                timing.release(position)
        self._num_live -= 1
        if self._num_live == 0:
            self.is_over = True
            self._ended(self)

    def abandon(self) -> None:
        """An interrupt left it in the middle of a change: nothing that it says can be relied on."""
        self.is_abandoned = True

    def forget_timing(self) -> None:
        """No accelerator is asked for times any more."""
        self.timing = None

    def as_step(self, next_began_at: float) -> Step:
        """The step as the planner reads it; the next one began at `next_began_at`."""
        begin = self.began_at
        saved, needed, released = (
            [at - begin for at in times] for times in (self._saved, self._needed, self._released)
        )
        other = [(at - begin, nbytes) for at, _, nbytes in self._other]
        return Step(self._lifetimes(saved, needed, released), next_began_at - begin, tuple(other))

    def as_device_step(self, times: Times) -> Step:
        """The same by the clock of the accelerator."""
        other = [(times.saved[position], nbytes) for _, position, nbytes in self._other]
        return Step(self._lifetimes(times.saved, times.needed, times.released), times.seconds, tuple(other))

    def _lifetimes(self, saved: list[float], needed: list[float], released: list[float]) -> tuple[Lifetime, ...]:
        rows = zip(self.shape, saved, needed, released, self._modules, self._aliases, strict=True)
        return tuple([Lifetime(row[0][0], row[1], row[2], row[3], row[0][1], row[4], row[5]) for row in rows])
