"""What the store needs of one kind of device: whose streams are current, and where a reload may land.

The store never calls torch for memory or streams itself. On the CPU the tensor's own memory is host memory: engine
threads copy out of it, and the drive reads straight into it. An accelerator brings a driver, through which engine
threads copy on streams of their own: `ssdtrain.devices.cuda`, and `ssdtrain.devices.simulated` to prove the logic on
any machine.
"""

from __future__ import annotations

import mmap
from collections import deque
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_SMALL_NBYTES = 128 * 1024
_HUGE_NBYTES = 2 * 1024 * 1024
_MAX_LENT = 32  # mappings, before looking which of them died out of turn


class Allocation(NamedTuple):
    """Fresh memory for a reload: a storage of exactly the bytes asked for, at an address the drive accepts."""

    storage: torch.UntypedStorage
    address: int
    capacity: int
    weak: StorageWeakRef
    """Of the storage."""


class TimedEvent(Protocol):
    """A point in the work of a stream of an accelerator, whose time is known once it is reached."""

    @property
    def stream(self) -> int:
        """The stream, by its handle."""

    @property
    def is_reached(self) -> bool:
        """Whether the accelerator has got there."""

    def seconds_since(self, earlier: TimedEvent) -> float:
        """Between two moments of one accelerator that are both reached."""


class Device(Protocol):
    """One device, or one kind of device where all share their memory."""

    kind: str
    driver: Any
    """What engine threads copy with (`ssdtrain._C.DeviceDriver`); None for host memory."""

    def why_not(self) -> str | None:
        """Why nothing may travel just now, or None."""

    def current_stream(self) -> int:
        """The calling thread's stream, by the handle the driver knows it by. Asked at every use, never kept."""

    def allocate(self, nbytes: int, alignment: int, block_nbytes: int) -> Allocation:
        """Memory of `nbytes`, usable in the order of the current stream.

        In host memory it starts at a multiple of `alignment` and is writable up to whole blocks past the end.

        Raises:
            MemoryError: there is none left in host memory.
            torch.OutOfMemoryError: there is none left on an accelerator.
        """

    def share(self, storage: torch.UntypedStorage, stream: int) -> None:
        """`stream` uses memory that another stream allocated: freed, it is reused only after what is queued there."""

    def idle_nbytes(self) -> int:
        """Memory kept for the next reloads."""

    def trim(self) -> None:
        """Gives idle memory back to the system."""


class Accelerator(Device, Protocol):
    """A device with a driver: whose memory the CPU does not compute on."""

    def new_stream(self) -> int:
        """The handle of another stream, which lives as long as the process."""

    def stream(self, handle: int) -> AbstractContextManager[None]:
        """What the calling thread queues inside goes to that stream."""

    def timed_event(self) -> TimedEvent:
        """The point that the calling thread's current stream is at."""

    def allocate_host(self, nbytes: int) -> torch.UntypedStorage:
        """Pinned host memory; freed, it is handed out again only after the copies that are queued by then.

        Raises:
            RuntimeError: there is none.
        """


class CpuDevice:
    """Tensors in host memory.

    Large memory is mapped by us, which makes it page-aligned and the system's again once dropped. A mapping whose
    storage is dead serves the next reload of its size: fresh pages would be cleared by the kernel first, and on a busy
    machine that time is missing in training.
    """

    kind = "cpu"
    driver = None

    def __init__(self, max_idle_nbytes: int) -> None:
        """Keeps at most `max_idle_nbytes` for later."""
        self._max_idle_nbytes = max_idle_nbytes
        self._lent: deque[tuple[mmap.mmap, StorageWeakRef]] = deque()  # the oldest first: mostly it dies first
        self._idle: dict[int, list[mmap.mmap]] = {}  # by size, those of the size used longest ago first
        self._idle_nbytes = 0

    def why_not(self) -> str | None:
        """See `Device`."""
        return None

    def current_stream(self) -> int:
        """See `Device`. Host memory is used in program order."""
        return 0

    def share(self, storage: torch.UntypedStorage, stream: int) -> None:
        """See `Device`."""

    def allocate(self, nbytes: int, alignment: int, block_nbytes: int) -> Allocation:
        """See `Device`. The storage starts at the aligned address: offsets of rebuilt views equal the saved ones."""
        capacity = -(-nbytes // block_nbytes) * block_nbytes
        if capacity < _SMALL_NBYTES:
            small = bytearray(capacity + alignment)
            start = -torch.frombuffer(small, dtype=torch.uint8).data_ptr() % alignment
            view = torch.frombuffer(small, dtype=torch.uint8, count=nbytes, offset=start)
            storage = view.untyped_storage()
            return Allocation(storage, view.data_ptr(), capacity, StorageWeakRef(storage))
        mapping = self._reuse(capacity) or _map(capacity)
        view = torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes)
        storage = view.untyped_storage()
        weak = StorageWeakRef(storage)
        self._lent.append((mapping, weak))
        return Allocation(storage, view.data_ptr(), capacity, weak)

    def idle_nbytes(self) -> int:
        """See `Device`. What died out of turn counts when its size is missing, or with many others."""
        self._take_back()
        return self._idle_nbytes

    def trim(self) -> None:
        """See `Device`. Memory that is still a tensor's goes back when the tensor does."""
        self._lent.clear()
        self._idle, self._idle_nbytes = {}, 0

    def _reuse(self, capacity: int) -> mmap.mmap | None:
        """An idle mapping of this size."""
        self._take_back()
        if capacity not in self._idle:
            self._take_all_back()
        found = self._idle.pop(capacity, None)
        if found is None:
            return None
        mapping = found.pop()
        self._idle_nbytes -= capacity
        if found:
            self._idle[capacity] = found  # at the end: used last
        return mapping

    def _take_back(self) -> None:
        """What died in turn; now and then what did not."""
        lent = self._lent
        while lent and lent[0][1].expired():
            self._keep(lent.popleft()[0])
        if len(lent) > _MAX_LENT:
            self._take_all_back()

    def _take_all_back(self) -> None:
        """What died at all."""
        lent, self._lent = self._lent, deque()
        for mapping, weak in lent:
            if weak.expired():
                self._keep(mapping)
            else:
                self._lent.append((mapping, weak))

    def _keep(self, mapping: mmap.mmap) -> None:
        """Others go when too much is idle, those whose size was not asked for longest first."""
        capacity = len(mapping)
        if capacity > self._max_idle_nbytes:
            return
        self._idle.setdefault(capacity, []).append(mapping)
        self._idle_nbytes += capacity
        while self._idle_nbytes > self._max_idle_nbytes:
            oldest = next(iter(self._idle))
            self._idle[oldest].pop()
            self._idle_nbytes -= oldest
            if not self._idle[oldest]:
                del self._idle[oldest]


def _map(nbytes: int) -> mmap.mmap:
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"Expected {nbytes} bytes of memory to bring a saved tensor back, got: {error}") from error
    if nbytes >= _HUGE_NBYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
