"""Moves bytes out and keeps the books: which records there are, what the engine has done, who holds what.

It does not know why a record travels or which one is next; `activations` and `schedule` do. The way back is
`ssdtrain.activations.reload`, driven from here. Everything it owns (engine, counters aside) lives and ends with it.

[Note: the lock]
One lock guards records, extents and requests; every change is also bracketed, see [Note: unfinished changes]. It is
never held while bytes move or a thread waits, and nothing that runs in a destructor waits for it: a dying handle leaves
a note in `_to_release`, which the next holder works off.

[Note: opening]
A drive may be stuck when files are opened on it, or never answer. Whoever opens waits for `io_timeout_seconds` at most,
without the lock; `_opening` has others who would open wait for the same. Files are opened once: between two engines
they are kept, and empty.

[Note: the queue]
What a plan sends joins the engine's queue also beyond `staging_nbytes`: a plan knows how fast the drive is, not to the
millisecond when a write is over. It costs no memory, as slabs bound what is copied, and what waits for a slab would
else be kept for good; if backward wants it first, its write is called off. The queue has an end too, which only a drive
gets to see that is much slower than planned. Without a plan what the drive has no time for is kept at once.

[Note: waiting for an accelerator]
The bytes in flight are bounded. When the bound is reached because the drive is behind, mode "auto" keeps the tensor.
When it is reached because training runs ahead of an accelerator, which has not even computed what is to be copied, it
waits until the accelerator is there: the accelerator has work meanwhile, and memory could not fall otherwise.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from ssdtrain.activations.drive_source import Attach, DriveSource
from ssdtrain.activations.limits import Limits
from ssdtrain.activations.reload import HandedOut, Reloads, wait_for_reads
from ssdtrain.activations.storage_index import Index
from ssdtrain.devices.base import Device
from ssdtrain.devices.registry import Devices
from ssdtrain.io.client import Drive
from ssdtrain.io.engine import Fence
from ssdtrain.io.open_engine import slab_nbytes_for
from ssdtrain.policy import ActivationPolicy
from ssdtrain.stats import Counters
from ssdtrain.store.poison import PoisonableLock
from ssdtrain.store.record import Residency, SavedRecord
from ssdtrain.store.tensor_store import TensorStore
from ssdtrain.tracing.request_log import RequestLog

logger = logging.getLogger("ssdtrain")

_MAX_QUEUE = 256  # writes that a plan may have under way
_HELD_SHARE = 4  # of staging: sources that an accelerator is yet to copy, before they are let go in stream order


class Store:
    """The bytes of all records of one offload context."""

    def __init__(
        self,
        directories: Sequence[str],
        policy: ActivationPolicy,
        counters: Counters,
        index: Index,
        devices: Devices,
        attach: Attach | None = None,
    ) -> None:
        """Remembers what to open; `open` opens it. `attach`: takes a share of another's drive instead."""
        self.lock = PoisonableLock(self.reset)
        self.on_reset: Callable[[], None] = _nothing  # under the lock, when all that is filed is given up
        self.on_fork: Callable[[], None] = _nothing  # in the child
        _leave_to_parent_in_child(self)
        self.counters = counters
        self.note_fallback = partial(_note_fallback, counters)  # knows no store: nothing here keeps itself alive
        """Warns once and remembers why something did not go the best way."""
        self.request_log: RequestLog | None = None  # of whoever records the run
        self.index = index
        self.devices = devices
        self._limits = Limits(policy, counters)
        self._reloads = Reloads(policy, counters, devices)
        self._num_entered = 0  # contexts that are active now
        self._is_patient = policy.is_patient  # waits for the drive rather than keeping
        self._source = DriveSource(directories, policy, devices, self.note_fallback, attach)
        self._why_closed = ""  # to be said when more is saved
        self._policy = policy
        self._slab_nbytes = slab_nbytes_for(policy.staging_nbytes)
        self._transport: TensorStore | None = None
        self._drive: Drive | None = None  # the transport's
        self._opening = threading.Lock()  # see [Note: opening]
        self._to_release: deque[tuple[SavedRecord, int]] = deque()
        self._batch: list[SavedRecord] = []
        self._batch_nbytes = 0

    # -- life ----------------------------------------------------------------------------------------------------

    def why_not(self, device: Device) -> str | None:
        """Why no engine would move tensors of `device` now, or None."""
        transport = self._transport
        if transport is None:
            if self._why_closed:
                self.note_fallback(self._why_closed)
            return "no engine open in this process"
        if device.driver is not None and transport.moves_host_memory_only:
            return "engine python moves host memory only"
        return None

    def open(self) -> None:
        """Opens spill files and an engine; nothing to do when they are open.

        Raises:
            OSError: a directory cannot be used; errno and filename say which and why.
            RuntimeError: the engine asked for by name is not available.
        """
        with self._opening:
            self._ensure_open()

    def enter(self) -> None:
        """A context becomes active: the engine is open from here on, unless the drive has become unusable meanwhile."""
        with self.lock.mutex, self.lock:
            self._num_entered += 1
        try:
            with self._opening:
                self._open_again(self._ensure_open)
        except BaseException:  # Ctrl-C: no `leave` will follow
            with self.lock.mutex, self.lock:
                self._num_entered -= 1
            raise

    def leave(self) -> None:
        """A context ends; the engine lives on while records do."""
        with self.lock.mutex, self.lock:
            self._num_entered -= 1
            self._settle()
            self._close_if_idle()
        self.process_releases()
        self._source.settle()

    def close(self) -> None:
        """Ends the engine and frees slabs and spill files. Records whose bytes were only there are lost."""
        self._why_closed = "closed inside its context: nothing that is saved in it from here on moves"
        with self.lock.mutex, self.lock:
            self._close()
        self.process_releases()
        self._source.close()

    def __del__(self) -> None:
        """The last handle and the context are gone: nobody is left to close it."""
        try:
            self._close()
            self._source.close()
        except Exception:
            pass

    def engine_totals(self) -> Counters:
        """A copy of the counters with what the open engine has done so far."""
        with self.lock.mutex, self.lock:
            self._settle()
            self._reloads.drop_expired()
            totals = self.counters.copy()
            self._add_totals(totals)
        self.process_releases()
        return totals

    def _add_totals(self, counters: Counters) -> None:
        transport = self._transport
        if transport is not None:
            counters.add_engine(transport.totals(), transport.space.peak_nbytes)
            counters.cancelled_write_nbytes += transport.cancelled_nbytes
            counters.host_limit_nbytes = transport.drive.host_nbytes
            if transport.host is not None:
                counters.peak_host_nbytes = max(counters.peak_host_nbytes, transport.host.peak_nbytes)

    def _ensure_open(self) -> None:
        """See [Note: opening]. The caller holds `_opening`, not the lock."""
        if self._transport is not None:
            return
        drive = self._source.open(self._slab_nbytes)
        if drive is None:
            return
        try:
            with self.lock.mutex, self.lock:
                if self._transport is None:
                    self._take_over(drive)
        finally:
            if self._drive is not drive:  # Ctrl-C, or opened meanwhile: nobody else knows this engine
                drive.discard()

    def _take_over(self, drive: Drive) -> None:
        transport = TensorStore(drive, self._policy, self.note_fallback, self.request_log)
        self._transport = self._reloads.transport = transport
        self._drive = drive
        self._allow_in_flight()
        self._slab_nbytes = drive.engine.slab_nbytes
        if self.counters.engine != drive.kind:
            self.counters.engine, self.counters.engine_reason = drive.kind, drive.reason
        for text in drive.shortcomings():
            self.note_fallback(text)

    def _allow_in_flight(self) -> None:
        if self._transport is not None:
            self._transport.pending.allow(self.counters.staging_limit_nbytes)

    def _open_again(self, ensure_open: Callable[[], None]) -> None:
        try:
            ensure_open()
        except (OSError, RuntimeError) as error:
            self.note_fallback(f"the engine could not be opened again, tensors stay in memory: {error}")

    def _open_torn(self) -> None:
        """As `_ensure_open`, under the lock: nobody else may go on before."""
        drive = self._source.open(self._slab_nbytes)
        if drive is not None:
            self._take_over(drive)

    def _close(self) -> None:
        transport = self._transport
        if transport is not None:
            for record in transport.records_under_way():
                if record.residency is Residency.OFFLOADING and record.storage is not None:
                    self._reloads.forward(record)
            if not transport.pending.close():
                self.note_fallback("the drive is stuck: memory and threads of its requests stay until the process ends")
            self._settle()
            self._add_totals(self.counters)
            self._source.take_back(self._drive, transport.space.retired)
        self.forget_engine()

    def reset(self) -> None:
        """See [Note: unfinished changes]. What is in memory stays with its handles; what only the drive has is lost."""
        transport = self._transport
        if transport is not None:
            transport.pending.close()
            for record in transport.records_coming_back():
                self._reloads.give_up(record)
            self._add_totals(self.counters)
            self._source.take_back(self._drive, transport.space.retired)
        self.on_reset()
        self.index.forget_records()
        self._reloads.forget_records()
        self.forget_engine()
        self.counters.num_live_records, self.counters.held_nbytes = 0, self.counters.resident_nbytes
        self.note_fallback("interrupted in the middle of its bookkeeping: began anew, without what was on the drive")
        if self._num_entered:
            self._open_again(self._open_torn)

    def leave_to_parent(self) -> None:
        """This is a forked child: the engine is the parent's, and so are its reads under way.

        The lock is a new one: a thread that only the parent has may hold the inherited one.
        """
        self.lock.renew()
        self._opening = threading.Lock()
        self._source.leave_to_parent()
        self.on_fork()
        self._why_closed = (
            "this is a forked child: the engine is the parent's, and nothing that is saved here moves; enter the "
            "context, or make another, in the child"
        )
        for record in self._transport.records_coming_back() if self._transport is not None else ():
            self._reloads.give_up(record)
        self.forget_engine()
        self.request_log = None

    def forget_engine(self) -> None:
        """What is in memory stays; the next context opens another engine."""
        self._batch, self._batch_nbytes, self._transport, self._drive = [], 0, None, None
        self._reloads.forget_engine()

    def _close_if_idle(self) -> None:
        """Closes when no context is active and no record is left; the next context opens again.

        Not with an accelerator: the process would wait for it, and pinning memory anew costs more than a step. Nor when
        the drive is another's: its engine would stay open anyway.
        """
        transport = self._transport
        if transport is None or self._num_entered or self.counters.num_live_records:
            return
        if not transport.has_accelerators and not self._source.is_shared:
            self._close()

    # -- records come and go ---------------------------------------------------------------------------------------

    def adopt(self, record: SavedRecord) -> None:
        """Takes a new record under management. The caller holds the lock."""
        if record.index == 0:  # a forward begins: no reload is near
            self.devices.trim()
        self.index.add(record)
        self.counters.num_live_records += 1
        self.counters.hold(record.nbytes, self._staging_in_use())
        if record.nbytes > self._limits.largest_nbytes:
            self._limits.note_largest(record)
            self._allow_in_flight()

    def release_later(self, note: tuple[SavedRecord, int]) -> None:
        """A handle of a record died. Called from destructors, on any thread: see [Note: the lock]."""
        self._to_release.append(note)
        self.process_releases()

    def process_releases(self) -> None:
        """Works off notes that could not be worked off when they were left: whoever had the lock calls this after."""
        while self._to_release and not self.lock.mutex.locked():
            with self.lock.mutex, self.lock:  # not acquire(): Ctrl-C could come before the `try` that releases
                self._release_all()
                self._close_if_idle()

    def _release_all(self) -> None:
        while self._to_release:
            record, epoch = self._to_release.popleft()
            record.num_handles -= 1
            if epoch != record.epoch:
                record.num_unseen -= 1
            if record.num_handles == 0:
                self._release(record)
            elif record.num_unseen <= 0:
                self._reloads.share(record)

    def _release(self, record: SavedRecord) -> None:
        """The graph let go: everything the record held is free again."""
        if record.pass_.is_abandoned:
            record.storage = None
            return
        if record.residency is Residency.RELOADING or record.storage is not None:
            self.counters.hold(-record.nbytes)
        self._reloads.release(record)
        record.storage = None
        record.move(Residency.RELEASED)
        record.pass_.remove(record.index)
        self.index.forget(record)
        self.counters.num_live_records -= 1

    # -- out -----------------------------------------------------------------------------------------------------

    def offload(self, records: list[SavedRecord], *, is_planned: bool = False) -> None:
        """Starts the trip down, small neighbours together; may decide to keep a record instead.

        In mode ``"all"`` it waits for the drive while `staging_nbytes` are in flight. `is_planned`: see
        [Note: the queue].
        """
        with self.lock.mutex, self.lock:
            batches = [batch for record in records for batch in self._batches_of(record)]
        for records in batches:
            while (wait := self._try_submit(records, is_planned=is_planned)) is not None:
                self._wait_for_room(wait, records[0])

    def _batches_of(self, record: SavedRecord) -> list[list[SavedRecord]]:
        """What leaves now that this record may: nothing yet while small ones gather."""
        if not _may_leave(record):
            return []
        if record.nbytes * 2 >= self._slab_nbytes:
            return [[record]]
        batches = []
        if self._batch and not _travel_alike(record, self._batch[0]):
            batches.append(self._take_batch())
        self._batch.append(record)
        self._batch_nbytes += record.nbytes
        if self._batch_nbytes >= self._slab_nbytes:
            batches.append(self._take_batch())
        return batches

    def _take_batch(self) -> list[SavedRecord]:
        records, self._batch, self._batch_nbytes = self._batch, [], 0
        return records

    def _try_submit(self, records: list[SavedRecord], *, is_planned: bool) -> int | Fence | None:
        """Ships or keeps `records`; or returns what to wait for before trying again: room for bytes, or a device."""
        if (transport := self._transport) is not None and records:
            transport.prepare(records)
        with self.lock.mutex, self.lock:
            self._settle()
            records = [record for record in records if _may_leave(record)]
            transport = self._transport
            if transport is None or not records:
                return None
            need = sum(record.nbytes for record in records)
            if transport.pending.has_room(need):
                self._submit(transport, records)
                return None
            if self._is_patient:
                return need
            point = transport.next_point()
            if point is not None:
                return point
            if transport.pending.retire_silent():
                self._keep(records, "drive stuck")
            elif is_planned and len(transport.pending.writes) < _MAX_QUEUE:
                self._submit(transport, records)
            else:
                self._keep(records, "drive behind")
        return None

    def _submit(self, transport: TensorStore, records: list[SavedRecord]) -> None:
        if transport.space.is_exhausted and transport.host is None:
            self._keep(records, "no directory left")
        elif transport.send(records):
            self._note_departed(records)
        else:
            self._keep(records, "no spill space" if self._source.has_directories else "host tier full")

    def _note_departed(self, records: list[SavedRecord]) -> None:
        for record in records:
            record.move(Residency.OFFLOADING)
            self.counters.num_offloaded += 1
            self.counters.offloaded_nbytes += record.nbytes

    def _wait_for_room(self, wait: int | Fence, record: SavedRecord) -> None:
        """See [Note: waiting for an accelerator]."""
        begin = time.perf_counter()
        if not isinstance(wait, int):
            wait.synchronize()
            self.counters.ahead_seconds += time.perf_counter() - begin
            return
        transport = self._transport
        if transport is None:
            return
        if not transport.pending.wait_for_room(wait):
            with self.lock.mutex, self.lock:
                transport.pending.retire_silent()
            self._is_patient = False
            self.note_fallback("the drive is stuck: mode 'all' keeps tensors like mode 'auto' from here on")
        self._stall("write", time.perf_counter() - begin, record)

    def _stall(self, tier: str, seconds: float, record: SavedRecord) -> None:
        self.counters.stall(tier, seconds)
        if self.request_log is not None:
            self.request_log.note_stall(tier, time.monotonic() - seconds, seconds, record)

    def keep(self, records: list[SavedRecord], reason: str) -> None:
        """Keeps records in memory that have not left."""
        with self.lock.mutex, self.lock:
            self._keep([record for record in records if _may_leave(record)], reason)

    def _keep(self, records: list[SavedRecord], reason: str) -> None:
        for record in records:
            record.is_wanted = True
            self.counters.keep(reason, record.nbytes)

    # -- what the engine has done ------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Takes note of what the engine finished: lets sources go, frees extents."""
        self._release_all()
        self._reloads.drop_many_expired()
        transport = self._transport
        news = transport.collect() if transport is not None else ()
        if news:
            self.counters.hold(0, self._staging_in_use())
        for record, has_arrived in news:
            if record.residency is Residency.OFFLOADING:
                self._note_copied(record, has_arrived)
        if transport is not None and transport.has_accelerators:
            only_if_behind = not self._is_patient
            most = self.counters.staging_limit_nbytes // _HELD_SHARE
            for record in transport.let_go(most, only_if_behind=only_if_behind):
                self._let_go(record)

    def _note_copied(self, record: SavedRecord, has_arrived: bool) -> None:
        if record.storage is not None and any([place.write.is_lost for place in record.segments]):
            self._reloads.forward(record)
            return
        self._let_go(record)
        if has_arrived:
            assert self._transport is not None
            is_in_host = self._transport.is_in_host(record)
            record.move(Residency.HOST if is_in_host else Residency.DISK)
            self.counters.hosted_nbytes += record.nbytes if is_in_host else 0

    def _let_go(self, record: SavedRecord) -> None:
        if record.storage is not None and record.residency is Residency.OFFLOADING:
            record.storage = None
            self.counters.hold(-record.nbytes)

    # -- back ----------------------------------------------------------------------------------------------------

    def request(self, record: SavedRecord, epoch: int) -> tuple[HandedOut | None, bool]:
        """Backward wants a record: its bytes if they are in memory, else a reload is begun or on its way.

        `epoch` is the reload the asking handle saw last. The second value is whether a reload had to be begun.
        """
        with self.lock.mutex, self.lock:
            self._settle()
            return self._reloads.request(record, epoch)

    def wait(self, record: SavedRecord, epoch: int) -> HandedOut:
        """The bytes of a requested record, when they are there.

        Raises:
            OSError: the bytes could not be read; errno, file, offset and length are in it.
            RuntimeError: the context was closed, or this is a forked child.
        """
        while True:
            with self.lock.mutex, self.lock:
                handed_out = self._reloads.take_or_demand(record, epoch)
                places, reads = record.segments, record.reads
            if handed_out is not None:
                return handed_out
            seconds, are_there = wait_for_reads(places, reads, self._policy.io_timeout_seconds)
            self._stall("read", seconds, record)
            if not are_there:
                with self.lock.mutex, self.lock:
                    self._reloads.check_stuck(record, reads)

    def prefetch(self, record: SavedRecord) -> bool:
        """Begins a reload ahead of need; False when the budget is used up."""
        with self.lock.mutex, self.lock:
            return self._reloads.prefetch(record)

    # -- accounts ------------------------------------------------------------------------------------------------

    def _staging_in_use(self) -> int:
        return self._transport.engine.staging_in_use_nbytes if self._transport is not None else 0


def _note_fallback(counters: Counters, text: str) -> None:
    if counters.fall_back(text):
        logger.warning("%s", text)


def _nothing() -> None:
    pass


def _leave_to_parent_in_child(store: Store) -> None:
    weak = weakref.ref(store)

    def leave() -> None:
        own = weak()
        if own is not None:
            own.leave_to_parent()

    os.register_at_fork(after_in_child=leave)


def _may_leave(record: SavedRecord) -> bool:
    return record.residency is Residency.DEVICE and not record.is_wanted and record.num_handles > 0


def _travel_alike(record: SavedRecord, other: SavedRecord) -> bool:
    """Whether two records can be one request."""
    mine = (record.device, record.stream, record.prefers_host)
    return mine == (other.device, other.stream, other.prefers_host)
