"""Host memory as a device: the program's order is the order of its use, and dropped memory serves the next reload.

Knows no streams, records or files.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.devices.base import Allocation

_SMALL_NBYTES = 128 * 1024
_HUGE_NBYTES = 2 * 1024 * 1024
_MAX_IN_USE = 32  # mappings, before looking which of them were dropped out of turn


class CpuDevice:
    """Tensors in host memory.

    Large memory is mapped by us, which makes it page-aligned and the system's again once dropped. A mapping whose
    storage is dead serves the next reload of its size: fresh pages would be cleared by the kernel first, and on a busy
    machine that time is missing in training.
    """

    kind = "cpu"
    driver = None

    def __init__(self, max_idle_nbytes: int | Callable[[], int]) -> None:
        """Keeps at most `max_idle_nbytes` for later, or as many as that says by then."""
        self._max_idle_nbytes = max_idle_nbytes if callable(max_idle_nbytes) else lambda: max_idle_nbytes
        self._in_use: deque[tuple[mmap.mmap, StorageWeakRef]] = deque()  # the oldest first: mostly it dies first
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

    def bring(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """See `Device`. Whichever stream has computed it: that is rare."""
        if storage.device.type == "cpu":
            return storage
        torch.get_device_module(storage.device).synchronize(storage.device)
        there: torch.UntypedStorage = storage.cpu()
        return there

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
        self._in_use.append((mapping, weak))
        return Allocation(storage, view.data_ptr(), capacity, weak)

    def idle_nbytes(self) -> int:
        """See `Device`. What died out of turn counts when its size is missing, or with many others."""
        self._take_back()
        return self._idle_nbytes

    def trim(self) -> None:
        """See `Device`. Memory that is still a tensor's goes back when the tensor does."""
        self._in_use.clear()
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
        """Keeps the mappings of dropped storages, the oldest first; now and then looks at all that are in use."""
        in_use = self._in_use
        while in_use and in_use[0][1].expired():
            self._keep(in_use.popleft()[0])
        if len(in_use) > _MAX_IN_USE:
            self._take_all_back()

    def _take_all_back(self) -> None:
        """Keeps the mapping of every storage that was dropped, in whatever order that happened."""
        in_use, self._in_use = self._in_use, deque()
        for mapping, weak in in_use:
            if weak.expired():
                self._keep(mapping)
            else:
                self._in_use.append((mapping, weak))

    def _keep(self, mapping: mmap.mmap) -> None:
        """Keeps a mapping for the next reload of its size.

        Too many idle bytes unmap what was asked for longest ago.
        """
        capacity = len(mapping)
        most = self._max_idle_nbytes()
        if capacity > most:
            return
        self._idle.setdefault(capacity, []).append(mapping)
        self._idle_nbytes += capacity
        while self._idle_nbytes > most:
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
