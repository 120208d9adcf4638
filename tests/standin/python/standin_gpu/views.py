"""CPU tensors on the bytes of CUDA tensors: the device's memory is host memory."""

from __future__ import annotations

from typing import Any

import torch

CPU, META = torch.device("cpu"), torch.device("meta")


def host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on the same bytes. It does not own them: they are used in the order of streams, as on a device."""
    storage = tensor.untyped_storage()
    if tensor.numel() == 0 or storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CPU)
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    view = torch.empty(0, dtype=tensor.dtype, device=CPU)
    view.set_(same, tensor.storage_offset(), tensor.size(), tensor.stride())
    view = view.conj() if tensor.is_conj() else view
    return torch._neg_view(view) if tensor.is_neg() else view


def on_host(value: Any) -> Any:
    """An argument of a kernel as the CPU's kernel takes it. What is in host memory is read now, as in a launch."""
    if isinstance(value, torch.Tensor):
        return host(value) if value.is_cuda else value.clone()
    return CPU if isinstance(value, torch.device) else value


def on_meta(value: Any) -> Any:
    """An argument without its bytes."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)
    return META if isinstance(value, torch.device) else None if isinstance(value, torch.Generator) else value
