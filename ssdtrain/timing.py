"""One step by the clock of an accelerator: when it got to each save and each need, not when the host ahead of it did.

The host queues work and goes on, so its clock says little of a step. Moments are therefore marked in the streams and
read when the accelerator has passed them all; nobody waits for that.

[Note: time that counts]
As on the host, time in which the computation waited for bytes on their way back is taken out: what is left is compute
time, the clock of `planner.Step`. A wait is between two moments, before and after its stream was made to wait; it
includes the time in which the host itself waited for the drive and queued nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ssdtrain.device import Device, Moment


class DeviceTiming:
    """Moments of one step on one accelerator, by place. Guarded like the recording it belongs to."""

    def __init__(self, device: Device) -> None:
        """Nothing has happened."""
        self.device = device
        self._latest: dict[int, Moment] = {}  # by stream
        self._saved: list[Moment] = []
        self._needed: list[Moment | None] = []
        self._released: list[Moment | None] = []
        self._waits: list[tuple[Moment, Moment]] = []

    def mark(self) -> Moment:
        """The point that the current stream is at."""
        moment = self.device.moment()
        self._latest[moment.stream] = moment
        return moment

    def save(self) -> None:
        """The next place."""
        self._saved.append(self.mark())
        self._needed.append(None)
        self._released.append(None)

    def need(self, place: int, moment: Moment | None) -> None:
        """Backward asked for it: at `moment`, or now."""
        self._needed[place] = moment or self.mark()

    def release(self, place: int) -> None:
        """The graph let it go."""
        self._released[place] = self.mark()

    def note_wait(self, began: Moment) -> None:
        """From `began` until now the current stream waited for bytes, or the host did."""
        self._waits.append((began, self.mark()))

    @property
    def is_over(self) -> bool:
        """Whether the accelerator has passed everything that was marked."""
        return all([moment.is_reached for moment in self._latest.values()])

    def times(self, end: Moment) -> Times:
        """What was marked, in compute seconds since the first save; only when it is over. The step ended at `end`."""
        first = self._saved[0]
        waits = sorted([(began.seconds_since(first), ended.seconds_since(first)) for began, ended in self._waits])
        clock = _ComputeClock(waits)
        saved, needed, released = (
            [clock.at(moment.seconds_since(first)) if moment is not None else math.inf for moment in moments]
            for moments in (self._saved, self._needed, self._released)
        )
        needed = list(map(max, needed, saved))  # what several streams did in no order, the host did in this one
        last_uses = [at if at < math.inf else save for at, save in zip(needed, saved, strict=True)]
        released = list(map(max, released, last_uses))
        return Times(saved, needed, released, clock.at(end.seconds_since(first)), clock.waited)


class Times:
    """One step in compute seconds."""

    def __init__(
        self, saved: list[float], needed: list[float], released: list[float], seconds: float, waited: float
    ) -> None:
        self.saved, self.needed, self.released = saved, needed, released
        """By place; infinite for what did not happen."""
        self.seconds = seconds
        """Length of the step, without waits."""
        self.waited = waited
        """All waits together."""


class _ComputeClock:
    """Stands still during waits."""

    def __init__(self, waits: Sequence[tuple[float, float]]) -> None:
        """`waits`: begin and end, sorted by begin; those that overlap count once."""
        merged: list[tuple[float, float]] = []
        for began, ended in waits:
            start = max(began, merged[-1][1]) if merged else began
            if ended > start:
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
