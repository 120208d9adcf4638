"""What is worth its room in a record of bounded size. Decides by sizes and numbers only.

[Note: how a record stays within its limit]
Half of it is for the rows of steps. When half of that is used, four steps share a row, when half of the rest is used,
sixteen, and so on, up to one last row for all the rest: totals stay exact. A quarter is for timelines: of the first
steps, then of steps further and further apart, and of every step that is clearly worse than all before; none takes more
than a part of what is left. The rest is for the state: totals with reasons, and sums by module.
"""

from __future__ import annotations

from typing import Any

from ssdtrain.run_log.encode import merge

_NUM_FIRST = 6  # steps with a timeline
_SAMPLE_GROWTH = 1.5  # of the number of the next one
_WORSE = 1.2  # than the worst so far
_SHARE_OF_REST = 4
_THINNING = 4


class Rows:
    """Gathers rows that share one."""

    def __init__(self, limit_nbytes: int) -> None:
        """Rows may take so much room."""
        self._left = limit_nbytes
        self._next_thinning = limit_nbytes // 2
        self._num_together = 1
        self._pending: dict[str, Any] | None = None

    def add(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Takes the row of a step; a row to be written, or None while it gathers."""
        self._pending = row if self._pending is None else merge(self._pending, row)
        return self.flush() if self._pending["num_steps"] >= self._num_together else None

    def flush(self) -> dict[str, Any] | None:
        """What was gathered."""
        pending, self._pending = self._pending, None
        return {"kind": "step", **pending} if pending is not None else None

    def has_room(self, nbytes: int, *, is_last: bool) -> bool:
        """Whether a row of this size fits, and another one; then the room is taken."""
        if nbytes * (1 if is_last else 2) > self._left:
            return False
        self._left -= nbytes
        if self._left < self._next_thinning:
            self._next_thinning //= 2
            self._num_together *= _THINNING
        return True

    def keep(self, row: dict[str, Any]) -> None:
        """A row that found no room: it shares one with all that follow."""
        self._pending = row


class Timelines:
    """Decides which steps get a timeline."""

    def __init__(self, limit_nbytes: int) -> None:
        """Timelines may take so much room."""
        self._left = limit_nbytes
        self._next = _NUM_FIRST + 1
        self._worst = 0.0

    def why(self, number: int, seconds: float, stall_seconds: float) -> str:
        """Why this step should have one: ``"first"``, ``"sample"``, ``"worst"``; empty when it should not."""
        is_worse = seconds > _WORSE * self._worst and number > 2  # the very first steps are slow for other reasons
        if number > 2:
            self._worst = max(self._worst, seconds)
        if number <= _NUM_FIRST:
            return "first"
        if number >= self._next:
            self._next = int(number * _SAMPLE_GROWTH) + 1
            return "sample"
        return "worst" if is_worse else ""

    def has_room(self, nbytes: int) -> bool:
        """Whether a timeline of this size is not too much of what is left; then the room is taken."""
        if nbytes * _SHARE_OF_REST > self._left:
            return False
        self._left -= nbytes
        return True


class States:
    """Decides when the state is written: often at first, then less, and whenever there is a new fallback."""

    def __init__(self, limit_nbytes: int) -> None:
        """States may take so much room."""
        self._left = limit_nbytes
        self._next = 1
        self._num_fallbacks = 0

    def is_due(self, number: int, num_fallbacks: int) -> bool:
        """Whether the state should be written after this step."""
        is_due = number >= self._next or num_fallbacks != self._num_fallbacks
        self._num_fallbacks = num_fallbacks
        if number >= self._next:
            self._next = number + max(1, min(number, 50))
        return is_due

    def has_room(self, nbytes: int, *, is_last: bool) -> bool:
        """Whether a state of this size is not too much of what is left; then the room is taken."""
        if nbytes * (1 if is_last else _SHARE_OF_REST) > self._left:
            return False
        self._left -= nbytes
        return True
