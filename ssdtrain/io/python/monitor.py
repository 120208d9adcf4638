"""What an engine counts, and whether its drives answer. Knows requests only by their number."""

from __future__ import annotations

import threading
import time

from .spill_file import MAX_USERS

_SUSTAINED_SECONDS = 0.25
_PAUSE_SECONDS = 0.005  # more than it takes to go on


class Direction:
    """What one direction of the drive has done, and what of it in periods without a pause that were no mere burst."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._num_active = 0
        self._started = self._ended = 0.0
        self._period_nbytes, self._period_seconds = 0, 0.0
        self._busy_seconds = 0.0
        self._sustained = (0, 0.0)

    def begin(self) -> None:
        if self._num_active == 0:
            self._start()
        self._num_active += 1

    def _start(self) -> None:
        self._started = time.monotonic()
        if self._started - self._ended > _PAUSE_SECONDS:
            self._sustained = self.sustained
            self._period_nbytes, self._period_seconds = 0, 0.0

    def end(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self._period_nbytes += nbytes
        self._num_active -= 1
        if self._num_active == 0:
            self._ended = time.monotonic()
            self._busy_seconds += self._ended - self._started
            self._period_seconds += self._ended - self._started

    @property
    def busy_seconds(self) -> float:
        return self._busy_seconds + self._running_seconds()

    @property
    def sustained(self) -> tuple[int, float]:
        """Bytes and seconds."""
        nbytes, seconds = self._sustained
        period = self._period_seconds + self._running_seconds()
        return (nbytes, seconds) if period < _SUSTAINED_SECONDS else (nbytes + self._period_nbytes, seconds + period)

    def _running_seconds(self) -> float:
        return time.monotonic() - self._started if self._num_active else 0.0


class Traffic:
    """What the drive has done for all files, or for those of one user of an engine."""

    def __init__(self) -> None:
        self.written = Direction()
        self.read = Direction()


class Pulse:
    """Whether a drive answers: how long it has owed an answer and has said nothing at all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_asked = 0
        self._heard = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._num_asked == 0:
                self._heard = time.monotonic()
            self._num_asked += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_asked -= 1
            self._heard = time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """0 while it owes none."""
        with self._lock:
            return time.monotonic() - self._heard if self._num_asked else 0.0


class Monitor:
    """What an engine shares with its requests, which may outlive it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.is_closing = False
        self.num_pending = 0
        self.inflight_nbytes = 0
        self.num_awaited = 0  # reads not done that somebody waits for
        self.num_events = 0
        self.num_retries = 0
        self.num_write_errors = 0
        self.num_read_errors = 0
        self.rescued_nbytes = 0
        self.totals = Traffic()
        self.traffic = tuple(Traffic() for _ in range(MAX_USERS))  # by the user of a file

    def begin_close(self) -> None:
        """No request is begun any more."""
        self.is_closing = True

    def add_event(self) -> None:
        self.num_events += 1
        self.changed.notify_all()
