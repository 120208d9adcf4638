"""Safetensors in and out, one tensor after the other: the whole is never in memory.

Knows modules and offloaded parameters; what the files look like is known to `safetensors_format`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssdtrain.io.files.paths import absolute_path
from ssdtrain.io.files.replacing import replacing
from ssdtrain.parameters.offload import offloads_of
from ssdtrain.parameters.safetensors_format import check_entry, files_of, header_of, opened


def load_safetensors(module: torch.nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Gives a module the values of a safetensors checkpoint, one tensor at a time.

    With `offload_parameters` before, on a module built on the meta device, nothing but one tensor is ever in memory
    beside what stays there: a model larger than memory comes to be. Tensors are cast to the module's dtypes.

    Args:
        module: offloaded or not; what is on the meta device moves to the CPU.
        path: a file, an index of several (``model.safetensors.index.json``), or a directory with either.
        strict: whether names that the module or the checkpoint lacks are errors.

    Raises:
        ImportError: the package safetensors is not installed.
        FileNotFoundError: there is no such checkpoint.
        ValueError: a file or the index of several is malformed, names or shapes do not fit, or a buffer on the meta
            device is not in the checkpoint; the module is as it was.

    Example:
        >>> with torch.device("meta"):
        ...     model = Model(config)
        >>> ssdtrain.offload_parameters(model, "/mnt/nvme")
        >>> ssdtrain.load_safetensors(model, "model.safetensors")
    """
    files = files_of(Path(absolute_path(path, "a safetensors checkpoint")))
    wanted = _tensors(module)
    names = _aliases(wanted)
    missing = [name for name, others in names.items() if not any(other in files for other in others)]
    known = {other for others in names.values() for other in others}
    unknown = [name for name in files if name not in known]
    if strict and (missing or unknown):
        raise ValueError(
            f"Expected a checkpoint with the names of the module, got one without {_some(missing)} and with "
            f"{_some(unknown)} beyond them: pass strict=False to load what fits"
        )
    homeless = [n for n, tensor in module.named_buffers() if tensor.is_meta and n not in files]
    if homeless:
        raise ValueError(
            f"Expected every buffer in the checkpoint, got none for {_some(homeless)}: build buffers on the CPU, only "
            "parameters on the meta device"
        )
    found = {name: next((other for other in others if other in files), None) for name, others in names.items()}
    with contextlib.ExitStack() as stack:
        readers = {file: stack.enter_context(opened(file)) for file in set(files.values())}
        for name, other in found.items():
            if other is not None:
                check_entry(readers[files[other]], files[other], other, list(wanted[name].shape), name)
        for name, other in found.items():
            if other is not None:
                _fill(module, name, wanted[name], readers[files[other]].get_tensor(other))


def save_safetensors(
    module: torch.nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a module's state dict to a safetensors file, one tensor at a time.

    The file takes the place of an older one when it is complete and flushed: whenever the process is killed, one of the
    two is there. Of several processes that save to one path, each writes a whole file; the last one's stays, and those
    that met say so in a warning: save on one rank. A tensor with several names is written once, under the first.

    Args:
        module: offloaded or not.
        path: the file; an older one is replaced, a link is followed.
        metadata: texts for the header.

    Raises:
        ValueError: it could not be read back: a dtype or a kind of tensor that safetensors does not have, metadata that
            is no text, extra state of a module; nothing was written.
        FileExistsError: what is at the path is no regular file.
        OSError: the file cannot be written.

    Example:
        >>> ssdtrain.save_safetensors(model, "model.safetensors", {"step": "1000"})
    """
    path = absolute_path(path, "a safetensors file")
    every = _tensors(module)
    for offload in offloads_of(every.values()):
        offload.check_complete()
    _check_complete(module, every)
    tensors = {name: every[name] for name in _aliases(every)}
    header = header_of(tensors, metadata or {})
    with replacing(path) as file:
        file.write(header)
        for tensor in tensors.values():
            with _in_memory(module, tensor):
                file.write(_bytes_of(tensor))


def _check_complete(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """What has no bytes, or has state beside its tensors, would be lost without a word."""
    empty = [name for name, tensor in tensors.items() if tensor.is_meta and not offloads_of([tensor])]
    if empty:
        raise ValueError(
            f"Expected tensors with values, got {_some(empty)} on the meta device: load a checkpoint first"
        )
    extra = [
        name or type(owner).__name__
        for name, owner in module.named_modules()
        if type(owner).get_extra_state is not torch.nn.Module.get_extra_state and not _is_empty(owner.get_extra_state())
    ]
    if extra:
        raise ValueError(
            f"Expected modules with tensors only, got extra state of {_some(extra)}, for which safetensors has no "
            "place: save state_dict() with torch.save"
        )


def _is_empty(extra: Any) -> bool:
    return not extra.numel() if isinstance(extra, torch.Tensor) else extra is None


def _bytes_of(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under all their names."""
    found: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """The first name of every tensor, and all of its names."""
    by_id: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        by_id.setdefault(id(tensor), []).append(name)
    return {names[0]: names for names in by_id.values()}


def _fill(module: torch.nn.Module, name: str, tensor: torch.Tensor, value: torch.Tensor) -> None:
    offloads = offloads_of([tensor])
    if offloads:
        offloads[0].fill(tensor, value)
    elif not tensor.is_meta:
        with torch.no_grad():
            tensor.copy_(value)
    elif isinstance(tensor, torch.nn.Parameter):
        fresh = torch.nn.Parameter(value.to(tensor.dtype, copy=True), requires_grad=tensor.requires_grad)
        torch.utils.swap_tensors(tensor, fresh)
    else:
        owner, _, key = name.rpartition(".")
        module.get_submodule(owner)._buffers[key] = value.to(tensor.dtype, copy=True)


def _in_memory(module: torch.nn.Module, tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    offloads = offloads_of([tensor])
    return offloads[0].in_memory([tensor], to_change=False) if offloads else contextlib.nullcontext()


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
