"""Room in the host tier: pinned memory that several clients share, and what each of them holds of it.

Knows extents and bytes, neither directories nor requests.
"""

from __future__ import annotations

import bisect
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ssdtrain.io.extents import BLOCK_NBYTES, Extent, ExtentAllocator

_PAGE = 4096
_GROW_NBYTES = 256 << 20


def available_nbytes() -> int:
    """Host memory that can be had without swapping, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def host_limit_nbytes(asked_nbytes: int | None, *, has_directories: bool) -> int:
    """The limit of a host tier in whole pages: what was asked, or nothing beside a drive, or half of what is free."""
    if asked_nbytes is None:
        asked_nbytes = 0 if has_directories else available_nbytes() // 2
    return -(-asked_nbytes // _PAGE) * _PAGE


class HostSpace:
    """Room in the host tier: one range of pinned memory, which grows in steps up to its limit. Thread-safe.

    It outlives whoever was interrupted in the middle of a change. What is half changed could give one place to two, so
    it is then left as it is: what is there can be read, and nothing more goes in.
    """

    def __init__(
        self, file: int, limit_nbytes: int, grow: Callable[[int], str], note_fallback: Callable[[str], None]
    ) -> None:
        """`file`: the index of its extents. `grow(nbytes)` makes it so long, and says why it is not pinned."""
        self.file = file
        self._limit_nbytes = limit_nbytes
        self._grow = grow
        self._note_fallback = note_fallback
        self._extents = ExtentAllocator(BLOCK_NBYTES)
        self._lock = threading.RLock()  # a destructor may want it while its own thread has it
        self._is_poisoned = False

    @property
    def peak_nbytes(self) -> int:
        """The most in use so far."""
        return self._extents.peak_nbytes

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
                if offset is None and self._extend(self._extents.missing_nbytes(nbytes)):
                    offset = self._extents.allocate(nbytes)
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

    def _extend(self, missing_nbytes: int) -> bool:
        needed = self._extents.capacity + missing_nbytes
        if needed > self._limit_nbytes:
            return False
        generous = min(self._limit_nbytes, max(needed, self._extents.capacity + _GROW_NBYTES))
        why = self._grow(generous)
        if why:
            self._note_fallback(why)
        self._extents.extend(generous)
        return True


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
