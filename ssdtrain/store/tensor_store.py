"""One open engine with its files and host tier: sends records and brings them back.

Knows where records lie, but neither why they travel nor what their residency is: that is the store's, which also holds
the lock for every call except `wait_for_room`. What is under way, and what it holds, is in `pending`.

[Note: who keeps source memory alive]
A record holds its storage until the engine has copied the bytes to a slab; if the record is released before that, the
`PendingWrite` still holds the storage until the engine says it does not read it any more. Likewise the `PendingRead`
holds the destination of every read until the read is over, whatever becomes of its record.

[Note: letting go in stream order]
The process that trains runs ahead of an accelerator: it asks for the memory of the tenth layer when the first is being
computed. A source that goes only when its copy is over then goes too late to be the tenth layer's memory. So once its
copies are queued, the stream it was saved on is told to wait for them, and the source goes at once: PyTorch gives the
memory to later work of that stream, which the device runs after the copy. Where another stream allocated the memory,
PyTorch gives it to that one: it was told of the stream that saved (`Device.share`) and waits for what is queued there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ssdtrain.io.client import Drive, DriveTotals
from ssdtrain.io.engine import Fence
from ssdtrain.io.extents import Extent
from ssdtrain.policy import ActivationPolicy
from ssdtrain.store.pending import Pending, PendingRead, PendingWrite, Piece, Segment
from ssdtrain.store.record import SavedRecord
from ssdtrain.tracing.request_log import RequestLog


class TensorStore:
    """What exists between the opening and the closing of an engine."""

    def __init__(
        self,
        drive: Drive,
        policy: ActivationPolicy,
        note_fallback: Callable[[str], None],
        request_log: RequestLog | None = None,
    ) -> None:
        """Takes a drive over. `request_log` is told of every request that is over."""
        self.engine, self.space, self.host = drive.engine, drive.space, drive.host
        self.cancelled_nbytes = 0
        self.moves_host_memory_only = drive.kind == "python"
        self.pending = Pending(
            drive,
            note_fallback,
            staging_nbytes=policy.staging_nbytes,
            timeout_seconds=policy.io_timeout_seconds,
        )
        self._request_log = request_log
        self._note_fallback = note_fallback
        self.drive = drive
        self._pending_reads: dict[SavedRecord, PendingRead] = {}

    # -- out -----------------------------------------------------------------------------------------------------

    def prepare(self, records: list[SavedRecord]) -> None:
        """Has host memory pinned for records that `send` gets next. Called without a lock."""
        nbytes, first = sum([self.space.rounded(record.nbytes) for record in records]), records[0]
        self.pending.prepare(first.device, nbytes, prefers_host=first.prefers_host)

    def send(self, records: list[SavedRecord]) -> bool:
        """Begins to write one record, striped when it is large, or several small ones as one request.

        All of them are of one device, stream and preference for the host tier. False when there is no room; else every
        record has its places.
        """
        sizes = [self.space.rounded(record.nbytes) for record in records]
        extents = self.drive.allocate(sum(sizes), prefers_host=records[0].prefers_host, stripe=len(records) == 1)
        if not extents:
            return False
        first = records[0]
        producer = self.pending.producer(first.device, first.stream)
        for record in records if producer is not None else ():
            assert record.storage is not None
            record.device.share(record.storage, record.stream)  # see [Note: letting go in stream order]
        if len(records) == 1:
            self._send_alone(first, extents, producer)
        else:
            self._send_together(records, sizes, extents[0], producer)
        return True

    def totals(self) -> DriveTotals:
        """What the drive has done so far."""
        return self.drive.totals()

    @property
    def has_accelerators(self) -> bool:
        """Whether memory of an accelerator was ever sent."""
        return self.pending.has_accelerators

    def is_in_host(self, record: SavedRecord) -> bool:
        """Whether the bytes of a record that was sent are in the host tier."""
        return record.segments[0].is_in_host

    def _send_alone(self, record: SavedRecord, extents: list[Extent], producer: Fence | None) -> None:
        start, places = 0, []
        for extent in extents:
            nbytes = min(extent.nbytes, record.nbytes - start)
            places.append(self._write(extent, [record], [(_address(record) + start, nbytes, 0)], producer))
            places[-1].start = start
            start += extent.nbytes
        record.segments = tuple(places)

    def _send_together(
        self, records: list[SavedRecord], sizes: list[int], extent: Extent, producer: Fence | None
    ) -> None:
        starts = [0, *itertools.accumulate(sizes)]
        pieces = [(_address(record), record.nbytes, start) for record, start in zip(records, starts, strict=False)]
        write = self._write(extent, records, pieces, producer).write
        for i, record in enumerate(records):
            own = Extent(extent.file, extent.offset + starts[i], sizes[i])
            record.segments = (Segment(self.drive, write, i, own, 0),)

    def _write(
        self, extent: Extent, records: list[SavedRecord], pieces: list[Piece], producer: Fence | None
    ) -> Segment:
        sources = [record.storage for record in records if record.storage is not None]
        write = self.pending.write(PendingWrite(extent, records, sources, records[0].stream, producer), pieces)
        return Segment(self.drive, write, 0, extent, 0)

    def next_point(self) -> Fence | None:
        """The next point an accelerator has yet to pass before something that was sent can be copied, if there is one.

        While there is, the accelerator has work queued: training is ahead of it.
        """
        points = (p.producer for p in self.pending.writes if p.write is not None and not p.write.is_copied)
        return next((point for point in points if point is not None and not point.is_complete), None)

    def let_go(self, max_held_nbytes: int, *, only_if_behind: bool) -> list[SavedRecord]:
        """Lets sources beyond `max_held_nbytes` go that an accelerator is yet to copy, the oldest first.

        See [Note: letting go in stream order]. `only_if_behind`: not those that it could be copying by now, where a
        stream might really have to wait. Returns the records whose sources are free.
        """
        free: list[SavedRecord] = []
        held = [p for p in self.pending.writes if p.producer is not None and p.sources]
        nbytes = sum(p.extent.nbytes for p in held)
        for pending in held:
            if nbytes <= max_held_nbytes or not _can_let_go(pending, only_if_behind):
                break
            _make_wait(pending)
            pending.sources = []
            nbytes -= pending.extent.nbytes
            free += pending.records
        return free

    # -- what the engine has done ------------------------------------------------------------------------------------

    def collect(self) -> list[tuple[SavedRecord, bool]]:
        """Records whose bytes the engine has all copied since the last call, and whether they are also all written."""
        news: list[tuple[SavedRecord, bool]] = []
        for pending in self.pending.reap():
            for record in pending.records:
                if all([place.write.is_copied for place in record.segments]):
                    news.append((record, all([place.write.is_done for place in record.segments])))
            if pending.is_over:
                self._note_over(pending)
        return news

    def _note_over(self, pending: PendingWrite) -> None:
        write, extent = pending.write, pending.extent
        assert write is not None
        self.cancelled_nbytes += write.cancelled_nbytes
        if self._request_log is not None:
            is_in_host = self.drive.is_in_host(extent)
            self._request_log.note_written(write, pending.records, extent.nbytes, is_in_host=is_in_host)
        if write.is_lost:
            self._note_fallback("an accelerator could not copy saved tensors out; they stay where they are")

    # -- back ----------------------------------------------------------------------------------------------------

    def read(self, record: SavedRecord) -> PendingRead:
        """Begins to bring a record's bytes to fresh memory, which is held until they are there.

        Raises:
            MemoryError, torch.OutOfMemoryError: there is none.
        """
        pending = self.pending.read(record.segments, record.device, record.nbytes)
        self._pending_reads[record] = pending
        return pending

    def forget_reads(self, record: SavedRecord, *, is_handed_over: bool) -> None:
        """The record's reads are over, or nobody waits for them any more. Memory still being written to stays.

        `is_handed_over`: whoever uses the memory next waits for the copies, in stream order.
        """
        pending = self._pending_reads.pop(record)
        if self._request_log is not None:
            self._request_log.note_reads(record, pending.reads)
        if is_handed_over:
            self.pending.hand_over(pending)

    def records_coming_back(self) -> list[SavedRecord]:
        """Records that are being read, or have been and were not asked for yet."""
        return list(self._pending_reads)

    def records_under_way(self) -> list[SavedRecord]:
        """Records some of whose bytes may not be written yet."""
        return [record for pending in self.pending.writes for record in pending.records]


def _make_wait(pending: PendingWrite) -> None:
    """What is queued later on the stream of the sources runs after the copies."""
    first: SavedRecord = pending.records[0]
    step = first.pass_.step
    began = step.mark() if first.device.current_stream() == pending.stream else None
    for write in {place.write for record in pending.records for place in record.segments} | {pending.write}:
        assert write is not None
        write.make_wait(pending.stream)
    if began is not None:
        step.note_wait(began, is_for_reload=False)


def _can_let_go(pending: PendingWrite, only_if_behind: bool) -> bool:
    assert pending.producer is not None and pending.write is not None
    if only_if_behind and pending.producer.is_complete:
        return False
    return pending.write.is_issued and all(p.write.is_issued for r in pending.records for p in r.segments)


def _address(record: SavedRecord) -> int:
    assert record.storage is not None
    return record.storage.data_ptr() + record.start
