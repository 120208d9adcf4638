"""Requests of one user of a drive that are under way, and what they hold: memory, and extents.

Knows requests, extents and storages; neither what the bytes are nor when they are needed: the inside of `tensor_store`.
The owner holds a lock for every call, except for those that wait.

[Note: when an extent is free]
When its write and all its readers are over. A read of an accelerator is handed out as soon as its copy is queued, so
that what asked for it may be gone while the stream has yet to copy: the segment remembers its reads, and its extent is
nobody else's before they are over.

[Note: what an interrupt may cost]
Ctrl-C may come between any two lines. Memory is listed before the engine is told of it, and what is to be given back is
taken off the list first: an interrupt may cost space until the engine closes, but no extent is given out twice and
nothing is read or written in memory that was freed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ssdtrain.devices.base import Allocation, Device
from ssdtrain.io.drive import Drive
from ssdtrain.io.engine import Fence, Read, Write
from ssdtrain.io.extents import Extent
from ssdtrain.io.open_engine import fence

Piece = tuple[int, int, int]
"""Address, bytes, offset in the extent."""
Problem = tuple[int, int, int, str]
"""Errno, offset, bytes, message."""


@dataclass(eq=False, slots=True)
class Segment:
    """Bytes [`start`, ...) of a record: one piece of a write, the extent it went to, and who reads it back."""

    drive: Drive
    write: Write
    piece: int
    extent: Extent
    start: int
    is_in_host: bool
    readers: list[Read] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether nothing writes or reads its extent."""
        for reader in self.readers:
            if not reader.is_done:
                return False
        return self.write.is_done

    def is_readable(self, device: Device) -> bool:
        """Whether it can be read to memory of `device`: an accelerator waits for a copy out that is queued."""
        write = self.write
        return write.is_done or (write.is_copied if device.driver is None else write.is_issued)


@dataclass(eq=False, slots=True)
class PendingWrite:
    """A write and the memory it may still read, whose bytes belong to `records`: the i-th is piece i."""

    extent: Extent
    records: Sequence[Any]
    sources: list[torch.UntypedStorage]
    stream: int
    producer: Fence | None  # of an accelerator: the sources are computed after this point
    write: Write | None = None  # None after an interrupt too

    @property
    def is_over(self) -> bool:
        """Whether the engine is done with it."""
        return self.write is not None and self.write.is_done


@dataclass(eq=False, slots=True)
class PendingRead:
    """Reads of a record to fresh memory, usable in the order of the stream it was allocated on.

    Without segments the bytes never left: the memory is the record's own, or a copy.
    """

    record: Any
    segments: Sequence[Segment]
    device: Device
    memory: Allocation
    stream: int
    reads: list[Read] = field(default_factory=list)
    is_ahead: bool = False  # nobody waits for it yet
    is_copy: bool = False  # in another device's memory than the record's own

    @property
    def is_over(self) -> bool:
        """Whether nothing is being read to its memory; never after an interrupt in the middle of its beginning."""
        for read in self.reads:
            if not read.is_done:
                return False
        return len(self.reads) == len(self.segments)

    @property
    def is_issued(self) -> bool:
        """Whether the bytes are there for whoever waits in stream order, or something has failed."""
        for read in self.reads:  # noqa: SIM110  a generator costs a call, here and below
            if not read.is_issued:
                return False
        return True

    @property
    def has_left(self) -> bool:
        """Whether the memory is fresh, and so the caller's."""
        return self.is_copy or bool(self.reads)

    def wait(self, timeout_seconds: float) -> bool:
        """Blocks, without a lock, until `is_issued`; false when a drive has owed an answer for so long."""
        for read in self.reads:
            read.expedite()
        for segment, read in zip(self.segments, self.reads, strict=False):
            if not segment.drive.wait(read.wait_issued, timeout_seconds, file=segment.extent.file):
                return False
        return True

    def problem(self, timeout_seconds: float) -> tuple[Segment, Problem] | None:
        """What keeps bytes that were waited for from being of use, and where.

        A directory whose read failed, although it was tried again, is not used any more.
        """
        for segment, read in zip(self.segments, self.reads, strict=True):
            if not read.is_issued:
                why = f"no answer from the drive for {timeout_seconds:g} s"
                return segment, (errno.ETIMEDOUT, segment.extent.offset, segment.extent.nbytes, why)
            error = read.error
            if error is not None:
                if error[0] != errno.EREMOTEIO:  # that one is the device's, not the drive's
                    segment.drive.space.note_read_error(segment.extent.file, error)
                return segment, error
        return None

    def use(self) -> None:
        """The current stream uses the memory from here on, after the copies into it."""
        if self.device.driver is not None and self.has_left:
            hand_out(self.memory.storage, self.device, self.stream, self.reads)


