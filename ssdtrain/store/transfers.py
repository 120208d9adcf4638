"""One open engine with its files and host tier: sends records, brings them back, looks after extents and requests.

Knows where records lie, but neither why they travel nor what their residency is: that is the store's, which also holds
the lock for every call except `wait_inflight`.

[Note: who keeps source memory alive]
A record holds its storage until the engine has copied the bytes to a slab; if the record is released before that, the
`_Shipment` still holds the storage until the engine says it does not read it any more. Likewise `_landings` holds the
destination of every read until the read is over, whatever becomes of its record.

[Note: letting go in stream order]
The process that trains runs ahead of an accelerator: it asks for the memory of the tenth layer when the first is being
computed. A source that goes only when its copy is over then goes too late to be the tenth layer's memory. So once its
copies are queued, the stream it was saved on is told to wait for them, and the source goes at once: PyTorch gives the
memory to later work of that stream, which the device runs after the copy.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ssdtrain.devices.base import Allocation, Device
from ssdtrain.io.client import Drive, DriveTotals
from ssdtrain.io.engine import Fence, Read, Write
from ssdtrain.io.open_engine import fence
from ssdtrain.io.space import Extent
from ssdtrain.store.record import Place, Record
from ssdtrain.tracing.request_log import RequestLog


@dataclass
class _Shipment:
    """One write request and the records whose bytes it carries: record i is piece i."""

    write: Write
    extent: Extent
    cargo: list[Record]
    sources: list[torch.UntypedStorage | None]
    producer: Fence | None  # of an accelerator: the sources are computed after this point
    stream: int
    moved: float  # time.monotonic() when the drive last moved something of it, as far as we have looked
    moved_nbytes: int = 0
    dead_extents: list[Extent] = field(default_factory=list)

    def moves_not_since(self, moment: float) -> bool:
        """Whether the drive has some of it and has moved nothing of it since `moment`; no, while it waits its turn."""
        nbytes = self.write.written_nbytes
        if nbytes != self.moved_nbytes:
            self.moved, self.moved_nbytes = time.monotonic(), nbytes
        since = self.write.at_drive_since
        return since > 0.0 and max(self.moved, since) < moment


class Transport:
    """What exists between the opening and the closing of an engine."""

    def __init__(
        self, drive: Drive, note_fallback: Callable[[str], None], request_log: RequestLog | None = None
    ) -> None:
        """Takes a drive over. `request_log` is told of every request that is over."""
        self.engine, self.space, self.host = drive.engine, drive.space, drive.host
        self._request_log = request_log
        self.cancelled_nbytes = 0
        self.moves_host_memory_only = drive.kind == "python"
        self._note_fallback = note_fallback
        self._devices: set[Device] = set()
        self._drive = drive
        self._seen_events = -1
        self._shipments: list[_Shipment] = []
        self._source_of_next: list[torch.UntypedStorage | None] = []  # held before the engine knows, see `books`
        self._landings: dict[Record, tuple[Sequence[Read], Allocation]] = {}
        self._orphans: list[tuple[Sequence[Read], Allocation]] = []

    # -- out -----------------------------------------------------------------------------------------------------

    def send(self, cargo: list[Record]) -> bool:
        """Begins to write one record, striped when it is large, or several small ones as one request.

        All of them are of one device, stream and preference for the host tier. False when there is no room; else every
        record has its places.
        """
        sizes = [self.space.rounded(record.nbytes) for record in cargo]
        extents = self._drive.allocate(sum(sizes), prefers_host=cargo[0].prefers_host, stripe=len(cargo) == 1)
        if not extents:
            return False
        device = cargo[0].device
        if device.driver is not None and device not in self._devices:
            self._add_device(device)
        producer = fence(device.driver, cargo[0].stream)
        if len(cargo) == 1:
            self._send_alone(cargo[0], extents, producer)
        else:
            self._send_together(cargo, sizes, extents[0], producer)
        return True

    def totals(self) -> DriveTotals:
        """What the drive has done so far."""
        return self._drive.totals()

    @property
    def num_shipments(self) -> int:
        """Writes that are not over."""
        return len(self._shipments)

    @property
    def has_accelerators(self) -> bool:
        """Whether memory of an accelerator was ever sent."""
        return bool(self._devices)

    def is_in_host(self, record: Record) -> bool:
        """Whether the bytes of a record that was sent are in the host tier."""
        return self._drive.is_in_host(record.places[0].extent)

    def _add_device(self, device: Device) -> None:
        why = self._drive.add_driver(device.driver)
        self._devices.add(device)
        if why:
            self._note_fallback(why)

    def _send_alone(self, record: Record, extents: list[Extent], producer: Fence | None) -> None:
        start, places = 0, []
        for extent in extents:
            nbytes = min(extent.nbytes, record.nbytes - start)
            write = self._write(extent, [record], [(_address(record) + start, nbytes, 0)], producer)
            places.append(Place(self, write, 0, extent, start))
            start += extent.nbytes
        record.places = tuple(places)

    def _send_together(self, cargo: list[Record], sizes: list[int], extent: Extent, producer: Fence | None) -> None:
        starts = [0, *itertools.accumulate(sizes)]
        pieces = [(_address(record), record.nbytes, start) for record, start in zip(cargo, starts, strict=False)]
        write = self._write(extent, cargo, pieces, producer)
        for i, record in enumerate(cargo):
            own = Extent(extent.file, extent.offset + starts[i], sizes[i])
            record.places = (Place(self, write, i, own, 0),)

    def _write(
        self, extent: Extent, cargo: list[Record], pieces: list[tuple[int, int, int]], producer: Fence | None
    ) -> Write:
        self._source_of_next = sources = [record.storage for record in cargo]
        write = self.engine.write(extent.file, extent.offset, extent.nbytes, pieces, producer)
        self._shipments.append(_Shipment(write, extent, cargo, sources, producer, cargo[0].stream, time.monotonic()))
        self._source_of_next = []
        return write

    def next_point(self) -> Fence | None:
        """The next point an accelerator has yet to pass before something that was sent can be copied, if there is one.

        While there is, the accelerator has work queued: training is ahead of it.
        """
        points = (s.producer for s in self._shipments if not s.write.is_copied)
        return next((point for point in points if point is not None and not point.is_complete), None)

    def let_go(self, max_held_nbytes: int, *, only_if_behind: bool) -> list[Record]:
        """Lets sources beyond `max_held_nbytes` go that an accelerator is yet to copy, the oldest first.

        See [Note: letting go in stream order]. `only_if_behind`: not those that it could be copying by now, where a
        stream might really have to wait. Returns the records whose sources are free.
        """
        free: list[Record] = []
        held = [s for s in self._shipments if s.producer is not None and s.sources]
        nbytes = sum(s.extent.nbytes for s in held)
        for shipment in held:
            if nbytes <= max_held_nbytes or not self._can_let_go(shipment, only_if_behind):
                break
            self._make_wait(shipment)
            shipment.sources = []
            nbytes -= shipment.extent.nbytes
            free += shipment.cargo
        return free

    def _make_wait(self, shipment: _Shipment) -> None:
        """What is queued later on the stream of the sources runs after the copies."""
        first = shipment.cargo[0]
        step = first.pass_.step
        began = step.mark() if first.device.current_stream() == shipment.stream else None
        for write in {place.write for record in shipment.cargo for place in record.places} | {shipment.write}:
            write.make_wait(shipment.stream)
        if began is not None:
            step.note_wait(began, is_for_reload=False)

    def _can_let_go(self, shipment: _Shipment, only_if_behind: bool) -> bool:
        assert shipment.producer is not None
        if only_if_behind and shipment.producer.is_complete:
            return False
        return shipment.write.is_issued and all(p.write.is_issued for r in shipment.cargo for p in r.places)

    def wait_inflight(self, max_nbytes: int, timeout_seconds: float) -> bool:
        """Blocks until at most `max_nbytes` are on their way out; false when the time is over first."""
        return self.engine.wait_inflight(max_nbytes, timeout_seconds)

    def retire_stuck(self, timeout_seconds: float) -> bool:
        """Retires the directories of writes at the drive that get no further; whether there are any."""
        before = time.monotonic() - timeout_seconds
        stuck = [shipment for shipment in self._shipments if shipment.moves_not_since(before)]
        for shipment in stuck:
            why = f"after a write at offset {shipment.extent.offset} took more than {timeout_seconds:g} s"
            self.space.retire(shipment.extent.file, why)
        return bool(stuck)

    # -- what the engine has done ------------------------------------------------------------------------------------

    def collect(self) -> list[tuple[Record, bool]]:
        """Records whose bytes the engine has all copied since the last call, and whether they are also all written."""
        events = self.engine.num_events
        if events == self._seen_events:
            return []
        self._seen_events = events
        news: list[tuple[Record, bool]] = []
        self._shipments = [shipment for shipment in self._shipments if not self._arrive(shipment, news)]
        if self._orphans:
            self._orphans = [orphan for orphan in self._orphans if not all(read.is_done for read in orphan[0])]
        return news

    def _arrive(self, shipment: _Shipment, news: list[tuple[Record, bool]]) -> bool:
        """Lets go of copied sources; whether the write is over."""
        write = shipment.write
        is_done = write.is_done
        if is_done or (shipment.sources and write.is_copied):
            shipment.sources = []
            for record in shipment.cargo:
                if all([place.write.is_copied for place in record.places]):
                    news.append((record, all([place.write.is_done for place in record.places])))
        if is_done:
            self.cancelled_nbytes += write.cancelled_nbytes
            if self._request_log is not None:
                is_in_host = self._drive.is_in_host(shipment.extent)
                self._request_log.note_written(write, shipment.cargo, shipment.extent.nbytes, is_in_host=is_in_host)
            if write.is_lost:
                self._note_fallback("an accelerator could not copy saved tensors out; they stay where they are")
            elif write.error is not None:
                self.space.note_write_error(shipment.extent.file, write.error)
            for extent in shipment.dead_extents:
                self._drive.release(extent)
        return is_done

    # -- back ----------------------------------------------------------------------------------------------------

    def read(self, record: Record, memory: Allocation) -> tuple[Read, ...]:
        """Begins to bring a record's bytes to `memory`, which is kept alive until they are there."""
        read, (_, address, capacity, _) = self.engine.read, memory
        ready = fence(record.device.driver, record.stream)
        reads: list[Read] = []
        self._landings[record] = reads, memory  # first: nothing may be read to memory that an interrupt sets free
        for place in record.places:
            reads.append(read(place.write, place.piece, address + place.start, capacity - place.start, ready))
        return tuple(reads)

    def forget_reads(self, record: Record, *, is_handed_over: bool = False) -> None:
        """The record's reads are over, or nobody waits for them any more. Memory still being written to stays.

        `is_handed_over`: whoever uses the memory next waits for the copies, in stream order.
        """
        reads, memory = self._landings.pop(record)
        if self._request_log is not None:
            self._request_log.note_reads(record, reads)
        if not is_handed_over and not all([read.is_done for read in reads]):
            self._orphans.append((reads, memory))

    def abandon(self, places: tuple[Place, ...]) -> None:
        """Calls writes off and gives the extents back: now, or when the engine is done with them."""
        for place in places:
            shipment = None
            if not place.write.is_done:
                place.write.cancel(place.piece)
                shipment = next((s for s in self._shipments if s.write is place.write), None)
            if shipment is None:
                self._drive.release(place.extent)
            else:
                shipment.dead_extents.append(place.extent)

    def records_coming_back(self) -> list[Record]:
        """Records that are being read, or have been and were not asked for yet."""
        return list(self._landings)

    def records_under_way(self) -> list[Record]:
        """Records some of whose bytes may not be written yet."""
        return [record for shipment in self._shipments for record in shipment.cargo]

    def close(self, timeout_seconds: float) -> bool:
        """Ends the engine, frees slabs and gives the spill space back; `collect` says what still arrived.

        False when the drive does not answer: what it may still touch then stays as it is until the process ends.
        """
        if self._drive.is_closed or self.engine.is_closed:  # interrupted here before
            return self._drive.close(timeout_seconds)
        deadline = time.monotonic() + timeout_seconds
        for shipment in self._shipments:
            for piece in range(len(shipment.cargo)):
                shipment.write.cancel(piece)
        is_quiet = self._drive.wait_written([s.write for s in self._shipments], timeout_seconds) and all(
            read.wait(max(0.0, deadline - time.monotonic()))
            for reads, _ in (*self._landings.values(), *self._orphans)
            for read in reads
        )
        is_quiet = is_quiet and self._drive.close(max(0.0, deadline - time.monotonic()))
        if not is_quiet:
            self.retire_stuck(timeout_seconds)
            self._drive.give_up()
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))  # the kernel may still write to memory held here
        return is_quiet


def _address(record: Record) -> int:
    assert record.storage is not None
    return record.storage.data_ptr() + record.start
