"""Bytes that must not be lost, on the drive: parameters and optimizer state, each tensor in a record with a name.

Knows storages and extents, neither modules nor optimizers. Unlike a saved activation, what is here has no graph that
lets it go: it stays until it is written anew or freed.

    store = StateStore(["/mnt/nvme"], OptimizerPolicy())
    record = Record("exp_avg of h.0.attn.weight")
    store.write(record, tensor.untyped_storage())     # begins; the storage is held until its bytes are copied
    arrival = store.read(record)                      # begins
    storage = store.take(arrival)                   # waits, verifies; raises `StateLostError`

[Note: when old bytes may go]
A record is written anew from memory that holds all its bytes. From then on that memory is the truth: it is held until
the engine has copied it, then the slab holds it, and then the file, or the heap when the write fails. So the extent of
the old bytes is free as soon as the new write has begun.

[Note: interrupts]
Ctrl-C may come between any two lines. Memory is therefore filed before the engine is told of it, and a record points to
its new bytes only when the request exists: an interrupt may cost space until the store closes, never bytes. See also
[Note: what an interrupt may cost].

[Note: waiting]
The lock is never held while a thread waits for the drive or an accelerator: other bytes can be read and written
meanwhile. Whoever has waited looks again, under the lock, whether what it waited for is still so.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from ssdtrain.devices.base import Device
from ssdtrain.devices.cpu import CpuDevice
from ssdtrain.devices.registry import Devices
from ssdtrain.io.client import open_drive
from ssdtrain.io.errands import run
from ssdtrain.io.extents import Extent
from ssdtrain.io.host_space import host_limit_nbytes
from ssdtrain.io.open_engine import slab_nbytes_for
from ssdtrain.policy import StatePolicy
from ssdtrain.state_stats import StateCounters
from ssdtrain.stats import nbytes_text
from ssdtrain.store.identity import ViewSpec
from ssdtrain.store.mapped import mapped_copy
from ssdtrain.store.pending import Pending, PendingRead, PendingWrite, Segment, hand_out
from ssdtrain.store.record import Record

logger = logging.getLogger("ssdtrain")


class StateLostError(OSError):
    """Bytes of a parameter or of optimizer state cannot be had any more; errno and filename are set."""


@dataclass(eq=False)
class Arrival:
    """A record on its way back."""

    record: Record
    device: Device
    pending: PendingRead | None  # None: the record never left

    def use(self) -> None:
        """The current stream uses the memory from here on, after the copies into it."""
        if self.pending is not None and self.device.driver is not None:
            hand_out(self.pending.memory.storage, self.device, self.pending.stream, self.pending.reads)


class StateStore:
    """An open engine, its files, and what is in flight. Thread-safe; unusable in a forked child."""

    def __init__(self, directories: Sequence[str], policy: StatePolicy) -> None:
        """Opens spill files and an engine, for one user; see `share`.

        Raises:
            OSError: a directory cannot be used; errno and filename say which and why.
            RuntimeError: the engine asked for by name is not available.
        """
        self.policy = policy
        self.counters = counters = StateCounters("bytes")
        self._num_users = 1
        self.host: Device = CpuDevice(policy.staging_nbytes)  # what the CPU computes on
        self.cpu: Device = self.host
        self.known_devices: dict[
            torch.device, Device | str
        ] = {}  # one object per accelerator: the engine has threads for it
        self.checkpoint = "no checkpoint was taken in this process"  # for messages: where to go back to
        self.directories = list(directories)
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._is_closing = False
        self._records: weakref.WeakSet[Record] = weakref.WeakSet()  # that were written
        self.drive = open_drive(
            policy.engine,
            self.directories,
            policy.staging_nbytes,
            slab_nbytes_for(policy.staging_nbytes),
            note_fallback=self.note,
            leave_out=_nothing,
            checksum=policy.checksum,
            disk_nbytes=policy.disk_nbytes,
            host_nbytes=host_limit_nbytes(policy.host_nbytes, has_directories=bool(self.directories)),
            device_index=Devices.gpu_index(),
            is_shared=True,
            timeout_seconds=policy.io_timeout_seconds,
        )
        self.engine, self._space = self.drive.engine, self.drive.space
        self._pending = Pending(
            self.drive,
            self.note,
            staging_nbytes=policy.staging_nbytes,
            timeout_seconds=policy.io_timeout_seconds,
        )
        counters.engine, counters.engine_reason = self.drive.kind, self.drive.reason
        for text in self.drive.shortcomings():
            self.note(text)

    def mapped_copy(self, tensor: torch.Tensor, spec: ViewSpec) -> torch.Tensor:
        """A copy for a state dict: in a file in the first directory, or with a host tier only in plain memory.

        Raises:
            OSError: there is no room, or no answer from the drive.
        """
        return mapped_copy(tensor, spec, self.directory, self.policy.io_timeout_seconds)

    @property
    def directory(self) -> str | None:
        """Where files of others may go; None with a host tier only."""
        in_use = [file.directory for file in self.drive.files if file.directory not in self._space.retired]
        return next(iter([*in_use, *self.directories]), None)

    def devices(self) -> Devices:
        """The devices that tensors may leave from."""
        return Devices(self.cpu, has_host_tier_only=not self.directories, known=self.known_devices)

    def share(self) -> StateStore:
        """Another user: it closes when the last one closes it."""
        with self._lock:
            self._check_usable()
            self._num_users += 1
        return self

    def note_checkpoint(self, text: str) -> None:
        """Says which checkpoint to go back to, for messages of lost bytes."""
        self.checkpoint = text

    def note(self, text: str) -> None:
        """Counts what did not go the best way, and warns of it once."""
        if self.counters.fall_back(text):
            logger.warning(text)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.drive.is_closed

    # -- out -----------------------------------------------------------------------------------------------------

    def write(
        self, record: Record, source: torch.UntypedStorage, device: Device | None = None, *, prefers_host: bool = False
    ) -> None:
        """Begins to write all of `source`; waits while too much is in flight. The record's old bytes are gone.

        What comes from an accelerator, or `prefers_host`, goes to the host tier while there is room.

        `source` may not change before `record.is_copied`. Where the drive has no room or does not answer, the record
        holds `source` itself: then it must not change at all.
        """
        device, has_room = device or self.cpu, True
        prefers_host = prefers_host or device.driver is not None
        with record_function("ssdtrain::write_state"):
            self._pending.prepare(device, source.nbytes(), prefers_host=prefers_host)
            while not self._try_write(record, source, device, prefers_host=prefers_host, may_wait=has_room):
                has_room = self._wait_for_room(source.nbytes())

    def _try_write(
        self, record: Record, source: torch.UntypedStorage, device: Device, *, prefers_host: bool, may_wait: bool
    ) -> bool:
        """False when it is better to wait first: too much is in flight. Else the record may hold `source` itself."""
        nbytes = source.nbytes()
        with self._lock:
            self._check_usable()
            self._reap()
            has_room = self._pending.has_room(nbytes)
            if may_wait and not has_room:
                return False
            extents = self.drive.allocate(nbytes, prefers_host=prefers_host) if has_room and nbytes else []
            segments = self._send(record, source, extents, device)
            old = record.segments
            self._records.add(record)
            record.segments, record.storage, record.nbytes = (
                segments,
                None if segments or not nbytes else source,
                nbytes,
            )
            self._pending.release(old)
            if not segments and nbytes:
                why = "no room on the drive" if has_room else "no answer from the drive"
                self.note(f"{why} for {record.name}: it stays in memory")
            self.counters.saw(
                disk_nbytes=self._space.peak_nbytes,
                memory_nbytes=self._in_memory_nbytes(),
                host_nbytes=self.drive.peak_host_nbytes,
            )
        return True

    def _send(
        self, record: Record, source: torch.UntypedStorage, extents: list[Extent], device: Device
    ) -> tuple[Segment, ...]:
        if not extents:
            return ()
        stream = device.current_stream()
        producer = self._pending.producer(device, stream)
        if producer is not None:
            device.share(source, stream)  # which may not have allocated it, and be the one that uses it last
        start, segments = 0, list[Segment]()
        for extent in extents:
            piece = (source.data_ptr() + start, min(extent.nbytes, source.nbytes() - start), 0)
            write = self._pending.write(PendingWrite(extent, [record], [source], stream, producer), [piece])
            segments.append(Segment(self.drive, write, 0, extent, start))
            start += extent.nbytes
        return tuple(segments)

    def _wait_for_room(self, nbytes: int) -> bool:
        """Whether the bytes in flight are few enough, after a while. See [Note: waiting]."""
        begin = time.monotonic()
        has_room = self._pending.wait_for_room(nbytes)
        with self._lock:
            self.counters.wait("writes", time.monotonic() - begin)
            if not has_room:
                self._pending.retire_silent()
        return has_room

    def _reap(self) -> None:
        """Lets go of what the engine has copied, written and read."""
        for pending in self._pending.reap():
            if not pending.is_lost or not pending.sources:
                continue
            for record in pending.records:  # what could not be copied is only where it was: the record holds it
                if any(segment.write is pending.write for segment in record.segments):
                    record.storage = pending.sources[0]

    def _in_memory_nbytes(self) -> int:
        sources = {id(source): source for pending in self._pending.writes for source in pending.sources}
        leaving = sum(source.nbytes() for source in sources.values())
        coming = sum(pending.memory.capacity for pending in self._pending.reads)
        return leaving + coming + self.engine.staging_in_use_nbytes

    # -- back ----------------------------------------------------------------------------------------------------

    def read(self, record: Record, device: Device | None = None) -> Arrival:
        """Begins to bring a record's bytes to fresh memory.

        Raises:
            MemoryError: there is none.
        """
        device = device or self.cpu
        while (arrival := self._try_read(record, device)) is None:
            silent = self._pending.wait_readable(record.segments, device)  # see [Note: waiting]
            if silent is not None:
                raise self._lost(record, silent.extent, (errno.ETIMEDOUT, 0, 0, "no answer from the drive"))
        return arrival

    def _try_read(self, record: Record, device: Device) -> Arrival | None:
        """None while it cannot begin: an engine reads back what it has copied."""
        with self._lock:
            self._check_usable()
            self._reap()
            if record.storage is not None or not record.segments:
                return Arrival(record, device, None)
            if not all([segment.is_readable(device) for segment in record.segments]):
                return None
            arrival = Arrival(record, device, self._pending.read(record.segments, device, record.nbytes))
            self.counters.saw(memory_nbytes=self._in_memory_nbytes())
            return arrival

    def take(self, arrival: Arrival) -> torch.UntypedStorage:
        """Waits for a record's bytes. The memory is the caller's, but for a record that never left: that is only lent.

        Raises:
            StateLostError: they cannot be had, or are not what was written; the message names record, file and offset.
        """
        pending = arrival.pending
        if pending is None:
            storage = arrival.record.storage
            assert storage is not None, f"{arrival.record.name} was never written"
            return storage
        begin = time.monotonic()
        is_late = not all([read.is_issued for read in pending.reads])
        if is_late:
            for read in pending.reads:
                read.expedite()
        with record_function("ssdtrain::wait_state"):
            for segment, read in zip(pending.segments, pending.reads, strict=True):
                has_come = self.drive.wait(read.wait_issued, self.policy.io_timeout_seconds, file=segment.extent.file)
                problem = read.error if has_come else (errno.ETIMEDOUT, 0, 0, "no answer from the drive")
                if problem is not None:
                    raise self._lost(arrival.record, segment.extent, problem)
        if is_late:
            self.counters.wait("reads", time.monotonic() - begin)
        arrival.use()
        with self._lock:
            self._pending.hand_over(pending)
        return pending.memory.storage

    def _lost(self, record: Record, extent: Extent, problem: tuple[int, int, int, str]) -> StateLostError:
        number, _, _, message = problem
        what = "what was written, got other bytes" if number == errno.EBADMSG else f"to read it back, got {message}"
        return StateLostError(
            number,
            f"Expected {what} ({os.strerror(number)}): {record.name}, {extent.nbytes} bytes at offset {extent.offset}; "
            f"go back to a checkpoint: {self.checkpoint}",
            "host memory" if self.drive.is_in_host(extent) else self._space.directory(extent.file),
        )

    # -- all of it -----------------------------------------------------------------------------------------------

    def free(self, record: Record) -> None:
        """The bytes are not needed any more."""
        with self._lock:
            old, record.segments, record.storage = record.segments, (), None
            if not self.is_closed:
                self._pending.release(old)

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
            writes = list(self._pending.writes)
        is_quiet = self._pending.wait_written(writes)  # see [Note: waiting]
        with self._lock:
            self._reap()
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
        """What one user has counted, with what the drive has done so far for all of them."""
        with self._lock:
            if not self.is_closed:
                self._reap()
            totals = own.copy()
            totals.add_drive(self.counters)
            if not self.is_closed:
                totals.add_engine(self.drive.totals())
            return totals

    def close(self) -> None:
        """The last user ends the engine and gives the spill space back: what is only there is lost. Idempotent."""
        with self._lock:
            self._num_users -= 1
            if self._num_users > 0 or self.is_closed or os.getpid() != self._pid:
                return
            self._is_closing = True
        is_quiet = self._pending.close()
        self._reap()
        self.counters.add_engine(self.drive.totals())
        if not is_quiet:
            self.note("the drive is stuck: memory and threads of its requests stay")
        for record in self._records if is_quiet else ():  # their requests hold what the engine had
            record.segments = ()

    def __del__(self) -> None:
        """Nobody is left to close it."""
        try:
            self._num_users = 1
            self.close()
        except Exception:
            pass

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("Expected the process that offloaded, got a forked child: offload there, or use spawn")
        if self._is_closing or self.is_closed:
            raise RuntimeError("Expected an open offload, got one after close()")


def _nothing(directory: str) -> None:
    pass
