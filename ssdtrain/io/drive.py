"""An open engine as one of its clients has it: room in its files and its host tier, and what the drive did for it.

Knows extents and requests, neither records nor parameters. An engine has at most two clients: the parameters and the
optimizer state, and the saved activations. The second to come gets files of its own in the same directories, and shares
slabs, threads, queue and host tier: so what somebody waits for is read before what is only fetched ahead, and that
before anything is written, whoever asked, and one bound holds for all that is in flight. See `Drive.attach`.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssdtrain.io.engine import Direction, SpillFile
from ssdtrain.io.extents import Extent
from ssdtrain.io.host_space import HostShare, HostSpace
from ssdtrain.io.open_engine import EngineChoice, open_engine
from ssdtrain.io.spill_space import NO_SPACE, Growth, SpillSpace
from ssdtrain.io.timed_calls import run_all

_GRACE_SECONDS = 0.1  # an answer may be there that no thread has had the time to take


@dataclass(frozen=True)
class DriveTotals:
    """What an engine has done for one of its clients, and for the other."""

    written_nbytes: int
    """Bytes written to this client's files."""
    write_busy_seconds: float
    """Time with a write of this client at the drive."""
    sustained_written_nbytes: int
    """What of it was written in long periods without a pause; see `engine.Direction`."""
    sustained_write_seconds: float
    """Length of these periods."""
    read_nbytes: int
    """Bytes read from this client's files."""
    read_busy_seconds: float
    """Time with a read of this client at the drive."""
    sustained_read_nbytes: int
    """As for writes."""
    sustained_read_seconds: float
    """As for writes."""
    peak_staging_nbytes: int
    """Most slab memory in use, by both."""
    shared_written_nbytes: int
    """Bytes written for the other client since this one came."""
    shared_read_nbytes: int
    """Bytes read for it."""
    copied_out_nbytes: int
    """Bytes copied from accelerators to host memory, by both."""
    copy_out_seconds: float
    """Time in which the stream of these copies was busy."""
    copied_in_nbytes: int
    """Bytes copied from host memory to accelerators, by both."""
    copy_in_seconds: float
    """Time in which the stream of these copies was busy."""


@dataclass
class _Clients:
    """What the clients of one engine share."""

    lock: threading.RLock  # a destructor may want it while its own thread has it
    pid: int
    present: dict[int, weakref.ReferenceType[Drive]]  # nobody whose attaching was interrupted
    host: HostSpace | None
    stuck: set[int] = field(default_factory=set)  # whose requests are not over and never will be
    drivers: list[Any] = field(default_factory=list)  # that the engine knows


