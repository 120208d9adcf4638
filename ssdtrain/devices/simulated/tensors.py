"""From tensors to bytes: which ranges a tensor covers, and an alias of it that keeps no block alive."""

from __future__ import annotations

import math
from typing import Any

import torch

from ssdtrain.devices.simulated.machine import INTEGER_POISON, RAW_POISON, Machine
from ssdtrain.devices.simulated.order import Span
from ssdtrain.devices.simulated.shapes import Spec

_MAX_SPANS = 128


def spans_of(tensor: torch.Tensor) -> tuple[Span, ...]:
    """The ranges of bytes that a strided tensor covers; one range with the gaps in it when they are very many."""
    if tensor.numel() == 0:
        return ()
    address, run = tensor.data_ptr(), tensor.element_size()
    if tensor.is_contiguous():
        return (Span(address, tensor.numel() * run),)
    outer: list[tuple[int, int]] = []
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size == 1 or stride == 0:
            continue
        step = stride * tensor.element_size()
        if not outer and step == run:
            run *= size
        else:
            outer.append((step, size))
    if math.prod(size for _, size in outer) > _MAX_SPANS:
        return (Span(address, run + sum(step * (size - 1) for step, size in outer)),)
    starts = [address]
    for step, size in outer:
        starts = [start + step * i for start in starts for i in range(size)]
    return tuple(Span(start, run) for start in starts)


class Alias:
    """Makes what queued work computes on."""

    def __init__(self, machine: Machine) -> None:
        """Of tensors on `machine`."""
        self._machine = machine

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """An alias of `tensor` with a version counter of its own.

        Device memory may be freed and handed out again before the alias is used; memory of others is kept alive.
        """
        storage = tensor.untyped_storage()
        start = int(tensor.storage_offset())
        if storage.nbytes():
            address = storage.data_ptr()
            with self._machine.lock:
                block = self._machine.pool.find(address)
            if block is not None:
                start += (address - block.segment.address) // tensor.element_size()
                storage = block.segment.storage
            else:
                self._machine.note_foreign(storage)
        if not torch.is_inference_mode_enabled():
            return _like(tensor, storage, start)
        with torch.inference_mode(False):  # it is written to in a thread that is not in that mode
            return _like(tensor, storage, start)

    def is_managed(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is a block of ours."""
        storage = tensor.untyped_storage()
        with self._machine.lock:
            return storage.nbytes() > 0 and self._machine.pool.find(storage.data_ptr()) is not None


def _like(tensor: torch.Tensor, storage: torch.UntypedStorage, start: int) -> torch.Tensor:
    alias = torch.empty(0, dtype=tensor.dtype).set_(storage, start, tensor.size(), tensor.stride())
    if tensor.is_conj():
        alias = torch._conj(alias)
    return torch._neg_view(alias) if tensor.is_neg() else alias


def make(machine: Machine, spec: Spec) -> torch.Tensor:
    """A poisoned tensor of the current stream's memory."""
    itemsize = spec.dtype.itemsize
    last = sum((size - 1) * stride for size, stride in zip(spec.size, spec.stride, strict=True))
    if 0 in spec.size:
        return torch.empty_strided(spec.size, spec.stride, dtype=spec.dtype)
    is_integer = not (spec.dtype.is_floating_point or spec.dtype.is_complex)
    storage, _ = machine.allocate((last + 1) * itemsize, poison=INTEGER_POISON if is_integer else RAW_POISON)
    return torch.empty(0, dtype=spec.dtype).set_(storage, 0, spec.size, spec.stride)


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """All tensors of an operator's arguments or results, in order; for each operator, hence not by `torch.utils`."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def map_tensors(value: Any, function: Any) -> Any:
    """`value` with `function` of every tensor in it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value
