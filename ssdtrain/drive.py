"""An open engine as one of its users has it: room in its files and its host tier, and what the drive did for it.

Knows extents and requests, neither records nor parameters. An engine has at most two users: the parameters and the
optimizer state, and the saved activations. Whoever joins gets files of its own in the same directories, and shares
slabs, threads, queue and host tier: so what somebody waits for is read before what is only fetched ahead, and that
before anything is written, whoever asked, and one bound holds for all that is in flight. See `Drive.join`.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssdtrain.engine import SpillFile, Write
from ssdtrain.engines import EngineChoice
from ssdtrain.space import Extent, HostShare, HostSpace, SpillSpace


@dataclass(frozen=True)
class DriveTotals:
    """What an engine has done for one of its users, and for the other."""

    written_nbytes: int
    """Bytes written to this user's files."""
    write_busy_seconds: float
    """Time with a write of this user at the drive."""
    sustained_written_nbytes: int
    """What of it was written in long periods without a pause; see `engine.Direction`."""
    sustained_write_seconds: float
    """Length of these periods."""
    read_nbytes: int
    """Bytes read from this user's files."""
    read_busy_seconds: float
    """Time with a read of this user at the drive."""
    sustained_read_nbytes: int
    """As for writes."""
    sustained_read_seconds: float
    """As for writes."""
    peak_staging_nbytes: int
    """Most slab memory in use, by both."""
    shared_written_nbytes: int
    """Bytes written for the other user since this one came."""
    shared_read_nbytes: int
    """Bytes read for it."""


@dataclass
class _Users:
    """What the users of one engine share."""

    lock: threading.Lock
    present: set[int]
    host: HostSpace | None
    stuck: set[int] = field(default_factory=set)  # whose requests are not over and never will be
    drivers: list[Any] = field(default_factory=list)  # that the engine knows


class Drive:
    """One user's share of an open engine. As thread-safe as its `space`: the owner holds a lock."""

    def __init__(
        self,
        choice: EngineChoice,
        note_fallback: Callable[[str], None],
        *,
        user: int = 0,
        disk_nbytes: int | None = None,
        users: _Users | None = None,
    ) -> None:
        """Takes an open engine over; it is closed when this fails. Who comes later uses `join`.

        Raises:
            OSError: there is no room in any directory.
        """
        self.engine = choice.engine
        self.kind, self.reason = choice.kind, choice.reason
        self.user = user
        self.is_closed = False
        self._choice = choice
        mine = [i for i, file in enumerate(choice.files) if file.user == user]
        self.files: Sequence[SpillFile] = [choice.files[i] for i in mine]
        try:
            first = mine[0] if mine else 0
            slab_nbytes = self.engine.slab_nbytes
            self.space = SpillSpace(self.files, slab_nbytes, note_fallback, first=first, cap_nbytes=disk_nbytes)
            self._users = users or self._first(note_fallback)
        except BaseException:  # Ctrl-C too: nobody else knows this engine yet
            if users is None:
                choice.close()
            raise
        host = self._users.host
        self.host = HostShare(host) if host is not None else None
        self._shared_before = (0, 0)
        self._shared_before = self._of_the_other()

    def _first(self, note_fallback: Callable[[str], None]) -> _Users:
        host = None
        if self._choice.host_nbytes:
            num_files = len(self._choice.files)
            host = HostSpace(num_files, self._choice.host_nbytes, self.engine.grow_host, note_fallback)
        return _Users(threading.Lock(), {self.user}, host)

    def shortcomings(self) -> list[str]:
        """What works, but not the best way."""
        return [*self._choice.fallbacks, *self._choice.shortcomings()]

    @property
    def host_nbytes(self) -> int:
        """Limit of the host tier; 0 without one."""
        return self._choice.host_nbytes

    # -- users ---------------------------------------------------------------------------------------------------

    def join(self, note_fallback: Callable[[str], None], disk_nbytes: int | None = None) -> Drive:
        """The other user's share, of at most `disk_nbytes`.

        Raises:
            RuntimeError: the engine is closed, has files for one user only, or has two already.
            OSError: there is no room in any directory, or the drive did not answer that user before.
        """
        other = 1 - self.user
        with self._users.lock:
            if self.is_closed:
                raise RuntimeError("Expected an open offload, got one after close()")
            if other in self._users.stuck:
                raise OSError(errno.EBUSY, "Expected a drive that answers, got one that did not before")
            if other in self._users.present:
                raise RuntimeError("Expected a drive that no offload of activations shares yet, got a shared one")
            if not any(file.user == other for file in self._choice.files):
                raise RuntimeError("Expected an engine with files for another user, got one without")
            drive = Drive(self._choice, note_fallback, user=other, disk_nbytes=disk_nbytes, users=self._users)
            self._users.present.add(other)
            return drive

    def close(self) -> None:
        """Gives this user's room back; nothing of it may be in flight. The last one ends the engine. Idempotent."""
        if self.is_closed:
            return
        with self._users.lock:
            if self._users.present <= {self.user}:
                self._choice.close()
            else:
                if self.host is not None:
                    self.host.give_back()
                for file in self.files:
                    file.shrink_to_nothing()
            self._users.present.discard(self.user)
            self.is_closed = True

    def give_up(self) -> None:
        """The drive does not answer: what it may still touch stays as it is until the process ends."""
        self._users.stuck.add(self.user)

    def add_driver(self, driver: Any) -> str:
        """Gets ready for fences of an accelerator's driver. Empty, or why its copies are slow.

        Raises:
            RuntimeError: this engine moves host memory only.
        """
        with self._users.lock:
            if any(known is driver for known in self._users.drivers):
                return ""
            why = self.engine.add_device(driver)
            self._users.drivers.append(driver)
            return why

    # -- room ----------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, *, prefers_host: bool, stripe: bool = True) -> list[Extent]:
        """Extents for `nbytes`, in the host tier where that is preferred and has room. Empty where there is none."""
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

    @property
    def peak_host_nbytes(self) -> int:
        """Most of the host tier in use, by both users."""
        return self.host.peak_nbytes if self.host is not None else 0

    # -- traffic -------------------------------------------------------------------------------------------------

    def wait_written(self, writes: Sequence[Write], timeout_seconds: float) -> bool:
        """Blocks until all of `writes` are over; false when the time is over first."""
        deadline = time.monotonic() + timeout_seconds
        while not all([write.is_done for write in writes]):
            in_flight = self.engine.inflight_nbytes  # with what the other user has under way
            left = deadline - time.monotonic()
            if left <= 0 or not self.engine.wait_inflight(max(0, in_flight - 1), left):
                return all([write.is_done for write in writes])
        return True

    def totals(self) -> DriveTotals:
        """What the drive has done so far."""
        shared = (now - before for now, before in zip(self._of_the_other(), self._shared_before, strict=True))
        written, read = self.engine.traffic(self.user)
        return DriveTotals(*written, *read, self.engine.peak_staging_nbytes, *shared)

    def _of_the_other(self) -> tuple[int, int]:
        written, read = self.engine.traffic(1 - self.user)
        return written[0], read[0]
