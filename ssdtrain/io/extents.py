"""Byte ranges of a spill file or of the host tier: first fit at the lowest offset, neighbours merge when released.

Knows nothing of files; the caller grows the file and then tells the allocator with `extend`. The lowest free offset
is taken first, so that the blocks of the file are reused rather than spread.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

BLOCK_NBYTES = 512  # where no file asks for more


class Extent(NamedTuple):
    """Room for `nbytes` (whole blocks) at `offset` of one file, or of the host tier."""

    file: int
    offset: int
    nbytes: int


class ExtentAllocator:
    """Hands out block-aligned extents below `capacity`. Not thread-safe: its owner holds a lock."""

    def __init__(self, block_nbytes: int) -> None:
        """Starts with no capacity; `extend` gives it some."""
        self._block = block_nbytes
        self._offsets: list[int] = []  # free ranges, sorted, never adjacent
        self._sizes: list[int] = []
        self.capacity = 0
        self.in_use_nbytes = 0
        self.peak_nbytes = 0

    def rounded(self, nbytes: int) -> int:
        """`nbytes` rounded up to whole blocks."""
        return -(-nbytes // self._block) * self._block

    def extend(self, capacity: int) -> None:
        """Adds the range from the present capacity up to `capacity` (rounded down to whole blocks)."""
        capacity -= capacity % self._block
        if capacity > self.capacity:
            start, self.capacity = self.capacity, capacity
            self._insert(start, capacity - start)

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a free extent of `nbytes` rounded up to blocks, or None when no free range is long enough."""
        need = -(-nbytes // self._block) * self._block
        for i, size in enumerate(self._sizes):
            if size >= need:
                offset = self._offsets[i]
                if size == need:
                    del self._offsets[i], self._sizes[i]
                else:
                    self._offsets[i] += need
                    self._sizes[i] -= need
                self.in_use_nbytes += need
                self.peak_nbytes = max(self.peak_nbytes, self.in_use_nbytes)
                return offset
        return None

    def fits(self, nbytes: int) -> bool:
        """Whether `allocate(nbytes)` would succeed."""
        need = self.rounded(nbytes)
        return any([size >= need for size in self._sizes])

    def missing_nbytes(self, nbytes: int) -> int:
        """How much `extend` must add for `allocate(nbytes)` to succeed: a free tail counts."""
        tail = 0
        if self._offsets and self._offsets[-1] + self._sizes[-1] == self.capacity:
            tail = self._sizes[-1]
        return max(0, self.rounded(nbytes) - tail)

    def release(self, offset: int, nbytes: int) -> None:
        """Gives an extent, or a block-aligned part of one, back."""
        size = -(-nbytes // self._block) * self._block
        assert offset % self._block == 0 and offset + size <= self.capacity, (offset, size, self.capacity)
        self._insert(offset, size)
        self.in_use_nbytes -= size

    def _insert(self, offset: int, size: int) -> None:
        i = bisect_left(self._offsets, offset)
        joins_left = i > 0 and self._offsets[i - 1] + self._sizes[i - 1] == offset
        joins_right = i < len(self._offsets) and offset + size == self._offsets[i]
        assert i == 0 or self._offsets[i - 1] + self._sizes[i - 1] <= offset, "extent released twice"
        assert i == len(self._offsets) or offset + size <= self._offsets[i], "extent released twice"
        if joins_left and joins_right:
            self._sizes[i - 1] += size + self._sizes[i]
            del self._offsets[i], self._sizes[i]
        elif joins_left:
            self._sizes[i - 1] += size
        elif joins_right:
            self._offsets[i] = offset
            self._sizes[i] += size
        else:
            self._offsets.insert(i, offset)
            self._sizes.insert(i, size)