def are_done(requests: Iterable[Read | Write]) -> bool:
    """Whether all of them are."""
    for request in requests:  # noqa: SIM110
        if not request.is_done:
            return False
    return True


def hand_out(storage: torch.UntypedStorage, device: Device, stream: int, reads: Iterable[Read]) -> None:
    """The current stream of an accelerator uses memory that `stream` has allocated, after the copies into it.

    PyTorch gives freed memory to the stream that allocated it, so any other one that uses it is named.
    """
    current = device.current_stream()
    for read in reads:
        read.make_wait(current)
    if current != stream:
        device.share(storage, current)


class Pending:
    """What one user of a drive has under way."""

    def __init__(
        self, drive: Drive, note_fallback: Callable[[str], None], *, staging_nbytes: int, timeout_seconds: float
    ) -> None:
        """Nothing yet. `staging_nbytes` bounds the bytes on their way out; `timeout_seconds`: see `Drive.wait`."""
        self.writes: list[PendingWrite] = []
        self.reads: list[PendingRead] = []
        self.has_accelerators = False
        self._drive, self._engine = drive, drive.engine
        self._note_fallback = note_fallback
        self._staging_nbytes, self._timeout_seconds = staging_nbytes, timeout_seconds
        self._devices: set[Device] = set()
        self._unwanted: list[Segment] = []  # see [Note: when an extent is free]
        self._handed_over: list[Read] = []  # whose copies a stream has yet to run
        self.seen_events = -1

    # -- out -----------------------------------------------------------------------------------------------------

    def producer(self, device: Device, stream: int) -> Fence | None:
        """The point of a stream of an accelerator after which what is queued there by now has been computed."""
        self.get_ready(device)
        return fence(device.driver, stream)

    def prepare(self, device: Device, nbytes: int, *, prefers_host: bool) -> None:
        """Has host memory pinned for what `device` is about to send. That takes long: called without a lock."""
        if device.driver is None or self._drive.is_closed:
            return
        with contextlib.suppress(RuntimeError):  # closed meanwhile, or it says so again when it is used
            self.get_ready(device)
            if prefers_host:
                self._drive.prepare(nbytes)

    def get_ready(self, device: Device) -> None:
        """The engine learns of an accelerator.

        Raises:
            RuntimeError: it moves host memory only.
        """
        if device.driver is None or device in self._devices:
            return
        why = self._drive.add_driver(device.driver)
        self._devices.add(device)
        self.has_accelerators = True
        if why:
            self._note_fallback(why)

    def write(self, pending: PendingWrite, pieces: list[Piece]) -> Write:
        """Begins a write. Its sources are held until they are copied."""
        extent = pending.extent
        self.writes.append(pending)
        write = self._engine.write(extent.file, extent.offset, extent.nbytes, pieces, pending.producer)
        pending.write = write
        return write

    def allow(self, nbytes: int) -> None:
        """From now on so many bytes may be on their way out."""
        self._staging_nbytes = nbytes

    def has_room(self, nbytes: int) -> bool:
        """Whether `nbytes` more may be on their way out."""
        in_flight = self._engine.inflight_nbytes
        return not in_flight or in_flight + nbytes <= self._staging_nbytes

    def wait_for_room(self, nbytes: int) -> bool:
        """Blocks, without a lock, until `nbytes` more may be on their way out; false when a drive does not answer."""
        limit = max(0, self._staging_nbytes - nbytes)
        return self._drive.wait(lambda seconds: self._engine.wait_inflight(limit, seconds), self._timeout_seconds)

    def room_after(self, nbytes: int) -> int:
        """What to `wait_for_room` for until `nbytes` of what is on its way are through."""
        return max(1, self._staging_nbytes - self._engine.inflight_nbytes + nbytes)

    def wait_written(self, writes: Iterable[PendingWrite]) -> bool:
        """Blocks, without a lock, until `writes` are over; false when their drive does not answer."""
        return all(
            self._drive.wait(p.write.wait, self._timeout_seconds, file=p.extent.file)
            for p in writes
            if p.write is not None
        )

    def wait_readable(self, segments: Iterable[Segment], device: Device) -> Segment | None:
        """Blocks, without a lock, until `segments` can be read; or returns one whose drive does not answer."""
        for segment in segments:
            write = segment.write
            wait = write.wait_copied if device.driver is None else write.wait_issued
            if not self._drive.wait(wait, self._timeout_seconds, file=segment.extent.file):
                return segment
        return None

    def retire_silent(self) -> bool:
        """Uses no directory any more whose drive has not answered for too long; whether there is one."""
        silent = self._drive.silent_files(self._timeout_seconds)
        for file in silent:
            extents = [p.extent for p in self.writes if not p.is_over]
            extents += [segment.extent for p in self.reads if not p.is_over for segment in p.segments]
            where = "".join([f" at offset {e.offset}" for e in extents if e.file == file][:1])
            self._drive.space.retire(file, f"after no answer to a request{where} for {self._timeout_seconds:g} s")
        return bool(silent)

    # -- back ----------------------------------------------------------------------------------------------------

    def read(self, record: Any, segments: Sequence[Segment], device: Device, nbytes: int) -> PendingRead:
        """Begins to bring segments to fresh memory of the current stream, which is held until they are there.

        Raises:
            MemoryError, torch.OutOfMemoryError: there is none.
        """
        space = self._drive.space
        memory = device.allocate(nbytes, space.memory_alignment, space.block_nbytes)
        has_streams = device.driver is not None
        stream = device.current_stream() if has_streams else 0
        ready = fence(device.driver, stream) if has_streams else None
        pending = PendingRead(record, segments, device, memory, stream)
        self.reads.append(pending)
        for segment in segments:
            address, capacity = memory.address + segment.start, memory.capacity - segment.start
            read = self._engine.read(segment.write, segment.piece, address, capacity, ready)
            if segment.readers:
                segment.readers = [reader for reader in segment.readers if not reader.is_done]
            segment.readers.append(read)
            pending.reads.append(read)
        return pending

    def hand_over(self, pending: PendingRead) -> None:
        """Whoever has the memory now orders its streams after the copies: it is not held here any more.

        Nor does what was handed over hold what the engine has of its writes.
        """
        pending.segments = ()
        for read in pending.reads:
            if not read.is_done:
                self._handed_over.append(read)
        if pending in self.reads:
            self.reads.remove(pending)

    # -- what the engine has done ------------------------------------------------------------------------------------

    def release(self, segments: Iterable[Segment]) -> None:
        """Nobody needs these bytes any more. Writes are cancelled, and extents go back as soon as they are free."""
        for segment in segments:
            if not segment.write.is_done:
                segment.write.cancel(segment.piece)
            if not segment.is_over:
                self._unwanted.append(segment)
            elif self._drive.is_closed:  # then all went back at once
                pass
            elif segment.is_in_host:
                self._drive.release(segment.extent)
            else:
                self._drive.space.release(segment.extent)

    def reap(self) -> Sequence[PendingWrite]:
        """Gives back what the engine is done with: memory that is copied or filled, and unwanted extents.

        Returns the writes whose sources are free or that are over, those for the last time. What could not be copied
        keeps its sources, for the owner to take.
        """
        num_events = self._engine.num_events
        if num_events == self.seen_events:
            return ()
        self.seen_events = num_events
        news, left = [], []
        for pending in self.writes:
            write = pending.write
            is_done = write is not None and write.is_done
            if write is not None and (is_done or (pending.sources and write.is_copied)):
                is_lost = write.is_lost
                if not is_lost and write.is_copied:
                    pending.sources = []
                if is_done and not is_lost and write.error is not None:
                    self._drive.space.note_write_error(pending.extent.file, write.error)
                news.append(pending)
            if not is_done:
                left.append(pending)
        self.writes = left
        while self.reads and self.reads[0].is_over:  # one that is over waits for those before it
            del self.reads[0]
        if self._handed_over:
            self._handed_over = [read for read in self._handed_over if not read.is_done]
        if self._unwanted:
            unwanted, self._unwanted = self._unwanted, []
            self.release(unwanted)
        return news

    def close(self) -> bool:
        """Calls off what is under way and gives up this user's share of the engine; `reap` says what still arrived.

        False when the drive does not answer: what it may still touch then stays as it is until the process ends.
        """
        are_all_over = not self._drive.is_closed and not self._engine.is_closed and self._end_all()
        is_quiet = self._drive.close(self._timeout_seconds, are_all_over=are_all_over)
        if not is_quiet:
            self.retire_silent()
            self._drive.give_up()
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))  # the kernel may still write to memory held here
        return is_quiet

    def _end_all(self) -> bool:
        """Whether all requests have ended, those that an interrupt kept from being listed included."""
        for pending in self.writes:
            if pending.write is not None:
                for piece in range(len(pending.records)):
                    pending.write.cancel(piece)
        reads = [*self._handed_over, *[read for pending in self.reads for read in pending.reads]]
        waits = [p.write.wait for p in self.writes if p.write is not None] + [read.wait for read in reads]
        are_over = all(self._drive.wait(wait, self._timeout_seconds, must_move=True) for wait in waits)
        are_listed = all([p.write is not None for p in self.writes]) and all(
            [len(p.reads) == len(p.segments) for p in self.reads]
        )
        return are_over and are_listed
