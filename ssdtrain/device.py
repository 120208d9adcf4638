"""What the store needs of one kind of device: which tensors live there, and where a reload may land.

The store never calls torch for memory itself; a second kind of device (streams, events, asynchronous copies) is a
second class here. On the CPU the tensor's own memory is host memory: engine threads copy out of it, and the drive
reads straight into it.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple, Protocol

import torch

_SMALL_NBYTES = 128 * 1024
_HUGE_NBYTES = 4 * 1024 * 1024


class Allocation(NamedTuple):
    """Fresh memory for a reload: a storage of exactly the bytes asked for, at an address the drive accepts."""

    storage: torch.UntypedStorage
    address: int
    capacity: int


class Device(Protocol):
    """One kind of device."""

    kind: str

    def allocate(self, nbytes: int, alignment: int, block_nbytes: int) -> Allocation:
        """Memory of `nbytes` at a multiple of `alignment`, writable up to whole blocks past the end.

        Raises:
            MemoryError: there is none left.
        """


class CpuDevice:
    """Tensors in host memory."""

    kind = "cpu"

    def allocate(self, nbytes: int, alignment: int, block_nbytes: int) -> Allocation:
        """See `Device`. Large memory is mapped for the occasion, so that it is the system's again once dropped.

        The storage starts exactly at the aligned address: the offsets of rebuilt views equal the saved ones.
        """
        capacity = -(-nbytes // block_nbytes) * block_nbytes
        if capacity < _SMALL_NBYTES:
            small = bytearray(capacity + alignment)
            start = -torch.frombuffer(small, dtype=torch.uint8).data_ptr() % alignment
            view = torch.frombuffer(small, dtype=torch.uint8, count=nbytes, offset=start)
        else:
            mapped = _map(capacity)
            if capacity >= _HUGE_NBYTES and hasattr(mmap, "MADV_HUGEPAGE"):
                mapped.madvise(mmap.MADV_HUGEPAGE)
            view = torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes)
        return Allocation(view.untyped_storage(), view.data_ptr(), capacity)


def _map(nbytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"Expected {nbytes} bytes of memory to bring a saved tensor back, got: {error}") from error
