"""Copies of an accelerator's tensors in pinned host memory, begun in stream order and waited for by any thread.

Knows devices and streams, nothing of parameters. Copies go out on a stream of their own, after what the current stream
has queued: it computes meanwhile. Their sources may be dropped at once, but change only after `wait`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssdtrain.devices.base import Accelerator
from ssdtrain.io.engine import Fence
from ssdtrain.io.open_engine import fence
from ssdtrain.store.identity import ViewSpec, spec_nbytes, view_of, view_spec


@dataclass(frozen=True, eq=False)
class HostCopy:
    """A copy that is under way or over."""

    tensor: torch.Tensor
    done: Fence | None

    def wait(self) -> torch.Tensor:
        """Blocks, without the GIL, until the bytes are there."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensor

    def hold_back(self, stream: int) -> None:
        """Has what is queued on `stream` later wait for the copy: its source may change there."""
        if self.done is not None:
            self.done.make_wait(stream)


class HostCopies:
    """Begins copies, on one stream for each device."""

    def __init__(self, note_fallback: Callable[[str], None]) -> None:
        """Is told when copies cannot go the best way."""
        self._note_fallback = note_fallback
        self._streams: dict[Accelerator, int] = {}

    def begin(self, source: torch.Tensor, device: Accelerator) -> HostCopy:
        """Begins to copy a strided tensor of `device`, which must not change before the copy is over."""
        if device not in self._streams:
            self._streams[device] = device.new_stream()
        stream, spec = self._streams[device], _layout(source)
        host = view_of(self._allocate(spec_nbytes(spec), device), spec)
        ready = fence(device.driver, device.current_stream())
        assert ready is not None, "an accelerator has a driver"
        ready.make_wait(stream)
        with torch.no_grad(), device.stream(stream):
            host.copy_(source, non_blocking=True)
        device.share(source.untyped_storage(), stream)
        return HostCopy(host, fence(device.driver, stream))

    def hold_back(self, device: Accelerator) -> None:
        """Has what is queued on the current stream later wait for all copies of `device` that were begun."""
        if device in self._streams:
            done = fence(device.driver, self._streams[device])
            assert done is not None, "an accelerator has a driver"
            done.make_wait(device.current_stream())

    def wait(self) -> None:
        """Blocks until all copies that were begun are over: their sources may change."""
        for device, stream in self._streams.items():
            last = fence(device.driver, stream)
            assert last is not None, "an accelerator has a driver"
            last.synchronize()

    def _allocate(self, nbytes: int, device: Accelerator) -> torch.UntypedStorage:
        try:
            return device.allocate_host(nbytes)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            self._note_fallback(f"no pinned host memory ({why}): copies block the thread that trains")
            return torch.UntypedStorage(nbytes)


def _layout(tensor: torch.Tensor) -> ViewSpec:
    """That of a clone: with the strides of the tensor where it is dense."""
    spec = view_spec(tensor)._replace(storage_offset=0)
    if spec_nbytes(spec) == tensor.nbytes:
        return spec
    return spec._replace(stride=torch.empty(tensor.size(), device="meta").stride())
