"""Notices when a change to shared state was not finished.

Knows neither what the state is nor how it is put right. Used together with the lock that guards the state:

    with self.lock, self.books:
        ...

[Note: torn books]
Ctrl-C, or a signal handler of the user's that raises, may come between any two steps of Python code, also in the middle
of a change: an extent given back but still listed, a record counted but not filed. Going on from there would hand one
extent to two records, which is wrong bytes. So every change is bracketed. One that was left by an exception that is not
part of its own contract leaves the books torn, and whoever opens them next has the owner start afresh: nothing that the
books said is believed any more. Memory that a thread of an engine may touch is held by the engine's owner before
the request is made, so that even then nothing is written to memory that was freed.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Protocol

import torch


class ClosedError(RuntimeError):
    """The bytes are with an engine that is closed, given up, or another process's."""


class Owner(Protocol):
    """Whose books they are."""

    def start_afresh(self) -> None:
        """Forgets what the books say; may be called again when it is interrupted itself."""


class Books:
    """One bracket for all changes under one lock. Not reentrant, as the lock is not."""

    __slots__ = ("_is_torn", "_owner")

    def __init__(self, owner: Owner) -> None:
        """Whole. Does not keep `owner` alive."""
        self._owner = weakref.ref(owner)
        self._is_torn = False

    def __enter__(self) -> None:
        """Begins a change."""
        if self._is_torn:
            owner = self._owner()
            if owner is not None:
                owner.start_afresh()
        self._is_torn = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it."""
        if error is None or _is_own(error):
            self._is_torn = False


def _is_own(error: BaseException) -> bool:
    """Whether it was raised on purpose, with everything in order: a signal handler's own has no errno."""
    if isinstance(error, OSError):
        return error.errno is not None
    return isinstance(error, ClosedError | MemoryError | torch.OutOfMemoryError)
