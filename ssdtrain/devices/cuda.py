"""One CUDA device: current streams, memory from PyTorch's caching allocator, and the driver the engine copies with.

[Note: memory in the order of streams]
PyTorch hands a freed block out again at once, to the next allocation of the stream it was allocated on. That stream
must therefore be ordered after whatever else still uses the block. The engine's copies run on streams of their own: a
source goes only when its copy is over, or after the stream it was saved on waits for the copy. Which stream has
allocated it nobody can ask, so the one that saved it is named (`share`): where the two are one that costs nothing. A
destination is allocated on the current stream, written after that point of it, and used by streams that wait for the
copy and are named where they are others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.devices.base import Allocation, TimedEvent
from ssdtrain.io.open_engine import cuda_driver


def index_in_use() -> int | None:
    """The current CUDA device, once this process computes on one."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


class _CudaMoment:
    """A timed event, which goes back to where it came from."""

    __slots__ = ("_event", "_free", "stream")

    def __init__(self, free: list[torch.cuda.Event], stream: torch.cuda.Stream) -> None:
        self._free = free
        self._event = free.pop() if free else torch.cuda.Event(enable_timing=True)
        self._event.record(stream)
        self.stream = int(stream.cuda_stream)

    def __del__(self) -> None:
        self._free.append(self._event)

    @property
    def is_reached(self) -> bool:
        return bool(self._event.query())

    def seconds_since(self, earlier: TimedEvent) -> float:
        assert isinstance(earlier, _CudaMoment)
        return float(earlier._event.elapsed_time(self._event)) / 1000


class CudaDevice:
    """Tensors in the memory of one CUDA device."""

    kind = "cuda"

    def __init__(self, index: int) -> None:
        """Opens the driver.

        Raises:
            RuntimeError: the extension is not built, or the driver cannot be used; the message says why.
        """
        self._device = torch.device("cuda", index)
        self.driver = cuda_driver(index)
        self._events: list[torch.cuda.Event] = []  # that nobody uses just now

    def why_not(self) -> str | None:
        """See `Device`. What a graph replays must not depend on what moved when it was captured."""
        if torch.cuda.current_device() == self._device.index:
            is_capturing = torch.cuda.is_current_stream_capturing()
        else:  # PyTorch asks the current device
            with torch.cuda.device(self._device):
                is_capturing = torch.cuda.is_current_stream_capturing()
        return "CUDA graph capture" if is_capturing else None

    def current_stream(self) -> int:
        """See `Device`. 0 is the legacy default stream."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def timed_event(self) -> TimedEvent:
        """See `Accelerator`."""
        return _CudaMoment(self._events, torch.cuda.current_stream(self._device))

    def allocate(self, nbytes: int, alignment: int, block_nbytes: int) -> Allocation:
        """See `Device`. Blocks of the caching allocator are aligned to 512 bytes, more than any dtype needs."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        storage = memory.untyped_storage()
        return Allocation(storage, memory.data_ptr(), nbytes, StorageWeakRef(storage))

    def bring(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """See `Device`."""
        if storage.device == self._device:
            return storage
        return torch.UntypedStorage(storage.nbytes(), device=self._device).copy_(storage)

    def share(self, storage: torch.UntypedStorage, stream: int) -> None:
        """See `Device`."""
        tensor = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        tensor.record_stream(self._stream(stream))

    def free_nbytes(self) -> int:
        """See `Accelerator`. What PyTorch keeps for later is free too."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free) + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def new_stream(self) -> int:
        """See `Accelerator`. Of PyTorch's pool of streams, which are never destroyed."""
        return int(torch.cuda.Stream(self._device).cuda_stream)

    @contextmanager
    def stream(self, handle: int) -> Iterator[None]:
        """See `Accelerator`."""
        with torch.cuda.stream(self._stream(handle)):
            yield

    def _stream(self, handle: int) -> torch.cuda.Stream:
        """For 0 the default stream: `ExternalStream(0)` is some other stream of PyTorch's pool."""
        if handle == 0:
            return torch.cuda.default_stream(self._device)
        return torch.cuda.ExternalStream(handle, device=self._device)

    def allocate_host(self, nbytes: int) -> torch.UntypedStorage:
        """See `Accelerator`. From PyTorch's caching host allocator, which follows the copies."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True).untyped_storage()

    def idle_nbytes(self) -> int:
        """See `Device`. Idle memory is the caching allocator's."""
        return 0

    def trim(self) -> None:
        """See `Device`."""
