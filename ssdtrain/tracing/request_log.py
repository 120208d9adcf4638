"""What became of the requests and waits of the running step, noted by those who move the bytes.

Used under the store's lock. Holds no record, tensor or memory: only times, sizes and positions, and reads that
are over, which know nothing but times. Times are `time.monotonic()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ssdtrain.io.engine import Read, Write
    from ssdtrain.tracing.pass_trace import PassTrace
    from ssdtrain.tracing.step_trace import StepTrace

WriteRow = tuple[int, int, int, int, float, float, float, float, float]
"""Place of the record, bytes, 1 in the host tier, 1 cancelled, then `Write.moments`."""
ReadRow = tuple[int, int, int, float, float, float]
"""Place of the record, bytes, 1 from memory alone, then `Read.moments`."""
StallRow = tuple[str, int, float, float]
"""What was waited for, position of the record (-1: another step's), when it began, seconds."""


class Requested(Protocol):
    """What the request log asks of a record."""

    @property
    def nbytes(self) -> int:
        """The size of the record."""

    @property
    def pass_(self) -> PassTrace:
        """The forward pass that saved it."""

    @property
    def index(self) -> int:
        """Its position in the pass."""


@dataclass
class Requests:
    """Requests and waits of one step, in the order they were over."""

    writes: list[WriteRow] = field(default_factory=list)
    reads: list[ReadRow] = field(default_factory=list)
    stalls: list[StallRow] = field(default_factory=list)


_MAX_ROWS = 100_000  # of each kind: a step that never ends must not fill memory


class RequestLog:
    """Requests since the last step."""

    def __init__(self) -> None:
        """Empty."""
        self._writes: list[tuple[StepTrace, WriteRow]] = []
        self._reads: list[tuple[StepTrace, int, int, Read]] = []
        self._stalls: list[tuple[StepTrace, StallRow]] = []

    def note_written(self, write: Write, records: Sequence[Requested], nbytes: int, *, is_in_host: bool) -> None:
        """A write of `nbytes` is over; each record of `records` has its own row."""
        if len(self._writes) >= _MAX_ROWS:
            return
        was_cancelled = write.cancelled_nbytes > 0 and not write.written_nbytes
        for record in records:
            own_nbytes = min(nbytes, record.nbytes)  # less than the record's: one of several stripes
            row = (_place(record), own_nbytes, int(is_in_host), int(was_cancelled), *write.moments)
            self._writes.append((record.pass_.step, row))

    def note_reads(self, record: Requested, reads: Sequence[Read]) -> None:
        """The reads of a record were waited for, or are nobody's any more."""
        if len(self._reads) >= _MAX_ROWS:
            return
        share = record.nbytes // max(1, len(reads))
        self._reads += [(record.pass_.step, _place(record), share, read) for read in reads]

    def note_stall(self, tier: str, begin: float, seconds: float, record: Requested) -> None:
        """Training waited for a record to leave or to come back."""
        if len(self._stalls) < _MAX_ROWS:
            self._stalls.append((record.pass_.step, (tier, _place(record), begin, seconds)))

    def of(self, step: StepTrace) -> Requests:
        """The rows of one step; a wait for a record of another step has position -1."""
        return Requests(
            [row for owner, row in self._writes if owner is step],
            [
                (position, nbytes, int(not read.read_nbytes), *read.moments)
                for owner, position, nbytes, read in self._reads
                if owner is step and read.is_done
            ],
            [row if owner is step else (row[0], -1, *row[2:]) for owner, row in self._stalls],
        )

    def clear(self) -> None:
        """Drops all rows: another step begins."""
        self._writes, self._reads, self._stalls = [], [], []


def _place(record: Requested) -> int:
    return record.pass_.positions[record.index]
