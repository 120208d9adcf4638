"""The way back: bytes forwarded from memory, reloads on demand and ahead of need, and who holds what they brought.

Called by the store, under its lock; nothing here blocks. See [Note: who keeps source memory alive] in `transport` for
memory that is still being written to.

[Note: handing out in stream order]
Bytes of an accelerator may be handed out before they are there: the stream that asks is told to wait for the copy. Any
other stream that asks later is told so too, and the memory, allocated on one stream, is shared with those others.
"""

from __future__ import annotations

import errno
import time
from collections import deque

import torch

from ssdtrain.devices.registry import Devices
from ssdtrain.io.engine import Read
from ssdtrain.policy import ActivationPolicy
from ssdtrain.stats import Counters
from ssdtrain.store.identity import live_storage
from ssdtrain.store.pending import Segment, hand_out
from ssdtrain.store.poison import ClosedError
from ssdtrain.store.record import Residency, SavedRecord
from ssdtrain.store.tensor_store import TensorStore

_AWAY = Residency.DISK | Residency.HOST | Residency.OFFLOADING
_MAX_SHARED = 8  # records before looking which of them autograd has dropped

HandedOut = tuple[torch.UntypedStorage, int, int]
"""A record's bytes in memory: the storage, how many bytes into the source it begins, and which reload it is."""


