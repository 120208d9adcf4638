"""Who touched which bytes last, and whether anything says that it was before.

Vector clocks: every stream has one and the host has one for all of its threads (what threads agree on among themselves
is not seen here, so they count as one: an order missing between two host threads is not found, and none is invented).
A recorded event carries a copy of its stream's clock; whoever waits for it takes that copy in. An access is ordered
after an earlier one when its clock has reached the earlier one's tick. All of this is known when work is queued: the
verdict does not depend on when the work runs.

It knows no tensors. The caller holds the machine's lock.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

HOST = -1  # the actor that stands for all host threads
Clock = dict[int, int]

_NOT_THE_CALLER = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class UnorderedAccessError(RuntimeError):
    """Two operations touch the same bytes, one of them writes, and nothing orders them."""


class Span(NamedTuple):
    """A range of bytes."""

    address: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.nbytes} bytes at {self.address:#x}"


class Line(NamedTuple):
    """A line of the program; none: an engine's thread is not in one."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.number}" if self.file else "an engine thread"


class Operation(NamedTuple):
    """Something queued on a stream, or done by the host, that touches memory."""

    name: str
    actor: int
    tick: int
    where: Line

    def __str__(self) -> str:
        place = "the host" if self.actor == HOST else f"stream {self.actor}"
        return f"`{self.name}` on {place}, queued at {self.where}"


@dataclass
class _Mark:
    """Who touched the bytes from where it begins to `end` last."""

    end: int
    writer: Operation | None = None
    readers: dict[int, Operation] = field(default_factory=dict)

    def copy(self) -> _Mark:
        return _Mark(self.end, self.writer, dict(self.readers))


class History:
    """The last accesses to all memory, as disjoint ranges."""

    def __init__(self) -> None:
        """Knows nothing of any byte yet."""
        self._starts: list[int] = []
        self._marks: list[_Mark] = []

    def rivals(self, span: Span, is_write: bool) -> list[tuple[Operation, bool]]:
        """Earlier operations which an access to `span` must come after, and whether they wrote."""
        found: list[tuple[Operation, bool]] = []
        for mark in self._marks[slice(*self._overlapping(span))]:
            if mark.writer is not None:
                found.append((mark.writer, True))
            if is_write:
                found.extend((reader, False) for reader in mark.readers.values())
        return found

    def note(self, operation: Operation, span: Span, is_write: bool) -> None:
        """`operation` is the latest that touched `span`."""
        first, last = self._carve(span)
        if is_write:
            self._starts[first:last] = [span.address]
            self._marks[first:last] = [_Mark(span.address + span.nbytes, operation)]
            return
        self._fill_gaps(span, first, last)
        for mark in self._marks[slice(*self._overlapping(span))]:
            mark.readers[operation.actor] = operation

    def forget(self, span: Span) -> None:
        """Forgets who touched these bytes: they are other memory from here on."""
        first, last = self._carve(span)
        del self._starts[first:last], self._marks[first:last]

    def _overlapping(self, span: Span) -> tuple[int, int]:
        first = bisect_right(self._starts, span.address)
        if first and self._marks[first - 1].end > span.address:
            first -= 1
        last = first
        while last < len(self._starts) and self._starts[last] < span.address + span.nbytes:
            last += 1
        return first, last

    def _carve(self, span: Span) -> tuple[int, int]:
        """Cuts marks at both ends of `span`; those inside it are at the returned places."""
        for at in (span.address, span.address + span.nbytes):
            index = bisect_right(self._starts, at) - 1
            if index >= 0 and self._starts[index] < at < self._marks[index].end:
                tail = self._marks[index].copy()
                self._marks[index].end = at
                self._starts.insert(index + 1, at)
                self._marks.insert(index + 1, tail)
        return self._overlapping(span)

    def _fill_gaps(self, span: Span, first: int, last: int) -> None:
        at, gaps = span.address, []
        for start, mark in zip(self._starts[first:last], self._marks[first:last], strict=True):
            if at < start:
                gaps.append((at, start))
            at = mark.end
        if at < span.address + span.nbytes:
            gaps.append((at, span.address + span.nbytes))
        for start, end in gaps:
            index = bisect_right(self._starts, start)
            self._starts.insert(index, start)
            self._marks.insert(index, _Mark(end))


class Order:
    """The clocks of all streams and of the host, and the check."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.history = History()
        self._host: Clock = {HOST: 0}
        self._clocks: dict[int, Clock] = {}

    def clock(self, stream: int) -> Clock:
        """A copy of what is before the next operation on `stream`: an event's payload."""
        return dict(self._clocks.get(stream, {}))

    def wait(self, stream: int, clock: Clock) -> None:
        """Whatever is queued on `stream` from here on is after `clock`."""
        _join(self._clocks.setdefault(stream, {}), clock)

    def arrive(self, clock: Clock) -> None:
        """The host has seen that `clock` is past."""
        _join(self._host, clock)

    def touch(
        self, actor: int, name: str, reads: tuple[Span, ...], writes: tuple[Span, ...]
    ) -> UnorderedAccessError | None:
        """An operation of `actor` (a stream or `HOST`) is queued; the conflict it makes, if it does."""
        clock = self._host
        if actor != HOST:
            clock = self._clocks.setdefault(actor, {})
            _join(clock, self._host)
        clock[actor] = clock.get(actor, 0) + 1
        operation = Operation(name, actor, clock[actor], caller())
        accesses = [(span, False) for span in reads if span.nbytes] + [(span, True) for span in writes if span.nbytes]
        error = self._conflict(operation, clock, accesses)
        for span, is_write in accesses:
            self.history.note(operation, span, is_write)
        return error

    def _conflict(
        self, operation: Operation, clock: Clock, accesses: list[tuple[Span, bool]]
    ) -> UnorderedAccessError | None:
        for span, is_write in accesses:
            for rival, has_written in self.history.rivals(span, is_write):
                if clock.get(rival.actor, 0) < rival.tick:
                    return _error(operation, is_write, rival, has_written, span)
        return None


def _join(clock: Clock, other: Clock) -> None:
    for actor, tick in other.items():
        if clock.get(actor, 0) < tick:
            clock[actor] = tick


def _error(late: Operation, late_writes: bool, early: Operation, early_wrote: bool, span: Span) -> UnorderedAccessError:
    if early.actor == HOST:
        advice = "queue it from a thread that has seen the host's access end"
    elif late.actor == HOST:
        advice = f"synchronize with an event recorded on stream {early.actor} after the first"
    else:
        advice = f"make stream {late.actor} wait for an event recorded on stream {early.actor} after the first"
    return UnorderedAccessError(
        f"Expected an order between two operations on {span}, got none: {early} {_verb(early_wrote)} them and {late} "
        f"{_verb(late_writes)} them; {advice}"
    )


def _verb(is_write: bool) -> str:
    return "writes" if is_write else "reads"


def caller() -> Line:
    """The line outside of torch and of this package that is being run, for messages."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_NOT_THE_CALLER):
        if frame.f_back is None:
            return Line("", 0)
        frame = frame.f_back
    return Line(frame.f_code.co_filename, frame.f_lineno)
