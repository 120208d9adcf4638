"""What is asked of a device of any kind: whose stream is current, where a reload may land, why nothing may leave.

The store never calls torch for memory or streams itself. `cpu` is host memory: engine threads copy out of a tensor, and
the drive reads straight into it. An accelerator brings a driver, through which engine threads copy on streams of their
own: `cuda`, and `simulated` to prove the logic on any machine.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef


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
        """Why nothing may be offloaded just now, or None."""

    def current_stream(self) -> int:
        """The calling thread's stream, by the handle the driver knows it by. Asked at every use, never kept."""

    def allocate(self, nbytes: int, alignment: int, block_nbytes: int) -> Allocation:
        """Memory of `nbytes`, usable in the order of the current stream.

        In host memory it starts at a multiple of `alignment` and is writable up to whole blocks past the end.

        Raises:
            MemoryError: there is none left in host memory.
            torch.OutOfMemoryError: there is none left on an accelerator.
        """

    def bring(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """What is in another device's memory in this one's, complete when this returns; itself, where it is there.

        Raises:
            MemoryError, torch.OutOfMemoryError: there is none left.
        """

    def share(self, storage: torch.UntypedStorage, stream: int) -> None:
        """`stream` uses memory that another stream allocated: freed, it is reused only after what is queued there."""

    def idle_nbytes(self) -> int:
        """Memory kept for the next reloads."""

    def trim(self) -> None:
        """Gives idle memory back to the system."""


class Accelerator(Device, Protocol):
    """A device with a driver: whose memory the CPU does not compute on."""

    def free_nbytes(self) -> int:
        """Its memory that nobody uses now."""

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