class Drive:
    """One client's share of an open engine. As thread-safe as its `space`: the owner holds a lock."""

    def __init__(
        self,
        choice: EngineChoice,
        note_fallback: Callable[[str], None],
        *,
        number: int = 0,
        disk_nbytes: int | None = None,
        host_nbytes: int | None = None,
        clients: _Clients | None = None,
    ) -> None:
        """Takes an open engine over; it is closed when this fails. Who comes later uses `attach`.

        Raises:
            OSError: there is no room in any directory.
        """
        self.engine = choice.engine
        self.kind, self.reason = choice.kind, choice.reason
        self.number = number
        self.is_closed = False
        self._choice = choice
        self._note_fallback = note_fallback
        self._own = [i for i, file in enumerate(choice.files) if file.user == number]
        self.files: Sequence[SpillFile] = [choice.files[i] for i in self._own]
        try:
            first = self._own[0] if self._own else 0
            slab_nbytes = self.engine.slab_nbytes
            self.space = SpillSpace(
                self.files,
                slab_nbytes,
                note_fallback,
                first=first,
                cap_nbytes=disk_nbytes,
                timeout_seconds=choice.timeout_seconds,
            )
            self._clients = clients or self._first(note_fallback)
        except BaseException:  # Ctrl-C too: nobody else knows this engine yet
            if clients is None:
                choice.discard()
            raise
        host = self._clients.host
        self.host = HostShare(host, host_nbytes) if host is not None else None
        self._before, self._others_before = self.engine.traffic(number), self.engine.traffic(1 - number)
        self._copies_before = self.engine.copies()
        self._clients.present[number] = weakref.ref(self)

    def _first(self, note_fallback: Callable[[str], None]) -> _Clients:
        host = None
        if self._choice.host_nbytes:
            num_files = len(self._choice.files)
            limit, takes_half = self._choice.host_nbytes, self._choice.takes_half
            host = HostSpace(num_files, limit, self.engine.grow_host, note_fallback, takes_half=takes_half)
        return _Clients(threading.RLock(), os.getpid(), {}, host)

    def shortcomings(self) -> list[str]:
        """Sentences on what works, but not the best way."""
        return [*self._choice.fallbacks, *self._choice.shortcomings()]

    @property
    def host_nbytes(self) -> int:
        """The most the host tier may hold, as it is now; 0 without one."""
        return self.host.room_nbytes if self.host is not None else 0

    @property
    def has_checksum(self) -> bool:
        """Whether what is read is verified."""
        return self._choice.has_checksum

    # -- clients -------------------------------------------------------------------------------------------------

    def _has(self, number: int) -> bool:
        found = self._clients.present.get(number)
        drive = found() if found is not None else None
        return drive is not None and not drive.is_closed

    def attach(
        self,
        note_fallback: Callable[[str], None],
        disk_nbytes: int | None = None,
        host_nbytes: int | None = None,
        retired: Iterable[str] = (),
    ) -> Drive:
        """The other client's share: of at most `disk_nbytes`, and of `host_nbytes` in the host tier.

        `retired`: directories that this client does not use any more.

        Raises:
            RuntimeError: the engine is closed or another process's, is for one client only, or has two already.
            OSError: there is no room in any directory, or the drive did not answer that client before.
        """
        other = 1 - self.number
        if os.getpid() != self._clients.pid:
            raise RuntimeError("Expected the process that offloaded, got a forked child: offload there, or use spawn")
        with self._clients.lock:
            if self.is_closed:
                text = "Expected an open offload to share a drive with, got one after close(): pass a directory instead"
                raise RuntimeError(text)
            if other in self._clients.stuck:
                text = "Expected a drive that answers, got one that did not before: look after it, or pass a directory"
                raise OSError(errno.EBUSY, text)
            if self._has(other):
                text = "Expected a drive that no offload of activations shares yet, got a shared one: close that first"
                raise RuntimeError(text)
            if not self._choice.is_shared:
                raise RuntimeError("Expected an engine for two users, got one for a single user")
            drive = Drive(
                self._choice,
                note_fallback,
                number=other,
                disk_nbytes=disk_nbytes,
                host_nbytes=host_nbytes,
                clients=self._clients,
            )
            drive.space.leave_out(retired)
            return drive

    def close(self, timeout_seconds: float, *, are_all_over: bool = False) -> bool:
        """Gives this client's room back; the last one ends the engine. Idempotent.

        `are_all_over`: all requests of this client are known to have ended. After an interrupt there may be some that
        nobody has listed: the engine must come to rest before their room can be another's, as it must before it ends.
        False when it does not: then nothing is given back.
        """
        if self.is_closed:
            return True
        must_rest = not self.engine.is_closed and not (are_all_over and self._has(1 - self.number))
        if must_rest and not self.wait(self.engine.wait_idle, timeout_seconds, must_move=True):
            return False
        with self._clients.lock:
            if self._has(1 - self.number):
                self._give_back()
            elif self.engine.is_closed or self.engine.wait_idle(0.0):
                for directory in self._choice.close():
                    self._note_silent(directory)
            else:
                return False
            self.is_closed = True
            return True

    def discard(self) -> None:
        """Ends what nobody has used yet, and waits for no drive."""
        if self.number == 0:
            self._choice.discard()
            self.is_closed = True
        else:
            self.close(0.0)

    def _give_back(self) -> None:
        if self.host is not None:
            self.host.give_back()
        timed_calls = run_all([file.shrink_to_nothing for file in self.files], self._choice.timeout_seconds)
        for file, timed in zip(self.files, timed_calls, strict=True):
            if not timed.wait(0.0):
                self._note_silent(file.directory)
            else:
                timed.take()

    def _note_silent(self, directory: str) -> None:
        seconds = f"{self._choice.timeout_seconds:g} s"
        self._note_fallback(f"{directory}: no answer from the drive for {seconds}: its space is free when it answers")

    def give_up(self) -> None:
        """The drive does not answer: what it may still touch stays as it is until the process ends."""
        self._clients.stuck.add(self.number)

    def add_driver(self, driver: Any) -> str:
        """Gets ready for fences of an accelerator's driver. Empty, or why its copies are slow.

        Raises:
            RuntimeError: this engine moves host memory only.
        """
        with self._clients.lock:
            if any(known is driver for known in self._clients.drivers):
                return ""
            why = self.engine.add_device(driver)
            self._clients.drivers.append(driver)
            return why

    # -- room ----------------------------------------------------------------------------------------------------

    def prepare(self, nbytes: int) -> None:
        """Has memory ready for `nbytes` more in the host tier, if it can be had: pinning takes long. Without a lock."""
        if self.host is not None:
            self.host.prepare(nbytes)

    def allocate(self, nbytes: int, *, prefers_host: bool, stripe: bool = True) -> list[Extent] | Growth:
        """Extents for `nbytes`, in the host tier where that is preferred and has room. Empty where there is none.

        Or what to wait for, without a lock, before asking again.
        """
        if self.host is not None and prefers_host:
            extent = self.host.allocate(nbytes)
            if extent is not None:
                return [extent]
        return self.space.allocate(nbytes, stripe=stripe)

    def release(self, extent: Extent) -> None:
        """Gives an extent, or a block-aligned part of one, back."""
        if self.host is not None and extent.file == self.host.file:
            self.host.release(extent)
        else:
            self.space.release(extent)

    def is_in_host(self, extent: Extent) -> bool:
        """Whether an extent is in the host tier."""
        return self.host is not None and extent.file == self.host.file

    def grow_staging(self, nbytes: int) -> None:
        """Lets at least `nbytes` of the staging be used, as far as there is."""
        why = self.engine.grow_staging(nbytes)
        if why:
            self._note_fallback(why)

    @property
    def peak_host_nbytes(self) -> int:
        """Most of the host tier in use, by both clients."""
        return self.host.peak_nbytes if self.host is not None else 0

    # -- traffic -------------------------------------------------------------------------------------------------

    def wait(
        self,
        is_over: Callable[[float], bool],
        timeout_seconds: float,
        *,
        file: int | None = None,
        must_move: bool = False,
    ) -> bool:
        """Blocks in `is_over(seconds)` until that is true; false when a drive has owed an answer for too long.

        Called without a lock. A drive that is slow answers now and then, an accelerator may be far behind, and a long
        queue takes its time: none of them is stuck, and nobody gives up on them. `file`: of what is waited for.
        `must_move`: gives up too when nothing happens for so long although no drive owes anything.
        """
        while True:
            silent_seconds, num_events = self.silent_seconds(file), self.engine.num_events
            left = timeout_seconds - silent_seconds
            if is_over(max(left, _GRACE_SECONDS)):
                return True
            has_moved = silent_seconds or self.silent_seconds(file) or self.engine.num_events != num_events
            own = self.engine.silent_seconds(file) if file is not None else 0.0
            if left <= _GRACE_SECONDS and 0.0 < own < timeout_seconds:
                continue  # it was another drive that owed an answer, and by now this one has begun
            if left <= _GRACE_SECONDS or (must_move and not has_moved):
                return False

    def silent_seconds(self, file: int | None = None) -> float:
        """How long a drive has owed an answer: that of `file`, or of any where it owes none for that one."""
        own = self.engine.silent_seconds(file) if file is not None else 0.0
        return own or max([self.engine.silent_seconds(i) for i in range(len(self._choice.files))], default=0.0)

    def silent_files(self, timeout_seconds: float) -> list[int]:
        """Files of this client whose drive has owed an answer for too long."""
        return [i for i in self._own if self.engine.silent_seconds(i) >= timeout_seconds]

    def totals(self) -> DriveTotals:
        """What the drive has done since this client came."""
        written, read = map(_minus, self.engine.traffic(self.number), self._before)
        others_written, others_read = map(_minus, self.engine.traffic(1 - self.number), self._others_before)
        (out_nbytes, out_seconds), (in_nbytes, in_seconds) = self.engine.copies()
        before_out, before_in = self._copies_before
        return DriveTotals(
            *written,
            *read,
            peak_staging_nbytes=self.engine.peak_staging_nbytes,
            shared_written_nbytes=others_written[0],
            shared_read_nbytes=others_read[0],
            copied_out_nbytes=out_nbytes - before_out[0],
            copy_out_seconds=out_seconds - before_out[1],
            copied_in_nbytes=in_nbytes - before_in[0],
            copy_in_seconds=in_seconds - before_in[1],
        )


