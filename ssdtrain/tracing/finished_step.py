"""Who is told when a step is over: the run record, the log, callbacks of the user.

Knows none of them and moves nothing. A step is told of when the next one begins, since it lasts until then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ssdtrain.stats import Counters, Stats, nbytes_text

if TYPE_CHECKING:
    from ssdtrain.planner import Plan, Step
    from ssdtrain.tracing.step_trace import StepTrace

logger = logging.getLogger("ssdtrain")

Callback = Callable[[int, Stats], None]
"""Is given the number of the step, counted from 1, and what was done so far."""


@dataclass(frozen=True)
class FinishedStep:
    """One step that is over."""

    trace: StepTrace
    """Whose step it is."""
    step: Step
    """Its records; seconds of computation, counted from its beginning."""
    began_at: float
    """When it began, by `time.monotonic()`."""
    seconds: float
    """From its beginning to that of the next, waits included."""
    stall_seconds: float
    """What of it was waiting."""
    peak_nbytes: int
    """Most bytes of saved tensors in memory at once: an accelerator's, or the host's with our own buffers."""
    plan: Plan | None
    """The plan it followed to its end."""
    totals: Counters
    """A snapshot of all counters, engine included."""


class Observer(Protocol):
    """Is told of every step."""

    def note_step(self, number: int, finished: FinishedStep) -> str:
        """Takes a step, the first of which has number 1. Returns what went wrong, to be noted once, or nothing."""


class StepLog:
    """A line on the logger ``ssdtrain`` every few steps."""

    def __init__(self, every: int) -> None:
        """`every`: how many steps a line is about."""
        self._every = every
        self._last = Stats.of(Counters())

    def note_step(self, number: int, finished: FinishedStep) -> str:
        """Logs the line when it is due."""
        if number % self._every == 0:
            now = Stats.of(finished.totals)
            logger.info("step %d, in %d steps: %s", number, self._every, progress_line(self._last, now))
            self._last = now
        return ""


class CallbackObserver:
    """A callback of the user's. One that raises is not called again: it must not disturb training."""

    def __init__(self, callback: Callback) -> None:
        """Calls it after every step."""
        self._callback: Callback | None = callback

    def note_step(self, number: int, finished: FinishedStep) -> str:
        """Calls the callback."""
        if self._callback is None:
            return ""
        try:
            self._callback(number, Stats.of(finished.totals))
        except Exception as error:  # the user's: whatever it raises
            self._callback = None
            return f"a step callback raised {type(error).__name__} and is not called any more: {error}"
        return ""


def progress_line(last: Stats, now: Stats) -> str:
    """What happened between two snapshots, and the peaks so far, in one line."""

    def since(name: str) -> str:
        return nbytes_text(getattr(now, name) - getattr(last, name))

    return (
        f"{since('offloaded_nbytes')} offloaded, {since('written_nbytes')} written, {since('read_nbytes')} read,"
        f" {since('kept_nbytes')} kept, {now.stall_seconds - last.stall_seconds:.3f} s stalled; peaks:"
        f" {nbytes_text(now.peak_memory_nbytes)} in memory (step {max(1, now.peak_memory_step)}),"
        f" {nbytes_text(now.peak_disk_nbytes)} on disk; {len(now.fallbacks)} fallbacks"
    )
