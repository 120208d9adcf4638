"""Bytes that must not be lost: parameters, gradients and optimizer state, each tensor a record with a name.

Knows storages and records, neither modules nor optimizers. Unlike a saved activation, what is here has no graph that
lets it go: it stays until it is written anew or released. Several clients may share one, each with counters of its own.

    store = StateStore(["/mnt/nvme"], OptimizerPolicy())
    record = Record("exp_avg of h.0.attn.weight")
    store.write(record, tensor.untyped_storage())     # begins; the storage is held until its bytes are copied
    pending = store.read(record)                      # begins
    storage = store.wait(pending)                     # blocks, verifies; raises `StateLostError`
    store.release(record)

[Note: waiting]
The lock is never held while a thread waits for the drive or an accelerator: other bytes can be read and written
meanwhile. Whoever has waited looks again, under the lock, whether what it waited for is still so.

[Note: no poison]
What is noted here is the only way to the bytes, and must not be given up when Ctrl-C comes between two lines. So each
change is in such an order that an interrupt costs space at most: see [Note: when old bytes may go].
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.devices.base import Allocation, Device
from ssdtrain.devices.cpu import CpuDevice
from ssdtrain.devices.registry import Devices
from ssdtrain.io.files.paths import printable
from ssdtrain.io.host_space import host_limit_nbytes
from ssdtrain.io.open_engine import slab_nbytes_for
from ssdtrain.io.spill_space import Growth
from ssdtrain.io.timed_calls import run
from ssdtrain.policy import StatePolicy
from ssdtrain.state_stats import StateCounters
from ssdtrain.stats import nbytes_text
from ssdtrain.store.file_backed import mapped_copy
from ssdtrain.store.identity import ViewSpec
from ssdtrain.store.pending import PendingRead, Problem, Segment
from ssdtrain.store.record import Record, Residency
from ssdtrain.store.tensor_store import Origin, TensorStore, open_for
from ssdtrain.tracing.spans import span

logger = logging.getLogger("ssdtrain")


class StateLostError(OSError):
    """Bytes of a parameter or of optimizer state cannot be had any more; errno and filename are set."""


class StateStore:
    """An open engine and its files, for parameters and optimizer state. Thread-safe; unusable in a forked child."""

    def __init__(self, directories: Sequence[str], policy: StatePolicy, cpu: Device | None = None) -> None:
        """Opens spill files and an engine, for one client; see `share`. `cpu`: as for `Devices`, for simulations.

        Raises:
            OSError: a directory cannot be used; errno and filename say which and why.
            RuntimeError: the engine asked for by name is not available.
        """
        self.policy = policy
        self.counters = counters = StateCounters("bytes")
        self._num_clients = 1
        self.host: Device = CpuDevice(policy.staging_nbytes)  # what the CPU computes on
        self.cpu: Device = cpu or self.host
        self.known_devices: dict[torch.device, Device | str] = {}
        """One object per accelerator: the engine has threads for it."""
        self.checkpoint = "no checkpoint was taken in this process"  # for messages: where to go back to
        self.directories = list(directories)
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._is_closing = False
        self._records: weakref.WeakSet[Record] = weakref.WeakSet()  # that were written
        self.drive = open_for(
            policy,
            policy.engine,
            self.directories,
            slab_nbytes_for(policy.staging_nbytes),
            note_fallback=self.note,
            leave_out=_nothing,
            host_nbytes=host_limit_nbytes(policy.host_nbytes, has_directories=bool(self.directories)),
            device_index=Devices.gpu_index(),
            is_shared=True,
        )
        self.engine, self._space = self.drive.engine, self.drive.space
        self._store = TensorStore(self.drive, policy, self.note)
        counters.engine, counters.engine_reason = self.drive.kind, self.drive.reason

    # -- clients -------------------------------------------------------------------------------------------------

    def share(self) -> StateStore:
        """Another client: it closes when the last one closes it."""
        with self._lock:
            self._check_usable()
            self._num_clients += 1
        return self

    def devices(self) -> Devices:
        """The devices that tensors may leave from."""
        return Devices(self.cpu, has_host_tier_only=not self.directories, known=self.known_devices)

    def note_checkpoint(self, text: str) -> None:
        """Says which checkpoint to go back to, for messages of lost bytes."""
        self.checkpoint = text

    def note(self, text: str) -> None:
        """Counts what did not go the best way, and warns of it once."""
        text = printable(text)
        if self.counters.fall_back(text):
            logger.warning("%s", text)

    @property
    def directory(self) -> str | None:
        """Where files of others may go; None with a host tier only."""
        in_use = [file.directory for file in self.drive.files if file.directory not in self._space.retired]
        return next(iter([*in_use, *self.directories]), None)

    def mapped_copy(self, tensor: torch.Tensor, spec: ViewSpec) -> torch.Tensor:
        """A copy for a state dict: in a file in the first directory, or with a host tier only in plain memory.

        Raises:
            OSError: there is no room, or no answer from the drive.
        """
        return mapped_copy(tensor, spec, self.directory, self.policy.io_timeout_seconds)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.drive.is_closed

    def check_engine(self, device: Device) -> None:
        """Before anything is written from `device`.

        Raises:
            RuntimeError: the engine asked for by name moves host memory only.
        """
        with self._lock:
            self._store.pending.get_ready(device)

    # -- out -----------------------------------------------------------------------------------------------------

    def write(
        self, record: Record, source: torch.UntypedStorage, device: Device | None = None, *, prefers_host: bool = False
    ) -> None:
        """Begins to write all of `source`; waits while too much is in flight. The record's old bytes are gone.

        What comes from an accelerator, or `prefers_host`, goes to the host tier while there is room.

        `source` may not change before `record.is_copied`. Where the drive has no room or does not answer, the record
        holds `source` itself: then it must not change at all.
        """
        device = device or self.cpu
        origin = Origin(device, device.current_stream(), prefers_host or device.driver is not None)
        may_wait = True
        with span("write_state", record):
            self._store.pending.prepare(device, source.nbytes(), prefers_host=origin.prefers_host)
            while (wait := self._try_write(record, source, origin, may_wait=may_wait)) is not None:
                begin = time.monotonic()
                may_wait = wait()
                with self._lock:
                    self.counters.wait("writes", time.monotonic() - begin)

    def _try_write(
        self, record: Record, source: torch.UntypedStorage, origin: Origin, *, may_wait: bool
    ) -> Callable[[], bool] | None:
        """What to do, without the lock, before trying again; without `may_wait` the record may hold `source` itself."""
        nbytes, store = source.nbytes(), self._store
        with self._lock:
            self._check_usable()
            store.reap()
            has_room = store.pending.has_room(nbytes)
            if may_wait and not has_room:
                return partial(self._wait_for_room, nbytes)
            self._records.add(record)
            record.nbytes = nbytes
            is_begun = store.write([record], [source], origin) if has_room and nbytes else False
            if isinstance(is_begun, Growth):
                return partial(_wait_for_growth, is_begun)
            if not is_begun:
                self._keep(record, source, "no room on the drive" if has_room else "no answer from the drive")
            self.counters.saw(
                disk_nbytes=self._space.peak_nbytes,
                memory_nbytes=self._in_memory_nbytes(),
                host_nbytes=self.drive.peak_host_nbytes,
            )
        return None

    def _keep(self, record: Record, source: torch.UntypedStorage, why: str) -> None:
        record.storage = source if record.nbytes else None
        if record.nbytes:
            self.note(f"{why} for {record.name}: it stays in memory")
        record.move(Residency.DEVICE)
        self._store.release(record)

    def _wait_for_room(self, nbytes: int) -> bool:
        """Whether the bytes in flight are few enough, after a while. See [Note: waiting]."""
        has_room = self._store.pending.wait_for_room(nbytes)
        if not has_room:
            with self._lock:
                self._store.pending.retire_silent()
        return has_room

    def _in_memory_nbytes(self) -> int:
        pending = self._store.pending
        sources = {id(source): source for write in pending.writes for source in write.sources}
        leaving = sum(source.nbytes() for source in sources.values())
        coming = sum(read.memory.capacity for read in pending.reads)
        return leaving + coming + self.engine.staging_in_use_nbytes

    # -- back ----------------------------------------------------------------------------------------------------

    def read(self, record: Record, device: Device | None = None) -> PendingRead:
        """Begins to bring a record's bytes to fresh memory. What never left is where it is, and shared.

        Raises:
            MemoryError: there is none.
        """
        device = device or self.cpu
        while (pending := self._try_read(record, device)) is None:
            silent = self._store.pending.wait_readable(record.segments, device)  # see [Note: waiting]
            if silent is not None:
                raise self._lost(record, silent, (errno.ETIMEDOUT, 0, 0, "no answer from the drive"))
        return pending

    def _try_read(self, record: Record, device: Device) -> PendingRead | None:
        """None while it cannot begin: an engine reads back what it has copied."""
        with self._lock:
            self._check_usable()
            self._store.reap()
            storage = record.storage
            assert storage is not None or record.segments, f"{record.name} was never written"
            if storage is not None:
                there = device.bring(storage)
                memory = Allocation(there, there.data_ptr(), there.nbytes(), StorageWeakRef(there))
                return PendingRead(record, (), device, memory, device.current_stream(), is_copy=there is not storage)
            if not all([segment.is_readable(device) for segment in record.segments]):
                return None
            pending = self._store.read(record, device)
            self.counters.saw(memory_nbytes=self._in_memory_nbytes())
            return pending

    def wait(self, pending: PendingRead) -> torch.UntypedStorage:
        """Blocks until a record's bytes are there, usable on the current stream. The memory is the caller's.

        But for a record that never left: that memory is shared.

        Raises:
            StateLostError: they cannot be had, or are not what was written; the message names record, file and offset.
        """
        begin, is_late = time.monotonic(), not pending.is_issued
        if is_late:
            with span("wait_state", pending.record):
                pending.wait(self.policy.io_timeout_seconds)
        with self._lock:
            if is_late:
                self.counters.wait("reads", time.monotonic() - begin)
            problem = pending.problem(self.policy.io_timeout_seconds)
            if problem is not None:
                self._store.pending.retire_silent()
                raise self._lost(pending.record, *problem)
            pending.use()
            self._store.end_read(pending, is_handed_over=True)
        return pending.memory.storage

    def _lost(self, record: Record, segment: Segment, problem: Problem) -> StateLostError:
        number, _, _, message = problem
        extent = segment.extent
        what = "what was written, got other bytes" if number == errno.EBADMSG else f"to read it back, got {message}"
        return StateLostError(
            number,
            f"Expected {what} ({os.strerror(number)}): {record.name}, {extent.nbytes} bytes at offset {extent.offset}; "
            f"go back to a checkpoint: {self.checkpoint}",
            self._store.where(segment),
        )

    # -- all of it -----------------------------------------------------------------------------------------------

    def release(self, record: Record) -> None:
        """The bytes are not needed any more, or their owner has them."""
        with self._lock:
            record.storage = None
            record.move(Residency.DEVICE)
            self._store.release(record)

    def reserve(self, nbytes: int, what: str) -> None:
        """Makes sure that there is room for `nbytes` more, before anything depends on it.

        Raises:
            OSError: there is not (ENOSPC); the message says how much there is.
        """
        if not nbytes:
            return
        cap = self.policy.disk_nbytes
        names = ", ".join(self.directories)
        free = run(self._left_nbytes, self.policy.io_timeout_seconds, names, "to be told the room left")
        free += self._space.free_nbytes
        room = free if cap is None else max(0, min(free, cap - self._space.in_use_nbytes))
        room += self.drive.host_nbytes
        if nbytes > room:
            remedy = "free some space, pass another directory or more of them"
            if cap is not None and room < free:
                remedy = f"raise disk_nbytes ({nbytes_text(cap)})"
            raise OSError(
                errno.ENOSPC,
                f"Expected room for {nbytes_text(nbytes)} of {what}, got {nbytes_text(room)}: {remedy}",
                names,
            )

    def _left_nbytes(self) -> int:
        drives = {os.fstat(file.fd).st_dev: os.fstatvfs(file.fd) for file in self.drive.files}
        return sum(d.f_bavail * d.f_frsize for d in drives.values())

    def flush(self) -> None:
        """Blocks until everything that was written is on the drive.

        Raises:
            OSError: some of it is not: it is in memory, and training may go on.
        """
        with self._lock:
            self._check_usable()
            writes = list(self._store.pending.writes)
        is_quiet = self._store.pending.wait_written(writes)  # see [Note: waiting]
        with self._lock:
            self._store.reap()
            if not is_quiet:
                seconds = f"{self.policy.io_timeout_seconds:g} s"
                text = f"Expected all writes to end, got no answer for {seconds}: look after the drive, and flush again"
                raise TimeoutError(errno.ETIMEDOUT, text, ", ".join(self.directories))
            rescued = sum(segment.write.rescued_nbytes for record in self._records for segment in record.segments)
            if rescued:
                text = (
                    f"Expected everything on the drive, got {nbytes_text(rescued)} whose write failed: it is in memory "
                    "and goes out with its next change; free some space or look after the drive"
                )
                raise OSError(errno.EIO, text, ", ".join(self.directories))

    def totals(self, own: StateCounters) -> StateCounters:
        """What one client has counted, with what the drive has done so far for all of them."""
        with self._lock:
            if not self.is_closed:
                self._store.reap()
            totals = own.copy()
            totals.add_drive(self.counters)
            if not self.is_closed:
                totals.add_engine(self.drive.totals())
            return totals

    def close(self) -> None:
        """The last client ends the engine and gives the spill space back: what is only there is lost. Idempotent."""
        with self._lock:
            self._num_clients -= 1
            if self._num_clients > 0 or self.is_closed or os.getpid() != self._pid:
                return
            self._is_closing = True
        is_quiet = self._store.close()
        self._store.reap()
        self.counters.add_engine(self.drive.totals())
        for record in self._records if is_quiet else ():  # their requests hold what the engine had
            record.segments = ()

    def __del__(self) -> None:
        """Nobody is left to close it."""
        try:
            self._num_clients = 1
            self.close()
        except Exception:
            pass

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("Expected the process that offloaded, got a forked child: offload there, or use spawn")
        if self._is_closing or self.is_closed:
            raise RuntimeError("Expected an open offload, got one after close()")


def _wait_for_growth(growth: Growth) -> bool:
    growth.wait()
    return True


def _nothing(directory: str) -> None:
    pass
