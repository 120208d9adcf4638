"""The way back: bytes forwarded from memory, reloads on demand and ahead of need, and who holds what they brought.

Called under the lock of `writeback`; nothing here blocks. See [Note: who keeps source memory alive] in `tensor_store`
for memory that is still being written to.

[Note: handing out in stream order]
Bytes of an accelerator may be handed out before they are there: the stream that asks is told to wait for the copy. Any
other stream that asks later is told so too, and the memory, allocated on one stream, is shared with those others.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable

import torch

from ssdtrain.activations.open_drive import DriveSource
from ssdtrain.scheduling.in_flight import Limits
from ssdtrain.store.identity import live_storage
from ssdtrain.store.pending import Problem, Segment, are_done, hand_out
from ssdtrain.store.poisonable_lock import ClosedError
from ssdtrain.store.record import Residency, SavedRecord
from ssdtrain.tracing.spans import span

_AWAY = Residency.DISK | Residency.HOST | Residency.OFFLOADING | Residency.SHARED

HandedOut = tuple[torch.UntypedStorage, int, int]
"""A record's bytes in memory: the storage, how many bytes into the source it begins, and which reload it is."""


class Reloads:
    """Records that backward wants, or will soon."""

    def __init__(self, source: DriveSource, limits: Limits) -> None:
        """Nothing is under way."""
        self._source, self._counters, self._timeout_seconds = source, source.counters, source.policy.io_timeout_seconds
        self._limits = limits
        self._under_way: dict[SavedRecord, None] = {}  # being read, or read and not asked for yet
        self._prefetched: deque[SavedRecord] = deque()
        self.shared: dict[SavedRecord, None] = {}

    # -- what backward asks for ------------------------------------------------------------------------------------

    def request(self, record: SavedRecord, epoch: int) -> tuple[HandedOut | None, bool]:
        """Backward wants a record: its bytes if they are in memory, else a reload is begun or on its way.

        `epoch` is the reload that the asking handle saw last. The second value is whether a reload had to be begun.
        """
        record.is_wanted = True
        if record.is_prefetched:
            self._leave_prefetched(record)
        handed_out = self._take(record, epoch)
        if handed_out is not None or record.residency is Residency.RELOADING:
            return handed_out, False
        self._demand(record)
        return None, True

    def take_or_demand(self, record: SavedRecord, epoch: int) -> HandedOut | None:
        """The bytes if they are there; else a reload is under way."""
        handed_out = self._take(record, epoch)
        if handed_out is None and record.residency is not Residency.RELOADING:
            self._demand(record)  # another thread's reload came and went, or failed
        return handed_out

    def prefetch(self, record: SavedRecord) -> bool:
        """Begins a reload ahead of need; False when the budget is used up.

        What has not left yet, waiting for company, does not leave any more.
        """
        residency = record.residency
        if residency is Residency.DEVICE:
            record.is_wanted = True
        if not residency & _AWAY or self._in_memory(record) is not None:
            return True
        counters, nbytes = self._counters, record.nbytes
        ahead, most = counters.prefetched_nbytes, counters.prefetch_limit_nbytes
        most = min(most, self._source.buffers.prefetch_nbytes)
        if not self._limits.may_come_back(nbytes, is_on_host=record.device.driver is None):
            return False
        if ahead + nbytes > most and (ahead or not most):  # one may always come
            return False
        try:
            self.begin(record, is_ahead=True)
        except (MemoryError, torch.OutOfMemoryError, ClosedError):  # not needed yet, and then there may be room
            return False
        record.is_prefetched = True
        self._prefetched.append(record)
        counters.num_prefetched += 1
        counters.prefetched_nbytes += nbytes
        return True

    def prefetch_all(self, upcoming: Iterable[SavedRecord]) -> None:
        """Begins reloads ahead of need, one after the other, until the budget is used up."""
        for record in upcoming:
            if not self.prefetch(record):
                return

    def check_stuck(self, record: SavedRecord) -> None:
        """Raises when the drive has not answered in time; the bytes may have come just now."""
        pending = record.pending_read
        if pending is None or pending.is_issued:
            return
        if self._source.store is not None:
            self._source.store.pending.retire_silent()
        problem = pending.problem(self._timeout_seconds)
        if problem is not None:
            raise _read_error(record, *problem)

    def _demand(self, record: SavedRecord) -> None:
        self._drop_mispredicted(record)
        self.begin(record)
        self._counters.num_demand_reloads += 1

    def _take(self, record: SavedRecord, epoch: int) -> HandedOut | None:
        """A record's bytes, if they are in memory. After the last handle asked, autograd alone holds them."""
        if record.residency is Residency.RELOADING:
            pending = record.pending_read
            assert pending is not None
            storage = self._finish(record) if pending.is_issued else None
        else:
            storage = self._in_memory(record)
        if storage is None:
            return None
        if record.epoch and record.device.driver is not None:
            self._order_streams(record, storage)
        if epoch != record.epoch:
            record.num_unseen -= 1
        if record.num_unseen <= 0 and record.residency is Residency.DEVICE:
            self.share(record)
        return storage, record.start if record.epoch else 0, record.epoch

    def _order_streams(self, record: SavedRecord, storage: torch.UntypedStorage) -> None:
        """See [Note: handing out in stream order]."""
        if are_done(record.queued_reads):
            record.queued_reads = ()
        hand_out(storage, record.device, record.stream, record.queued_reads)

    # -- in memory, or on its way --------------------------------------------------------------------------------------

    def _in_memory(self, record: SavedRecord) -> torch.UntypedStorage | None:
        """Bytes that never left or are back, held here or by somebody else; calls a write under way off."""
        storage = record.storage
        if storage is None:
            storage = live_storage(record.weak)
            if storage is None or storage.nbytes() != (record.nbytes if record.epoch else record.storage_nbytes):
                return None
            if record.epoch == 0:  # the source, held by the user: home again
                record.storage = storage
                self._hold(record.nbytes)
        if record.epoch == 0 and record.residency is not Residency.DEVICE:
            self.forward(record)
        return storage

    def forward(self, record: SavedRecord) -> None:
        """Makes memory the home of a record whose source is held: what is written or being written is not needed."""
        record.is_wanted = True
        self._counters.forwarded_nbytes += record.nbytes
        self._release_segments(record)
        record.move(Residency.DEVICE)

    def begin(self, record: SavedRecord, *, is_ahead: bool = False) -> None:
        """Begins a reload into fresh memory of the current stream. `is_ahead`: nobody waits for it yet.

        Raises:
            ClosedError: the engine that has the bytes is closed, or a parent process's.
            MemoryError, torch.OutOfMemoryError: no memory.
        """
        store, device = self._source.store, record.device
        if store is None or record.segments[0].drive is not store.drive:
            raise ClosedError(
                "Expected an open offload for backward, got one closed, of the parent process, or interrupted in the "
                f"middle of its bookkeeping; {record.name} was in its spill file. Call close() after the last "
                "backward, run backward where forward ran, and after an interrupt run the step again"
            )
        if record.residency is Residency.SHARED:
            self._drop_shared(record)
        with span("reload", record):
            pending = store.read(record, device)
        pending.is_ahead = is_ahead
        record.pending_read, record.stream = pending, pending.stream
        self._under_way[record] = None
        record.move(Residency.RELOADING)
        self._counters.hold(record.nbytes, store.engine.staging_in_use_nbytes, device.idle_nbytes())

    def _finish(self, record: SavedRecord) -> torch.UntypedStorage | None:
        """The bytes that came. None when they did not, but nobody had waited for them yet: a demand tries again."""
        pending = record.pending_read
        assert pending is not None
        problem = pending.problem(self._timeout_seconds)
        reads, memory = pending.reads, pending.memory
        self._end_read(record, is_handed_over=problem is None)
        if problem is not None:
            record.move(record.home)
            self._counters.hold(-record.nbytes)
            if pending.is_ahead:
                return None
            raise _read_error(record, *problem)
        for read in reads:
            if nbytes := read.forwarded_nbytes:
                self._count_forwarded(record, nbytes)
        record.move(Residency.DEVICE)
        record.storage, record.weak = memory.storage, memory.weak
        record.queued_reads = reads if record.device.driver is not None else ()
        record.epoch += 1
        record.num_unseen = record.num_handles
        for segment in record.segments:
            if not segment.write.is_done:
                self._release_segments(record)
                break
        return memory.storage

    def _count_forwarded(self, record: SavedRecord, nbytes: int) -> None:
        if record.segments[0].is_in_host:
            self._counters.host_read_nbytes += nbytes
        else:
            self._counters.forwarded_nbytes += nbytes

    def _end_read(self, record: SavedRecord, *, is_handed_over: bool) -> None:
        pending, record.pending_read, store = record.pending_read, None, self._source.store
        self._under_way.pop(record, None)
        if pending is not None and store is not None and record.segments[0].drive is store.drive:
            store.end_read(pending, is_handed_over=is_handed_over)

    def give_up(self) -> None:
        """Forgets all reloads under way, which are not ours any more."""
        under_way, self._under_way = self._under_way, {}
        for record in under_way:
            record.pending_read = None
            if record.residency is Residency.RELOADING:
                record.move(record.home)
                self._counters.hold(-record.nbytes)

    # -- ahead of need ---------------------------------------------------------------------------------------------

    def _drop_mispredicted(self, missed: SavedRecord) -> None:
        """A miss means that what was to come before it was guessed wrong: the oldest half of that makes room.

        What is to come later stays: it will be wanted.
        """
        pass_, ranks = missed.pass_, missed.pass_.rank
        rank = ranks.get(missed.index, -1)
        wrong = [r for r in self._prefetched if r.pass_ is not pass_ or ranks.get(r.index, -1) < rank]
        for record in wrong[: (len(wrong) + 1) // 2]:
            pending = record.pending_read
            if pending is not None and are_done(pending.reads):
                self._send_back(record)

    def drop_prefetched(self, nbytes: int) -> int:
        """Lets go of at least `nbytes` that came early, what is needed last first; how many they were."""
        dropped = 0
        for record in reversed(self._prefetched.copy()):
            pending = record.pending_read
            if dropped < nbytes and pending is not None and are_done(pending.reads):
                self._send_back(record)
                dropped += record.nbytes
        return dropped

    def _send_back(self, record: SavedRecord) -> None:
        """What came early goes, and comes again when it is asked for."""
        self._leave_prefetched(record)
        record.move(record.home)
        self._end_read(record, is_handed_over=False)
        self._counters.hold(-record.nbytes)

    def _leave_prefetched(self, record: SavedRecord) -> None:
        if record.is_prefetched and not record.pass_.step.is_abandoned:
            record.is_prefetched = False
            self._prefetched.remove(record)
            self._counters.prefetched_nbytes -= record.nbytes

    # -- letting go ------------------------------------------------------------------------------------------------

    def share(self, record: SavedRecord) -> None:
        """Autograd has the memory and the drive the bytes: the record holds neither, and finds what is still alive."""
        if record.residency is Residency.DEVICE and record.segments and not record.pass_.step.is_abandoned:
            record.move(Residency.SHARED)
            record.storage = None
            self.shared[record] = None

    def drop_expired(self) -> None:
        """Takes note of memory that autograd has dropped."""
        for record in [record for record in self.shared if record.weak.expired()]:
            self._drop_shared(record)

    def _drop_shared(self, record: SavedRecord) -> None:
        record.move(record.home)
        del self.shared[record]
        self._counters.hold(-record.nbytes)

    def release(self, record: SavedRecord) -> None:
        """The graph let the record go: its requests and segments are nobody's. The caller counts its memory."""
        if record.is_prefetched:
            self._leave_prefetched(record)
        self.shared.pop(record, None)
        if record.pending_read is not None:
            self._end_read(record, is_handed_over=False)
        store, segments, record.segments = self._source.store, record.segments, ()
        if segments and store is not None and segments[0].drive is store.drive:
            store.pending.release(segments)

    def _release_segments(self, record: SavedRecord) -> None:
        store = self._source.store
        if store is not None:
            store.release(record)
        else:
            record.segments = ()

    def forget_engine(self) -> None:
        """What is in memory stays."""
        for record in list(self._prefetched):
            self._leave_prefetched(record)

    def forget_records(self) -> None:
        """Nothing is known of any record."""
        self.shared, self._prefetched, self._counters.prefetched_nbytes = {}, deque(), 0

    def _hold(self, nbytes: int) -> None:
        store = self._source.store
        self._counters.hold(nbytes, store.engine.staging_in_use_nbytes if store is not None else 0)


def _read_error(record: SavedRecord, segment: Segment, problem: Problem) -> OSError:
    number, offset, nbytes, message = problem
    where = "the host tier" if segment.is_in_host else "the spill file"
    return OSError(
        number or errno.EIO,
        f"Expected {nbytes} bytes of {record.name} at offset {offset} of {where}, got: {message} (errno {number});"
        " the activation is lost and this backward cannot go on. Check the drive, then run the step again",
        None if segment.is_in_host else segment.drive.space.directory(segment.extent.file),
    )
