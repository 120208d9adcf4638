"""Room in the host tier: pinned memory that several clients share, and what each of them holds of it.

Knows extents and bytes, neither directories nor requests.

[Note: memory that grows]
A machine may have little memory at first and get more as it is used. So the tier has addresses for more than there is,
and takes memory in steps: each asks what is free just then. With no limit set the tier holds at most half of that and
what it holds already; with one, all of it. A step that there is no memory for is tried again a little later.
"""

from __future__ import annotations

import bisect
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ssdtrain.io.extents import BLOCK_NBYTES, Extent, ExtentAllocator
from ssdtrain.stats import nbytes_text

_PAGE = 4096
_GROW_NBYTES = 256 << 20
_RETRY_SECONDS = 1.0


def available_nbytes() -> int:
    """Host memory that can be had without swapping, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def host_limit_nbytes(asked_nbytes: int | None, *, has_directories: bool) -> int | None:
    """The limit of a host tier in whole pages: as asked, or nothing beside a drive, else None: half of what is free."""
    if asked_nbytes is None:
        return 0 if has_directories else None
    return -(-asked_nbytes // _PAGE) * _PAGE


class HostSpace:
    """Room in the host tier: one range of pinned memory, which grows in steps up to its limit. Thread-safe.

    It outlives whoever was interrupted in the middle of a change. What is half changed could give one place to two, so
    it is then left as it is: what is there can be read, and nothing more goes in.
    """

    def __init__(
        self,
        file: int,
        limit_nbytes: int,
        grow: Callable[[int], str],
        note_fallback: Callable[[str], None],
        *,
        takes_half: bool = False,
    ) -> None:
        """`file`: the index of its extents. `grow(nbytes)` makes it so long, and says why it is not pinned.

        `takes_half`: its limit is half of what is free as well; see [Note: memory that grows].
        """
        self.file = file
        self._limit_nbytes = limit_nbytes
        self._takes_half = takes_half
        self._growing = threading.Lock()
        self._no_growth_before = 0.0
        self._has_told = False
        self._grow = grow
        self._note_fallback = note_fallback
        self._extents = ExtentAllocator(BLOCK_NBYTES)
        self._lock = threading.RLock()  # a destructor may want it while its own thread has it
        self._is_poisoned = False

    @property
    def peak_nbytes(self) -> int:
        """The most in use so far."""
        return self._extents.peak_nbytes

    @property
    def room_nbytes(self) -> int:
        """The most it may hold, as it is now."""
        if not self._takes_half:
            return self._limit_nbytes
        return min(self._limit_nbytes, (self._extents.capacity + available_nbytes()) // 2 // _PAGE * _PAGE)

    def prepare(self, nbytes: int) -> None:
        """Grows, where that is needed for `nbytes` more. Pinning takes its time: called without any other lock."""
        with self._growing:
            with self._lock:
                target = 0 if self._is_poisoned or self._extents.fits(nbytes) else self._next_capacity(nbytes)
            if target:
                self._pin(target)
                with self._lock:
                    self._is_poisoned = True
                    self._extents.extend(target)
                    self._is_poisoned = False

    def allocate(self, nbytes: int) -> Extent | None:
        """Room for `nbytes`, or None when the tier is full."""
        nbytes = self._extents.rounded(nbytes)
        with self._lock:
            if self._is_poisoned:
                self._note_fallback("interrupted in its bookkeeping: the host tier takes no more")
                return None
            self._is_poisoned = True
            try:
                offset = self._extents.allocate(nbytes)
                if offset is None and self._growing.acquire(blocking=False):  # nobody has prepared for it
                    try:
                        offset = self._grow_and_allocate(nbytes)
                    finally:
                        self._growing.release()
            except Exception:  # no memory: nothing has changed
                self._is_poisoned = False
                raise
            self._is_poisoned = False
        return None if offset is None else Extent(self.file, offset, nbytes)

    def release(self, extent: Extent) -> None:
        """Gives an extent, or a block-aligned part of one, back."""
        with self._lock:
            if self._is_poisoned:
                return
            self._is_poisoned = True
            self._extents.release(extent.offset, extent.nbytes)
            self._is_poisoned = False

    def _grow_and_allocate(self, nbytes: int) -> int | None:
        target = self._next_capacity(nbytes)
        if not target:
            return None
        self._pin(target)
        self._extents.extend(target)
        return self._extents.allocate(nbytes)

    def _next_capacity(self, nbytes: int) -> int:
        """How long it is after a step that makes room for `nbytes`; 0 where there is no memory for one now."""
        capacity = self._extents.capacity
        needed, now = capacity + self._extents.missing_nbytes(nbytes), time.monotonic()
        if needed > self._limit_nbytes or now < self._no_growth_before:
            return 0
        free = available_nbytes()
        most = (capacity + free) // 2 if self._takes_half else capacity + free
        most = min(self._limit_nbytes, most // _PAGE * _PAGE)
        if needed > most:
            self._no_growth_before = now + _RETRY_SECONDS
            self._tell_once(
                f"the host tier does not grow beyond {nbytes_text(capacity)} while {nbytes_text(free)} of host memory"
                " are free: it is tried again, and what finds no room goes elsewhere or stays"
            )
            return 0
        return min(most, max(needed, capacity + _GROW_NBYTES))

    def _tell_once(self, text: str) -> None:
        if not self._has_told:
            self._has_told = True
            self._note_fallback(text)

    def _pin(self, nbytes: int) -> None:
        why = self._grow(nbytes)
        if why:
            self._note_fallback(why)


class HostShare:
    """What one user of a host tier holds of it."""

    def __init__(self, space: HostSpace, cap_nbytes: int | None = None) -> None:
        """Holds nothing, and never more than `cap_nbytes`."""
        self.file = space.file
        self._left_nbytes = math.inf if cap_nbytes is None else cap_nbytes
        self._space = space
        self._held: list[tuple[int, int]] = []  # (offset, nbytes), sorted

    @property
    def peak_nbytes(self) -> int:
        """The most in use so far, by all users."""
        return self._space.peak_nbytes

    @property
    def room_nbytes(self) -> int:
        """The most the tier may hold for all clients, as it is now."""
        return self._space.room_nbytes

    def prepare(self, nbytes: int) -> None:
        """Sees to it that there is memory for `nbytes` more, if it can be had. Called without a lock."""
        if nbytes <= self._left_nbytes:
            self._space.prepare(nbytes)

    def allocate(self, nbytes: int) -> Extent | None:
        """Room for `nbytes`, or None when the tier is full."""
        extent = self._space.allocate(nbytes) if nbytes <= self._left_nbytes else None
        if extent is not None:
            self._left_nbytes -= extent.nbytes
            bisect.insort(self._held, (extent.offset, extent.nbytes))
        return extent

    def release(self, extent: Extent) -> None:
        """Gives an extent, or a block-aligned part of one, back."""
        i = bisect.bisect_right(self._held, (extent.offset, sys.maxsize)) - 1
        start, nbytes = self._held[i]
        end, extent_end = start + nbytes, extent.offset + extent.nbytes
        rest = [(start, extent.offset - start), (extent_end, end - extent_end)]
        self._held[i : i + 1] = [(offset, size) for offset, size in rest if size]
        self._left_nbytes += extent.nbytes
        self._space.release(extent)

    def give_back(self) -> None:
        """Gives everything back."""
        held, self._held = self._held, []
        for offset, nbytes in held:
            self._space.release(Extent(self.file, offset, nbytes))
