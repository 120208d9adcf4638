"""The races that other offloaders had, written down as they were: each is caught, and its cure is not.

Every wrong offloader differs from `PinnedOffloader`, which is right, in the one thing that its origin got wrong.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from conftest import same_bits
from torch import nn

from ssdtrain.devices.simulated import SimulatedDevice, UnorderedAccessError

SEEDS = range(12)
FEW_SEEDS = range(4)  # the verdict is found when work is queued: any order will do
MIN_NBYTES = 1024


@dataclass
class Saved:
    """One saved tensor on its way."""

    size: torch.Size
    stride: tuple[int, ...]
    nbytes: int
    host: ctypes.Array
    stored: int = 0  # the event after the copy out
    landed: tuple[torch.UntypedStorage, int] | None = None  # and the event after the copy in


class PinnedOffloader:
    """Saved tensors to host memory, with copies on streams of their own. Right."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device, self.driver = device, device.driver
        self.out, self.in_ = self.driver.out_stream(), self.driver.in_stream()
        self.sources: deque[tuple[torch.Tensor, int]] = deque()
        self.buffers: deque[tuple[ctypes.Array, int | None]] = deque()
        self.num_stored = 0
        self.newest: Saved | None = None

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    # -- out

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Saved:
        is_weight = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        if is_weight or tensor.dtype is not torch.float32 or tensor.nbytes < MIN_NBYTES:
            return tensor
        self.let_go_of_sources()
        tensor = self.gather_and_order(tensor.detach())
        saved = Saved(tensor.size(), tensor.stride(), tensor.nbytes, self.take_buffer(tensor.nbytes))
        self.copy_out(saved, tensor)
        self.keep_source(tensor, saved.stored)
        self.num_stored += 1
        self.newest = saved
        return saved

    def gather_and_order(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy without gaps, and the transfer stream after it."""
        tensor = tensor.contiguous()
        self.wait_for_producer()
        return tensor

    def wait_for_producer(self) -> None:
        self.order(self.out, self.device.current_stream())

    def copy_out(self, saved: Saved, tensor: torch.Tensor) -> None:
        self.driver.copy_out(self.out, ctypes.addressof(saved.host), tensor.data_ptr(), saved.nbytes)
        saved.stored = self.driver.record(self.out)

    def keep_source(self, tensor: torch.Tensor, stored: int) -> None:
        self.sources.append((tensor, stored))

    def let_go_of_sources(self) -> None:
        """In stream order: what reuses the memory comes after the copy, and the host waits for nothing."""
        while self.sources:
            tensor, stored = self.sources.popleft()
            self.driver.wait(self.device.current_stream(), stored)
            del tensor

    # -- in

    def unpack(self, saved: torch.Tensor | Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        if saved.landed is None:
            self.prefetch(saved)
        storage, loaded = saved.landed
        saved.landed = None
        self.driver.wait(self.device.current_stream(), loaded)
        return torch.empty(0).set_(storage, 0, saved.size, saved.stride)

    def prefetch(self, saved: Saved) -> None:
        self.wait_for_store(saved)
        place = self.device.allocate(saved.nbytes, 512, 512)
        self.order(self.in_, self.device.current_stream())
        self.driver.copy_in(self.in_, place.address, ctypes.addressof(saved.host), saved.nbytes)
        saved.landed = place.storage, self.driver.record(self.in_)
        self.return_buffer(saved.host, saved.landed[1])

    def wait_for_store(self, saved: Saved) -> None:
        self.driver.wait(self.in_, saved.stored)

    # -- host memory

    def take_buffer(self, nbytes: int) -> ctypes.Array:
        if not self.buffers:
            return ctypes.create_string_buffer(nbytes)
        buffer, loaded = self.buffers.popleft()
        if loaded is not None:
            self.driver.wait(self.out, loaded)
        return buffer if len(buffer) >= nbytes else ctypes.create_string_buffer(nbytes)

    def return_buffer(self, buffer: ctypes.Array, loaded: int) -> None:
        self.buffers.append((buffer, loaded))

    def order(self, late: int, early: int) -> None:
        event = self.driver.record(early)
        self.driver.wait(late, event)
        self.driver.release(event)


class LetsGoAtOnce(PinnedOffloader):
    """torchtune#1867: the tensor is deleted while the transfer stream still reads it."""

    def keep_source(self, tensor: torch.Tensor, stored: int) -> None:
        pass


class SharesWithTransferStream(PinnedOffloader):
    """The cure by `record_stream`: right, though the memory comes back only when the host sees the copy over."""

    def keep_source(self, tensor: torch.Tensor, stored: int) -> None:
        self.device.share(tensor.untyped_storage(), self.out)


class RemembersStream(PinnedOffloader):
    """TRL PR#7195, first half: the compute stream is the one that was current when the offloader was made."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__(device)
        self.compute = device.current_stream()

    def wait_for_producer(self) -> None:
        self.order(self.out, self.compute)


class GathersTooLate(PinnedOffloader):
    """TRL PR#7195, second half: the transfer stream waits for all that is queued, then a copy to be moved is queued."""

    def gather_and_order(self, tensor: torch.Tensor) -> torch.Tensor:
        self.wait_for_producer()
        return tensor.clone(memory_format=torch.contiguous_format)


class GathersInTime(PinnedOffloader):
    def gather_and_order(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        self.wait_for_producer()
        return tensor


class LoadsBeforeItsStore(PinnedOffloader):
    """Megatron-LM#7398: the reload on its own stream does not wait for the tensor's copy out."""

    def wait_for_store(self, saved: Saved) -> None:
        pass


class ReturnsBufferEarly(PinnedOffloader):
    """Megatron-LM#7398 too: pinned memory is back in the pool when the copy in is queued, not when it is over."""

    def return_buffer(self, buffer: ctypes.Array, loaded: int) -> None:
        self.buffers.append((buffer, None))


class AsksInsideTheContext(PinnedOffloader):
    """torchtitan PR#2581: inside the side stream's context that is the current stream: it waits for itself."""

    def wait_for_producer(self) -> None:
        with self.device.stream(self.out):
            self.order(self.out, self.device.current_stream())


class AsksBeforeTheContext(PinnedOffloader):
    def wait_for_producer(self) -> None:
        compute = self.device.current_stream()
        with self.device.stream(self.out):
            self.order(self.out, compute)


class NeverWaits(PinnedOffloader):
    """cosmos-rl#317: two streams and no order between them."""

    def wait_for_producer(self) -> None:
        pass


class WritesFromDeviceMemory(PinnedOffloader):
    """kvikio's `pwrite` on device memory: a thread reads it, with no regard to any stream."""

    waits = False

    def copy_out(self, saved: Saved, tensor: torch.Tensor) -> None:
        produced = self.driver.record(self.out)  # after the producer, and after the buffer's last reader

        def pwrite() -> None:
            if self.waits:
                self.driver.synchronize(produced)
            self.driver.host_read(tensor.data_ptr(), saved.nbytes, "pwrite")
            ctypes.memmove(saved.host, tensor.data_ptr(), saved.nbytes)
            self.driver.host_write(ctypes.addressof(saved.host), saved.nbytes, "the drive")

        thread = threading.Thread(target=pwrite)
        thread.start()
        thread.join()
        saved.stored = self.driver.record(self.out)


class WritesAfterTheProducer(WritesFromDeviceMemory):
    waits = True


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Teams of threads that spin cost minutes on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# -- one training step ---------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """Makes what is saved next a tensor with gaps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 4, 8).transpose(1, 2).sigmoid().transpose(1, 2).reshape(-1, 32)


def train(offloader: PinnedOffloader | None) -> list[torch.Tensor]:
    """Two micro-batches under way at once; what was saved last is prefetched between them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), Transposed(), nn.Linear(32, 32), nn.GELU())
    losses = []
    for _ in range(2):
        with nullcontext() if offloader is None else offloader.hooks():
            losses.append(model(torch.randn(16, 32)).square().sum())
        if offloader is not None:
            offloader.prefetch(offloader.newest)
    for loss in losses:
        loss.backward()
    return [*(loss.detach() for loss in losses), *(parameter.grad for parameter in model.parameters())]


def run(make: Callable[[SimulatedDevice], PinnedOffloader], seed: int) -> list[torch.Tensor]:
    """Trains on another stream than the first, as some frameworks do."""
    device = SimulatedDevice(seed, run_ahead=[0, 5, 1 << 30][seed % 3], timeout_seconds=20.0)
    try:
        offloader = make(device)
        with device, device.stream(device.new_stream()):
            result = train(offloader)
        assert offloader.num_stored >= 6
        return result
    finally:
        device.close()


RIGHT = [PinnedOffloader, SharesWithTransferStream, GathersInTime, AsksBeforeTheContext, WritesAfterTheProducer]
WRONG = [
    (LetsGoAtOnce, "copy_out", "reuse of a block"),
    (RemembersStream, "aten", "copy_out"),
    (GathersTooLate, "aten.clone", "copy_out"),
    (LoadsBeforeItsStore, "copy_out", "copy_in"),
    (ReturnsBufferEarly, "copy_in", "copy_out"),
    (AsksInsideTheContext, "aten", "copy_out"),
    (NeverWaits, "aten", "copy_out"),
    (WritesFromDeviceMemory, "aten", "pwrite"),
]


@pytest.mark.parametrize("offloader", RIGHT)
def test_the_right_one_computes_the_same_in_every_order(offloader: type[PinnedOffloader]) -> None:
    expected = train(None)
    for seed in SEEDS:
        assert same_bits(expected, run(offloader, seed)), f"seed {seed}"


@pytest.mark.parametrize("offloader, first, second", WRONG)
def test_the_wrong_one_is_caught_in_every_order(offloader: type[PinnedOffloader], first: str, second: str) -> None:
    for seed in FEW_SEEDS:
        with pytest.raises(UnorderedAccessError, match=rf"`{first}.*` on .* and `{second}") as caught:
            run(offloader, seed)
        assert "test_known_races.py:" in str(caught.value)
