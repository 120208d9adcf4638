"""A simulated accelerator: its memory is host memory, its streams run later, and it checks every access.

    with SimulatedDevice(seed=3) as device:     # tensors made from here on are on the device
        loss = model(batch)                     # queued
        loss.backward()
    ...                                         # everything has run, or what went wrong was raised

Backward of CPU tensors runs in the calling thread, hence on that thread's current stream, whatever stream forward ran
on. `tolist()`, `numpy()` and printing wait; what else reads memory behind PyTorch's back must call `synchronize`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.devices.base import Allocation, TimedEvent
from ssdtrain.devices.simulated.driver import SimulatedDriver
from ssdtrain.devices.simulated.machine import RAW_POISON, Machine
from ssdtrain.devices.simulated.mode import HostReaderMode, LaterMode
from ssdtrain.devices.simulated.shapes import shared_shapes
from ssdtrain.devices.simulated.tensors import Alias
from ssdtrain.io.host_space import available_nbytes


class SimulatedDevice:
    """One kind of device, as the store sees it, and the test's handles on it."""

    kind = "simulated"

    def __init__(self, seed: int = 0, *, run_ahead: int = 1 << 30, timeout_seconds: float = 30.0) -> None:
        """Streams run in an order drawn from `seed`, when somebody waits or more than `run_ahead` operations wait.

        Any wait that takes longer than `timeout_seconds` is an error that lists what is queued.
        """
        self._machine = Machine(seed, run_ahead, timeout_seconds)
        self._alias = Alias(self._machine)
        self._local = threading.local()
        self.driver = SimulatedDriver(self._machine)

    # -- life ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> SimulatedDevice:
        """This thread computes on the device."""
        modes = ExitStack()
        modes.enter_context(LaterMode(self._machine, shared_shapes()))
        modes.enter_context(HostReaderMode(self._machine))
        self._modes().append(modes)
        self._machine.thread.num_entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Everything queued has run; raises what went wrong, unless something else is being raised."""
        try:
            if error is None:
                self.synchronize()
            else:
                self._abandon()
        finally:
            self._machine.thread.num_entered -= 1
            self._modes().pop().close()

    def close(self) -> None:
        """Lets held streams go, runs what is queued, ends the thread and raises what went wrong."""
        self._abandon()
        self._machine.executor.join()
        self._machine.raise_kept()

    def _abandon(self) -> None:
        self.release()
        self._machine.executor.drain()

    def _modes(self) -> list[ExitStack]:
        if not hasattr(self._local, "modes"):
            self._local.modes = []
        modes: list[ExitStack] = self._local.modes
        return modes

    # -- streams ---------------------------------------------------------------------------------------------------

    def new_stream(self, name: str = "side") -> int:
        """The handle of another compute stream."""
        return self._machine.add_stream(name)

    def current_stream(self) -> int:
        """The handle of the calling thread's compute stream."""
        return self._machine.current.handle

    @contextmanager
    def stream(self, handle: int) -> Iterator[None]:
        """What this thread computes inside is queued on another stream."""
        streams = self._machine.thread.streams
        streams.append(self._machine.stream(handle).handle)
        try:
            yield
        finally:
            streams.pop()

    def hold(self, stream: int) -> None:
        """Nothing more of `stream` is begun until `release`."""
        self._machine.executor.hold(self._machine.stream(stream), True)

    def release(self, stream: int | None = None) -> None:
        """Lets a held stream run on; all of them unless one is named."""
        for handle in list(self._machine.executor.streams) if stream is None else [stream]:
            self._machine.executor.hold(self._machine.stream(handle), False)

    def synchronize(self) -> None:
        """Blocks until nothing is queued; raises what went wrong since the last time."""
        self._machine.synchronize_all()

    drain = synchronize

    def check(self) -> None:
        """Raises what went wrong so far; waits for nothing."""
        self._machine.raise_kept()

    def describe(self) -> str:
        """The queued operations of every stream, as text."""
        return self._machine.executor.describe()

    def timed_event(self) -> TimedEvent:
        """The point that the calling thread's compute stream is at; it has the time at which that point was reached."""
        return self._machine.mark()

    # -- memory ----------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, alignment: int, block_nbytes: int) -> Allocation:
        """Memory of the current stream: work on another stream must wait for what is queued there now."""
        capacity = -(-nbytes // block_nbytes) * block_nbytes
        storage, block = self._machine.allocate(nbytes, capacity=capacity, alignment=alignment)
        return Allocation(storage, block.address, block.nbytes, StorageWeakRef(storage))

    def bring(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Its memory is the host's."""
        return storage

    def share(self, storage: torch.UntypedStorage, stream: int) -> None:
        """When `storage` dies, its memory is handed out again after what is queued on `stream` by then.

        Nothing is new for the stream that allocated it, to which it goes back at once, as PyTorch has it.
        """
        with self._machine.lock:
            block = self._machine.pool.find(storage.data_ptr())
            if block is not None and block.stream != stream:
                block.sharers.add(self._machine.stream(stream))

    def free_nbytes(self) -> int:
        """Its memory is the host's."""
        return available_nbytes()

    def allocate_host(self, nbytes: int) -> torch.UntypedStorage:
        """Host memory that is poison until a copy has come; what is queued keeps it alive."""
        storage = torch.UntypedStorage(nbytes)
        ctypes.memset(storage.data_ptr(), RAW_POISON, nbytes)
        return storage

    def idle_nbytes(self) -> int:
        """Free memory of all streams' pools."""
        with self._machine.lock:
            return self._machine.pool.idle_nbytes()

    def trim(self) -> None:
        """Unmaps what is free as a whole."""
        with self._machine.lock:
            self._machine.pool.trim()

    @property
    def num_allocated_nbytes(self) -> int:
        """Bytes of blocks whose storages are alive."""
        with self._machine.lock:
            self._machine.pool.settle()
            return self._machine.pool.num_allocated_nbytes

    @property
    def peak_allocated_nbytes(self) -> int:
        """The most bytes that were alive at once."""
        return self._machine.pool.peak_allocated_nbytes

    @property
    def peak_reserved_nbytes(self) -> int:
        """The most bytes that were mapped at once, because nothing free fitted."""
        return self._machine.pool.peak_reserved_nbytes

    def claims(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on this device: its memory is ours, or this thread computes on it now."""
        return tensor.is_cpu and (self._machine.thread.num_entered > 0 or self._alias.is_managed(tensor))

    def why_not(self) -> str | None:
        """Why nothing may be offloaded now."""
        return None
