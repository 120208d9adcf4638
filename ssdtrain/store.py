"""Moves bytes: offload, reload, forward, wait, release. The only file that touches engines.

It does not know why a record travels or which one is next; `activations` and `schedule` do. Everything it owns (engine,
counters aside) lives and ends with it.

[Note: the lock]
One lock guards records, extents and requests. It is never held while bytes move or a thread waits, and nothing that
runs in a destructor waits for it: a dying handle leaves a note in `_bereaved`, which the next holder works off.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.device import CpuDevice, Device
from ssdtrain.engine import EngineChoice, Read, open_engine
from ssdtrain.identity import live_storage
from ssdtrain.index import Index
from ssdtrain.policy import ActivationPolicy
from ssdtrain.record import Place, Record, Residency
from ssdtrain.space import NO_SPACE
from ssdtrain.stats import Counters
from ssdtrain.transport import Transport

logger = logging.getLogger("ssdtrain")

_PAGE = 4096
_NUM_SLABS = 16
_MAX_SLAB_NBYTES = 4 << 20
_AWAY = Residency.DISK | Residency.OFFLOADING
_MAX_LENT = 8  # records before looking which of them autograd has dropped


Loan = tuple[torch.UntypedStorage, int, int]
"""A record's bytes in memory: the storage, how many bytes into the source it begins, and which reload it is."""


