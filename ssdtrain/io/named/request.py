"""A request to move bytes between memory and a file, as whoever made it sees it: a future.

Knows how a request ends. What it moves stays in memory until then, whether somebody keeps the request or not.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssdtrain.io.named.memory import Memory

logger = logging.getLogger("ssdtrain")


@dataclass(frozen=True)
class Task:
    """What a request is to do."""

    kind: str
    """``"read"`` or ``"write"``."""
    name: str
    """Of the file."""
    offset: int
    """Where in it."""
    nbytes: int
    """How many bytes, all of them."""

    def __str__(self) -> str:
        return f"to {self.kind} {self.nbytes} bytes at offset {self.offset}"


class Flight:
    """A task under way: keeps its memory where it is until it is done, and its error until somebody is told."""

    def __init__(self, handle: Any, memory: Memory, task: Task) -> None:
        """`handle`: the engine's."""
        self.handle, self.task = handle, task
        self._is_told = self._is_cancelled = False
        self._memory: Memory | None = memory

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is queued or under way; then its memory is let go."""
        if not self.handle.is_done:
            return False
        self._memory = None
        return True

    @property
    def number(self) -> int:
        """The errno it ended with; 0 for none."""
        error = self.handle.error
        return error[0] if error is not None else 0

    @property
    def has_news(self) -> bool:
        """Whether it failed, nobody was told, and nobody wanted that."""
        return bool(self.number) and not self._is_told and not (self._is_cancelled and self.number == errno.ECANCELED)

    def cancel(self) -> None:
        """What has not begun does not begin any more."""
        self._is_cancelled = True
        self.handle.cancel()

    def tell(self) -> OSError | None:
        """Why not every byte was moved; somebody knows from now on."""
        self._is_told = True
        error = self.handle.error
        if error is None:
            return None
        number, moved_nbytes, message = error
        return OSError(number, f"Expected {self.task}, got {moved_nbytes}: {message}", self.task.name)


class Request:
    """Bytes on their way. `FileEngine.synchronize` tells of an error that nobody is told of here; else it is logged."""

    def __init__(self, flight: Flight, watcher: Watcher) -> None:
        """`watcher` calls callbacks."""
        self.task = flight.task
        self._flight, self._watcher = flight, watcher

    def __repr__(self) -> str:
        task, state = self.task, "done" if self.done() else "under way"
        return f"<{task.kind} of {task.nbytes} bytes at offset {task.offset} of {task.name!r}: {state}>"

    def done(self) -> bool:
        """Whether nothing of it is queued or under way: its memory may be used again."""
        return self._flight.is_done

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Blocks until it is done, without the GIL; false when the time is over first. Raises no error of the drive."""
        self._flight.handle.wait(timeout_seconds)
        return self.done()

    def exception(self, timeout_seconds: float | None = None) -> OSError | None:
        """Waits; why not every byte was moved, None when all were.

        Raises:
            TimeoutError: it is not done in time.
        """
        if not self.wait(timeout_seconds):
            raise TimeoutError(errno.ETIMEDOUT, f"Expected {self.task} within {timeout_seconds} s", self.task.name)
        return self._flight.tell()

    def result(self, timeout_seconds: float | None = None) -> int:
        """Waits; the bytes that were moved, which are all.

        Raises:
            OSError: some were not: the message has the offset, what was expected and what came. EIO at the end of the
                file, ECANCELED for a request that was cancelled, or whose engine was closed.
            TimeoutError: it is not done in time.
        """
        error = self.exception(timeout_seconds)
        if error is not None:
            raise error
        return self.task.nbytes

    def cancel(self) -> bool:
        """What has not begun does not begin any more. False when it is done already; wait before using its memory."""
        if self.done():
            return False
        self._flight.cancel()
        return True

    def cancelled(self) -> bool:
        """Whether it ended because it was cancelled."""
        return self.done() and self._flight.number == errno.ECANCELED

    def add_done_callback(self, callback: Callable[[Request], object]) -> None:
        """Calls `callback(request)` once when it is done, in a thread of the engine's. Its errors are logged."""
        self._watcher.add(self, callback)


class Watcher:
    """Calls whoever wants to know that a request is done. Has a thread from the first callback on."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._waiting: list[tuple[Request, Callable[[Request], object]]] = []
        self._num_changes = 0
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def add(self, request: Request, callback: Callable[[Request], object]) -> None:
        """Calls `callback` when `request` is done."""
        with self._changed:
            self._waiting.append((request, callback))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ssdtrain-callbacks", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Once the engine is closed: the last callbacks are called, then the thread ends."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            num_events = self._engine.num_events
            with self._changed:
                due = [entry for entry in self._waiting if entry[0].done()]
                self._waiting = [entry for entry in self._waiting if entry not in due]
                if not due and not self._waiting:
                    if self._is_closing:
                        return
                    self._changed.wait()
                    continue
            if due:
                _call_all(due)
            else:
                self._engine.wait_event(num_events, None)


def _call_all(due: list[tuple[Request, Callable[[Request], object]]]) -> None:
    """Empties the list: a thread that waits keeps nothing of what it has called."""
    while due:
        request, callback = due.pop(0)
        _call(callback, request)


def _call(callback: Callable[[Request], object], request: Request) -> None:
    try:
        callback(request)
    except Exception:
        logger.exception("A callback of %r failed", request)
