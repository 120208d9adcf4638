"""Device memory: blocks that go back to the stream that allocated them, before its queued work has run.

It works as PyTorch's caching allocator does for CUDA. A block is free from the moment its storage dies, on whatever
stream that happens, and serves the stream that allocated it, which waits for nobody. Other streams that use it must
have been named before (`share`), then it is only handed out once what they had queued at that moment is over. What is
handed out is poisoned in stream order by the caller.

[Note: death notes]
A storage may die in any thread, also while this thread holds the lock: the callback only leaves a note. Whoever looks
at the pool next works it off.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ssdtrain.devices.simulated.order import Clock, Span
from ssdtrain.devices.simulated.streams import Event, Stream

GRAIN_NBYTES = 512
_PAGE = 4096


class Segment:
    """Memory mapped in one go, cut into blocks."""

    def __init__(self, nbytes: int, alignment: int) -> None:
        """Maps at least `nbytes`."""
        alignment = max(alignment, _PAGE)
        self.memory = bytearray(nbytes + alignment)
        start = -torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr() % alignment
        whole = torch.frombuffer(self.memory, dtype=torch.uint8, count=nbytes, offset=start)
        self.start = start
        self.storage = whole.untyped_storage()  # what queued work reads and writes: it keeps no block alive
        self.address = whole.data_ptr()
        self.nbytes = nbytes
        self.blocks: list[Block] = []


@dataclass(eq=False)
class Block:
    """A piece of a segment."""

    segment: Segment
    address: int
    nbytes: int
    stream: int
    is_live: bool = False
    sharers: set[Stream] = field(default_factory=set)
    borrower: weakref.ref[memoryview] | None = None

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.nbytes

    @property
    def span(self) -> Span:
        """Its bytes."""
        return Span(self.address, self.nbytes)


@dataclass(frozen=True)
class _Pending:
    """A freed block and what the streams that share it had queued by then."""

    block: Block
    events: list[Event]


class Pool:
    """All device memory. The caller holds the machine's lock."""

    def __init__(
        self,
        record: Callable[[Stream], Event],
        on_complete: Callable[[Clock], None],
        on_change: Callable[[Span], None],
    ) -> None:
        """`record` needs no lock; `on_complete` is told the clock of an event seen complete.

        `on_change` is told of memory that was mapped or is no longer.
        """
        self.num_allocated_nbytes = 0
        self.peak_allocated_nbytes = 0
        self.num_reserved_nbytes = 0
        self.peak_reserved_nbytes = 0
        self._record = record
        self._on_complete = on_complete
        self._on_change = on_change
        self._segments: list[Segment] = []  # by address
        self._free: dict[int, list[Block]] = {}
        self._notes: deque[_Pending] = deque()
        self._pending: list[_Pending] = []

    def take(self, nbytes: int, stream: int, alignment: int = GRAIN_NBYTES) -> Block:
        """A block of the stream's own free ones, or of new memory when none fits."""
        self.settle()
        nbytes = max(1, -(-nbytes // GRAIN_NBYTES)) * GRAIN_NBYTES
        free = self._free.setdefault(stream, [])
        fitting = [b for b in free if -b.address % alignment + nbytes <= b.nbytes]
        block = min(fitting, key=lambda b: (b.nbytes, b.address)) if fitting else self._map(nbytes, stream, alignment)
        start = block.address + -block.address % alignment
        self._cut(block, start)
        aligned = self.find(start)
        assert aligned is not None
        block = aligned
        self._cut(block, start + nbytes)
        self._free[stream].remove(block)
        block.is_live = True
        self.num_allocated_nbytes += block.nbytes
        self.peak_allocated_nbytes = max(self.peak_allocated_nbytes, self.num_allocated_nbytes)
        return block

    def hand_out(self, block: Block, nbytes: int) -> torch.UntypedStorage:
        """A storage of the block's first `nbytes`; the block is free again when it dies."""
        segment, notes, record = block.segment, self._notes, self._record
        start = segment.start + block.address - segment.address
        view = memoryview(segment.memory)[start : start + nbytes]

        def note(_: weakref.ref[memoryview]) -> None:
            notes.append(_Pending(block, [record(stream) for stream in block.sharers]))

        block.borrower = weakref.ref(view, note)
        return torch.frombuffer(view, dtype=torch.uint8).untyped_storage()

    def find(self, address: int) -> Block | None:
        """The block at `address`, live or free."""
        index = bisect_right(self._segments, address, key=lambda segment: segment.address) - 1
        if index < 0 or address >= self._segments[index].address + self._segments[index].nbytes:
            return None
        blocks = self._segments[index].blocks
        return blocks[bisect_right(blocks, address, key=lambda block: block.address) - 1]

    def settle(self) -> None:
        """Works off the notes of dead storages: see [Note: death notes]."""
        while self._notes:
            pending = self._notes.popleft()
            self.num_allocated_nbytes -= pending.block.nbytes
            self._pending.append(pending)
        still = []
        for pending in self._pending:
            if not all(event.is_complete for event in pending.events):
                still.append(pending)
                continue
            for event in pending.events:
                self._on_complete(event.clock)
            self._give_back(pending.block)
        self._pending = still

    def idle_nbytes(self) -> int:
        """Bytes of free blocks."""
        self.settle()
        return sum(block.nbytes for blocks in self._free.values() for block in blocks)

    def trim(self) -> None:
        """Unmaps segments without a live block; queued work that still reads them keeps their bytes."""
        self.settle()
        for segment in self._segments.copy():
            if len(segment.blocks) == 1 and segment.blocks[0] in self._free[segment.blocks[0].stream]:
                self._free[segment.blocks[0].stream].remove(segment.blocks[0])
                self._segments.remove(segment)
                self.num_reserved_nbytes -= segment.nbytes
                self._on_change(Span(segment.address, segment.nbytes))

    def _map(self, nbytes: int, stream: int, alignment: int) -> Block:
        segment = Segment(nbytes, alignment)
        block = Block(segment, segment.address, nbytes, stream)
        segment.blocks.append(block)
        insort(self._segments, segment, key=lambda s: s.address)
        self._free[stream].append(block)
        self.num_reserved_nbytes += nbytes
        self.peak_reserved_nbytes = max(self.peak_reserved_nbytes, self.num_reserved_nbytes)
        self._on_change(block.span)
        return block

    def _cut(self, block: Block, at: int) -> None:
        """Makes what is behind `at` a free block of its own."""
        if not block.address < at < block.end:
            return
        rest = Block(block.segment, at, block.end - at, block.stream)
        block.nbytes = at - block.address
        block.segment.blocks.insert(block.segment.blocks.index(block) + 1, rest)
        self._free[block.stream].append(rest)

    def _give_back(self, block: Block) -> None:
        block.is_live, block.borrower = False, None
        block.sharers = set()
        free, blocks = self._free[block.stream], block.segment.blocks
        free.append(block)
        index = blocks.index(block)
        for left, right in ((index, index + 1), (index - 1, index)):
            if left >= 0 and right < len(blocks) and blocks[left] in free and blocks[right] in free:
                free.remove(blocks[right])
                blocks[left].nbytes += blocks.pop(right).nbytes
