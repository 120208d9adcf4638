"""One step by the clock of an accelerator: when it got to each save and each need, not when the host ahead of it did.

The host queues work and goes on, so its clock says little of a step. Moments are therefore marked in the streams and
read when the accelerator has passed them all; nobody waits for that.

[Note: time that counts]
As on the host, time in which the computation waited is taken out: what is left is compute time, the clock of
`planner.Step`. A wait is between two events, before and after its stream was made to wait: for bytes on their way
back, which includes the time in which the host itself waited for the drive and queued nothing, or for copies out of
memory that later work gets. What is shorter than `_INSTANT` is no wait: two marks have a distance of their own.

[Note: several streams]
Moments of one stream come in the order they were marked, those of several need not: what the host did later may have
been over earlier. Saves are in the host's order, a need is not before its save, a release not before its last use, and
the step ends with the last thing that was marked.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ssdtrain.devices.base import Accelerator, TimedEvent

_INSTANT = 2e-5  # seconds


class DeviceTrace:
    """Moments of one step on one accelerator, by position.

    Threads may mark at once; those that use one stream may make `is_over` say yes too early, and `times` raise.
    """

    def __init__(self, device: Accelerator) -> None:
        """Nothing has happened."""
        self.device = device
        self._latest: dict[int, TimedEvent] = {}  # by stream
        self._saved: list[TimedEvent] = []
        self._needed: list[TimedEvent | None] = []
        self._released: list[TimedEvent | None] = []
        self._waits: list[tuple[TimedEvent, TimedEvent]] = []
        self._reload_waits: list[tuple[TimedEvent, TimedEvent]] = []

    def mark(self) -> TimedEvent:
        """The point that the current stream is at."""
        event = self.device.timed_event()
        self._latest[event.stream] = event
        return event

    def save(self) -> None:
        """Marks the event at which the next record of the step is saved."""
        self._saved.append(self.mark())
        self._needed.append(None)
        self._released.append(None)

    def need(self, position: int, event: TimedEvent | None) -> None:
        """Backward asked for it: at `event`, or now."""
        self._needed[position] = event or self.mark()

    def release(self, position: int) -> None:
        """Marks the event at which the graph released a record."""
        self._released[position] = self.mark()

    def note_wait(self, began: TimedEvent, *, is_for_reload: bool) -> None:
        """From `began` until now the current stream waited for copies, or the host for bytes on their way back."""
        (self._reload_waits if is_for_reload else self._waits).append((began, self.mark()))

    @property
    def is_over(self) -> bool:
        """Whether the accelerator has passed everything that was marked."""
        return all([event.is_reached for event in self._latest.values()])

    def times(self, end: TimedEvent) -> Times:
        """What was marked, in compute seconds since the first save; only when it is over. The step ended at `end`.

        Raises:
            RuntimeError: the accelerator does not know the time of an event.
        """
        first = self._saved[0]
        reloads, others = (
            [(began.seconds_since(first), ended.seconds_since(first)) for began, ended in waits]
            for waits in (self._reload_waits, self._waits)
        )
        clock = _ComputeClock(reloads + others)
        saved, needed, released = (
            [clock.at(event.seconds_since(first)) if event is not None else math.inf for event in events]
            for events in (self._saved, self._needed, self._released)
        )
        saved = list(accumulate(saved, max))  # see [Note: several streams]
        needed = list(map(max, needed, saved))
        last_uses = [at if at < math.inf else save for at, save in zip(needed, saved, strict=True)]
        released = list(map(max, released, last_uses))
        latest = max([at for at in released if at < math.inf], default=saved[-1])
        seconds = max(latest, clock.at(end.seconds_since(first)))
        return Times(saved, needed, released, seconds, clock.waited, _ComputeClock(reloads).waited)


class Times:
    """One step in compute seconds."""

    def __init__(
        self,
        saved: list[float],
        needed: list[float],
        released: list[float],
        seconds: float,
        waited: float,
        waited_for_reloads: float,
    ) -> None:
        self.saved, self.needed, self.released = saved, needed, released
        """By position; infinite for what did not happen."""
        self.seconds = seconds
        """Length of the step, without waits."""
        self.waited = waited
        """All waits together."""
        self.waited_for_reloads = waited_for_reloads
        """Those for bytes on their way back."""


class _ComputeClock:
    """Stands still during waits."""

    def __init__(self, waits: Sequence[tuple[float, float]]) -> None:
        """`waits`: begin and end; those that overlap count once."""
        merged: list[tuple[float, float]] = []
        for began, ended in sorted(waits):
            start = max(began, merged[-1][1]) if merged else began
            if ended - start > _INSTANT:
                merged.append((start, ended))
        self._waits = merged
        self._begins = [began for began, _ in merged]
        self._before = [0.0, *accumulate([ended - began for began, ended in merged])]
        self.waited = self._before[-1]

    def at(self, seconds: float) -> float:
        """Compute time at a device time."""
        num = bisect_right(self._begins, seconds)
        if num == 0:
            return seconds
        began, ended = self._waits[num - 1]
        return seconds - self._before[num - 1] - (min(seconds, ended) - began)