class Reloads:
    """Records that backward wants, or will soon."""

    def __init__(self, policy: ActivationPolicy, counters: Counters, devices: Devices) -> None:
        """Nothing is under way. `transport` is the store's, None while no engine is open."""
        self.transport: TensorStore | None = None
        self._policy = policy
        self._counters = counters
        self._devices = devices
        self._shared: dict[SavedRecord, None] = {}
        self._prefetched: deque[SavedRecord] = deque()

    # -- what backward asks for ------------------------------------------------------------------------------------

    def request(self, record: SavedRecord, epoch: int) -> tuple[HandedOut | None, bool]:
        """See `Store.request`."""
        record.is_wanted = True
        self._leave_prefetched(record)
        storage = self._take(record)
        if storage is not None:
            return self._hand_out(record, epoch, storage), False
        if record.residency is Residency.RELOADING:
            return None, False
        self._demand(record)
        return None, True

    def take_or_demand(self, record: SavedRecord, epoch: int) -> HandedOut | None:
        """The bytes if they are there; else a reload is under way."""
        storage = self._take(record)
        if storage is not None:
            return self._hand_out(record, epoch, storage)
        if record.residency is not Residency.RELOADING:  # another thread's reload came and went, or failed
            self._demand(record)
        return None

    def prefetch(self, record: SavedRecord) -> bool:
        """See `Store.prefetch`. What has not left yet, waiting for company, does not leave any more."""
        if record.residency is Residency.DEVICE:
            record.is_wanted = True
        if not record.residency & _AWAY or self._in_memory(record) is not None:
            return True
        ahead, most = self._counters.prefetched_nbytes, self._counters.prefetch_limit_nbytes
        if ahead + record.nbytes > most and (ahead or not most):  # one may always come
            return False
        try:
            self.begin(record)
        except (MemoryError, torch.OutOfMemoryError, ClosedError):  # not needed yet, and then there may be room
            return False
        assert record.pending_read is not None
        record.pending_read.is_ahead = record.is_prefetched = True
        self._prefetched.append(record)
        self._counters.num_prefetched += 1
        self._counters.prefetched_nbytes += record.nbytes
        return True

    def check_stuck(self, record: SavedRecord, reads: tuple[Read, ...]) -> None:
        """Raises when the drive has not answered in time; the bytes may have come just now."""
        late = [place for place, read in zip(record.segments, reads, strict=False) if not read.is_issued]
        if not late:
            return
        if self.transport is not None:
            self.transport.pending.retire_silent()
        why = f"no answer from the drive for {self._policy.io_timeout_seconds:g} s"
        raise _read_error(record, late[0], (errno.ETIMEDOUT, late[0].extent.offset, late[0].extent.nbytes, why))

    def _demand(self, record: SavedRecord) -> None:
        self._drop_mispredicted()
        self.begin(record)
        self._counters.num_demand_reloads += 1

    def _hand_out(self, record: SavedRecord, epoch: int, storage: torch.UntypedStorage) -> HandedOut:
        """After the last handle asked, autograd alone holds the memory."""
        if record.device.driver is not None and record.epoch:
            self._order_streams(record, storage)
        if epoch != record.epoch:
            record.num_unseen -= 1
        if record.num_unseen <= 0:
            self.share(record)
        return storage, record.start if record.epoch else 0, record.epoch

    def _order_streams(self, record: SavedRecord, storage: torch.UntypedStorage) -> None:
        """See [Note: handing out in stream order]."""
        if all([read.is_done for read in record.queued_reads]):
            record.queued_reads = ()
        hand_out(storage, record.device, record.stream, record.queued_reads)

    # -- in memory, or on its way --------------------------------------------------------------------------------------

    def _take(self, record: SavedRecord) -> torch.UntypedStorage | None:
        if record.residency is not Residency.RELOADING:
            return self._in_memory(record)
        return self._finish(record) if all([read.is_issued for read in record.reads]) else None

    def _in_memory(self, record: SavedRecord) -> torch.UntypedStorage | None:
        """Bytes that never left or are back, held here or by somebody else; calls a write under way off."""
        storage = record.storage
        if storage is None and record.residency is not Residency.RELOADING:
            storage = live_storage(record.weak)
            if storage is None or storage.nbytes() != (record.nbytes if record.epoch else record.storage_nbytes):
                return None
            if record.epoch == 0:  # the source, held by the user: home again
                record.storage = storage
                self._hold(record.nbytes)
        if storage is not None and record.epoch == 0 and record.residency is not Residency.DEVICE:
            self.forward(record)
        return storage

    def forward(self, record: SavedRecord) -> None:
        """Makes memory the home of a record whose source is held: what is written or being written is not needed."""
        record.is_wanted = True
        self._counters.forwarded_nbytes += record.nbytes
        self._release_segments(record)
        record.move(Residency.DEVICE)

    def begin(self, record: SavedRecord) -> None:
        """Begins a reload into fresh memory of the current stream.

        Raises:
            ClosedError: the engine that has the bytes is closed, or a parent process's.
            MemoryError, torch.OutOfMemoryError: no memory.
        """
        transport = self.transport
        if transport is None or record.segments[0].drive is not transport.drive:
            raise ClosedError(
                "Expected an open offload for backward, got one closed, of the parent process, or interrupted in the "
                f"middle of its bookkeeping; {record.name} was in its spill file. Call close() after the last "
                "backward, run backward where forward ran, and after an interrupt run the step again"
            )
        record.pending_read = transport.read(record)
        record.stream, record.reads = record.pending_read.stream, tuple(record.pending_read.reads)
        record.move(Residency.RELOADING)
        self._hold(record.nbytes, record.device.idle_nbytes())

    def _finish(self, record: SavedRecord) -> torch.UntypedStorage | None:
        """The bytes that came. None when they did not, but nobody had waited for them yet: a demand tries again."""
        assert record.pending_read is not None
        reads, memory, is_ahead = record.reads, record.pending_read.memory, record.pending_read.is_ahead
        failed = next((read for read in reads if read.error is not None), None)
        self._forget_reads(record, is_handed_over=failed is None)
        for place, read in zip(record.segments, reads, strict=True):
            if read.error is not None:
                self._note_failed(record, place, read.error)
                if is_ahead:
                    return None
                raise _read_error(record, place, read.error)
            if self._home(record) is Residency.HOST:
                self._counters.host_read_nbytes += read.forwarded_nbytes
            else:
                self._counters.forwarded_nbytes += read.forwarded_nbytes
        record.move(Residency.DEVICE)
        record.storage = memory.storage
        record.weak = memory.weak
        record.queued_reads = reads if record.device.driver is not None else ()
        record.epoch += 1
        record.num_unseen = record.num_handles
        if not all([place.write.is_done for place in record.segments]):
            self._release_segments(record)
        return memory.storage

    def _note_failed(self, record: SavedRecord, place: Segment, error: tuple[int, int, int, str]) -> None:
        record.move(self._home(record))
        self._counters.hold(-record.nbytes)
        if error[0] != errno.EREMOTEIO:  # that one is the device's, not the drive's
            place.drive.space.note_read_error(place.extent.file, error)

    def _forget_reads(self, record: SavedRecord, *, is_handed_over: bool = False) -> None:
        record.reads, record.pending_read = (), None
        if self.transport is not None and record.segments[0].drive is self.transport.drive:
            self.transport.forget_reads(record, is_handed_over=is_handed_over)

    def give_up(self, record: SavedRecord) -> None:
        """Forgets a reload under way that is not ours."""
        record.reads, record.pending_read = (), None
        if record.residency is Residency.RELOADING:
            record.move(self._home(record))
            self._counters.hold(-record.nbytes)

    def _home(self, record: SavedRecord) -> Residency:
        return Residency.HOST if record.segments[0].is_in_host else Residency.DISK

    # -- ahead of need ---------------------------------------------------------------------------------------------

    def _drop_mispredicted(self) -> None:
        """A miss while prefetched records wait means that these were guessed wrong: the oldest half makes room."""
        for record in list(self._prefetched)[: (len(self._prefetched) + 1) // 2]:
            if all([read.is_done for read in record.reads]):
                self._leave_prefetched(record)
                record.move(self._home(record))
                self._forget_reads(record)
                self._counters.hold(-record.nbytes)

    def _leave_prefetched(self, record: SavedRecord) -> None:
        if record.is_prefetched and not record.pass_.is_abandoned:
            record.is_prefetched = False
            self._prefetched.remove(record)
            self._counters.prefetched_nbytes -= record.nbytes

    # -- letting go ------------------------------------------------------------------------------------------------

    def share(self, record: SavedRecord) -> None:
        """Autograd has the memory and the drive the bytes: the record holds neither, and shares what is still alive."""
        if record.residency is Residency.DEVICE and record.segments and not record.pass_.is_abandoned:
            record.move(self._home(record))
            record.storage = None
            if record.is_shared:
                self._counters.hold(-record.nbytes)
            else:
                record.is_shared = True
                self._shared[record] = None

    def drop_many_expired(self) -> None:
        """`drop_expired`, when it is worth the look."""
        if len(self._shared) > _MAX_SHARED:
            self.drop_expired()

    def drop_expired(self) -> None:
        """Takes note of memory that autograd has dropped."""
        for record in [record for record in self._shared if record.weak.expired()]:
            self._drop_shared(record)

    def _drop_shared(self, record: SavedRecord) -> None:
        record.is_shared = False
        del self._shared[record]
        self._counters.hold(-record.nbytes)

    def release(self, record: SavedRecord) -> None:
        """The graph let the record go: its requests and places are nobody's."""
        self._leave_prefetched(record)
        if record.is_shared:
            self._drop_shared(record)
        if record.reads:
            self._forget_reads(record)
        self._release_segments(record)

    def _release_segments(self, record: SavedRecord) -> None:
        places, record.segments = record.segments, ()
        if places and self.transport is not None and places[0].drive is self.transport.drive:
            self.transport.pending.release(places)

    def forget_engine(self) -> None:
        """What is in memory stays."""
        self.transport = None
        self._devices.trim()
        for record in list(self._prefetched):
            self._leave_prefetched(record)

    def forget_records(self) -> None:
        """Nothing is known of any record."""
        self._shared, self._prefetched, self._counters.prefetched_nbytes = {}, deque(), 0

    def _hold(self, nbytes: int, idle_nbytes: int = 0) -> None:
        engine = self.transport.engine if self.transport is not None else None
        self._counters.hold(nbytes, (engine.staging_in_use_nbytes if engine is not None else 0) + idle_nbytes)


def wait_for_reads(places: tuple[Segment, ...], reads: tuple[Read, ...], timeout_seconds: float) -> tuple[float, bool]:
    """Blocks until the bytes are there in stream order; for how long, and whether they are. Called without the lock."""
    begin = time.perf_counter()
    for read in reads:
        read.expedite()
    are_there = all(
        place.drive.wait(read.wait_issued, timeout_seconds, file=place.extent.file)
        for place, read in zip(places, reads, strict=False)
    )
    return time.perf_counter() - begin, are_there


def _read_error(record: SavedRecord, place: Segment, error: tuple[int, int, int, str]) -> OSError:
    number, offset, nbytes, message = error
    where = "the host tier" if place.is_in_host else "the spill file"
    return OSError(
        number or errno.EIO,
        f"Expected {nbytes} bytes of {record.name} at offset {offset} of {where}, got: {message} (errno {number});"
        " the activation is lost and this backward cannot go on. Check the drive, then run the step again",
        None if place.is_in_host else place.drive.space.directory(place.extent.file),
    )
