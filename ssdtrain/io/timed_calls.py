"""Calls that a drive may never answer, each in a thread of its own, and nobody waits longer than allowed.

Knows neither files nor directories. Opening, growing, shortening and closing a file are single system calls that
nothing can cancel: whoever made one waits for as long as the drive does.

    timed = TimedCall(lambda: SpillFile(directory), undo=SpillFile.close)
    file = timed.take() if timed.wait(60.0) else timed.abandon()

[Note: what comes late]
The thread of a call that nobody waits for any more stays until the drive answers, and then undoes what it did. It never
keeps the process from ending.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class TimedCall(Generic[T]):
    """One call under way."""

    def __init__(self, call: Callable[[], T], undo: Callable[[T], object] | None = None) -> None:
        """Begins `call()`. `undo` gets what it returns after `abandon`, in its own thread."""
        self._call: Callable[[], T] | None = call
        self._undo = undo
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._is_abandoned = False
        self._results: list[T] = []
        self._error: BaseException | None = None
        if sys.is_finalizing():  # no thread starts any more, and the end of the process undoes everything
            self._error = RuntimeError("Expected a running interpreter, got one that is shutting down")
            self._ended.set()
            return
        try:
            threading.Thread(target=self._run, name="ssdtrain-timed-call", daemon=True).start()
        except RuntimeError:  # no thread to be had: it is the caller's own
            self._run()

    def wait(self, seconds: float) -> bool:
        """Whether the call is over, after at most `seconds`."""
        if sys.is_finalizing():  # its thread never runs again
            return self._ended.is_set()
        return self._ended.wait(max(0.0, seconds))

    def take(self) -> T:
        """What an ended call returned, or raises what it raised."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._results.pop()

    def abandon(self) -> None:
        """Says that nobody waits for the call any more. See [Note: what comes late]."""
        with self._lock:
            self._is_abandoned = True
            is_over = self._ended.is_set()
        if is_over:
            self._clean_up()

    def _run(self) -> None:
        assert self._call is not None
        try:
            self._results.append(self._call())
        except BaseException as error:  # whoever takes the result raises it
            self._error = error
        self._call = None
        with self._lock:
            self._ended.set()
            is_abandoned = self._is_abandoned
        if is_abandoned:
            self._clean_up()

    def _clean_up(self) -> None:
        if self._undo is not None and self._results:
            TimedCall(lambda: self._undo(self._results.pop()))  # type: ignore[misc]  # which may get no answer either


def run(
    call: Callable[[], T], seconds: float, directory: str, what: str, undo: Callable[[T], object] | None = None
) -> T:
    """What `call()` returns.

    Args:
        call: system calls on a file in `directory`.
        seconds: how long to wait for it.
        directory: the `filename` of the error.
        what: what is expected, such as ``"a spill file"``.
        undo: gets what comes later.

    Raises:
        TimeoutError: there was no answer (ETIMEDOUT).
    """
    timed = TimedCall(call, undo)
    try:
        if timed.wait(seconds):
            return timed.take()
    except BaseException:  # Ctrl-C too: nobody waits any more
        timed.abandon()
        raise
    timed.abandon()
    raise no_answer(what, seconds, directory)


def run_all(calls: Sequence[Callable[[], T]], seconds: float) -> list[TimedCall[T]]:
    """All of `calls` at once, when they are over or the time is; those that are not are told by `wait(0)`."""
    deadline = time.monotonic() + seconds
    timed_calls = [TimedCall(call) for call in calls]
    for timed in timed_calls:
        timed.wait(deadline - time.monotonic())
    return timed_calls


def no_answer(what: str, seconds: float, directory: str) -> OSError:
    """The error of a directory whose drive does not answer."""
    text = f"Expected {what}, got no answer from the drive for {seconds:g} s: look after it, or pass another directory"
    return OSError(errno.ETIMEDOUT, text, directory)