class Store:
    """The bytes of all records of one offload context."""

    def __init__(self, directories: Sequence[str], policy: ActivationPolicy, counters: Counters, index: Index) -> None:
        """Remembers what to open; `open` opens it."""
        self.lock = threading.Lock()
        _leave_to_parent_in_child(self)
        self.counters = counters
        self.index = index
        self._num_entered = 0  # contexts that are active now
        self._is_patient = policy.mode == "all"  # waits for the drive rather than keeping
        self._directories = directories
        self._retired: set[str] = set()  # by engines that are closed
        self._policy = policy
        self._device: Device = CpuDevice(policy.prefetch_nbytes)
        self._slab_nbytes = max(_PAGE, min(_MAX_SLAB_NBYTES, policy.staging_nbytes // _NUM_SLABS) // _PAGE * _PAGE)
        self._transport: Transport | None = None
        self._bereaved: deque[tuple[Record, int]] = deque()
        self._lent: dict[Record, None] = {}
        self._batch: list[Record] = []
        self._batch_nbytes = 0
        self._prefetched: deque[Record] = deque()

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def is_usable(self) -> bool:
        """Whether an engine is at work in this process."""
        return self._transport is not None

    def open(self) -> None:
        """Opens spill files and an engine; nothing to do when they are open.

        Raises:
            OSError: a directory cannot be used; errno and filename say which and why.
            RuntimeError: the engine asked for by name is not available.
        """
        with self.lock:
            self._ensure_open()

    def enter(self) -> None:
        """A context becomes active: the engine is open from here on, unless the drive has become unusable meanwhile."""
        with self.lock:
            try:
                self._ensure_open()
            except OSError as error:
                self.note_fallback(f"the engine could not be opened again, tensors stay in memory: {error}")
            self._num_entered += 1

    def leave(self) -> None:
        """A context ends; the engine lives on while records do."""
        with self.lock:
            self._num_entered -= 1
            self._settle()
            self._close_if_idle()
        self.tidy()

    def close(self) -> None:
        """Ends the engine and frees slabs and spill files. Records whose bytes were only there are lost."""
        with self.lock:
            self._close()
        self.tidy()

    def __del__(self) -> None:
        """The last handle and the context are gone: nobody is left to close it."""
        with contextlib.suppress(Exception):  # the interpreter may be shutting down
            self._close()

    def engine_totals(self) -> Counters:
        """A copy of the counters with what the open engine has done so far."""
        with self.lock:
            self._settle()
            self._reclaim_lent()
            totals = self.counters.copy()
            self._add_totals(totals)
        self.tidy()
        return totals

    def _add_totals(self, counters: Counters) -> None:
        transport = self._transport
        if transport is not None:
            counters.add_engine(transport.engine, transport.space.peak_nbytes)
            counters.cancelled_write_nbytes += transport.cancelled_nbytes

    def _ensure_open(self) -> None:
        if self._transport is not None:
            return
        directories = [directory for directory in self._directories if directory not in self._retired]
        if not directories:
            return
        choice = self._open_engine(directories)
        try:
            self._transport = Transport(choice, self._slab_nbytes, self.note_fallback)
        except BaseException:  # Ctrl-C too: nobody else knows this engine yet
            choice.close()
            raise
        self.counters.engine, self.counters.engine_reason = choice.kind, choice.reason
        for text in (*choice.fallbacks, *choice.shortcomings()):
            self.note_fallback(text)

    def _open_engine(self, directories: list[str]) -> EngineChoice:
        """On those of `directories` that are not full; an error when all are."""
        p = self._policy
        while True:
            try:
                return open_engine(
                    p.engine, directories, p.staging_nbytes, self._slab_nbytes, p.checksum, p.disk_nbytes
                )
            except OSError as error:
                if len(directories) == 1 or error.errno not in NO_SPACE or error.filename not in directories:
                    raise
                directories.remove(error.filename)
                self.note_fallback(f"{error.filename} is full ({os.strerror(error.errno)}): not used")

    def _close(self) -> None:
        transport = self._transport
        if transport is not None:
            for record in transport.records_under_way():
                if record.residency is Residency.OFFLOADING and record.storage is not None:
                    self._recall(record)
            if not transport.close(self._policy.io_timeout_seconds):
                self.note_fallback("the drive is stuck: memory and threads of its requests stay until the process ends")
            self._settle()
            self._add_totals(self.counters)
            self._retired.update(transport.space.retired)
        self.forget_engine()

    def leave_to_parent(self) -> None:
        """This is a forked child: the engine is the parent's, and so are its reads under way.

        The lock is a new one: a thread that only the parent has may hold the inherited one.
        """
        self.lock = threading.Lock()
        for record in self._transport.records_coming_back() if self._transport is not None else ():
            record.reads, record.landing = (), None
            record.move(Residency.DISK)
            self.counters.hold(-record.nbytes)
        self.forget_engine()

    def forget_engine(self) -> None:
        """What is in memory stays; the next context opens another engine."""
        self._batch, self._batch_nbytes, self._transport = [], 0, None
        self._device.trim()
        for record in list(self._prefetched):
            self._leave_prefetched(record)

    def _close_if_idle(self) -> None:
        """Closes when no context is active and no record is left; the next context opens again."""
        if self._transport is not None and not self._num_entered and not self.counters.num_live_records:
            self._close()

    # -- records come and go ---------------------------------------------------------------------------------------

    def adopt(self, record: Record) -> None:
        """Takes a new record under management. The caller holds the lock."""
        if record.index == 0:  # a forward begins: no reload is near
            self._device.trim()
        self.index.add(record)
        self.counters.num_live_records += 1
        self.counters.hold(record.nbytes, self._staging_in_use())

    def bereave(self, note: tuple[Record, int]) -> None:
        """A handle of a record died. Called from destructors, on any thread: see [Note: the lock]."""
        self._bereaved.append(note)
        self.tidy()

    def tidy(self) -> None:
        """Works off notes that could not be worked off when they were left: whoever had the lock calls this after."""
        while self._bereaved and not self.lock.locked():
            with self.lock:  # not acquire(): Ctrl-C could come before the `try` that releases
                self._bury()
                self._close_if_idle()

    def _bury(self) -> None:
        while self._bereaved:
            record, epoch = self._bereaved.popleft()
            record.num_handles -= 1
            if epoch != record.epoch:
                record.num_unseen -= 1
            if record.num_handles == 0:
                self._release(record)
            elif record.num_unseen <= 0:
                self._lend(record)

    def _release(self, record: Record) -> None:
        """The graph let go: everything the record held is free again."""
        self._leave_prefetched(record)
        if record.residency is Residency.RELOADING or record.storage is not None:
            self.counters.hold(-record.nbytes)
        if record.is_lent:
            self._give_up_lent(record)
        if record.reads:
            self._forget_reads(record)
        self._abandon_places(record)
        record.storage = None
        record.move(Residency.RELEASED)
        record.pass_.remove(record.index)
        self.index.forget(record)
        self.counters.num_live_records -= 1

    # -- out -----------------------------------------------------------------------------------------------------

    def offload(self, records: list[Record]) -> None:
        """Starts the trip down, small neighbours together; may decide to keep a record instead.

        In mode ``"all"`` it waits for the drive while `staging_nbytes` are in flight.
        """
        with self.lock:
            loads = [load for record in records if (load := self._load(record))]
        for cargo in loads:
            while (excess := self._try_ship(cargo)) is not None:
                self._wait_inflight(excess)

    def _load(self, record: Record) -> list[Record]:
        """What leaves together with a record: nothing yet while small ones gather."""
        if not _may_leave(record):
            return []
        if record.nbytes * 2 >= self._slab_nbytes:
            return [record]
        self._batch.append(record)
        self._batch_nbytes += record.nbytes
        if self._batch_nbytes < self._slab_nbytes:
            return []
        cargo, self._batch, self._batch_nbytes = self._batch, [], 0
        return cargo

    def _try_ship(self, cargo: list[Record]) -> int | None:
        """Ships or keeps `cargo`; or returns to how many bytes in flight to wait before trying again."""
        with self.lock:
            self._settle()
            cargo = [record for record in cargo if _may_leave(record)]
            transport = self._transport
            if transport is None or not cargo:
                return None
            need = sum(record.nbytes for record in cargo)
            in_flight = transport.engine.inflight_nbytes
            if transport.space.is_exhausted:
                self._keep(cargo, "no directory left")
            elif in_flight and in_flight + need > self._policy.staging_nbytes:
                if self._is_patient:
                    return max(0, self._policy.staging_nbytes - need)
                is_stuck = transport.retire_stuck(self._policy.io_timeout_seconds)
                self._keep(cargo, "drive stuck" if is_stuck else "drive behind")
            elif transport.send(cargo):
                self._note_departed(cargo)
            else:
                self._keep(cargo, "no spill space")
        return None

    def _note_departed(self, cargo: list[Record]) -> None:
        for record in cargo:
            record.move(Residency.OFFLOADING)
            self.counters.num_offloaded += 1
            self.counters.offloaded_nbytes += record.nbytes

    def _wait_inflight(self, max_nbytes: int) -> None:
        transport = self._transport
        if transport is None:
            return
        begin = time.perf_counter()
        if not transport.wait_inflight(max_nbytes, self._policy.io_timeout_seconds):
            self._is_patient = False
            self.note_fallback("the drive is stuck: mode 'all' keeps tensors like mode 'auto' from here on")
        self.counters.stall("write", time.perf_counter() - begin)

    def _keep(self, cargo: list[Record], reason: str) -> None:
        for record in cargo:
            record.is_wanted = True
            self.counters.keep(reason, record.nbytes)

    # -- what the engine has done ------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Takes note of what the engine finished: lets sources go, frees extents."""
        self._bury()
        if len(self._lent) > _MAX_LENT:
            self._reclaim_lent()
        news = self._transport.collect() if self._transport is not None else ()
        if news:
            self.counters.hold(0, self._staging_in_use())
        for record, has_arrived in news:
            if record.residency is Residency.OFFLOADING:
                if record.storage is not None:
                    record.storage = None
                    self.counters.hold(-record.nbytes)
                if has_arrived:
                    record.move(Residency.DISK)

    # -- back ----------------------------------------------------------------------------------------------------

    def request(self, record: Record, epoch: int) -> tuple[Loan | None, bool]:
        """Backward wants a record: its bytes if they are in memory, else a reload is begun or on its way.

        `epoch` is the reload the asking handle saw last. The second value is whether a reload had to be begun.
        """
        with self.lock:
            self._settle()
            record.is_wanted = True
            self._leave_prefetched(record)
            storage = self._take(record)
            if storage is not None:
                return self._hand_out(record, epoch, storage), False
            if record.residency is Residency.RELOADING:
                return None, False
            self._demand(record)
            return None, True

    def wait(self, record: Record, epoch: int) -> Loan:
        """The bytes of a requested record, when they are there.

        Raises:
            OSError: the bytes could not be read; errno, file, offset and length are in it.
            RuntimeError: the context was closed, or this is a forked child.
        """
        while True:
            with self.lock:
                storage = self._take(record)
                if storage is not None:
                    return self._hand_out(record, epoch, storage)
                if record.residency is not Residency.RELOADING:  # another thread's reload came and went, or failed
                    self._demand(record)
                reads = record.reads
            self._wait_for_reads(record, reads)

    def _demand(self, record: Record) -> None:
        self._drop_mispredicted()
        self._begin_reload(record)
        self.counters.num_demand_reloads += 1

    def _hand_out(self, record: Record, epoch: int, storage: torch.UntypedStorage) -> Loan:
        """After the last handle asked, autograd alone holds the memory."""
        if epoch != record.epoch:
            record.num_unseen -= 1
        if record.num_unseen <= 0:
            self._lend(record)
        return storage, record.start if record.epoch else 0, record.epoch

    def prefetch(self, record: Record) -> bool:
        """Begins a reload ahead of need; False when the budget is used up."""
        with self.lock:
            if not record.residency & _AWAY or self._in_memory(record) is not None:
                return True
            if self.counters.prefetched_nbytes + record.nbytes > self._policy.prefetch_nbytes:
                return False
            try:
                self._begin_reload(record)
            except MemoryError:  # not needed yet, and there may be room when it is
                return False
            record.is_prefetched = True
            self._prefetched.append(record)
            self.counters.num_prefetched += 1
            self.counters.prefetched_nbytes += record.nbytes
            return True

    def _wait_for_reads(self, record: Record, reads: tuple[Read, ...]) -> None:
        begin = time.perf_counter()
        deadline = begin + self._policy.io_timeout_seconds
        are_done = all(read.wait(max(0.0, deadline - time.perf_counter())) for read in reads)
        self.counters.stall("read", time.perf_counter() - begin)
        if not are_done:
            self._check_stuck(record, reads)

    def _check_stuck(self, record: Record, reads: tuple[Read, ...]) -> None:
        seconds = f"{self._policy.io_timeout_seconds:g} s"
        with self.lock:
            late = [place for place, read in zip(record.places, reads, strict=False) if not read.is_done]
            if not late:  # the bytes came just now
                return
            extent = late[0].extent
            late[0].transport.space.retire(extent.file, f"after a read took more than {seconds}")
        error = (errno.ETIMEDOUT, extent.offset, extent.nbytes, f"no answer from the drive for {seconds}")
        raise _read_error(record, late[0], error)

    def _take(self, record: Record) -> torch.UntypedStorage | None:
        if record.residency is not Residency.RELOADING:
            return self._in_memory(record)
        return self._finish_reload(record) if all(read.is_done for read in record.reads) else None

    def _in_memory(self, record: Record) -> torch.UntypedStorage | None:
        """Bytes that never left or are back, held here or by somebody else; calls a write under way off."""
        storage = record.storage
        if storage is None and record.residency is not Residency.RELOADING:
            storage = live_storage(record.weak)
            if storage is None or storage.nbytes() != (record.nbytes if record.epoch else record.storage_nbytes):
                return None
            if record.epoch == 0:  # the source, held by the user: home again
                record.storage = storage
                self.counters.hold(record.nbytes, self._staging_in_use())
        if storage is not None and record.epoch == 0 and record.residency is not Residency.DEVICE:
            self._recall(record)
        return storage

    def _recall(self, record: Record) -> None:
        """Makes memory the home of a record whose source is held: what is written or being written is not needed."""
        record.is_wanted = True
        self.counters.forwarded_nbytes += record.nbytes
        self._abandon_places(record)
        record.move(Residency.DEVICE)

    def _begin_reload(self, record: Record) -> None:
        transport = self._transport
        if transport is None or record.places[0].transport is not transport:
            raise RuntimeError(
                f"Expected an open offload for backward, got one closed or of the parent process; {record!r} "
                "was in its spill file. Call close() after the last backward, and run backward where forward ran"
            )
        memory = self._device.allocate(record.nbytes, transport.space.memory_alignment, transport.space.block_nbytes)
        record.reads = transport.read(record, memory)
        record.landing = memory
        record.move(Residency.RELOADING)
        self.counters.hold(record.nbytes, self._staging_in_use() + self._device.idle_nbytes())

    def _finish_reload(self, record: Record) -> torch.UntypedStorage:
        reads, memory = record.reads, record.landing
        assert memory is not None
        self._forget_reads(record)
        for place, read in zip(record.places, reads, strict=True):
            if read.error is not None:
                record.move(Residency.DISK)
                self.counters.hold(-record.nbytes)
                if self._transport is not None:
                    self._transport.space.note_read_error(place.extent.file, read.error)
                raise _read_error(record, place, read.error)
            self.counters.forwarded_nbytes += read.forwarded_nbytes
        record.move(Residency.DEVICE)
        record.storage = memory.storage
        record.weak = StorageWeakRef(memory.storage)
        record.epoch += 1
        record.num_unseen = record.num_handles
        if not all([place.write.is_done for place in record.places]):
            self._abandon_places(record)
        return memory.storage

    def _forget_reads(self, record: Record) -> None:
        transport = record.places[0].transport
        record.reads, record.landing = (), None
        if transport is self._transport:
            transport.forget_reads(record)

    def _drop_mispredicted(self) -> None:
        """A miss while prefetched records wait means that these were guessed wrong: the oldest half makes room."""
        for record in list(self._prefetched)[: (len(self._prefetched) + 1) // 2]:
            if all(read.is_done for read in record.reads):
                self._leave_prefetched(record)
                record.move(Residency.DISK)
                self._forget_reads(record)
                self.counters.hold(-record.nbytes)

    def _leave_prefetched(self, record: Record) -> None:
        if record.is_prefetched:
            record.is_prefetched = False
            self._prefetched.remove(record)
            self.counters.prefetched_nbytes -= record.nbytes

    # -- letting go ------------------------------------------------------------------------------------------------

    def _lend(self, record: Record) -> None:
        """Autograd has the memory and the drive the bytes: the record holds neither, and shares what is still alive."""
        if record.residency is Residency.DEVICE and record.places:
            record.move(Residency.DISK)
            record.storage = None
            if record.is_lent:
                self.counters.hold(-record.nbytes)
            else:
                record.is_lent = True
                self._lent[record] = None

    def _reclaim_lent(self) -> None:
        for record in [record for record in self._lent if record.weak.expired()]:
            self._give_up_lent(record)

    def _give_up_lent(self, record: Record) -> None:
        record.is_lent = False
        del self._lent[record]
        self.counters.hold(-record.nbytes)

    def _abandon_places(self, record: Record) -> None:
        places, record.places = record.places, ()
        if places and places[0].transport is self._transport:
            self._transport.abandon(places)

    # -- accounts ------------------------------------------------------------------------------------------------

    def _staging_in_use(self) -> int:
        return self._transport.engine.staging_in_use_nbytes if self._transport is not None else 0

    def note_fallback(self, text: str) -> None:
        """Warns once and remembers why something did not go the best way."""
        if text not in self.counters.fallbacks:
            self.counters.fallbacks.append(text)
            logger.warning("%s", text)


def _leave_to_parent_in_child(store: Store) -> None:
    weak = weakref.ref(store)

    def leave() -> None:
        own = weak()
        if own is not None:
            own.leave_to_parent()

    os.register_at_fork(after_in_child=leave)


def _may_leave(record: Record) -> bool:
    return record.residency is Residency.DEVICE and not record.is_wanted and record.num_handles > 0


def _read_error(record: Record, place: Place, error: tuple[int, int, int, str]) -> OSError:
    number, offset, nbytes, message = error
    return OSError(
        number or errno.EIO,
        f"Expected {nbytes} bytes of {record!r} at offset {offset} of the spill file, got: {message} (errno {number});"
        " the activation is lost and this backward cannot go on. Check the drive, then run the step again",
        place.transport.space.directory(place.extent.file),
    )
