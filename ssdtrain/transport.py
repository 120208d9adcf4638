"""One open engine with its spill files: sends records, brings them back, and looks after extents and requests.

Knows where records lie, but neither why they travel nor what their residency is: that is the store's, which also holds
the lock for every call except `wait_inflight`.

[Note: who keeps source memory alive]
A record holds its storage until the engine has copied the bytes to a slab; if the record is released before that, the
`_Shipment` still holds the storage until the engine says it does not read it any more. Likewise `_landings` holds the
destination of every read until the read is over, whatever becomes of its record.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ssdtrain.device import Allocation
from ssdtrain.engine import EngineChoice, Read, Write
from ssdtrain.record import Place, Record
from ssdtrain.space import Extent, SpillSpace


@dataclass
class _Shipment:
    """One write request and the records whose bytes it carries: record i is piece i."""

    write: Write
    extent: Extent
    cargo: list[Record]
    sources: list[torch.UntypedStorage | None]
    begun: float  # time.monotonic()
    dead_extents: list[Extent] = field(default_factory=list)


class Transport:
    """What exists between the opening and the closing of an engine."""

    def __init__(self, choice: EngineChoice, slab_nbytes: int, note_fallback: Callable[[str], None]) -> None:
        """Takes an open engine over.

        Raises:
            OSError: there is no room in any directory.
        """
        self.engine = choice.engine
        self.space = SpillSpace(choice.files, slab_nbytes, note_fallback)
        self.cancelled_nbytes = 0
        self._choice = choice
        self._seen_events = -1
        self._shipments: list[_Shipment] = []
        self._landings: dict[Record, tuple[tuple[Read, ...], Allocation]] = {}
        self._orphans: list[tuple[tuple[Read, ...], Allocation]] = []

    # -- out -----------------------------------------------------------------------------------------------------

    def send(self, cargo: list[Record]) -> bool:
        """Begins to write one record, striped when it is large, or several small ones as one request.

        False when there is no room; else every record has its places.
        """
        sizes = [self.space.rounded(record.nbytes) for record in cargo]
        extents = self.space.allocate(sum(sizes), stripe=len(cargo) == 1)
        if not extents:
            return False
        if len(cargo) == 1:
            self._send_alone(cargo[0], extents)
        else:
            self._send_together(cargo, sizes, extents[0])
        return True

    def _send_alone(self, record: Record, extents: list[Extent]) -> None:
        start, places = 0, []
        for extent in extents:
            nbytes = min(extent.nbytes, record.nbytes - start)
            write = self._write(extent, [record], [(_address(record) + start, nbytes, 0)])
            places.append(Place(self, write, 0, extent, start))
            start += extent.nbytes
        record.places = tuple(places)

    def _send_together(self, cargo: list[Record], sizes: list[int], extent: Extent) -> None:
        starts = [0, *itertools.accumulate(sizes)]
        pieces = [(_address(record), record.nbytes, start) for record, start in zip(cargo, starts, strict=False)]
        write = self._write(extent, cargo, pieces)
        for i, record in enumerate(cargo):
            own = Extent(extent.file, extent.offset + starts[i], sizes[i])
            record.places = (Place(self, write, i, own, 0),)

    def _write(self, extent: Extent, cargo: list[Record], pieces: list[tuple[int, int, int]]) -> Write:
        write = self.engine.write(extent.file, extent.offset, extent.nbytes, pieces)
        sources = [record.storage for record in cargo]
        self._shipments.append(_Shipment(write, extent, cargo, sources, time.monotonic()))
        return write

    def wait_inflight(self, max_nbytes: int, timeout_seconds: float) -> bool:
        """Blocks until at most `max_nbytes` are on their way out; false when the time is over first."""
        return self.engine.wait_inflight(max_nbytes, timeout_seconds)

    def retire_stuck(self, timeout_seconds: float) -> bool:
        """Retires the directories of writes that began too long ago; whether there are any."""
        before = time.monotonic() - timeout_seconds
        stuck = [shipment for shipment in self._shipments if shipment.begun < before and not shipment.write.is_done]
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
            if write.error is not None:
                self.space.note_write_error(shipment.extent.file, write.error)
            for extent in shipment.dead_extents:
                self.space.release(extent)
        return is_done

    # -- back ----------------------------------------------------------------------------------------------------

    def read(self, record: Record, memory: Allocation) -> tuple[Read, ...]:
        """Begins to bring a record's bytes to `memory`, which is kept alive until they are there."""
        read, (_, address, capacity) = self.engine.read, memory
        reads = tuple([read(p.write, p.piece, address + p.start, capacity - p.start) for p in record.places])
        self._landings[record] = reads, memory
        return reads

    def forget_reads(self, record: Record) -> None:
        """The record's reads are over, or nobody waits for them any more."""
        reads, memory = self._landings.pop(record)
        if not all([read.is_done for read in reads]):
            self._orphans.append((reads, memory))

    def abandon(self, places: tuple[Place, ...]) -> None:
        """Calls writes off and gives the extents back: now, or when the engine is done with them."""
        for place in places:
            shipment = None
            if not place.write.is_done:
                place.write.cancel(place.piece)
                shipment = next((s for s in self._shipments if s.write is place.write), None)
            if shipment is None:
                self.space.release(place.extent)
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
        deadline = time.monotonic() + timeout_seconds
        for shipment in self._shipments:
            for piece in range(len(shipment.cargo)):
                shipment.write.cancel(piece)
        is_quiet = self.engine.wait_inflight(0, timeout_seconds) and all(
            read.wait(max(0.0, deadline - time.monotonic()))
            for reads, _ in (*self._landings.values(), *self._orphans)
            for read in reads
        )
        if is_quiet:
            self._choice.close()
        else:
            self.retire_stuck(timeout_seconds)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))  # the kernel may still write to memory held here
        return is_quiet


def _address(record: Record) -> int:
    assert record.storage is not None
    return record.storage.data_ptr() + record.start
