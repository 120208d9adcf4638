"""Byte ranges of a spill file, against a model that keeps one flag per block."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ssdtrain.io.extents import ExtentAllocator


class Extents(RuleBasedStateMachine):
    """The allocator and, beside it, `blocks[i]`: whether block i is handed out."""

    @initialize(block=st.sampled_from([1, 512, 4096]))
    def begin(self, block: int) -> None:
        self.block = block
        self.allocator = ExtentAllocator(block)
        self.blocks: list[bool] = []
        self.extents: list[tuple[int, int]] = []  # offset and size in blocks of what is handed out
        self.peak = 0

    def runs(self) -> list[tuple[int, int]]:
        """Free runs as start and length."""
        found: list[tuple[int, int]] = []
        for i, taken in enumerate([*self.blocks, True]):
            if not taken and (i == 0 or self.blocks[i - 1]):
                start = i
            if taken and i > 0 and not self.blocks[i - 1]:
                found.append((start, i - start))
        return found

    @rule(blocks=st.integers(0, 12), odd=st.integers(0, 511))
    def extend(self, blocks: int, odd: int) -> None:
        """Grows to a capacity that need not be whole blocks; a smaller one changes nothing."""
        capacity = (len(self.blocks) + blocks - 2) * self.block + odd % self.block
        self.allocator.extend(max(0, capacity))
        self.blocks += [False] * (max(0, capacity) // self.block - len(self.blocks))

    @rule(blocks=st.integers(0, 8), odd=st.integers(1, 4096))
    def allocate(self, blocks: int, odd: int) -> None:
        """Takes the lowest free run that is long enough."""
        nbytes = blocks * self.block + min(odd, self.block)
        size = blocks + 1
        fitting = [start for start, length in self.runs() if length >= size]
        offset = self.allocator.allocate(nbytes)
        assert offset == (fitting[0] * self.block if fitting else None)
        if fitting:
            self.blocks[fitting[0] : fitting[0] + size] = [True] * size
            self.extents.append((fitting[0], size))
            self.peak = max(self.peak, sum(self.blocks))

    @rule(blocks=st.integers(1, 9))
    def grow_as_told_and_allocate(self, blocks: int) -> None:
        """What is said to be missing is enough, and one block less is not."""
        missing = self.allocator.missing_nbytes(blocks * self.block)
        if any(length >= blocks for _, length in self.runs()):
            return
        assert missing > 0 and missing % self.block == 0
        for added, is_enough in ((missing // self.block - 1, False), (1, True)):
            self.allocator.extend((len(self.blocks) + added) * self.block)
            self.blocks += [False] * added
            assert any(length >= blocks for _, length in self.runs()) == is_enough
        self.allocate(blocks - 1, self.block)

    @precondition(lambda self: self.extents)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Gives an extent back, or a part of it at its beginning, middle or end."""
        index = data.draw(st.integers(0, len(self.extents) - 1))
        start, size = self.extents.pop(index)
        first = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(1, size - first))
        self.allocator.release(
            (start + first) * self.block, length * self.block - data.draw(st.integers(0, self.block - 1))
        )
        self.blocks[start + first : start + first + length] = [False] * length
        rest = [(start, first), (start + first + length, size - first - length)]
        self.extents += [(offset, blocks) for offset, blocks in rest if blocks]

    @precondition(lambda self: self.blocks and not all(self.blocks))
    @rule(data=st.data())
    def release_what_is_free(self, data: st.DataObject) -> None:
        """A double release would hand one extent to two records: it must be caught."""
        start, length = data.draw(st.sampled_from(self.runs()))
        with pytest.raises(AssertionError, match="released twice"):
            self.allocator.release(start * self.block, length * self.block)

    @invariant()
    def agrees(self) -> None:
        a = self.allocator
        assert a.capacity == len(self.blocks) * self.block
        assert a.in_use_nbytes == sum(self.blocks) * self.block
        assert a.peak_nbytes == self.peak * self.block
        assert [(o // self.block, s // self.block) for o, s in zip(a._offsets, a._sizes, strict=True)] == self.runs()


Extents.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestExtents = Extents.TestCase


def test_neighbours_merge() -> None:
    """Without merging, a file full of small holes takes nothing large, although everything is free."""
    allocator = ExtentAllocator(512)
    allocator.extend(4 * 512)
    offsets = [allocator.allocate(512) for _ in range(4)]
    assert offsets == [0, 512, 1024, 1536] and allocator.allocate(1) is None
    for offset in (512, 1536, 0, 1024):
        allocator.release(offset, 512)
    assert allocator.allocate(4 * 512) == 0
    assert allocator.peak_nbytes == 4 * 512


def test_the_lowest_offset_is_used_again() -> None:
    """Blocks once written are written again, rather than new ones touched: kinder to the drive and its free space."""
    allocator = ExtentAllocator(512)
    allocator.extend(100 * 512)
    for _ in range(1000):
        first, second = allocator.allocate(512), allocator.allocate(1024)
        assert (first, second) == (0, 512)
        allocator.release(first, 512)
        allocator.release(second, 1024)


@pytest.mark.parametrize("offset, nbytes", [(1, 512), (0, 5 * 512), (4 * 512, 512)])
def test_impossible_releases(offset: int, nbytes: int) -> None:
    allocator = ExtentAllocator(512)
    allocator.extend(4 * 512)
    allocator.allocate(4 * 512)
    with pytest.raises(AssertionError):
        allocator.release(offset, nbytes)
    assert allocator.in_use_nbytes == 4 * 512
