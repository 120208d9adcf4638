"""How fast the tiers are, averaged over steps.

[Note: bursts]
A drive's cache, or the credit of a rate limiter, takes a few megabytes at once much faster than the next ones. What the
drive did while it was busy therefore says too much of it when it was busy for moments only; a quarter of a second
without a pause says what it can keep up, where a quarter of the traffic is in such periods: one alone may be a moment
in which this process got no processor. The slower of both is counted on. A plan that leaves pauses teaches nothing of
the second kind, so it is forgotten after 32 steps without, then 64, and at last every 1024: it may have recovered.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssdtrain.planner import SECONDS_PER_DAY
from ssdtrain.stats import Counters

DRIFT = 0.25
"""What has changed by less has not changed."""

FIRST_PATIENCE, MAX_PATIENCE = 32, 1024
"""Steps until what was not measured again is asked for: at first, and after it was found unchanged again and again."""

_LEAST_NBYTES = 1 << 20  # of traffic that says something about a drive
_LEAST_SUSTAINED_SHARE = 0.25  # of the traffic; see [Note: bursts]
_NEW_SHARE = 0.5  # of the latest step in the averages
_OLD_SHARE = 0.99  # what a step leaves of the sums before it

Speeds = tuple[float, float, float, float]
"""Bytes per second written to the drive, read from it, copied to the host tier and back; 0.0 where nothing is known."""


def differs(now: float, then: float) -> bool:
    """Whether a quantity has drifted."""
    return abs(now - then) > DRIFT * then


class Rate:
    """Bytes per second, averaged over steps."""

    def __init__(self) -> None:
        self.average = 0.0
        self.nbytes, self.seconds = 0, 0.0  # totals at the latest note that taught something

    def note(self, nbytes: int, seconds: float) -> bool:
        """Takes running totals of traffic and time; whether there was enough of both to learn from."""
        new_nbytes, new_seconds = nbytes - self.nbytes, seconds - self.seconds
        if new_nbytes < _LEAST_NBYTES or new_seconds <= 0:
            return False
        self.nbytes, self.seconds = nbytes, seconds
        rate = new_nbytes / new_seconds
        self.average = rate if not self.average else self.average + _NEW_SHARE * (rate - self.average)
        return True

    def skip(self, nbytes: int, seconds: float) -> None:
        """Takes running totals and learns nothing of what is new in them."""
        self.nbytes, self.seconds = nbytes, seconds


class Bandwidth:
    """One direction of a drive. See [Note: bursts]."""

    def __init__(self) -> None:
        self._burst, self._sustained = Rate(), Rate()
        self._last_sustained = 0.0
        self._num_since, self._patience = 0, FIRST_PATIENCE  # steps without a long period; until it is forgotten

    @property
    def average(self) -> float:
        """Bytes per second to count on; 0.0 while nothing is known."""
        known = [rate.average for rate in (self._burst, self._sustained) if rate.average]
        return min(known, default=0.0)

    def note(
        self, nbytes: int, seconds: float, sustained_nbytes: int, sustained_seconds: float, num_steps: int = 1
    ) -> None:
        """Takes running totals of traffic and busy time, and of long busy periods, after so many steps."""
        least = _LEAST_SUSTAINED_SHARE * (nbytes - self._burst.nbytes)
        if self._burst.note(nbytes, seconds) and sustained_nbytes - self._sustained.nbytes < least:
            self._sustained.skip(sustained_nbytes, sustained_seconds)
        if self._sustained.note(sustained_nbytes, sustained_seconds):
            self._num_since = 0
            if differs(self._sustained.average, self._last_sustained):
                self._patience = FIRST_PATIENCE
            self._last_sustained = self._sustained.average
            return
        self._num_since += num_steps
        if self._num_since >= self._patience:
            self._num_since, self._patience = 0, min(MAX_PATIENCE, 2 * self._patience)
            self._sustained.average = 0.0


class Others:
    """What is written to the same drive for parameters and optimizer state, averaged over the last hundred steps or so.

    An optimizer writes once for several micro-batches, and not while a context is active: so all bytes are set against
    all time.
    """

    def __init__(self, now: float) -> None:
        self._nbytes, self._moment = 0, now
        self._sum_nbytes = self._sum_seconds = 0.0

    @property
    def daily_nbytes(self) -> float:
        """Written per day."""
        return self._sum_nbytes / self._sum_seconds * SECONDS_PER_DAY if self._sum_seconds > 0 else 0.0

    def note(self, nbytes: int, now: float) -> None:
        """Takes the running total, after a step."""
        self._sum_nbytes = _OLD_SHARE * self._sum_nbytes + nbytes - self._nbytes
        self._sum_seconds = _OLD_SHARE * self._sum_seconds + now - self._moment
        self._nbytes, self._moment = nbytes, now


class Meter:
    """All tiers of one offload context."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._write, self._read = Bandwidth(), Bandwidth()
        self._out, self._in = Rate(), Rate()

    def note(self, totals: Counters, num_steps: int = 1) -> Speeds:
        """Takes what was done until the end of so many steps. Where one direction is known, the other is as fast."""
        self._write.note(
            totals.written_nbytes,
            totals.write_busy_seconds,
            totals.sustained_written_nbytes,
            totals.sustained_write_seconds,
            num_steps,
        )
        self._read.note(
            totals.read_nbytes,
            totals.read_busy_seconds,
            totals.sustained_read_nbytes,
            totals.sustained_read_seconds,
            num_steps,
        )
        self._out.note(totals.copied_out_nbytes, totals.copy_out_seconds)
        self._in.note(totals.copied_in_nbytes, totals.copy_in_seconds)
        write, copy_out = self._write.average, self._out.average
        return write, self._read.average or write, copy_out, self._in.average or copy_out


def lowest(speeds: Sequence[Speeds]) -> Speeds:
    """Of each the lowest that is known."""
    write, read, copy_out, copy_in = (
        min([s for s in column if s], default=0.0) for column in zip(*speeds, strict=True)
    )
    return write, read, copy_out, copy_in
