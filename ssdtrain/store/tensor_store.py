"""The one mover: writes records to a drive and the host tier, reads them back, and gives their room back.

Knows records, segments and storages; neither what the bytes are, nor why they are offloaded, nor when they are needed.
Saved activations, parameters, gradients and optimizer state all move with it, each user of a drive with its own.

    store.write([record], [storage], origin)    # begins; a `Growth` or False when it cannot
    pending = store.read(record, device)        # begins
    pending.wait(timeout_seconds)               # blocks, without the lock
    pending.problem(timeout_seconds)            # what has failed, if anything has
    store.release(record)

The owner has a lock, which guards its records too, and holds it for every call except those that say otherwise.

[Note: who keeps source memory alive]
A record of a saved activation holds its storage until the engine has copied the bytes to a slab; if it is released
before that, or holds none, the `PendingWrite` still holds the source until the engine says it does not read it any
more. Likewise the `PendingRead` holds the destination of every read until the read is over, whatever becomes of its
record.

[Note: letting go in stream order]
The process that trains runs ahead of an accelerator: it asks for the memory of the tenth layer when the first is being
computed. A source that goes only when its copy is over then goes too late to be the tenth layer's memory. So once its
copies are queued, the stream it was saved on is told to wait for them, and the source goes at once: PyTorch gives the
memory to later work of that stream, which the device runs after the copy. Where another stream allocated the memory,
PyTorch gives it to that one: it was told of the stream that saved (`Device.share`) and waits for what is queued there.

[Note: when old bytes may go]
A record is written anew from memory that holds all its bytes. From then on that memory is the truth: it is held until
the engine has copied it, then the slab holds it, and then the file, or the heap when the write fails. So the extent of
the old bytes is free as soon as the new write has begun. A record points to its new bytes only when the request exists:
an interrupt may cost space, never bytes. See also [Note: what an interrupt may cost].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ssdtrain.devices.base import Device
from ssdtrain.io.drive import Drive, open_drive
from ssdtrain.io.engine import Fence, SpillFile
from ssdtrain.io.extents import Extent
from ssdtrain.io.spill_space import Growth
from ssdtrain.policy import ActivationPolicy, StatePolicy
from ssdtrain.store.pending import Pending, PendingRead, PendingWrite, Piece, Segment
from ssdtrain.store.record import Record, Residency
from ssdtrain.tracing.request_log import RequestLog


@dataclass(frozen=True)
class Origin:
    """Where the bytes of a write come from: a device, the stream that uses them last, and whether for the host tier."""

    device: Device
    stream: int
    prefers_host: bool


class TensorStore:
    """What one user has on an open drive, and under way."""

    def __init__(
        self,
        drive: Drive,
        policy: ActivationPolicy | StatePolicy,
        note_fallback: Callable[[str], None],
        request_log: RequestLog | None = None,
    ) -> None:
        """Takes a drive over. `request_log` is told of every request that is over."""
        self.drive, self.engine, self.space, self.host = drive, drive.engine, drive.space, drive.host
        self.timeout_seconds = policy.io_timeout_seconds
        self.cancelled_nbytes = 0
        self.moves_host_memory_only = drive.kind == "python"
        self.pending = Pending(
            drive, note_fallback, staging_nbytes=policy.staging_nbytes, timeout_seconds=policy.io_timeout_seconds
        )
        self._host_file = drive.host.file if drive.host is not None else None
        self._request_log = request_log
        self._note_fallback = note_fallback
        for text in drive.shortcomings():
            note_fallback(text)

    # -- out -----------------------------------------------------------------------------------------------------

    def write(
        self, records: Sequence[Record], sources: Sequence[torch.UntypedStorage], origin: Origin
    ) -> bool | Growth:
        """Begins to write one record, striped when it is large, or several small ones as one request.

        False when there is no room; a `Growth` when there will be. Else every record has its segments, and what it had
        before is released. A source may not change before `Record.is_copied`.
        """
        is_alone = len(records) == 1
        sizes = [] if is_alone else [self.space.rounded(record.nbytes) for record in records]
        need = records[0].nbytes if is_alone else sum(sizes)
        extents = self.drive.allocate(need, prefers_host=origin.prefers_host, stripe=is_alone)
        if isinstance(extents, Growth):
            return extents
        if not extents:
            return False
        producer = self.pending.producer(origin.device, origin.stream) if origin.device.driver is not None else None
        if producer is not None:
            for source in sources:
                origin.device.share(source, origin.stream)  # see [Note: letting go in stream order]
        if is_alone:
            self._write_alone(records[0], sources[0], extents, (origin.stream, producer))
        else:
            pending = PendingWrite(extents[0], records, list(sources), origin.stream, producer)
            self._write_together(pending, sizes)
        return True

    def _write_alone(
        self, record: Record, source: torch.UntypedStorage, extents: list[Extent], point: tuple[int, Fence | None]
    ) -> None:
        begin, start, segments = source.data_ptr() + record.offset, 0, []
        for extent in extents:
            piece = (begin + start, min(extent.nbytes, record.nbytes - start), 0)
            write = self.pending.write(PendingWrite(extent, [record], [source], *point), [piece])
            segments.append(Segment(self.drive, write, 0, extent, start, extent.file == self._host_file))
            start += extent.nbytes
        self._point(record, tuple(segments))

    def _write_together(self, pending: PendingWrite, sizes: list[int]) -> None:
        pieces, start = list[Piece](), 0
        for record, source, size in zip(pending.records, pending.sources, sizes, strict=True):
            pieces.append((source.data_ptr() + record.offset, record.nbytes, start))
            start += size
        write, extent = self.pending.write(pending, pieces), pending.extent
        is_in_host = extent.file == self._host_file
        for i, record in enumerate(pending.records):
            own = Extent(extent.file, extent.offset + pieces[i][2], sizes[i])
            self._point(record, (Segment(self.drive, write, i, own, 0, is_in_host),))

    def _point(self, record: Record, segments: tuple[Segment, ...]) -> None:
        """See [Note: when old bytes may go]."""
        old, record.segments = record.segments, segments
        if not record.holds_source:
            record.storage = None
        record.move(Residency.OFFLOADING)
        if old:
            self.pending.release(old)

    def release(self, record: Record) -> None:
        """The record's bytes on the drive or in the host tier are not needed any more. Writes are cancelled."""
        segments, record.segments = record.segments, ()
        if segments and segments[0].drive is self.drive:
            self.pending.release(segments)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way, and no byte is on the drive."""
        pending = self.pending
        return not pending.writes and not pending.reads and not self.space.in_use_nbytes

    def next_point(self) -> Fence | None:
        """The next point an accelerator has yet to pass before something that was sent can be copied, if there is one.

        While there is, the accelerator has work queued: training is ahead of it.
        """
        points = (p.producer for p in self.pending.writes if p.write is not None and not p.write.is_copied)
        return next((point for point in points if point is not None and not point.is_complete), None)

    def let_go(self, max_held_nbytes: int, *, only_if_behind: bool) -> list[PendingWrite]:
        """Writes whose sources an accelerator is yet to copy that may go, the oldest first: beyond `max_held_nbytes`.

        See [Note: letting go in stream order]; the caller has their stream wait first. `only_if_behind`: not those that
        it could be copying by now, where a stream might really have to wait.
        """
        found = []
        held = [p for p in self.pending.writes if p.producer is not None and p.sources]
        nbytes = sum(p.extent.nbytes for p in held)
        for pending in held:
            if nbytes <= max_held_nbytes or not _can_let_go(pending, only_if_behind):
                break
            nbytes -= pending.extent.nbytes
            found.append(pending)
        return found

    # -- what the engine has done ------------------------------------------------------------------------------------

    def reap(self) -> list[Any]:
        """Takes note of what the engine has done since the last call: frees sources, destinations and extents.

        Returns records that were being written and have news: their bytes are copied, or also written, or, where they
        could not be copied, only in memory, which the record then holds.
        """
        news: list[Any] = []
        if self.engine.num_events == self.pending.seen_events:
            return news
        for pending in self.pending.reap():
            write = pending.write
            assert write is not None
            for record in pending.records:
                if self._keep_lost(record, pending) if pending.sources else self._is_copied(record):
                    news.append(record)
            if write.is_done:
                self.cancelled_nbytes += write.cancelled_nbytes
                if self._request_log is not None or write.is_lost:
                    self._note_over(pending, write)
        return news

    def _is_copied(self, record: Record) -> bool:
        """Whether a record that was being written is all copied; where it is written too, it is there from here on."""
        if record.residency is not Residency.OFFLOADING:
            return False
        is_done = True
        for segment in record.segments:
            if not segment.write.is_done:
                is_done = False
                if not segment.write.is_copied:
                    return False
        if is_done:
            record.move(Residency.HOST if record.segments[0].is_in_host else Residency.DISK)
        return True

    def _keep_lost(self, record: Record, pending: PendingWrite) -> bool:
        """What could not be copied is only where it was: the record holds that."""
        for segment in record.segments:
            if segment.write is pending.write:
                record.storage = pending.sources[segment.piece]
                self.release(record)
                record.move(Residency.DEVICE)
                return True
        return False

    def _note_over(self, pending: PendingWrite, write: Any) -> None:
        if self._request_log is not None:
            is_in_host = pending.extent.file == self._host_file
            self._request_log.note_written(write, pending.records, pending.extent.nbytes, is_in_host=is_in_host)
        if write.is_lost:
            self._note_fallback("an accelerator could not copy tensors out; they stay where they are")

    # -- back ----------------------------------------------------------------------------------------------------

    def read(self, record: Record, device: Device) -> PendingRead:
        """Begins to bring a record's bytes to fresh memory, which is held until they are there.

        Raises:
            MemoryError, torch.OutOfMemoryError: there is no memory.
        """
        return self.pending.read(record, record.segments, device, record.nbytes)

    def end_read(self, pending: PendingRead, *, is_handed_over: bool) -> None:
        """A read is over, or nobody waits for it any more. Memory still being written to stays until that is over.

        `is_handed_over`: it is the caller's, who orders streams after the copies.
        """
        if self._request_log is not None:
            self._request_log.note_reads(pending.record, pending.reads)
        if is_handed_over:
            self.pending.hand_over(pending)

    def where(self, segment: Segment) -> str:
        """The directory of a segment, or that it is in host memory."""
        return "host memory" if segment.is_in_host else self.space.directory(segment.extent.file)

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self) -> bool:
        """Ends what is under way and gives the room back; false when the drive does not answer."""
        is_quiet = self.pending.close()
        if not is_quiet:
            self._note_fallback("the drive is stuck: memory and threads of its requests stay until the process ends")
        return is_quiet


def make_wait(pending: PendingWrite) -> None:
    """What is queued on the stream of the sources from now on runs after the copies."""
    for write in {segment.write for record in pending.records for segment in record.segments} | {pending.write}:
        assert write is not None
        write.make_wait(pending.stream)


def _can_let_go(pending: PendingWrite, only_if_behind: bool) -> bool:
    assert pending.producer is not None and pending.write is not None
    if only_if_behind and pending.producer.is_complete:
        return False
    return pending.write.is_issued and all(s.write.is_issued for r in pending.records for s in r.segments)


def open_for(
    policy: ActivationPolicy | StatePolicy,
    kind: str,
    places: Sequence[str | SpillFile],
    slab_nbytes: int,
    *,
    note_fallback: Callable[[str], None],
    **options: Any,
) -> Drive:
    """A drive as a policy wants it; the arguments are those of `open_drive`.

    Raises:
        OSError: a directory cannot be used; errno and filename say which and why.
        RuntimeError: the engine asked for by name is not available.
    """
    return open_drive(
        kind,
        places,
        policy.staging_nbytes,
        slab_nbytes,
        note_fallback=note_fallback,
        checksum=policy.checksum,
        disk_nbytes=policy.disk_nbytes,
        timeout_seconds=policy.io_timeout_seconds,
        **options,
    )