def _minus(now: Direction, before: Direction) -> Direction:
    return now[0] - before[0], now[1] - before[1], now[2] - before[2], now[3] - before[3]


def open_drive(
    kind: str,
    locations: Sequence[str | SpillFile],
    staging_nbytes: int,
    slab_nbytes: int,
    *,
    note_fallback: Callable[[str], None],
    leave_out: Callable[[str], object],
    **options: Any,
) -> Drive:
    """A drive on those of `locations` that answer and are not full.

    Args:
        kind: as for `open_engine`, like all that is not named here.
        locations: directories, or open files in them.
        staging_nbytes: memory for slabs.
        slab_nbytes: size of a slab.
        note_fallback: is told what is not used, and why.
        leave_out: is told the directories that do not answer.
        options: what else `open_engine` takes.

    Raises:
        OSError: none is left; the last one's reason.
        RuntimeError: the engine asked for by name is not available.
    """
    left = list(locations)
    while True:
        try:
            return Drive(open_engine(kind, left, staging_nbytes, slab_nbytes, **options), note_fallback)
        except OSError as error:
            names = [location if isinstance(location, str) else location.directory for location in left]
            is_silent = isinstance(error, TimeoutError)
            if not (is_silent or error.errno in NO_SPACE) or error.filename not in names:
                raise
            if is_silent:
                leave_out(error.filename)
                note_fallback(f"{error.filename}: not used any more: {error.strerror}")
            if len(left) == 1:
                raise
            del left[names.index(error.filename)]
            if not is_silent:
                note_fallback(f"{error.filename} is full ({os.strerror(error.errno or 0)}): not used")
