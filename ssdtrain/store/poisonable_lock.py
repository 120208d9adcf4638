"""A lock that notices when a change under it was not finished.

Knows neither what it guards nor how that is put right. Used as two brackets, see [Note: two brackets]:

    with self.lock.mutex, self.lock:
        ...

[Note: unfinished changes]
Ctrl-C, or a signal handler of the user's that raises, may come between any two steps of Python code, also in the middle
of a change: an extent given back but still listed, a record counted but not filed. Going on from there would hand one
extent to two records, which is wrong bytes. So every change is bracketed. One that was left by an exception that is not
part of its own contract leaves the lock poisoned, and whoever takes it next has the owner reset: nothing that was noted
under the lock is believed any more. Memory that a thread of an engine may touch is held by the engine's owner before
the request is made, so that even then nothing is written to memory that was freed.

[Note: two brackets]
An interrupt may come when a Python function begins or has called another. A lock that is taken and given back by Python
functions could so be taken and never given back. The mutex's own brackets are no Python functions: it is taken and the
block entered, or neither.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import TracebackType

import torch


class ClosedError(RuntimeError):
    """The bytes are with an engine that is closed, given up, or another process's."""


class PoisonableLock:
    """A mutex, and the bracket of every change under it. Not reentrant."""

    __slots__ = ("_is_poisoned", "_on_reset", "mutex")

    def __init__(self, on_reset: Callable[[], None]) -> None:
        """Free. `on_reset`: a method that forgets what is noted under the lock, called under it.

        It may be called again when it is interrupted itself. Its object is not kept alive.
        """
        self.mutex = threading.Lock()
        self._on_reset = weakref.WeakMethod(on_reset)
        self._is_poisoned = False

    def renew(self) -> None:
        """This is a forked child: a thread that only the parent has may hold the inherited mutex."""
        self.mutex = threading.Lock()

    def __enter__(self) -> None:
        """Begins a change."""
        if self._is_poisoned:
            reset = self._on_reset()
            if reset is not None:
                reset()
        self._is_poisoned = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it."""
        if error is None or _is_own(error):
            self._is_poisoned = False


def _is_own(error: BaseException) -> bool:
    """Whether it was raised on purpose, with everything in order: a signal handler's own has no errno."""
    if isinstance(error, OSError):
        return error.errno is not None
    return isinstance(error, ClosedError | MemoryError | torch.OutOfMemoryError)
