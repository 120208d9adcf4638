"""Page-aligned memory that is really there, filled with bytes that no drive compresses."""

from __future__ import annotations

import ctypes
import mmap
import os

_PATTERN_NBYTES = 1 << 20


class Memory:
    """`nbytes` of it, at `address`, until the object goes."""

    def __init__(self, nbytes: int) -> None:
        """Filled."""
        self.nbytes = nbytes
        self.map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map.madvise(mmap.MADV_HUGEPAGE)
        self._first = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._first)
        pattern = os.urandom(min(nbytes, _PATTERN_NBYTES))
        for start in range(0, nbytes, len(pattern)):
            stop = min(start + len(pattern), nbytes)
            self.map[start:stop] = pattern[: stop - start]
