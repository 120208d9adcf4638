"""Spill files between one engine and the next: open, so that a drive need not be asked for them, and empty.

Knows files and directories, no engines. A context that is entered in every step opens its files once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

from ssdtrain.io.engine import SpillFile
from ssdtrain.io.timed_calls import TimedCall, run_all


class KeptFiles:
    """Files that no engine uses now. Thread-safe."""

    def __init__(self, timeout_seconds: float) -> None:
        """Has none. `timeout_seconds`: how long a drive is waited for."""
        self.kind = ""
        """The engine they are for."""
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()  # of whoever waits for them
        self._emptying: deque[tuple[SpillFile, TimedCall[None]]] = deque()
        self._empty: list[SpillFile] = []

    def keep(self, kind: str, files: Sequence[SpillFile]) -> None:
        """Begins to give the room of `files` back. Waits for nothing."""
        self.kind = kind
        for file in files:
            self._emptying.append((file, TimedCall(file.shrink_to_nothing, partial(_close, file))))

    def settle(self) -> list[tuple[str, str]]:
        """Waits until their room is given back; directories whose drive does not answer or refuses, and what happened.

        The file of such a directory is closed when that can be done.
        """
        lost: list[tuple[str, str]] = []
        with self._lock:
            deadline = time.monotonic() + self._timeout_seconds
            while self._emptying:
                file, timed = self._emptying.popleft()
                if not timed.wait(deadline - time.monotonic()):
                    timed.abandon()
                    lost.append((file.directory, f"it did not shorten a file within {self._timeout_seconds:g} s"))
                    continue
                try:
                    timed.take()
                except OSError as error:
                    lost.append((file.directory, f"it could not shorten a file: {error.strerror}"))
                    TimedCall(file.close)
                else:
                    self._empty.append(file)
        return lost

    def take(self) -> list[SpillFile]:
        """Hands over those that are empty."""
        files, self._empty = self._empty, []
        return files

    def close(self) -> None:
        """Closes them; at most until the time is over."""
        self.settle()
        run_all([file.close for file in self.take()], self._timeout_seconds)


def _close(file: SpillFile, result: None) -> None:
    file.close()
