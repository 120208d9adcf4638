"""Bytes that must not be lost, on the drive: parameters and optimizer state, each tensor in a slot with a name.

Knows storages and extents, neither modules nor optimizers. Unlike a saved activation, what is here has no graph that
lets it go: it stays until it is written anew or freed.

    vault = Vault(["/mnt/nvme"], OptimizerPolicy())
    slot = Slot("exp_avg of h.0.attn.weight")
    vault.write(slot, tensor.untyped_storage())     # begins; the storage is held until its bytes are copied
    arrival = vault.read(slot)                      # begins
    storage = vault.take(arrival)                   # waits, verifies; raises `StateLostError`

[Note: when old bytes may go]
A slot is written anew from memory that holds all its bytes. From then on that memory is the truth: it is held until the
engine has copied it, then the slab holds it, and then the file, or the heap when the write fails. So the extent of the
old bytes is free as soon as the new write has begun.

[Note: interrupts]
Ctrl-C may come between any two lines. Memory is therefore filed before the engine is told of it, and a slot points to
its new bytes only when the request exists: an interrupt may cost space until the vault closes, never bytes.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence

import torch
from torch.profiler import record_function

from ssdtrain.devices.base import CpuDevice, Device
from ssdtrain.devices.registry import Devices
from ssdtrain.io.client import open_drive
from ssdtrain.io.engine import Write
from ssdtrain.io.errands import run
from ssdtrain.io.open_engine import fence, slab_nbytes_for
from ssdtrain.io.space import Extent, host_limit_nbytes
from ssdtrain.policy import StatePolicy
from ssdtrain.state_stats import StateCounters
from ssdtrain.stats import nbytes_text
from ssdtrain.store.identity import ViewSpec
from ssdtrain.store.mapped import mapped_copy
from ssdtrain.store.slots import Arrival, Departure, Part, Slot

logger = logging.getLogger("ssdtrain")


class StateLostError(OSError):
    """Bytes of a parameter or of optimizer state cannot be had any more; errno and filename are set."""


class Vault:
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
        self.met: dict[torch.device, Device | str] = {}  # one object per accelerator: the engine has threads for it
        self.checkpoint = "no checkpoint was taken in this process"  # for messages: where to go back to
        self.directories = list(directories)
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._devices: set[Device] = set()
        self._departures: list[Departure] = []
        self._arrivals: list[Arrival] = []
        self._being_read: list[Part] = []  # not needed any more, free when the read is over
        self._held_for_next: object = None
        self._slots: weakref.WeakSet[Slot] = weakref.WeakSet()  # that were written
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
        return Devices(self.cpu, has_host_tier_only=not self.directories, met=self.met)

    def share(self) -> Vault:
        """Another user: it closes when the last one closes it."""
        with self._lock:
            self._check_usable()
            self._num_users += 1
        return self

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
        self, slot: Slot, source: torch.UntypedStorage, device: Device | None = None, *, prefers_host: bool = False
    ) -> None:
        """Begins to write all of `source`; waits while too much is in flight. The slot's old bytes are gone.

        What comes from an accelerator, or `prefers_host`, goes to the host tier while there is room.

        `source` may not change before `slot.is_copied`. Where the drive has no room or does not answer, the slot holds
        `source` itself: then it must not change at all.
        """
        with self._lock, record_function("ssdtrain::write_state"):
            self._check_usable()
            device = device or self.cpu
            nbytes = source.nbytes()
            has_room = self._wait_for_room(nbytes)
            self._reap()
            prefers_host = prefers_host or device.driver is not None
            extents = self.drive.allocate(nbytes, prefers_host=prefers_host) if has_room and nbytes else []
            parts = self._send(source, nbytes, extents, device)
            old = slot.parts
            self._slots.add(slot)
            slot.parts, slot.kept, slot.nbytes = parts, None if parts or not nbytes else source, nbytes
            self._abandon(old)
            if not parts and nbytes:
                why = "no room on the drive" if has_room else "no answer from the drive"
                self.note(f"{why} for {slot.name}: it stays in memory")
            self.counters.saw(
                disk_nbytes=self._space.peak_nbytes,
                memory_nbytes=self._in_memory_nbytes(),
                host_nbytes=self.drive.peak_host_nbytes,
            )

    def _send(self, source: torch.UntypedStorage, nbytes: int, extents: list[Extent], device: Device) -> list[Part]:
        if not extents:
            return []
        if device.driver is not None and device not in self._devices:
            why = self.drive.add_driver(device.driver)
            self._devices.add(device)
            if why:
                self.note(why)
        producer = fence(device.driver, device.current_stream())
        self._held_for_next = source  # see [Note: interrupts]
        start, parts = 0, []
        for extent in extents:
            departure = Departure(source, extent)
            self._departures.append(departure)
            piece = (source.data_ptr() + start, min(extent.nbytes, nbytes - start), 0)
            departure.write = write = self.engine.write(extent.file, extent.offset, extent.nbytes, [piece], producer)
            parts.append(Part(write, extent, start))
            start += extent.nbytes
        self._held_for_next = None
        return parts

    def _wait_for_room(self, nbytes: int) -> bool:
        """Whether the bytes in flight are few enough, after a while."""
        limit = max(0, self.policy.staging_nbytes - nbytes)
        if self.engine.inflight_nbytes <= limit:
            return True
        begin, has_room, moved_nbytes = time.monotonic(), False, -1
        while not has_room and self._moved_nbytes() != moved_nbytes:  # a long queue is not a drive that does not answer
            moved_nbytes = self._moved_nbytes()
            has_room = self.engine.wait_inflight(limit, self.policy.io_timeout_seconds)
        self.counters.wait("writes", time.monotonic() - begin)
        if not has_room:
            stuck = [d.extent for d in self._departures if not d.is_done and not self.drive.is_in_host(d.extent)]
            for extent in stuck:
                self._space.retire(extent.file, f"after a write took more than {self.policy.io_timeout_seconds:g} s")
        return has_room

    def _moved_nbytes(self) -> int:
        return self.engine.written_nbytes + self.engine.read_nbytes

    def _abandon(self, parts: list[Part]) -> None:
        """Gives extents back: now, or when the engine is done with them.

        A read of an accelerator is handed out when its copy is queued: its room is taken until it is over.
        """
        being_read = [part for arrival in self._arrivals if not arrival.is_over for part in arrival.parts]
        for part in parts:
            if part in being_read:
                self._being_read.append(part)
                continue
            if part.write.is_done:
                self.drive.release(part.extent)
                continue
            part.write.cancel(0)
            departure = next((d for d in self._departures if d.write is part.write), None)
            if departure is None:
                self.drive.release(part.extent)
            else:
                departure.dead = part.extent

    def _reap(self) -> None:
        """Lets go of what the engine has copied, written and read."""
        self._departures = [departure for departure in self._departures if not self._has_left(departure)]
        self._arrivals = [arrival for arrival in self._arrivals if not arrival.is_over]
        if self._being_read:
            parts, self._being_read = self._being_read, []
            self._abandon(parts)

    def _writes(self) -> list[Write]:
        return [departure.write for departure in self._departures if departure.write is not None]

    def _has_left(self, departure: Departure) -> bool:
        write = departure.write
        if write is None:
            return False
        if write.is_copied:
            departure.source = None
        if not write.is_done:
            return False
        if write.is_lost:
            return False  # its bytes are only there: held until the slot is written anew
        if write.error is not None and not self.drive.is_in_host(departure.extent):
            self._space.note_write_error(departure.extent.file, write.error)
        if departure.dead is not None:
            self.drive.release(departure.dead)
        return True

    def _in_memory_nbytes(self) -> int:
        sources = {id(d.source): d.source for d in self._departures if d.source is not None}
        leaving = sum(source.nbytes() for source in sources.values())
        coming = sum(a.memory.capacity for a in self._arrivals if a.memory is not None)
        return leaving + coming + self.engine.staging_in_use_nbytes

    # -- back ----------------------------------------------------------------------------------------------------

    def read(self, slot: Slot, device: Device | None = None) -> Arrival:
        """Begins to bring a slot's bytes to fresh memory.

        Raises:
            MemoryError: there is none.
        """
        with self._lock:
            self._check_usable()
            device = device or self.cpu
            self._wait_until_copied(slot, device)
            if slot.kept is not None or not slot.parts:
                return Arrival(slot, device, None, 0)
            self._reap()
            memory = device.allocate(slot.nbytes, self._space.memory_alignment, self._space.block_nbytes)
            stream = device.current_stream()
            arrival = Arrival(slot, device, memory, stream, tuple(slot.parts))
            self._arrivals.append(arrival)
            ready = fence(device.driver, stream)
            for part in arrival.parts:
                capacity = memory.capacity - part.start
                arrival.reads.append(self.engine.read(part.write, 0, memory.address + part.start, capacity, ready))
            self.counters.saw(memory_nbytes=self._in_memory_nbytes())
            return arrival

    def _wait_until_copied(self, slot: Slot, device: Device) -> None:
        """An engine reads back what it has copied; what it could not even copy is still where it came from.

        An accelerator waits for a copy of its own that is queued; host memory does not.
        """
        deadline = time.monotonic() + self.policy.io_timeout_seconds
        for part in slot.parts:
            write, is_on_host = part.write, device.driver is None
            while not (write.is_copied if is_on_host else write.is_issued) and not write.is_done:
                in_flight = self.engine.inflight_nbytes
                if not self.engine.wait_inflight(max(0, in_flight - 1), max(0.0, deadline - time.monotonic())):
                    raise self._lost(slot, part.extent, (errno.ETIMEDOUT, 0, 0, "no answer from the drive"))
        lost = [part.write for part in slot.parts if part.write.is_done and not part.write.is_copied]
        source = next((d.source for d in self._departures if d.write in lost and d.source is not None), None)
        if source is not None:
            slot.kept = source

    def take(self, arrival: Arrival) -> torch.UntypedStorage:
        """Waits for a slot's bytes. The memory is the caller's, but for a slot that never left: that is only lent.

        Raises:
            StateLostError: they cannot be had, or are not what was written; the message names slot, file and offset.
        """
        if arrival.memory is None:
            storage = arrival.slot.kept
            assert storage is not None, f"{arrival.slot.name} was never written"
            return storage
        begin = time.monotonic()
        is_late = not all([read.is_issued for read in arrival.reads])
        if is_late:
            for read in arrival.reads:
                read.expedite()
        with record_function("ssdtrain::wait_state"):
            for part, read in zip(arrival.parts, arrival.reads, strict=True):
                has_come = read.wait_issued(self.policy.io_timeout_seconds)
                problem = read.error if has_come else (errno.ETIMEDOUT, 0, 0, "no answer from the drive")
                if problem is not None:
                    raise self._lost(arrival.slot, part.extent, problem)
                if arrival.device.driver is not None:
                    read.make_wait(arrival.device.current_stream())
        if is_late:
            self.counters.wait("reads", time.monotonic() - begin)
        if arrival.device.driver is not None and arrival.device.current_stream() != arrival.stream:
            arrival.device.share(arrival.memory.storage, arrival.device.current_stream())
        return arrival.memory.storage

    def _lost(self, slot: Slot, extent: Extent, problem: tuple[int, int, int, str]) -> StateLostError:
        number, _, _, message = problem
        what = "what was written, got other bytes" if number == errno.EBADMSG else f"to read it back, got {message}"
        return StateLostError(
            number,
            f"Expected {what} ({os.strerror(number)}): {slot.name}, {extent.nbytes} bytes at offset {extent.offset}; "
            f"go back to a checkpoint: {self.checkpoint}",
            "host memory" if self.drive.is_in_host(extent) else self._space.directory(extent.file),
        )

    # -- all of it -----------------------------------------------------------------------------------------------

    def free(self, slot: Slot) -> None:
        """The bytes are not needed any more."""
        with self._lock:
            old, slot.parts, slot.kept = slot.parts, [], None
            if not self.is_closed:
                self._abandon(old)

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
            is_quiet = self.drive.wait_written(self._writes(), self.policy.io_timeout_seconds)
            self._reap()
            if not is_quiet:
                seconds = f"{self.policy.io_timeout_seconds:g} s"
                text = f"Expected all writes to end, got no answer for {seconds}: look after the drive, and flush again"
                raise TimeoutError(errno.ETIMEDOUT, text, ", ".join(self.directories))
            rescued = sum(part.write.rescued_nbytes for slot in self._slots for part in slot.parts)
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
            deadline = time.monotonic() + self.policy.io_timeout_seconds
            is_quiet = self.drive.wait_written(self._writes(), self.policy.io_timeout_seconds) and all(
                read.wait(max(0.0, deadline - time.monotonic())) for a in self._arrivals for read in a.reads
            )
            self._reap()
            self.counters.add_engine(self.drive.totals())
            is_quiet = is_quiet and self.drive.close(max(0.0, deadline - time.monotonic()))
            if is_quiet:
                for slot in self._slots:  # their requests hold what the engine had
                    slot.parts = []
            else:
                self.note("the drive is stuck: memory and threads of its requests stay")
                self.drive.give_up()
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))  # the kernel may still write to memory held here

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
        if self.is_closed:
            raise RuntimeError("Expected an open offload, got one after close()")


def _nothing(directory: str) -> None:
    pass
